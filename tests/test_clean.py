"""Golden cases for what is cleaned, both sides of every threshold, and the command on small files."""
import json
import sys
import time

import pytest

from data import clean
from data.readability import is_simple, readability
from data.tokenizer import get_tokenizer
from common.errors import UserError


def words(n):
    return " ".join(["word"] * n)


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


# ---- text -> text ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("a **bold** word", "a bold word"),
    ("*it* was __so__ _good_", "it was so good"),
    ("***both*** at once", "both at once"),
    ("**outer *inner* words**", "outer inner words"),
    ("*outer **inner** words*", "outer inner words"),
    ("~~gone~~ here", "gone here"),
    ("`code`, ``more`` and `2*3*4`", "code, more and 2*3*4"),
    ("```python\nx = a*b*c\n```\nend", "x = a*b*c\nend"),
    ("# Head\n## Lower ##\ntext", "Head\nLower\ntext"),
    ("# I like C#", "I like C#"),
    ("- one\n* two\n+ three\n\u2022 four", "one\ntwo\nthree\nfour"),
    ("1. one\n2. two", "1. one\n2. two"),
    ("above\n\n***\n\nbelow", "above\n\n\n\nbelow"),
    ("Head\n----\ntext", "Head\n\ntext"),
    ("[words](https://a.b/c)", "words"),
    ("[words](https://a.b/c_(d)) here", "words here"),
    ('[words](https://a.b "title")', "words"),
    ("![picture](https://a.b/c.png)", "picture"),
    ("so it is [[1]](https://a.b)", "so it is [1]"),
    ("so it is [\\[1\\]](https://a.b)", "so it is [1]"),
    ("[source](_url_0_)", "source"),
    ("no [link] (here)", "no [link] (here)"),
    (">!the butler!< did it", "the butler did it"),
    ("^small ^^smaller ^(small words)", "small smaller small words"),
    ("10^6 and x^2 and (a)^2", "10^6 and x^2 and (a)^2"),
    ("a|b\n:-|-:\n1|2\n3|4\n\nafter | it", "a b\n1 2\n3 4\n\nafter | it"),
    ("salt &amp; pepper &lt; 5 &amp;#x200B;&nbsp;g", "salt & pepper < 5  g"),
    ("zero\u200bwidth\ufeff", "zerowidth"),
    ("2*3*4 = 24", "2*3*4 = 24"),
    ("5 * 3 * 2", "5 * 3 * 2"),
    ("snake_case_name stays", "snake_case_name stays"),
    ("_url_0_ and _URL_12_ stay", "_url_0_ and _URL_12_ stay"),
    ("\\*no emphasis\\*", "*no emphasis*"),
    ("> a quote stays", "> a quote stays"),
    ("\u00a3 5 isn't much - or is it?", "\u00a3 5 isn't much - or is it?"),
])
def test_strip_markup(text, expected):
    assert clean.strip_markup(text) == expected


@pytest.mark.parametrize("text", ["[" * 20_000, "*" * 20_000, "_a" * 10_000, "|" * 20_000, "# " * 10_000, "(" * 20_000,
                                  "[a](" * 5_000, ">!" * 10_000, "^(" * 10_000, "\n" * 20_000, ". " * 10_000,
                                  "http://" + "(" * 20_000, "\\" * 20_000, "`" * 20_000, "- " * 10_000, "\n>" * 10_000])
def test_no_text_takes_forever(text):
    """A regular expression that backtracks quadratically needs minutes for a few of these."""
    start = time.process_time()
    for function in (clean.strip_markup, clean.strip_quotes, clean.strip_placeholders, clean.strip_space,
                     clean.ends_in_edit, clean.has_wiki_markup, clean.is_question):
        function(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text, expected", [
    ("> quoted\nanswer", "answer"),
    ("&gt; quoted\n  > more\nanswer", "answer"),
    ("answer\n> quoted", "answer\n"),
    ("a > b\n5 &gt; 4", "a > b\n5 &gt; 4"),
    (">!spoiler!<", ">!spoiler!<"),
])
def test_strip_quotes(text, expected):
    assert clean.strip_quotes(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("see _url_0_ here", "see here"),
    ("see _URL_12_.", "see."),
    ("glued_url_0_Then", "glued Then"),
    ("see (_url_1_) and [_url_2_]!", "see and!"),
    ("see https://a.b/c?d=e#f, then", "see, then"),
    ("at www.a.b/c_(d).", "at."),
    ("(https://a.b/c_(d))", ""),
    ("<http://a.b>", ""),
    ("call f() with []", "call f() with []"),
    ("call f() at _url_0_", "call f() at"),
    ("my_url_list and _url_x_", "my_url_list and _url_x_"),
])
def test_strip_placeholders(text, expected):
    assert clean.strip_placeholders(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("  a \t b\u00a0 c ", "a b c"),
    ("a\n\n\n \t\nb", "a\n\nb"),
    ("a\r\nb", "a\nb"),
    ("\n\na \n b\n", "a\nb"),
    (" \n ", ""),
])
def test_strip_space(text, expected):
    assert clean.strip_space(text) == expected
    assert clean.strip_space(expected) == expected


@pytest.mark.parametrize("lengths, kept", [
    ((300, 5), 1), ((299, 1, 5), 2), ((299, 200, 5), 2), ((100, 100, 100, 100), 3), ((10, 10), 2), ((400,), 1),
])
def test_first_paragraphs_stops_at_the_one_that_crosses(lengths, kept):
    text = "\n\n".join(words(n) for n in lengths)
    assert clean.first_paragraphs(text) == "\n\n".join(words(n) for n in lengths[:kept])


def test_first_paragraphs_reads_blank_lines_of_any_kind():
    assert clean.first_paragraphs("a\nb\n \t\n\nc\n\nd", words=3) == "a\nb\n\nc"
    assert clean.first_paragraphs("", words=3) == ""


# ---- tests -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, ok", [(19, False), (20, True)])
def test_enough_words(n, ok):
    assert clean.enough_words(words(n)) == ok


@pytest.mark.parametrize("n, ok", [(500, True), (501, False)])
def test_at_most_words(n, ok):
    assert clean.at_most_words(words(n)) == ok


@pytest.mark.parametrize("fre, fkg, ok", [(60.0, 8.99, True), (59.99, 8.99, False), (60.0, 9.0, False)])
def test_is_simple_keeps_60_and_drops_9(monkeypatch, fre, fkg, ok):
    monkeypatch.setattr("data.readability.readability", lambda text: (fre, fkg))
    assert is_simple("any") == ok


def test_is_simple_takes_its_thresholds():
    fre, fkg = readability("The little robot answers questions about the island.")
    assert is_simple("The little robot answers questions about the island.", least_fre=fre, below_fkg=fkg + 0.01)
    assert not is_simple("The little robot answers questions about the island.", least_fre=fre, below_fkg=fkg)
    assert not is_simple("The little robot answers questions about the island.", least_fre=fre + 0.01, below_fkg=99)


@pytest.mark.parametrize("title, body, ok", [
    ("How do magnets work", "", True),
    ("ELI5: why is the sky blue", "", True),
    ("[ELI5] What's a magnet", "", True),
    ("Isn't it odd", "", True),
    ("Magnets", "How do they work?", True),
    ("Magnets", "They attract iron.", False),
    ("Magnets?", "", True),
    ("Howard and his magnets", "", False),
    ("Look at this", "https://a.b/watch?v=1", False),
    ("Ask Anything Wednesday: what do you want to know?", "", False),
    ("MEGATHREAD: what is new?", "", False),
    ("[META] Why do we remove posts?", "", False),
    ("META: why do we remove posts?", "", False),
    ("How does Meta earn money?", "", True),
    ("Why is metabolism slow?", "", True),
])
def test_is_question(title, body, ok):
    assert clean.is_question(title, body) == ok


@pytest.mark.parametrize("text, found", [
    ("The answer.\n\nEdit: typos", True),
    ("The answer.\n\nEDIT 2: thanks for the gold!", True),
    ("The answer.\n\nedit2: sources", True),
    ("The answer.\nEdit - source", True),
    ("The answer. Edit: spelling", True),
    ("The answer. (Edit: spelling)", True),
    ("The answer.\n\n**EDIT:** spelling", True),
    ("The answer.\n\nEdited for spelling", True),
    ("The answer.\n\nEdit: one\nEdit 2: two", True),
    ("The answer.\n\nEdit", True),
    ("Edit: I was wrong.\n\nThis is the answer.", False),
    ("Open the menu and click on edit: it is there.", False),
    ("Editing: how it is done.", False),
    ("The editor said: no.", False),
    ("Edit the file.", False),
    ("Edit-wars are common.", False),
    ("He takes credit: all of it.", False),
    ("", False),
])
def test_ends_in_edit(text, found):
    assert clean.ends_in_edit(text) == found


@pytest.mark.parametrize("text, found", [
    ("[[File:Cat.jpg", True), ("{| class=wikitable", True), ("{{Infobox", True), ("a thumb|200px|cat", True),
    ("fact<ref name=a>", True), ("|- \n| cell", True), ("== History ==\ntext", True), ("right|250 px", False),
    ("<br /> line", True), ("__NOTOC__", True), ("|250px|a cat", True),
    ("Cats are animals (see below).", False), ("2 < 3 and 3 > 2", False), ("x = y = z", False), ("a [1] b", False),
    ("thumb rules", False), ("my_name_is", False),
])
def test_has_wiki_markup(text, found):
    assert clean.has_wiki_markup(text) == found


def test_fits_counts_what_the_template_adds():
    tok = get_tokenizer("tiny")
    messages = [u("Who are you?"), a("I am Pip.")]
    n = len(tok.render(messages)[0])
    assert clean.fits(messages, tok, most=n) and not clean.fits(messages, tok, most=n - 1)
    short = [u("a"), a("b")]
    at_512 = [u("a" + " a" * (512 - len(tok.render(short)[0]))), a("b")]
    assert len(tok.render(at_512)[0]) == 512 and clean.fits(at_512, tok)
    assert not clean.fits([u(at_512[0]["content"] + " a"), a("b")], tok)


def test_at_most_turns_counts_the_users_turns():
    system = {"role": "system", "content": "s"}
    two = [u("1"), a("1"), u("2"), a("2")]
    assert clean.at_most_turns(two) and clean.at_most_turns([system] + two)
    assert not clean.at_most_turns(two + [u("3"), a("3")])


@pytest.mark.parametrize("row, found", [
    ({"category": "math"}, True), ({"category": " Math "}, True), ({"primary_tag": "Coding & Debugging"}, True),
    ({"category": "mathematics"}, False), ({"category": None}, False), ({}, False)])
def test_in_category(row, found):
    assert clean.in_category(row, ("MATH", "coding & debugging")) == found


# ---- the command -----------------------------------------------------------------------------------------------------

GOOD = "The sun is up by day. It gives us light and it keeps us warm. At night it is dark and cold."
HARD = "Photosynthetic microorganisms characteristically accumulate polysaccharides intracellularly, " * 4


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["clean.py", *map(str, args)])
    clean.main()
    return capsys.readouterr().out


def put(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def counts(path):
    steps = json.loads(path.read_text(encoding="utf-8"))["sections"][""]
    return {name: (step["rows"], step["hit"]) for name, step in steps.items()}


def test_a_file_through_all_steps(tmp_path, monkeypatch, capsys):
    bad = {"prompt": "q", "completion": "> quoted\n**" + GOOD[:10] + "**" + GOOD[10:] + "  Edit: typos"}
    file = put(tmp_path / "mine.jsonl", [
        {"prompt": "q", "completion": "> quoted\n**The** " + GOOD[4:] + " _url_0_"},
        {"prompt": "q", "completion": "Too short."}, {"prompt": "q", "completion": words(501)},
        {"prompt": "q", "completion": "{{box}} " + GOOD}, bad, {"prompt": "q", "completion": HARD},
        {"prompt": "q", "completion": GOOD + " Shut up!"}, {"text": "  " + GOOD}, "{damaged"])
    printed = run(monkeypatch, capsys, file, "--out", tmp_path / "out" / "clean.jsonl", "--toxicity", "words")
    assert rows_in(tmp_path / "out" / "clean.jsonl") == [{"messages": [u("q"), a(GOOD)]}, {"text": GOOD}]
    assert counts(tmp_path / "out" / "clean.report.json") == {
        "not usable": (9, 1), "quotes": (8, 2), "Reddit mark-up": (8, 2), "URL placeholders": (8, 1),
        "white space": (8, 3), "too short": (8, 1), "too long": (7, 1), "wiki mark-up": (6, 1),
        "ends in an edit": (5, 1), "hard to read": (4, 1), "toxic": (3, 1)}
    assert "row 9: not valid JSON" in printed and "2 rows" in printed and "word" in printed.splitlines()[0]


def test_skip_leaves_a_step_out(tmp_path, monkeypatch, capsys):
    file = put(tmp_path / "mine.jsonl", [{"text": "Short."}, {"text": "*Short.*"}])
    skip = ("--skip", "too short", "Reddit mark-up", "hard to read")
    run(monkeypatch, capsys, file, "--out", tmp_path / "c.jsonl", *skip)
    assert rows_in(tmp_path / "c.jsonl") == [{"text": "Short."}, {"text": "*Short.*"}]
    assert "toxicity" not in run(monkeypatch, capsys, file, "--skip", "toxic")
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, file, "--skip", "too small")


def test_ranked_rows_need_two_answers_that_are_left(tmp_path, monkeypatch, capsys):
    answers = [{"text": "**The** " + GOOD[4:], "score": 3}, {"text": GOOD + " Good.", "score": 2},
               {"text": "No.", "score": 1}]
    file = put(tmp_path / "mine.jsonl", [{"prompt": "q", "answers": answers}, {"prompt": "q", "answers": answers[1:]}])
    run(monkeypatch, capsys, file, "--out", tmp_path / "c.jsonl")
    assert rows_in(tmp_path / "c.jsonl") == [{"prompt": [u("q")], "answers": [
        {"text": GOOD, "score": 3.0}, {"text": GOOD + " Good.", "score": 2.0}]}]
    assert counts(tmp_path / "c.report.json")["fewer than two answers left"] == (2, 1)


def test_scores_of_a_row_come_before_the_word_list(tmp_path, monkeypatch, capsys):
    file = put(tmp_path / "mine.jsonl", [{"text": GOOD, "detoxify": {"insult": 0.11}},
                                         {"text": GOOD + " Shut up.", "detoxify": {"insult": 0.1}}])
    run(monkeypatch, capsys, file, "--out", tmp_path / "c.jsonl", "--toxicity", "words")
    assert rows_in(tmp_path / "c.jsonl") == [{"text": GOOD + " Shut up."}]


@pytest.mark.parametrize("rows, says", [([], "is empty"), ([{"prompt": "q"}], "holds prompts without answers"),
                                        ([{"some": "thing"}], "unknown keys")])
def test_a_file_without_answers_is_one_sentence(tmp_path, monkeypatch, capsys, rows, says):
    file = put(tmp_path / "mine.jsonl", rows)
    with pytest.raises(UserError, match=says):
        run(monkeypatch, capsys, file, "--out", tmp_path / "c.jsonl")
    assert not list(tmp_path.glob("c*"))


def test_out_is_never_the_file_itself(tmp_path, monkeypatch, capsys):
    file = put(tmp_path / "mine.jsonl", [{"text": GOOD}])
    for out in (file, tmp_path / "c.csv"):
        with pytest.raises(UserError, match="another .jsonl"):
            run(monkeypatch, capsys, file, "--out", out)
    assert rows_in(file) == [{"text": GOOD}]
