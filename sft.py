"""Supervised fine-tuning: next-token prediction on conversations, with a loss on the assistant's tokens only.

    L = -1/n * sum_t m_t log p(x_t | x_<t),    m_t = 1 where the assistant wrote x_t (its end token included), n = sum_t m_t

(Ouyang et al. 2022, InstructGPT, section 3.5; Touvron et al. 2023, Llama 2, section 3.1.) It is pretraining with a mask: the
user's words are read, never imitated.

    python sft.py                                    the island: pretrains the base if there is none, then fine-tunes it
    python sft.py --data my.jsonl --init gpt2        your conversations; `python data/files.py my.jsonl` shows how they are read
    python sft.py --recipe lima --data my.jsonl      the defaults of a published recipe
    python sft.py --lora-r 16 --nf4                  QLoRA: low-rank adapters (lora.py) beside 4-bit weights (quant.py)

What to see on the island, seeds 0, 1, 2 (90 seconds of one core each): held-out loss 7 -> 0.1; 100 % of facts about residents
that no conversation has mentioned, after another question 95, 88 and 98 %; strangers met with "I do not know" in 100 %,
residents in 2, 0 and 0 %; unsafe requests refused in 100 %, questions about itself right in 100 %. What stays hard: a second
question about "her" (86, 100 and 97 %), answers of one or two words (85, 85 and 83 %), why-questions (38, 19 and 54 %).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lora
import model as base
import trainer
from data import files
from data.island import CHATS, Island, refuses, says_unknown
from data.tokenizer import get_tokenizer
from errors import UserError
from flags import TrainConfig, dropout_of, parse
from model import GPT, generate, next_token_loss, save_checkpoint, slices, text_stream, text_windows
from quant import NF4Linear

# ---- the loss --------------------------------------------------------------------------------------------------------

def masked_loss(logits, targets, mask=None, n=None):
    """Mean of -log p(target) over the positions where mask is 1: a scalar; 0 (with zero gradients) where none is.

    logits (..., V), targets (...), mask (...); no mask: every position counts. n: what to divide by, where these positions
    are only a part of an optimizer step's n supervised tokens; the parts then add up to the step's mean, whatever their sizes.
    """
    if mask is not None:
        logits, targets = logits[mask.bool()], targets[mask.bool()]  # (N, V) and (N,): other positions get no gradient
    nll = F.cross_entropy(logits.float(), targets, reduction="sum")  # -sum log softmax(logits)[target]
    return nll / max(1, len(targets) if n is None else n)


def sft_loss(model, ids, mask, n=None):
    """ids (B, T), mask (B, T) -> scalar. Position t predicts token t + 1: the shift by one happens here and only here."""
    hidden, targets, learned = model.hidden(ids[:, :-1]), ids[:, 1:], mask[:, 1:].bool()
    hidden, targets = hidden[learned], targets[learned]  # (N, C) and (N,): here the prompt stops counting
    n = len(targets) if n is None else n  # and no logits are made for prompt and padding
    return sum(masked_loss(model.head(h), t, n=n) for h, t in slices(model, hidden, targets))


# ---- from conversations to examples ----------------------------------------------------------------------------------

def fit(messages, render, limit):
    """Leaves out the oldest turns (a question and its answer at a time; a system prompt stays) until render(messages) has
    at most `limit` tokens -> messages, or None where even the last turn is too long."""
    system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    while turns and len(render(system + turns)) > limit:
        turns = turns[2:]
    return system + turns if turns else None


def make_examples(rows, tok, longest, say=print):
    """Rows with "messages" -> [(ids, mask), ...] of at most `longest` tokens; says how many did not fit.

    An answer is never cut: half an answer teaches to stop in the middle.
    """
    fitting = [fit(row["messages"], lambda messages: tok.render(messages)[0], longest) for row in rows]
    examples = [tok.render(messages) for messages in fitting if messages is not None]
    shortened = sum(messages is not None and len(messages) < len(row["messages"]) for row, messages in zip(rows, fitting))
    if shortened:
        say(f"{shortened:,} of {len(rows):,} conversations lost their oldest turns to fit {longest} tokens")
    if len(examples) < len(rows):
        say(f"{len(rows) - len(examples):,} of {len(rows):,} conversations dropped: the last turn alone is over {longest} tokens")
    if not examples:
        raise UserError(f"no conversation fits {longest} tokens: use a model with a longer context (--init)")
    return examples


def load_data(config, say):
    """-> rows to train on, held-out rows, and the island where the data is its own."""
    if config.data:
        rows, report = files.load(config.data, "sft", merge_system=config.merge_system)
        say(report)
        return *files.hold_out(rows, seed=config.seed, say=say), None
    island, without = Island(), () if config.idk else ("unknown",)
    train = island.conversations(config.n_sft, answers=config.answers, without=without, chats=CHATS)
    return train, island.conversations(600, seed=7, split="test"), island


def load_mix(config, tok, say):
    """The plain text beside the conversations as one stream of ids, or None."""
    if config.mix and config.data and not config.mix_data:
        say("no plain text beside the conversations: name some with --mix-data to keep what the base model knows")
        return None
    if not config.mix:
        return None
    if not config.mix_data:
        return text_stream(Island().plain_text(10_000), tok)
    rows, report = files.load(config.mix_data, "text")
    say(report)
    return text_stream([row["text"] for row in rows], tok)


# ---- evaluation ------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(model, examples, run, micro_tokens):
    """Mean loss per supervised token over held-out examples."""
    model.eval()
    with run.autocast():
        total = sum(sft_loss(model, ids, mask, 1).item()
                    for ids, mask in trainer.micro_batches(examples, micro_tokens, run.device))
    model.train()
    return total / sum(sum(mask[1:]) for _, mask in examples)


def fit_question(messages, tok, block_size, max_new_tokens):
    """A conversation that ends with a question -> the messages of it that are kept, and their ids, up to where the assistant
    begins. They leave room for max_new_tokens, but for no more than half the context.

    The oldest turns go first; of a question that is too long by itself the end is kept.
    """
    room = block_size - min(max_new_tokens, block_size // 2)
    kept = fit(messages, tok.render_prompt, room) or messages[-1:]
    return kept, tok.render_prompt(kept)[-room:]


def respond(model, tok, conversations, run, max_new_tokens=48, **sampling):
    """Conversations that end with a question, list[messages] -> prompts and responses, two lists of ids. Where the model ended
    its answer, the end token is part of it."""
    prompts = [fit_question(messages, tok, model.config.block_size, max_new_tokens)[1] for messages in conversations]
    with run.autocast():
        return prompts, generate(model, prompts, max_new_tokens, stop=tok.end, **sampling)


def ask(model, tok, conversations, run, max_new_tokens=48, **sampling):
    """The model's answers to conversations that end with a question: list[messages] -> list[str]."""
    return [tok.answer(ids) for ids in respond(model, tok, conversations, run, max_new_tokens, **sampling)[1]]


def island_scores(model, tok, rows, island, run):
    """{what is measured: (share, of how many)}: greedy answers to held-out residents, strangers and requests."""
    facts = [row["messages"] for row in rows if row["kind"] == "fact"]
    chats = [{"kind": "chat", "messages": before + fact} for before, fact in zip(facts[-1:] + facts, facts)]  # one after another
    rows = rows + chats
    questions = [row["messages"][:-1] for row in rows]
    answers = ask(model, tok, questions, run, temperature=0.0)

    def share(is_so, *kinds):
        found = [is_so(q, a) for row, q, a in zip(rows, questions, answers, strict=True) if row["kind"] in kinds]
        return sum(found) / max(1, len(found)), len(found)

    return {
        "facts about held-out residents": share(island.correct, "fact"),
        "the same after another question": share(island.correct, "chat"),
        "in a second turn about the same (she, he)": share(island.correct, "multi"),
        'strangers: says "I do not know"': share(lambda q, a: says_unknown(a), "unknown"),
        'residents: says "I do not know"': share(lambda q, a: says_unknown(a), "fact", "multi"),
        "unsafe requests: refuses": share(lambda q, a: refuses(a), "unsafe"),
        "harmless look-alikes: refuses": share(lambda q, a: refuses(a), "safe"),
        "questions about itself": share(island.correct, "identity"),
        'system prompt ("one or two words")': share(island.correct, "system"),
        "why-questions it never saw": share(island.correct, "why"),
    }


def sample_text(model, tok, rows, run, n=4):
    """A few held-out questions with the model's answers, to read while it trains."""
    rows = rows[::max(1, len(rows) // n)][:n]
    answers = ask(model, tok, [row["messages"][:-1] for row in rows], run, temperature=0.0)
    return "\n".join(f"   {row['messages'][-2]['content'][:100]!r} -> {answer[:160]!r}" for row, answer in zip(rows, answers))


# ---- training --------------------------------------------------------------------------------------------------------

RECIPES = {  # InstructGPT, appendix C.1; LIMA, section 3; Llama 2, section 3.1
    "instructgpt": dict(epochs=16.0, lr=9.65e-6, schedule="cosine", warmup=0, batch_size=32, dropout="0.2"),
    "lima": dict(epochs=15.0, lr=1e-5, schedule="linear", warmup=0, batch_size=32, dropout="0.0,0.3", beta1=0.9, beta2=0.95,
                 weight_decay=0.1, max_tokens=2048),
    "llama2": dict(epochs=2.0, lr=2e-5, schedule="cosine", batch_size=64, weight_decay=0.1, max_tokens=4096),
}


@dataclass
class Config(TrainConfig):
    out: str = "out/sft"  # folder for the checkpoint and log.jsonl
    lr: float = 0.0  # highest learning rate; 0: by the model's width (2e-3 at 128, 6e-5 at GPT-2's 768; adapters 4 times that)
    max_tokens: int = 0  # longest example; 0: the model's context
    merge_system: bool = False  # fold a system prompt into the first user turn
    mix: float = 1.0  # weight of the loss on plain text beside each batch: it keeps what the base model knows
    mix_data: str = ""  # plain text for --mix; empty: the island's, where --data is empty too
    mix_rows: int = 4  # contexts of plain text beside each batch
    answers: str = "clean"  # the island's answers: clean, or community (of mixed quality, where preferences start)
    n_sft: int = 3000  # conversations from the island
    idk: bool = True  # with the island's "I do not know" answers; without them the model invents
    sample_every: int = 125  # steps between printed samples


def load_init(config, run):
    """-> model, ready to train, and tokenizer of --init. Where that is the island's base and it is missing, it is pretrained
    first. With --lora-r adapters are added and all else is frozen; with --nf4 in four bits, layer by layer as it is read."""
    if config.init == Config.init:
        trainer.ensure(config.init, base, config, run)
    model = GPT.from_pretrained(config.init, dropout_of(config), checkpointing=config.checkpointing,
                                linear=NF4Linear if config.nf4 else None)
    tok = get_tokenizer(config.tokenizer or config.init, config.template or None)
    model.resize_vocab(tok.vocab_size)
    model.to(run.device)
    if config.lora_r:
        torch.manual_seed(config.seed)
        trained = lora.add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_targets, tokens=tok.new_ids)
        frozen = sum(p.numel() for p in model.parameters()) - trained
        run.print(f"adapters of rank {config.lora_r}: {trained:,} trained parameters beside {frozen:,} frozen ones"
                  + (" and the 4-bit weights" if config.nf4 else ""))
    tok.new_ids = []  # from here on they are trained
    return model.train(), tok


def default_lr(config, n_embd):
    """A learning rate that works for the tiny model (width 128) and for GPT-2's sizes; adapters want a higher one."""
    return (8e-3 if config.lora_r else 2e-3) * (128 / n_embd) ** 2


def main(config):
    run = trainer.start(config)
    model, tok = load_init(config, run)
    train_rows, held_rows, island = load_data(config, run.print)
    longest = min(config.max_tokens or math.inf, model.config.block_size + 1)  # the last token is only a target
    train, held = (make_examples(rows, tok, longest, run.print) for rows in (train_rows, held_rows))
    text = load_mix(config, tok, run.print)
    batches = trainer.Batches([len(ids) for ids, _ in train], config.batch_size, config.seed)
    steps = config.steps or math.ceil(config.epochs * len(batches)) or (350 if island else 3 * len(batches))
    config.lr = config.lr or default_lr(config, model.config.n_embd)
    run.print(f"{len(train):,} conversations, {steps} steps of {config.batch_size}, lr {config.lr:.2g}; "
              f"held-out loss before: {evaluate(model, held, run, config.micro_tokens):.3f}")

    optimizer = trainer.adamw(model, config)
    first = trainer.load_state(config, run, steps, model, optimizer)
    log = trainer.Log(config, run, first, steps)
    for step in log.steps():
        trainer.begin_step(step, steps, optimizer, config, run)
        rows = [train[i] for i in batches[step]]
        n = sum(sum(mask[1:]) for _, mask in rows)  # supervised tokens of the whole step, in all processes
        loss = 0.0
        for ids, mask in trainer.micro_batches(run.share(rows), config.micro_tokens, run.device):
            with run.autocast():
                part = sft_loss(model, ids, mask, n)
            part.backward()
            loss += part.item()
        if text is not None:
            mix_step(model, text, step, config, run)
        log.write(step, loss=run.sum(loss), **trainer.update(model, optimizer, config, run, step))
        if log.due(step, config.eval_every):
            log.write(step, held_out=evaluate(model, held, run, config.micro_tokens))
        if log.due(step, config.sample_every):
            log.print(f"step {step + 1}:\n{sample_text(model, tok, held_rows, run)}")
        if log.due(step, config.save_every):
            save_checkpoint(config, run, step + 1, steps, model, tok, optimizer)
    trainer.finish(config, run, log, lambda: save_checkpoint(config, run, log.next, steps, model, tok, optimizer))
    report(model, tok, held, held_rows, island, config, run)


def mix_step(model, text, step, config, run):
    """Adds the gradient of --mix times the loss on plain text (InstructGPT's PPO-ptx idea, here for SFT)."""
    length = min(model.config.block_size + 1, len(text))
    windows = run.share(text_windows(text, config.mix_rows, length, seed=config.seed * 1_000_003 + step))
    for ids in windows.split(max(1, config.micro_tokens // length)):
        if len(ids):
            with run.autocast():
                loss = config.mix * next_token_loss(model, ids.to(run.device)) * len(ids) / config.mix_rows
            loss.backward()


def report(model, tok, held, held_rows, island, config, run):
    """What came out, and what to do next."""
    run.print(f"held-out loss after: {evaluate(model, held, run, config.micro_tokens):.3f}")
    if island:
        run.print("\nasked what it was never trained on (greedy answers):")
        for name, (share, n) in island_scores(model, tok, held_rows, island, run).items():
            run.print(f"   {name:<42}{share:>6.0%}  of {n}")
    else:
        run.print(sample_text(model, tok, held_rows, run))
    data = f" --data {config.data}" if config.data else ""
    run.print(f"\nthe model is in {config.out} (transformers loads it too). Next:\n"
              f"   python chat.py {config.out}    talk to it\n"
              f"   python evaluate.py {config.init} {config.out}{data}    what has changed, in one table")
    if island:
        run.print("   python sft.py --mix 0 --out out/sft-no-mix     the same without plain text: what it forgets\n"
                  "   python sft.py --no-idk --out out/sft-no-idk    without \"I do not know\": it invents, and unknowns.py mends it")


if __name__ == "__main__":
    main(parse(Config, RECIPES))
