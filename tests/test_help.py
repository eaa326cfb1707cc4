"""Every script teaches with --help, and ends without a traceback when nobody listens any more."""
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.flags import parse

ROOT = Path(__file__).resolve().parents[1]
WITH_CONFIG = ["generate", "pretrain", "sft", "reward", "dpo", "ppo", "lora", "chat", "evaluate", "evals.unknowns", "evals.judge", "data.eli5",
               "data.simple_wikipedia", "data.smoltalk", "data.oasst", "data.identity"]
WITH_ARGPARSE = ["bench", "quant", "island.__main__", "data.files", "data.clean", "data.leakage", "common.download"]


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse(importlib.import_module(name).Config, argv=["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and (f"python -m {name}" if "." in name else f"{name}.py") in printed
    flags = [line for line in printed.splitlines() if line.startswith("  --")]
    assert "usage" in printed and (flags or name == "evals.judge")


@pytest.mark.parametrize("name", [name for name in WITH_CONFIG if hasattr(importlib.import_module(name).Config, "dtype")])
def test_a_dtype_that_no_script_has_is_one_line(name):
    with pytest.raises(UserError, match="^--dtype fp16: it must be one of auto, float32, bfloat16$"):
        parse(importlib.import_module(name).Config, argv=["--dtype", "fp16"])


@pytest.mark.parametrize("name", WITH_ARGPARSE)
def test_help_of_the_others(name, capsys, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main(*[None] * (name == "quant"))
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_a_closed_pipe_is_no_bug():
    done = subprocess.run(f"{sys.executable} -m island | head -1", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("residents") and not done.stderr


@pytest.mark.parametrize("command", ["trainer.py", "checkpoints.py", "-m evals.story", "-m evals.measure"])
def test_a_file_without_a_command_says_what_it_is_in_a_line(command):
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.count("\n") == 1 and "no command of its own: " in done.stdout


def test_an_adapter_that_is_not_named_is_asked_for_with_an_example():
    done = subprocess.run([sys.executable, "lora.py", "--compare"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "python lora.py --adapter out/sft-lora --compare" in done.stderr and done.stderr.count("\n") == 1


def test_advice_names_only_flags_that_the_command_has(tmp_path):
    from data.tokenizer import get_tokenizer
    for name, told in (("sft", True), ("evaluate", False)):
        parse(importlib.import_module(name).Config, argv=[])
        with pytest.raises(UserError) as error:
            get_tokenizer(tmp_path)
        assert ("--tokenizer" in str(error.value)) is told and "copy its model's tokenizer.json there" in str(error.value)


def test_help_takes_little_more_than_torch():
    """In processor time, which other programs do not change; the smaller of two."""
    import resource

    def seconds(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    torch_alone, help_ = (min(seconds(*command) for _ in range(2)) for command in (("-c", "import torch"), ("evaluate.py", "--help")))
    assert help_ < torch_alone + 0.5
