"""LoRA: starts as the base, trains nothing else, scales by alpha/r, merges to what training saw, round-trips."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoints
import lora
from checkpoints import load
from common import hub
from common.errors import UserError
from common.flags import parse
from lora import LoRALinear, TrainedTokens, add_lora, lora_off, merge_lora
from evals import weights
from generate import generate
from model import GPT, GPTConfig, TokenMatrix, resize_vocab, token_logps
from quant import NF4Linear, dequantize_nf4, quantize_model

IDS = torch.tensor([[3, 47, 9, 49, 1, 30, 2, 47], [5, 6, 7, 8, 9, 10, 11, 49]])
NEW = [49, 47]  # out of order on purpose


def tiny(seed=0, nf4=False, **settings):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"block_size": 24, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16} | settings))
    for p in model.parameters():  # the usual initialisation is too small for a mistake to show
        nn.init.normal_(p, std=0.3)
    return quantize_model(model, block=32) if nf4 else model


def stir(model, seed=1):
    """Random values for whatever is trained: as if after training. B would otherwise be 0 and hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3, generator=generator)
    return model


def adapted(nf4=False, tokens=NEW, targets="all", dropout=0.0, rslora=False, **settings):
    model = tiny(nf4=nf4, **settings)
    add_lora(model, 4, 8, dropout, targets, rslora, tokens)
    return stir(model)


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer(nf4, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    return NF4Linear(linear, block=32) if nf4 else linear


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# ---- LoRALinear ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nf4", [False, True])
def test_it_starts_as_the_base_and_trains_nothing_else(nf4):
    base = layer(nf4)
    lora_layer = LoRALinear(base, 3, 6)
    x = torch.randn(5, 7, 24)
    assert torch.equal(lora_layer(x), base(x)), "it does not start as the base: B is not 0"
    assert lora_layer.lora_A.shape == (3, 24) and lora_layer.lora_B.shape == (40, 3)
    lora_layer(x).square().sum().backward()
    assert not lora_layer.lora_A.grad.any() and lora_layer.lora_B.grad.abs().min() > 0, "B starts at 0, A does not"
    assert {n for n, p in lora_layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert base.bias.grad is None


def test_A_is_uniform_within_one_over_the_square_root_of_its_inputs():
    A = LoRALinear(nn.Linear(400, 30), 64, 8).lora_A
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02) and abs(A.mean()) < 0.02 * bound


@pytest.mark.parametrize("rslora, scaling", [(False, 3.0), (True, 6.0)])  # 12 / 4 and 12 / sqrt(4)
def test_the_scale_by_hand(rslora, scaling):
    base = nn.Linear(2, 3, bias=False)
    nn.init.zeros_(base.weight)
    lora_layer = LoRALinear(base, 4, 12, rslora=rslora)
    lora_layer.lora_A.data = torch.tensor([[1.0, 2], [0, 1], [0, 0], [1, 0]])
    lora_layer.lora_B.data = torch.tensor([[1.0, 0, 0, 0], [0, 1, 5, 0], [0, 0, 0, 2]])
    # x = (10, 1): A x = (12, 1, 0, 10), B A x = (12, 1, 20)
    assert lora_layer(torch.tensor([10.0, 1])).tolist() == [12 * scaling, 1 * scaling, 20 * scaling], \
        "alpha / r is lost"


def test_dropout_falls_on_the_adapters_input_only():
    lora_layer = LoRALinear(layer(False), 4, 8, dropout=0.5)
    x = torch.randn(64, 24)
    base = lora_layer.frozen(x)
    assert torch.equal(lora_layer(x), base), "dropout falls on the base's input too"
    lora_layer.lora_B.data.normal_()
    torch.manual_seed(3)
    y = lora_layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert torch.allclose(y - base, 2 * dropped @ lora_layer.lora_A.T @ lora_layer.lora_B.T, atol=1e-5)
    lora_layer.eval()
    assert torch.allclose(lora_layer(x) - base, 2 * x @ lora_layer.lora_A.T @ lora_layer.lora_B.T, atol=1e-5)


@pytest.mark.parametrize("nf4", [False, True])
def test_gradients_equal_those_of_the_dense_sum(nf4):
    lora_layer = LoRALinear(layer(nf4), 4, 8)
    lora_layer.lora_B.data.normal_()
    x = torch.randn(6, 24, requires_grad=True)
    W = dequantize_nf4(lora_layer.frozen.quantized) if nf4 else lora_layer.frozen.weight.detach()
    A, B = (p.detach().clone().requires_grad_() for p in (lora_layer.lora_A, lora_layer.lora_B))
    dense = x @ (W + 2 * B @ A).T + lora_layer.frozen.bias
    ours = lora_layer(x)
    assert torch.allclose(ours, dense, atol=1e-5)
    wanted = torch.autograd.grad(dense.square().sum(), (x, A, B))
    found = torch.autograd.grad(ours.square().sum(), (x, lora_layer.lora_A, lora_layer.lora_B))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(2, 2), 0, 8)


# ---- TrainedTokens ---------------------------------------------------------------------------------------------------

def test_trained_rows_equal_dense_training_of_these_rows():
    """Through reading and head: against the whole matrix trained, with the gradients of the other rows thrown away."""
    dense, ours = tiny(), tiny()
    add_lora(ours, 4, 8, tokens=NEW)
    ours.embedding.rows.data += 0.5
    dense.embedding.weight.data[NEW] += 0.5
    mask = torch.ones_like(IDS)
    assert torch.allclose(ours(IDS), dense(IDS), atol=1e-5)
    for model in (dense, ours):
        token_logps(model, IDS, mask).sum().backward()
    assert torch.allclose(ours.embedding.rows.grad, dense.embedding.weight.grad[NEW], rtol=1e-4, atol=1e-4)
    assert dense.embedding.weight.grad[NEW].abs().min() > 1e-4  # the comparison is of something
    assert ours.embedding.frozen.weight.grad is None


@pytest.mark.parametrize("path", ["reading", "head"])
def test_each_of_the_two_uses_gives_its_own_gradient(path):
    torch.manual_seed(0)
    embedding = TokenMatrix(10, 6)
    tokens = TrainedTokens(embedding, [7, 2])
    tokens.rows.data += 1
    weight = embedding.weight.detach().clone()
    weight[[7, 2]] += 1
    weight.requires_grad_()
    ids, hidden = torch.tensor([[2, 3, 7, 2, 0]]), torch.randn(4, 6, requires_grad=True)
    ours, dense = (tokens(ids), weight[ids]) if path == "reading" else (tokens.logits(hidden), hidden @ weight.T)
    assert torch.allclose(ours, dense, atol=1e-5)
    scale = torch.randn(dense.shape)
    inputs = [hidden] if path == "head" else []
    wanted = torch.autograd.grad((dense * scale).sum(), [weight] + inputs)
    found = torch.autograd.grad((ours * scale).sum(), [tokens.rows] + inputs)
    assert torch.allclose(found[0], wanted[0][[7, 2]], atol=1e-5)
    if path == "head":  # the hidden state hears of the new columns
        assert torch.allclose(found[1], wanted[1], atol=1e-5)


def test_trained_rows_start_as_the_base_and_never_copy_the_matrix():
    embedding = TokenMatrix(5000, 64)
    tokens = TrainedTokens(embedding, [4999, 17])
    ids, hidden = torch.tensor([[17, 1, 4999]]), torch.randn(3, 64)
    assert torch.equal(tokens(ids), embedding(ids)) and torch.equal(tokens.logits(hidden), embedding.logits(hidden))
    with torch.profiler.profile(profile_memory=True) as profile:
        tokens.logits(tokens(ids)).sum().backward()
    assert tokens.rows.grad.any()
    assert max(event.cpu_memory_usage for event in profile.events()) < embedding.weight.nbytes / 4


def test_trained_tokens_refuse_repeats_and_strangers():
    for ids in ([1, 1], [50], [-1], []):
        with pytest.raises(ValueError, match="token ids"):
            TrainedTokens(TokenMatrix(50, 4), ids)


@pytest.mark.parametrize("nf4", [False, True])
def test_under_autocast(nf4):
    model = adapted(nf4=nf4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS)
    assert logits.dtype == torch.float32  # the head is not rounded, whatever autocast says
    exact = model(IDS)
    assert ((logits.float() - exact).abs().mean() / exact.abs().mean()).item() < 0.03
    logits.float().logsumexp(-1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


# ---- add_lora --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets, layers", [
    ("all", {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}),
    ("attention", {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16)}),
    ("c_proj", {"attn.c_proj": (16, 16), "mlp.c_proj": (64, 16)}),
    ("c_fc, attn.c_proj", {"mlp.c_fc": (16, 64), "attn.c_proj": (16, 16)}),
    (["mlp.c_proj"], {"mlp.c_proj": (64, 16)}),
])
@pytest.mark.parametrize("nf4", [False, True])
def test_targets_and_the_number_of_trainable_parameters(targets, layers, nf4):
    model = tiny(nf4=nf4)
    count = add_lora(model, 4, 8, targets=targets)
    found = {path for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert found == {f"blocks.{i}.{name}" for i in (0, 1) for name in layers}, "square layers only?"
    assert count == 2 * sum(4 * (n + m) for n, m in layers.values()) == trainable(model)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_tokens_are_counted_and_only_their_rows_are_trained():
    model, without = tiny(), tiny()
    assert add_lora(model, 4, 8, tokens=NEW + NEW[:1]) == add_lora(without, 4, 8) + 2 * 16
    assert model.embedding.ids.tolist() == NEW and isinstance(without.embedding, TokenMatrix)


def test_one_name_that_fits_nothing_is_refused_and_nothing_is_changed():
    model = tiny()
    with pytest.raises(UserError, match="'q_proj'.*attn.c_attn"):
        add_lora(model, 4, 8, targets="c_attn,q_proj")
    assert not lora.is_adapted(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="'proj'"):  # whole names, not endings of names
        add_lora(model, 4, 8, targets="proj")
    with pytest.raises(UserError, match="nothing would be trained"):
        add_lora(tiny(n_layer=0), 4, 8)
    add_lora(model, 4, 8)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, 4, 8)


@pytest.mark.parametrize("nf4", [False, True])
def test_training_changes_the_adapters_and_not_one_bit_of_the_base(nf4):
    model = tiny(nf4=nf4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    add_lora(model, 4, 8, tokens=NEW)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    def loss():
        return F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()
    first = loss()
    train(model, 5)
    after = {name.replace(".frozen.", "."): t for name, t in model.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert all(not torch.equal(p, trained[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert loss() < first - 0.3


def test_the_same_seed_gives_the_same_adapter():
    a, b = (tiny() for _ in range(2))
    for model in (a, b):
        torch.manual_seed(5)
        add_lora(model, 4, 8)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_checkpointed_activations_give_the_same_gradients():
    plain, recomputed = adapted().train(), adapted(checkpointing=True).train()
    for model in (plain, recomputed):
        model(IDS).logsumexp(-1).sum().backward()
    for p, q in zip(plain.parameters(), recomputed.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))


# ---- lora_off --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nf4", [False, True])
def test_lora_off_is_the_base_bit_for_bit_and_comes_back(nf4):
    model, base = adapted(nf4=nf4, dropout=0.3), tiny(nf4=nf4)  # dropout: off with the adapter
    with torch.no_grad():
        model.eval()
        trained = model(IDS)
        model.train()
        with lora_off(model):
            assert torch.equal(model(IDS), base(IDS)), \
                "the reference is not the base: rows of tokens or adapters are on"
            with lora_off(model):
                assert torch.equal(model(IDS), base(IDS))
            assert torch.equal(model(IDS), base(IDS))  # the inner one does not end the outer one
        assert torch.equal(model.eval()(IDS), trained) and not torch.allclose(trained, base(IDS), atol=0.1)
        with pytest.raises(RuntimeError), lora_off(model):
            raise RuntimeError
        assert torch.equal(model(IDS), trained)


# ---- merging ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("targets, bias, rslora",
                         [("all", True, False), ("attention", True, True), ("c_fc", False, False)])
def test_the_careful_merge_is_what_training_saw(nf4, targets, bias, rslora, tmp_path):
    model = adapted(nf4=nf4, targets=targets, bias=bias, rslora=rslora).eval()
    with torch.no_grad():
        trained = model(IDS)
        assert merge_lora(model) is model
        merged = model(IDS)
    assert (merged - trained).abs().max() < 1e-5 * max(1, trained.abs().max())
    assert {type(m) for m in model.modules()} == {type(m) for m in tiny().modules()}
    assert all(p.requires_grad for p in model.parameters()) and not lora.is_adapted(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(IDS), merged)


def test_the_simple_merge_is_bfloat16_plus_the_adapter_and_measurably_off_under_nf4():
    def lightly(nf4):  # as large as training makes it: the rounding of four bits is then not small beside it
        model = tiny(nf4=nf4)
        add_lora(model, 4, 8)
        for p in stir(model).parameters():
            p.data.mul_(0.3 if p.requires_grad else 1)
        return model.eval()

    with torch.no_grad():
        trained = lightly(nf4=True)(IDS)
        careful, simple = merge_lora(lightly(nf4=True)), lightly(nf4=False)
        layer = simple.blocks[1].mlp.c_fc
        expected = layer.frozen.weight.bfloat16().float() + 2 * layer.lora_B @ layer.lora_A  # alpha / r = 2
        merge_lora(simple, "simple")
        assert torch.equal(simple.blocks[1].mlp.c_fc.weight, expected)
        off_careful, off_simple = ((model(IDS) - trained).abs().mean().item() for model in (careful, simple))
    assert off_careful < 1e-6 and off_simple > 0.02


def test_merges_that_cannot_be():
    with pytest.raises(ValueError, match="floats"):
        merge_lora(adapted(nf4=True), "simple")
    with pytest.raises(ValueError, match="careful or simple"):
        merge_lora(adapted(), "quick")


# ---- generation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nf4", [False, True])
def test_cached_generation_with_adapters_is_the_plain_forward(nf4):
    model = adapted(nf4=nf4).eval()
    prompts = [[47, 3, 4], [5], [6, 49, 8, 9, 47]]
    for prompt, new in zip(prompts, generate(model, prompts, 8, temperature=0.0)):
        ids = list(prompt)
        for _ in range(8):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        assert new == ids[len(prompt):]


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("targets, tokens, rslora", [("all", NEW, False), ("attention", (), True),
                                                     (["blocks.1.attn.c_proj"], NEW, False)])
def test_save_and_load(tmp_path, nf4, targets, tokens, rslora):
    model = adapted(nf4=nf4, targets=targets, tokens=tokens, rslora=rslora, dropout=0.1).eval()
    head = {"score.weight": torch.randn(1, 16), "score.bias": torch.randn(1)}
    checkpoints.save_adapter(model, tmp_path / "a", "the-base", extra=head)
    again = tiny(nf4=nf4)
    count = checkpoints.load_adapter(again, tmp_path / "a")
    assert torch.equal(again.eval()(IDS), model(IDS))
    assert count == trainable(model)
    assert {m.dropout.p for m in again.modules() if isinstance(m, LoRALinear)} == {0.1}  # for training to go on with
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for name, tensor in checkpoints.read_extra(tmp_path / "a").items():
        assert torch.equal(head.pop(name), tensor)
    assert not head
    config = checkpoints.read_adapter_config(tmp_path / "a")
    assert config["nanoalign_nf4"] == ({"block": 32, "double": True} if nf4 else None)
    assert config["use_rslora"] is rslora
    assert config["trainable_token_indices"] == ({"wte": list(tokens)} if tokens else {})
    assert config["target_modules"] == {"all": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
                                        "attention": ["attn.c_attn", "attn.c_proj"]}.get(str(targets), ["transformer.h.1.attn.c_proj"])
    assert checkpoints.is_adapter(tmp_path / "a") and not checkpoints.is_adapter(tmp_path)


def test_names_in_the_files_are_pefts(tmp_path):
    checkpoints.save_adapter(adapted(targets="attention"), tmp_path, "b")
    gpt2 = "base_model.model.transformer"
    layers = [f"{gpt2}.h.{i}.attn.{layer}" for i in (0, 1) for layer in ("c_attn", "c_proj")]
    names = {f"{layer}.lora_{X}.weight" for layer in layers for X in "AB"}
    assert set(load_file(tmp_path / checkpoints.WEIGHTS)) == names | {f"{gpt2}.wte.token_adapter.trainable_tokens_delta"}
    config = json.loads((tmp_path / checkpoints.CONFIG).read_text())
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj"] and config["fan_in_fan_out"] is True
    assert config["trainable_token_indices"] == {"wte": NEW}
    assert {p.name for p in tmp_path.iterdir()} == {checkpoints.WEIGHTS, checkpoints.CONFIG}  # no temporary file is left


def test_an_adapter_is_a_small_part_of_its_base(tmp_path):
    model = tiny(n_embd=128, n_layer=4, vocab_size=2000)
    add_lora(model, 8, 16, tokens=[1999])
    checkpoints.save_adapter(model, tmp_path / "adapter", "b")
    merge_lora(model).save_pretrained(tmp_path / "whole")
    adapter, whole = (tmp_path / "adapter" / checkpoints.WEIGHTS, tmp_path / "whole" / "model.safetensors")
    numbers = 4 * 8 * (128 + 384 + 128 + 128 + 128 + 512 + 512 + 128) + 128  # layers * r * (in + out of each), one row
    assert 4 * numbers < adapter.stat().st_size < 4 * numbers + 8000 < whole.stat().st_size / 8


def test_a_write_that_fails_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    model = adapted()
    checkpoints.save_adapter(model, tmp_path, "b")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoints.save_adapter(stir(model, 2), tmp_path, "b")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_chat_tokens_beyond_the_bases_vocabulary_come_with_the_adapter(tmp_path):
    model = tiny()
    resize_vocab(model, 53)
    add_lora(model, 4, 8, tokens=[50, 51, 52])
    checkpoints.save_adapter(stir(model), tmp_path, "b")
    again = tiny()
    checkpoints.load_adapter(again, tmp_path)
    ids = torch.tensor([[50, 3, 52, 4]])
    assert again.config.vocab_size == 53 and torch.equal(again.eval()(ids), model.eval()(ids))


def test_tokens_of_another_matrix_are_refused(tmp_path):
    checkpoints.save_adapter(adapted(tokens=NEW), tmp_path, "b")
    path = tmp_path / checkpoints.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": {"wpe": [1]}}))
    with pytest.raises(UserError, match="trains tokens of wpe"):
        checkpoints.load_adapter(tiny(), tmp_path)


def test_training_goes_on_from_a_loaded_adapter_as_if_never_saved(tmp_path):
    model = train(adapted())
    checkpoints.save_adapter(model, tmp_path, "b")
    again = tiny()
    checkpoints.load_adapter(again, tmp_path)
    assert torch.equal(train(again)(IDS), train(model)(IDS))


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora"), ({"peft_type": "LOHA"}, "peft_type"), ({"task_type": "SEQ_CLS"}, "task_type"),
    ({"bias": "all"}, "bias"), ({"rank_pattern": {"c_attn": 2}}, "rank_pattern"), ({"something_new": 1}, "new"),
    ({"modules_to_save": ["wte"]}, "modules_to_save"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"r": None}, "no r,"), ({"r": 0}, "r = 0"), ({"r": 10 ** 9}, "r = 1000000000"), ({"lora_alpha": "8"}, "lora_alpha = '8'"),
    ({"nanoalign_nf4": {"block": 64}}, "no double"), ({"base_model_name_or_path": 5}, "its base is 5"),
    ({"trainable_token_indices": [-1]}, "-1"), ({"nanoalign_extra": [[]]}, "nanoalign_extra"),
])
def test_settings_that_would_make_another_model_are_refused(tmp_path, change, message):
    checkpoints.save_adapter(adapted(), tmp_path, "b")
    path = tmp_path / checkpoints.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        checkpoints.read_adapter_config(tmp_path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.read_adapter_config(tmp_path)
    with pytest.raises(UserError, match="not an adapter"):
        checkpoints.read_adapter_config(tmp_path / "nowhere")


A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(A), "is missing"),
    (lambda t: t.update({A: torch.zeros(5, 16)}), r"\(5, 16\)"),
    (lambda t: t.update({A.replace("h.0", "h.9"): torch.zeros(4, 16)}), "h.9"),
    (lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): torch.zeros(4)}), "magnitude"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(50, 16)}), "lm_head"),
    (lambda t: t.clear(), "no adapter"),
    (lambda t: t.pop("base_model.model.score"), "lacks score"),
])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    checkpoints.save_adapter(adapted(), tmp_path, "b", extra={"score": torch.ones(1)})
    tensors = load_file(tmp_path / checkpoints.WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / checkpoints.WEIGHTS)
    with pytest.raises(UserError, match=message):
        checkpoints.load_adapter(tiny(), tmp_path)
        checkpoints.read_extra(tmp_path)


def test_cut_or_missing_weights_are_refused(tmp_path):
    checkpoints.save_adapter(adapted(), tmp_path, "b")
    path = tmp_path / checkpoints.WEIGHTS
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load_adapter(tiny(), tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        checkpoints.load_adapter(tiny(), tmp_path)


# ---- from a folder to a model ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("nf4", [False, True])
def test_load_merged_quantizes_the_base_as_training_had_it(tmp_path, nf4):
    tiny().save_pretrained(tmp_path / "base")
    model = adapted(nf4=nf4).eval()
    checkpoints.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    with torch.no_grad():
        unmerged = load(tmp_path / "adapter", merge=False).eval()(IDS)
        merged = load(tmp_path / "adapter").eval()(IDS)
        simple = load(tmp_path / "adapter", how="simple").eval()(IDS)
        assert torch.equal(unmerged, model(IDS)) and torch.allclose(merged, unmerged, atol=2e-5)
        assert (simple - unmerged).abs().mean() > (0.01 if nf4 else 1e-4)


def test_where_the_base_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    (tmp_path / "out/base").mkdir(parents=True)
    absolute = str(tmp_path / "out/base")
    for name, found in (("out/base", "out/base"), ("../base", "out/adapter/../base"), (absolute, absolute),
                        ("gpt2", "gpt2"), ("openai-community/gpt2-medium", "gpt2-medium")):
        checkpoints.save_adapter(model, "out/adapter", name)
        assert checkpoints.base_of("out/adapter") == found
    for name, message in (("gone", "no folder gone and no folder out/adapter/gone"), ("", "--base"),
                          ("out/adapter", "out/adapter/out/adapter")):  # a base that is the adapter itself
        checkpoints.save_adapter(model, "out/adapter", name)
        with pytest.raises(UserError, match=message):
            checkpoints.base_of("out/adapter")


# ---- python lora.py --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with the island's tokenizer, and a QLoRA adapter on it."""
    from data.tokenizer import get_tokenizer

    folder, tok = tmp_path_factory.mktemp("lora"), get_tokenizer("tiny")
    base = tiny(vocab_size=tok.vocab_size)
    base.save_pretrained(folder / "base")
    tok.save(folder / "base")
    model = quantize_model(base)
    add_lora(model, 4, 8)
    checkpoints.save_adapter(stir(model), folder / "adapter", "../base")
    (folder / "text.txt").write_text("The ferry leaves at noon. " * 40)
    return folder, model.eval()


@pytest.mark.parametrize("how", ["careful", "simple"])
def test_the_script_merges(folders, tmp_path, how, capsys):
    folder, model = folders
    weights.merge(lora.Config(adapter=str(folder / "adapter"), out=str(tmp_path), merge=how))
    merged = GPT.from_pretrained(str(tmp_path)).eval()
    assert torch.allclose(merged(IDS), model(IDS), atol=2e-5) is (how == "careful")
    assert (tmp_path / "tokenizer.json").is_file() and f"the {how} merge" in capsys.readouterr().out


def test_the_script_compares(folders, capsys, monkeypatch):
    folder, _ = folders
    monkeypatch.setattr(weights.exam, "compare", lambda models, tok, run: print("island:", *models))
    weights.merge(lora.Config(adapter=str(folder / "adapter"), compare=True, text=str(folder / "text.txt")))
    out = capsys.readouterr().out
    rows = {words[0]: words for words in map(str.split, out.splitlines()) if words[1:2] == ["merge"]}
    largest, mean = ({how: float(words[column]) for how, words in rows.items()} for column in (2, 3))
    assert largest["careful"] < 1e-4 < 1e-2 < largest["simple"] and mean["careful"] < mean["simple"] < largest["simple"]
    assert "island: unmerged careful simple" in out


def test_logit_differences_by_hand():
    class Fixed(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, ids):
            return self.logits.expand(len(ids), -1, -1)

    a, b = Fixed([[1.0, 2], [3, 0]]), Fixed([[1.5, 2], [3, 4]])  # the second position's likeliest token changes
    assert weights.logit_differences(a, b, torch.zeros(3, 2, dtype=torch.long)) == (4.0, 4.5 / 4, 0.5)


@pytest.mark.parametrize("flags, message", [
    ([], "name an adapter"), (["--adapter", "x"], "what to do"), (["--adaptor", "x"], "did you mean --adapter"),
    (["--adapter", "x", "--out", "y", "--merge", "quick"], "--merge quick"),
    (["--adapter", "x", "--out", "y"], "not an adapter folder"),
])
def test_the_command_line_refuses_in_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        weights.merge(parse(lora.Config, argv=flags))
    assert "\n" not in str(error.value)
