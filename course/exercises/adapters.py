"""Lessons 4 and 5: low-rank adapters, and weights in four bits."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import quant
from common.errors import UserError
from course.exercise import Exercise
from lora import LoRALinear, merged_weight
from quant import CODEBOOK, MIDPOINTS, NF4Linear, dequantize_nf4

# ---- LoRA ------------------------------------------------------------------------------------------------------------

def lora_cases(draw):
    def case(B, n, out, r, alpha):
        return [draw(B, n), draw(out, n), draw(out), draw(r, n), draw(out, r), alpha]

    return [case(1, 2, 1, 1, 4), case(2, 3, 4, 2, 3), case(3, 6, 4, 4, 32)]


def adapter(W, A, B, alpha):
    with torch.device("meta"):
        return LoRALinear(nn.Linear(W.size(1), W.size(0)), A.size(0), alpha)


def of_layer(x, W, bias, A, B, alpha):
    tensors = {"frozen.weight": W, "frozen.bias": bias, "lora_A": A, "lora_B": B}
    return functional_call(adapter(W, A, B, alpha), tensors, (x,))


def weight_of(base):
    return dequantize_nf4(base.quantized) if isinstance(base, NF4Linear) else base.weight


def put_lora_forward(f):
    def forward(self, x):
        if self.off:
            return self.frozen(x)
        if self.rslora or self.training and self.dropout.p:
            raise UserError("lora_forward as you wrote it has neither --lora-dropout nor rslora: leave them out")
        bias = torch.zeros(self.frozen.out_features) if self.frozen.bias is None else self.frozen.bias
        return f(x, weight_of(self.frozen), bias, self.lora_A, self.lora_B, self.alpha)

    return {"lora.LoRALinear.forward": forward}


lora_forward = Exercise(
    '''
def lora_forward(x, W, bias, A, B, alpha):
    """A frozen linear layer and its low-rank adapter (Hu et al. 2021, equation 3 and section 4.1).

    x (N, in), W (out, in) and bias (out,) frozen, A (r, in), B (out, r), alpha a number -> (N, out).

        y = x W^T + bias + alpha/r x A^T B^T

    Hint: x A^T first, it is only (N, r). F.linear(x, W, bias) is x W^T + bias. r is A's number of rows.
    """
''',
    reference=of_layer, cases=lora_cases, grads=(0, 3, 4), shows=(LoRALinear.forward,),
    wrongs={
        "the scale alpha/r is missing": lambda x, W, b, A, B, alpha: F.linear(x, W, b) + x @ A.T @ B.T,
        "the adapter is scaled by alpha and not by alpha/r: another r needs another learning rate":
            lambda x, W, b, A, B, alpha: F.linear(x, W, b) + alpha * x @ A.T @ B.T,
        "the scale is r/alpha": lambda x, W, b, A, B, alpha: F.linear(x, W, b) + A.size(0) / alpha * x @ A.T @ B.T,
        "the frozen layer is scaled too":
            lambda x, W, b, A, B, alpha: alpha / A.size(0) * (F.linear(x, W, b) + x @ A.T @ B.T),
        "the frozen layer is left out": lambda x, W, b, A, B, alpha: alpha / A.size(0) * x @ A.T @ B.T,
        "the bias is left out": lambda x, W, b, A, B, alpha: x @ W.T + alpha / A.size(0) * x @ A.T @ B.T,
    },
    put=put_lora_forward, needs={"lora_dropout": 0.0}, scripts=("sft.py", "reward.py", "dpo.py", "ppo.py"),
    tests="tests/test_lora.py")


def of_merge(W, A, B, alpha):
    layer = adapter(W, A, B, alpha)
    layer.frozen.weight, layer.lora_A, layer.lora_B = (nn.Parameter(t, requires_grad=False) for t in (W, A, B))
    return merged_weight(layer, "careful")


def put_lora_merge(f):
    def full(layer, how):
        if not isinstance(layer, LoRALinear) or how == "simple" or layer.rslora:
            return merged_weight(layer, how)
        return f(weight_of(layer.frozen).detach(), layer.lora_A.detach(), layer.lora_B.detach(), layer.alpha)

    return {"lora.merged_weight": full}


lora_merge = Exercise(
    '''
def lora_merge(W, A, B, alpha):
    """One weight that does what the frozen weight and its adapter did together (Hu et al. 2021, section 4.1).

    W (out, in), A (r, in), B (out, r), alpha a number -> (out, in), a new tensor, such that x W_new^T is what
    lora_forward gave without the bias.

        W_new = W + alpha/r B A

    Hint: the product's shape says in which order A and B stand.
    """
''',
    reference=of_merge, cases=lambda draw: [[W, A, B, alpha] for _, W, _, A, B, alpha in lora_cases(draw)],
    shows=(merged_weight,),
    wrongs={
        "the scale alpha/r is missing": lambda W, A, B, alpha: W + B @ A,
        "the adapter is scaled by alpha and not by alpha/r": lambda W, A, B, alpha: W + alpha * B @ A,
        "the weight was rounded to bfloat16 first: that is the simple merge, beside weights that training never saw":
            lambda W, A, B, alpha: W.bfloat16().to(W.dtype) + alpha / A.size(0) * B @ A,
        "the adapter is subtracted": lambda W, A, B, alpha: W - alpha / A.size(0) * B @ A,
        "the frozen weight is left out": lambda W, A, B, alpha: alpha / A.size(0) * B @ A,
        "the sum is rounded to bfloat16": lambda W, A, B, alpha: (W + alpha / A.size(0) * B @ A).bfloat16().to(W.dtype),
    },
    put=put_lora_merge, tests="tests/test_lora.py")


# ---- blocks ----------------------------------------------------------------------------------------------------------

def blocks_of(weight, block):
    return F.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)


def absmax_by(weight, block, largest):
    blocks = blocks_of(weight, block)
    size = largest(blocks)
    return blocks / size.clamp(min=1e-38)[:, None], size


def absmax_cases(draw):
    zero = draw(2, 4)
    zero[0] = 0
    return [[draw(4), 2], [draw(3, 4), 4], [draw(3, 5), 4], [zero, 4]]


def put_absmax(f):
    def full(weight, block):
        scaled, absmax = f(weight.float(), block)
        codes = torch.bucketize(scaled, MIDPOINTS, out_int32=True).to(torch.uint8).view(-1, 2)
        return (codes[:, 0] * 16 + codes[:, 1])[: (weight.numel() + 1) // 2], absmax

    return {"quant.quantize": full}


absmax = Exercise(
    '''
def absmax(weight, block):
    """Blocks of a weight, each divided by its largest entry: the first half of quantization (Dettmers et al. 2023, QLoRA,
    equation 1).

    weight of any shape, float32, n elements in row-major order; block: elements that share a scale
    -> scaled (blocks, block), from -1 to 1, and absmax (blocks,). The last block is filled up with zeros.

        absmax_b = max |w| in block b,      scaled = w / absmax_b;      a block of zeros stays zeros

    Hint: F.pad(flat, (0, -n % block)) fills up. Which sign may the largest entry have?
    """
''',
    reference=quant.scale_blocks, cases=absmax_cases, doubles=False,
    wrongs={
        "the largest entry is taken with its sign: a block of negative weights is turned around or left too large":
            lambda w, block: absmax_by(w, block, lambda x: x.amax(1)),
        "one absmax serves the whole weight: a single large entry makes all others small":
            lambda w, block: absmax_by(w, block, lambda x: x.abs().max().expand(len(x))),
        "a block of zeros is 0 / 0": lambda w, block: (
            blocks_of(w, block) / blocks_of(w, block).abs().amax(1)[:, None], blocks_of(w, block).abs().amax(1)),
        "the scale is the standard deviation, and scaled leaves -1 ... 1":
            lambda w, block: absmax_by(w, block, lambda x: x.std(1)),
        "the scale is the mean size and not the largest":
            lambda w, block: absmax_by(w, block, lambda x: x.abs().mean(1)),
        "absmax is returned as its reciprocal": lambda w, block: (
            absmax_by(w, block, lambda x: x.abs().amax(1))[0], 1 / blocks_of(w, block).abs().amax(1).clamp(min=1e-38)),
    },
    put=put_absmax, tests="tests/test_quant.py")


# ---- NF4 -------------------------------------------------------------------------------------------------------------

def packed(codes):
    first, second = codes.to(torch.uint8).view(-1, 2).unbind(1)
    return first * 16 + second


def nf4_by(weight, codebook, block, code=None, pack=packed, largest=lambda x: x.abs().amax(1)):
    scaled, size = absmax_by(weight, block, largest)
    nearest = (scaled.flatten()[:, None] - codebook).abs().argmin(1)
    return pack(nearest if code is None else code(scaled.flatten(), codebook)), size


def put_nf4_quantize(f):
    def full(weight, block):
        n = weight.numel()
        flat = F.pad(weight.float().reshape(-1), (0, -n % block))  # the student's n is a multiple of block
        codes, absmax = f(flat, CODEBOOK, block)
        return codes[: (n + 1) // 2], absmax

    return {"quant.quantize": full}


nf4_quantize = Exercise(
    '''
def nf4_quantize(weight, codebook, block):
    """A weight in four bits an entry: the nearest of 16 levels (Dettmers et al. 2023, QLoRA, equation 1).

    weight (n,) float32, n a multiple of block, block even; codebook (16,) ascending from -1 to 1
    -> packed (n/2,) uint8 and absmax (n/block,) float32.

        code = argmin_c | codebook[c] - w / absmax_b |,      two codes to a byte, the first of the two in the high four bits

    Hint: first * 16 + second. No block is all zeros here.
    """
''',
    reference=lambda weight, codebook, block: quant.quantize(weight, block), doubles=False, shows=(quant.quantize,),
    cases=lambda draw: [[draw(n), CODEBOOK.clone(), block] for n, block in ((2, 2), (8, 4), (256, 64))],
    wrongs={
        "the two codes of a byte are exchanged":
            lambda *x: nf4_by(*x, pack=lambda codes: packed(codes.view(-1, 2).flip(1))),
        "the level below is taken and not the nearest": lambda *x: nf4_by(
            *x, code=lambda w, levels: (w[:, None] >= levels).sum(1).clamp(min=1) - 1),
        "the codes are those of 16 levels at equal distances, not of the codebook": lambda *x: nf4_by(
            *x, code=lambda w, levels: ((w + 1) * 7.5).round()),
        "one absmax serves all blocks": lambda *x: nf4_by(*x, largest=lambda w: w.abs().max().expand(len(w))),
        "the weights are not divided by absmax": lambda w, levels, block: (
            packed((w[:, None] - levels).abs().argmin(1)), w.view(-1, block).abs().amax(1)),
        "the largest entry is taken with its sign": lambda *x: nf4_by(*x, largest=lambda w: w.amax(1)),
    },
    put=put_nf4_quantize, tests="tests/test_quant.py")


def unpack(packed, swap=False):
    codes = torch.stack([packed >> 4, packed & 15], 1)
    return (codes.flip(1) if swap else codes).flatten().long()


def put_nf4_dequantize(f):
    def full(packed, absmax, shape, block, dtype):
        room = len(absmax) * block // 2  # the last block as if it were full
        flat = f(F.pad(packed, (0, room - len(packed))), absmax, CODEBOOK.to(packed.device), block)
        return flat[:shape.numel()].to(dtype).view(shape)

    return {"quant.dequantize": full}


nf4_dequantize = Exercise(
    '''
def nf4_dequantize(packed, absmax, codebook, block):
    """Back from four bits to weights (Dettmers et al. 2023, QLoRA, equation 2).

    packed (n/2,) uint8, two codes to a byte, the first in the high four bits; absmax (n/block,); codebook (16,)
    -> (n,) float32.

        w'_i = codebook[code_i] * absmax_b,      b = i // block

    Hint: packed >> 4 and packed & 15. repeat_interleave repeats each entry, repeat the whole row.
    """
''',
    reference=lambda packed, absmax, codebook, block: quant.dequantize(
        packed, absmax, torch.Size([2 * len(packed)]), block, torch.float32),
    cases=lambda draw: [[draw.ints(256, n // 2).to(torch.uint8), draw(n // block).abs(), CODEBOOK.clone(), block]
                        for n, block in ((2, 2), (8, 4), (256, 64))],
    doubles=False, shows=(quant.dequantize,),
    wrongs={
        "the two codes of a byte are exchanged": lambda packed, size, levels, block:
            levels[unpack(packed, swap=True)] * size.repeat_interleave(block),
        "the absmax are repeated as a row: entry i gets the scale of block i % blocks":
            lambda packed, size, levels, block:
            levels[unpack(packed)] * size.repeat(block),
        "absmax is left out": lambda packed, size, levels, block: levels[unpack(packed)],
        "all first codes come before all second ones": lambda packed, size, levels, block:
            levels[torch.cat([packed >> 4, packed & 15]).long()] * size.repeat_interleave(block),
        "the levels are at equal distances": lambda packed, size, levels, block:
            (unpack(packed) / 7.5 - 1) * size.repeat_interleave(block),
        "it divides by absmax": lambda packed, size, levels, block:
            levels[unpack(packed)] / size.repeat_interleave(block),
    },
    put=put_nf4_dequantize, tests="tests/test_quant.py", scripts=("sft.py", "dpo.py", "reward.py", "ppo.py"),
    needs={"nf4": True})


# ---- double quantization ---------------------------------------------------------------------------------------------

def double_by(absmax, centre=True, grouped=True, most=448, mean=None):
    average = absmax.mean() if mean is None else mean(absmax)
    centred = absmax - average if centre else absmax
    rows = F.pad(centred, (0, -len(absmax) % 256)).view(-1, 256)
    largest = rows.abs().amax(1) if grouped else rows.abs().max().expand(len(rows))
    scale = (largest / most).clamp(min=1e-38)
    return (rows / scale[:, None]).to(torch.float8_e4m3fn).flatten()[:len(absmax)], scale, average


double_quantization = Exercise(
    '''
def double_quantization(absmax):
    """The scales of the blocks in 8 bits, so that they cost 0.127 bits a weight and not 0.5 (QLoRA, section 3).

    absmax (blocks,) float32 -> codes (blocks,) torch.float8_e4m3fn, scale (groups,) float32, mean (), with a group for
    256 blocks each (the last one may have fewer), such that codes * scale + mean is nearly absmax.

        mean of all absmax;      scale_g = max |absmax - mean| in group g, over 448;      codes = (absmax - mean) / scale_g

    448 is the largest number of float8_e4m3fn.

    Hint: x.to(torch.float8_e4m3fn) rounds. All absmax are positive: without the mean half of the codes were never used.
    """
''',
    reference=lambda absmax: tuple(quant._double_quantize(absmax)), doubles=False, shows=(quant._double_quantize,),
    cases=lambda draw: [[draw(3).abs() + 1], [draw(256).abs()], [draw(600).abs() * torch.linspace(0.2, 3, 600)]],
    wrongs={
        "the mean is not subtracted: half of the 8-bit numbers are never used": lambda x: double_by(x, centre=False),
        "one scale serves all groups": lambda x: double_by(x, grouped=False),
        "the scale is not divided by 448: only the numbers from -1 to 1 are used": lambda x: double_by(x, most=1),
        "the scale uses 127, the largest number of int8, and not 448": lambda x: double_by(x, most=127),
        "the smallest absmax is subtracted and not the mean": lambda x: double_by(x, mean=lambda x: x.min()),
    },
    put=lambda f: {"quant._double_quantize": f}, needs={"nf4": True}, scripts=("sft.py", "dpo.py", "reward.py", "ppo.py"),
    tests="tests/test_quant.py")

EXERCISES = [lora_forward, lora_merge, absmax, nf4_quantize, nf4_dequantize, double_quantization]
