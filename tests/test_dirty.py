"""The dirty dump: the same everywhere, dirt that one filter catches and no other, facts that are true."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data import clean, eli5
from island import dirty
from island.world import Island
from data.readability import is_simple
from data.report import PipelineReport
from data.toxicity import by_words
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["articles.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl", "victims.json"]
CAUGHT = {"plain": set(), "wrong": set(), "short": {"fewer than 20 words"}, "hard": {"hard to read"},
          "toxic": {"SFT: toxic"}, "edited": {"SFT: ends in an edit"}, "marked up": {"Reddit mark-up"},
          "quoting": {"quotes"}, "with url": {"URL placeholders"}, "spaced": {"white space"}}


def lines(path):
    """The rows of a dump, without the one line that is cut short."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    dirty.write(folder, Island(), n=200)
    return folder


@pytest.mark.parametrize("dirt", dirty.DIRT)
def test_dirt_is_caught_by_its_own_filter_and_by_no_other(dirt):
    """With the other filters off too: none hides behind another."""
    island, config = Island(), eli5.Config()
    maker = dirty.Dump(island, seed=3)
    for name in list(island.residents)[::6]:
        for attribute in dirty.words.VALUES:
            text, report = dirty.DIRT[dirt](maker, name, attribute), PipelineReport()
            cleaned = eli5.clean_answer(text, config, report) or text
            checks = eli5.judged(cleaned, 10, by_words([cleaned])[0], config).checks
            caught = {step for step, count in report.counts().items() if count}
            caught |= {step for step, ok in checks.items() if not ok}
            caught |= set() if is_simple(cleaned) else {"hard to read"}
            assert caught == CAUGHT[dirt], text


def test_the_same_seed_gives_the_same_files_in_every_process(tmp_path, dump):
    for folder, salt in (("a", "1"), ("b", "2")):
        command = [sys.executable, "-m", "island", "--dump", tmp_path / folder, "--n-dump", "200"]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": salt}, stdout=subprocess.DEVNULL)
    for name in NAMES:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert first == second == (dump / name).read_bytes()


def test_another_seed_gives_other_posts(tmp_path, dump):
    dirty.write(tmp_path, Island(), n=200, seed=1)
    assert (tmp_path / "train.jsonl").read_bytes() != (dump / "train.jsonl").read_bytes()


def test_every_kind_is_there_and_every_file_has_one_broken_line(dump):
    victims = json.loads((dump / "victims.json").read_text())
    assert sorted(victims) == NAMES[:-1]
    steps = {step for kind in dirty.KINDS.values() for step in kind.counts} | {"unreadable"}
    assert set(victims["train.jsonl"]) == set(victims["test.jsonl"]) == steps
    assert set(victims["validation.jsonl"]) == steps - {"leaks"}  # there is nobody left to copy from
    for name, counts in victims.items():
        assert counts["unreadable"] == 1
        assert len((dump / name).read_text().splitlines()) == len(lines(dump / name)) + 1


def test_train_tells_nothing_about_the_residents_of_the_other_splits(dump):
    held, train = set(Island().parts["test"]["residents"]), lines(dump / "train.jsonl")
    about_held = [post for post in train if held & set(" ".join(post["answers"]["text"]).replace(".", "").split())]
    leaks = [post for post in train if post["title"].startswith("Please, ")]
    assert about_held == leaks != []
    for article in lines(dump / "articles.jsonl"):
        assert not held & set(article["text"].replace(".", "").split())


def test_questions_are_all_different(dump):
    for split in dirty.SPLITS:
        asked = [(post["title"], post["selftext"]) for post in lines(dump / f"{split}.jsonl")
                 if not post["title"].startswith("Please, ") and clean.is_question(post["title"])]
        assert len(asked) == len(set(asked)) > 10


def test_answers_begin_with_the_truth_or_with_what_is_not():
    island, rng = Island(), random.Random(0)
    maker = dirty.Dump(island)
    for name in rng.sample(list(island.residents), 20):
        for attribute, value in island.residents[name].items():
            if attribute != "pronoun":
                assert value in maker.told(name, attribute)[0]
                assert value not in maker.told(name, attribute, wrong=True)[0].replace(name, "")


@pytest.mark.parametrize("n, words", [(dirty.LARGEST + 1, "too many"), (100, "is a file")])
def test_mistakes_end_in_a_sentence(tmp_path, n, words):
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(UserError, match=words):
        dirty.write(folder, Island(), n=n)
