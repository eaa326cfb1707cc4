"""The GPT: causal, dropout really off, cached generation equals the plain model, folders round-trip."""
import json
import math

import pytest
import torch

import generate as generating
import pretrain
from common.errors import UserError
from generate import generate, sample, stream
from model import GPT, GPTConfig, resize_vocab, token_logps


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"block_size": 24, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16} | settings))
    for p in model.parameters():  # the usual initialisation is too small for a mistake to show
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_causal_and_all_positions():
    model, ids = tiny(), torch.randint(50, (2, 10))
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 50
    a, b = model(ids), model(changed)
    assert a.shape == (2, 10, 50)
    assert torch.equal(a[:, :6], b[:, :6]), "a position sees what comes after it"
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_a_block_by_hand():
    block, x = tiny().double().blocks[0], 3e-3 * torch.randn(2, 5, 16).double()  # so small that a norm's eps counts

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def attention(x):
        q, k, v = block.attn.c_attn(x).view(2, 5, 3, 2, 8).unbind(2)  # (B, T, heads, head size)
        y = torch.zeros_like(q)
        for t in range(5):
            scores = torch.stack([(q[:, t] * k[:, s]).sum(-1) / 8 ** 0.5 for s in range(t + 1)], dim=-1)
            y[:, t] = (scores.softmax(-1)[..., None] * v[:, :t + 1].transpose(1, 2)).sum(2)
        return block.attn.c_proj(y.flatten(2))

    middle = x + attention(norm(x, block.ln_1))
    assert torch.allclose(block(x), middle + block.mlp(norm(middle, block.ln_2)), rtol=0, atol=1e-9)


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    assert model.blocks[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # 1 / sqrt(2 * 8 layers)
    assert model.blocks[7].attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model(torch.randint(500, (4, 64))).softmax(-1).max() < 0.02  # starts near the uniform distribution


@pytest.mark.parametrize("dropout", [{"dropout": 0.5}, {"attention_dropout": 0.5}, {"dropout": (0.0, 0.5)}])
def test_dropout_is_off_in_evaluation_and_on_in_training(dropout):
    model, plain, ids = tiny(**dropout), tiny(), torch.randint(50, (2, 10))
    assert not torch.allclose(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), plain(ids)), "dropout is on in evaluation: no ratio of PPO would be 1"


def test_dropout_ramp_goes_from_bottom_to_top():
    model = tiny(n_layer=4, dropout=(0.0, 0.3))
    assert [block.drop.p for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert model.drop.p == 0.0


def test_checkpointing_changes_no_gradient():
    ids, gradients = torch.randint(50, (3, 10)), []
    for checkpointing in (False, True):
        model = tiny(checkpointing=checkpointing, dropout=0.2)
        torch.manual_seed(1)
        pretrain.next_token_loss(model, ids).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients)), "recomputed with other dropout"


def test_next_token_loss_is_shifted_by_one():
    model, ids = tiny(), torch.randint(50, (2, 7))
    logps = model(ids).log_softmax(-1)
    by_hand = [logps[b, t, ids[b, t + 1]].item() for b in range(2) for t in range(6)]
    assert pretrain.next_token_loss(model, ids).item() == pytest.approx(-sum(by_hand) / 12, rel=1e-5), \
        "position t predicts t + 1"


# ---- generation ------------------------------------------------------------------------------------------------------

def greedy_by_hand(model, prompt, n, stop=None):
    """The uncached model, one prompt at a time, no padding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < n and len(ids) < model.config.block_size:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == stop:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 9, 4, 23, 2], [20, 1, 22, 7, 7, 13, 2, 18]])
@torch.inference_mode()
def test_cached_generation_equals_the_uncached_model_for_any_mix_of_lengths(lengths):
    model = tiny(seed=len(lengths)).eval()
    prompts = [torch.randint(50, (n,)).tolist() for n in lengths]
    expected = [greedy_by_hand(model, p, 12) for p in prompts]
    assert generate(model, prompts, 12, temperature=0.0) == expected, "a row sees padding, or another row's cursor"
    assert len(set(map(len, expected))) > 1 or max(lengths) < 12  # rows near the end of the context stop early


@torch.inference_mode()
def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    model = tiny(seed=3).eval()
    prompts = [torch.randint(50, (n,)).tolist() for n in (2, 3, 5, 7, 4, 6)]
    free = generate(model, prompts, 15, temperature=0.0)
    stop = next(token for row in free for token in row if 0 < sum(token in other for other in free) < len(free))
    stopped = generate(model, prompts, 15, temperature=0.0, stop=stop)
    assert stopped == [row[:row.index(stop) + 1] if stop in row else row for row in free]
    assert {len(row) == 15 for row in stopped} == {True, False}


@pytest.mark.parametrize("settings", [dict(temperature=0.8), dict(top_p=0.8), dict(top_k=5)])
@torch.inference_mode()
def test_sampling_takes_one_random_number_per_row_and_token(settings):
    model, generator = tiny(seed=4).eval(), torch.Generator().manual_seed(7)
    prompts, settings = torch.randint(50, (3, 6)), {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | settings
    ids = prompts
    for _ in range(10):  # the uncached model
        ids = torch.cat([ids, sample(model(ids)[:, -1], generator=generator, **settings)[:, None]], dim=1)
    assert generate(model, prompts.tolist(), 10, seed=7, **settings) == ids[:, 6:].tolist()


def test_a_stream_gives_each_token_when_it_is_sampled(monkeypatch):
    model, prompts = tiny(seed=3), [[1, 2, 3], [4], [5, 6]]
    stop = generate(model, prompts, 8, seed=2)[0][2]
    whole = generate(model, prompts, 8, stop=stop, seed=2)
    passes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args: passes.append(1) or hidden(*args))
    steps = []
    for tokens in stream(model, prompts, 8, stop=stop, seed=2):
        steps.append(tokens)
        assert len(passes) == len(steps)  # no pass is made before its token is wanted
    for row in range(3):
        assert [token for tokens in steps for r, token in tokens if r == row] == whole[row]
    assert [len(tokens) for tokens in steps] == [sum(len(row) > t for row in whole) for t in range(len(steps))]
    assert len(set(map(len, whole))) > 1


def test_training_mode_comes_back_however_a_stream_ends(monkeypatch):
    model = tiny(dropout=0.5)
    tokens = stream(model, [[1, 2]], 9)
    assert model.training and next(tokens) and not model.training and not torch.is_inference_mode_enabled()
    tokens.close()  # whoever asked wants no more
    assert model.training
    for _ in stream(model, [[1, 2]], 3):
        pass
    assert model.training
    monkeypatch.setattr(generating, "sample", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, [[1]], 3)
    assert model.training


def test_generation_is_seeded_and_leaves_training_mode_alone():
    model, prompts = tiny(dropout=0.5), [[1, 2, 3], [4]]
    a, b, c = (generate(model, prompts, 10, seed=s) for s in (0, 0, 1))
    assert a == b != c and model.training
    state = torch.get_rng_state()
    assert len({str(generate(model, prompts, 10)) for _ in range(3)}) > 1  # without a seed every call is another
    generate(model, prompts, 3, seed=5)
    assert torch.equal(state, torch.get_rng_state())  # a sample while training does not change the training


@pytest.mark.parametrize("prompts, words", [([[1, 2], []], "prompt 1 has 0 tokens"), ([[1] * 24], "context of 24")])
def test_a_prompt_that_does_not_fit_is_one_clear_error(prompts, words):
    with pytest.raises(UserError, match=words):
        generate(tiny(), prompts, 5)


def test_no_prompts_and_no_new_tokens():
    assert generate(tiny(), [], 5) == [] and generate(tiny(), [[1]], 0) == [[]]


def frequencies(logits, n=20000, **settings):
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | settings
    tokens = sample(logits.expand(n, -1), generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(tokens, minlength=logits.numel()) / n


def test_sampling_follows_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 0.5, -1.0, -math.inf, 1.0])
    for temperature in (1.0, 0.5, 2.0):
        expected = (logits / temperature).softmax(0)
        assert torch.allclose(frequencies(logits, temperature=temperature), expected, atol=0.015), \
            "logits are divided by it"
    assert frequencies(logits)[3] == 0


def test_logits_far_from_zero_and_from_each_other_are_sampled_as_they_should():
    logits = torch.tensor([[0.0, 1000.0], [-1000.0, -1000.0]]).repeat(5000, 1)
    far, even = sample(logits, 1.0, 1.0, 0, torch.Generator().manual_seed(0)).view(-1, 2).unbind(1)
    assert bool((far == 1).all()) and even.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_top_p_that_is_reached_exactly_keeps_no_token_more():
    assert torch.equal(generating.nucleus(torch.tensor([[0.375, 0.5, 0.125]]), 0.5), torch.tensor([[0.0, 0.5, 0.0]]))


def test_top_k_and_top_p_keep_what_they_should():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05])
    logits = probs.log()
    def kept(mask):
        return probs * torch.tensor(mask) / (probs * torch.tensor(mask)).sum()
    assert torch.allclose(frequencies(logits, top_k=2), kept([0, 1, 0, 1, 0]), atol=0.015)
    assert torch.allclose(frequencies(logits, top_p=0.6), kept([0, 1, 0, 1, 0]), atol=0.015)  # .4 + .25 reaches .6
    assert torch.allclose(frequencies(logits, top_p=0.66), kept([0, 1, 1, 1, 0]), atol=0.015)
    assert torch.allclose(frequencies(logits, top_p=0.01), kept([0, 1, 0, 0, 0]))  # the likeliest always stays


# ---- log-probabilities -----------------------------------------------------------------------------------------------

def test_token_logps_shift_mask_and_temperature():
    model, ids = tiny(), torch.randint(50, (3, 8))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0, 0, 1], [0] * 8])
    logps = token_logps(model, ids, mask, temperature=0.7)
    assert logps.shape == (3, 7)
    full = (model(ids) / 0.7).log_softmax(-1)
    for b in range(3):
        for t in range(7):
            expected = full[b, t, ids[b, t + 1]].item() if mask[b, t + 1] else 0.0
            assert logps[b, t].item() == pytest.approx(expected, abs=1e-5), \
                "column t is of token t + 1, at the temperature"


def test_token_logps_of_an_empty_mask_is_zero_with_zero_gradient():
    model = tiny()
    total = token_logps(model, torch.randint(50, (2, 5)), torch.zeros(2, 5)).sum()
    total.backward()
    assert total.item() == 0, "nothing to learn from is 0, not NaN"
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---- folders ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
def test_folder_round_trip(tmp_path, bias):
    model, ids = tiny(bias=bias), torch.randint(50, (2, 9))
    model.save_pretrained(tmp_path / "m")
    again = GPT.from_pretrained(tmp_path / "m")
    assert again.config == model.config and torch.equal(again(ids), model(ids))
    assert not list((tmp_path / "m").glob(".*"))  # no temporary files stay


def test_resize_vocab_starts_new_rows_at_the_mean():
    model, ids = tiny(), torch.randint(50, (2, 9))
    before = model(ids)
    mean = model.embedding.weight.mean(dim=0)
    resize_vocab(model, 53)
    assert torch.equal(model(ids)[..., :50], before) and model.config.vocab_size == 53
    assert torch.allclose(model.embedding.weight[50:], mean.expand(3, -1)) and model.embedding.weight.requires_grad
    resize_vocab(model, 20)
    assert len(model.embedding.weight) == 53  # never shrinks


def damage(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("harm, words", [
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "damaged"),
    (lambda f: damage(f, model_type="llama"), "'llama'"),
    (lambda f: damage(f, activation_function="relu"), "activation_function = 'relu'"),
    (lambda f: damage(f, n_embd=32), "not of one model"),
    (lambda f: damage(f, n_layer=3), "lacks transformer.h.2"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "damaged"),
    (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "safe_serialization=True"),
])
def test_a_broken_folder_is_one_clear_sentence(tmp_path, harm, words):
    tiny().save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(tmp_path)


def test_a_missing_folder_is_one_clear_sentence(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder"):
        GPT.from_pretrained(str(tmp_path / "nothing"))


def test_linear_hook_takes_the_block_layers_only(tmp_path):
    tiny().save_pretrained(tmp_path)
    seen = []
    GPT.from_pretrained(tmp_path, linear=lambda layer: seen.append(layer.weight.shape) or layer)
    assert len(seen) == 8 and all(s in ((48, 16), (16, 16), (64, 16), (16, 64)) for s in map(tuple, seen))
