"""Speed and memory of this project, beside its peers where they are installed, in one table from one run.

    python bench.py nf4        4-bit weights: quantize, dequantize, what a frozen layer keeps (beside bitsandbytes)

Timings on a shared machine drift. So the candidates take turns in each round, a ratio is formed within its round, and
what is printed is the median ratio with the smallest and the largest. Memory is the peak of a process of its own.
"""
import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import quant
from errors import UserError

# ---- measuring, the same for every command ---------------------------------------------------------------------------


def synchronize():
    if torch.cuda.is_available():  # kernels are only queued when a call returns
        torch.cuda.synchronize()


def interleaved(candidates, rounds):
    """{name: function} -> {name: [seconds per round]}. One warm-up round; then each function once a round, in turn."""
    seconds = {name: [] for name in candidates}
    for round_ in range(-1, rounds):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, reference):
    """Two lists of seconds -> 'how many times as fast as the reference', its median and range over the rounds."""
    ratios = [b / a for a, b in zip(seconds, reference)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


PEAK = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def peak_memory(code):
    """Python source -> the largest resident memory, in MB, of a fresh process that runs it; None where that is unknown.

    Not resource.getrusage: on Linux a child begins with its parent's peak.
    """
    if not Path("/proc/self/status").exists():
        return None
    out = subprocess.run([sys.executable, "-c", code + PEAK], cwd=Path(__file__).parent, check=True,
                         capture_output=True, text=True)
    return int(out.stdout.split()[-1]) / 1024


def table(header, rows):
    """Prints rows of strings in columns, the first one left-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    for row in [header, *rows]:
        first, *others = zip(row, widths)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    print()


def machine():
    """What the numbers depend on, in one line."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpu, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
        for line in cpu.read_text().splitlines() if cpu.exists() else ():
            if line.startswith("model name"):
                name = line.split(": ")[1]
        device = f"{name}, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}; Python {platform.python_version()}; {platform.system()}"


# ---- python bench.py nf4 ---------------------------------------------------------------------------------------------

def one_line_quantize(weight):
    """The definition as one would write it first, to be compared with (and compiled)."""
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    codes = torch.bucketize(blocks * (1 / absmax)[:, None], quant.MIDPOINTS.to(weight.device)).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2], absmax


def one_line_dequantize(packed, absmax, pairs, dtype):
    """packed (n / 2,), pairs (256, 2): both levels of each byte -> (n / 64, 64)"""
    return (pairs[packed.int()].view(-1, 64) * absmax[:, None]).to(dtype)


def try_compile(function, *arguments):
    """-> {"one line, compiled": call}, or {} where torch.compile finds no compiler: the rest is worth printing."""
    fast = torch.compile(function, dynamic=False)
    try:
        fast(*arguments)
    except Exception as error:  # whatever kind of compiler is missing or too old
        print(f"torch.compile does not work here ({type(error).__name__}): no compiled rows")
        return {}
    return {"one line, compiled": lambda: fast(*arguments)}


LAYERS = """
import torch, quant
torch.manual_seed(0)
layers = [{layer} for _ in range(16)]
x = y = torch.randn(64, 2048, requires_grad=True)
for layer in layers:
    y = layer(y)
y.sum().backward()
"""


def nf4_candidates(weight):
    """{operation: {implementation: call}}; the last implementation is what the others are compared with."""
    q = quant.quantize_nf4(weight)
    pairs = quant.BYTE_TO_PAIR.view(torch.float32).view(256, 2).to(weight.device)
    operations = {"quantize": {"quantize_nf4": lambda: quant.quantize_nf4(weight),
                               "quantize_nf4, double": lambda: quant.quantize_nf4(weight, double=True),
                               **try_compile(one_line_quantize, weight),
                               "one line": lambda: one_line_quantize(weight)}}
    for dtype in (torch.float32, torch.bfloat16):
        arguments = q.packed, q.absmax, pairs, dtype
        operations[f"dequantize to {dtype}".replace("torch.", "")] = {
            "dequantize_nf4": lambda dtype=dtype: quant.dequantize_nf4(q, dtype),
            "(fill a new tensor)": lambda dtype=dtype: torch.ones(weight.shape, dtype=dtype, device=weight.device),
            **try_compile(one_line_dequantize, *arguments),
            "one line": lambda arguments=arguments: one_line_dequantize(*arguments)}
    try:
        import bitsandbytes.functional as peer
    except ImportError:
        print("bitsandbytes is not installed: no rows for it (pip install bitsandbytes)")
        return operations
    packed, state = peer.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    operations["quantize"]["bitsandbytes"] = lambda: peer.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    for dtype in (torch.float32, torch.bfloat16):
        operations[f"dequantize to {dtype}".replace("torch.", "")]["bitsandbytes"] = lambda dtype=dtype: (
            torch.ops.bitsandbytes.dequantize_4bit(packed, state.absmax, 64, "nf4", weight.shape, dtype))
    return operations


def nf4(rounds):
    """A 4096 x 4096 matrix, block 64; then what a stack of frozen layers needs for a forward and a backward pass."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    weight = weight.cuda() if torch.cuda.is_available() else weight
    rows = []
    for operation, candidates in nf4_candidates(weight).items():
        seconds = interleaved(candidates, rounds)
        reference = list(candidates)[-1]
        for name, times in seconds.items():
            speed = f"{weight.numel() / statistics.median(times) / 1e9:.3f}"
            rows.append([operation, name, speed, ratio(times, seconds[reference]) if name != reference else "1"])
    table(["4096 x 4096, block 64", "", "G elements/s", f"times {reference} (range over {rounds} rounds)"], rows)

    stacks = {"nothing but the imports": "", "16 frozen nn.Linear(2048, 2048)": LAYERS.format(
        layer="torch.nn.Linear(2048, 2048).requires_grad_(False)"), "the same as NF4Linear": LAYERS.format(
        layer="quant.NF4Linear(torch.nn.Linear(2048, 2048))")}
    peaks = {name: peak_memory(code or "import torch, quant") for name, code in stacks.items()}
    if None not in peaks.values():
        table(["forward and backward, on the CPU", "peak MB"], [[name, f"{peak:.0f}"] for name, peak in peaks.items()])


COMMANDS = {"nf4": nf4}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, help="what to measure")
    parser.add_argument("--rounds", type=int, default=9, help="times that each candidate runs (default 9)")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: it must be at least 1")
    print(machine() + "\n")
    COMMANDS[args.command](args.rounds)


if __name__ == "__main__":
    main()
