"""Would our own tests notice? Every known wrong version takes the place of ours, and its test file has to fail.

    python -m course.mutants                    all, a quarter of an hour
    python -m course.mutants gae dpo_loss       some

First the right version is put there by the same adapter: what fails then (a flag that the minimal signature lacks) does
not count.
"""
import contextlib
import multiprocessing
import os
import sys

import pytest

from common.errors import UserError, end_politely
from course.check import ROOT, exercise
from course.exercises import EXERCISES
from course.put import put

WHOLE = ("test_tokenizer.py", "test_llama.py")  # of the other files only the math: whole runs take minutes


class Failed:
    """A plugin of pytest: which tests have failed."""

    def __init__(self):
        self.tests = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.tests.append(report.nodeid)


def failing(chosen, version, without=(), stop=True):
    """The tests that fail with that version in the place of ours, the first one only or all."""
    found, told = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=run, args=(chosen, version, without, stop, told))
    process.start()
    told.close()
    try:
        tests, status = found.recv()
    except EOFError:
        tests, status = [], "none"
    process.join()
    if status == 2 and stop:  # not even the test file can be read
        return tests or ["reading the tests"]
    if status not in (0, 1):
        raise UserError(f"{chosen.name}: pytest ended with status {status}: try python -m pytest {chosen.tests}")
    return tests


def run(chosen, version, without, stop, told):
    """In a process of its own, a fork: all that the tests import is there already, but for the tests."""
    failed = Failed()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        put(chosen.put(version))
        math = [] if chosen.tests.endswith(WHOLE) else ["-m", "math"]
        status = pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *(["-x"] if stop else []),
                              *(f"--deselect={test}" for test in without), chosen.tests, *math], [failed])
    told.send((failed.tests, int(status)))
    told.close()


def main(names):
    missed = 0
    for chosen in map(exercise, names or EXERCISES):
        if chosen.put is None:
            print(f"{chosen.name}: nothing of ours is at stake")
            continue
        refused = failing(chosen, chosen.reference, stop=False)
        found = {why: failing(chosen, wrong, refused) for why, wrong in chosen.wrongs.items()}
        print(f"{chosen.name}: {sum(map(bool, found.values()))} of {len(found)} caught by {chosen.tests}"
              + (f", {len(refused)} tests left out" if refused else ""), flush=True)
        for why in [why for why, tests in found.items() if not tests]:
            print(f"   not caught: {why}", flush=True)
            missed += 1
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    end_politely()
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    else:
        os.chdir(ROOT)
        main(sys.argv[1:])
