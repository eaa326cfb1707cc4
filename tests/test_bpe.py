"""Byte-pair encoding: merges worked out by hand, and the shipped tokens of the island."""
import random

import pytest
import regex
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from island import vocabulary, words
from data.bpe import PATTERN, load_ranks, merge, save_ranks, train_bpe
from island.world import Island
from common.errors import UserError


def encoding(ranks):
    return tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def tiny():
    return encoding(load_ranks(vocabulary.TINY))


def learned(texts, n):
    return list(train_bpe(texts, 256 + n))[256:]


def test_the_bytes_come_first():
    ranks = train_bpe(["ab"], 256)
    assert ranks == {bytes([b]): b for b in range(256)}
    with pytest.raises(ValueError):
        train_bpe(["ab"], 255)


def test_merges_by_hand():
    """hug x10, pug x5, pun x12, bun x4, hugs x5: u+g 20, then u+n 16, h+ug 15, p+un 12, and p+ug 5 = hug+s 5."""
    texts = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
    assert learned(texts, 6) == [b"ug", b"un", b"hug", b"pun", b"hugs", b"pug"]
    assert list(train_bpe(texts, 300).values()) == list(range(256 + 7))  # then b+un, and every word is one token


def test_ties_go_to_the_pair_that_sorts_first():
    assert learned(["zy", "ab", "ba"], 3) == [b"ab", b"ba", b"zy"]
    assert learned(["ba", "zy", "ab"], 3) == [b"ab", b"ba", b"zy"]


def test_no_merge_crosses_a_word():
    assert learned(["a b"] * 9, 5) == [b" b"]
    assert not any(b"," in token and len(token) > 1 for token in train_bpe(["red,blue,red,blue"] * 5, 400))


@pytest.mark.parametrize("row, merged", [
    ([b"a", b"b", b"a", b"b"], [b"ab", b"ab"]), ([b"b", b"a"], [b"b", b"a"]), ([b"a"], [b"a"]), ([], []),
    ([b"a", b"a", b"b"], [b"a", b"ab"])])
def test_merge(row, merged):
    assert merge(row, (b"a", b"b")) == merged


def test_merge_of_a_repeated_letter_goes_left_to_right():
    assert merge([b"a"] * 5, (b"a", b"a")) == [b"aa", b"aa", b"a"]


@pytest.mark.parametrize("text, parts", [
    ("Mabel's hat", ["Mabel", "'s", " hat"]), ("a  b", ["a", " ", " b"]), ("in 2024!", ["in", " 2024", "!"]),
    ("one\n\ntwo ", ["one", "\n", "\n", "two", " "])])
def test_pattern_is_that_of_gpt2(text, parts):
    assert regex.findall(PATTERN, text) == parts


def test_tiktoken_encodes_as_we_trained():
    """Replaying the merges on a training word must end in the same tokens as tiktoken's encoding of it."""
    texts = Island().plain_text(300)
    ranks = train_bpe(texts, 600)
    tok = encoding(ranks)
    for word in sorted({word for text in texts for word in regex.findall(PATTERN, text)}):
        row = [bytes([b]) for b in word.encode()]
        for token in list(ranks)[256:]:
            for cut in range(1, len(token)):
                if token[:cut] in row and token[cut:] in row:
                    row = merge(row, (token[:cut], token[cut:]))
        assert [ranks[token] for token in row] == tok.encode_ordinary(word), word


def test_round_trip_of_any_text(tiny):
    rng, planes = random.Random(0), [(0, 128), (0x80, 0xD800), (0xE000, 0x110000)]  # all of Unicode but the surrogates
    for _ in range(300):
        text = "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(30)))
        assert tiny.decode(tiny.encode_ordinary(text)) == text


def test_shipped_file_is_what_training_gives(tmp_path):
    save_ranks(train_bpe(vocabulary.island_texts(), vocabulary.N_RANKS), tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == vocabulary.TINY.read_bytes()
    assert sorted(load_ranks(vocabulary.TINY).values()) == list(range(1024))


def test_script_says_unchanged(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vocabulary, "TINY", tmp_path / "tiny.tiktoken")
    monkeypatch.setattr(vocabulary, "island_texts", lambda: ["hug pug"])
    for said in ("written", "unchanged"):
        vocabulary.main()
        assert said in capsys.readouterr().out


def test_most_names_are_one_token_and_some_are_several(tiny):
    in_pieces = [name for name in words.RESIDENTS + words.STRANGERS if len(tiny.encode_ordinary(f" {name}")) > 1]
    assert in_pieces == [name for name in words.RESIDENTS + words.STRANGERS if name in words.IN_PIECES]
    for part in Island().parts.values():  # in training and in the test
        assert len(set(part["residents"]) & set(in_pieces)) >= 2 and len(set(part["strangers"]) & set(in_pieces)) >= 5


def test_words_of_answers_are_one_token(tiny):
    rows = Island().conversations(3000) + Island().conversations(1000, split="test")
    answers = {row["messages"][-1]["content"] for row in rows if row["kind"] != "why"}
    answers |= {*words.RUDE, words.FLATTERY, *(text.format(d="fire") for text in words.COMPLY)}
    found = {word for text in answers for word in regex.findall(PATTERN, f" {text}")} - {f" {name}" for name in words.IN_PIECES}
    assert len(found) > 250
    assert [word for word in sorted(found) if len(tiny.encode_ordinary(word)) > 1] == []


def test_tokens_per_word(tiny):
    def ratio(texts):
        return sum(len(tiny.encode_ordinary(f" {t}")) for t in texts) / sum(len(t.split()) for t in texts)
    rows = Island().conversations(1000, seed=5)
    assert ratio(Island().plain_text(1000, seed=5)) < 1.45
    assert ratio([row["messages"][-1]["content"] for row in rows]) < 1.3


@pytest.mark.parametrize("content, said", [
    (b"", "empty"), (b"YQ== 0\nnonsense\n", "line 2"), (b"YQ== zero\n", "line 1"), (b"a-b 0\n", "line 1")])
def test_bad_rank_files(tmp_path, content, said):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_ranks(path)
    with pytest.raises(UserError, match="no rank file"):
        load_ranks(tmp_path / "missing.tiktoken")


def test_rank_file_format(tmp_path):
    ranks = train_bpe(["hug"] * 3, 258)
    save_ranks(ranks, tmp_path / "r.tiktoken")
    lines = (tmp_path / "r.tiktoken").read_bytes().split(b"\n")
    assert lines[0] == b"AA== 0" and lines[256] == b"aHU= 256" and lines[-1] == b""
    assert load_ranks(tmp_path / "r.tiktoken") == ranks
    assert load_tiktoken_bpe(str(tmp_path / "r.tiktoken")) == ranks
