"""ROUGE by hand, vectors whose angles are known, intervals and tests with a known answer."""
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trainer
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.tables import interval, sign_test
from evals.metrics import bert_score, embedding_f1, lcs_positions, lcs_table, rouge, token_vectors
from model import GPT, GPTConfig

RUN = trainer.Run(torch.device("cpu"), torch.float32)

# ---- ROUGE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference, candidate, r1, r2, rl, rlsum", [
    ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.",
     12 / 17, 4 / 15, 10 / 17, 10 / 17),
    ("police killed the gunman", "the gunman kill police", 3 / 4, 1 / 3, 1 / 2, 1 / 2),
    ("a b c\nd e f g", "d e f x\na b y", 5 / 7, 1 / 2, 3 / 7, 5 / 7),  # sentences swapped: only Lsum forgives
    ("a", "a a a a", 2 / 5, 0, 2 / 5, 2 / 5),  # said four times, found once: P 1/4, R 1
    ("a\na", "a", 2 / 3, 0, 2 / 3, 2 / 3),  # both lines of the reference find the same word: it counts once
    ("a a", "a\na b", 4 / 5, 2 / 3, 4 / 5, 4 / 5),  # one line finds the last a, the other the first: ties go up
    ("a x a", "a\na", 4 / 5, 0, 4 / 5, 2 / 5),  # both find the last a of the reference: their union is one word
    ("don't", "DON T!", 1, 1, 1, 1), ("42nd é", "42nd", 1, 0, 1, 1),  # é is no word: only a-z and 0-9 are
    ("a", "b", 0, 0, 0, 0), ("", "a", 0, 0, 0, 0), ("a", "", 0, 0, 0, 0), ("", "", 0, 0, 0, 0),
    ("\n\n", "...", 0, 0, 0, 0)])
def test_rouge_by_hand(reference, candidate, r1, r2, rl, rlsum):
    expected = {"rouge1": r1, "rouge2": r2, "rougeL": rl, "rougeLsum": rlsum}
    assert rouge(reference, candidate) == pytest.approx(expected, abs=1e-12)
    assert rouge(candidate, reference)["rouge1"] == pytest.approx(r1)  # F1 of counts is symmetric


def test_several_references_give_the_best_of_each_kind():
    found = rouge(["a b c d", "d c b a e"], "e a b")
    each = [rouge(reference, "e a b") for reference in ("a b c d", "d c b a e")]
    assert found == {kind: max(scores[kind] for scores in each) for kind in found}
    assert found["rouge1"] == each[1]["rouge1"] != each[0]["rouge1"]
    assert found["rougeL"] == each[0]["rougeL"] != each[1]["rougeL"]


def subsequences(a):
    return {tuple(a[i] for i in range(len(a)) if bits >> i & 1) for bits in range(2 ** len(a))}


def test_longest_common_subsequence_against_all_of_them():
    rng = random.Random(0)
    for _ in range(100):
        a, b = (rng.choices("abc", k=rng.randint(0, 7)) for _ in range(2))
        table, positions = lcs_table(a, b), lcs_positions(a, b)
        for i in range(len(a) + 1):
            for j in range(len(b) + 1):
                assert table[i, j] == max(map(len, subsequences(a[:i]) & subsequences(b[:j])))
        assert len(positions) == table[-1, -1]
        assert tuple(a[i] for i in sorted(positions)) in subsequences(b)


# ---- vectors ---------------------------------------------------------------------------------------------------------

def test_embedding_f1_by_hand():
    """Angles of 0, 60 and 90 degrees; lengths do not count."""
    reference = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])
    candidate = torch.tensor([[5.0, 0, 0], [0, 0, 3.0], [1, math.sqrt(3), 0]])
    # the reference finds 1 and cos 30; the candidate finds 1, 0 and cos 30
    precision, recall = (1 + 0 + math.sqrt(3) / 2) / 3, (1 + math.sqrt(3) / 2) / 2
    expected = precision, recall, 2 * precision * recall / (precision + recall)
    assert embedding_f1(reference, candidate) == pytest.approx(expected, abs=1e-6)
    assert embedding_f1(candidate, reference)[:2] == pytest.approx((recall, precision), abs=1e-6)


def test_embedding_f1_of_nothing():
    some, none = torch.eye(3), torch.zeros(0, 3)
    assert embedding_f1(some, none) == embedding_f1(none, some) == embedding_f1(none, none) == (0.0, 0.0, 0.0)
    assert embedding_f1(some[:1], some[1:]) == (0.0, 0.0, 0.0)  # orthogonal: no division by 0


@pytest.fixture(scope="module")
def tiny():
    tok = get_tokenizer("tiny")
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=16, dropout=0.5)), tok


def test_token_vectors_are_the_hidden_states_of_the_text(tiny):
    model, tok = tiny
    model.train()
    texts = ["Mabel eats plum pie.", "", "Who?", "a b c d e f g h i j k l m n o p q r s t"]
    together = token_vectors(model, tok, texts, RUN, micro_tokens=20)
    assert model.training  # as it was, and dropout was off in between:
    for text, vectors in zip(texts, together, strict=True):
        assert torch.allclose(vectors, token_vectors(model, tok, [text], RUN)[0], atol=1e-6)  # padding changes nothing
    ids = [tok.end_of_text] + tok.encode(" Mabel eats plum pie.")
    with torch.inference_mode():
        hidden = model.eval().hidden(torch.tensor([ids]))[0]
    assert torch.allclose(together[0], hidden[1:], atol=1e-6)
    assert [len(vectors) for vectors in together] == [len(ids) - 1, 0, len(tok.encode(" Who?")), 15]


def test_bert_score_is_asked_for_by_name_and_gets_the_candidates_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install bert-score"):
        bert_score(["r"], ["c"])

    def score(candidates, references, lang):
        assert (candidates, references, lang) == (["c"], ["r"], "en")
        return torch.tensor([0.25]), torch.tensor([0.5]), torch.tensor([0.75])

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=score))
    assert bert_score(("r",), ("c",)) == ([0.25], [0.5], [0.75])

    def offline(*args, **settings):
        raise OSError("no route\nto host")

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=offline))
    with pytest.raises(UserError, match=r"roberta-large \(no route\)"):
        bert_score(["r"], ["c"])


# ---- how far to trust a number ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [[0, 1] * 50, [1] * 90 + [0] * 10, list(range(200))])
def test_interval_is_the_normal_one_where_that_holds(values):
    """Of many values, mean -+ 1.96 standard errors."""
    mean, low, high = interval(values, n=4000)
    error = np.std(values) / math.sqrt(len(values))
    assert mean == pytest.approx(np.mean(values))
    assert ((mean - low) / error, (high - mean) / error) == pytest.approx((1.96, 1.96), abs=0.15)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [low <= 0.3 <= high for _, low, high in
               (interval(rng.random(60) < 0.3, n=200, seed=i) for i in range(200))]
    assert 0.90 < np.mean(covered) < 0.98


def test_interval_of_few_values():
    assert interval([0.25]) == (0.25, 0.25, 0.25)
    assert interval([2, 2, 2]) == (2.0, 2.0, 2.0)
    assert interval([]) is None
    mean, low, high = interval([0.0, 1.0])
    assert (mean, low, high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_interval_of_what_is_no_number(value):
    with pytest.raises(ValueError):
        interval([1.0, value])


def test_interval_depends_on_the_seed_and_on_nothing_else():
    values = [i * 0.37 % 1 for i in range(50)]
    assert interval(values) == pytest.approx((0.485, 0.40716, 0.567405), abs=1e-9)  # in every process
    assert interval(values) != interval(values, seed=1)


@pytest.mark.parametrize("wins, losses, p", [
    (0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (9, 1, 22 / 1024), (1, 9, 22 / 1024),
    (3, 2, 1.0)])
def test_sign_test_by_hand(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, abs=1e-15)


def test_sign_test_of_many_games():
    """Near the normal approximation with continuity correction, and no overflow where 2 ** n has a thousand digits."""
    z = (1850 - 1750 - 0.5) / math.sqrt(3500 / 4)
    assert sign_test(1850, 1650) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0 <= sign_test(4000, 0) < 1e-300
