"""Beside rouge-score, the library that papers quote: the same F1 to the last digit."""
import random

import pytest

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

from evals.metrics import rouge

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
THEIRS = rouge_scorer.RougeScorer(KINDS, use_stemmer=False)
# few words, so that they repeat; and what tokenizers trip over: case, digits, letters that lower() turns into others
PIECES = ["the", "The", "a", "cat", "dog", "don't", "well-known", "3", "42nd", "é", "naïve", "東京", "İ", "ſt", "K",
          "_x_", ".", "!", ",", "\n", "\n\n", "\r\n", "\t", "\x1c", "  "]


def text(rng, longest):
    return rng.choice([" ", ""]).join(rng.choice(PIECES) for _ in range(rng.randint(0, longest)))


@pytest.mark.parametrize("longest", [0, 3, 12, 60])
@pytest.mark.parametrize("references", [1, 3])
def test_random_texts(longest, references):
    rng = random.Random(f"{longest} {references}")
    for _ in range(300):
        reference, candidate = [text(rng, longest) for _ in range(references)], text(rng, longest)
        theirs = THEIRS.score_multi(reference, candidate)
        ours = rouge(reference, candidate) if references > 1 else rouge(reference[0], candidate)
        assert ours == pytest.approx({kind: theirs[kind].fmeasure for kind in KINDS}, abs=1e-12)
