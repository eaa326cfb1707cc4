"""Procedural questioning: what counts as known, and which rows come out of it."""
import json

import pytest
import torch

from evals import unknowns
from data import files
from island.world import Island
from island.words import UNKNOWN
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.flags import parse
from model import GPT, GPTConfig
from trainer import Run

RUN = Run(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("question, reference, answer, right", [
    ("What is the capital of France?", "Paris", "It is Paris.", True),
    ("What is the capital of France?", "The capital of France is Paris.", "paris", True),
    ("What is the capital of France?", "The capital of France is Paris.", "The capital of France is Rome.", False),
    ("Who found radium?", "Marie Curie", "Pierre Curie did.", False),
    ("Who found radium?", "Marie Curie", "Curie, Marie", True),
    ("What is 2 + 2?", "4", "The answer is 4.", True),
    ("What is 2 + 2?", "4", "The answer is 44.", False),
    ("What is 2 + 2?", "2 + 2 is 4", "2 + 2 is 5", False),
    ("How high is it?", "1,000 metres", "1000 metres", True),
    ("How high is it?", "About 1000 metres above the wide sea", "About 10 metres above the wide sea", False),
    ("Which is bigger, 9.11 or 9.9?", "9.9", "9.11", False),
    ("Which is bigger, 9.11 or 9.9?", "9.9", "9.9", True),
    ("Is it late?", "No.", "No, it is not.", True),
    ("Is it late?", "No.", "Yes.", False),
    ("Is it you?", "It is.", "It is.", True),  # nothing but stop words: then these count
    ("What does Mabel eat?", "Mabel eats soup and bread with jam.", "Soup, bread, and jam", True),  # 3 of 4
    ("What does Mabel eat?", "Mabel eats soup and bread with jam.", "Soup and bread", False),  # 2 of 4
    ("What does Mabel eat?", "Soup", "soups", False),
    ("Wie heißt er?", "Jürgen", "JÜRGEN!", True),
    ("Hm?", "...", "anything", False),
    ("Hm?", "soup", "", False),
])
def test_matches(question, reference, answer, right):
    assert unknowns.matches(reference, answer, question) is right


@pytest.mark.parametrize("answer, admitted", [
    ("I am sorry, I do not know.", True), ("I don't know that.", True), ("I'm sorry, I don't believe I know.", False),
    ("I know.", False)])
def test_admits(answer, admitted):
    assert unknowns.admits(answer) is admitted
    assert unknowns.admits("I'm sorry, I don't believe I know!", "I'm sorry, I don't believe I know.")


@pytest.mark.parametrize("n_right, tries, known, kind", [
    (5, 5, 0.5, "known"), (3, 5, 0.5, "known"), (2, 5, 0.5, "unknown"), (0, 5, 0.5, "unknown"),
    (2, 4, 0.5, "known"), (1, 4, 0.5, "unknown"), (4, 5, 1.0, "unknown"), (1, 5, 0.2, "known")])
def test_wrong_in_most_tries_is_unknown(n_right, tries, known, kind):
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mabel."}]}
    made = unknowns.taught(row, n_right, tries, "No idea.", known)
    assert made["kind"] == kind and made["messages"][0] == row["messages"][0]
    assert made["messages"][-1] == {"role": "assistant", "content": "Mabel." if kind == "known" else "No idea."}
    assert row["messages"][-1]["content"] == "Mabel."  # the reference itself stays


def test_every_question_is_asked_as_often_as_it_should(monkeypatch):
    """A model that knows all about a, half about b, and nothing about c; batches end in the middle of a row's tries."""
    turn, seeds = {"a": 0, "b": 0, "c": 0}, []

    def ask(model, tok, conversations, run, max_new_tokens, temperature, seed):
        seeds.append(seed)
        answers = []
        for messages in conversations:
            assert [m["role"] for m in messages] == ["user"]  # the reference is not shown
            name = messages[0]["content"]
            turn[name] += 1
            answers.append("right" if name == "a" or name == "b" and turn[name] % 2 else "wrong")
        return answers

    monkeypatch.setattr(unknowns, "ask", ask)
    monkeypatch.setattr(unknowns, "AT_ONCE", 5)
    rows = [{"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "right"}]}
            for name in "cab"]
    answers, counts = unknowns.probe(None, None, rows, RUN, lambda row, answer: answer == "right", tries=4)
    assert counts == [0, 4, 2] and answers[0] == ["wrong"] * 4 and answers[2] == ["right", "wrong", "right", "wrong"]
    assert len(seeds) == len(set(seeds)) == 3  # or the second batch would repeat the first


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    tok = get_tokenizer("tiny")
    model = GPT(GPTConfig(block_size=64, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=32))
    folder = tmp_path / "model"
    folder.mkdir()
    model.save_pretrained(folder)
    tok.save(folder)
    return folder


def test_a_model_that_knows_nothing_learns_to_say_so(checkpoint, tmp_path, capsys):
    data = tmp_path / "qa.jsonl"
    rows = [{"question": f"Who is number {i}?", "answer": f"Person{'x' * i}"} for i in range(7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(checkpoint), "--data", str(data), "--tries", "2", "--max-new-tokens", "4", "--wording", "No idea."]
    unknowns.main(parse(unknowns.Config, argv=[*arguments, "--out", str(tmp_path / "a.jsonl")]))
    rows, _ = files.load(tmp_path / "a.jsonl", "sft")
    assert [row["messages"][0]["content"] for row in rows] == [f"Who is number {i}?" for i in range(7)]
    assert {(row["messages"][1]["content"], row["kind"]) for row in rows} == {("No idea.", "unknown")}
    said = capsys.readouterr().out
    assert "0 known" in said and "7 unknown" in said and "teaches to say it always" in said
    unknowns.main(parse(unknowns.Config, argv=[*arguments, "--out", str(tmp_path / "b.jsonl")]))
    assert capsys.readouterr().out.replace("b.jsonl", "a.jsonl") == said  # the same seed, the same answers


def test_the_island_asks_about_somebody_and_passes_the_rest_on():
    island = Island()
    rows, others, right = unknowns.load_questions(unknowns.Config([], n=400), print)
    assert len(rows) + len(others) == 400 and {row["kind"] for row in rows} == {"fact", "multi", "unknown"}
    assert {row["kind"] for row in others} == {"why", "unsafe", "safe", "identity", "system"}
    for row in rows:
        name = island.understand(row["messages"][:-1]).subject
        assert name not in island.parts["test"]["residents"] + island.parts["test"]["strangers"]  # kept for the exam
        assert right(row, row["messages"][-1]["content"]) and not right(row, "I am Pip.")
        assert right(row, UNKNOWN) == (row["kind"] == "unknown")


@pytest.mark.parametrize("change", [
    {"checkpoint": []}, {"checkpoint": ["a", "b"]}, {"tries": 0}, {"known": 0.0}, {"known": 1.1}, {"temperature": -1.0},
    {"wording": " "}, {"out": "idk.txt"}, {"n": -1}])
def test_impossible_settings(change):
    with pytest.raises(UserError):
        unknowns.checked(unknowns.Config(**{"checkpoint": ["out/sft"]} | change))


def test_a_model_that_has_never_seen_a_chat_can_be_asked(tmp_path, capsys):
    tok = get_tokenizer("tiny", "chat")
    size = tok.vocab_size - len(tok.new_ids)  # no row for a chat token
    GPT(GPTConfig(block_size=64, vocab_size=size, n_layer=1, n_head=2, n_embd=16)).save_pretrained(tmp_path / "bare")
    tok.save(tmp_path / "bare")
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}?", "completion": f"a{i}"}) + "\n" for i in range(4)))
    unknowns.main(unknowns.Config([str(tmp_path / "bare")], data=str(tmp_path / "qa.jsonl"), out=str(tmp_path / "idk.jsonl"), tries=1,
                                  max_new_tokens=4, device="cpu"))
    assert "4 questions" in capsys.readouterr().out and len((tmp_path / "idk.jsonl").read_text().splitlines()) == 4
