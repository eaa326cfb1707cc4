"""Codes, absmax and dequantized weights against bitsandbytes' own kernels, bit for bit."""
import math

import pytest
import torch

from kernels import nf4
from quant import NF4Linear, dequantize_nf4, quantize_nf4

peer = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(1, 64), (1, 128), (64, 1), (2, 3), (3, 5), (7, 9), (1, 65), (5, 100), (33, 129), (96, 160), (257, 63),
          (768, 2304), (1600, 1600)]


@pytest.fixture(params=["readable", "fast"], autouse=True)
def version(request, monkeypatch):
    monkeypatch.setattr(nf4, "SMALL", 0 if request.param == "fast" else math.inf)


def codes(packed, n):
    packed = packed.flatten()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_absmax(shape, block, dtype):
    weight = normal(*shape, dtype=dtype)
    packed, state = peer.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    q = quantize_nf4(weight, block)
    assert torch.equal(q.absmax, state.absmax)
    assert torch.equal(codes(q.packed, weight.numel()), codes(packed, weight.numel()))
    assert torch.equal(q.packed, packed.flatten())  # the nibble that pads an odd number of elements too


CORNERS = {"zero": torch.zeros(2, 64), "denormal": torch.full((2, 64), 1e-41), "huge": torch.full((2, 64), 3e38),
           "equal": torch.ones(2, 64), "linear": torch.linspace(-1, 1, 128).view(2, 64),
           "tiny": torch.tensor([1e-30, -1e-38] * 64).view(2, 64)}


@pytest.mark.parametrize("corner", CORNERS)
def test_corner_cases(corner):
    weight = CORNERS[corner]
    packed, state = peer.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    q = quantize_nf4(weight)
    assert torch.equal(q.packed, packed.flatten()) and torch.equal(q.absmax, state.absmax)


def test_every_float_around_every_midpoint():
    """The 129 floats on both sides of each midpoint, in blocks whose absmax is 1."""
    code = peer.get_4bit_type("nf4", device="cpu")
    midpoints = (code[:-1] + code[1:]) / 2
    bits = midpoints.view(torch.int32)[:, None] + torch.arange(-64, 65, dtype=torch.int32)  # (15, 129)
    near = bits.view(torch.float32).flatten()
    near = torch.cat([near, near.new_zeros(-len(near) % 63)]).view(-1, 63)
    weight = torch.cat([near, torch.ones(len(near), 1)], dim=1)  # (blocks, 64)
    packed, _ = peer.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(quantize_nf4(weight).packed, packed.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (768, 2304), (5, 1600)])
def test_dequantized_weights(shape, dtype):
    """Only rows that are a multiple of the block: for others bitsandbytes 0.50 takes the wrong absmax on the CPU."""
    weight = normal(*shape)
    packed, state = peer.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = torch.ops.bitsandbytes.dequantize_4bit(packed, state.absmax, 64, "nf4", weight.shape, dtype)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight), dtype), theirs)


def test_forward():
    torch.manual_seed(0)
    dense = torch.nn.Linear(768, 256)
    x = normal(4, 768)
    packed, state = peer.quantize_4bit(dense.weight.data, blocksize=64, quant_type="nf4")
    theirs = torch.nn.functional.linear(x, peer.dequantize_4bit(packed, state), dense.bias)
    torch.testing.assert_close(NF4Linear(dense, double=False)(x), theirs, rtol=1e-5, atol=1e-5)
