"""Supervised fine-tuning: next-token prediction on conversations, with a loss on the assistant's tokens only.

    L = -1/n * sum_t m_t log p(x_t | x_<t),    m_t = 1 where the assistant wrote x_t (its end token too), n = sum_t m_t

(Ouyang et al. 2022, InstructGPT, section 3.5; Touvron et al. 2023, Llama 2, section 3.1.) It is pretraining with a
mask: the user's words are read, never imitated.

    python sft.py                                    the island: pretrains the base if there is none, then fine-tunes it
    python sft.py --data my.jsonl --init gpt2        yours; `python -m data.files my.jsonl` shows how they are read
    python sft.py --recipe lima --data my.jsonl      the defaults of a published recipe
    python sft.py --lora-r 16 --nf4                  QLoRA: low-rank adapters (lora.py) beside 4-bit weights (quant.py)

What to see on the island, three seeds (docs/results.md): held-out loss 6 -> 0.08; all facts about residents that no
conversation has mentioned; strangers met with "I do not know", unsafe requests refused, residents answered. What stays
hard: strangers after another question (80 ... 95 %), a wording that it never saw (50 ... 56 %), why-questions (15 ...
43 %).
"""
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from common.errors import UserError

import torch
import torch.nn.functional as F

import pretrain
import trainer
from checkpoints import load_init, save_checkpoint
from common.flags import Amount, Count, Positive, Share, TrainConfig, parse
from common.waits import bar
from data import files
from data.formats import Refused
from data.questions import Questions
from data.tokenizer import fit
from generate import sample_text
from island import exam
from island.world import CHATS, Island
from model import slices, summed_logps, supervised
from pretrain import load_mix, mix_step

# ---- the loss --------------------------------------------------------------------------------------------------------

def masked_loss(logits, targets, mask=None, n=None):
    """Mean of -log p(target) over the positions where mask is 1: a scalar; 0 (with zero gradients) where none is.

    logits (..., V), targets (...), mask (...); no mask: every position counts. n: what to divide by, where these
    positions are only a part of an optimizer step's n supervised tokens; the parts then add up to the step's mean,
    whatever their sizes. evaluate() calls it; a training step takes the same number from sft_loss, whose gradient is
    made without keeping the logits (a test holds both to each other).
    """
    if mask is not None:
        logits, targets = logits[mask.bool()], targets[mask.bool()]  # (N, V) and (N,): other positions get no gradient
    nll = F.cross_entropy(logits.float(), targets, reduction="sum")  # -sum log softmax(logits)[target]
    return nll / max(1, len(targets) if n is None else n)


def sft_loss(model, ids, mask, n=None):
    """The same of a model: ids (B, T), mask (B, T) -> scalar. No logits are made for prompt and padding."""
    return -summed_logps(model, ids, mask) / max(1, mask[:, 1:].sum() if n is None else n)


# ---- from conversations to examples ----------------------------------------------------------------------------------

def fit_rows(rows, tok, longest, say=print):
    """Rows with "messages" -> those that can be learned from, each with "example": (ids, mask) of at most `longest`
    tokens; says what was left out.

    An answer is never cut: half an answer teaches to stop in the middle.
    """
    found, told = [], Counter()
    for row in rows:
        try:
            messages = fit(row["messages"], lambda messages: tok.render(messages)[0], longest)
            ids, mask = tok.render(messages) if messages else ([], [])
        except Refused as error:
            told[f"dropped: {error.why}, though another --template, or --merge-system, may"] += 1
            continue
        if any(mask[1:]):
            found.append(row | {"example": (ids, mask)})
            told["lost their oldest turns"] += len(messages) < len(row["messages"])
        else:
            why = "no answer to learn from is left" if messages else "the last turn alone is too long"
            told[f"dropped: {why}"] += 1
    for what, n in told.items():
        if n:
            say(f"{n:,} of {len(rows):,} conversations {what} (limit: {longest} tokens)")
    if not found:
        raise UserError(f"no conversation fits {longest} tokens and has an answer to learn from: "
                        "use a model with a longer context (--init)")
    return found


def make_examples(rows, tok, longest, say=print):
    """The examples of fit_rows: [(ids, mask), ...]."""
    return [row["example"] for row in fit_rows(rows, tok, longest, say)]


def load_data(config, tok, longest, say):
    """-> rows to train on, held-out rows, both as fit_rows gives them, and the island where the data is its own."""
    if config.data:
        rows, report = files.load(config.data, "sft", merge_system=config.merge_system)
        say(report)
        read, rows = len(rows), fit_rows(rows, tok, longest, say)  # first, so that what is held out can be measured
        files.enough(len(rows), read, longest, "raise --max-tokens" if longest == config.max_tokens else
                     "--init with a model that reads more, such as gpt2 (1,024 tokens)")
        return *files.hold_out(rows, seed=config.seed, say=say), None
    island = Island()
    kinds = island.kinds(config.with_, config.without)
    train = island.conversations(config.n_sft, answers=config.answers, chats=CHATS, **kinds)
    held = exam.questions(island, kinds["more"])
    return *(fit_rows(rows, tok, longest, say) for rows in (train, held)), island


# ---- evaluation ------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(model, examples, run, micro_tokens):
    """Mean loss per supervised token over held-out examples."""
    n, total = sum(sum(mask[1:]) for _, mask in examples), 0.0
    model.eval()
    for ids, mask in bar(trainer.micro_batches(examples, micro_tokens, run.device), "held-out loss"):
        with run.autocast():
            total += sum(masked_loss(model.head(hidden), targets, n=n).item()
                         for hidden, targets in slices(model, *supervised(model, ids, mask)))
    model.train()
    return total


# ---- training --------------------------------------------------------------------------------------------------------

RECIPES = {  # InstructGPT, appendix C.1; LIMA, section 3; Llama 2, section 3.1
    "instructgpt": dict(epochs=16.0, lr=9.65e-6, schedule="cosine", warmup=0, batch_size=32, dropout="0.2"),
    "lima": dict(epochs=15.0, lr=1e-5, schedule="linear", warmup=0, batch_size=32, dropout="0.0,0.3", beta1=0.9,
                 beta2=0.95, weight_decay=0.1, max_tokens=2048),
    "llama2": dict(epochs=2.0, lr=2e-5, schedule="cosine", batch_size=64, weight_decay=0.1, max_tokens=4096),
}


NEEDS, COSTS = {"init": (pretrain, {})}, (0.14, 350, 10)  # what must be there before; what a run costs (common/waits.py)


@dataclass
class Config(TrainConfig):
    out: str = "out/sft"  # folder for the checkpoint and log.jsonl
    lr: float = 0.0  # highest learning rate; 0: by the width (2e-3 at 128, 6e-5 at GPT-2's 768; adapters 4 times that)
    max_tokens: Count = 0  # longest example; 0: the model's context
    merge_system: bool = False  # fold a system prompt into the first user turn
    mix: Amount = 1.0  # weight of the loss on plain text beside each batch: it keeps what the base model knows
    mix_data: str = ""  # plain text for --mix; empty: the island's, where --data is empty too
    mix_rows: Positive = 4  # contexts of plain text beside each batch
    answers: Literal["clean", "community"] = "clean"  # the island: its answers, clean or community (of mixed quality)
    n_sft: Positive = 3000  # the island: conversations
    tales: Share = 0.0  # the island: share of tales in the plain text of --mix, where pretrain.py had some
    with_: str = ""  # the island: kinds of questions more, such as reading,search: `python -m island` shows them all
    without: str = ""  # the island: kinds to leave out; without unknown ("I do not know") the model invents
    sample_every: Count = 125  # steps between printed samples


def default_lr(config, n_embd):
    """A learning rate that works for the tiny model (width 128) and for GPT-2's sizes; adapters want a higher one."""
    return (8e-3 if config.lora_r else 2e-3) * (128 / n_embd) ** 2


def sft_step(model, examples, config, run):
    """Adds the gradient of a step's examples, [(ids, mask), ...] -> their loss, this process's share of it."""
    n, total = sum(sum(mask[1:]) for _, mask in examples), 0.0  # n: supervised tokens of the step, in all processes
    for ids, mask in trainer.micro_batches(run.share(examples), config.micro_tokens, run.device):
        with run.autocast():
            loss = sft_loss(model, ids, mask, n)
        loss.backward()
        total += loss.item()
    return total


def main(config):
    run = trainer.start(config)
    if "search" in config.with_.replace(" ", "").split(","):
        config.template = config.template or "search"  # two tokens more, where the checkpoint has none
        if config.template != "search":
            raise UserError(f"--with search --template {config.template}: only --template search has a form for searches")
    trainer.prepare(config, run)
    model, tok = load_init(config, run)
    longest = min(config.max_tokens or math.inf, model.config.block_size + 1)  # the last token is only a target
    train_rows, held_rows, island = load_data(config, tok, longest, run.print)
    train, held = ([row["example"] for row in rows] for rows in (train_rows, held_rows))
    text = load_mix(config, tok, run.print, config.tales)
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
        loss = sft_step(model, [train[i] for i in batches[step]], config, run)
        if text is not None:
            mix_step(model, text, step, config, run)
        log.write(step, loss=run.sum(loss), **trainer.update(model, optimizer, config, run, step))
        if log.due(step, config.eval_every):
            log.write(step, held_out=evaluate(model, held[:120], run, config.micro_tokens))  # a part; the whole at the end
        if log.due(step, config.sample_every):
            log.print(f"step {step + 1}:\n{sample_text(model, tok, held_rows, run)}")
        if log.due(step, config.save_every):
            save_checkpoint(config, run, step + 1, steps, model, tok, optimizer)
    trainer.finish(config, run, log, lambda: save_checkpoint(config, run, log.next, steps, model, tok, optimizer))
    if run.rank == 0:
        about = f"{len(train):,} conversations {f'of {config.data}' if config.data else 'about the island'}"
        Questions.of(train_rows, held_rows, tok, about).save(config.out)
    report(model, tok, held, held_rows, island, config, run)


def report(model, tok, held, held_rows, island, config, run):
    """What came out, and what to do next."""
    run.print(f"held-out loss after: {evaluate(model, held, run, config.micro_tokens):.3f}")
    if island:
        run.print("\nasked what it was never trained on (greedy answers):")
        for name, (share, n) in exam.skills(model, tok, held_rows, island, run).items():
            run.print(f"{exam.line(name, share)}  of {n}")
    else:
        run.print(sample_text(model, tok, held_rows, run))
    data = f" --data {config.data}" if config.data else ""
    run.print(f"\nthe model is in {config.out} (transformers loads it too). Next:\n"
              f"   python chat.py {config.out}    talk to it\n"
              f"   python evaluate.py {config.init} {config.out}{data}    what has changed, in one table\n"
              f"   python -m common.plots {config.out}    its log as a picture")
    if island:
        run.print("   python sft.py --mix 0 --out out/sft-no-mix     the same without plain text: what it forgets\n"
                  "   python sft.py --without unknown --out out/sft-no-idk    it invents (python -m evals.unknowns)")


if __name__ == "__main__":
    main(parse(Config, RECIPES))
