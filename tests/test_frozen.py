"""A base that is not trained stays in its file's dtype: the same numbers as in float32, half the memory, and no copy is kept."""
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import checkpoints
import lora
import reward
from checkpoints import load
from common import hub
from common.errors import UserError
from data.tokenizer import get_tokenizer
from evals import benches
from generate import generate
from kernels import head
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig, resize_vocab, summed_logps, token_logps
from quant import FrozenLinear, NF4Linear, freeze, quantize_model

TOK = get_tokenizer("tiny")
IDS = torch.tensor([[3, 7, 9, 5, 1, 30, 2, 7], [5, 6, 7, 8, 9, 10, 11, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]])
NETWORKS = {"llama": lambda: Llama(LlamaConfig(32, 1029, 2, 4, 2, 24, 40, 6)), "tied": lambda: Llama(LlamaConfig(32, 1029, 2, 4, 2, 24, 40, 6, tie=True, qkv_bias=True)),
            "gpt2": lambda: GPT(GPTConfig(32, 1029, 2, 4, 24))}
KINDS = pytest.mark.parametrize("kind", NETWORKS)


def stir(model, seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=std, generator=generator)
    return model


def folder_of(kind, folder):
    """A folder whose weights are bfloat16, as they are published."""
    stir(NETWORKS[kind]()).save_pretrained(folder)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@KINDS
@torch.inference_mode()
def test_matrices_stay_bfloat16_and_give_the_same_numbers(tmp_path, kind):
    folder_of(kind, tmp_path)
    frozen, whole = load(tmp_path, linear=freeze).eval(), load(tmp_path).eval()
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert all(p.dtype == (torch.bfloat16 if p.dim() == 2 else torch.float32) for p in frozen.parameters())
    assert all(type(layer) is FrozenLinear for layer in frozen.linears().values())
    assert frozen(IDS).dtype == torch.float32 and torch.allclose(frozen(IDS), whole(IDS), atol=1e-4)
    prompts = [[3, 7], [5], list(range(20))]
    assert generate(frozen, prompts, 10, temperature=0.0) == generate(whole, prompts, 10, temperature=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(IDS).dtype == torch.float32 and torch.allclose(frozen(IDS), whole(IDS), atol=0.02 * whole(IDS).abs().max().item())


def test_what_is_float32_stays_as_it_is(tmp_path):
    NETWORKS["llama"]().save_pretrained(tmp_path)
    model = load(tmp_path, linear=freeze)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and {type(layer) for layer in model.linears().values()} == {nn.Linear}


@KINDS
@pytest.mark.parametrize("total", [summed_logps, lambda *a: token_logps(*a).sum()], ids=["kernel", "readable"])
@pytest.mark.parametrize("tokens", [[], [7, 5]], ids=["layers", "and tokens"])
def test_adapters_beside_it_get_the_same_gradients(tmp_path, kind, total, tokens):
    folder_of(kind, tmp_path)
    found = []
    for linear in (freeze, None):
        model = load(tmp_path, linear=linear)
        lora.add_lora(model, 3, 6, tokens=tokens)
        stir(model, 1)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        value = total(model, IDS, MASK)
        value.backward()
        found.append([value, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@KINDS
def test_quantized_while_read_is_quantized_from_the_same_numbers(tmp_path, kind):
    folder_of(kind, tmp_path)
    read, whole = load(tmp_path, linear=NF4Linear), quantize_model(load(tmp_path))
    assert all(torch.equal(a.packed, b.packed) for a, b in zip(read.linears().values(), whole.linears().values()))
    assert torch.allclose(read(IDS), whole(IDS), atol=1e-4) and read.embedding.weight.dtype == torch.bfloat16


def test_a_piece_of_the_vocabulary_at_a_time(monkeypatch):
    monkeypatch.setattr(head, "PIECE", 100)  # 4 rows of 24
    torch.manual_seed(0)
    hidden, weight, upstream = torch.randn(9, 24, requires_grad=True), torch.randn(50, 24).bfloat16(), torch.randn(9, 50)
    assert len(list(head.pieces(weight, torch.float32))) == 13 and len(list(head.pieces(weight, torch.bfloat16))) == 1
    (head.Logits.apply(hidden, weight) * upstream).sum().backward()
    found, hidden.grad = hidden.grad, None
    logits = hidden @ weight.float().t()
    (logits * upstream).sum().backward()
    assert torch.allclose(head.Logits.apply(hidden, weight), logits, atol=1e-5) and torch.allclose(found, hidden.grad, atol=1e-4)


def test_no_float_copy_of_a_weight_is_kept_for_the_backward_pass(tmp_path):
    model = load(folder_of("llama", tmp_path), linear=freeze)
    lora.add_lora(model, 3, 6)
    sizes = {p.numel() for p in model.parameters() if p.dtype == torch.bfloat16}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed_logps(model, IDS, MASK)
    assert kept and not [t for t in kept if t.numel() in sizes and t.dtype == torch.float32]


@KINDS
@pytest.mark.parametrize("linear", [freeze, NF4Linear], ids=["bfloat16", "NF4"])
def test_adapters_on_it_are_saved_read_and_merged(tmp_path, kind, linear):
    folder_of(kind, tmp_path / "base")
    model = load(tmp_path / "base", linear=linear)
    resize_vocab(model, 1031)
    lora.add_lora(model, 3, 6, tokens=[1029, 1030, 5])
    stir(model, 1).eval()
    checkpoints.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    beside, merged = load(tmp_path / "adapter", merge=False).eval(), load(tmp_path / "adapter").eval()
    assert torch.equal(beside(IDS), model(IDS)) and beside.embedding.frozen.weight.dtype == torch.bfloat16
    assert torch.allclose(merged(IDS), model(IDS), atol=1e-3) and {p.dtype for p in merged.parameters()} == {torch.float32}
    rows = model.embedding.rows.detach()
    assert torch.equal(merged.embedding.weight[[1029, 1030, 5]], rows), "trained rows were rounded to bfloat16"


def test_the_memory_that_it_asks_for(tmp_path, monkeypatch):
    folder_of("tied", tmp_path)
    free = []
    monkeypatch.setattr(hub, "free_memory", lambda: free[0])
    model = NETWORKS["tied"]()
    matrices, linears = (sum(p.numel() for p in ps if p.dim() == 2) for ps in (model.parameters(), (layer.weight for layer in model.linears().values())))
    rest = sum(p.numel() for p in model.parameters()) - matrices
    for linear, needed in ((None, 4 * matrices), (freeze, 2 * matrices), (NF4Linear, 2 * (matrices - linears) + 4.5 / 8 * linears)):
        free[:] = [needed + 4 * rest]
        load(tmp_path, linear=linear)
        free[:] = [needed + 4 * rest - 1]
        with pytest.raises(UserError, match="GB are free"):
            load(tmp_path, linear=linear)


# ---- a reward model has no head that writes --------------------------------------------------------------------------

@KINDS
@pytest.mark.parametrize("how", ["all weights", "LoRA", "QLoRA"])
def test_a_reward_model_leaves_out_a_head_of_its_own(tmp_path, kind, how):
    folder_of(kind, tmp_path / "base")
    network = load(tmp_path / "base", linear={"all weights": None, "LoRA": freeze, "QLoRA": NF4Linear}[how])
    if how != "all weights":
        lora.add_lora(network, 3, 6, tokens=[7, 5])
    model = stir(reward.RewardModel(network), 2)
    config = reward.Config(init=str(tmp_path / "base"), out=str(tmp_path / "out"))
    checkpoints.save_model(config, network, TOK, extra=model.head_tensors())
    file = tmp_path / "out" / ("model.safetensors" if how == "all weights" else checkpoints.WEIGHTS)
    assert not [name for name in load_file(file) if "lm_head" in name or "unembedding" in name]
    assert not [name for name, _ in model.named_parameters() if "unembedding" in name]
    lengths = torch.tensor([8, 5])
    for linear in (None, freeze):
        again = reward.RewardModel.from_pretrained(tmp_path / "out", linear).eval()
        assert torch.allclose(again(IDS, lengths), model.eval()(IDS, lengths), atol=1e-3)
    if kind == "llama":
        with pytest.raises(UserError, match="no head that could write"):
            load(tmp_path / "out")(IDS)


PASSING = """
import torch
kept = []
for _ in range(30):  # a layer: a large passing tensor and a small one that stays
    large = torch.ones(5 * 2 ** 20 + len(kept) * 2 ** 10)
    kept.append(torch.ones(2 ** 14))
    del large
"""


def test_a_process_does_not_grow_by_what_passes():
    peaks = benches.peak_memory("import torch\nfrom common import hub\nhub.give_back_at_once()", PASSING)
    if peaks is None:
        pytest.skip("this system does not tell a process its peak")
    assert peaks[1] - peaks[0] < 60  # MB: one of 20, not thirty
