"""The process in which a student's function runs, with limits; check.py starts it and judges what it writes.

    python -m course.child FILE NAME SEEDS RESULT
"""
import contextlib
import importlib.util
import inspect
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from course.exercise import NoResult, outcome
from course.exercises import EXERCISES

SECONDS, GIGABYTES = 10, 4  # for all cases together; beside what torch itself has taken


class TooLong(BaseException):
    """No Exception: `except Exception` in a student's loop does not catch it."""


def limit():
    """Sets the limits that this system knows."""
    def stop(signum, frame):
        raise TooLong

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, stop)  # of computing: a busy machine is not the student's fault
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + GIGABYTES * 2 ** 30,) * 2)


def line_of(error, file):
    """Where in the student's file it happened: ", line 12", or nothing."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""


def said(error):
    text = (str(error).splitlines() or [""])[0].strip()
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


def sentence(error, file, doing):
    """What a student reads about an exception."""
    where = f"{file.name}{line_of(error, file)}"
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file.name}, line {error.lineno}, is no Python: {error.msg}"
    if isinstance(error, SystemExit):
        return f"{where} calls sys.exit: a function returns its result and leaves the process alone"
    if isinstance(error, TooLong):
        return f"{where}: still running after {SECONDS} seconds of computing; is there a loop that never ends?"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return f"{where} asks for more than {GIGABYTES} GB of memory: which tensor is so large?"
    if isinstance(error, RecursionError):
        return f"{where}: the function calls itself again and again"
    return f"{where}, {doing}: {said(error)}"


def load(file, name):
    """-> the student's function, or a sentence."""
    spec = importlib.util.spec_from_file_location(f"mine_{name}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        return sentence(error, file, "fails while it is read")
    function = getattr(module, name, None)
    if callable(function):
        return function
    others = [other for other, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    return (f"{file.name} has no function {name}" + (f", only {', '.join(others)}" if others else "")
            + ": the check looks for that name")


def run(file, name, seeds):
    """-> {"outcomes": [[outcome of a case, or None where it raised something, ...] of a seed, ...], "error": a sentence
    about the first of these, or about what ended it all, or ""}."""
    function, outcomes, first = load(file, name), [], ""
    if isinstance(function, str):
        return {"error": function, "outcomes": []}
    for seed in seeds:
        outcomes.append([])
        for case in EXERCISES[name].inputs(seed):
            try:
                inspect.signature(function).bind(*case)
            except TypeError:
                wants = EXERCISES[name].text.strip().split(":\n")[0].removeprefix("def ")
                has = f"{name}{inspect.signature(function)}"
                return {"error": f"{has} takes other arguments than {wants}", "outcomes": []}
            try:
                outcomes[-1].append(outcome(function, case, EXERCISES[name].grads))
            except NotImplementedError as error:
                return {"error": f"{file.name}{line_of(error, file)}: not written yet", "outcomes": []}
            except NoResult as error:
                return {"error": str(error), "outcomes": []}
            except Exception as error:  # the other cases may tell which mistake it is
                first = first or sentence(error, file, f"case {len(outcomes[-1]) + 1}")
                outcomes[-1].append(None)
            except BaseException as error:
                return {"error": sentence(error, file, f"case {len(outcomes[-1]) + 1}"), "outcomes": []}
    return {"error": first, "outcomes": outcomes}


@contextlib.contextmanager
def silence(found):
    """Keeps what is printed meanwhile, by whatever means, in found["printed"]."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, before in enumerate(kept, 1):
                os.dup2(before, number)
            file.seek(0)
            found["printed"] = file.read(1000).decode(errors="replace")


def main(file, name, seeds, result):
    found = {}
    with silence(found):
        limit()
        found |= run(Path(file).resolve(), name, list(map(int, seeds.split(","))))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
    torch.save(found, result)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        print(__doc__)
        raise SystemExit(sys.argv[1:] not in (["-h"], ["--help"]))
    torch.set_num_threads(1)
    main(*sys.argv[1:])
