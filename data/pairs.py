"""Which answers of a ranked question are compared: (better, worse) pairs of indices.

K answers give up to C(K, 2) pairs. Equal scores say nothing about which answer is better, so they give none.
"""
import random
from itertools import combinations

WAYS = ("all", "top2", "best-worst", "random")


def make_pairs(scores, how="all", max_pairs=10, rng=None):
    """Scores of one question's answers -> [(i, j), ...] with scores[i] > scores[j], at most max_pairs (0: no limit).

    all: every pair. top2: the best two different scores. best-worst: the best and the worst. random: one pair drawn by rng.
    Of answers with equal scores the first stands for the others in top2 and best-worst.
    """
    if how not in WAYS:
        raise ValueError(f"how is {how!r}: choose among {', '.join(WAYS)}")
    rng = rng or random.Random(0)
    pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2) if scores[i] != scores[j]]
    if not pairs or how == "all":
        return pairs if not max_pairs or len(pairs) <= max_pairs else sorted(rng.sample(pairs, max_pairs))
    if how == "random":
        return [rng.choice(pairs)]
    levels = sorted(set(scores), reverse=True)
    worse = levels[1] if how == "top2" else levels[-1]
    return [(scores.index(levels[0]), scores.index(worse))]
