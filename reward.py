"""Reward modelling: one number for an answer, learned from which of two answers people preferred.

    P(w beats l) = sigmoid( r(x, w) - r(x, l) ),      L = - 1 / C(K, 2) * sum over pairs (w, l) of log P(w beats l)

for a question x with K ranked answers, averaged over questions (Bradley and Terry 1952; K = 2: Rafailov et al. 2023, equation
2; any K: Ouyang et al. 2022, InstructGPT, equation 1). Only differences count: the model learns what is better, never how good
it is, so at the end its scores are shifted to mean 0 on the answers of the SFT data.

    python reward.py                                 the island's votes (the community SFT model is trained first if missing)
    python reward.py --data my.jsonl --init out/sft  your ranked answers; `python data/files.py my.jsonl --want ranked` checks them
    python reward.py --aspect simple --out out/simple    another field of the answers ranks them; ppo.py --reward takes the
                                                     weighted sum of several models, such as 0.7*out/reward+0.3*out/simple
"""
import importlib.util
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import hub
import lora
import sft
import trainer
from data import files
from data.island import Island, complies, is_polite
from data.island_words import FLATTERY
from data.pairs import make_pairs
from data.readability import is_simple
from data.tokenizer import get_tokenizer
from errors import UserError
from flags import TrainConfig, parse
from model import GPT, save_model

TOO_WEAK = 0.70  # below this share of held-out pairs, reinforcement learning would mostly learn the model's mistakes
HELD_OUT = 300  # questions of each of the island's two held-out parts


# ---- the losses ------------------------------------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected, weight=None):
    """-mean log sigmoid(chosen - rejected): scores (N,) and (N,) -> scalar, 0 where there is no pair.

    weight: (N,), of each pair; the mean is then the weighted one.
    """
    nll = -F.logsigmoid(chosen - rejected)  # (N,); logsigmoid(x) stays finite where log(sigmoid(x)) is log 0
    weight = torch.ones_like(nll) if weight is None else weight
    return (weight * nll).sum() / weight.sum().clamp(min=1e-8)


def pairwise_loss(scores, weights):
    """sum_ij weights_ij * -log sigmoid(s_i - s_j): scores (N,), weights (N, N) -> scalar. weights_ij is that of "i beats j", 0
    where that was not said. However many pairs an answer is in, it has been scored once."""
    differences = scores[:, None] - scores[None, :]  # (N, N): s_i - s_j
    return -(weights * F.logsigmoid(differences)).sum()


def ranking_loss(scores, ranks):
    """One question: scores (K,) and ranks (K,), 0 the best -> scalar: the mean over its pairs. Equal ranks give no pair; without
    any pair the loss is 0."""
    better = (ranks[:, None] < ranks[None, :]).to(scores.dtype)  # (K, K)
    return pairwise_loss(scores, better / better.sum().clamp(min=1))


# ---- the model -------------------------------------------------------------------------------------------------------

HEAD = {"weight": "score.weight", "bias": "score.bias"}  # its names in the file, as transformers' GPT2ForSequenceClassification


class RewardModel(nn.Module):
    """A GPT's trunk with one number at every position in place of the logits. The last token has read the whole answer."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.head = nn.Linear(gpt.config.n_embd, 1, device=gpt.device)
        # Stiennon et al. 2020: scores start with a variance of about 1, whatever the width
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(gpt.config.n_embd + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, lengths):
        """ids (B, T) padded on the right, lengths (B,) without the padding -> scores (B,), float32, read off the last token."""
        hidden = self.gpt.hidden(ids)  # (B, T, C)
        return self._number(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])  # (B, C) -> (B,)

    def values(self, ids):
        """The same number at every position: ids (B, T) -> (B, T). PPO's value model is trained from here."""
        return self._number(self.gpt.hidden(ids))  # (B, T, C) -> (B, T)

    def _number(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16's three digits are too few to compare scores
            return self.head(hidden.float()).squeeze(-1)  # (..., C) -> (...)

    def head_tensors(self):
        """The head under the names that it has in the checkpoint."""
        return {HEAD[name]: parameter.detach().cpu().float() for name, parameter in self.head.named_parameters()}

    def save_pretrained(self, folder):
        """A Hugging Face folder as GPT writes it, the head in the same file."""
        self.gpt.save_pretrained(folder, extra=self.head_tensors())

    @classmethod
    def from_pretrained(cls, folder):
        """A folder that reward.py wrote, an adapter merged into its base. Raises UserError where it holds no reward head."""
        model = cls(GPT.from_pretrained(folder))
        try:
            extra = lora.read_extra(folder).__getitem__ if lora.is_adapter(folder) else hub.open_weights(hub.find(folder))
            for name, parameter in model.head.named_parameters():
                parameter.data.copy_(extra(HEAD[name]))
        except (UserError, KeyError):
            raise UserError(f"{folder} is a model without a reward head: train one with python reward.py --init {folder}")
        return model


# ---- from ranked answers to examples ---------------------------------------------------------------------------------

ASPECTS = {  # what --aspect may name on the island: judged answer by answer, without a vote
    "gold": lambda island, prompt, text: island.gold(prompt, text),
    "helpful": lambda island, prompt, text: float(island.correct(prompt, text)),
    "simple": lambda island, prompt, text: float(is_simple(text)),
    "harmless": lambda island, prompt, text: float(is_polite(text) and not (
        island.understand(prompt).kind == "unsafe" and complies(text))),
}


@dataclass
class RankedConfig(TrainConfig):
    """What reward.py and dpo.py have in common: both learn from ranked answers and start from the community SFT model."""

    data: str = ""  # a file with several ranked answers a question; empty: the island's votes
    init: str = "out/sft-community"  # start from this checkpoint: a model fine-tuned on conversations
    pairs: str = "all"  # which answers of a question are compared: all, top2, best-worst or random
    max_pairs: int = 10  # most pairs of a question; 0: no limit
    aspect: str = "score"  # the number that ranks the answers: a field of your file; the island: score (votes), gold, helpful, simple, harmless
    n_ranked: int = 2000  # the island: questions with ranked answers
    flattery: float = 2.5  # the island: what "Great question!" is worth to voters, in gold points
    noise: float = 1.5  # the island: standard deviation of the votes, in gold points
    merge_system: bool = False  # fold a system prompt into the first user turn


def load_ranked(config, say):
    """-> rows to train on, held-out rows {"prompt", "answers": [{"text", "score"}]}, and the island where the data is its own.

    Rows of your file that open with the same words are held out together: one question may come in many pairs.

    Half of the island's held-out rows are new votes on what training votes were about ("known"), half are about residents,
    strangers and requests that no training row of any stage but the plain text has mentioned ("new").
    """
    if config.data:
        rows, report = files.load(config.data, "ranked", config.merge_system, score=config.aspect)
        say(report)
        opening = lambda row: next(m["content"] for m in row["prompt"] if m["role"] == "user")
        _, held = files.hold_out(list(dict.fromkeys(map(opening, rows))), seed=config.seed)
        return [row for row in rows if opening(row) not in held], [row for row in rows if opening(row) in held], None
    if config.aspect not in ("score", *ASPECTS):
        raise UserError(f"--aspect {config.aspect}: the island's answers have score (votes), {', '.join(ASPECTS)}")
    island, votes = Island(), dict(flattery=config.flattery, noise=config.noise)
    train = island.ranked(config.n_ranked, **votes)
    held = [row | {"about": "known"} for row in island.ranked(HELD_OUT, seed=6, **votes)]
    held += [row | {"about": "new"} for row in island.ranked(HELD_OUT, seed=4, split="test", **votes)]
    if config.aspect in ASPECTS:
        for row in train + held:
            for answer in row["answers"]:
                answer["score"] = ASPECTS[config.aspect](island, row["prompt"], answer["text"])
    return train, held, island


def load_start(config, run):
    """-> model, ready to train, and tokenizer: sft.load_init, after training the community SFT model where it is missing."""
    if config.init == RankedConfig.init:
        trainer.ensure(config.init, sft, config, run, answers="community")
    return sft.load_init(config, run)


def answered(row, answer):
    """The conversation that ends with this answer."""
    return row["prompt"] + [{"role": "assistant", "content": answer["text"]}]


def make_questions(rows, tok, longest, config, say=print):
    """Ranked rows -> [(answers, pairs), ...]: the ids of whole conversations, end token included, and which of them beats which.

    Answers that are in no pair are left out, answers of over `longest` tokens too: a part of an answer is not what was ranked.
    """
    questions, too_long = [], 0
    for i, row in enumerate(rows):
        answers = []
        for answer in row["answers"]:
            messages = sft.fit(answered(row, answer), lambda messages: tok.render(messages)[0], longest)
            answers += [(tok.render(messages)[0], answer["score"])] if messages else []
        too_long += len(row["answers"]) - len(answers)
        pairs = make_pairs([score for _, score in answers], config.pairs, config.max_pairs, random.Random(f"{config.seed} {i}"))
        used = sorted({k for pair in pairs for k in pair})
        if pairs:
            questions.append(([answers[k][0] for k in used], [(used.index(w), used.index(l)) for w, l in pairs]))
    if too_long:
        say(f"{too_long:,} answers dropped: with their question they are over {longest} tokens")
    if not questions:
        raise UserError(f"no question has two answers of different scores that fit {longest} tokens: look at --data, --aspect and --init")
    say(f"{len(questions):,} of {len(rows):,} questions give {sum(len(pairs) for _, pairs in questions):,} pairs of answers")
    return questions


def question_batches(questions, micro_tokens, device):
    """Whole questions -> [(ids (N, T), lengths (N,), weights (N, N)), ...], at most micro_tokens padded tokens each (a larger
    single question still makes one). weights: those of pairwise_loss, each question's adding up to 1."""
    size = lambda questions: sum(len(answers) for answers, _ in questions) * max(len(a) for answers, _ in questions for a in answers)
    parts = []
    for question in sorted(questions, key=lambda question: max(map(len, question[0]))):
        if parts and size(parts[-1] + [question]) <= micro_tokens:
            parts[-1].append(question)
        else:
            parts.append([question])
    return [collate(part, device) for part in parts]


def collate(questions, device):
    """[(answers, pairs), ...] -> ids (N, T), lengths (N,), weights (N, N), block-diagonal: no pair across questions."""
    ids, real = trainer.pad([(ids, [1] * len(ids)) for answers, _ in questions for ids in answers], device)
    weights, first = torch.zeros(len(ids), len(ids)), 0
    for answers, pairs in questions:
        for winner, loser in pairs:
            weights[first + winner, first + loser] = 1 / len(pairs)
        first += len(answers)
    return ids, real.sum(1), weights.to(device)


# ---- scoring ---------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def score(model, tok, conversations, run, micro_tokens=16384):
    """Conversations that end with the assistant's answer -> [its score, ...], in their order.

    Rendered as in training, so the end token is what the score is read off. One too long for the model loses its oldest turns,
    then the beginning of its question.
    """
    limit = model.gpt.config.block_size
    render = lambda messages: tok.render(messages)[0]
    rows = [render(sft.fit(messages, render, limit) or messages[-2:])[-limit:] for messages in conversations]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    was_training, scores = model.training, []
    model.eval()
    with run.autocast():
        for ids, real in trainer.micro_batches([(rows[i], [1] * len(rows[i])) for i in order], micro_tokens, run.device):
            scores += model(ids, real.sum(1)).tolist()  # sorted already, so micro_batches keeps the order
    model.train(was_training)
    return [s for _, s in sorted(zip(order, scores))]


def load_rewards(spec, run, micro_tokens=16384):
    """"out/reward", or a weighted sum such as "0.7*out/helpful+0.3*out/simple" -> conversations -> [their scores, ...].

    Each folder reads with its own tokenizer. Raises UserError for a weight that is no number and for what is no reward model.
    """
    models = []
    for term in [spec] if Path(spec).is_dir() else spec.split("+"):
        weight, star, folder = term.strip().partition("*")
        weight, folder = (weight, folder.strip()) if star else ("1", term.strip())
        try:
            models.append((float(weight), RewardModel.from_pretrained(folder).to(run.device).eval(), get_tokenizer(folder)))
        except ValueError:
            raise UserError(f"{spec}: {weight!r} is no number; a sum of reward models looks like 0.7*out/helpful+0.3*out/simple")

    def scorer(conversations):
        each = [[weight * s for s in score(model, tok, conversations, run, micro_tokens)] for weight, model, tok in models]
        return [sum(column) for column in zip(*each)]

    return scorer


# ---- evaluation ------------------------------------------------------------------------------------------------------

def score_rows(model, tok, rows, run, micro_tokens):
    """Every answer of every ranked row -> [[score, ...], ...]."""
    scores = iter(score(model, tok, [answered(row, a) for row in rows for a in row["answers"]], run, micro_tokens))
    return [[next(scores) for _ in row["answers"]] for row in rows]


def right(rows, scores, by="score"):
    """For each row that has a pair: [did the answer with more `by` get the higher score, ...]. A tie is not right."""
    pairs = [make_pairs([answer[by] for answer in row["answers"]], max_pairs=0) for row in rows]
    return [[s[w] > s[l] for w, l in of_row] for s, of_row in zip(scores, pairs, strict=True) if of_row]


def accuracy(rows, scores, by="score"):
    """-> micro (over pairs), macro (over questions: one with six answers counts as much as one with two), number of pairs."""
    found = right(rows, scores, by)
    n = sum(map(len, found))
    return sum(map(sum, found)) / max(1, n), sum(sum(row) / len(row) for row in found) / max(1, len(found)), n


def calibration(rows, scores, bins=10):
    """Is an answer that should win with 80 % the winner in 80 %? -> [(pairs, mean predicted, observed share), ...].

    Predicted: sigmoid of the difference, of the answer with the higher score, so from 0.5 to 1. Empty bins are (0, nan, nan).
    """
    found = [[] for _ in range(bins)]
    for row, s in zip(rows, scores, strict=True):
        for w, l in make_pairs([answer["score"] for answer in row["answers"]], max_pairs=0):
            predicted = 1 / (1 + math.exp(-min(abs(s[w] - s[l]), 50)))
            found[min(int((predicted - 0.5) * 2 * bins), bins - 1)].append((predicted, s[w] > s[l]))
    mean = lambda values: sum(values) / len(values) if values else math.nan
    return [(len(b), mean([p for p, _ in b]), mean([won for _, won in b])) for b in found]


def plot_calibration(table, path):
    """The calibration as a picture. Raises UserError where matplotlib is missing."""
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave the flag out")
    from matplotlib.figure import Figure  # not pyplot: that one looks for a display
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], "--", color="grey", label="perfect")
    axes.plot([p for n, p, _ in table if n], [o for n, _, o in table if n], "o-", label="reward model")
    axes.set(xlabel="predicted win rate", ylabel="observed win rate", title="held-out pairs")
    axes.legend()
    figure.savefig(path)


def flattery_premium(model, tok, rows, run, micro_tokens):
    """How much higher a wrong answer scores with praise in front: the same words otherwise, and gold does not move."""
    plain = [answered(row, a) for row in rows for a in row["answers"] if a["type"] in ("wrong", "invent")]
    praised = [c[:-1] + [c[-1] | {"content": f"{FLATTERY} {c[-1]['content']}"}] for c in plain]
    means = [sum(score(model, tok, texts, run, micro_tokens)) / max(1, len(plain)) for texts in (praised, plain)]
    return means[0] - means[1]


# ---- training --------------------------------------------------------------------------------------------------------

@dataclass
class Config(RankedConfig):
    out: str = "out/reward"  # folder for the checkpoint and log.jsonl
    lr: float = 0.0  # highest learning rate; 0: by the model's width (3e-4 at 128, 5e-5 at GPT-2's 768; adapters 4 times that)
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes; with neither 200 on the island, one epoch of --data
    batch_size: int = 16  # questions per optimizer step, each with all its answers
    warmup: int = 10  # steps in which the learning rate rises from 0
    weight_decay: float = 0.01  # AdamW: on matrices only
    plot: str = ""  # write the calibration to this picture; empty: calibration.png in --out, where matplotlib is installed


def default_lr(config, n_embd):
    """A learning rate that works for the tiny model (width 128) and for GPT-2's sizes; adapters want a higher one."""
    return (1.2e-3 if config.lora_r else 3e-4) * 128 / n_embd


def center(model, tok, demonstrations, run, micro_tokens):
    """Shifts the bias so that these conversations score 0 on average: an answer above 0 is then better than what the SFT model
    was shown (Ouyang et al. 2022, section 3.5). It changes no difference and so no preference."""
    scores = score(model, tok, demonstrations, run, micro_tokens)
    model.head.bias.data -= sum(scores) / len(scores)


def demonstrations(train_rows, island, n=500):
    """The answers of the SFT data: the island's community conversations; of your file the best answer to each question, which is
    what sft.py learns from it."""
    if island:
        return [row["messages"] for row in island.conversations(n, answers="community")]
    return [answered(row, max(row["answers"], key=lambda answer: answer["score"])) for row in train_rows[:n]]


def main(config):
    run = trainer.start(config)
    if config.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave the flag out")  # now, not after training
    train_rows, held_rows, island = load_ranked(config, run.print)
    gpt, tok = load_start(config, run)
    torch.manual_seed(config.seed)
    model = RewardModel(gpt).train()
    model.head.bias.requires_grad_(False)  # it cancels in every difference, so there is nothing to learn; center() sets it
    questions = make_questions(train_rows, tok, gpt.config.block_size, config, run.print)
    shown = demonstrations(train_rows, island)
    batches = trainer.Batches([max(map(len, answers)) for answers, _ in questions], config.batch_size, config.seed)
    steps = config.steps or math.ceil(config.epochs * len(batches)) or (200 if island else len(batches))
    config.lr = config.lr or default_lr(config, gpt.config.n_embd)
    some = held_rows[::max(1, len(held_rows) // 100)]

    def save(step):
        trainer.save_state(config, run, step, steps, model, optimizer)
        if run.rank == 0:
            save_model(config, gpt, tok, extra=model.head_tensors())

    optimizer = trainer.adamw(model, config)
    first = trainer.load_state(config, run, steps, model, optimizer)
    log = trainer.Log(config, run, first, steps)
    for step in log.steps():
        trainer.begin_step(step, steps, optimizer, config, run)
        rows = [questions[i] for i in batches[step]]
        loss = 0.0
        for ids, lengths, weights in question_batches(run.share(rows), config.micro_tokens, run.device):
            with run.autocast():
                part = pairwise_loss(model(ids, lengths), weights) / len(rows)
            part.backward()
            loss += part.item()
        log.write(step, loss=run.sum(loss), **trainer.update(model, optimizer, config, run, step))
        if log.due(step, config.eval_every):
            log.write(step, accuracy=accuracy(some, score_rows(model, tok, some, run, config.micro_tokens))[0])
        if log.due(step, config.save_every):
            save(step + 1)
    center(model, tok, shown, run, config.micro_tokens)
    trainer.finish(config, run, log, lambda: save(log.next))
    report(model, tok, held_rows, island, config, run)


def report(model, tok, rows, island, config, run):
    """What came out, and what to do next."""
    scores = score_rows(model, tok, rows, run, config.micro_tokens)
    run.print(f"\nheld-out pairs ranked right (chance 50%)      over pairs  over questions     pairs")
    groups = [(None, None)] + [(key, value) for key in ("about", "kind") for value in sorted({row.get(key) for row in rows} - {None})]
    for key, value in groups:
        members, their_scores = zip(*[(row, s) for row, s in zip(rows, scores) if row.get(key) == value])
        for by in ("score", "gold") if island else ("score",):
            micro, macro, n = accuracy(members, their_scores, by)
            name = (f"{key}: {value}" if key else "all") + (f", by {by}" if island else "")
            run.print(f"   {name:<40}{micro:>13.1%}{macro:>16.1%}{n:>10,}")
    run.print("\npredicted win rate of the favourite, and how often it won")
    table = calibration(rows, scores)
    for i, (n, predicted, observed) in enumerate(table):
        numbers = f"{predicted:>8.1%}{observed:>8.1%}" if n else f"{'-':>8}{'-':>8}"
        run.print(f"   {50 + 5 * i:>3}-{55 + 5 * i:>3}%{numbers}{n:>7,} pairs")
    if run.rank == 0 and (config.plot or importlib.util.find_spec("matplotlib")):
        path = config.plot or str(Path(config.out) / "calibration.png")
        plot_calibration(table, path)
        run.print(f"   as a picture: {path}")
    if island:
        premium = flattery_premium(model, tok, rows, run, config.micro_tokens)
        run.print(f"\n{FLATTERY!r} in front of a wrong answer adds {premium:+.2f} to its score: the voters' weakness, learned")
    if accuracy(rows, scores)[0] < TOO_WEAK:
        run.print(f"\nunder {TOO_WEAK:.0%} of held-out pairs: too weak for reinforcement learning, which would exploit its mistakes")
    data = f" --data {config.data}" if config.data else ""
    run.print(f"\nthe reward model is in {config.out}. Next:\n"
              f"   python ppo.py{data} --reward {config.out}    a policy learns from it")
    if island:
        run.print("   python reward.py --flattery 0 --out out/reward-fair    the same without the voters' weakness")


if __name__ == "__main__":
    main(parse(Config))
