"""NF4 fast: the same bytes and numbers as quantize and dequantize in quant.py, bit for bit, on plain tensors.

On a CPU the time goes into look-ups and into memory. So two levels are looked up at a time, and a weight goes through
in pieces: a passing tensor as large as the weight costs more than the arithmetic. A GPU dequantizes in one Triton
kernel. What neither is there for (quantizes, dequantizes) is left to the readable versions.
"""
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import torch

try:  # comes with the CUDA builds of torch; everything works without it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SMALL = 2 ** 14  # elements; below, calling an operation costs more than what it does
PIECE = 2 ** 20  # elements that go through together; 4 MB as float32
CELLS = 32  # cells per unit, over [-1, 1], in which quantize looks up the code


def quantizes(device, n, block):
    """-> whether quantize below is there for n elements in such blocks on this device, and worth its while."""
    return device.type == "cpu" and n >= SMALL and n % block == 0


def dequantizes(device, n, block):
    """-> the same of dequantize: on a GPU any number of elements, where Triton is there."""
    return quantizes(device, n, block) or device.type == "cuda" and triton is not None


@functools.cache
def cell_tables(levels):
    """16 levels -> the code at each cell's left end (65,) uint8, the midpoint inside each cell or infinity (65,).

    The nearest level without a search: a cell holds at most one midpoint, so the code is the code at its left end, plus
    one for a weight beyond the midpoint. Raises ValueError for levels that are too close to each other for that.
    """
    codebook = torch.tensor(levels, device="cpu")
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    cells = midpoints * CELLS + CELLS
    # the rounding of a weight's x * CELLS + CELLS must not carry it over an edge that a midpoint lies on
    if len(cells.long().unique()) < len(cells) or (cells - cells.round()).abs().min() < 1e-4:
        raise ValueError(f"two midpoints of the codebook share one of {2 * CELLS} cells, or one lies on its edge")
    left_code = torch.bucketize(torch.arange(2 * CELLS + 1, device="cpu") / CELLS - 1, midpoints).to(torch.uint8)
    midpoint = torch.full((2 * CELLS + 1,), torch.inf, device="cpu")
    midpoint[cells.long()] = midpoints
    return left_code, midpoint


@functools.cache
def pair_table(levels):
    """16 levels -> (256,) int64: both levels of each byte, float32, which move as one number: half as many look-ups.

    The four levels of two bytes would halve them again, but that table does not stay in a core's own cache.
    """
    codes = torch.arange(256, device="cpu")
    return torch.tensor(levels, device="cpu")[torch.stack([codes >> 4, codes & 15], dim=1)].view(torch.int64).flatten()


def in_pieces(work, blocks, step):
    """Calls work(slice of the blocks) until all blocks are done, step of them at a time.

    Each thread takes whole pieces and is alone with them. PyTorch would share out each operation among its threads,
    which then wait for each other after each one: a factor of 30 where other programs want the cores too.
    """
    starts, threads = range(0, blocks, step), torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def piece(start):
        torch.set_num_threads(1)  # of this thread; the mode too is kept per thread
        with torch.inference_mode(inference):
            work(slice(start, start + step))

    try:
        if threads == 1 or len(starts) == 1:
            for start in starts:
                piece(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(piece, starts))  # list: raises what a thread raised
    finally:
        torch.set_num_threads(threads)


def quantize(weight, codebook, block):
    """weight of any shape, n elements -> packed (n / 2,) uint8, absmax (n / block,) float32; see quantizes.

    A weight that is not finite gives an absmax that is not.
    """
    left_code, midpoint = cell_tables(tuple(codebook.tolist()))
    blocks = weight.detach().reshape(-1, block)
    absmax = torch.empty(len(blocks), dtype=torch.float32, device=weight.device)
    packed = torch.empty(len(blocks), block // 2, dtype=torch.uint8, device=weight.device)

    def work(part):
        w = blocks[part].float()
        largest = torch.amax(w.abs(), dim=1, out=absmax[part])
        x = (w * (1 / largest.clamp(min=1e-38))[:, None]).flatten()
        cell = (x * CELLS).add_(CELLS).to(torch.int32).clamp_(0, 2 * CELLS)  # clamped: NaN becomes any integer
        code = left_code.index_select(0, cell)
        code += x > midpoint.index_select(0, cell)
        first, second = code.view(-1, block // 2, 2).unbind(2)
        torch.add(second, first, alpha=16, out=packed[part])

    in_pieces(work, len(blocks), max(1, PIECE // 4 // block))  # a quarter: several passing tensors are as large
    return packed.flatten(), absmax


def dequantize(packed, absmax, codebook, shape, block, dtype):
    """packed (n / 2,) uint8, absmax (n / block,) float32 -> shape, of dtype; see dequantizes."""
    if packed.is_cuda:
        return dequantize_triton(packed, absmax, codebook, shape, block, dtype)
    pairs = pair_table(tuple(codebook.tolist()))
    packed = packed.view(-1, block // 2)  # (blocks, block / 2)
    out = torch.empty(len(absmax), block, dtype=dtype, device=packed.device)

    def work(part):
        y = out[part]
        levels = y if dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
        torch.index_select(pairs, 0, packed[part].flatten().int(), out=levels.view(torch.int64).flatten())
        y.copy_(levels.mul_(absmax[part, None]))  # rounded once; copies nothing where the levels are y itself

    in_pieces(work, len(absmax), max(1, PIECE // block))
    return out.view(shape)


def row_pieces(shape, block, device):
    """Yields, for about PIECE elements at a time (on a GPU for all), slices of a weight's rows, of packed, of absmax.

    The whole weight (out, in) as floats would be tens of MB for a moment, once per layer. Large passing tensors leave
    holes among the small lasting ones (activations) that the allocator cannot use again, so a process grows by about
    one weight per layer.
    """
    rows, columns = shape
    unit = block // math.gcd(block, columns)  # after so many rows a row begins with a block
    step = max(1, PIECE // (columns * unit)) * unit if device.type == "cpu" else rows
    for start in range(0, rows, step):
        end = min(start + step, rows)
        first, last = start * columns, end * columns
        yield slice(start, end), slice(first // 2, (last + 1) // 2), slice(first // block, -(-last // block))


if triton is not None:
    @triton.jit
    def _dequantize_kernel(packed, absmax, codebook, out, n, BLOCK: tl.constexpr, TILE: tl.constexpr):
        tile = tl.program_id(0).to(tl.int64)  # 64 bits: a weight may have more than 2^31 elements
        byte = tile * TILE + tl.arange(0, TILE)
        inside = byte < (n + 1) // 2
        codes = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax + byte // (BLOCK // 2), mask=inside, other=0.0)
        first = tl.load(codebook + (codes >> 4)) * scale
        second = tl.load(codebook + (codes & 15)) * scale
        # interleaved in registers, so that neighbouring threads write neighbouring addresses
        element = tile * (2 * TILE) + tl.arange(0, 2 * TILE)
        tl.store(out + element, tl.interleave(first, second).to(out.dtype.element_ty), mask=element < n)


def dequantize_triton(packed, absmax, codebook, shape, block, dtype):
    """dequantize in one kernel: reads half a byte and writes one number per element. Checked in Triton's interpreter
    only: its speed on a GPU has not been measured."""
    out, tile = torch.empty(shape, dtype=dtype, device=packed.device), 1024
    _dequantize_kernel[(triton.cdiv(len(packed), tile),)](
        packed, absmax, codebook.to(packed.device), out, out.numel(), BLOCK=block, TILE=tile)
    return out
