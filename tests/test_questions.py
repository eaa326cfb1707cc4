"""What a checkpoint was asked: three questions to try, a warning where a new one is far from them, and coloured tokens."""
import json
import math
import re

import pytest

import chat
from data.questions import Questions, asked_in
from island import exam
from island.world import Island, says
from tests.test_chat import RUN, TOK, config, folders, scripted, tiny  # noqa: F401  folders is a fixture


@pytest.fixture(scope="module")
def questions():
    island = Island()
    return Questions.of(island.conversations(1500), exam.questions(island), TOK, "1,500 conversations about the island")


def test_the_distance_is_the_formula():
    pairs = {(-1, 5): 2, (5, 6): 1, (5, 7): 1}  # of ids: "56" and "57"
    found = Questions(pairs, size=10)
    tok = type("Tok", (), {"encode": staticmethod(lambda text: [5, 6])})
    first = 0.9 * 2 / 2 + 0.1 * (2 + 0.5) / (4 + 5)  # N is 4 tokens, V is 10
    second = 0.9 * 1 / 2 + 0.1 * (1 + 0.5) / (4 + 5)
    assert found.distance(tok, "56") == pytest.approx(-(math.log(first) + math.log(second)) / 2)
    never = type("Tok", (), {"encode": staticmethod(lambda text: [9])})
    assert found.distance(never, "?") == pytest.approx(-math.log(0.1 * 0.5 / 9))


def test_what_was_held_out_is_near_and_what_nobody_asked_is_far(questions):
    near = asked_in(Island().conversations(300, seed=11, split="test"))
    assert len(near) > 100 and sum(questions.is_far(TOK, text) for text in near) <= 0.05 * len(near)
    strange = ["What is the capital of France?", "Write a Python function that sorts a list.", "Translate good morning into German.",
               "Tell me a joke about cats.", "Who won the world cup in 1998?"]
    assert all(questions.is_far(TOK, text) for text in strange)
    assert len(questions.try_) == 3 == len(set(questions.try_)) and not any(questions.is_far(TOK, text) for text in questions.try_)


def test_what_is_saved_is_what_was_counted_and_damage_is_no_error(questions, tmp_path):
    questions.save(tmp_path)
    again = Questions.load(tmp_path)
    assert vars(again) == vars(questions)
    for damaged in ("", "{}", "[]", json.dumps({"pairs": [[1]], "size": 1, "about": "", "try": [], "far": 1})):
        (tmp_path / "questions.json").write_text(damaged)
        assert Questions.load(tmp_path) is None
    assert Questions.load(tmp_path / "nowhere") is None


def test_a_chat_begins_with_what_it_knows_and_warns_of_what_it_does_not(folders, questions, monkeypatch, capsys):  # noqa: F811
    me = chat.Speaker(folders["sft"], config(), RUN)
    me.introduce()
    assert capsys.readouterr().err == ""  # a checkpoint that nobody counted for
    me.questions = questions
    me.introduce()
    told = capsys.readouterr().err
    assert "learned from 1,500 conversations about the island; try" in told and told.count("\n   ") == 3
    scripted(monkeypatch, *["x"] * 4)
    for question, far in ((questions.try_[0], False), ("What is the capital of France?", True)):
        me.reply([says("user", question)], 0, lambda text: None, False)
        assert ("far from anything" in capsys.readouterr().err) is far


def test_the_prompt_says_how_full_the_context_is(folders, monkeypatch):  # noqa: F811
    me = chat.Speaker(folders["sft"], config(), RUN)
    talk = chat.Chat([me], config(), RUN, True)
    assert talk.prompt() == "> "
    scripted(monkeypatch, "carrot cake")
    talk.hear("What does Mabel eat?")
    used = len(TOK.render([says("user", "What does Mabel eat?"), says("assistant", "carrot cake")])[0])
    assert talk.prompt() == f"[{used} of 96 tokens] > "
    talk.hear("/reset")
    assert talk.prompt() == "> "


def test_tokens_are_coloured_by_mask_and_probability(folders, monkeypatch, capsys):  # noqa: F811
    import torch
    me = chat.Speaker(folders["sft"], config(tokens=True), RUN)
    ids, new = TOK.render_prompt([says("user", "Who?")]), [*TOK.encode(" Mabel eats"), TOK.end]
    shown = me.coloured(ids, new).split("\n")[0]
    pieces = re.findall(r"\033\[(\d+)m(.*?)\033\[0m", shown)
    assert "".join(text for _, text in pieces) == "".join(TOK.piece(i) for i in ids + new)
    logps = me.model(torch.tensor([ids + new]))[0].log_softmax(-1)
    for i, (color, _) in enumerate(pieces):
        p = logps[i - 1, (ids + new)[i]].exp().item() if i >= len(ids) else None
        assert int(color) == (90 if p is None else next(c for c, least in chat.COLORS.items() if p >= least))
    scripted(monkeypatch, "Mabel")
    me.reply([says("user", "Who?")], 0, lambda text: None, False)
    assert "\033[32mp \u2265 0.9" in capsys.readouterr().out
