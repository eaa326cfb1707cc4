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
