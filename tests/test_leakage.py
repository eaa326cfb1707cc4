"""The blocked cosine against brute force, TF-IDF by hand, and who gives way to whom."""
import json
import math
import random
import sys
import types

import pytest
import torch

from data import leakage
from data.leakage import find_near, remove_leaks, take, tfidf, vectors
from common.errors import UserError


def texts(n, seed, vocabulary=40):
    rng = random.Random(seed)
    return [" ".join(f"w{int(rng.paretovariate(0.7)) % vocabulary}" for _ in range(rng.randint(1, 9)))
            for _ in range(n)]


def brute(a, b):
    """Cosines of dense rows, one pair at a time."""
    return torch.tensor([[float(x @ y) / max(float(x.norm() * y.norm()), 1e-12) for y in b] for x in a])


# ---- vectors ---------------------------------------------------------------------------------------------------------

def test_tfidf_by_hand():
    found = tfidf(["the cat", "The the dog!", "..."]).to_dense()  # columns: the, cat, dog
    the, rare = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    rows = torch.tensor([[the, rare, 0], [2 * the, 0, rare], [0, 0, 0]])
    assert torch.allclose(found, rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9), atol=1e-6)


def test_tfidf_of_nothing():
    assert tfidf([]).shape == (0, 0) and tfidf([""]).shape == (1, 0)
    assert find_near(tfidf([""]), tfidf([""]))[0].tolist() == [False]


@pytest.mark.parametrize("index", [[], [0], [3, 1, 1], [4, 0, 2], list(range(5))])
def test_take_is_indexing(index):
    found, index = tfidf(["a b", "", "b c d", "a", "e"]), torch.tensor(index, dtype=torch.int64)
    assert torch.equal(take(found, index).to_dense(), found.to_dense()[index])
    assert torch.equal(take(found.to_dense(), index), found.to_dense()[index])


class SentenceTransformer:
    """The part of sentence_transformers.SentenceTransformer that is used."""

    def __init__(self, name):
        if name == "none":
            raise OSError("no such model")
        self.name = name

    def encode(self, texts, normalize_embeddings, convert_to_tensor, show_progress_bar):
        assert normalize_embeddings and convert_to_tensor
        found = torch.tensor([[float(text.count("a")), float(text.count("b")), 1.0] for text in texts])
        return torch.nn.functional.normalize(found, dim=1)


def test_sentence_transformers_where_it_is_installed(monkeypatch):
    installed = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", installed)
    found, name = vectors(["aab", "b"])
    assert name == "sentence-transformers all-mpnet-base-v2" and found.shape == (2, 3)
    assert vectors(["a"], "./mine")[1] == "sentence-transformers ./mine"
    assert vectors(["a"], "tfidf")[1] == "TF-IDF"
    with pytest.raises(UserError, match=r"none could not be loaded \(OSError\)"):
        vectors(["a"], "none")
    monkeypatch.setattr(leakage, "MODEL", "none")
    assert vectors(["a"])[1] == "TF-IDF (none could not be loaded (OSError))"
    assert remove_leaks(["aaa", "bbb"], [], ["aab"], cut=0.9, model="x").train == [True, False]  # 0.905 and 0.754


def test_without_sentence_transformers_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert vectors(["a"])[1] == "TF-IDF (sentence-transformers is not installed)"
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        vectors(["a"], "all-mpnet-base-v2")


# ---- leaks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block, cells", [(8192, 2**24), (7, 200), (1, 1), (50, 40 * 13)])
@pytest.mark.parametrize("dense", [False, True])
def test_blocks_change_nothing(monkeypatch, block, cells, dense):
    monkeypatch.setattr(leakage, "BLOCK", block)
    monkeypatch.setattr(leakage, "CELLS", cells)
    found = tfidf(texts(50, 0) + texts(30, 1, vocabulary=60))
    a, b = take(found, torch.arange(50)), take(found, torch.arange(50, 80))
    a, b = (a.to_dense(), b.to_dense()) if dense else (a, b)
    mask, cosine, partner = find_near(a, b, cut=0.6)
    expected = brute(a.to_dense(), b.to_dense())
    assert torch.allclose(cosine, expected.max(1).values, atol=1e-5)
    assert torch.allclose(expected[torch.arange(50), partner], cosine, atol=1e-5)
    assert torch.equal(mask, expected.max(1).values >= 0.6) and 0 < mask.sum() < 50


@pytest.mark.parametrize("cut, leak", [(0.6, True), (0.61, False), (0.59, True)])
def test_the_cut_itself_is_a_leak(cut, leak):
    a, b = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    assert find_near(a, b, cut)[0].tolist() == [leak]


def test_empty_sets():
    found = tfidf(["a", "b"])
    nobody = take(found, torch.arange(0))
    assert [x.tolist() for x in find_near(found, nobody)] == [[False, False], [-1.0, -1.0], [0, 0]]
    assert [x.tolist() for x in find_near(nobody, found)] == [[], [], []]


# ---- who gives way ---------------------------------------------------------------------------------------------------

SKY, BREAD, STARS, SOUP = ("Why is the sky so blue in summer?", "What makes dough rise in a warm oven?",
                           "Where do stars go by day?", "Who cooked soup first?")


@pytest.mark.parametrize("train, validation, test, train_gone, test_gone", [
    ([SKY, BREAD], [SKY + " Really"], [STARS], [True, False], [False]),      # train gives way to validation,
    ([SKY, BREAD], [STARS], [BREAD + " Really"], [False, True], [False]),    # and to test;
    ([SOUP], [SKY], [SKY + " Really", STARS], [False], [True, False]),       # test gives way to validation,
    ([SKY], [SKY], [SKY], [True], [True]),                                   # which never does
    ([SKY, SKY], [], [STARS], [False, False], [False]),                      # within a split nothing leaks
    ([SKY], [], [SKY], [True], [False]), ([SKY], [SKY], [], [True], []), ([], [SKY], [SKY], [], [True]),
    ([], [], [], [], []),
])
def test_precedence(train, validation, test, train_gone, test_gone):
    found = remove_leaks(train, validation, test, model="tfidf")
    assert (found.train, found.test) == (train_gone, test_gone)
    assert all(cosine < 0.6 for cosine, *_ in found.closest)


def test_a_cut_of_1_finds_the_same_words():
    asked = texts(60, 5, 300)  # in float32 the cosine of a vector with itself is often 0.9999999
    assert all(remove_leaks(asked, [], asked[::-1], 1.0, "tfidf").train)


def test_train_does_not_give_way_to_what_has_left_test():
    validation, test, train = ["a b c d e f"], ["a b c d e g h i", "z"], ["d e g h i k l m"]
    assert remove_leaks(train, validation, test, 0.45, "tfidf").test == [True, False]
    assert remove_leaks(train, [], test, 0.45, "tfidf").train == [True]
    assert remove_leaks(train, validation, test, 0.45, "tfidf").train == [False]


def test_the_closest_survivors_are_shown():
    train, validation, test = texts(40, 2, 300), texts(20, 3, 300), texts(20, 4, 300)
    found = remove_leaks(train, validation, test, 0.5, "tfidf", closest=5)
    assert len(found.closest) == 5 and found.closest == sorted(found.closest, key=lambda pair: -pair[0])
    everything = tfidf([*train, *validation, *test]).to_dense()
    cosines = everything @ everything.T
    held = [40 + i for i in range(20)] + [60 + i for i, gone in enumerate(found.test) if not gone]
    pairs = [(max(cosines[i, j].item() for j in held)) for i in range(40) if not found.train[i]]
    pairs += [max(cosines[60 + i, j].item() for j in range(40, 60)) for i in range(20) if not found.test[i]]
    assert [pair[0] for pair in found.closest] == pytest.approx(sorted(pairs, reverse=True)[:5], abs=1e-5)
    assert all(0 < cosine < 0.5 for cosine, *_ in found.closest)
    cosine, split, mine, other = found.closest[0]
    assert mine in {"train": train, "test": test}[split] and other in [*validation, *test] and mine in str(found)


# ---- the command -----------------------------------------------------------------------------------------------------

def put(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["leakage.py", *map(str, args)])
    leakage.main()


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_without_leaks(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": text, "completion": "because"} for text in (SKY, BREAD, STARS)]
    train = put(tmp_path / "train.jsonl", [rows[0], "{damaged", *rows[1:]])  # numbers are of lines, not of questions
    validation = put(tmp_path / "validation.jsonl", [{"messages": [
        {"role": "system", "content": SOUP}, {"role": "user", "content": BREAD},
        {"role": "assistant", "content": STARS}]}])
    test = put(tmp_path / "test.jsonl", [{"prompt": BREAD}, {"prompt": SKY}, {"prompt": SOUP}])
    run(monkeypatch, train, validation, test, "--model", "tfidf", "--out", tmp_path / "out")
    assert rows_in(tmp_path / "out" / "train.jsonl") == [rows[2]]
    assert rows_in(tmp_path / "out" / "test.jsonl") == [{"prompt": SKY}, {"prompt": SOUP}]
    assert rows_in(tmp_path / "out" / "validation.jsonl") == rows_in(validation)
    printed = capsys.readouterr().out
    assert "train  2 of 3 questions leak" in printed and "test   1 of 3 questions leak" in printed


def test_two_files_are_train_and_test(tmp_path, monkeypatch, capsys):
    train = put(tmp_path / "a.jsonl", [{"prompt": SKY}, {"prompt": SOUP}])
    test = put(tmp_path / "b.jsonl", [{"prompt": SKY}])
    run(monkeypatch, train, test, "--model", "tfidf", "--out", tmp_path / "out")
    assert rows_in(tmp_path / "out" / "a.jsonl") == [{"prompt": SOUP}]
    assert rows_in(tmp_path / "out" / "b.jsonl") == [{"prompt": SKY}]
    with pytest.raises(UserError, match="different names, and another folder"):
        run(monkeypatch, train, test, "--model", "tfidf", "--out", tmp_path)
    with pytest.raises(UserError, match="4 files"):
        run(monkeypatch, train, test, train, test)
    with pytest.raises(UserError, match="does not exist"):
        run(monkeypatch, train, tmp_path / "none.jsonl")
