"""The course text: what it quotes is what stands in the code and in the measured tables, and its sums come out."""
import re
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from course import by_hand, figures, lessons
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from reward import RewardModel

ROOT = Path(__file__).resolve().parents[1]
RUN = by_hand.RUN


def test_every_lesson_says_what_the_code_and_the_tables_say_and_names_what_exists():
    assert lessons.faults() == []


def test_there_are_eleven_lessons_and_each_has_all_its_parts():
    pages = sorted((ROOT / "docs" / "course").glob("[0-9]*.md"), key=lambda page: int(page.name.partition("_")[0]))
    assert [int(page.name.partition("_")[0]) for page in pages] == list(range(11))
    listed = re.findall(r"course/(\d+_\w+\.md)", (ROOT / "docs" / "course.md").read_text())
    assert listed == [page.name for page in pages]
    for page, after in zip(pages, [*pages[1:], None]):
        text = page.read_text(encoding="utf-8")
        for heading in ("The idea", "Run it", "Questions", "Exercises", "Papers", "Where is it in the code"):
            assert f"## {heading}\n" in text, f"{page.name} lacks {heading}"
        assert text.count("<details><summary>Answer</summary>") == text.count("</details>") >= 3, page.name
        assert "<!-- code: " in text and 150 <= len(text.splitlines()) <= 400, page.name
        assert after is None or f"]({after.name})" in text.splitlines()[-1] + text.splitlines()[-2], page.name


# ---- the marks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mark, stale", [
    ("<!-- code: dpo.py answer_logps -->\n", "```python\ndef answer_logps(model): pass\n```\n"),
    ("<!-- section: docs/results.md The base model -->\n", "| held-out loss | 0.1 |\n"),
    ("<!-- n: quiz @ base -->", "1%")])
def test_what_is_stale_is_written_anew_and_then_stays(mark, stale):
    old = f"before {mark}{stale}{lessons.END} after"
    new = lessons.refreshed(old)
    assert new != old and new.startswith(f"before {mark}") and new.endswith(f"{lessons.END} after")
    assert stale not in new and lessons.refreshed(new) == new


def test_an_excerpt_has_the_lines_that_were_asked_for_and_no_docstring():
    whole = lessons.code("dpo.py", "dpo_loss")
    assert '"""' not in whole and "check_loss(beta" in whole and whole.startswith("```python\ndef dpo_loss(")
    part = lessons.code("dpo.py", "dpo_loss", "h, e =", "losses =")
    assert part.splitlines()[1].startswith("h, e =") and part.count("losses =") == 1
    assert "def values" in lessons.code("reward.py", "RewardModel.values")
    assert lessons.code("quant.py", "OFFSET").count("\n") == 3
    for name, first in (("no_such_loss", ""), ("dpo_loss", "no such line")):
        with pytest.raises(UserError, match="dpo.py"):
            lessons.code("dpo.py", name, first)


def test_a_number_is_that_of_its_row_and_column(monkeypatch):
    page = "| | a | b |\n| --- | ---: | ---: |\n| x | 1 | 2 |\n| y | 3 | 4 |\n| x | 5 | 6 |\n"
    monkeypatch.setattr(lessons, "read", lambda path: page)
    assert [lessons.number(row, "b") for row in ("x", "x #2", "y")] == ["2", "6", "4"]
    for row, column in (("z", "a"), ("x", "c"), ("x #3", "a")):
        with pytest.raises(UserError, match="no table"):
            lessons.number(row, column)


def test_what_is_named_and_not_there_is_found():
    text = "[a](nowhere.md) [b](course.md) [c](https://x.org/y) `sft.py` `sfd.py` `dpo.py: dpo_loss, dpo_lose` `out/x/a.md`"
    found = lessons.missing(ROOT / "docs" / "page.md", text)
    assert len(found) == 3 and "nowhere.md" in found[0] and "sfd.py" in found[1] and "dpo_lose" in found[2]


def test_a_mark_without_its_end_is_found(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- n: quiz @ base -->100%\n")
    monkeypatch.setattr(lessons, "pages", lambda: [page])
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    assert "a mark without its end" in " ".join(lessons.faults())


# ---- the sums --------------------------------------------------------------------------------------------------------

def test_lesson_0_has_the_tokens_and_the_mask_of_the_renderer_and_its_sum_is_its_loss():
    text = lessons.section("docs/course/one_run.md", "A conversation")
    (_, rows), = lessons.tables(text)
    ids, mask = get_tokenizer("tiny").render(by_hand.first_conversation())
    again = "the island or its tokens have changed: python -m course.figures, then python -m course.lessons"
    assert [int(row[2]) for row in rows] == ids and [int(row[3]) for row in rows] == mask, again
    for column, name in ((4, "base"), (5, "sft")):
        bold = [float(row[column].strip("*")) for row in rows if row[column].startswith("**")]
        by_us, by_code = map(float, re.search(rf"{name}: .*?\*\*([\d.]+)\*\*.*?\*\*([\d.]+)\*\*", text).groups())
        assert len(bold) == sum(mask) and by_us == by_code
        assert -sum(bold) / len(bold) == pytest.approx(by_us, abs=6e-4)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chain of untrained tiny stages."""
    folder, tok = tmp_path_factory.mktemp("chain"), get_tokenizer("tiny")
    for i, name in enumerate(("base", "sft", "sft-community", "reward", "dpo", "ppo")):
        torch.manual_seed(i)
        network = GPT(GPTConfig(block_size=128, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=16))
        (RewardModel(network) if name == "reward" else network).save_pretrained(folder / name)
        tok.save(folder / name)
    return folder


@pytest.mark.parametrize("name, places", [("conversation", 4), ("vote", 2), ("pair", 2), ("response", 2)])
def test_the_sum_worked_out_in_the_open_is_what_the_code_says(chain, name, places):
    text = by_hand.EXAMPLES[name](chain, RUN)
    pairs = re.findall(r"\*\*(-?\d+\.\d+)\*\*[^*|]*says[^*|]*\*\*(-?\d+\.\d+)\*\*", text)
    assert len(pairs) == (2 if name == "conversation" else 1)
    for ours, codes in pairs:
        assert float(ours) == pytest.approx(float(codes), abs=1.1 * 10 ** -places)


def test_advantages_of_the_response_follow_from_the_deltas_of_its_table(chain):
    (_, rows), = lessons.tables(by_hand.response(chain, RUN))
    deltas, advantages = ([float(row[i]) for row in rows] for i in (5, 6))
    for t in range(len(rows) - 1):
        assert advantages[t] == pytest.approx(deltas[t] + 0.95 * advantages[t + 1], abs=0.02)
    assert advantages[-1] == pytest.approx(deltas[-1], abs=0.01)


def test_a_stage_that_is_missing_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="base is not there: python evaluate.py --story"):
        by_hand.conversation(tmp_path, RUN)


# ---- the pictures ----------------------------------------------------------------------------------------------------

def test_every_picture_is_small_and_shown_somewhere():
    shown = "".join(page.read_text(encoding="utf-8") for page in lessons.pages())
    files = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert set(files) == set(figures.PICTURES)
    for name, size in files.items():
        assert size < 60_000 and f"figures/{name}.png" in shown, name


def test_pictures_without_a_chain_are_the_diagrams_and_what_is_missing_is_said(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="lacks base, dpo, ppo, ppo-no-penalty, reward, sft, sft-community: python"):
        figures.main(figures.Config(out=str(tmp_path), figures=str(tmp_path / "figures"), page=str(tmp_path / "page.md")))
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"four_models", "network", "mask", "clip"}
    assert not (tmp_path / "page.md").exists()
