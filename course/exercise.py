"""What an exercise is, and what a function gives on its cases: results, gradients; are two of them equal?"""
import re
from dataclasses import dataclass, field
from typing import Callable

import torch


@dataclass(frozen=True)
class Exercise:
    """One function of this project with its body taken out."""

    text: str  # what the student gets: signature, shapes, equation and its paper, a hint; no body
    reference: Callable  # the right function, with the student's arguments: ours, or torch's
    cases: Callable  # Draw -> [the arguments in their order, ...], from the smallest case to the largest
    wrongs: dict  # {what went wrong, as it ends "this is what comes out when ...": a function that does so}
    grads: tuple = ()  # positions of the arguments with respect to which there is a gradient
    doubles: bool = True  # is there a case in float64? What is made on the way must then be float64 too
    shows: tuple = ()  # functions of ours that `solution` prints, where the reference only wraps them
    put: Callable | None = None  # the student's function -> {place, such as dpo.dpo_loss: what takes its place}
    scripts: tuple = ()  # which call what is at that place
    needs: dict = field(default_factory=dict)  # {field of the script's Config: the only value that this function has}
    tests: str = ""  # the test file of what is at that place

    @property
    def name(self):
        return re.search(r"def (\w+)", self.text)[1]

    @property
    def title(self):
        """The first sentence of the docstring, without its source."""
        return re.split(r" \(|[.:?]", self.text.split('"""')[1])[0].replace("\n    ", " ")

    def inputs(self, seed):
        """-> [[argument, ...], ...]: the same for the same seed."""
        cases = self.cases(Draw(seed))
        return cases + [doubled(cases[min(1, len(cases) - 1)])] if self.doubles else cases


class NoResult(Exception):
    """What a function returned is none of tensors, numbers, and lists of them."""


class Draw:
    """Random tensors, float32, a function of the seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def several(self, n, *shape):
        return [self(*shape) for _ in range(n)]

    def ints(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)

    def response(self, B, T):
        """Masks (B, T) float32 of responses: at least one token before each, row 0 without padding, the others with."""
        mask = torch.zeros(B, T)
        for row in range(B):
            start = 1 + int(self.ints(max(1, T - 2 - bool(row)), 1))
            mask[row, start:T - (1 + int(self.ints(max(1, T - start - 1), 1)) if row else 0)] = 1
        return mask


def parts(value, path):
    """A tensor, a number, or lists of them -> {path: tensor}. A list of scalars is one tensor. Raises NoResult."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, (bool, int, float)):
        return {path: torch.tensor(float(value))}
    if isinstance(value, (list, tuple)):
        scalars = [x for x in value if isinstance(x, (bool, int, float)) or isinstance(x, torch.Tensor) and not x.dim()]
        if value and len(scalars) == len(value):
            made = [x if isinstance(x, torch.Tensor) else torch.tensor(float(x)) for x in value]
            widest = torch.float64 if any(x.dtype == torch.float64 for x in made) else torch.float32
            return {path: torch.stack([x.to(widest) for x in made])}
        return {key: t for i, x in enumerate(value) for key, t in parts(x, f"{path}[{i}]").items()}
    if value is None and path == "result":
        raise NoResult("it returns None: the body is still empty, or a return is missing")
    raise NoResult(f"it returns {path.replace('result', '...', 1)} = {value!r:.60}, and not tensors or numbers")


def tensors(value, path):
    """{path: tensor} of all tensors within an argument, whatever else is in it."""
    if isinstance(value, (list, tuple)):
        return {key: t for i, x in enumerate(value) for key, t in tensors(x, f"{path}[{i}]").items()}
    return {path: value} if isinstance(value, torch.Tensor) else {}


def mapped(change, value):
    """A copy of an argument with every tensor changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(change, x) for x in value)
    return change(value) if isinstance(value, torch.Tensor) else value


def doubled(case):
    return mapped(lambda t: t.double() if t.is_floating_point() else t, case)


def equal(a, b):
    """Are two arguments the same in every bit?"""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def describe(value):
    """A result in words, such as "a scalar tensor, float32" or "a tuple of 2"."""
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a tensor of shape {tuple(value.shape)}, {kind}" if value.dim() else f"a scalar tensor, {kind}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "a number" if isinstance(value, (bool, int, float)) else "None" if value is None else type(value).__name__


# ---- what a function gives -------------------------------------------------------------------------------------------

def outcome(function, case, grads):
    """Calls function(*case) -> {"kind", "out", "tensors", "grads", "changed"}, which can be saved.

    kind: the result in words. out: {path: tensor}; tensors: which of these paths were tensors and no numbers. grads:
    {path: gradient, or None where none arrives} of a weighted sum of the results with respect to the arguments at these
    positions. changed: positions of the arguments that the call has changed. What the function raises passes.
    """
    leaves = [mapped(lambda t: t.clone().requires_grad_() if i in grads and t.is_floating_point() else t.clone(), x)
              for i, x in enumerate(case)]
    given = mapped(lambda t: t.clone(), leaves)  # no leaves any more: a change in place is possible, and noticed below
    result = function(*given)
    found = {"kind": describe(result), "out": parts(result, "result"), "grads": {},
             "tensors": list(tensors(result, "result")),
             "changed": [i for i, x in enumerate(case) if not equal(x, given[i])]}
    wanted = {path: t for i in grads for path, t in tensors(leaves[i], str(i)).items() if t.requires_grad}
    total = [(t * weights(t)).sum() for t in found["out"].values() if t.requires_grad]
    if wanted:
        made = torch.autograd.grad(sum(total), wanted.values(), allow_unused=True) if total else [None] * len(wanted)
        found["grads"] = dict(zip(wanted, made))
    found["out"] = {path: t.detach().clone() for path, t in found["out"].items()}
    return found


def weights(t):
    """Fixed numbers near 1: entries of a result that were exchanged have another gradient."""
    return (1 + 0.3 * torch.cos(torch.arange(t.numel()))).view(t.shape).to(t.dtype)


def close(found, expected):
    """Are two tensors equal but for rounding? NaN and infinity equal themselves; of another shape: no."""
    if found.shape != expected.shape:
        return False
    exact = not (found.is_floating_point() and expected.is_floating_point())
    double = found.dtype == expected.dtype == torch.float64
    a, b = found.double(), expected.double()
    finite = b[b.isfinite()].abs()
    size = finite.max().item() if len(finite) else 0.0
    # of the largest entry: a small one may be what is left of a difference of large ones
    allowed = 0.0 if exact else size * 1e-9 + 1e-14 if double else size * 5e-5 + 1e-7
    return torch.allclose(a, b, rtol=0, atol=allowed, equal_nan=True)


def agree(found, expected):
    """Two outcomes: the same results and gradients? A gradient that does not arrive is one of zeros."""
    def gradients():
        for path, b in expected["grads"].items():
            a = found["grads"].get(path)
            zero = torch.zeros(()) if a is None and b is None else torch.zeros_like(b if a is None else a)
            yield zero if a is None else a, zero if b is None else b

    return (found["out"].keys() == expected["out"].keys()
            and all(close(t, expected["out"][path]) for path, t in found["out"].items())
            and all(close(a, b) for a, b in gradients()))
