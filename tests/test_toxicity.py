"""Who judges, what the limit is, and Detoxify's way of answering, played by a stand-in of the same interface."""
import sys
import types

import pytest

from data import toxicity
from data.toxicity import SCORES, WORDS, is_clean, load_toxicity, toxicity_of
from common.errors import UserError


@pytest.mark.parametrize("name", SCORES)
def test_a_tenth_is_clean_and_more_is_not_for_each_of_six_scores(name):
    assert is_clean({name: 0.1}) and not is_clean({name: 0.1001})
    assert is_clean({name: 0.5}, most=0.5) and not is_clean({name: 0.5}, most=0.49)


def test_other_scores_do_not_count_and_missing_ones_are_0():
    assert is_clean({}) and is_clean({"toxicity": 0.9, "insult": None})
    assert not is_clean({"insult": float("nan")})


def test_scores_of_a_row():
    scores = {"toxicity": 0.5, "insult": 0.2, "threat": "0.3", "obscene": None, "severe_toxicity": "N/A"}
    assert toxicity_of({"detoxify": scores}) == {"insult": 0.2, "threat": 0.3}
    assert toxicity_of({"detoxify": '{"insult": 0.2}'}) == {"insult": 0.2}  # a CSV cell
    for row in ({}, {"detoxify": None}, {"detoxify": "broken"}, {"detoxify": {}}, {"detoxify": [1]}):
        assert toxicity_of(row) is None


def test_every_word_is_found_as_a_whole_word_only():
    scorer, name = load_toxicity("words")
    assert "stand-in" in name and set(WORDS) == set(SCORES)
    for category, phrases in WORDS.items():
        for phrase in phrases:
            assert scorer([f"Well, {phrase.upper()}!"])[0][category] == 1.0, phrase
    assert scorer(["You\u2019re stupid."])[0]["insult"] == 1.0
    kind = scorer(["It is no stupid question.", "The scrap of idiotic nudeness hits you.", ""])
    assert all(is_clean(scores, most=0) for scores in kind) and len(kind) == 3


class Detoxify:
    """What detoxify.Detoxify has of the interface that is used: lists of floats by name, one score `toxicity` more."""

    batches = []

    def __init__(self, name, device):
        assert name == "unbiased"

    def predict(self, texts):
        self.batches.append(len(texts))
        return {name: [len(text) + i / 10 for text in texts] for i, name in enumerate(("toxicity", *reversed(SCORES)))}


def test_detoxify_is_used_in_batches_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", types.SimpleNamespace(Detoxify=Detoxify))
    monkeypatch.setattr(Detoxify, "batches", [])
    scorer, name = load_toxicity("auto")
    scores = scorer(["x" * n for n in range(70)])
    assert name == 'Detoxify "unbiased"' and Detoxify.batches == [32, 32, 6]
    assert scores == [{name: n + (6 - i) / 10 for i, name in enumerate(SCORES)} for n in range(70)]
    assert scorer([]) == []


def test_without_detoxify_the_words_judge_and_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", None)  # as if it were not installed
    scorer, name = load_toxicity("auto")
    assert scorer is toxicity.by_words and "not installed" in name
    with pytest.raises(UserError, match="pip install detoxify"):
        load_toxicity("detoxify")
    with pytest.raises(UserError, match="auto, detoxify or words"):
        load_toxicity("gpt")


def test_without_its_model_too(monkeypatch):
    def unreachable(name, device):
        raise OSError("no network")
    monkeypatch.setitem(sys.modules, "detoxify", types.SimpleNamespace(Detoxify=unreachable))
    scorer, name = load_toxicity("auto")
    assert scorer is toxicity.by_words and "could not be loaded (OSError)" in name
    with pytest.raises(UserError, match="check the network"):
        load_toxicity("detoxify")
