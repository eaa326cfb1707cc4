"""Posts -> SFT, ranked answers, prompts: the dirty dump's counts, the rules of the division, and what can go wrong."""
import errno
import gzip
import json

import pytest
import torch
from safetensors.torch import load_file

import dpo
import ppo
import reward
import sft
from data import eli5, files
from island import dirty
from common import disk, download
from island.world import Island
from data.pairs import make_pairs
from data.shapes import BadRow
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.flags import check
from model import GPT, GPTConfig

OFFLINE = {"toxicity": "words", "leak_model": "tfidf"}  # the dump's counts hold for these two
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    dirty.write(folder, Island(), n=200)
    return folder


@pytest.fixture(scope="module")
def victims(dump):
    return json.loads((dump / "victims.json").read_text())


def run(source, out, **settings):
    return eli5.main(eli5.Config(**{"source": str(source), "out": str(out), **OFFLINE, **settings}))


@pytest.fixture(scope="module")
def done(dump, tmp_path_factory):
    """(the folder with everything made of the dump, the report)."""
    out = tmp_path_factory.mktemp("eli5")
    return out, run(dump, out)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def put(path, posts):
    """A file of posts: (title, [(text, votes), ...])."""
    lines = [json.dumps({"q_id": f"q{i}", "title": title, "selftext": "", "answers": {
        "a_id": [], "text": [text for text, _ in answers], "score": [votes for _, votes in answers]}})
        for i, (title, answers) in enumerate(posts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def asked(row):
    return row["messages"][0]["content"] if "messages" in row else row["prompt"]


def nonzero(counts):
    return {step: count for step, count in counts.items() if count}


# ---- counts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", SPLITS)
def test_every_filter_finds_its_victims(done, victims, split):
    assert nonzero(done[1].counts(split)) == victims[f"{split}.jsonl"]
    saved = json.loads((done[0] / "report.json").read_text())["sections"][split]
    assert nonzero({step: found["hit"] for step, found in saved.items()}) == victims[f"{split}.jsonl"]


def share(kind):
    return max(1, round(160 * dirty.KINDS[kind].share / 100))  # train has 160 of the 200 posts


@pytest.mark.parametrize("settings, gone, more", [
    ({"least_words": 0}, ["fewer than 20 words"], {"sft": share("short"), "prompts": -share("short")}),
    ({"simple": False}, ["hard to read"], {"sft": share("hard"), "prompts": -share("hard")}),
    ({"most_toxicity": 1}, ["SFT: toxic"],
     {"sft": share("toxic"), "prompts": -share("toxic"), "rejected only": -share("rejected only")}),
    ({"keep_edits": True}, ["SFT: ends in an edit"],
     {"sft": share("edited"), "prompts": -share("edited"), "rejected only": -share("rejected only")}),
    ({"least_score": 0}, ["SFT: score under 4", "no answer fit to be chosen"],
     {"sft": share("low score"), "ranked": share("none to choose"), "rejected only": -share("rejected only"),
      "prompts": -share("low score") - share("none to choose")}),
    ({"keep_urls": True}, ["URL placeholders"], {}),
    ({"cut": 2}, ["leaks"], {"sft": share("leak")}),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else None)
def test_a_filter_that_is_off_changes_its_count_and_no_other(dump, victims, tmp_path, settings, gone, more):
    expected = {step: count + more.get(step, 0) for step, count in victims["train.jsonl"].items() if step not in gone}
    assert nonzero(run(dump, tmp_path, **settings).counts("train")) == expected


# ---- what is in the files --------------------------------------------------------------------------------------------

def test_splits_and_sets_share_no_question(done, dump):
    found = {(form, split): {asked(row) for row in rows(done[0] / f"{form}_{split}.jsonl")}
             for form in eli5.FORMS for split in SPLITS}
    everywhere = {split: set.union(*(found[form, split] for form in eli5.FORMS)) for split in SPLITS}
    for split in SPLITS:
        assert not found["prompts", split] & (found["sft", split] | found["ranked", split])
        assert not any(everywhere[split] & everywhere[other] for other in SPLITS if other != split)
        read = files.stream(dump / f"{split}.jsonl", eli5.as_post, "")
        posts = [row for _, row in read if not isinstance(row, BadRow)]
        questions = {f"{title}\n\n{body}" for _, title, body, _ in posts if "?" in title and "hread" not in title
                     and "Wednesday" not in title and not title.startswith("Please, ")}
        assert everywhere[split] == questions, "the prompts are all questions that are in neither of the others"


@pytest.mark.parametrize("split", SPLITS)
def test_unfit_answers_are_rejected_by_others_and_never_chosen(done, split):
    """For every way of making pairs: a toxic, edited or low-score answer is never the better one."""
    def unfit(answer):
        return dirty.INSULT in answer["text"] or "dit" in answer["text"].splitlines()[-1][:4] or answer["votes"] < 4

    outvoted = compared = 0
    ranked, _ = files.load(done[0] / f"ranked_{split}.jsonl", "ranked")
    for row, read in zip(rows(done[0] / f"ranked_{split}.jsonl"), ranked, strict=True):
        answers, scores = row["answers"], [answer["score"] for answer in read["answers"]]
        for how in ("all", "top2", "best-worst", "random"):
            for better, worse in make_pairs(scores, how, 0):
                assert not unfit(answers[better])
                compared += unfit(answers[worse])
                outvoted += answers[worse]["votes"] > answers[better]["votes"]
        votes = [answer["votes"] for answer in answers]
        assert len(votes) == len(set(votes)) and any(not unfit(answer) for answer in answers)
    assert compared and outvoted, "the dump has insults that people voted for"


def test_sft_answers_are_clean(done):
    texts = [row["messages"][1]["content"] for split in SPLITS for row in rows(done[0] / f"sft_{split}.jsonl")]
    assert not [text for text in texts if set(text) & set("*`~[]<>_&") or "  " in text or "\n\n\n" in text]
    assert not [text for text in texts if len(text.split()) < 20 or dirty.INSULT in text or "dit" in text]


@pytest.mark.parametrize("form", ["sft", "ranked", "prompts"])
def test_the_outputs_are_read_in_their_form(done, form):
    for split in SPLITS:
        path = done[0] / f"{form}_{split}.jsonl"
        found, read = files.load(path, form)
        assert not read.dropped and len(found) == read.kept == len(rows(path)) > 5


def test_the_outputs_train_every_stage(done, tmp_path):
    """SFT, reward model, DPO and PPO, two steps each on a model of nothing: all read the files as they are."""
    tok = get_tokenizer("tiny")
    torch.manual_seed(0)
    GPT(GPTConfig(192, tok.vocab_size, n_layer=1, n_head=1, n_embd=16)).save_pretrained(tmp_path / "base")
    tok.save(tmp_path / "base")
    few = dict(steps=2, batch_size=4, save_every=0, device="cpu", dtype="float32")

    def train(script, form, init, **more):
        config = script.Config(data=str(done[0] / f"{form}_train.jsonl"), init=str(tmp_path / init),
                               out=str(tmp_path / script.__name__), **few | more)
        script.main(check(config))
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in (init, script.__name__))
        assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items() if name in after)

    train(sft, "sft", "base", mix=0.0, sample_every=0)
    train(reward, "ranked", "sft")
    train(dpo, "ranked", "sft", sample_every=0)
    train(ppo, "prompts", "sft", reward=str(tmp_path / "reward"), max_new_tokens=8, sample_every=0)


@pytest.mark.parametrize("votes, ranked, moved", [
    ([5], [5], []), ([5, 7], [5, 7], []), ([5, 5], [5], [5]), ([5, 7, 5, 7, 5], [5, 7], [5, 7, 5]), ([], [], [])])
def test_of_equal_scores_the_first_stays(votes, ranked, moved):
    answers = [eli5.Answer(str(i), number, {}) for i, number in enumerate(votes)]
    found = eli5.divide(answers)
    assert [[answer.votes for answer in part] for part in found] == [ranked, moved]
    assert [answer.text for answer in found[0]] == [str(votes.index(number)) for number in ranked]


SENTENCES = "The old mill has a big wheel. The wind and the water turn it all day long, and so it can make bread."
OTHER = "A boat can swim as it has less weight than the water it would take the place of. So the sea can hold it up."


@pytest.mark.parametrize("votes, least, file", [
    ([4], 4, "sft"), ([3], 4, "prompts"), ([3, 4], 4, "ranked"), ([3, 2], 4, "prompts"), ([-1, 0], 0, "ranked")])
def test_where_a_question_goes(tmp_path, votes, least, file):
    texts = [SENTENCES, OTHER]
    put(tmp_path / "posts.jsonl", [("Why does the wheel turn?", list(zip(texts, votes)))])
    made = {}
    for line in run(tmp_path / "posts.jsonl", tmp_path / "out", least_score=least).sections.values():
        made |= {step: found.hit for step, found in line.items() if found.kind == "counted" and found.hit}
    assert file in made and len({"sft", "ranked", "prompts"} & set(made)) == 1
    if file == "ranked":
        best, worst = rows(next((tmp_path / "out").glob("ranked_train*")))[0]["answers"]
        assert best["votes"] == least and worst["score"] == least - 1 < best["score"]


# ---- leaks and splits ------------------------------------------------------------------------------------------------

def test_train_gives_way_and_then_test(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    all_three, two, answer = "Why is the deep sea salty?", "How do small frogs jump?", [(SENTENCES, 9)]
    put(source / "train.jsonl", [(all_three, answer), (two, answer), ("Where do bees sleep?", answer)])
    put(source / "validation.jsonl", [(all_three, answer)])
    put(source / "test.jsonl", [(all_three + " Please!", answer), (two, answer)])
    counts = run(source, out)
    assert [asked(row) for row in rows(out / "sft_validation.jsonl")] == [all_three]
    assert [asked(row) for row in rows(out / "sft_test.jsonl")] == [two]
    assert [asked(row) for row in rows(out / "sft_train.jsonl")] == ["Where do bees sleep?"]
    assert [counts.counts(split)["leaks"] for split in SPLITS] == [2, 0, 1]
    assert not rows(out / "prompts_train.jsonl") and not rows(out / "prompts_test.jsonl"), "a leak is no prompt either"


def test_a_single_file_is_split_by_question(tmp_path, dump):
    whole = tmp_path / "all.jsonl"
    whole.write_text("".join((dump / f"{split}.jsonl").read_text() for split in SPLITS) * 2)
    found = {}
    for seed in (0, 0, 1):
        made = run(whole, tmp_path / f"{seed}", cut=2, seed=seed)
        for split, steps in made.sections.items():
            last = steps.get("SFT: ends in an edit")
            assert not split or last.rows - last.hit == steps["sft"].hit, "every row is counted in its own split"
        files = {path.name: path.read_bytes() for path in (tmp_path / f"{seed}").glob("*.jsonl")}
        assert found.setdefault(seed, files) == files
    assert found[0] != found[1]
    asked_in = [{asked(row) for form in eli5.FORMS for row in rows(tmp_path / "0" / f"{form}_{split}.jsonl")}
                for split in SPLITS]
    assert all(asked_in) and not asked_in[0] & asked_in[1] and not (asked_in[0] | asked_in[1]) & asked_in[2]


def test_without_a_source_the_public_set_is_fetched(tmp_path, dump, monkeypatch):
    fetched = []
    monkeypatch.setattr(download, "hub_file", lambda name, file: fetched.append((name, file)) or dump / f"{file}l")
    made = run("", tmp_path)
    assert sorted(fetched) == [("vblagoje/lfqa", f"{split}.json") for split in ("test", "train", "validation")]
    assert made.counts("train")["sft"] > 10


# ---- what can go wrong -----------------------------------------------------------------------------------------------

def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text
    return text


class FullDisk:
    """A file on a disk that has room for a few more rows only."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def close(self):
        self.file.close()


def test_a_full_disk_leaves_what_is_finished(tmp_path, dump, monkeypatch):
    opened = disk.Writer.__init__

    def init(self, path):
        opened(self, path)
        self.file = FullDisk(self.file, 5) if path.stem == "sft_train" else self.file

    monkeypatch.setattr(disk.Writer, "__init__", init)
    with pytest.raises(UserError) as error:
        run(dump, tmp_path)
    assert "sft_train.jsonl could not be written (No space left on device)" in one_sentence(error)
    assert len(rows(tmp_path / "sft_validation.jsonl")) > 5 and len(rows(tmp_path / "ranked_test.jsonl")) > 5
    assert len(rows(tmp_path / "sft_train.unfinished.jsonl")) == 5 and not (tmp_path / "sft_train.jsonl").exists()


@pytest.mark.parametrize("cut", [0.6, 2])
def test_a_file_that_is_cut_short(tmp_path, dump, cut):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for split in ("validation", "test"):
        (source / f"{split}.jsonl").write_bytes((dump / f"{split}.jsonl").read_bytes())
    packed = gzip.compress((dump / "train.jsonl").read_bytes() * 5)
    (source / "train.jsonl.gz").write_bytes(packed[:len(packed) // 2])
    with pytest.raises(UserError) as error:
        run(source, out, cut=cut)
    assert "train.jsonl.gz is cut short or damaged" in one_sentence(error)
    if cut == 2:  # with the search for leaks all files are read before the first one is written
        assert len(rows(out / "sft_test.jsonl")) > 5 and rows(out / "sft_train.unfinished.jsonl")


@pytest.mark.parametrize("text, words", [
    ('{"id": "1", "url": "", "title": "Mabel", "text": "Mabel is a cat."}\n' * 3, "post has a \"title\""),
    ('{"a": 1}\n' * 3, "unknown keys"), ('{"title": "Why?"\n' * 3, "not valid JSON"), ("", "is empty"),
    ('{"title": "Why?", "answers": {"text": ["a"], "score": ["many"]}}\n' * 3, "a score is not a number"),
    ('{"prompt": "Why?", "answers": [{"text": "a", "score": 1}]}\n' * 3, "not a post")])
def test_a_wrong_schema(tmp_path, text, words):
    (tmp_path / "posts.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        run(tmp_path / "posts.jsonl", tmp_path / "out")
    assert words in one_sentence(error)
    assert not list((tmp_path / "out").glob("*[!d].jsonl"))


@pytest.mark.parametrize("names, words", [
    (["train.jsonl", "test.csv"], "0 files named validation.*"), ([], "0 files named"),
    (["train.jsonl", "train.json", "validation.json", "test.json"], "2 files named train.*")])
def test_a_folder_without_the_splits(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=words.replace("*", r"\*")) as error:
        run(tmp_path, tmp_path / "out")
    one_sentence(error)
