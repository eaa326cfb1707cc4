"""Reward modelling: one number for an answer, learned from which of two answers people preferred.

    P(w beats l) = sigmoid( r(x, w) - r(x, l) ),     L = -1 / C(K, 2) * sum over pairs (w, l) of log P(w beats l)

for a question x with K ranked answers, averaged over questions (Bradley and Terry 1952; K = 2: Rafailov et al. 2023,
equation 2; any K: Ouyang et al. 2022, InstructGPT, equation 1). Only differences count: the model learns what is
better, never how good it is. So at the end its scores are shifted to mean 0 on the answers of the SFT data.

    python reward.py                                   the island's votes (a missing SFT model is trained first)
    python reward.py --data my.jsonl --init out/sft    your ranked answers (data/files.py shows how they are read)
    python reward.py --aspect simple --out out/simple  another mark ranks them; where one folder does, a weighted sum
                                                       does too: 0.7*out/reward+0.3*out/simple

On the island, in a minute on one CPU core, three seeds: 81 to 83 % of held-out pairs right by votes, and 87 to 90 % by the
gold judge, who has no noise. It learns the voters' weakness too: "Great question!" adds 1.7 to 1.8 to a wrong answer.
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
    """sum_ij weights_ij * -log sigmoid(s_i - s_j): scores (N,), weights (N, N) -> scalar.

    weights_ij is the weight of "i beats j", 0 where nobody said so. An answer in many pairs is scored only once.
    """
    differences = scores[:, None] - scores[None, :]  # (N, N): s_i - s_j
    return -(weights * F.logsigmoid(differences)).sum()


def ranking_loss(scores, ranks):
    """One question: scores (K,) and ranks (K,), 0 the best -> scalar, the mean over its pairs.

    Equal ranks give no pair; without any pair the loss is 0.
    """
    better = (ranks[:, None] < ranks[None, :]).to(scores.dtype)  # (K, K)
    return pairwise_loss(scores, better / better.sum().clamp(min=1))


# ---- the model -------------------------------------------------------------------------------------------------------

HEAD = {"weight": "score.weight", "bias": "score.bias"}  # in the file, as GPT2ForSequenceClassification of transformers


class RewardModel(nn.Module):
    """A GPT's trunk with one number at every position in place of logits. The last token has read the whole answer."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.head = nn.Linear(gpt.config.n_embd, 1, device=gpt.device)
        # Stiennon et al. 2020: scores start with a variance of about 1, whatever the width
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(gpt.config.n_embd + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, lengths):
        """ids (B, T) padded on the right, lengths (B,) without padding -> scores (B,), float32, at the last token."""
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
        """A folder that reward.py wrote; an adapter is merged into its base. Raises UserError where it has no head."""
        model = cls(GPT.from_pretrained(folder))
        adapter = lora.is_adapter(folder)
        try:
            read = lora.read_extra(folder).__getitem__ if adapter else hub.open_weights(hub.find(folder))
            for name, parameter in model.head.named_parameters():
                parameter.data.copy_(read(HEAD[name]))
        except (UserError, KeyError):
            raise UserError(f"{folder} has no reward head: train one with python reward.py --init {folder}")
        return model


def is_reward_model(folder):
    """Does a checkpoint, or adapter, have a reward head? Then it marks answers and writes none."""
    if lora.is_adapter(folder):
        return HEAD["weight"] in lora.read_extra(folder)
    try:
        hub.open_weights(hub.find(folder))(HEAD["weight"])
        return True
    except UserError:  # there is no such tensor
        return False


def refuse_reward_model(folder):
    """Raises UserError where somebody is about to ask a reward model for an answer."""
    if is_reward_model(folder):
        raise UserError(f"{folder} is a reward model, which marks answers and writes none: name it with --reward")


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
    """What reward.py and dpo.py share: both learn from ranked answers and start from the community SFT model."""

    data: str = ""  # a file with several ranked answers a question; empty: the island's votes
    init: str = "out/sft-community"  # start from this checkpoint: a model fine-tuned on conversations
    pairs: str = "all"  # which answers of a question are compared: all, top2, best-worst or random
    max_pairs: int = 10  # most pairs of a question; 0: no limit
    aspect: str = "score"  # what ranks answers: a field of your file; island: score, gold, helpful, simple, harmless
    n_ranked: int = 2000  # the island: questions with ranked answers
    flattery: float = 2.5  # the island: what "Great question!" is worth to voters, in gold points
    noise: float = 1.5  # the island: standard deviation of the votes, in gold points
    merge_system: bool = False  # fold a system prompt into the first user turn


def load_ranked(config, say):
    """-> rows {"prompt", "answers": [{"text", "score"}]} to train on, held-out rows, and the island where it made them.

    Half of the island's held-out rows are new votes on what training votes were about ("known"), half are about
    residents, strangers and requests that no conversation and no vote has mentioned before ("new").
    """
    if config.data:
        rows, report = files.load(config.data, "ranked", config.merge_system, score=config.aspect)
        say(report)
        return *files.hold_out(rows, seed=config.seed, say=say), None
    if config.aspect not in ("score", *ASPECTS):
        raise UserError(f"--aspect {config.aspect}: the island's answers have score (the votes), {', '.join(ASPECTS)}")
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
    """-> model, ready to train, and tokenizer (sft.load_init); a missing community SFT model is trained first."""
    if config.init == RankedConfig.init:
        trainer.ensure(config.init, sft, config, run, answers="community")
    return sft.load_init(config, run)


def answered(row, answer):
    """The conversation that ends with this answer."""
    return row["prompt"] + [{"role": "assistant", "content": answer["text"]}]


def fit_answers(row, tok, longest):
    """A ranked row -> its prompt and those of its answers that fit into `longest` tokens with it.

    Where the prompt has to lose its oldest turns for one answer it loses them for all: they answer the same question.
    """
    fitting = [(sft.fit(answered(row, answer), lambda messages: tok.render(messages)[0], longest), answer)
               for answer in row["answers"]]
    fitting = [(messages, answer) for messages, answer in fitting if messages is not None]
    shortest = min((messages for messages, _ in fitting), key=len, default=row["prompt"])
    return shortest[:-1], [answer for _, answer in fitting]


def compare(rows, tok, longest, config, say=print):
    """Ranked rows -> [(prompt, answers, pairs), ...]: which of a question's answers beats which, as --pairs and --max-pairs
    say. Left out, and said, are answers of over `longest` tokens: nobody has ranked a part of them.
    """
    questions, too_long = [], 0
    for i, row in enumerate(rows):
        prompt, answers = fit_answers(row, tok, longest)
        too_long += len(row["answers"]) - len(answers)
        rng = random.Random(f"{config.seed} {i}")
        pairs = make_pairs([answer["score"] for answer in answers], config.pairs, config.max_pairs, rng)
        if pairs:
            questions.append((prompt, answers, pairs))
    if too_long:
        say(f"answers dropped because they and their question are over {longest} tokens: {too_long:,}")
    if not questions:
        raise UserError(f"no question has two answers of different scores that fit {longest} tokens: look at --data "
                        "and --aspect, or take a model with a longer context (--init)")
    n = sum(len(pairs) for *_, pairs in questions)
    say(f"{len(questions):,} of {len(rows):,} questions give {n:,} pairs of answers")
    return questions


def make_questions(rows, tok, longest, config, say=print):
    """Ranked rows -> [(answers, pairs), ...]: ids of whole conversations, end token included, of the answers that are in a
    pair, and which beats which."""
    questions = []
    for prompt, answers, pairs in compare(rows, tok, longest, config, say):
        used = sorted({k for pair in pairs for k in pair})
        ids = [tok.render(answered({"prompt": prompt}, answers[k]))[0] for k in used]
        questions.append((ids, [(used.index(w), used.index(l)) for w, l in pairs]))
    return questions


def question_batches(questions, micro_tokens, device):
    """Whole questions -> [(ids (N, T), lengths (N,), weights (N, N)), ...], what pairwise_loss needs. Each has at most
    micro_tokens padded tokens (a larger single question still makes one)."""
    parts, n = [], 0  # n: answers in the last part
    for answers, pairs in sorted(questions, key=longest_answer):
        if not parts or (n + len(answers)) * longest_answer((answers, pairs)) > micro_tokens:
            parts, n = parts + [[]], 0
        parts[-1].append((answers, pairs))
        n += len(answers)
    return [collate(part, device) for part in parts]


def longest_answer(question):
    return max(map(len, question[0]))


def collate(questions, device):
    """[(answers, pairs), ...] -> ids (N, T), lengths (N,), weights (N, N): block-diagonal, 1 in total per question."""
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

    Rendered as in training: the score is read off the end token. A conversation too long for the model loses its oldest
    turns, then the beginning of its question.
    """
    limit = model.gpt.config.block_size
    render = lambda messages: tok.render(messages)[0]
    rows = [render(sft.fit(messages, render, limit) or messages[-2:])[-limit:] for messages in conversations]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    was_training, scores = model.training, []
    model.eval()
    examples = [(rows[i], [1] * len(rows[i])) for i in order]
    with run.autocast():
        for ids, real in trainer.micro_batches(examples, micro_tokens, run.device):  # sorted already: the order stays
            scores += model(ids, real.sum(1)).tolist()
    model.train(was_training)
    return [s for _, s in sorted(zip(order, scores))]


def load_rewards(spec, run, micro_tokens=16384):
    """A folder, or a weighted sum such as "0.7*out/helpful+0.3*out/simple" -> scorer(conversations) -> [score, ...].

    Each model reads with its own tokenizer. Raises UserError for a weight that is no number, a folder without a head.
    """
    models = []
    for term in [spec] if Path(spec).is_dir() else spec.split("+"):
        weight, star, folder = term.strip().partition("*")
        weight, folder = (weight, folder.strip()) if star else ("1", term.strip())
        try:
            weight = float(weight)
        except ValueError:
            raise UserError(f"{spec}: {weight!r} is no number: write a sum as in 0.7*out/helpful+0.3*out/simple")
        models.append((weight, RewardModel.from_pretrained(folder).to(run.device), get_tokenizer(folder)))

    def scorer(conversations):
        each = [score(model, tok, conversations, run, micro_tokens) for _, model, tok in models]
        return [sum(weight * s for (weight, *_), s in zip(models, parts)) for parts in zip(*each)]

    return scorer


# ---- evaluation ------------------------------------------------------------------------------------------------------

def score_rows(model, tok, rows, run, micro_tokens):
    """Every answer of every ranked row -> [[score, ...], ...]."""
    conversations = [answered(row, answer) for row in rows for answer in row["answers"]]
    scores = iter(score(model, tok, conversations, run, micro_tokens))
    return [[next(scores) for _ in row["answers"]] for row in rows]


def right(rows, scores, by="score"):
    """For each row that has a pair: [did the answer with more `by` get the higher score, ...]. A tie is not right."""
    pairs = [make_pairs([answer[by] for answer in row["answers"]], max_pairs=0) for row in rows]
    return [[s[w] > s[l] for w, l in of_row] for s, of_row in zip(scores, pairs, strict=True) if of_row]


def accuracy(rows, scores, by="score"):
    """-> mean over pairs (micro), mean over questions (macro: six answers count as much as two), number of pairs."""
    found = right(rows, scores, by)
    n = sum(map(len, found))
    return sum(map(sum, found)) / max(1, n), sum(sum(row) / len(row) for row in found) / max(1, len(found)), n


def calibration(rows, scores, bins=10):
    """Is an answer that should win with 80 % the winner in 80 %? -> [(pairs, mean predicted, observed share), ...].

    Predicted: sigmoid of the difference, for the answer with the higher score, so from 0.5 to 1. An empty bin is
    (0, nan, nan).
    """
    found = [[] for _ in range(bins)]
    for row, s in zip(rows, scores, strict=True):
        for w, l in make_pairs([answer["score"] for answer in row["answers"]], max_pairs=0):
            predicted = 1 / (1 + math.exp(-min(abs(s[w] - s[l]), 50)))
            found[min(int((predicted - 0.5) * 2 * bins), bins - 1)].append((predicted, s[w] > s[l]))
    mean = lambda values: sum(values) / len(values) if values else math.nan
    return [(len(b), mean([p for p, _ in b]), mean([won for _, won in b])) for b in found]


def plot_calibration(table, path):
    """The calibration as a picture (matplotlib)."""
    from matplotlib.figure import Figure  # not pyplot: that one looks for a display
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], "--", color="grey", label="perfect")
    axes.plot([p for n, p, _ in table if n], [o for n, _, o in table if n], "o-", label="reward model")
    axes.set(xlabel="predicted win rate", ylabel="observed win rate", title="held-out pairs")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the calibration could not be drawn into {path} ({error}): give --plot a name as plot.png")


def flattery_premium(model, tok, rows, run, micro_tokens):
    """How much higher a wrong answer scores with praise in front: the same words otherwise, and gold does not move."""
    wrong = [(row, a) for row in rows for a in row["answers"] if a["type"] in ("wrong", "invent")]
    plain = [answered(row, a) for row, a in wrong]
    praised = [answered(row, a | {"text": f"{FLATTERY} {a['text']}"}) for row, a in wrong]
    both = score(model, tok, praised + plain, run, micro_tokens)
    return (sum(both[:len(wrong)]) - sum(both[len(wrong):])) / max(1, len(wrong))


# ---- training --------------------------------------------------------------------------------------------------------

@dataclass
class Config(RankedConfig):
    out: str = "out/reward"  # folder for the checkpoint and log.jsonl
    lr: float = 0.0  # highest learning rate; 0: by the width (3e-4 at 128, 5e-5 at GPT-2's 768; adapters 4 times that)
    steps: int = 0  # optimizer steps; 0: as --epochs says; with neither 200 on the island, one epoch of --data
    batch_size: int = 16  # questions per optimizer step, each with all its answers
    warmup: int = 10  # steps in which the learning rate rises from 0
    weight_decay: float = 0.01  # AdamW: on matrices only
    plot: str = ""  # picture of the calibration; empty: calibration.png in --out, where matplotlib is installed


def default_lr(config, n_embd):
    """A learning rate that works for the tiny model (width 128) and for GPT-2's sizes; adapters want a higher one."""
    return (1.2e-3 if config.lora_r else 3e-4) * 128 / n_embd


def center(model, tok, demonstrations, run, micro_tokens):
    """Shifts the bias so that these conversations score 0 on average: above 0 is better than what the SFT model was
    shown (Ouyang et al. 2022, section 3.5). It changes no difference and so no preference."""
    scores = score(model, tok, demonstrations, run, micro_tokens)
    model.head.bias.data -= sum(scores) / len(scores)


def demonstrations(train_rows, island, n=500):
    """The answers of the SFT data: the island's community conversations; of your file the best answer to each question,
    which is what sft.py learns from it."""
    if island:
        return [row["messages"] for row in island.conversations(n, answers="community")]
    return [answered(row, max(row["answers"], key=lambda answer: answer["score"])) for row in train_rows[:n]]


def main(config):
    run = trainer.start(config)
    if config.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave the flag out")
    train_rows, held_rows, island = load_ranked(config, run.print)
    gpt, tok = load_start(config, run)
    torch.manual_seed(config.seed)
    model = RewardModel(gpt).train()
    model.head.bias.requires_grad_(False)  # it cancels in every difference: nothing to learn, center() sets it
    questions = make_questions(train_rows, tok, gpt.config.block_size, config, run.print)
    batches = trainer.Batches(list(map(longest_answer, questions)), config.batch_size, config.seed)
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
    center(model, tok, demonstrations(train_rows, island), run, config.micro_tokens)
    trainer.finish(config, run, log, lambda: save(log.next))
    report(model, tok, held_rows, island, config, run)


def report(model, tok, rows, island, config, run):
    """What came out, and what to do next."""
    scores = score_rows(model, tok, rows, run, config.micro_tokens)
    run.print(f"\nheld-out pairs ranked right (chance 50%)      over pairs  over questions     pairs")
    groups = [(key, value) for key in ("about", "kind") for value in sorted({row[key] for row in rows if key in row})]
    for key, value in [(None, None), *groups]:
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
        run.print(f"\n{FLATTERY!r} in front of a wrong answer adds {premium:.2f}: the voters' weakness, learned")
    if accuracy(rows, scores)[0] < TOO_WEAK:
        run.print(f"\nunder {TOO_WEAK:.0%}: too weak for reinforcement learning, which would mostly learn its mistakes")
    data = f" --data {config.data}" if config.data else ""
    run.print(f"\nthe reward model is in {config.out}. Next:\n"
              f"   python ppo.py{data} --reward {config.out}    a policy learns from it")
    if island:
        run.print("   python reward.py --flattery 0 --out out/reward-fair    the same without the voters' weakness")


if __name__ == "__main__":
    main(parse(Config))
