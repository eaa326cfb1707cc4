"""pytest -m math: of the files of the math, the tests that write no folder and are not marked as `runs`."""
import os
import signal

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # also behind a shell's & and under nohup
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

MATH = {f"test_{name}" for name in ("model", "lora", "quant", "trainer", "sft", "reward", "dpo", "ppo", "pairs")}


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    """The files of a test need not survive one, and waiting for the disk is half of its time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pytest_ignore_collect(collection_path, config):
    """The other files are not even read: importing them takes longer than the math."""
    if config.option.markexpr == "math" and collection_path.suffix == ".py" and collection_path.stem not in MATH:
        return True


def pytest_collection_modifyitems(items):
    for item in items:
        files = any(name.startswith("tmp_path") for name in item.fixturenames)
        if item.path.stem in MATH and not files and not item.get_closest_marker("runs"):
            item.add_marker(pytest.mark.math)
