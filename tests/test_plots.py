"""Pictures: a checkpoint keeps its colour, a share its axis, and a title says what is to be seen."""
import json

import pytest

from common import plots
from common.errors import UserError
from common.flags import parse

pytest.importorskip("matplotlib")


def put(folder, lines):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def drawn(monkeypatch):
    """The figures that are saved, to look at their panels."""
    figures, real = [], plots.save
    monkeypatch.setattr(plots, "save", lambda made, path: (figures.append(made), real(made, path)))
    return figures


def test_a_checkpoint_keeps_its_colour_everywhere():
    assert plots.color("out/ppo") == plots.color("elsewhere/ppo") != plots.color("out/ppo-no-penalty")
    assert len(set(plots.COLORS.values())) == len(plots.COLORS) and not set(plots.COLORS.values()) & set(plots.OTHERS)
    assert plots.color("out/mine") == plots.color("out/mine") in plots.OTHERS


@pytest.mark.parametrize("values, share, text", [
    ([1.0] * 10 + [5.0] * 10, False, "rises from 1 to 5"), ([0.5, 0.25], True, "falls from 50% to 25%"),
    ([0.101, 0.1011], False, "stays at 0.1"), ([0, 0, 2, 100, 4, 4, 4, 4, 4, 4] * 2, False, "rises from 0 to 4")])
def test_a_title_states_the_finding(values, share, text):
    assert plots.finding(values, share) == text


def test_any_logs_are_drawn_over_each_other(tmp_path, monkeypatch, capsys):
    figures = drawn(monkeypatch)
    sft = put(tmp_path / "sft", [{"step": i, "loss": 3.0 - i} for i in range(3)] + [{"step": 2, "held_out": 1.0}])
    dpo = put(tmp_path / "dpo", [{"step": i, "loss": 1.0, "accuracy": 0.5 + i / 10} for i in range(3)])
    plots.main(parse(plots.Config, argv=[sft, dpo, "--out", str(tmp_path / "x.png")]))
    assert (tmp_path / "x.png").stat().st_size > 1000
    loss, held_out, accuracy = figures[0].axes
    assert {line.get_color() for line in loss.lines} == {plots.color("sft"), plots.color("dpo")}
    assert "sft falls from 3 to 1" in loss.get_title() and "dpo stays at 1" in loss.get_title() and held_out.get_title() == "held out stays at 1"
    assert accuracy.get_ylim() == (-0.02, 1.02) and accuracy.get_yticklabels()[-1].get_text() == "100 %" and loss.get_ylim()[1] > 1.02
    plots.main(parse(plots.Config, argv=[sft, dpo, "--names", "accuracy", "--out", str(tmp_path / "x.png")]))
    assert len(figures[1].axes) == 1


def test_reward_and_gold_stand_in_two_panels_over_the_root_of_the_kl(tmp_path, monkeypatch):
    figures, lines = drawn(monkeypatch), [{"kl": 4.0 * i - 0.1 * (not i), "score": i, "gold": 9 - i} for i in range(3)]
    plots.draw_over_kl({"out/ppo": lines, "out/x": lines}, tmp_path / "x.png")
    score, gold = figures[0].axes
    assert list(score.lines[0].get_xdata()) == [0, 2, 8 ** 0.5] and list(gold.lines[1].get_ydata()) == [9, 8, 7]
    assert "reward\nppo rises from 0 to 2" in score.get_title() and "ppo falls from 9 to 7" in gold.get_title()
    plots.draw_over_kl({"out/ppo": [{"kl": 1.0, "score": 2.0}]}, tmp_path / "x.png")  # your own data has no gold
    assert len(figures[1].axes) == 1


@pytest.mark.parametrize("argv, words", [([], "name the folders.*python -m common.plots out/sft"), (["nowhere"], "nowhere/log.jsonl is not there")])
def test_mistakes_are_one_sentence(argv, words):
    with pytest.raises(UserError, match=words):
        plots.main(parse(plots.Config, argv=argv))


def test_a_number_that_no_log_has_is_named(tmp_path):
    with pytest.raises(UserError, match="no log has los; there are step, loss"):
        plots.main(plots.Config([put(tmp_path / "a", [{"step": 0, "loss": 1.0}])], "los"))
