"""Is a student's function right, and if not, which mistake is it? It runs in a process of its own (child.py); here its
results are compared with those of the reference and of every known wrong version."""
import functools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from course.child import GIGABYTES
from course.exercise import agree, close, outcome, tensors
from course.exercises import EXERCISES

ROOT, SEEDS = Path(__file__).resolve().parents[1], 3


@dataclass
class Verdict:
    name: str
    passed: bool
    sentence: str  # what a student reads


def exercise(name):
    if name not in EXERCISES:
        raise UserError(f"there is no exercise {name!r}: python learn.py lists them")
    return EXERCISES[name]


def file_of(name, folder):
    return Path(folder) / f"{exercise(name).name}.py"


def check(name, folder="my", seed=0):
    """Runs the student's function -> Verdict. Raises UserError where its file is not there."""
    file, chosen = file_of(name, folder), exercise(name)
    if not file.is_file():
        raise UserError(f"{file} is not there: python learn.py start {name} writes it")
    seeds = range(seed, seed + SEEDS)
    found = in_its_own_process(file, name, seeds)
    sentence = judge(chosen, found, seeds)
    printed = found.get("printed", "").strip().splitlines()
    note = f" It also prints ({printed[0]:.60}): a loop would print that at every step." if printed else ""
    good = f"right: {'results and gradients' if chosen.grads else 'the results'} are those of the reference."
    return Verdict(name, not sentence, (sentence or good) + note)


def in_its_own_process(file, name, seeds):
    """-> what child.run found; where the process ended without a result, a sentence about that."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        words = str(file.resolve()), name, ",".join(map(str, seeds)), str(result)
        try:
            done = subprocess.run([sys.executable, "-m", "course.child", *words], cwd=ROOT, timeout=120, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return {"error": f"{file.name} was still running after two minutes and could not be interrupted: "
                             "is there a loop that never ends?", "outcomes": []}
        if result.is_file():
            return torch.load(result, weights_only=True)
    why = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"{file.name} ended the process (status {done.returncode}, {why:.100}): does it leave by os._exit or "
                     f"take more than {GIGABYTES} GB?", "outcomes": []}


@functools.cache
def known(chosen_name, seed):
    """-> [the reference's outcome of each case], {mistake: [that of the wrong version, ...]}."""
    chosen = EXERCISES[chosen_name]
    cases = chosen.inputs(seed)
    return ([outcome(chosen.reference, case, chosen.grads) for case in cases],
            {why: [outcome(wrong, case, chosen.grads) for case in cases] for why, wrong in chosen.wrongs.items()})


def judge(chosen, found, seeds):
    """What is wrong, in a sentence; "" where nothing is."""
    every = [case for of_seed in found["outcomes"] for case in of_seed if case]
    if not every:
        return found["error"]
    changed = sorted({i for case in every for i in case["changed"]})
    if changed:
        return (f"it changes its argument {names(chosen)[changed[0]]} in place, which the caller may still need: "
                "make a new tensor (x = x + 1, not x += 1; clone() before writing into one)")
    references = [known(chosen.name, seed) for seed in seeds]
    for why in chosen.wrongs:
        if all(resembles(mine, wrongs[why], right) for mine, (right, wrongs) in zip(found["outcomes"], references)):
            return f"this is what comes out when {why}" + (f". And {found['error']}" if found["error"] else "")
    for seed, mine, (right, _) in zip(seeds, found["outcomes"], references):
        for case, a, b in zip(chosen.inputs(seed), mine, right):
            if a is None:
                return found["error"]
            if fault := difference(chosen, case, a, b):
                return fault
    return ""


def resembles(mine, wrong, right):
    """Does every case that has a result have that of the wrong version, which is not the right one in all of them?"""
    cases = [case for case in zip(mine, wrong, right) if case[0]]
    return all(agree(a, b) for a, b, _ in cases) and not all(agree(b, c) for _, b, c in cases)


def names(chosen):
    return [name.strip() for name in chosen.text.split("(")[1].split(")")[0].split(",")]


def difference(chosen, case, mine, right):
    """What of one case's outcome is not as it should be, in a sentence or a few lines; "" where all is."""
    if mine["out"].keys() != right["out"].keys() or (mine["kind"] == "a number") != (right["kind"] == "a number") and (
            right["kind"] != "a number"):
        if mine["kind"] == right["kind"]:
            return f"it returns {mine['kind']}, but with {', '.join(mine['out'])} in place of {', '.join(right['out'])}"
        cut = ": .item() and float() cut the gradient" if mine["kind"] == "a number" and chosen.grads else ""
        return f"it returns {mine['kind']}, but should return {right['kind']}{cut}"
    for path, expected in right["out"].items():
        got, what = mine["out"][path], path.replace("result", "the result", 1)
        if got.shape != expected.shape:
            return (f"{what} has the shape {tuple(got.shape)}, but should have {tuple(expected.shape)}"
                    f"{where(chosen, case)}")
        if got.dtype != expected.dtype and path in mine["tensors"] and path in right["tensors"]:
            return f"{what} is {short(got.dtype)}, but should be {short(expected.dtype)}{dtype_hint(case, expected)}"
        if not close(got, expected):
            return f"not the right numbers.{where(chosen, case)}{both(expected, got)}"
    unreached = [path for path, gradient in right["grads"].items()
                 if gradient is not None and gradient.any() and mine["grads"].get(path) is None]
    if unreached:
        return (f"the result is right, but no gradient arrives at {argument(chosen, unreached[0])}: .item(), "
                ".detach(), .tolist(), numpy and torch.tensor(...) cut it")
    for path, expected in right["grads"].items():
        got = mine["grads"].get(path)
        expected = torch.zeros_like(got) if expected is None and got is not None else expected
        if expected is not None and not close(torch.zeros_like(expected) if got is None else got, expected):
            return (f"the result is right, but its gradient with respect to {argument(chosen, path)} is not."
                    f"{where(chosen, case)}{both(expected, got)}")
    return ""


def argument(chosen, path):
    position, bracket, rest = path.partition("[")
    return names(chosen)[int(position)] + bracket + rest


def short(dtype):
    return str(dtype).removeprefix("torch.")


def dtype_hint(case, expected):
    doubles = any(t.dtype == torch.float64 for t in tensors(case, "").values())
    return ", as its arguments are here: give what you make on the way their dtype" if doubles else ""


def where(chosen, case):
    """The arguments of a case, as far as they are short."""
    lines = [f"   {name} = {shown(value)}" for name, value in zip(names(chosen), case)]
    return " The smallest case where it is not:\n" + "\n".join(lines)


def both(expected, got):
    """The expected and the found numbers; of large tensors the first entry that differs."""
    if expected.numel() <= 16:
        return f"\n   expected {shown(expected)}\n   found    {shown(got)}"
    at = next(i for i, (a, b) in enumerate(zip(got.flatten(), expected.flatten())) if not torch.isclose(
        a.double(), b.double(), rtol=1e-3, atol=1e-6, equal_nan=True))
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), expected.shape)]
    return (f"\n   at {index}: expected {shown(expected.flatten()[at])}, found {shown(got.flatten()[at])}")


def shown(value):
    if isinstance(value, torch.Tensor):
        numbers = value.float() if value.is_floating_point() else value
        if value.numel() > 24:
            return f"a tensor of shape {tuple(value.shape)}, {short(value.dtype)}"
        return str(rounded(numbers.tolist())).replace("'", "")
    text = str(rounded(value) if isinstance(value, float) else value)
    return text if len(text) < 150 else f"{text[:150]} ..."


def rounded(value):
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return f"{value:.4g}" if isinstance(value, float) else value
