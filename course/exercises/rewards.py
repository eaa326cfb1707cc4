"""Lesson 6: a number for an answer, from who beat whom."""
import math

import torch
import torch.nn.functional as F

import reward
from common.errors import UserError
from course.exercise import Exercise

# ---- Bradley-Terry ---------------------------------------------------------------------------------------------------

def put_bradley_terry(f):
    def full(chosen, rejected, weight=None):
        if weight is not None:
            raise UserError("bradley_terry_loss as you wrote it has no weights")
        return f(chosen, rejected) if len(chosen) else chosen.sum()

    return {"reward.bradley_terry_loss": full}


bradley_terry_loss = Exercise(
    '''
def bradley_terry_loss(chosen, rejected):
    """How surprised is the reward model by who was preferred (Bradley and Terry 1952; Rafailov et al. 2023, equation 2)?

    chosen (N,), rejected (N,): the scores of both answers of N pairs -> scalar, the mean over the pairs. A pair that is
    400 apart the wrong way costs 400, not infinity.

        L = -mean log sigmoid(chosen - rejected)

    Hint: F.logsigmoid stays finite where log(sigmoid(x)) is log 0.
    """
''',
    reference=reward.bradley_terry_loss, grads=(0, 1),
    cases=lambda draw: [draw.several(2, 1), draw.several(2, 4), [torch.tensor([-200.0, 1.0]), torch.tensor([200.0, 0.0])]],
    wrongs={
        "chosen and rejected are exchanged": lambda w, l: -F.logsigmoid(l - w).mean(),
        "the minus is missing": lambda w, l: F.logsigmoid(w - l).mean(),
        "the losses are added up and not averaged": lambda w, l: -F.logsigmoid(w - l).sum(),
        "the logarithm is taken of a sigmoid that was rounded to 0: use F.logsigmoid":
            lambda w, l: -torch.sigmoid(w - l).log().mean(),
        "the probability stands where its logarithm should": lambda w, l: -torch.sigmoid(w - l).mean(),
        "each answer is judged by itself: scores get an absolute meaning that votes do not have":
            lambda w, l: -(F.logsigmoid(w) + F.logsigmoid(-l)).mean(),
        "the loss is a hinge: a pair that is right by 1 teaches nothing": lambda w, l: F.relu(1 - (w - l)).mean(),
    },
    put=put_bradley_terry, scripts=("reward.py",), tests="tests/test_reward.py")


# ---- K answers -------------------------------------------------------------------------------------------------------

def pairs_by(scores, ranks, better=torch.lt, divisor=lambda better, K: better.sum().clamp(min=1)):
    better = better(ranks[:, None], ranks[None, :])
    losses = -F.logsigmoid(scores[:, None] - scores[None, :])
    return (losses * better).sum() / divisor(better, len(scores))


def neighbours(scores, ranks):
    """Only answers whose ranks follow each other are compared."""
    follows = ranks[None, :] == torch.tensor([[min([int(r) for r in ranks if r > x], default=-1)] for x in ranks])
    return pairs_by(scores, ranks, lambda a, b: follows)


def put_ranking(f):
    def full(scores, ranks, compared=None):
        better = ranks[:, None] < ranks[None, :]
        if compared is not None and not torch.equal(better, better & compared):
            raise UserError("ranking_loss as you wrote it compares all answers: leave out --pairs, or add --max-pairs 0")
        return f(scores, ranks)

    return {"reward.ranking_loss": full}


ranking_loss = Exercise(
    '''
def ranking_loss(scores, ranks):
    """The same for one question with K ranked answers (Ouyang et al. 2022, InstructGPT, equation 1).

    scores (K,), ranks (K,) int, 0 is the best -> scalar, the mean over all pairs of which one answer has the lower rank.
    Equal ranks give no pair; where there is no pair at all, the loss is 0.

        L = -1/pairs sum_{rank i < rank j} log sigmoid(s_i - s_j)

    Hint: scores[:, None] - scores[None, :] is (K, K).
    """
''',
    reference=lambda scores, ranks: reward.ranking_loss(scores, ranks), grads=(0,), shows=(reward.ranking_loss,),
    cases=lambda draw: [[draw(2), torch.tensor([1, 0])], [draw(4), torch.tensor([2, 0, 3, 1])],
                        [draw(5), torch.tensor([0, 1, 1, 3, 3])], [draw(3), torch.tensor([0, 0, 0])]],
    wrongs={
        "the pairs are added up and not averaged: a question with nine answers counts 36 times as much as one with two":
            lambda s, r: pairs_by(s, r, divisor=lambda better, K: 1),
        "the sum is divided by K and not by the number of pairs": lambda s, r: pairs_by(s, r, divisor=lambda b, K: K),
        "pairs of equal rank are in the divisor": lambda s, r: pairs_by(s, r, divisor=lambda b, K: K * (K - 1) / 2),
        "answers of equal rank, and each with itself, count as pairs": lambda s, r: pairs_by(s, r, torch.le),
        "the best rank is taken for the worst": lambda s, r: pairs_by(s, r, torch.gt),
        "only neighbours in the ranking are compared": neighbours,
        "only the best is compared with the others":
            lambda s, r: pairs_by(s, r, lambda a, b: (a == r.min()) & (a < b)),
        "without a pair it is 0 / 0": lambda s, r: pairs_by(s, r, divisor=lambda better, K: better.sum()),
    },
    put=put_ranking, scripts=("reward.py",), tests="tests/test_reward.py")


# ---- calibration -----------------------------------------------------------------------------------------------------

def of_rows(chosen, rejected, bins):
    rows = [{"answers": [{"score": 1}, {"score": 0}]}] * len(chosen)
    return reward.calibration(rows, list(zip(chosen.tolist(), rejected.tolist())), bins)


def calibrated(chosen, rejected, bins, predict=lambda d: 1 / (1 + math.exp(-abs(d))), low=0.5, right=lambda d: d > 0,
               middle=False, share=False):
    found = [[] for _ in range(bins)]
    for d in (chosen - rejected).tolist():
        found[min(int((predict(d) - low) / (1 - low) * bins), bins - 1)].append((predict(d), right(d)))
    nan = math.nan
    return [(len(b), (low + (1 - low) * (i + 0.5) / bins if middle else sum(p for p, _ in b) / len(b)) if b else nan,
             sum(won for _, won in b) / (len(chosen) if share else len(b)) if b else nan) for i, b in enumerate(found)]


def put_calibration(f):
    def full(rows, scores, bins=10):
        pairs = [pair for of_row in reward.score_pairs(rows, scores) for pair in of_row]
        chosen, rejected = torch.tensor(pairs, dtype=torch.float64).view(-1, 2).unbind(1)
        return [tuple(row.tolist() if isinstance(row, torch.Tensor) else row) for row in f(chosen, rejected, bins)]

    return {"reward.calibration": full}


calibration = Exercise(
    '''
def calibration(chosen, rejected, bins):
    """Does an answer that the model expects to win with 80 % win in 80 % of the pairs? (Guo et al. 2017, section 2)

    chosen (N,), rejected (N,): scores of held-out pairs, chosen is who won -> [(n, predicted, observed), ...], one
    for each of `bins` equal bins from 0.5 to 1.

        p = sigmoid(|chosen - rejected|), how sure the model is of its favourite;      a pair belongs to the bin of its p
        n: pairs in the bin;  predicted: the mean of their p;  observed: in which share of them the favourite has won

    Equal scores: p is 0.5, and nobody was right. p = 1 belongs to the last bin. An empty bin is (0, nan, nan).

    Hint: bin int((p - 0.5) * 2 * bins), at most bins - 1.
    """
''',
    reference=of_rows, doubles=False, shows=(reward.calibration,),
    cases=lambda draw: [[*draw.several(2, 1), 2], [torch.cat([draw(5), torch.tensor([0.25, 90.0])]),
                                                   torch.cat([draw(5), torch.tensor([0.25, 0.0])]), 3],
                        [*draw.several(2, 40), 4], [2 * draw(60), draw(60), 10]],
    wrongs={
        "p is the probability of who won and not of the model's favourite: bins from 0 to 1, and everybody in them has won":
            lambda c, r, bins: calibrated(c, r, bins, lambda d: 1 / (1 + math.exp(-d)), 0.0, lambda d: True),
        "the bins run from 0 to 1: half of them are empty": lambda c, r, bins: calibrated(c, r, bins, low=0.0),
        "the middle of the bin is returned in place of the mean of its p":
            lambda c, r, bins: calibrated(c, r, bins, middle=True),
        "equal scores count as right": lambda c, r, bins: calibrated(c, r, bins, right=lambda d: d >= 0),
        "the share is taken of all pairs and not of those in the bin":
            lambda c, r, bins: calibrated(c, r, bins, share=True),
        "who lost counts as right": lambda c, r, bins: calibrated(c, r, bins, right=lambda d: d < 0),
    },
    put=put_calibration, scripts=("reward.py",), tests="tests/test_reward.py")

EXERCISES = [bradley_terry_loss, ranking_loss, calibration]
