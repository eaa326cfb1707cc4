import copy
import math
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import quant
from common.errors import UserError
from evals.weights import validation_loss
from model import GPT
from kernels import nf4
from quant import CODEBOOK, MIDPOINTS, NF4Linear, dequantize_nf4, quantize_model, quantize_nf4

SHAPES = [(1,), (2,), (63,), (64,), (65,), (3, 5), (1, 64), (7, 129), (2, 3, 4, 5), (64, 100),
          (2 ** 18 + 70,), (96, 160), (160, 1024)]


@pytest.fixture(params=["readable", "fast"])
def version(request, monkeypatch):
    """The readable versions for all sizes; the fast ones wherever they are there, in pieces of 15 blocks of 64."""
    monkeypatch.setattr(nf4, "SMALL", 0 if request.param == "fast" else math.inf)
    monkeypatch.setattr(nf4, "PIECE", 1000)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(q):
    return torch.stack([q.packed >> 4, q.packed & 15], dim=1).flatten()[: q.shape.numel()]


def by_definition(weight, block):
    """Codes and absmax from the definition: the smallest of all 16 distances, the first of equal ones."""
    n = weight.numel()
    blocks = F.pad(weight.flatten(), (0, -n % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    distance = (blocks * (1 / absmax)[:, None]).double()[:, :, None] - CODEBOOK.double()  # (blocks, block, 16)
    return distance.abs().argmin(dim=2).flatten()[:n], absmax


def test_codebook_is_what_the_derivation_gives():
    derived = torch.tensor(quant.derive_codebook())
    assert len(CODEBOOK) == 16 and CODEBOOK.dtype == torch.float32
    assert (derived - CODEBOOK).abs().max() < 3e-7
    assert CODEBOOK[0] == -1 and CODEBOOK[7] == 0 and CODEBOOK[15] == 1
    assert (CODEBOOK.diff().max() / 2).item() == pytest.approx(0.1519036, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [64, 128, 6])
def test_codes_are_the_nearest_levels_for_every_shape(shape, block, version):
    weight = normal(*shape)
    q = quantize_nf4(weight, block)
    codes, absmax = by_definition(weight, block)
    assert q.shape == weight.shape and q.packed.numel() == -(-weight.numel() // 2)
    assert torch.equal(q.absmax, absmax)
    assert torch.equal(codes_of(q).long(), codes), \
        "not the nearest level: a midpoint, or blocks that run over rows, are wrong"
    expected = CODEBOOK[codes] * absmax.repeat_interleave(block)[: weight.numel()]
    assert torch.equal(dequantize_nf4(q), expected.view(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_error_bound_and_idempotence(shape, version):
    weight = normal(*shape)
    q = quantize_nf4(weight)
    once = dequantize_nf4(q)
    bound = 0.1519036 * q.absmax.repeat_interleave(64)[: weight.numel()].view(shape)
    assert ((once - weight).abs() <= bound * (1 + 1e-6)).all()
    again = quantize_nf4(once)
    assert torch.equal(again.packed, q.packed) and torch.equal(again.absmax, q.absmax)


def test_ties_go_to_the_lower_code_and_neighbours_to_their_side(version):
    above, below = torch.nextafter(MIDPOINTS, torch.tensor(2.0)), torch.nextafter(MIDPOINTS, torch.tensor(-2.0))
    weight = torch.cat([below, MIDPOINTS, above, torch.ones(19)])  # the ones make absmax 1, so nothing is rescaled
    expected = torch.cat([torch.arange(15), torch.arange(15), torch.arange(1, 16), torch.full((19,), 15)])
    assert torch.equal(codes_of(quantize_nf4(weight)).long(), expected)


def test_scaled_by_the_reciprocal_not_by_a_quotient(version):
    """The last bit decides on which side of a midpoint a weight falls: look for blocks where the two ways differ."""
    largest = torch.linspace(0.5, 0.99, 20000)
    second = largest * MIDPOINTS[-1]
    product, quotient = second * (1 / largest), second / largest
    differ = (product > MIDPOINTS[-1]) != (quotient > MIDPOINTS[-1])
    assert differ.any()
    weight = torch.stack([largest, second], dim=1)[differ]
    expected = 14 + (product[differ] > MIDPOINTS[-1]).long()
    assert torch.equal(codes_of(quantize_nf4(weight, block=2))[1::2].long(), expected)


def test_first_element_is_in_the_high_nibble():
    assert quantize_nf4(torch.tensor([1.0, -1.0])).packed.tolist() == [0xF0], "the nibbles are swapped"
    assert quantize_nf4(torch.tensor([1.0])).packed.tolist() == [0xF7]  # the missing second one counts as zero


def test_zero_and_tiny_blocks(version):
    weight = torch.cat([torch.zeros(64), normal(64), torch.full((64,), 1e-41), torch.zeros(3)])
    for double in (False, True):
        q = quantize_nf4(weight, double=double)
        back = dequantize_nf4(q)
        assert (codes_of(q)[:64] == 7).all() and (codes_of(q)[128:] == 7).all()
        assert torch.isfinite(back).all(), "divided by an absmax of 0"
        assert (back[:64] == 0).all() and (back[128:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, version):
    weight = normal(65, 64).to(dtype)
    q, wide = quantize_nf4(weight), quantize_nf4(weight.float())
    assert torch.equal(q.packed, wide.packed) and q.absmax.dtype == torch.float32 and torch.equal(q.absmax, wide.absmax)
    back = dequantize_nf4(q, dtype)
    assert back.dtype == dtype and torch.equal(back, dequantize_nf4(q).to(dtype))  # rounded once, from float32


def test_a_transposed_weight_is_read_row_by_row(version):
    weight = normal(96, 160)
    assert torch.equal(quantize_nf4(weight.t()).packed, quantize_nf4(weight.t().contiguous()).packed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad, version):
    weight = normal(100, 64)
    weight[70, 3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        quantize_nf4(weight)


@pytest.mark.parametrize("weight, block", [(torch.ones(64), 0), (torch.ones(64), 63), (torch.ones(0), 64),
                                           (torch.ones(64, dtype=torch.int32), 64)])
def test_impossible_arguments(weight, block):
    with pytest.raises(ValueError):
        quantize_nf4(weight, block)


def test_double_quantization_is_absmax_minus_mean_in_float8():
    weight = normal(1000, 640)  # 10,000 blocks: the last 256 of absmax are ragged
    q, single = quantize_nf4(weight, double=True), quantize_nf4(weight)
    assert q.absmax.dtype == torch.float8_e4m3fn and q.scale.shape == (40,) and q.mean.shape == ()
    assert torch.equal(q.packed, single.packed)
    for part, scale, codes in zip((single.absmax - single.absmax.mean()).split(256), q.scale, q.absmax.split(256)):
        assert scale == part.abs().max() / 448
        assert codes.float().abs().max() == 448
        # 3 bits of mantissa: at most 1/16 of the number, or half a step of the subnormal numbers
        assert ((codes.float() * scale - part).abs() <= torch.maximum(part.abs() / 16, scale * 2 ** -10) * 1.0001).all()


def test_bits_per_weight_and_what_double_quantization_costs():
    weight = normal(2048, 2048)
    single, double = quantize_nf4(weight), quantize_nf4(weight, double=True)
    assert single.bits_per_weight == 4.5
    assert 4.126 < double.bits_per_weight < 4.1275
    error, error_double, error_int4 = quant.errors_of(weight)
    assert error == pytest.approx(0.0920, abs=3e-4) and error_int4 == pytest.approx(0.1076, abs=3e-4)
    assert error < error_double < error * 1.005


def test_equal_absmax_survive_double_quantization():
    weight = normal(64).repeat(300)
    single, double = quantize_nf4(weight), quantize_nf4(weight, double=True)
    torch.testing.assert_close(dequantize_nf4(double), dequantize_nf4(single), rtol=1e-6, atol=0)


def test_double_quantization_never_flips_a_sign():
    """The smallest absmax lie far below the mean, where float8 is coarse: some come back below zero."""
    weight = torch.cat([normal(100, 64), 12 * normal(1, 64), normal(100, 64) * torch.logspace(-6, -1, 100)[:, None]])
    q = quantize_nf4(weight, double=True)
    q_scale = q.scale.repeat_interleave(256)[: len(q.absmax)]
    assert (q.absmax.float() * q_scale + q.mean < 0).any()  # the case exists
    assert (dequantize_nf4(q) * dequantize_nf4(quantize_nf4(weight)) >= 0).all()


# ---- the readable and the fast versions ------------------------------------------------------------------------------

def bits(tensor):
    return tensor.contiguous().view(torch.uint8)  # 0.0 is not -0.0 here


def hard(blocks, block, dtype):
    """Normal weights (blocks, block), of which the first blocks are: zeros of both signs, subnormal numbers, tiny ones,
    the largest ones; then the five floats around each midpoint, in blocks whose absmax is 1."""
    weight = normal(blocks, block)
    weight[0], weight[0, ::2] = 0.0, -0.0
    weight[1], weight[2] = weight[1] * 1e-41, weight[2] * 1e-38
    weight[3] *= 0.99 * torch.finfo(dtype).max / weight[3].abs().max()
    near = (MIDPOINTS.view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)).view(torch.float32).flatten()
    for row, part in enumerate(near.split(block - 1), start=4):
        weight[row, 0], weight[row, 1 : len(part) + 1] = 1.0, part
    return weight.to(dtype)


# less than a block, ragged pieces, all at once
@pytest.mark.parametrize("piece, number", [(10, 1), (1000, 1), (nf4.PIECE, 1), (2 ** 14, 2)])
@pytest.mark.parametrize("block", [2, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_and_readable_agree_bit_for_bit(dtype, block, piece, number, threads, monkeypatch):
    monkeypatch.setattr(nf4, "PIECE", piece)
    threads(number)
    blocks = 3 * 2 ** 15 // block if piece > 1000 else 90
    weight = hard(blocks, block, dtype).view(-1, 3 * block // 2)  # rows that are no whole number of blocks
    packed, absmax = nf4.quantize(weight, CODEBOOK, block)
    expected, expected_absmax = quant.quantize(weight, block)
    assert torch.equal(packed, expected) and torch.equal(absmax, expected_absmax)
    for out in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        back = nf4.dequantize(packed, absmax, CODEBOOK, weight.shape, block, out)
        readable = quant.dequantize(packed, absmax, weight.shape, block, out)
        assert back.shape == weight.shape and back.dtype == readable.dtype == out
        assert torch.equal(bits(back), bits(readable))


@pytest.mark.parametrize("shape, block, fast", [
    ((256, 64), 64, True), ((96, 200), 64, True), ((256, 66), 6, True),  # blocks need not end where a row does
    ((255, 64), 64, False),  # small
    ((2 ** 14 + 1,), 64, False), ((130, 130), 64, False)])  # ragged
def test_which_version_does_it(shape, block, fast, monkeypatch):
    weight, called = normal(*shape), []

    def watch(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: called.append((module, name)) or real(*arguments))

    for module in (nf4, quant):
        watch(module, "quantize")
        watch(module, "dequantize")
    dequantize_nf4(quantize_nf4(weight, block, double=True), torch.bfloat16)
    assert called == [(nf4 if fast else quant, "quantize"), (nf4 if fast else quant, "dequantize")]


def test_a_gpu_uses_the_kernel_for_any_number_of_elements_where_triton_is_there(monkeypatch):
    cuda, mps = torch.device("cuda"), torch.device("mps")
    monkeypatch.setattr(nf4, "triton", object())
    assert nf4.dequantizes(cuda, 65, 6) and not nf4.quantizes(cuda, 2 ** 20, 64)
    assert not nf4.dequantizes(mps, 2 ** 20, 64)
    monkeypatch.setattr(nf4, "triton", None)
    assert not nf4.dequantizes(cuda, 2 ** 20, 64) and nf4.dequantizes(torch.device("cpu"), 2 ** 20, 64)


def test_cells_hold_at_most_one_midpoint():
    levels = CODEBOOK.tolist()
    left_code, midpoint = nf4.cell_tables(tuple(levels))
    assert midpoint.isfinite().sum() == 15 and left_code.tolist() == sorted(left_code.tolist())
    for between in ([0.002, 0.004], [1 / 16]):  # two midpoints in one cell; one on an edge
        with pytest.raises(ValueError, match="midpoints"):
            nf4.cell_tables(tuple(levels[:8] + between + levels[8:]))


def test_another_codebook_is_not_taken_for_the_last_one():
    packed, absmax = quant.quantize(normal(64), 64)
    other = CODEBOOK.flip(0)
    back = [nf4.dequantize(packed, absmax, book, torch.Size([64]), 64, torch.float32) for book in (CODEBOOK, other)]
    levels = other[codes_of(quantize_nf4(normal(64))).int()]
    assert torch.equal(back[1], levels * absmax) and not torch.equal(*back)


@pytest.mark.parametrize("shape, block", [((1001, 2500), 64), ((7, 5), 64), ((4096, 4096), 64), ((5000, 1000), 6),
                                          ((3, 2 ** 21), 64)])
def test_pieces_of_rows_begin_with_a_block_and_leave_nothing_out(shape, block):
    n = shape[0] * shape[1]
    row = byte = 0
    for rows, packed, absmax in nf4.row_pieces(shape, block, torch.device("cpu")):
        first, last = rows.start * shape[1], rows.stop * shape[1]
        assert rows.start == row and first % block == 0 and absmax == slice(first // block, math.ceil(last / block))
        assert packed == slice(byte, math.ceil(last / 2)) and byte == first // 2
        assert last - first <= max(2 ** 20, block * shape[1])
        row, byte = rows.stop, packed.stop
    assert row == shape[0] and byte == math.ceil(n / 2)
    assert [piece[0] for piece in nf4.row_pieces(shape, block, torch.device("cuda"))] == [slice(0, shape[0])]


@pytest.mark.parametrize("number", [1, 3])
def test_tables_and_threads_serve_every_mode_and_device(number, threads, monkeypatch):
    """Modes are kept per thread. The tables are made once: here in inference mode, where new tensors go elsewhere."""
    monkeypatch.setattr(nf4, "PIECE", 1000)
    threads(number)
    weight = normal(256, 64)
    expected = quant.quantize(weight, 64)
    back = quant.dequantize(*expected, weight.shape, 64, torch.float32)
    nf4.cell_tables.cache_clear()
    nf4.pair_table.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        inside = quantize_nf4(weight)
        back_inside = dequantize_nf4(inside)
    outside = quantize_nf4(weight.requires_grad_())
    assert torch.equal(inside.packed, expected[0]) and torch.equal(back_inside, back)
    assert torch.equal(outside.packed, expected[0]) and torch.equal(dequantize_nf4(outside), back)
    assert not outside.absmax.requires_grad


@pytest.mark.parametrize("number, pieces", [(1, 3), (2, 1), (2, 3)])
def test_pieces_are_done_alone_and_leave_the_threads_as_they_were(number, pieces, threads):
    threads(number)
    done = []
    nf4.in_pieces(lambda part: done.append((part, torch.get_num_threads())), 16 * pieces, 16)
    assert sorted(done, key=lambda item: item[0].start) == [(slice(16 * i, 16 * i + 16), 1) for i in range(pieces)]
    assert torch.get_num_threads() == number

    with pytest.raises(ZeroDivisionError):  # what a thread raises is raised
        nf4.in_pieces(lambda part: 1 / 0, 16 * pieces, 16)
    assert torch.get_num_threads() == number
    with ThreadPoolExecutor(1) as pool:  # a new thread takes the number that was set last
        assert pool.submit(lambda: torch.ones(1).sum() and torch.get_num_threads()).result() == number


# ---- the linear layer ------------------------------------------------------------------------------------------------

def pair(inputs, outputs, bias=True, block=64, double=True):
    """-> NF4Linear, and the nn.Linear that holds its dequantized weight."""
    torch.manual_seed(1)
    dense = nn.Linear(inputs, outputs, bias=bias)
    layer = NF4Linear(dense, block, double)
    dense.weight.data = dequantize_nf4(layer.quantized)
    return layer, dense


# 5 x 7 and 96 x 50: rows that do not begin with a block; 1001 x 2500: several pieces of rows
@pytest.mark.parametrize("inputs, outputs", [(64, 32), (5, 7), (96, 50), (1001, 2500)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_the_dense_layer_with_dequantized_weights(inputs, outputs, bias, double):
    layer, dense = pair(inputs, outputs, bias, double=double)
    x = normal(2, 3, inputs).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(twin)
    assert y.shape == (2, 3, outputs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    direction = normal(2, 3, outputs, seed=2)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences():
    layer, _ = pair(10, 6)
    layer.bias = nn.Parameter(normal(6).double())  # the bias may be trained
    x = normal(3, 10).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: quant._FrozenMatmul.apply(x, bias, layer.quantized), (x, layer.bias))
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), (x,))


def test_an_input_without_gradient_and_one_vector():
    layer, dense = pair(64, 32)
    assert not layer(normal(64)).requires_grad
    torch.testing.assert_close(layer(normal(64)), dense(normal(64)))
    assert layer(torch.empty(0, 64)).shape == (0, 32)


def test_base_is_frozen_and_bitwise_unchanged_by_training():
    layer, _ = pair(64, 64)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    head = nn.Linear(64, 1)
    model = nn.Sequential(nn.Linear(64, 64), layer, head)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4  # both nn.Linear, nothing of the layer
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    first = model[0].weight.detach().clone()
    for _ in range(3):
        model(normal(8, 64)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, first)  # the gradient went through the layer
    assert all(torch.equal(t.float(), before[name].float()) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(dtype, autocast):
    layer, dense = pair(64, 32)
    x = normal(4, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype and x.grad.dtype == dtype
    # computed in autocast's dtype: the same rounding as a bfloat16 layer, or none
    low = autocast or dtype == torch.bfloat16
    expected = F.linear(x.bfloat16(), dense.weight.bfloat16(), dense.bias.bfloat16()).to(dtype) if low else dense(x)
    torch.testing.assert_close(y, expected, rtol=2e-2 if low else 1e-5, atol=2e-2 if low else 1e-6)
    if autocast and dtype == torch.float32:
        assert torch.equal(y, y.bfloat16().float())


def test_no_float_weight_is_alive_after_forward_or_backward(monkeypatch):
    layer, _ = pair(1000, 2500)
    made = []

    def watched(q, dtype):
        weight = dequantize_nf4(q, dtype)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(quant, "dequantize_nf4", watched)
    y = layer(normal(4, 1000).requires_grad_())
    forward = len(made)
    assert forward > 1 and all(weight() is None for weight in made)
    y.sum().backward()
    assert len(made) == 2 * forward and all(weight() is None for weight in made)


MEMORY = """
import torch, quant
def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
weight = torch.randn(2048, 2048)
layers = [quant.NF4Linear.from_weight(weight) for _ in range(16)]
x = y = torch.randn(16, 2048, requires_grad=True)
torch.nn.functional.linear(x, weight[:64]).sum().backward()  # the libraries' own buffers
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the construction
before = status("VmRSS")
for layer in layers:
    y = layer(y)
y.sum().backward()
print(status("VmHWM") - before)
"""


@pytest.mark.runs
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
def test_peak_memory_of_a_deep_stack():
    """16 layers of 16 MB as floats: a dense stack, or one that kept its dequantized weights, would need 256 MB."""
    root = Path(quant.__file__).parent
    out = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, check=True)
    assert float(out.stdout) < 128


def test_state_dict_to_and_deepcopy():
    layer, _ = pair(64, 32)
    other = NF4Linear(nn.Linear(64, 32))
    assert not torch.equal(other.packed, layer.packed)
    other.load_state_dict(layer.state_dict())
    x = normal(4, 64)
    assert torch.equal(other(x), layer(x))
    half = copy.deepcopy(layer).bfloat16()  # the scales must not be rounded
    assert half.absmax.dtype == torch.float8_e4m3fn and half.scale.dtype == half.mean.dtype == torch.float32
    assert half.bias.dtype == torch.bfloat16
    assert torch.equal(dequantize_nf4(half.quantized), dequantize_nf4(layer.quantized))
    assert layer.to("meta").packed.device.type == "meta"


def test_from_weight():
    weight, bias = normal(32, 64), normal(32, seed=3)
    layer = NF4Linear.from_weight(weight, bias, double=False)
    expected = F.linear(normal(4, 64), dequantize_nf4(quantize_nf4(weight)), bias)
    torch.testing.assert_close(layer(normal(4, 64)), expected)
    assert layer.scale is None and NF4Linear.from_weight(weight).bias is None
    assert "64, 32" in repr(layer) and "bits=4.5" in repr(layer)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(ln=nn.LayerNorm(64), fc=nn.Linear(64, 128), proj=nn.Linear(128, 64)))
                               for _ in range(2))
        self.lm_head = nn.Linear(64, 10)
        self.find_linears()

    linears, replace, find_linears = GPT.linears, GPT.replace, GPT.find_linears


def test_quantize_model_replaces_the_linear_layers_of_the_blocks_only():
    model = Tiny()
    weights = [weakref.ref(m.weight) for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    assert quantize_model(model) is model
    kinds = [type(m).__name__ for block in model.blocks for m in block.values()]
    assert kinds == ["LayerNorm", "NF4Linear", "NF4Linear"] * 2
    assert type(model.lm_head) is nn.Linear and type(model.embedding) is nn.Embedding
    assert len(weights) == 4 and all(weight() is None for weight in weights)  # the floats are gone
    with pytest.raises(UserError, match="no linear layer"):
        quantize_model(model)


def test_quantize_model_frees_each_weight_before_the_next(monkeypatch):
    model, alive = Tiny(), []
    weights = [weakref.ref(m.weight) for m in model.blocks.modules() if isinstance(m, nn.Linear)]

    def counting(*arguments):
        alive.append(sum(weight() is not None for weight in weights))
        return quantize_nf4(*arguments)

    monkeypatch.setattr(quant, "quantize_nf4", counting)
    quantize_model(model)
    assert alive == [4, 3, 2, 1]


def test_validation_loss_is_the_mean_over_all_next_tokens():
    """A model whose logits depend on the position in the window alone: each target's loss is known."""
    V, length = 7, 5
    table = normal(length, V)

    class Fake:
        config, device = SimpleNamespace(block_size=length), "cpu"

        def __call__(self, ids):
            return table[: ids.size(1)].expand(len(ids), -1, -1)

    ids = torch.randint(V, (13,), generator=torch.Generator().manual_seed(0))
    expected = sum(-table[i % length].log_softmax(0)[ids[i + 1]] for i in range(12)) / 12
    assert validation_loss(Fake(), ids) == pytest.approx(expected.item(), rel=1e-6)


# ---- on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) -------------------------------------------------------

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(nf4.triton is None or not (torch.cuda.is_available() or INTERPRETED), reason="no GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [64, 6])
def test_triton_kernel_equals_the_reference(shape, dtype, block):
    for double in (False, True):
        q = quantize_nf4(normal(*shape), block, double)
        there = q.to("cpu" if INTERPRETED else "cuda")
        out = nf4.dequantize_triton(there.packed, there.block_absmax(), CODEBOOK, q.shape, block, dtype).cpu()
        # the interpreter cuts bfloat16 off where a GPU rounds
        cut = INTERPRETED and dtype == torch.bfloat16
        torch.testing.assert_close(out, dequantize_nf4(q, dtype), rtol=2 ** -7 if cut else 0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quantizing_on_the_gpu_gives_the_same_bytes():
    weight = normal(640, 1000)
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    assert torch.equal(here.packed, there.packed.cpu()) and torch.equal(here.absmax, there.absmax.cpu())
    layer, dense = pair(640, 100)
    x = weight.view(-1, 640)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), dense(x), rtol=1e-4, atol=1e-4)
