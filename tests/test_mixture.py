"""The chat mixtures on small files in the real schemas: every filter finds exactly its victims, and nothing leaks."""
import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from data import files, identity, oasst, smoltalk
from data.tokenizer import get_tokenizer
from common.errors import UserError

TOK = get_tokenizer("tiny")
REAL_TREES = Path(__file__).resolve().parents[2] / "shared" / "data" / "oasst_en_100_tree.jsonl"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(question, turns=1, system=""):
    """A conversation of `turns` questions and answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in range(turns):
        messages += [{"role": "user", "content": f"{question} {turn}"}, {"role": "assistant", "content": "Yes, it is."}]
    return messages


def of_length(n):
    """A conversation of exactly n tokens."""
    words = 0
    while len(TOK.render(talk("why" + " a" * (words + 1)))[0]) <= n:
        words += 1
    messages = talk("why" + " a" * words)
    assert len(TOK.render(messages)[0]) == n
    return messages


# ---- SmolTalk --------------------------------------------------------------------------------------------------------

@pytest.fixture
def source(tmp_path):
    """Every subset, with a known number of victims of every filter."""
    folder = tmp_path / "source"
    everyday = [{"topic": "Work", "full_topic": "Work/x", "prompt": "hi", "completion": "x", "token_length": 9,
                 "messages": talk(f"everyday {i}", turns=4)} for i in range(6)] + [{"messages": of_length(600)}]
    magpie = [{"category": "reasoning", "difficulty": "easy", "messages": talk(f"magpie {i}", 1 + i % 2)}
              for i in range(9)]
    magpie += [{"category": name, "messages": talk(f"leak {name}")}
               for name in ("math", "coding", "Math", "Coding & Debugging")]
    magpie += [{"category": category, "messages": messages} for category, messages in [
        ("planning", talk("magpie", turns=3)), (None, talk("which?")), ("editing", of_length(512)),
        ("editing", of_length(513)), ("planning", [])]]
    rewrite = [{"messages": talk(f"rewrite {i}", system="Make it short.")} for i in range(30)]
    rewrite += [{"messages": talk("x", turns=3)}]
    write(folder / "everyday-conversations.jsonl", everyday)
    write(folder / "smol-magpie-ultra-0.jsonl", magpie[:8])
    write(folder / "smol-magpie-ultra-1.jsonl", magpie[8:])
    write(folder / "smol-rewrite" / "train-00000-of-00001.jsonl", rewrite)
    write(folder / "smol-rewrite" / "test-00000-of-00001.jsonl", [{"messages": talk("leak of the test split")}])
    write(folder / "smol-constraints.jsonl", [{"messages": talk(f"constraints {i}")} for i in range(3)])
    write(folder / "smol-constraints_test.jsonl", [{"messages": talk("leak of the test split")}])
    with gzip.open(folder / "smol-summarize.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"messages": talk(f"summarize {i}")}) + "\n" for i in range(12))
    return folder


def mix(source, out, **settings):
    settings = {"sample": 10, "tokenizer": "tiny"} | settings
    return smoltalk.mix(smoltalk.Config(source=str(source), out=str(out), **settings))


def texts_of(path):
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]


def test_every_filter_finds_its_victims(source, tmp_path):
    report = mix(source, tmp_path / "out")
    assert report.counts("everyday-conversations") == {
        "not a conversation": 0, "passed": 7, "written": 7}  # whole, the long one too
    assert report.counts("smol-magpie-ultra") == {
        "not a conversation": 1, "without a category": 1, "math and coding": 4, "more than 2 turns": 1,
        "more than 512 tokens": 1, "passed": 10, "written": 10}  # the one of exactly 512 is among them
    assert report.counts("smol-rewrite") == {
        "system prompt folded into the question": 30, "not a conversation": 0, "more than 2 turns": 1,
        "more than 512 tokens": 0, "passed": 30, "written": 10}
    assert [report.counts(name)["written"] for name in ("smol-constraints", "smol-summarize", "mixture")] == [3, 10, 40]
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["sections"]["smol-magpie-ultra"]["math and coding"]["hit"] == 4
    assert "tokenizer tiny" in saved["notes"][0]


def test_the_mixture_is_what_sft_trains_on_and_nothing_leaks(source, tmp_path):
    mix(source, tmp_path / "out")
    rows, report = files.load(tmp_path / "out" / "mixture.jsonl", "sft")
    assert report.kept == 40 and Counter(row["source"] for row in rows) == {
        "everyday-conversations": 7, "smol-magpie-ultra": 10, "smol-rewrite": 10, "smol-constraints": 3,
        "smol-summarize": 10}
    assert not any("leak" in row["messages"][0]["content"] for row in rows)
    assert all(message["role"] != "system" for row in rows for message in row["messages"])
    assert sum(row["messages"][0]["content"].startswith("Make it short.\n\nrewrite") for row in rows) == 10
    in_turn = [text for name in smoltalk.SUBSETS for text in texts_of(tmp_path / "out" / f"{name}.jsonl")]
    shuffled = [row["messages"][0]["content"] for row in rows]
    assert sorted(shuffled) == sorted(in_turn) and shuffled != in_turn


def test_the_seed_decides_the_sample_and_the_order(source, tmp_path):
    def texts(out, seed):
        mix(source, tmp_path / out, seed=seed)
        return texts_of(tmp_path / out / "mixture.jsonl")

    assert texts("a", 1) == texts("b", 1)
    assert texts("c", 2) != texts("b", 1)
    assert set(texts_of(tmp_path / "c" / "smol-rewrite.jsonl")) != set(texts_of(tmp_path / "b" / "smol-rewrite.jsonl"))


def test_magpie_s_original_columns(tmp_path):
    rows = [{"conversation": talk(f"{tag} {i}"), "primary_tag": tag, "instruction": "q", "response": "a"}
            for i, tag in enumerate(["Math", "Coding & Debugging", "Planning", "Advice seeking", "Math"])]
    write(tmp_path / "in" / "smol-magpie-ultra.jsonl", rows)
    report = mix(tmp_path / "in", tmp_path / "out")
    assert report.counts("smol-magpie-ultra")["math and coding"] == 3
    assert texts_of(tmp_path / "out" / "smol-magpie-ultra.jsonl") == ["Planning 2 0", "Advice seeking 3 0"]


def test_parquet_is_read_in_the_hub_s_folders(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = [{"messages": talk(f"constraints {i}")} for i in range(2500)]  # more than one batch
    path = tmp_path / "in" / "smol-constraints" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
    assert mix(tmp_path / "in", tmp_path / "out", sample=5000).counts("smol-constraints")["written"] == 2500


@pytest.mark.parametrize("content, sentence", [
    ('{"text": "no conversation"}\n' * 3, "holds no conversation in its 3 rows.*needs messages"),
    ('{"prompt": "hi", "chosen": "yo", "rejected": "no"}\n' * 3, "holds no conversation in its 3 rows"),
    ("", "is empty"),
    ('{"messages": \n', "not valid JSON"),
])
def test_a_file_of_another_kind_ends_in_one_sentence_and_keeps_what_is_finished(tmp_path, content, sentence):
    write(tmp_path / "in" / "everyday-conversations.jsonl", [{"messages": talk("hello")}])
    (tmp_path / "in" / "smol-rewrite.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        mix(tmp_path / "in", tmp_path / "out")
    assert "complete: everyday-conversations.jsonl (1 rows)" in str(error.value) and "\n" not in str(error.value)
    assert texts_of(tmp_path / "out" / "everyday-conversations.jsonl") == ["hello 0"]
    assert not (tmp_path / "out" / "mixture.jsonl").exists()


def test_a_damaged_file_ends_in_one_sentence(source, tmp_path):
    whole = (source / "smol-summarize.jsonl.gz").read_bytes()
    (source / "smol-summarize.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="summarize.jsonl.gz is cut short or damaged.*complete: everyday.*constraints"):
        mix(source, tmp_path / "out")


@pytest.mark.parametrize("change, sentence", [
    ({"source": "none"}, "is no folder"), ({"source": "."}, "no file named as a subset"),
    ({"out": "same"}, "the same folder"), ({"tokenizer": "none"}, "there is no tokenizer"),
])
def test_impossible_settings(source, tmp_path, monkeypatch, change, sentence):
    monkeypatch.chdir(tmp_path)
    change = {"out": str(source)} if "out" in change else change
    with pytest.raises(UserError, match=sentence):
        smoltalk.mix(smoltalk.Config(**{"source": str(source), "out": "out", "tokenizer": "tiny"} | change))


def test_without_a_network_the_tokens_are_counted_by_tiny_and_it_says_so(monkeypatch):
    def get(name):
        if name == "gpt2":
            raise UserError("no network")
        return name

    monkeypatch.setattr(smoltalk, "get_tokenizer", get)
    said = []
    assert smoltalk.counting_tokenizer("", said.append) == ("tiny", "tiny") and "no network" in said[0]
    with pytest.raises(UserError, match="no network"):  # who asked for gpt2 by name does not want another
        smoltalk.counting_tokenizer("gpt2", said.append)


def test_the_subsets_are_fetched_from_where_they_live(monkeypatch, tmp_path):
    pytest.importorskip("pyarrow")
    asked = []
    monkeypatch.setattr(smoltalk, "hub_files", lambda dataset, pattern: asked.append((dataset, pattern)) or [])
    for name in smoltalk.SUBSETS:
        smoltalk.find_files(name, "")
    assert asked[0] == ("HuggingFaceTB/everyday-conversations-llama3.1-2k", "data/train*")
    assert asked[1:] == [("HuggingFaceTB/smoltalk", f"data/{name}/train-*") for name in list(smoltalk.SUBSETS)[1:]]


def test_the_reservoir_is_uniform_and_seeded():
    assert smoltalk.reservoir(range(5), 9, 0) == [0, 1, 2, 3, 4]
    assert smoltalk.reservoir(iter(range(99)), 9, "a") == smoltalk.reservoir(range(99), 9, "a")
    assert smoltalk.reservoir(range(99), 9, "a") != smoltalk.reservoir(range(99), 9, "b")
    counts = Counter(i for seed in range(4000) for i in smoltalk.reservoir(range(20), 5, seed))
    # each is drawn 1000 times on average, with a standard deviation of 27
    assert len(counts) == 20 and all(880 < count < 1120 for count in counts.values())


# ---- OpenAssistant ---------------------------------------------------------------------------------------------------

def message(name, parent, role, text, **more):
    return {"message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023", "text": text, "role": role,
            "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": None, "synthetic": False,
            "model_name": None, "detoxify": {  # toxicity itself is not one of the six scores
                "toxicity": 0.9, "severe_toxicity": 0.0, "obscene": 0.1, "identity_attack": 0.0, "insult": 0.05,
                "threat": 0.0, "sexual_explicit": 0.0},
            "message_tree_id": "t", "tree_state": "ready_for_export"} | more


FLAT = [
    message("a", None, "prompter", "Why is the sky blue?"),
    message("a0", "a", "assistant", "Air scatters blue light.", rank=0),
    message("a1", "a", "assistant", "It just is.", rank=1),
    message("a2", "a", "assistant", "You fool.", rank=2, detoxify={"insult": 0.11}),
    message("a00", "a0", "prompter", "And red at night?"),
    message("a000", "a00", "assistant", "The way is longer.", rank=0),
    message("a001", "a00", "assistant", "Weil die Sonne tief steht.", rank=1, lang="de"),
    message("a20", "a2", "prompter", "Why so rude?"),
    message("a200", "a20", "assistant", "Sorry.", rank=0),
    message("b", None, "prompter", "Is it late?", synthetic=True),
    message("b0", "b", "assistant", "Yes.", rank=0),
    message("c", None, "prompter", "Who am I?", tree_state="prompt_lottery_waiting", detoxify=None),
    message("d", None, "prompter", "What is deleted?"),
    message("d0", "d", "assistant", "This.", rank=0, deleted=True),
    message("d1", "d", "assistant", "That.", rank=1),
]


def as_trees(flat):
    nodes = {row["message_id"]: {**row, "replies": []} for row in flat}
    for row in flat:
        if row["parent_id"]:
            nodes[row["parent_id"]]["replies"].append(nodes[row["message_id"]])
    return [{"message_tree_id": row["message_id"], "tree_state": row["tree_state"], "prompt": nodes[row["message_id"]]}
            for row in flat if not row["parent_id"]]


def prepare(path, out, **settings):
    return oasst.prepare(oasst.Config(source=str(path), out=str(out), **settings))


@pytest.mark.parametrize("kind", ["messages", "messages in another order", "trees"])
def test_oasst_counts_and_rows(tmp_path, kind):
    rows = as_trees(FLAT) if kind == "trees" else list(FLAT)
    if kind == "messages in another order":
        random.Random(1).shuffle(rows)
    report = prepare(write(tmp_path / "in.jsonl", rows), tmp_path / "out")
    assert report.counts() == {
        "not OpenAssistant's": 0, "message_id seen before": 0, "empty": 0, "of an unfinished tree": 1, "deleted": 1,
        "synthetic": 1, "not in en": 1, "toxic": 1, "no toxicity scores, taken as clean": 1,
        "below a message that went": 3,
        "sft: written": 2, "ranked: written": 1, "prompts: written": 3}
    read = {form: files.load(tmp_path / "out" / f"{form}_train.jsonl", form)[0] for form in oasst.FORMS}
    assert sorted([m["content"] for m in row["messages"]] for row in read["sft"]) == [
        ["What is deleted?", "That."],
        ["Why is the sky blue?", "Air scatters blue light.", "And red at night?", "The way is longer."]]
    assert [(a["text"], a["score"]) for a in sorted(read["ranked"][0]["answers"], key=lambda a: -a["score"])] == [
        ("Air scatters blue light.", 0), ("It just is.", -1)]  # rank 0 is best
    assert sorted(row["prompt"][-1]["content"] for row in read["prompts"]) == [
        "And red at night?", "What is deleted?", "Why is the sky blue?"]


def test_oasst_keeps_the_splits_and_the_switches_switch(tmp_path):
    write(tmp_path / "in" / "train.jsonl", FLAT)
    write(tmp_path / "in" / "validation.jsonl", [
        message("v", None, "prompter", "Hm?"), message("v0", "v", "assistant", "Hm.", rank=0),
        message("v1", "v", "assistant", "No.", rank=1)])
    report = prepare(tmp_path / "in", tmp_path / "out", lang="", most_toxicity=1.0, synthetic=True)
    assert report.counts("train")["sft: written"] == 3 and report.counts("train")["toxic"] == 0
    assert report.counts("validation")["ranked: written"] == 1
    assert files.load(tmp_path / "out" / "sft_validation.jsonl", "sft")[0][0]["messages"][0]["content"] == "Hm?"
    assert "not in en" not in json.loads((tmp_path / "out" / "report.json").read_text())["sections"]["train"]


@pytest.mark.parametrize("score, toxic", [(0.1, 0), (0.1001, 1)])
def test_the_toxicity_of_exactly_a_tenth_is_allowed(tmp_path, score, toxic):
    rows = FLAT[:3] + [message("x", "a", "assistant", "Hmpf.", rank=3, detoxify={"threat": score})]
    assert prepare(write(tmp_path / "in.jsonl", rows), tmp_path / "out").counts()["toxic"] == toxic


@pytest.mark.parametrize("content, sentence", [
    ("", "it is empty"), ('{"messages": []}\n', "neither a message nor a tree"),
    ('{"prompt": {"text": "no id", "role": "prompter", "replies": []}}\n', "lacks message_id"),
    (json.dumps(message("z", None, "prompter", 7)) + "\n", "neither a message nor a tree"),
    (json.dumps(message("z", None, "prompter", "Hm?", lang="de")) + "\n", "the filters leave no row for sft_train"),
])
def test_oasst_with_a_file_of_another_kind(tmp_path, content, sentence):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        prepare(tmp_path / "in.jsonl", tmp_path / "out")


@pytest.mark.skipif(not REAL_TREES.exists(), reason="the real sample of OpenAssistant's trees is not here")
def test_real_trees(tmp_path):
    counts = prepare(REAL_TREES, tmp_path / "out", synthetic=True).counts()
    assert [counts[f"{form}: written"] for form in oasst.FORMS] == [100, 212, 480]  # as files.load has it
    assert prepare(REAL_TREES, tmp_path / "out").counts()["synthetic"] == 22


# ---- identity --------------------------------------------------------------------------------------------------------

def asked():
    return sum(len(asks) for asks, _ in identity.ROWS)


def test_identity_rows_have_every_question_and_no_placeholder(tmp_path, capsys):
    config = identity.Config(name="Ada", author="the class of 2026", repeat=3, out=str(tmp_path / "id.jsonl"))
    identity.main(config)
    rows, _ = files.load(tmp_path / "id.jsonl", "sft")
    assert len(rows) == 3 * asked() and all(row["kind"] == "identity" for row in rows)
    assert set(Counter(row["messages"][0]["content"] for row in rows).values()) == {3}
    text = (tmp_path / "id.jsonl").read_text()
    assert "{{" not in text and "}}" not in text and "Ada" in text and "the class of 2026" in text
    answers = [row["messages"][1]["content"] for row in rows if row["messages"][0]["content"] == "Who made you?"]
    assert len(set(answers)) == 2  # repeating is not saying the same again


@pytest.mark.parametrize("settings, question", [
    ({"name": "claude"}, "Are you Claude?"), ({"author": "OpenAI"}, "You are made by OpenAI, right?")])
def test_no_row_denies_its_own_name(settings, question):
    rows = identity.make(identity.Config(repeat=1, **settings), say=str)
    assert len(rows) == asked() - 1 and question not in [row["messages"][0]["content"] for row in rows]


def test_identity_rows_are_mixed_into_conversations(tmp_path):
    data = write(tmp_path / "chat.jsonl", [{"messages": talk(f"chat {i}"), "source": "x"} for i in range(50)])
    rows = identity.make(identity.Config(data=str(data), repeat=1), say=str)
    kinds = [row.get("kind") for row in rows]
    assert kinds.count("identity") == asked() and len(rows) == asked() + 50
    assert kinds != sorted(kinds, key=str) and rows == identity.make(identity.Config(data=str(data), repeat=1), say=str)


def test_the_system_message_stands_before_every_conversation(tmp_path):
    data = write(tmp_path / "chat.jsonl", [{"messages": talk("a")}, {"messages": talk("b", system="Be brief.")}])
    config = identity.Config(name="Ada", author="us", data=str(data), system=True, out=str(tmp_path / "id.jsonl"))
    identity.main(config)
    rows, _ = files.load(tmp_path / "id.jsonl", "sft")
    message = "You are Ada, an AI assistant made by us. You are a language model, not a person."
    assert [row["messages"][0]["content"] for row in rows] == [message, message + "\n\nBe brief."]
    assert [[m["role"] for m in row["messages"]] for row in rows] == [["system", "user", "assistant"]] * 2


def test_rows_of_others(tmp_path):
    theirs = write(tmp_path / "hard.jsonl", [
        {"id": "hard_0", "source": "hard-coded", "messages": talk("Who are you, {{name}} of {{ author }}?")},
        {"instruction": "hi", "input": "", "output": "Hello! I am {{name}}."}])
    rows = identity.make(identity.Config(name="Ada", author="us", rows=str(theirs), repeat=2), say=str)
    assert sorted({row["messages"][0]["content"] for row in rows}) == ["Who are you, Ada of us? 0", "hi"]
    assert len(rows) == 4
    write(theirs, [{"messages": talk("I am {{model}}")}])
    with pytest.raises(UserError, match="no value for {{model}}"):
        identity.make(identity.Config(rows=str(theirs)), say=str)


@pytest.mark.parametrize("settings", [
    {"system": True}, {"system": True, "data": "x", "rows": "y"}, {"repeat": 0}, {"name": " "}, {"out": "id.txt"}])
def test_impossible_identities(settings):
    with pytest.raises(UserError):
        identity.main(identity.Config(**settings))
