"""Every accepted shape, the order in which they are tried, broken files, and the counts of real ones where present."""
import copy
import gzip
import json
import tracemalloc
import os
import random
import time
from pathlib import Path

import pytest

import pretrain
import reward
import sft
from data import cells, files
from data.pairs import load_ranked
from data.clean import rows_of
from data.tokenizer import get_tokenizer
from island.world import Island
from common.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def s(text):
    return {"role": "system", "content": text}


def put(folder, rows, name="x.jsonl"):
    """A .jsonl of `rows` (objects, or raw strings as they are)."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load_one(folder, row, want, **options):
    rows, report = files.load(put(folder, [row]), want, **options)
    assert (report.read, report.kept, report.dropped, len(rows)) == (1, 1, {}, 1)
    return rows[0], list(report.shapes)[0]


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "answers": [{"text": chosen, "score": 1.0}, {"text": rejected, "score": 0.0}]}


ALPACA = "Below is an instruction that describes a task. Write a response."
TALK = [u("hi"), a("yo")]
HH = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: more\n\nAssistant:"
TWO = [u("hi"), a("yo"), u("more")]

SFT = [
    ("messages", {"messages": [s("be kind"), u("hi"), a("yo")]}, [s("be kind"), u("hi"), a("yo")]),
    ("messages", {"messages": TWO + [a("end")]}, TWO + [a("end")]),  # several assistant turns stay one row
    ("messages", {"messages": TALK, "system": "be kind"}, [s("be kind")] + TALK),
    ("messages", {"messages": [s("")] + TALK}, TALK),
    ("messages", {"messages": [u([{"type": "text", "text": "h"}, {"type": "text", "value": "i"}]), a("yo")]}, TALK),
    ("messages", {"messages": [u("hi"), u("there"), a("yo")]}, [u("hi\n\nthere"), a("yo")]),
    *[("messages", {"messages": TALK[:1] + [a("yo") | {key: value}] + [u("more") | {key: "any"}, a("end") | {key: 1}]},
       TALK[:1] + [a("yo") | {"loss_weight": 0.0}, u("more"), a("end") | {"loss_weight": 1.0}])
      for key, value in (("loss_weight", 0), ("weight", 0), ("weight", "0"), ("train", False))],
    ("conversations", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo", "weight": 1},
                                         {"from": "gpt", "value": "so"}]}, [u("hi"), a("yo\n\nso")]),
    ("messages", {"messages": [u("hi"), a("    x = 1\n")]}, [u("hi"), a("    x = 1\n")]),  # indentation is content
    ("conversations", {"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"},
                                         {"from": "gpt", "value": "yo"}]}, [s("be kind")] + TALK),
    ("conversations", {"conversations": [{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "yo"}],
                       "system": "be kind"}, [s("be kind")] + TALK),
    ("conversations", {"conversations": ["hi", "yo", "more", "end"], "source": "lima"}, TWO + [a("end")]),
    ("conversations", {"conversation": TALK, "intent": "greet"}, TALK),
    ("UltraChat", {"id": "0", "data": ["hi", "yo", "more", "end"]}, TWO + [a("end")]),
    ("prompt/completion", {"prompt": "hi", "completion": "yo"}, TALK),
    ("prompt/completion", {"prompt": "hi", "response": "yo"}, TALK),
    ("prompt/completion", {"prompt": "hi", "answer": "yo", "system": "be kind"}, [s("be kind")] + TALK),
    ("prompt/completion", {"prompt": "hi", "output": "yo", "label": "greeting"}, TALK),  # a label that judges nothing
    ("prompt/completion", {"prompt": [u("hi")], "completion": [a("yo")]}, TALK),
    ("prompt/completion, judged", {"prompt": "hi", "completion": "yo", "label": True}, TALK),
    ("question/answer, judged", {"question": "hi", "answer": "yo", "label": "1.0"}, TALK),
    ("question/answer", {"question": "hi", "answer": "yo", "choices": ["yo", "no"], "label": 0}, TALK),  # an index
    ("alpaca", {"instruction": "say", "input": "yo", "output": "yo"}, [u("say\n\nyo"), a("yo")]),
    ("alpaca", {"instruction": "hi", "input": "", "output": "yo"}, TALK),
    ("alpaca", {"instruction": "hi", "input": " \n", "output": "yo"}, TALK),
    ("alpaca", {"instruction": "hi", "context": None, "response": "yo"}, TALK),
    ("alpaca", {"instruction": "more", "output": "end", "history": [["hi", "yo"]], "system": "be kind"},
     [s("be kind")] + TWO + [a("end")]),
    ("question/answer", {"question": "hi", "answer": "yo"}, TALK),
    ("question/answer", {"question": "hi", "best_answer": "yo", "category": "x"}, TALK),
    ("question/answer", {"system_prompt": "be kind", "question": "hi", "response": "yo"}, [s("be kind")] + TALK),
    ("question/answer", {"query": "more", "response": "end", "history": [["hi", "yo"]]}, TWO + [a("end")]),
    ("question/answer", {"subject": "greeting", "input": "hi", "output": "yo"}, TALK),
    ("question/answer", {"question": "hi", "question_ctx": "there", "answer": "yo"}, [u("hi\n\nthere"), a("yo")]),
    ("question/answer", {"question": "hi", "question_ctx": "[removed]", "answer": "yo"}, TALK),
    ("question/answer", {"question": "say hi there", "input": "hi", "answer": "yo"}, [u("say hi there"), a("yo")]),
    ("alpaca", {"instruction": "hi", "input": "<noinput>", "context": "", "output": "yo"}, TALK),
    ("alpaca", {"instruction": "hi", "input": "", "context": "there", "output": "yo"}, [u("hi\n\nthere"), a("yo")]),
    ("prompt/completion", {"prompt": "Be kind. ### Human: hi ### Assistant: yo ### Human: more ### Assistant:",
                           "output": "end"}, [s("Be kind.")] + TWO + [a("end")]),
    ("prompt/completion", {"prompt": "Shorten: ### Human: hi ### Assistant: yo", "output": "end"},
     [u("Shorten: ### Human: hi ### Assistant: yo"), a("end")]),  # it asks for no answer, so it is about a transcript
    ("prompt/completion", {"prompt": ALPACA + "\n\n### Instruction:\nhi\n\n### Response:", "answer": "yo"}, TALK),
    ("prompt/completion", {"prompt": (ALPACA + "\n\n### Instruction:\nsay\n\n### Input:\nhi\n\n### Response:\n")
                           .replace("\n", "\r\n"), "answer": "yo"}, [u("say\n\nhi"), a("yo")]),
    ("prompt/completion", {"prompt": "### Instruction:\nhi\n\n### Input:\n\n### Response:", "answer": "yo"}, TALK),
    ("transcript", {"text": ALPACA + "\n\n### Instruction:\nhi\n\n### Response:\nyo"}, TALK),
    ("transcript", {"text": "### Human: hi### Assistant: ### Input: 1\n\nHuman: 2"},
     [u("hi"), a("### Input: 1\n\nHuman: 2")]),  # another transcript's marks are the answer's own words
    *[("prompt/completion", {"prompt": "hi", "completion": f"yo{end}"}, TALK)
      for end in ("</s>", " </s>\n", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "###eos_token###")],
    ("prompt/completion", {"prompt": "hi", "completion": "<s>yo</s>"}, [u("hi"), a("<s>yo</s>")]),  # HTML
    ("transcript", {"text": "### Human: hi### Assistant: yo</s>### Human: more### Assistant: end</s>"},
     TWO + [a("end")]),
    ("transcript", {"text": "### Human: hi### Assistant: yo"}, TALK),
    ("transcript", {"text": "Be kind.\n### Human: hi\n### Assistant:\nyo"}, [s("Be kind.")] + TALK),
    ("transcript", {"text": HH + "     end\n"}, TWO + [a("    end\n")]),  # one blank belongs to the marker
]


@pytest.mark.parametrize("shape, row, messages", SFT)
def test_sft_shapes_and_their_prompts(tmp_path, shape, row, messages):
    got, name = load_one(tmp_path, row, "sft")
    assert (got["messages"], name) == (messages, shape)
    assert load_one(tmp_path, row, "prompts")[0]["prompt"] == messages[:-1]


RANKED = [
    ("chosen/rejected", {"prompt": "hi", "chosen": "yo", "rejected": "no"}, pair([u("hi")], "yo", "no")),
    ("chosen/rejected", {"prompt": TWO, "chosen": [a("yo")], "rejected": [a("no")]}, pair(TWO, "yo", "no")),
    ("chosen/rejected", {"prompt": "hi", "chosen": TALK, "rejected": [u("hi"), a("no")]}, pair([u("hi")], "yo", "no")),
    ("chosen/rejected", {"prompt": HH, "chosen": " yo", "rejected": " no"}, pair(TWO, " yo", " no")),
    ("chosen/rejected", {"prompt": "hi", "chosen": "Human: x", "rejected": "no"}, pair([u("hi")], "Human: x", "no")),
    ("chosen/rejected", {"prompt": "hi", "chosen": HH + " yo", "rejected": "no"}, pair([u("hi")], HH + " yo", "no")),
    ("chosen/rejected", {"chosen": TWO + [a("yo")], "rejected": TWO + [a("no")]}, pair(TWO, "yo", "no")),
    ("chosen/rejected", {"chosen": TWO + [a("yo")], "rejected": TWO + [a("yo")]}, pair(TWO, "yo", "yo")),
    ("chosen/rejected", {"chosen": HH + " yo", "rejected": HH + " yoyo"}, pair(TWO, "yo", "yoyo")),
    ("chosen/rejected", {"instruction": "say", "input": "hi", "output": "yo", "chosen": "yo", "rejected": "no"},
     pair([u("say\n\nhi")], "yo", "no")),
    ("chosen/rejected", {"question": "hi", "system": "be kind", "chosen": "yo", "rejected": "no"},
     pair([s("be kind"), u("hi")], "yo", "no")),
    ("chosen/rejected", {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yo"},
                         "rejected": {"from": "gpt", "value": "no"}}, pair([u("hi")], "yo", "no")),
    ("ELI5", {"q_id": "1", "title": "why", "selftext": "", "answers": {"a_id": ["x", "y"], "text": ["yo", "no"],
                                                                     "score": [1, 0]}}, pair([u("why")], "yo", "no")),
    ("ELI5", {"title": "why", "selftext": "so", "answers": {"text": ["yo", "no"], "score": [1, 0]}},
     pair([u("why\n\nso")], "yo", "no")),
    ("prompt/answers", {"prompt": "hi", "answers": [{"text": "yo", "score": 1}, {"text": "no", "score": 0}]},
     pair([u("hi")], "yo", "no")),
    ("prompt/answers", {"prompt": "hi", "responses": [{"response": "yo", "rank": 0, "score": None},
                                                       {"response": "no", "rank": 2}]},
     {"prompt": [u("hi")], "answers": [{"text": "yo", "score": 0.0}, {"text": "no", "score": -2.0}]}),
    ("prompt/answers", {"instruction": "hi", "completions": [{"response": "yo", "overall_score": 1.0},
                                                             {"response": "no", "overall_score": "0"}]},
     pair([u("hi")], "yo", "no")),
    ("TL;DR comparison", {"info": {"subreddit": "x", "title": "t", "post": "p"}, "choice": 0,
                          "summaries": [{"text": " yo"}, {"text": " no"}]},
     pair([u("SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:")], " yo", " no")),
]


@pytest.mark.parametrize("shape, row, wanted", RANKED)
def test_ranked_shapes_and_what_is_made_of_them(tmp_path, shape, row, wanted):
    assert load_one(tmp_path, row, "ranked") == (wanted, shape)
    assert load_one(tmp_path, row, "sft")[0]["messages"] == wanted["prompt"] + [a(wanted["answers"][0]["text"])]
    assert load_one(tmp_path, row, "prompts")[0]["prompt"] == wanted["prompt"]


PROMPTS = [
    ("prompt", {"prompt": "hi"}, {"prompt": [u("hi")]}),
    ("prompt", {"prompt": TWO}, {"prompt": TWO}),
    ("prompt", {"query": "hi", "system": "be kind"}, {"prompt": [s("be kind"), u("hi")]}),
    ("prompt", {"question": "hi", "kind": "greet"}, {"prompt": [u("hi")], "kind": "greet"}),
    ("prompt", {"prompt": HH}, {"prompt": TWO}),
    ("turns", {"question_id": 81, "category": "writing", "turns": ["hi", "more"]},
     {"prompt": [u("hi")], "follow_ups": ["more"], "category": "writing"}),
    ("messages", {"messages": TWO}, {"prompt": TWO}),
    ("prompt", {"prompt": "Be kind.\n\nHuman: hi\n\nAssistant:"}, {"prompt": [s("Be kind."), u("hi")]}),
    ("prompt", {"input": "hi"}, {"prompt": [u("hi")]}),
]


@pytest.mark.parametrize("shape, row, wanted", PROMPTS)
def test_prompt_shapes(tmp_path, shape, row, wanted):
    assert load_one(tmp_path, row, "prompts") == (wanted, shape)


def test_plain_text_is_kept_to_the_letter(tmp_path):
    assert load_one(tmp_path, {"title": "t", "text": "  a\n\nb \n"}, "text") == ({"text": "  a\n\nb \n"}, "text")
    transcript = "### Human: hi### Assistant: yo"
    assert load_one(tmp_path, {"text": transcript}, "text")[0] == {"text": transcript}


def test_the_first_matching_shape_wins(tmp_path):
    row = {"prompt": "other", "completion": "other", "messages": TALK}
    assert load_one(tmp_path, row, "sft") == ({"messages": TALK}, "messages")
    row = {"prompt": "hi", "chosen": "yo", "rejected": "no", "completion": "other"}
    assert load_one(tmp_path, row, "sft") == ({"messages": TALK}, "chosen/rejected")
    row = {"instruction": "x", "output": "x", "prompt": "hi", "completion": "yo", "question": "x", "answer": "x"}
    assert load_one(tmp_path, row, "sft") == ({"messages": TALK}, "prompt/completion")
    row = {"question": "hi", "answer": "yo", "instruction": "x", "query": "x"}
    assert load_one(tmp_path, row, "sft") == ({"messages": TALK}, "question/answer")
    row = {"instruction": "hi", "output": "yo", "text": "### Human: other### Assistant: other"}
    assert load_one(tmp_path, row, "sft") == ({"messages": TALK}, "alpaca")
    row = {"messages": TALK, "prompt": "hi", "chosen": TALK, "rejected": [u("hi"), a("no")]}  # both forms in one row
    assert load_one(tmp_path, row, "sft")[1] == "messages"
    assert load_one(tmp_path, row, "ranked") == (pair([u("hi")], "yo", "no"), "chosen/rejected")


def test_the_best_answer_wins_wherever_it_stands_and_any_field_can_rank(tmp_path):
    answers = [{"text": "A", "score": 1, "helpful": 2}, {"text": "B", "score": 3, "helpful": 1},
               {"text": "C", "score": 3, "helpful": 0}]
    row = {"prompt": "hi", "answers": answers, "kind": "k", "source": 3}
    assert load_one(tmp_path, row, "sft")[0] == {"messages": [u("hi"), a("B")], "kind": "k"}
    assert load_one(tmp_path, row, "sft", score="helpful")[0]["messages"][-1] == a("A")
    assert [x["score"] for x in load_one(tmp_path, row, "ranked", score="helpful")[0]["answers"]] == [2.0, 1.0, 0.0]
    with pytest.raises(UserError, match="'kind'.*numbers are under score, helpful"):
        files.load(put(tmp_path, [row]), "ranked", score="kind")
    rated = [{"response": x, "annotations": {"honesty": {"Rating": r}}} for x, r in (("A", "1"), ("B", "5"))]
    row = {"instruction": "q", "completions": rated}
    assert load_one(tmp_path, row, "sft", score="honesty")[0]["messages"][1] == a("B")
    tldr = {"info": {"title": "t"}, "summaries": [{"text": "A"}, {"text": "B"}], "choice": 1}
    assert load_one(tmp_path, tldr, "sft")[0]["messages"][1] == a("B")


def test_one_answer_can_be_imitated_but_not_compared(tmp_path):
    lone = {"prompt": "hi", "answers": [{"text": "yo", "score": 1}]}
    both = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    assert load_one(tmp_path, lone, "sft")[0]["messages"] == TALK
    rows, report = files.load(put(tmp_path, [lone, lone, both]), "ranked")  # no fault of the file's: it goes on
    assert len(rows) == 1 and report.dropped == {"fewer than two answers": (2, 1)}


def thumbs(labels, **more):
    return [{"prompt": f"q{i}", "completion": f"x{i}", "label": label, **more} for i, label in enumerate(labels)]


@pytest.mark.parametrize("good, bad", [(True, False), (1, 0), (1.0, 0.0), ("1", "0"), ("TRUE", "False"), (1, -1)])
def test_a_bad_answer_is_never_imitated(tmp_path, good, bad):
    rows = thumbs([good, bad, bad, bad])
    flat = [{"question": row["prompt"], "answer": row["completion"], "label": row["label"]} for row in rows]
    talks = [{"messages": [u(row["prompt"]), a(row["completion"])], "label": row["label"]} for row in rows]
    alpaca = [{"instruction": row["prompt"], "output": row["completion"], "kto_tag": row["label"]} for row in rows]
    for form in (rows, flat, talks, alpaca):
        kept, report = files.load(put(tmp_path, form), "sft")
        assert [row["messages"][-1] for row in kept] == [a("x0")]
        assert report.dropped == {"labelled as a bad answer": (3, 2)} and report.used == 1
        assert len(files.load(put(tmp_path, form), "prompts")[0]) == 4  # it may still be asked
    with pytest.raises(UserError, match="holds SFT.*needs several answers"):
        files.load(put(tmp_path, rows), "ranked")
    with pytest.raises(UserError, match="none of its 3 rows can be used; most often: labelled as a bad answer.*rename"):
        files.load(put(tmp_path, rows[1:]), "sft")


def test_a_label_with_other_values_is_a_class_and_no_verdict(tmp_path):
    for labels in ([0, 1, 2, 3] * 5, ["spam", "no", "0", "1"] * 5, [0.0, 0.5, 1.0, 1.5] * 5):
        rows, report = files.load(put(tmp_path, thumbs(labels)), "sft")
        assert [row["messages"][1]["content"] for row in rows] == [f"x{i}" for i in range(20)]
        assert report.dropped == {} and "20 kept (prompt/completion)" in str(report)
        assert "look: a label is taken for a class of something, not for a bad answer (5 rows, first" in str(report)


def test_false_is_a_verdict_beside_any_labels(tmp_path):
    kept, report = files.load(put(tmp_path, thumbs([True, "greeting", "greeting", False])), "sft")
    assert len(kept) == 3 and report.dropped == {"labelled as a bad answer": (1, 4)}


def test_one_odd_label_does_not_make_a_class_of_the_others(tmp_path):
    rows = thumbs([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 2]) + [{"prompt": "hi", "completion": "yo"}] + thumbs([None])
    kept, report = files.load(put(tmp_path, rows), "sft")
    assert report.dropped == {"labelled as a bad answer": (5, 2), "a label that is no verdict": (1, 13)}
    assert report.shapes == {"prompt/completion, judged": 7, "prompt/completion": 2} and len(kept) == 9


SEED_TASK = {"id": "1", "instruction": "greet", "instances": [{"input": "Ann", "output": "hi Ann"},
                                                              {"input": "", "output": "hi"}]}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_a_task_with_instances_gives_a_row_each(tmp_path, name):
    talks = [[u("greet\n\nAnn"), a("hi Ann")], [u("greet"), a("hi")]]
    path = put(tmp_path, [SEED_TASK], name)
    if name == "x.csv":
        cell = json.dumps(SEED_TASK["instances"]).replace('"', '""')
        path.write_text(f'instruction,instances\ngreet,"{cell}"\n')
    rows, report = files.load(path, "sft")
    assert rows == [{"messages": talk} for talk in talks]
    assert (report.read, report.used, report.kept) == (1, 1, 2) and report.notes == {}
    assert [row["prompt"] for row in files.load(path, "prompts")[0]] == [talk[:1] for talk in talks]
    for broken in ([], "x", [3], [{"output": ""}]):
        assert files.load(put(tmp_path, [SEED_TASK, SEED_TASK | {"instances": broken}]), "sft")[1].used == 1
    assert list(files.stream(put(tmp_path, [SEED_TASK]), lambda raw: rows_of(raw, ("sft",)), ""))[0][1] == rows


def notes_on(tmp_path, row, want="sft"):
    """What the report says of a file in which only the second of three rows is `row`."""
    report = files.load(put(tmp_path, [GOOD[0], row, GOOD[0]] if want == "sft" else [row]), want)[1]
    assert report.read == report.kept
    return [line.strip() for line in str(report).split("\n")[1:]]


def test_the_report_says_which_text_was_not_used(tmp_path):
    row = {"question": "hi", "answer": "yo", "id": "1-2", "claims": ["It is so.", "It is."], "n": 3, "source": "a b",
           "note": {"by": "a friend"}, "lang": "en", "label": 1, "input": "", "again": " hi", "empty": " ", "nul": None}
    assert notes_on(tmp_path, row) == [f"look: text under {key!r} is not used (1 row, first: row 2)"
                                       for key in ("claims", "note")]
    row = {"prompt": "hi", "chosen": "yo", "rejected": "oh no", "input": "hi", "text": "a title"}
    assert notes_on(tmp_path, row, "prompts") == ["look: text under 'text' is not used (1 row, first: row 1)"]
    row = {"instruction": "hi", "instances": [{"input": "x", "output": "yo"}], "system": "be kind", "other": ["h i"]}
    assert notes_on(tmp_path, row) == ["look: text under 'other' is not used (1 row, first: row 2)"]
    assert notes_on(tmp_path, {"title": "of a page", "text": "yo"}, "text") == [
        "look: text under 'title' is not used (1 row, first: row 1)"]


def test_the_report_warns_of_placeholders_and_end_marks(tmp_path):
    row = {"instruction": "hi", "output": "I am {{ name }} by {{author}}."}
    assert notes_on(tmp_path, row) == ["look: a placeholder that nobody filled in (1 row, first: row 2, {{ name }})"]
    for mark in ("</s>", "<|im_end|>", "<|endoftext|>", "###eos_token###"):
        row = {"prompt": "hi", "completion": f"yo{mark} so"}
        assert notes_on(tmp_path, row) == [f"look: an end mark inside a text (1 row, first: row 2, {mark})"]
        row = {"prompt": "hi", "completion": f"yo{mark}"}
        taken = "look: an end mark behind an answer is taken off (1 row, first: row"
        assert notes_on(tmp_path, row) == [f"{taken} 2, {mark})"]
    row = {"prompt": "hi", "chosen": "yo</s>", "rejected": "no</s>"}
    assert files.load(put(tmp_path, [row]), "ranked")[0] == [pair([u("hi")], "yo", "no")]
    assert notes_on(tmp_path, row, "ranked") == [f"{taken} 1, </s>)"]
    text = {"text": "one<|endoftext|>two<|endoftext|>"}  # plain text is kept to the letter
    assert load_one(tmp_path, text, "text")[0] == text
    assert notes_on(tmp_path, text, "text") == [
        "look: an end mark inside a text (1 row, first: row 1, <|endoftext|>)"]
    assert notes_on(tmp_path, {"prompt": "A < B > C ## D", "completion": "{a: {b: {}}}"}) == []
    talk = {"messages": [u("hi"), a("yo") | {"weight": 0.5}]}
    assert notes_on(tmp_path, talk) == ["look: a weight other than 0 and 1 counts as 1 (1 row, first: row 2, 0.5)"]


def node(name, role, text, rank=None, replies=(), **more):
    return {"message_id": name, "role": role, "text": text, "rank": rank, "replies": list(replies), **more}


TREE = {"message_tree_id": "r", "prompt": node("r", "prompter", "q", replies=[
    node("x", "assistant", "worse", 1, [node("y", "prompter", "why", replies=[node("z", "assistant", "so", 0)])]),
    node("v", "assistant", "gone", 0, deleted=True),
    node("w", "assistant", "best", 0, [node("t", "prompter", "thanks", replies=[
        node("n", "assistant", "np", 2), node("m", "assistant", "welcome", 1, [node("b", "prompter", "bye")]),
        node("k", "assistant", "ok", None)])])])}
TREE_RANKED = [
    {"prompt": [u("q")], "answers": [{"text": "worse", "score": -1.0}, {"text": "best", "score": 0.0}]},
    {"prompt": [u("q"), a("best"), u("thanks")], "answers": [{"text": "np", "score": -2.0},
                                                             {"text": "welcome", "score": -1.0}]}]


def flattened(root, parent=None):
    yield {**{k: v for k, v in root.items() if k != "replies"}, "parent_id": parent}
    for reply in root["replies"]:
        yield from flattened(reply, root["message_id"])


@pytest.mark.parametrize("flat", [False, True])
def test_oasst_trees_and_flat_rows_agree(tmp_path, flat):
    rows = list(flattened(TREE["prompt"])) if flat else [TREE]
    path = put(tmp_path, rows)
    ranked, report = files.load(path, "ranked")
    assert ranked == TREE_RANKED
    assert (report.read, report.used, report.kept) == ((11, 11, 2) if flat else (1, 1, 2))
    assert files.load(path, "sft")[0] == [{"messages": [u("q"), a("best"), u("thanks"), a("welcome")]}]
    prompts = [row["prompt"][-1]["content"] for row in files.load(path, "prompts")[0]]
    assert prompts == ["q", "why", "thanks", "bye"]


def test_flat_rows_in_any_order_orphans_and_circles(tmp_path):
    rows = list(flattened(TREE["prompt"]))
    lost = [node("l", "assistant", "lost", 0, parent_id="nobody"), node("c", "prompter", "c", parent_id="d"),
            node("d", "assistant", "d", 0, parent_id="c"), node("r", "prompter", "again")]
    ranked, report = files.load(put(tmp_path, rows[::-1] + lost), "ranked")
    assert sorted(row["prompt"][-1]["content"] for row in ranked) == ["q", "thanks"]
    assert report.dropped == {"hangs on a message that is not there": (3, 12), "message_id seen before": (1, 15)}


def test_merge_system(tmp_path):
    row = {"messages": [s("be kind"), u("hi"), a("yo")]}
    assert load_one(tmp_path, row, "sft", merge_system=True)[0]["messages"] == [u("be kind\n\nhi"), a("yo")]
    row = {"prompt": [s("be kind"), u("hi")], "chosen": "yo", "rejected": "no"}
    for want in ("ranked", "prompts"):
        assert load_one(tmp_path, row, want, merge_system=True)[0]["prompt"] == [u("be kind\n\nhi")]


BAD = [
    ("not valid JSON", '{"prompt": "hi", "completion": "y'),
    ("NUL byte", {"prompt": "h\0i", "completion": "yo"}),
    ("NUL byte", '{"prompt": "h\0i"}'),
    ("not UTF-8, or half of a surrogate pair", {"prompt": "hi", "completion": "\ud83d"}),
    ("not UTF-8, or half of a surrogate pair", {"prompt": "hi", "completion": "yo", "kind": "\ud83d"}),
    ("not an object with keys", "[1, 2]"),
    ("unknown keys", {"foo": 1}),
    ("empty answer", {"prompt": "hi", "completion": " \n"}),
    ("empty answer", {"prompt": "hi", "completion": "</s>"}),
    ("history is not a list of pairs", {"prompt": "hi", "completion": "yo", "history": "more"}),
    ("input is not text", {"instruction": "hi", "input": 3, "output": "yo"}),
    ("empty message", {"prompt": "", "completion": "yo"}),
    ("a message is not text", {"messages": [u(3), a("yo")]}),
    ("a message is not text", {"messages": [u([{"type": "image_url"}]), a("yo")]}),
    ("unknown role", {"messages": [u("hi"), {"role": "wizard", "content": "yo"}]}),
    ("unknown role", {"messages": [u("hi"), {"role": ["user"], "content": "yo"}]}),
    ("a tool's turn", {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "f()"}]}),
    ("does not begin with the user", {"messages": [a("yo"), u("hi"), a("yo")]}),
    ("does not end with the assistant", {"messages": TWO}),
    ("a system turn in the middle", {"messages": TALK + [s("be kind"), u("hi"), a("yo")]}),
    ("loss_weight is no number from 0", {"messages": [u("hi"), a("yo") | {"loss_weight": "x"}]}),
    ("weight is no number from 0", {"messages": [u("hi"), a("yo") | {"weight": -1}]}),
    ("no answer to learn from: all have weight 0", {"messages": [u("hi"), a("yo") | {"weight": 0}]}),
    ("assistant's turns to be joined have different weights",
     {"messages": [u("hi"), a("yo") | {"loss_weight": 0}, a("yo") | {"loss_weight": 1}]}),
    ("chosen and rejected without a prompt", {"chosen": "yo", "rejected": "no"}),
    ("chosen and rejected differ before their last answer",
     {"chosen": HH + " yo", "rejected": "\n\nHuman: x\n\nAssistant: y"}),
    ("empty answer", {"chosen": HH, "rejected": HH + " no"}),
    ("no number under 'score' in an answer", {"prompt": "q", "answers": [{"text": "x", "score": True}]}),
    ("no number under 'score' in an answer", {"prompt": "q", "answers": [{"text": "x", "score": float("nan")}]}),
    ("answers is not a list of answers with scores", {"prompt": "q", "answers": ["x", "y"]}),
]


@pytest.mark.parametrize("reason, row", BAD)
def test_bad_rows_are_dropped_and_counted_with_the_first_line(tmp_path, reason, row):
    good = {"messages": TALK}
    rows, report = files.load(put(tmp_path, [good, "", good, row, good, row]), "sft")
    assert [x["messages"] for x in rows] == [TALK] * 3
    assert (report.read, report.kept, report.dropped) == (5, 3, {reason: (2, 4)})  # a blank line is no row
    assert f"5 rows read, 3 kept (messages); dropped 2: {reason} (first: row 4)" in str(report)


def test_more_than_half_bad_stops_and_half_does_not(tmp_path):
    good, bad = {"messages": TALK}, {"messages": [u("hi"), a("")]}
    assert files.load(put(tmp_path, [good, bad]), "sft")[1].kept == 1
    with pytest.raises(UserError, match=r"x.jsonl: 2 of its 3 rows are bad; most often: empty answer \(2, first: row"):
        files.load(put(tmp_path, [good, bad, bad]), "sft")
    with pytest.raises(UserError, match=r"none of its 1 row.*unknown keys .*row 1: its keys are foo, bar\); rename"):
        files.load(put(tmp_path, [{"foo": 1, "bar": 2}]), "sft")


@pytest.mark.parametrize("want, row, advice", [
    ("sft", {"q": "hi", "a": "yo"}, "its keys are q, a: rename q, a to question, answer"),
    ("sft", {"Question": "hi", "ANSWER ": "yo", "id": 3}, "rename Question, ANSWER  to question, answer"),
    ("sft", {"promt": "hi", "completion": "yo"}, "rename promt to prompt"),
    ("text", {"Content": "hi"}, "rename Content to text"),
    ("ranked", {"prompt_": "hi", "accepted": "yo", "rejected": "no"}, "rename prompt_, accepted to prompt, chosen")])
def test_unknown_keys_come_with_the_names_to_give_them(tmp_path, want, row, advice):
    with pytest.raises(UserError) as error:
        files.load(put(tmp_path, [row]), want)
    assert advice in str(error.value) and "one of the shapes" not in str(error.value)
    names = dict(zip(*[part.split(", ") for part in str(error.value).partition(": rename ")[2].rstrip("). ").split(" to ")]))
    assert files.load(put(tmp_path, [{names.get(key, key): value for key, value in row.items()}]), want)[0]  # it can be followed


def test_a_short_text_still_trains_and_blank_lines_are_said_to_separate(tmp_path):
    path, said = tmp_path / "x.txt", []
    path.write_text("\n".join(f"word{i} and" for i in range(20)))
    rows, report = files.load(path, "text")
    assert str(report) == "x.txt: 1 document read, 1 kept (text)"
    [train], [held] = files.hold_out_text(rows, say=said.append)
    assert train["text"] + held["text"] == path.read_text() and len(held["text"].split()) == 4 and "last 4 of 40 words" in said[0]
    path.write_text("one two\n\nthree four\n")
    rows, report = files.load(path, "text")
    assert "2 documents read (blank lines separate them), 2 kept" in str(report)
    assert [len(part) for part in files.hold_out_text(rows)] == [1, 1]
    with pytest.raises(UserError, match="one word is too short"):
        files.hold_out_text([{"text": "word"}])


def test_a_file_of_which_hardly_anything_fits_stops(tmp_path):
    files.enough(10, 100, 129, "x")
    with pytest.raises(UserError, match="^only 3 of 151 conversations fit 129 tokens: --init with more.$"):
        files.enough(3, 151, 129, "--init with more")


def test_several_reasons_stand_below_each_other(tmp_path):
    rows = [{"messages": TALK}] * 1000 + [{"prompt": "hi", "completion": "yo"}, {"foo": 1}, "{", "{"]
    lines = str(files.load(put(tmp_path, rows), "sft")[1]).split("\n")
    assert lines == ["x.jsonl: 1,004 rows read, 1,001 kept (messages 1,000, prompt/completion 1); dropped 3:",
                     "          2  not valid JSON (first: row 1,003)", "          1  unknown keys (first: row 1,002)"]


@pytest.mark.parametrize("row, want, said", [
    ({"messages": TALK}, "ranked", r"holds SFT conversations \(messages\); training on preferences needs several"),
    ({"text": "once"}, "sft", r"holds plain text \(text\); supervised fine-tuning needs"),
    ({"prompt": "hi"}, "sft", r"holds prompts without answers \(prompt\)"),
    ({"prompt": "hi", "completion": "yo"}, "text", r"holds SFT conversations \(prompt/completion\); pretraining needs"),
])
def test_a_form_that_cannot_be_made_is_one_sentence(tmp_path, row, want, said):
    with pytest.raises(UserError, match=said):
        files.load(put(tmp_path, [row]), want)


GOOD = [{"prompt": "hi", "completion": "yö"}, {"prompt": "more", "completion": "end"}]
GOOD_SFT = [{"messages": [u("hi"), a("yö")]}, {"messages": [u("more"), a("end")]}]
PAGE = {"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": row} for i, row in enumerate(GOOD)]}


@pytest.mark.parametrize("name, text", [
    ("x.jsonl", "\n".join(map(json.dumps, GOOD))),
    ("x.JSONL", "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in GOOD)),
    ("x.json", "\n".join(map(json.dumps, GOOD))),
    ("x.json", json.dumps(GOOD)),
    ("x.json", json.dumps(GOOD, indent=1)),
    ("x.jsonl", json.dumps(GOOD, indent=1)),
    ("x.json", json.dumps({"data": GOOD})),
    ("x.json", json.dumps({"version": "1", "train": GOOD}, indent=2)),
    ("x.json", json.dumps(PAGE)),
    ("x.csv", "Prompt,Completion\nhi,yö\nmore,end\n"),
    ("x.csv", 'id;prompt;completion\r\n1;"hi";yö\r\n2;more;end\r\n'),
    ("x.tsv", "prompt\tcompletion\nhi\työ\nmore\tend"),
    ("x.csv", "messages\n" + "\n".join('"' + json.dumps(row["messages"]).replace('"', '""') + '"' for row in GOOD_SFT)),
])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
def test_endings(tmp_path, name, text, bom, packed):
    path = tmp_path / (name + ".gz" * packed)
    content = (bom + text).encode("utf-8")
    path.write_bytes(gzip.compress(content) if packed else content)
    rows, report = files.load(path, "sft")
    assert rows == GOOD_SFT and report.read == report.kept == 2 and report.dropped == {}


def test_one_object_is_one_row(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    for row in (sharegpt, {"messages": TALK}):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(row, indent=2))
        assert files.load(path, "sft")[0] == [{"messages": TALK}]


def test_txt_documents(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeff\n\none\r\n  two\n \t\n\nthree".encode())
    rows, report = files.load(path, "text")
    assert rows == [{"text": "one\n  two"}, {"text": "three"}] and report.read == 2


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet
    rows = [{"messages": row["messages"], "system": None} for row in GOOD_SFT]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert files.load(tmp_path / "x.parquet", "sft")[0] == GOOD_SFT


def test_csv_rows_of_the_wrong_width_and_line_breaks_in_cells(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('prompt,completion\nhi,yo\nonly\n"two\n  lines",end\na,b,c\nhi,yo\n')
    rows, report = files.load(path, "sft")
    assert [row["messages"][0]["content"] for row in rows] == ["hi", "two\n  lines", "hi"]
    assert report.dropped == {"wrong number of columns": (2, 2)}


def pairs_in(tmp_path, name, text):
    """A CSV's rows as (question, answer), and the report."""
    path = tmp_path / name
    path.write_bytes(text.encode())
    rows, report = files.load(path, "sft")
    assert report.read == report.used + sum(count for count, _ in report.dropped.values())
    return [tuple(message["content"] for message in row["messages"]) for row in rows], report


def test_an_unquoted_tsv_keeps_its_quotes(tmp_path):
    cells = [("a", "b"), ('"Yes," he said.', "ok"), ("c", 'd "e"'), ('"open', "f"), ("g", '"h'), ('"i"', "j")]
    text = "\r\n".join(map("\t".join, [("prompt", "completion"), *cells]))
    rows, report = pairs_in(tmp_path, "x.tsv", text)
    assert rows == cells and (report.read, report.dropped) == (6, {})
    assert pairs_in(tmp_path, "y.csv", text)[0] == cells  # commas and tabs are seen in the header
    assert pairs_in(tmp_path, "x.csv", text.replace("\t", ";"))[0] == cells


def test_a_quoted_tsv_is_one(tmp_path):
    text = '"prompt"\t"completion"\n"a\tb"\t"c\n""d"""\n\n"e"\t"f\n\n\tg"\nh\t5"\n'
    rows = [("a\tb", 'c\n"d"'), ("e", "f\n\n\tg"), ("h", '5"')]
    assert pairs_in(tmp_path, "x.tsv", text)[0] == rows
    commas = [tuple(cell.replace("\t", ",") for cell in row) for row in rows]
    assert pairs_in(tmp_path, "x.csv", text.replace("\t", ","))[0] == commas
    assert pairs_in(tmp_path, "x.csv", text.replace("\n", "\r\n").replace("\t", ","))[1].dropped == {}


def test_a_quote_that_does_not_close_swallows_nothing_unsaid(tmp_path):
    good = [(f"a, {i}", f'b "{i}"') for i in range(20)]
    lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in good]
    for place in (0, 7, 20):  # a stray quote costs its own line, wherever the next quote stands
        text = "\n".join(["prompt,completion", *lines[:place], '"stray,x', "u,v", "w,x", *lines[place:]])
        rows, report = pairs_in(tmp_path, "x.csv", text)
        assert rows == good[:place] + [("u", "v"), ("w", "x")] + good[place:]
        assert report.read == 23 and report.dropped == {"not valid CSV": (1, place + 1)}
    text = "\n".join(["prompt,completion", *lines, '"a cell that', "never, ends", "here,x", "so"])
    rows, report = pairs_in(tmp_path, "x.csv", text)  # its lines are no rows
    assert rows == good and report.read == 24 and report.dropped == {"not valid CSV": (4, 21)}
    text = "\n".join(["prompt,completion", *lines, '"a" b,"c', 'd" e,"f"', *lines])
    assert pairs_in(tmp_path, "x.csv", text)[1].dropped == {"not valid CSV": (2, 21)}
    with pytest.raises(UserError, match="2 of its 3 rows are bad; most often: not valid CSV .2, first: row 2.*double"):
        pairs_in(tmp_path, "x.csv", 'prompt,completion\n"a, b","c"\n"d, d" d,"e"\n"f, f" f,"g"\n')


@pytest.mark.parametrize("name, comma, header", [("x.csv", ",", "{}"), ("x.tsv", "\t", '"{}"')])
def test_one_broken_line_does_not_put_quotes_around_all_others(tmp_path, name, comma, header):
    rows = [(f"a{i}", "b") for i in range(30 if header == "{}" else 3)]
    lines = [comma.join(map(header.format, ("prompt", "completion")))]
    lines += [comma.join(map('"{}"'.format, row)) for row in rows]
    got, report = pairs_in(tmp_path, name, "\n".join([*lines, f'"stray{comma}x']))
    assert got == rows and report.dropped == {"not valid CSV": (1, len(rows) + 1)}


def test_a_header_with_a_stray_quote_still_names_the_columns(tmp_path):
    rows, report = pairs_in(tmp_path, "x.csv", 'prompt,completion,"note\nhi,yo,\nmore,end,x\n')
    assert rows == [("hi", "yo"), ("more", "end")] and report.read == 2


def test_cells_hold_what_they_hold(tmp_path):
    text = "prompt,completion,label,weight,note\nhi,yo,1,0,\nmore,end,0,,\n ,x,1,,\nhi,there,,1,a b\n"
    rows, report = pairs_in(tmp_path, "x.csv", text)
    assert rows == [("hi", "yo"), ("hi", "there")]
    assert report.dropped == {"labelled as a bad answer": (1, 2), "empty message": (1, 3)}


def test_a_line_that_is_too_long_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LIMIT", 1000)
    rows = [{"prompt": "hi", "completion": "x" * n} for n in (5, 3000, 5)]
    rows, report = files.load(put(tmp_path, rows), "sft")
    assert len(rows) == 2 and report.dropped == {"line over 10 MB": (1, 2)}


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps(GOOD[0]).encode() + b"\n"
    path.write_bytes(good * 2 + b'{"prompt": "h\xe9", "completion": "yo"}')
    assert files.load(path, "sft")[1].dropped == {"not UTF-8, or half of a surrogate pair": (1, 3)}
    path.write_bytes(b'{"prompt": "h\xe9", "completion": "yo"}\n')
    with pytest.raises(UserError, match="save the file as UTF-8"):
        files.load(path, "sft")


@pytest.mark.parametrize("name, content, said", [
    ("x.jsonl", None, "does not exist"),
    ("x.jsonl", b"", "is empty"),
    ("x.json", b" \n\n", "is empty"),
    ("x.json", b"[]", "is empty"),
    ("x.csv", b"prompt,completion\n", "is empty"),
    ("x.jsonl.gz", gzip.compress(b""), "is empty"),
    ("x.jsonl.gz", b'{"prompt": "hi"}\n', "is not gzip: take .gz off"),
    ("x.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 99)[:-20], "cut short or damaged"),
    ("x.jsonl", gzip.compress(b"{}"), "is gzip-compressed: add .gz"),
    ("x.json", '{"prompt": "hi"}'.encode("utf-16"), "is UTF-16"),
    ("x.json", b'[{"prompt": "hi", "completion": "y', "not valid JSON .*line 1, column 33"),
    ("x.json", b"<!DOCTYPE html>\n<p>", "not valid JSON .*DOCTYPE"),
    ("x.json", b"[" * 100_000, "nested too deeply"),
    ("x.docx", b"hi", "ending .docx is unknown"),
    ("noending", b"hi", "is unknown"),
    ("x.parquet", b"PAR1nonsense", "parquet"),
])
def test_trouble_with_the_file_is_one_sentence(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        files.load(path, "sft")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_and_no_permission(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a directory"):
        files.load(tmp_path, "sft")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(files, "open_bytes", refuse)  # root may read everything, so chmod would prove nothing
    with pytest.raises(UserError, match="may not be read: change its permissions"):
        files.load(put(tmp_path, GOOD), "sft")


def test_hold_out_is_seeded_disjoint_and_keeps_the_order():
    rows, number = [{"text": str(i)} for i in range(1000)], lambda row: int(row["text"])
    train, held = files.hold_out(rows, 0.1, seed=3)
    assert len(held) == 100 and sorted(train + held, key=number) == rows
    assert all(part == sorted(part, key=number) for part in (train, held))
    assert files.hold_out(rows, 0.1, seed=3) == (train, held) != files.hold_out(rows, 0.1, seed=4)
    assert [number(row) for row in held[:4]] == [13, 15, 29, 31]  # the same in every process
    assert len(files.hold_out(rows, 0.9)[1]) == 500 and len(files.hold_out(rows[:3], 0.1)[1]) == 1
    assert files.hold_out(rows, 0, at_least=0) == (rows, [])
    with pytest.raises(UserError, match="^1 row is too few to hold 1 out"):
        files.hold_out(rows[:1])
    with pytest.raises(UserError, match="^3 rows are too few to hold 3 out"):
        files.hold_out(rows[:3], at_least=3)


@pytest.mark.parametrize("row", [
    lambda i: {"messages": [s("be kind"), u(f"q{i // 4}"), a(f"x{i}")]},
    lambda i: {"messages": [u(("Q%d ", "q%d\n")[i % 2] % (i // 4)), a("yo"), u(f"more{i}"), a("end")]},
    lambda i: {"prompt": [u(f"q{i // 4}")], "answers": [{"text": f"x{i}", "score": 1.0}, {"text": "no", "score": 0.0}]},
    lambda i: {"prompt": [s(f"{i}"), u(f"q{i // 4}")]},
    lambda i: {"text": f"q{i // 4}"}])
def test_rows_that_ask_the_same_are_held_out_together(row):
    rows, said = [row(i) | {"id": i} for i in range(80)], []
    for seed in range(9):
        train, held = files.hold_out(rows, seed=seed, say=said.append)
        ids = {r["id"] for r in held}
        assert len(held) == 8 and len(train) == 72 and ids == {4 * (i // 4) + k for i in ids for k in range(4)}
    assert said == ["80 of 80 rows share their question or text with others: 8 rows of 2 groups are held out"] * 9
    with pytest.raises(UserError, match="^all 4 rows share one question or text, so none can be held out.*add"):
        files.hold_out(rows[:4])


def test_a_large_group_stays_in_training_and_the_share_is_met_by_others():
    rows = [{"text": str(max(i, 900))} for i in range(1000)]  # 901 rows are the same
    said = []
    for seed in range(9):
        train, held = files.hold_out(rows, 0.05, seed=seed, say=said.append)
        assert len(held) == 50 and {row["text"] for row in held} < {str(i) for i in range(901, 1000)}
    assert said[0].startswith("901 of 1,000 rows share")
    train, held = files.hold_out([{"text": "a"}] * 50 + [{"text": "b"}] * 30)  # none fits: the smaller one, whole
    assert held == [{"text": "b"}] * 30 and train == [{"text": "a"}] * 50


def test_every_stage_holds_out_by_question_and_text(tmp_path):
    numbers, said, tok = [i // 10 for i in range(200)], [], get_tokenizer("tiny")
    path = put(tmp_path, [{"prompt": f"q{i}", "chosen": "yo", "rejected": "no"} for i in numbers])
    def asked(rows):
        return {message["content"] for row in rows for message in row.get("messages", row.get("prompt"))[:1]}
    for train, held, _ in (sft.load_data(sft.Config(data=str(path)), tok, 97, said.append),
                           load_ranked(reward.Config(data=str(path)), Island, said.append)):
        assert len(held) == 20 and len(asked(held)) == 2 and not asked(train) & asked(held)
        assert "200 of 200 rows share their question" in said[-1]
    path = put(tmp_path, [{"text": f"{i} trees"} for i in numbers])
    train, held = (set(tok.decode(ids.tolist()).split()) for ids in
                   pretrain.load_text(pretrain.Config(data=str(path)), tok))
    assert len(held) == 2 + 1 and train & held == {"trees"}


def test_holding_out_takes_time_in_proportion_to_the_rows():
    rows = [{"messages": [u(f"q{i % 70_000}"), a("yo")]} for i in range(100_000)]
    began = time.process_time()
    train, held = files.hold_out(rows)
    assert len(held) == 500 and len(train) == 99_500 and time.process_time() - began < 5


def damaged(rng, row):
    """A line of JSON with one to three random hurts: types swapped, keys lost, bytes changed, the end cut off."""
    row = json.loads(json.dumps(row))
    junk = [None, 3, 1e400, True, "", " ", "x", "\ud800", "\0", [], {}, [[]], [None], [{}], {"a": 1}, ["a", 1],
            [u("x")], [{"from": [], "value": {}}], {"text": ["a"], "score": ["b", 1]}, {"replies": 1},
            {"replies": [{}]}]
    for _ in range(rng.randint(1, 3)):
        place = row
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and rng.random() < 0.6:
                place = place[key]
                continue
            if isinstance(place, dict) and rng.random() < 0.3:
                place[rng.choice(["messages", "prompt", "role", "text", "answers", "system", "label"])] = place.pop(key)
            else:
                place[key] = copy.deepcopy(rng.choice(junk))
            break
    line = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        line[rng.randrange(len(line))] = rng.choice([0, 10, 34, 91, 123, 128, 255])
    return bytes(line[:rng.randrange(1, len(line))] if rng.random() < 0.1 else line)


@pytest.mark.parametrize("want", files.FORMS)
def test_fuzz_ends_in_counts_or_in_one_sentence(tmp_path, want):
    """10,000 damaged rows over the four forms, in small files (so that many end well) and of every shape."""
    rng = random.Random(1)
    seeds = [row for _, row, _ in SFT + RANKED + PROMPTS] + [TREE, {"text": "plain"}, SEED_TASK]
    seeds += flattened(TREE["prompt"])
    ended_well = 0
    for i in range(50):
        lines = [damaged(rng, rng.choice(seeds)) for _ in range(50)]
        sound = [{"text": "plain"}] if want == "text" else [row for _, row, _ in RANKED]
        lines += [json.dumps(rng.choice(sound)).encode() for _ in range(120)]
        rng.shuffle(lines)
        path = tmp_path / rng.choice(["x.jsonl", "x.json", "x.csv", "x.txt"][:2 + 2 * (i % 5 == 0)])
        path.write_bytes(b"\n".join(lines))
        try:
            rows, report = files.load(path, want, merge_system=i % 2 == 0)
        except UserError as error:
            assert str(path) in str(error)
            continue
        ended_well += 1
        assert report.used + sum(count for count, _ in report.dropped.values()) == report.read
        assert report.kept == len(rows) and sum(report.shapes.values()) == report.used and str(report)
        for row in rows:
            json.dumps(row, ensure_ascii=False).encode()
    assert ended_well > 20


@pytest.mark.parametrize("name, want, read, kept", [
    ("rasbt_instruction_1100.json", "sft", 1100, 1100), ("rasbt_preference_1100.json", "ranked", 1100, 1100),
    ("rasbt_preference_1100.json", "sft", 1100, 1100), ("oasst_en_100_tree.jsonl", "ranked", 100, 212),
    ("oasst_en_100_tree.jsonl", "sft", 100, 100), ("sharegpt_fixture_axolotl.json", "sft", 1, 1)])
def test_real_files(name, want, read, kept):
    if not (SHARED / name).exists():
        pytest.skip("../shared/data is not here")
    rows, report = files.load(SHARED / name, want)
    assert (report.read, report.kept, report.dropped, len(rows)) == (read, kept, {}, kept)
    if name.startswith("oasst") and want == "ranked":
        scores = [[answer["score"] for answer in row["answers"]] for row in rows]
        assert {len(s) for s in scores} == {2, 3, 4, 5, 6, 8, 9}
        assert sum(x != y for s in scores for i, x in enumerate(s) for y in s[:i]) == 754


@pytest.mark.parametrize("name, kept, dropped, looks", [
    ("arc_challenge_pairs.jsonl", 10, {"labelled as a bad answer": (10, 2)}, []),
    ("dolly.jsonl", 15, {}, ["an end mark behind an answer is taken off"]),
    ("oa_questions.jsonl", 20, {}, ["text under 'text' is not used"]),
    ("seed_tasks.jsonl", 15, {}, []),
    ("eli5_thinkcite.json", 10, {}, ["text under 'claims' is not used"]),
    ("identity.json", 8, {}, ["a placeholder that nobody filled in"])])
def test_real_rows_of_every_shape(name, kept, dropped, looks):
    path = SHARED / "shapes" / name
    if not path.exists():
        pytest.skip("../shared/data/shapes is not here")
    rows, report = files.load(path, "sft")
    assert (len(rows), report.dropped, list(report.notes)) == (kept, dropped, looks)
    said = [message["content"] for row in rows for message in row["messages"]]
    assert not any(mark in text for text in said for mark in ("### ", "###eos", "Below is an instruction"))
    if name == "seed_tasks.jsonl":
        raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(task["instances"][0]["input"] in row["messages"][0]["content"] for task, row in zip(raw, rows))


# ---- what is too large, or no file -----------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "txt"])
@pytest.mark.parametrize("filler", ["\0", " ", "x"])
def test_a_bomb_ends_in_one_sentence_and_never_fills_the_memory(tmp_path, monkeypatch, ending, filler):
    monkeypatch.setattr(files, "LIMIT", 10_000), monkeypatch.setattr(cells, "LIMIT", 10_000)
    monkeypatch.setattr(files, "free_memory", lambda: 8 * 10_000)
    path = tmp_path / f"rows.{ending}.gz"
    with gzip.open(path, "wb") as packed:
        for _ in range(300):
            packed.write(filler.encode() * 100_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="NUL|10 MB|unpacked|is empty"):
        files.load(path, "text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6, f"{peak:,} bytes of 30,000,000"


@pytest.mark.parametrize("quoted", [False, True])
def test_a_long_line_of_a_table_costs_that_row(tmp_path, monkeypatch, quoted):
    monkeypatch.setattr(cells, "LIMIT", 1000)
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "".join(f'"q{i}",{"x" * 5000 if i == 2 else "yes"}\n' if quoted else
                                                     f'q{i},{"x" * 5000 if i == 2 else "yes"}\n' for i in range(5)))
    rows, report = files.load(path, "sft")
    assert [row["messages"][0]["content"] for row in rows] == ["q0", "q1", "q3", "q4"]
    assert report.dropped == {"line over 10 MB": (1, 3)}


def test_a_header_that_cannot_be_read_is_one_sentence(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"prompt"x,"completion\na,b\n')
    with pytest.raises(UserError, match="rows.csv"):
        files.load(path, "sft")


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    os.symlink("/dev/zero", tmp_path / "zero.jsonl")
    for name in ("rows.jsonl", "zero.jsonl"):
        with pytest.raises(UserError, match="is a pipe or a device"):
            files.load(tmp_path / name, "sft")


def test_a_report_commands_no_terminal(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "y", "\x1b[2J": 1}) + "\n" for i in range(4)))
    assert "\x1b" not in str(files.load(path, "sft")[1])
