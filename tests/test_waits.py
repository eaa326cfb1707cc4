"""Waits are told: the stages of a command, how long they take here, and three numbers on a bar."""
import json
import time
from types import SimpleNamespace

import pytest
import torch

import dpo
import ppo
import pretrain
import reward
import sft
import trainer
from common import waits
from common.flags import TrainConfig

RUN = trainer.Run(torch.device("cpu"), torch.float32)


def finished(*folders):
    for folder in folders:
        (folder / "config.json").parent.mkdir(parents=True)
        (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("there, config, expected", [
    ((), sft.Config(), ["out/base", "out/sft"]),
    (("base",), sft.Config(), ["out/sft"]),
    ((), ppo.Config(), ["out/base", "out/sft-community", "out/reward", "out/ppo"]),
    (("base", "sft-community"), ppo.Config(), ["out/reward", "out/ppo"]),
    ((), ppo.Config(init="gpt2", reward="readability"), ["out/ppo"]),  # nobody's default is missing
    ((), dpo.Config(), ["out/base", "out/sft-community", "out/dpo"]),
    ((), reward.Config(out="out/x"), ["out/base", "out/sft-community", "out/x"]),
])
def test_what_is_missing_comes_in_order_and_once(tmp_path, monkeypatch, there, config, expected):
    monkeypatch.chdir(tmp_path)
    finished(*(tmp_path / "out" / name for name in there))
    import sys
    found = trainer.missing(config, sys.modules[type(config).__module__])
    assert list(found) == expected
    assert "out/sft-community" not in found or found["out/sft-community"][1].answers == "community"


def test_a_command_begins_with_its_stages_and_their_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(pretrain, "main", lambda config: ran.append((config.out, waits.PLAN.depth)))
    trainer.prepare(sft.Config(), RUN)
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("stage 1 of 2, pretrain.py, out/base: Pretraining: ") and second.startswith("stage 2 of 2, sft.py, out/sft: ")
    assert third.startswith("about ") and "min in all on an idle core" in third and "--resume" in third
    assert rest[0].startswith("stage 1 of 2, out/base is not there yet") and ran == [("out/base", 1)] and waits.PLAN.depth == 0
    finished(tmp_path / "out" / "base")
    trainer.prepare(sft.Config(data="mine.jsonl"), RUN)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("sft.py, out/sft: ") and "the first steps will tell" in second and "idle" not in second


def test_measured_steps_say_how_long_the_other_stages_take_here(monkeypatch):
    plan = waits.Plan({"a": (1.0, 10, 5.0), "b": (2.0, 100, 0.0), "c": (1.0, 30, 10.0)})
    monkeypatch.setattr(waits.time, "monotonic", lambda: plan.began + 60)
    # twice as slow as where it was measured: 10 steps of 4 s; before it 60 s have passed, behind it stands c, 2 * 40 s
    assert plan.estimate("b", step=4.0, steps=10) == "stage 2 of 3, b: about 40 s, 3 min in all"
    assert plan.estimate("a", step=1.0, steps=10) == "stage 1 of 3, a: about 15 s, 5 min in all"
    assert waits.Plan({"a": (1.0, 10, 5.0)}).estimate("a", 1.0, 10) == "a: about 15 s"
    assert waits.Plan({"a": None}).estimate("a", 1.0, 600) == "a: about 10 min" == waits.Plan().estimate("a", 1.0, 600)


def test_a_machine_that_gives_less_than_a_core_is_noticed(monkeypatch):
    now = SimpleNamespace(wall=0.0, used=0.0)
    monkeypatch.setattr(waits, "time", SimpleNamespace(perf_counter=lambda: now.wall, thread_time=lambda: now.used))
    watch = waits.Stopwatch()
    now.wall, now.used = 1.5, 0.6
    assert watch.step() is None  # a first step is not enough
    now.wall, now.used = 3.0, 1.2
    assert watch.step() == (1.5, pytest.approx(0.4)) and watch.step() is None  # told once
    assert "busy" in waits.busy(0.4) and "40%" in waits.busy(0.4) and not waits.busy(0.95)


@pytest.mark.parametrize("seconds, text", [(0.2, "1 s"), (14, "14 s"), (44, "40 s"), (100, "1.7 min"), (180, "3 min"), (1000, "17 min"),
                                           (9000, "2.5 h")])
def test_lengths_of_time_in_words(seconds, text):
    assert waits.words(seconds) == text


def test_three_numbers_stand_on_the_bar_and_all_in_the_log(tmp_path):
    log = trainer.Log(TrainConfig(out=str(tmp_path)), RUN, 0, 3, bar=("score", "gold", "kl", "length"))
    for step in log.steps():
        log.write(step, kl=0.5, length=7.0, score=1.0, entropy=2.0, **({"gold": 3.0} if step else {}))
        if not step:
            assert log.bar.postfix == "score=1, kl=0.5, length=7"
    assert log.bar.postfix == "score=1, gold=3, kl=0.5"
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["entropy"] == 2.0


def test_a_bar_passes_everything_on_and_shows_nothing_where_it_is_quick(capsys, monkeypatch):
    assert list(waits.bar(range(5), "rows")) == [0, 1, 2, 3, 4] and not capsys.readouterr().err
    monkeypatch.setattr(waits, "QUIET", 0.01)
    for _ in waits.bar(range(4), "rows"):
        time.sleep(0.05)
    shown = capsys.readouterr().err
    assert "rows" in shown and "left" in shown
