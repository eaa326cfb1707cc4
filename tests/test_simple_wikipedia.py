"""Articles -> questions and answers: the counts of the dirty dump, back-translation, and going on after a failure."""
import errno
import gzip
import json
import re

import pytest

import generate as generating
from data import files
from island import dirty
from common import remote
from common import disk, download
from data import simple_wikipedia as wiki
from island.world import Island
from data.shapes import says
from data.tokenizer import get_tokenizer
from common.errors import UserError
from model import GPT, GPTConfig

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    dirty.write(folder, Island(), n=500)
    return folder


def run(source, out, **settings):
    return wiki.main(wiki.Config(source=str(source), out=str(out), **settings), generating.asker)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def put(path, texts):
    path.write_text("".join(json.dumps({"title": f"T{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def simple(n, word="cat"):
    """n short words, in sentences of ten."""
    return " ".join(f"The {word} and the dog can see the big {word}.".split()[i % 10] for i in range(n))


def answers(folder):
    return [row["messages"][1]["content"] for split in SPLITS for row in rows(folder / f"sft_{split}.jsonl")]


# ---- filters and splits ----------------------------------------------------------------------------------------------

def test_every_filter_finds_its_victims(dump, tmp_path):
    counts = run(dump / "articles.jsonl", tmp_path).counts()
    expected = json.loads((dump / "victims.json").read_text())["articles.jsonl"]
    assert {step: n for step, n in counts.items() if n} == expected


@pytest.mark.parametrize("settings, step", [
    ({"least_words": 0}, "fewer than 50 words"), ({"most_words": 9999}, "more than 500 words"),
    ({"simple": False}, "hard to read"), ({"keep_markup": True}, "wiki mark-up")])
def test_a_filter_that_is_off_changes_its_count_and_no_other(dump, tmp_path, settings, step):
    expected = json.loads((dump / "victims.json").read_text())["articles.jsonl"]
    expected["sft"] += expected.pop(step)
    assert {step: n for step, n in run(dump / "articles.jsonl", tmp_path, **settings).counts().items() if n} == expected


@pytest.mark.parametrize("paragraphs, kept", [
    ([49], None), ([50], 50), ([299, 30, 30], 329), ([300, 30], 300), ([100, 100, 99, 150, 7], 449), ([299, 201], 500),
    ([299, 202], None), ([500], 500), ([501], None)])
def test_boundaries(tmp_path, paragraphs, kept):
    run(put(tmp_path / "a.jsonl", ["\n\n".join(map(simple, paragraphs))]), tmp_path / "out")
    assert [len(text.split()) for text in answers(tmp_path / "out")] == ([kept] if kept else [])


@pytest.mark.parametrize("n, held_out, expected", [
    (75_252, 5000, 5000), (50_000, 5000, 5000), (49_999, 5000, 4999), (84, 5000, 8), (84, 5, 5), (9, 5000, 0),
    (0, 5, 0)])
def test_splits_have_the_recipe_s_sizes_or_a_tenth(n, held_out, expected):
    splits = wiki.draw_splits(n, held_out, 0)
    assert [splits.count(split) for split in SPLITS] == [n - 2 * expected, expected, expected]
    assert splits == wiki.draw_splits(n, held_out, 0)
    assert n < 80 or splits != wiki.draw_splits(n, held_out, 1)


def test_mark_up_is_removed_after_the_split(tmp_path):
    """So the held-out splits shrink too, and train does not refill them."""
    texts = [f"[[File:a.jpg|thumb]] {simple(60)}" if i % 2 else simple(60) for i in range(200)]
    counts = run(put(tmp_path / "a.jsonl", texts), tmp_path / "out")
    for split, size in zip(SPLITS, (160, 20, 20)):
        found = counts.counts(split)
        assert found["sft"] + found["wiki mark-up"] == size and found["wiki mark-up"]


def test_the_source_is_never_overwritten(dump, tmp_path):
    source = tmp_path / "articles.jsonl"
    source.write_bytes((dump / "articles.jsonl").read_bytes())
    run(source, tmp_path)
    assert source.read_bytes() == (dump / "articles.jsonl").read_bytes()


def test_without_a_source_simple_wikipedia_is_fetched(dump, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(download, "hub_files", lambda *names: fetched.append(names) or [dump / "articles.jsonl"] * 2)
    assert run("", tmp_path).counts()["unreadable"] == 2
    assert fetched == [("wikimedia/wikipedia", "20231101.simple/*.parquet")]


# ---- questions -------------------------------------------------------------------------------------------------------

def test_the_request_is_the_recipe_s():
    assert wiki.request("Salt {is} white.") == [
        {"role": "system", "content": "You are a helpful assistant that generates questions from text."},
        {"role": "user", "content": "Question: X\n\nAnswer: Salt {is} white.\n\n"
                                    "What kind of question, X, could this be an answer to?\n\nX:"}]


@pytest.mark.parametrize("said, question", [
    ("What is salt?", "What is salt?"), ('X: "What is salt?"\n\nIt is white.', "What is salt?"),
    ("\n Question: Why?", "Why?"), ("  ", ""), ("\u201cWhy X: Y?\u201d", "Why X: Y?")])
def test_only_the_question_is_kept(said, question):
    assert wiki.only_question(said) == question


def test_titles_make_questions_and_articles_without_one_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    articles = [{"title": "Salt", "text": simple(60)}, {"text": simple(60, "hen")}]
    path.write_text("\n".join(map(json.dumps, articles)) + "\n")
    assert run(path, tmp_path / "out").counts()["no question"] == 1
    assert [row["messages"] for row in rows(tmp_path / "out/sft_train.jsonl")] == [[
        says("user", "What is Salt?"), says("assistant", simple(60))]]


ASK = {"ask": "http://127.0.0.1:9/v1", "model": "m", "parallel": 1}


def test_a_model_at_an_address_is_asked_once_for_every_article(tmp_path, monkeypatch):
    """Also after a failure: what was found is kept, and half a line of a killed run does no harm."""
    source, out, asked = put(tmp_path / "a.jsonl", [simple(60 + i) for i in range(40)]), tmp_path / "out", []

    def complete(url, model, messages):
        if len(asked) == 35:
            asked.append(None)
            raise UserError("http://127.0.0.1:9/v1 cannot be reached (refused), 4 times: start again")
        asked.append(re.search(r"Answer: (.*)\n\nWhat kind", messages[1]["content"])[1])
        return f'X: "Who sees {len(asked[-1].split())} words?"'

    monkeypatch.setattr(remote, "complete", complete)
    with pytest.raises(UserError) as error:
        run(source, out, **ASK)
    assert "35 questions are kept" in str(error.value) and "\n" not in str(error.value)
    with open(out / "questions.jsonl", "a") as file:
        file.write('{"text": "01')
    run(source, out, **ASK)
    assert len(set(asked)) == 41 and all(asked.count(text) == 1 for text in asked[:35]), "nobody is asked twice"
    once = len(asked)
    run(source, out, **ASK)
    assert len(asked) == once, "half a line swallows no question"
    for split in SPLITS:
        found, read = files.load(out / f"sft_{split}.jsonl", "sft")
        assert not read.dropped and found
        for row in found:
            question, answer = (message["content"] for message in row["messages"])
            assert question == f"Who sees {len(answer.split())} words?"
    run(source, out, **ASK | {"model": "another"})
    assert len(asked) == once + 40, "another model's questions are other questions"


def test_a_failure_does_not_wait_for_the_queue(tmp_path, monkeypatch):
    asked = []

    def complete(*request):
        asked.append(request)
        raise UserError("no")

    monkeypatch.setattr(remote, "complete", complete)
    with pytest.raises(UserError, match="0 questions are kept"):
        run(put(tmp_path / "a.jsonl", [simple(60 + i) for i in range(30)]), tmp_path / "out", **ASK | {"parallel": 2})
    assert len(asked) < 30


def test_a_checkpoint_is_asked_and_long_articles_are_cut_for_it(tmp_path, monkeypatch):
    tok = get_tokenizer("tiny")
    folder, source = tmp_path / "asker", put(tmp_path / "a.jsonl", [simple(400), simple(60)])
    model = GPT(GPTConfig(256, tok.vocab_size, n_layer=1, n_head=1, n_embd=16))
    model.save_pretrained(folder)
    tok.save(folder)
    asker, seen = generating.asker(str(folder), wiki.LONGEST), []
    monkeypatch.setattr(generating, "ask", lambda model, tok, said, *rest, **more: seen.extend(said) or ["Why?"] * len(said))
    assert list(asker([simple(400), simple(60)])) == ["Why?", "Why?"]
    monkeypatch.undo()
    long, short = (conversation[0]["content"] for conversation in seen)
    assert short == simple(60) and simple(400).startswith(long) and long != simple(400)
    assert 150 < len(tok.render_prompt(seen[0])) <= 256 - wiki.LONGEST
    counts = run(source, tmp_path / "out", ask=str(folder)).counts()
    assert counts["sft"] + counts["no question"] == 2  # an untrained model may say nothing


def test_reverse_turns_questions_and_answers_around(tmp_path):
    pair = [says("user", "Who is Pip?\n\nMy friend asks."), says("assistant", "Pip is a robot.")]
    source = tmp_path / "sft.jsonl"
    source.write_text(json.dumps({"messages": pair}) + "\n" + json.dumps({"messages": pair * 2}) + "\n")
    wiki.main(wiki.Config(reverse=str(source), out=str(tmp_path / "out")))
    found, read = files.load(tmp_path / "out/reversed.jsonl", "sft")
    only = [says("user", "Pip is a robot."), says("assistant", "Who is Pip?")]
    assert [row["messages"] for row in found] == [only], "a conversation of two turns has no one question"


# ---- what can go wrong -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, words", [
    ('{"question": "Why?", "answer": "Because."}\n' * 3, "no text"), ('{"title": "a", "te\n' * 3, "not valid JSON"),
    ("", "is empty"), ('{"text": 5}\n' * 3, "no text")])
def test_a_wrong_schema(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out/sft_train.jsonl").exists()


def test_a_file_that_is_cut_short_keeps_the_articles_before(dump, tmp_path):
    packed = gzip.compress((dump / "articles.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:len(packed) * 3 // 4])
    with pytest.raises(UserError, match="a.jsonl.gz is cut short or damaged") as error:
        run(tmp_path / "a.jsonl.gz", tmp_path / "out")
    assert "\n" not in str(error.value) and len(rows(tmp_path / "out/filtered.unfinished.jsonl")) > 10


def test_a_full_disk_leaves_what_is_finished(dump, tmp_path, monkeypatch):
    def write(self, row):
        with disk.on_disk(self.path):
            if self.path.stem == "sft_train" and self.rows == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        written(self, row)

    written = disk.Writer.write
    monkeypatch.setattr(disk.Writer, "write", write)
    with pytest.raises(UserError, match="sft_train.jsonl could not be written .No space left on device") as error:
        run(dump / "articles.jsonl", tmp_path)
    assert "\n" not in str(error.value)
    assert len(rows(tmp_path / "filtered.jsonl")) > 20 and len(rows(tmp_path / "sft_train.unfinished.jsonl")) == 3


@pytest.mark.parametrize("settings, words", [
    ({"ask": "https://example.org/v1"}, "needs --model"), ({"held_out": -1}, "--held-out"),
    ({"parallel": 0}, "--parallel")])
def test_impossible_flags(dump, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        run(dump / "articles.jsonl", tmp_path, **settings)
