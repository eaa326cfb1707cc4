"""Pairs of ranked answers: the better one first, equal scores never, no more than asked for."""
import random
from itertools import combinations

import pytest

from data.pairs import WAYS, make_pairs


def test_every_pair_the_better_one_first():
    assert make_pairs([3, 1, 2]) == [(0, 1), (0, 2), (2, 1)]


def test_equal_scores_give_no_pair():
    assert make_pairs([5, 5, 1, 5]) == [(0, 2), (1, 2), (3, 2)]
    assert all(make_pairs([4, 4, 4], how) == [] for how in WAYS)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="choose among all, top2, best-worst, random"):
        make_pairs([1, 2], "best")


def test_top2_and_best_worst_with_ties():
    scores = [7, 9, 9, 2, 7]
    assert make_pairs(scores, "top2") == [(1, 0)] and make_pairs(scores, "best-worst") == [(1, 3)]


@pytest.mark.parametrize("how", ["all", "random"])
def test_at_most_so_many_and_seeded(how):
    scores = list(range(10))
    def draw(seed):
        return make_pairs(scores, how, 10, random.Random(seed))
    assert len(draw(0)) == {"all": 10, "random": 1}[how] and draw(0) == draw(0)
    assert {pair for seed in range(300) for pair in draw(seed)} == {(j, i) for i, j in combinations(range(10), 2)}
    assert len(make_pairs(scores, max_pairs=0)) == 45
