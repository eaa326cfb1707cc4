"""NF4: weights in four bits, on a grid made for normally distributed numbers (QLoRA, Dettmers et al. 2023, section 3).

    quantize     absmax_b = max |w| in block b;   code = argmin_c |CODEBOOK[c] - w / absmax_b|;   two codes to a byte
    dequantize   w' = CODEBOOK[code] * absmax_b,  so |w - w'| <= 0.1519036 * absmax_b
    linear       y = x W'^T + bias,  dL/dx = dL/dy W'.  W' is made anew in each of the two and never kept.

The last line serves a frozen base that was published as bfloat16, too: half the memory, and the same numbers.

    python quant.py                          the codebook, how it is derived, and its error on normal weights
    python quant.py out/base                 a checkpoint: bits per weight, error per layer, change in held-out loss
    python quant.py out/base --plot nf4.png  and the codebook drawn over the histogram of its weights

Trained weights are close to normal. Sixteen levels that each take a similar share of a normal distribution waste less
than sixteen levels at equal distances. On weights from N(0, 1) in blocks of 64 the root mean square error is 0.0920 for
NF4, 0.0921 with double quantization and 0.1076 for absmax int4, at 4.5, 4.127 and 4.5 bits per weight.
"""
import argparse
from dataclasses import dataclass, replace
from statistics import NormalDist

from common.errors import UserError, end_politely

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.flags import Parser, Positive, bounded
from kernels import nf4

# ---- the codebook ----------------------------------------------------------------------------------------------------

CODEBOOK = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                         0.7229568362236023, 1.0])
OFFSET = ((1 - 1 / 30) + (1 - 1 / 32)) / 2  # the outermost probability: the quantile of 1 itself would be infinite
MIDPOINTS = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2  # a weight on a midpoint goes to the lower code


def derive_codebook():
    """Quantiles of the standard normal distribution -> the 16 levels, ascending, as Python floats (QLoRA, appendix E).

    From OFFSET to 1/2 in equal steps of probability: 8 positive and 7 negative levels. The zero is added by hand, so
    that zero weights (padding, pruning) stay exactly zero. The division makes the outermost levels -1 and 1.
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(OFFSET + (0.5 - OFFSET) * i / 8) for i in range(8)]
    negative = [-quantile(OFFSET + (0.5 - OFFSET) * i / 7) for i in range(7)]
    return [level / positive[0] for level in sorted(negative + [0.0] + positive)]


# ---- a quantized tensor ----------------------------------------------------------------------------------------------

@dataclass
class NF4Tensor:
    """A tensor of n elements in ceil(n / block) blocks, flat and row-major."""

    packed: torch.Tensor  # (ceil(n / 2),) uint8; the first of two elements in the high four bits
    absmax: torch.Tensor  # (blocks,) float32, or float8_e4m3fn after double quantization
    shape: torch.Size
    block: int
    scale: torch.Tensor | None = None  # double quantization only: (ceil(blocks / 256),) float32
    mean: torch.Tensor | None = None  # double quantization only: () float32

    def _tensors(self):
        return {name: t for name, t in vars(self).items() if isinstance(t, torch.Tensor)}

    @property
    def nbytes(self):
        return sum(t.nbytes for t in self._tensors().values())

    @property
    def bits_per_weight(self):
        return 8 * self.nbytes / self.shape.numel()

    def to(self, device):
        return replace(self, **{name: t.to(device) for name, t in self._tensors().items()})

    def block_absmax(self):
        """-> (blocks,) float32, whether or not the absmax are themselves quantized."""
        if self.scale is None:
            return self.absmax
        per_block = self.scale.repeat_interleave(256)[: len(self.absmax)]
        # rounding can push a block of tiny weights below zero, which would flip their signs
        return (self.absmax.float() * per_block + self.mean).clamp_(min=0)


def _double_quantize(absmax):
    """(blocks,) float32 -> (blocks,) float8_e4m3fn, (ceil(blocks / 256),) float32 scales, () mean (QLoRA, section 3).

    absmax are all positive: without the mean, half of the 8-bit numbers would never be used. 448 is the largest number
    of float8_e4m3fn, so scale = largest / 448 uses its whole range.
    """
    mean = absmax.mean()
    centred = F.pad(absmax - mean, (0, -len(absmax) % 256)).view(-1, 256)  # (ceil(blocks / 256), 256)
    scale = (centred.abs().amax(dim=1) / 448).clamp_(min=1e-38)  # equal absmax: 0 / tiny, not 0 / 0
    codes = (centred / scale[:, None]).to(torch.float8_e4m3fn)
    return codes.flatten()[: len(absmax)].clone(), scale, mean


# ---- quantize and dequantize -----------------------------------------------------------------------------------------

def quantize(weight, block):
    """weight of any shape, n elements -> packed (ceil(n / 2),) uint8, absmax (blocks,) float32 (QLoRA, equation 1).

    In the last bit, which decides ties, as bitsandbytes: w times the reciprocal of absmax, not divided by it.
    """
    scaled, absmax = scale_blocks(weight, block)
    codes = torch.bucketize(scaled, MIDPOINTS.to(weight.device), out_int32=True)  # how many midpoints lie below
    first, second = codes.to(torch.uint8).view(-1, 2).unbind(1)
    return (first * 16 + second)[: (weight.numel() + 1) // 2], absmax


def scale_blocks(weight, block):
    """weight of any shape -> its blocks over their absmax (blocks, block), in [-1, 1], and absmax (blocks,), float32."""
    blocks = F.pad(weight.float().reshape(-1), (0, -weight.numel() % block)).view(-1, block)  # zeros: same absmax
    absmax = blocks.abs().amax(dim=1)
    return blocks * (1 / absmax.clamp(min=1e-38))[:, None], absmax  # zeros stay zeros


def dequantize(packed, absmax, shape, block, dtype):
    """What quantize gave -> a tensor of that shape. Multiplied in float32 and rounded to dtype once, at the end."""
    n = shape.numel()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]
    levels = CODEBOOK.to(packed.device)[codes.int()]  # as bytes they would be taken for a mask
    return (levels * absmax.repeat_interleave(block)[:n]).to(dtype).view(shape)


@torch.no_grad()
def quantize_nf4(weight, block=64, double=False):
    """Any shape, any floating dtype -> NF4Tensor. Codes and absmax equal those of bitsandbytes.

    block: elements that share one absmax, even. double: quantize the absmax too (4.127 in place of 4.5 bits per weight
    at block 64). Raises ValueError for an impossible block, UserError for weights that are not finite.
    """
    if block < 2 or block % 2:
        raise ValueError(f"block is {block}: it must be an even number of elements, because two share a byte")
    if weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"cannot quantize a {weight.dtype} tensor of shape {tuple(weight.shape)}")
    fast = nf4.quantizes(weight.device, weight.numel(), block)
    packed, absmax = nf4.quantize(weight, CODEBOOK, block) if fast else quantize(weight, block)
    if not torch.isfinite(absmax).all():
        raise UserError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity, which 4 bits cannot store:"
                        " use a checkpoint from before training went wrong")
    absmax, scale, mean = _double_quantize(absmax) if double else (absmax, None, None)
    return NF4Tensor(packed, absmax, weight.shape, block, scale, mean)


@torch.no_grad()
def dequantize_nf4(q, dtype=torch.float32):
    """NF4Tensor -> tensor of its shape, by dequantize or, the same numbers, by its fast twin."""
    absmax = q.block_absmax()
    if nf4.dequantizes(q.packed.device, q.shape.numel(), q.block):
        return nf4.dequantize(q.packed, absmax, CODEBOOK, q.shape, q.block, dtype)
    return dequantize(q.packed, absmax, q.shape, q.block, dtype)


# ---- the frozen linear layer -----------------------------------------------------------------------------------------

def _rows(q, dtype):
    """An NF4Tensor, or a weight of another dtype -> yields (a slice of its rows, those rows of W' (out, in)), piece
    after piece."""
    if isinstance(q, torch.Tensor):
        for rows, *_ in nf4.row_pieces(q.shape, q.shape[1], q.device):
            yield rows, q[rows].to(dtype)
        return
    absmax = q.block_absmax()
    for rows, packed, blocks in nf4.row_pieces(q.shape, q.block, q.packed.device):
        shape = torch.Size([rows.stop - rows.start, q.shape[1]])
        yield rows, dequantize_nf4(NF4Tensor(q.packed[packed], absmax[blocks], shape, q.block), dtype)


class _FrozenMatmul(torch.autograd.Function):
    """y = x W'^T + bias for x (N, in). Autograd would keep W' for the backward pass, which would undo the saving: here
    only what is stored is kept, and W' is computed a second time."""

    @staticmethod
    def forward(ctx, x, bias, q):
        ctx.q = q
        y = x.new_empty(x.size(0), q.shape[0])  # (N, out)
        for rows, W in _rows(q, x.dtype):
            torch.mm(x, W.t(), out=y[:, rows])
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, grad):  # (N, out)
        need_x, need_bias, _ = ctx.needs_input_grad
        grad_x = grad.new_zeros(grad.size(0), ctx.q.shape[1]) if need_x else None  # (N, in)
        for rows, W in _rows(ctx.q, grad.dtype) if need_x else ():
            grad_x = grad_x.addmm_(grad[:, rows], W)
        return grad_x, grad.sum(dim=0) if need_bias else None, None


class FrozenLinear(nn.Module):
    """A frozen nn.Linear whose weight (out, in) stays in the dtype that its file has; the bias stays, frozen too.

    x (..., in) -> (..., out) of x's dtype. Under autocast the product is computed in autocast's dtype.
    """

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.store(linear.weight.detach())

    def store(self, weight):
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def stored(self):
        return self.weight

    def forward(self, x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        flat = x.to(dtype).reshape(-1, self.in_features)  # (N, in)
        y = _FrozenMatmul.apply(flat, bias, self.stored)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)  # (..., out)


def freeze(linear):
    """For a base that is not trained: nn.Linear -> itself, or a FrozenLinear where its weight has fewer bits than what
    it is multiplied with."""
    return linear.requires_grad_(False) if linear.weight.itemsize >= 4 else FrozenLinear(linear)


NO_FLOAT8 = {"mps"}  # devices that have no 8-bit floats


class NF4Linear(FrozenLinear):
    """The same with its weight in NF4."""

    bits = 4.5  # at most, of a weight in blocks of 64

    def __init__(self, linear, block=64, double=True):
        self.block, self.double = block, double
        super().__init__(linear)

    def store(self, weight):
        q = quantize_nf4(weight, self.block, self.double)
        for name in ("packed", "absmax", "scale", "mean"):
            self.register_buffer(name, getattr(q, name))

    @classmethod
    def from_weight(cls, weight, bias=None, block=64, double=True):
        """weight (out, in), bias (out,) or None, as read from a file."""
        linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")  # no memory, no random numbers
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return cls(linear, block, double)

    @property
    def stored(self):
        return self.quantized

    @property
    def quantized(self):
        shape = torch.Size([self.out_features, self.in_features])
        return NF4Tensor(self.packed, self.absmax, shape, self.block, self.scale, self.mean)

    def _apply(self, fn, recurse=True):
        """.to(device) moves the weight; .bfloat16() and the like must not round its scales."""
        if self.absmax.dtype == torch.float8_e4m3fn and fn(torch.empty(0)).device.type in NO_FLOAT8:
            self.absmax, self.scale, self.mean = self.quantized.block_absmax(), None, None  # the same numbers, in 32 bits
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def extra_repr(self):
        return (f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, block={self.block}, "
                f"bits={self.quantized.bits_per_weight:.3f}")


def quantize_model(model, block=64, double=True):
    """Replaces each linear layer of the blocks by an NF4Linear, in place -> model.

    Embeddings, norms and the head stay floats: they are small, or rows of them are still trained. Each float weight is
    freed before the next is quantized. Where even one whole float model is too large, quantize while its file is read:
    checkpoints.load(folder, linear=NF4Linear). Raises UserError where there is nothing to quantize.
    """
    # paths, because a list of the layers would keep all of them alive
    paths = [path for path, layer in model.linears().items() if isinstance(layer, nn.Linear)]
    if not paths:
        raise UserError("there is no linear layer to quantize in the blocks of this model: is it quantized already?")
    for path in paths:
        model.replace(path, NF4Linear(model.get_submodule(path), block, double))
    return model


# ---- python quant.py -------------------------------------------------------------------------------------------------

def int4(weight, block=64):
    """What NF4 is compared with: weight rounded to 15 equally spaced levels, -absmax to absmax -> the same shape."""
    flat = F.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)  # (blocks, block)
    step = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-38) / 7
    return ((flat / step).round() * step).flatten()[: weight.numel()].view(weight.shape)


def errors_of(weight, block=64):
    """-> root mean square errors as shares of the weight's: NF4, NF4 with double quantization, absmax int4."""
    weight = weight.detach().float()
    versions = [dequantize_nf4(quantize_nf4(weight, block, double)) for double in (False, True)] + [int4(weight, block)]
    return [((version - weight).norm() / weight.norm()).item() for version in versions]


def print_codebook(block):
    """How the 16 levels come about, and what they cost on normally distributed weights."""
    derived = derive_codebook()
    print(f"offset = ((1 - 1/30) + (1 - 1/32)) / 2 = {OFFSET:.6f}: the outermost probability\n"
          "levels = normal quantiles of 8 probabilities above 1/2 and 7 below it, and 0, over the largest quantile\n\n"
          "code  bits   probability      derived         CODEBOOK")
    for code, (level, constant) in enumerate(zip(derived, CODEBOOK.tolist())):
        probability = NormalDist().cdf(level * NormalDist().inv_cdf(OFFSET))
        print(f"{code:4}  {code:04b}  {probability:11.6f}  {level:11.8f}  {constant:15.8f}")
    print(f"\nlargest difference {max(abs(a - b) for a, b in zip(derived, CODEBOOK.tolist())):.1e}")
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    single, double, uniform = errors_of(weight, block)
    print(f"\nroot mean square error on N(0, 1):  NF4 {single:.4f}   double {double:.4f}   int4 {uniform:.4f}")
    single, double = [quantize_nf4(weight, block, double).bits_per_weight for double in (False, True)]
    print(f"bits per weight:                    NF4 {single:.3f}    double {double:.3f}    int4 {single:.3f}")


def main(inspect, argv=None):
    """inspect: what looks into a checkpoint, (folder, block, file of a picture or None)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a checkpoint folder; without it: the codebook")
    parser.add_argument("--block", type=bounded(Positive), default=64, help="elements that share one absmax (default 64)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the codebook over the checkpoint's weights")
    args = parser.parse_args(argv)
    if args.block < 2 or args.block % 2:
        raise UserError(f"--block {args.block}: it must be an even number, because two weights share a byte")
    if args.plot and not args.folder:
        raise UserError("--plot draws the weights of a checkpoint: name its folder, as in "
                        "python quant.py out/base --plot nf4.png")
    if not args.folder:
        return print_codebook(args.block)
    inspect(args.folder, args.block, args.plot)


if __name__ == "__main__":
    from evals.weights import inspect  # it reads whole checkpoints and knows the island: both are above this file
    end_politely()
    main(inspect)
