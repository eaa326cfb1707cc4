"""Reward modelling: one number for an answer, learned from which of two answers people preferred.

    P(w beats l) = sigmoid( r(x, w) - r(x, l) ),     L = -1 / C(K, 2) * sum over pairs (w, l) of log P(w beats l)

for a question x with K ranked answers, averaged over questions (Bradley and Terry 1952; K = 2: Rafailov et al. 2023,
equation 2; any K: Ouyang et al. 2022, InstructGPT, equation 1). Only differences count: the model learns what is
better, never how good it is. So at the end its scores are shifted to mean 0 on the answers of the SFT data.

    python reward.py                                   the island's votes (a missing SFT model is trained first)
    python reward.py --data my.jsonl --init out/sft    your ranked answers (data/files.py shows how they are read)
    python reward.py --aspect simple --out out/simple  another mark ranks them; where one folder does, a weighted sum
                                                       does too: 0.7*out/reward+0.3*out/simple

On the island, in a minute on one CPU core, three seeds: 80 to 83 % of held-out pairs right by votes, and 86 to 90 %
by the gold judge, who has no noise. It learns the voters' weakness too: "Great question!" adds 1.3 to 1.7 to a wrong
answer.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F

import sft
import trainer
from checkpoints import HEAD_NAMES, load, load_init, read_head, save_model
from common import hub, plots
from common.flags import parse
from common.waits import bar
from data.pairs import NOTHING_HELD, RankedConfig, answered, choose_pairs, load_ranked, make_pairs
from data.tokenizer import fit, get_tokenizer
from island.words import FLATTERY
from island.world import Island
from quant import freeze

TOO_WEAK = 0.70  # below this share of held-out pairs, reinforcement learning would mostly learn the model's mistakes


# ---- the losses ------------------------------------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected, weight=None):
    """-mean log sigmoid(chosen - rejected): scores (N,) and (N,) -> scalar, 0 where there is no pair.

    weight: (N,), of each pair; the mean is then the weighted one.
    """
    nll = -F.logsigmoid(chosen - rejected)  # (N,); logsigmoid(x) stays finite where log(sigmoid(x)) is log 0
    weight = torch.ones_like(nll) if weight is None else weight
    total = weight.sum()
    return (weight * nll).sum() / torch.where(total > 0, total, 1)


def ranking_loss(scores, ranks, compared=None):
    """One question: scores (K,) and ranks (K,), 0 the best -> scalar, the mean of -log sigmoid(s_i - s_j) over its
    pairs (Ouyang et al. 2022, equation 1). An answer in many pairs is scored only once.

    compared (K, K): whether a pair counts; None: all do. Equal ranks give no pair; without any pair the loss is 0.
    """
    better = ranks[:, None] < ranks[None, :]  # (K, K): i beats j
    better = (better if compared is None else better & compared).to(scores.dtype)
    differences = scores[:, None] - scores[None, :]  # (K, K): s_i - s_j
    return -(better * F.logsigmoid(differences)).sum() / better.sum().clamp(min=1)


# ---- the model -------------------------------------------------------------------------------------------------------

class RewardModel(nn.Module):
    """A network's trunk with one number at every position in place of logits. The last has read the whole answer."""

    def __init__(self, network):
        super().__init__()
        network.drop_head()
        self.network = network
        self.head = nn.Linear(network.config.n_embd, 1, device=network.device)
        # Stiennon et al. 2020: scores start with a variance of about 1, whatever the width
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(network.config.n_embd + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, lengths):
        """ids (B, T) padded on the right, lengths (B,) without padding -> scores (B,), float32, at the last token."""
        hidden = self.network.hidden(ids)  # (B, T, C)
        return self._number(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])  # (B, C) -> (B,)

    def values(self, ids):
        """The same number at every position: ids (B, T) -> (B, T). PPO's value model is trained from here."""
        return self._number(self.network.hidden(ids))  # (B, T, C) -> (B, T)

    def _number(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16's three digits are too few to compare scores
            return self.head(hidden.float()).squeeze(-1)  # (..., C) -> (...)

    def head_tensors(self):
        """The head under the names that it has in the checkpoint."""
        return {HEAD_NAMES[name]: parameter.detach().cpu().float() for name, parameter in self.head.named_parameters()}

    def save_pretrained(self, folder):
        """A Hugging Face folder as the network writes it, the head in the same file."""
        self.network.save_pretrained(folder, extra=self.head_tensors())

    @classmethod
    def from_pretrained(cls, folder, linear=None):
        """A folder that reward.py wrote; an adapter is merged into its base. linear: as checkpoints.load. Raises
        UserError where it has no head."""
        model, tensors = cls(load(folder, linear=linear)), read_head(folder)
        for name, parameter in model.head.named_parameters():
            if hub.finite(tensors[name], f"{folder}: its head").shape != parameter.shape:
                raise UserError(f"{folder}: its reward head is of another model, with shape {tuple(tensors[name].shape)} and not "
                                f"{tuple(parameter.shape)}: save or copy it again")
            parameter.data.copy_(tensors[name])
        return model


# ---- from ranked answers to examples ---------------------------------------------------------------------------------

@dataclass
class Ranking:
    """The answers to one question, and which beats which."""

    ids: list  # of whole conversations, end token included: K lists
    ranks: torch.Tensor  # (K,), 0 is the best
    compared: torch.Tensor  # (K, K) bool: does the pair count?

    @property
    def longest(self):
        return max(map(len, self.ids))


def make_rankings(rows, tok, longest, config, say=print):
    """Ranked rows -> [Ranking, ...] of the answers that are in a pair, as --pairs and --max-pairs say."""
    rankings = []
    for prompt, answers, pairs in choose_pairs(rows, tok, longest, config, say):
        used = sorted({k for pair in pairs for k in pair})
        scores = torch.tensor([answers[k]["score"] for k in used], dtype=torch.float64)
        compared = torch.zeros(len(used), len(used), dtype=torch.bool)
        for better, worse in pairs:
            compared[used.index(better), used.index(worse)] = True
        ranks = (scores[:, None] < scores[None, :]).sum(1)  # how many are better; equal scores have equal ranks
        ids = [tok.render(answered(prompt, answers[k]["text"]))[0] for k in used]
        rankings.append(Ranking(ids, ranks, compared))
    return rankings


def split_rankings(rankings, micro_tokens):
    """Whole questions -> parts of at most micro_tokens padded tokens (a larger single question still makes one)."""
    parts, n = [], 0  # n: answers in the last part
    for ranking in sorted(rankings, key=lambda ranking: ranking.longest):
        if not parts or (n + len(ranking.ids)) * ranking.longest > micro_tokens:
            parts, n = parts + [[]], 0
        parts[-1].append(ranking)
        n += len(ranking.ids)
    return parts


def reward_step(model, rankings, config, run):
    """Adds the gradient of a step's questions -> their loss, this process's share of it."""
    total = 0.0
    for part in split_rankings(run.share(rankings), config.micro_tokens):
        ids, real = trainer.pad([(ids, [1] * len(ids)) for ranking in part for ids in ranking.ids], run.device)
        with run.autocast():
            scores = model(ids, real.sum(1)).split([len(ranking.ids) for ranking in part])  # (K,) for each question
        loss = sum(ranking_loss(s, ranking.ranks.to(run.device), ranking.compared.to(run.device))
                   for s, ranking in zip(scores, part)) / len(rankings)
        loss.backward()
        total += loss.item()
    return total


# ---- scoring ---------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def score(model, tok, conversations, run, micro_tokens=16384):
    """Conversations that end with the assistant's answer -> [its score, ...], in their order.

    Rendered as in training: the score is read off the end token. A conversation too long for the model loses its oldest
    turns, then the beginning of its question.
    """
    limit = model.network.config.block_size

    def render(messages):
        return tok.render(messages)[0]

    rows = [render(fit(messages, render, limit) or messages[-2:])[-limit:] for messages in conversations]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    was_training, scores = model.training, []
    model.eval()
    examples = [(rows[i], [1] * len(rows[i])) for i in order]
    with run.autocast():
        for ids, real in bar(trainer.micro_batches(examples, micro_tokens, run.device), "scores"):  # sorted: the order stays
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
        models.append((weight, RewardModel.from_pretrained(folder, freeze).to(run.device), get_tokenizer(folder)))

    def scorer(conversations):
        each = [score(model, tok, conversations, run, micro_tokens) for _, model, tok in models]
        return [sum(weight * s for (weight, *_), s in zip(models, parts)) for parts in zip(*each)]

    return scorer


# ---- evaluation ------------------------------------------------------------------------------------------------------

def score_rows(model, tok, rows, run, micro_tokens):
    """Every answer of every ranked row -> [[score, ...], ...]."""
    conversations = [answered(row["prompt"], answer["text"]) for row in rows for answer in row["answers"]]
    scores = iter(score(model, tok, conversations, run, micro_tokens))
    return [[next(scores) for _ in row["answers"]] for row in rows]


def score_pairs(rows, scores, by="score"):
    """For each row: [(the model's score of the answer with more `by`, that of the other), ...], of all its pairs."""
    return [[(s[w], s[l]) for w, l in make_pairs([answer[by] for answer in row["answers"]], max_pairs=0)]
            for row, s in zip(rows, scores, strict=True)]


def right(rows, scores, by="score"):
    """For each row that has a pair: [did the answer with more `by` get the higher score, ...]. A tie is not right."""
    return [[w > l for w, l in pairs] for pairs in score_pairs(rows, scores, by) if pairs]


def held_out_loss(rows, scores):
    """The loss over the pairs of these rows, each pair alike."""
    pairs = [pair for of_row in score_pairs(rows, scores) for pair in of_row]
    chosen, rejected = torch.tensor(pairs).view(-1, 2).unbind(1)  # (N,) each
    return bradley_terry_loss(chosen, rejected).item()


def accuracy(rows, scores, by="score"):
    """-> mean over pairs (micro), mean over questions (macro: six answers count as much as two), number of pairs.
    Without a pair both means are nan."""
    found = right(rows, scores, by)
    pairs = [won for row in found for won in row]
    return mean(pairs), mean([mean(row) for row in found]), len(pairs)


def mean(values):
    return sum(values) / len(values) if values else math.nan


def calibration(rows, scores, bins=10):
    """Is an answer that should win with 80 % the winner in 80 %? -> [(pairs, mean predicted, observed share), ...].

    Predicted: sigmoid of the difference, for the answer with the higher score, so from 0.5 to 1. An empty bin is
    (0, nan, nan).
    """
    found = [[] for _ in range(bins)]
    for w, l in (pair for of_row in score_pairs(rows, scores) for pair in of_row):
        predicted = 1 / (1 + math.exp(-min(abs(w - l), 50)))
        found[min(int((predicted - 0.5) * 2 * bins), bins - 1)].append((predicted, w > l))
    return [(len(b), mean([p for p, _ in b]), mean([won for _, won in b])) for b in found]


def plot_calibration(table, path):
    """The calibration as a picture (matplotlib)."""
    figure, (axes,) = plots.figure(width=4, height=4)
    axes.plot([0.5, 1], [0.5, 1], "--", color="grey", label="perfect")
    axes.plot([p for n, p, _ in table if n], [o for n, _, o in table if n], "o-", label="reward model",
              color=plots.color("reward"))
    off = sum(n * abs(p - o) for n, p, o in table if n) / max(1, sum(n for n, *_ in table))
    axes.set(xlabel="predicted win rate", ylabel="observed win rate", xlim=(0.5, 1),
             title=f"held-out pairs: {off:.0%} off on average")
    plots.share_axis(axes)
    axes.legend()
    plots.save(figure, path)


def flattery_premium(model, tok, rows, run, micro_tokens):
    """How much higher a wrong answer scores with praise in front: the same words otherwise, and gold does not move."""
    wrong = [(row["prompt"], a["text"]) for row in rows for a in row["answers"] if a["type"] in ("wrong", "invent")]
    plain = [answered(prompt, text) for prompt, text in wrong]
    praised = [answered(prompt, f"{FLATTERY} {text}") for prompt, text in wrong]
    both = score(model, tok, praised + plain, run, micro_tokens)
    return (sum(both[:len(wrong)]) - sum(both[len(wrong):])) / max(1, len(wrong))


# ---- training --------------------------------------------------------------------------------------------------------

# what must be there before; what a run costs (common/waits.py)
NEEDS, COSTS = {"init": (sft, {"answers": "community"})}, (0.15, 200, 8)


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
    best = [max(row["answers"], key=lambda answer: answer["score"])["text"] for row in train_rows[:n]]
    return [answered(row["prompt"], text) for row, text in zip(train_rows, best)]


def main(config):
    run = trainer.start(config)
    if config.plot:
        plots.needed("--plot")
    trainer.prepare(config, run)
    train_rows, held_rows, island = load_ranked(config, Island, run.print)
    network, tok = load_init(config, run)
    torch.manual_seed(config.seed)
    model = RewardModel(network).train()
    model.head.bias.requires_grad_(False)  # it cancels in every difference: nothing to learn, center() sets it
    rankings = make_rankings(train_rows, tok, network.config.block_size, config, run.print)
    batches = trainer.Batches([ranking.longest for ranking in rankings], config.batch_size, config.seed)
    steps = config.steps or math.ceil(config.epochs * len(batches)) or (200 if island else len(batches))
    config.lr = config.lr or default_lr(config, network.config.n_embd)
    some = [row for row in held_rows if make_pairs([answer["score"] for answer in row["answers"]])]
    some = some[::max(1, len(some) // 100)]
    if not some:
        run.print(NOTHING_HELD)

    def save(step):
        trainer.save_state(config, run, step, steps, model, optimizer)
        if run.rank == 0:
            save_model(config, network, tok, extra=model.head_tensors())

    optimizer = trainer.adamw(model, config)
    first = trainer.load_state(config, run, steps, model, optimizer)
    log = trainer.Log(config, run, first, steps, bar=("loss", "accuracy", "held_out"))
    for step in log.steps():
        trainer.begin_step(step, steps, optimizer, config, run)
        loss = reward_step(model, [rankings[i] for i in batches[step]], config, run)
        log.write(step, loss=run.sum(loss), **trainer.update(model, optimizer, config, run, step))
        if some and log.due(step, config.eval_every):
            scores = score_rows(model, tok, some, run, config.micro_tokens)
            log.write(step, accuracy=accuracy(some, scores)[0], held_out=held_out_loss(some, scores))
        if log.due(step, config.save_every):
            save(step + 1)
    center(model, tok, demonstrations(train_rows, island), run, config.micro_tokens)
    trainer.finish(config, run, log, lambda: save(log.next))
    if some:
        report(model, tok, held_rows, island, config, run)
    data = f" --data {config.data}" if config.data else ""
    start = f"{data} --init {config.init}" if data else ""
    run.print(f"\nthe reward model is in {config.out}. Next:\n"
              f"   python ppo.py{start} --reward {config.out}    a policy learns from it\n"
              f"   python -m common.plots {config.out}    its log as a picture")
    if island:
        run.print("   python reward.py --flattery 0 --out out/reward-fair    the same without the voters' weakness")


def report(model, tok, rows, island, config, run):
    """What came out."""
    scores = score_rows(model, tok, rows, run, config.micro_tokens)
    run.print("\nheld-out pairs ranked right (chance 50%)      over pairs  over questions     pairs")
    groups = [(key, value) for key in ("about", "kind") for value in sorted({row[key] for row in rows if key in row})]
    for key, value in [(None, None), *groups]:
        members, their_scores = zip(*[(row, s) for row, s in zip(rows, scores) if row.get(key) == value])
        for by in ("score", "gold") if island else ("score",):
            micro, macro, n = accuracy(members, their_scores, by)
            name = (f"{key}: {value}" if key else "all") + (f", by {by}" if island else "")
            numbers = f"{micro:>13.1%}{macro:>16.1%}" if n else f"{'-':>13}{'-':>16}"
            run.print(f"   {name:<40}{numbers}{n:>10,}")
    run.print("\npredicted win rate of the favourite, and how often it won")
    table = calibration(rows, scores)
    for i, (n, predicted, observed) in enumerate(table):
        numbers = f"{predicted:>8.1%}{observed:>8.1%}" if n else f"{'-':>8}{'-':>8}"
        run.print(f"   {50 + 5 * i:>3}-{55 + 5 * i:>3}%{numbers}{n:>7,} pairs")
    if run.rank == 0 and (config.plot or plots.available()):
        path = config.plot or str(Path(config.out) / "calibration.png")
        plot_calibration(table, path)
        run.print(f"   as a picture: {path}")
    if island:
        premium = flattery_premium(model, tok, rows, run, config.micro_tokens)
        run.print(f"\n{FLATTERY!r} in front of a wrong answer adds {premium:.2f}: the voters' weakness, learned")
    if accuracy(rows, scores)[0] < TOO_WEAK:
        run.print(f"\nunder {TOO_WEAK:.0%}: too weak for reinforcement learning, which would mostly learn its mistakes")


if __name__ == "__main__":
    main(parse(Config))
