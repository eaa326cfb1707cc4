"""Ranked answers, and which of them are compared: (better, worse) pairs of indices.

K answers give up to C(K, 2) pairs. Equal scores say nothing about which answer is better, so they give none.
"""
import random
from dataclasses import dataclass
from typing import Literal
from itertools import combinations

from common.errors import UserError
from common.flags import Amount, Count, Number, Positive, TrainConfig
from data import files
from data.shapes import says
from data.tokenizer import fit

HELD_OUT = 300  # questions of each of the island's two held-out parts
WAYS = ("all", "top2", "best-worst", "random")
NOTHING_HELD = ("no held-out question has two answers of different scores that fit, so nothing can be measured: "
                "look at --data and --aspect")


def make_pairs(scores, how="all", max_pairs=10, rng=None):
    """Scores of one question's answers -> [(i, j), ...] with scores[i] > scores[j], at most max_pairs (0: no limit).

    all: every pair. top2: the best two different scores. best-worst: the best and the worst. random: one, drawn by rng.
    Of answers with equal scores the first stands for the others in top2 and best-worst.
    """
    if how not in WAYS:
        raise ValueError(f"how is {how!r}: choose among {', '.join(WAYS)}")
    rng = rng or random.Random(0)
    pairs = [(i, j) if scores[i] > scores[j] else (j, i)
             for i, j in combinations(range(len(scores)), 2) if scores[i] != scores[j]]
    if not pairs or how == "all":
        return pairs if not max_pairs or len(pairs) <= max_pairs else sorted(rng.sample(pairs, max_pairs))
    if how == "random":
        return [rng.choice(pairs)]
    levels = sorted(set(scores), reverse=True)
    worse = levels[1] if how == "top2" else levels[-1]
    return [(scores.index(levels[0]), scores.index(worse))]


@dataclass
class RankedConfig(TrainConfig):
    """The flags of everything that learns from ranked answers; it starts from the community SFT model."""

    data: str = ""  # a file with several ranked answers a question; empty: the island's votes
    init: str = "out/sft-community"  # start from this checkpoint: a model fine-tuned on conversations
    pairs: Literal["all", "top2", "best-worst", "random"] = "all"  # compared answers: all, top2, best-worst or random
    max_pairs: Count = 10  # most pairs of a question; 0: no limit
    aspect: str = "score"  # what ranks answers: a field of your file; island: score, gold, helpful, simple, harmless
    n_ranked: Positive = 2000  # the island: questions with ranked answers
    flattery: Number = 2.5  # the island: what "Great question!" is worth to voters, in gold points
    noise: Amount = 1.5  # the island: standard deviation of the votes, in gold points
    with_: str = ""  # the island: kinds of questions more, such as reading,hops: `python -m island` shows them all
    without: str = ""  # the island: kinds of questions to leave out, such as safe
    merge_system: bool = False  # fold a system prompt into the first user turn


def load_ranked(config, World, say):
    """-> rows {"prompt", "answers": [{"text", "score"}]} to train on, held-out rows, and the island where it made them.
    World: makes the island (island.world.Island).

    Half of the island's held-out rows are new votes on what training votes were about ("known"), half are about
    residents, strangers and requests that no conversation and no vote has mentioned before ("new").
    """
    if config.data:
        rows, report = files.load(config.data, "ranked", config.merge_system, score=config.aspect)
        say(report)
        return *files.hold_out(rows, seed=config.seed, say=say), None
    island = World()
    votes = dict(flattery=config.flattery, noise=config.noise) | island.kinds(config.with_, config.without, ranked=True)
    if config.aspect not in ("score", *island.aspects):
        raise UserError(f"--aspect {config.aspect}: the island's answers have score (the votes), "
                        f"{', '.join(island.aspects)}")
    train = island.ranked(config.n_ranked, **votes)
    held = [row | {"about": "known"} for row in island.ranked(HELD_OUT, seed=6, **votes)]
    held += [row | {"about": "new"} for row in island.ranked(HELD_OUT, seed=4, split="test", **votes)]
    if config.aspect in island.aspects:
        for row in train + held:
            for answer in row["answers"]:
                answer["score"] = island.aspects[config.aspect](row["prompt"], answer["text"])
    return train, held, island


def answered(prompt, text):
    """The conversation that ends with this answer."""
    return prompt + [says("assistant", text)]


def fit_answers(row, tok, longest):
    """A ranked row -> its prompt and those of its answers that fit into `longest` tokens with it.

    Where the prompt has to lose its oldest turns for one answer it loses them for all: they answer the same question.
    """
    kept = [fit(answered(row["prompt"], answer["text"]), lambda messages: tok.render(messages)[0], longest)
            for answer in row["answers"]]
    fitting = [(messages, answer) for messages, answer in zip(kept, row["answers"]) if messages is not None]
    shortest = min((messages for messages, _ in fitting), key=len, default=row["prompt"])
    return shortest[:-1], [answer for _, answer in fitting]


def choose_pairs(rows, tok, longest, config, say=print, needed=True):
    """Ranked rows -> [(prompt, answers, pairs), ...]: which of a question's answers beats which, as --pairs and
    --max-pairs say. Left out, and said, are answers of over `longest` tokens: nobody has ranked a part of them. needed:
    without any pair it raises UserError.
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
    if not questions and needed:
        raise UserError(f"no question has two answers of different scores that fit {longest} tokens: look at --data "
                        "and --aspect, or take a model with a longer context (--init)")
    n = sum(len(pairs) for *_, pairs in questions)
    say(f"{len(questions):,} of {len(rows):,} questions give {n:,} pairs of answers")
    return questions
