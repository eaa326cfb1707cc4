"""Llama: each difference from GPT-2 against a version worked by hand or by brute force, and folders that are refused."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from common import hub
from common.errors import UserError
from generate import generate
from llama import Llama, LlamaConfig, RMSNorm, angles, frequencies, like_gpt, turn
from model import GPT, TINY, GPTConfig

SHAPE = dict(block_size=48, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=12, n_inner=20, head_size=6)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**SHAPE | settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


# ---- each difference -------------------------------------------------------------------------------------------------

def test_the_norm_by_hand():
    norm = RMSNorm(3, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, -1.0])
    root = math.sqrt((1 + 4 + 4) / 3 + 0.5)
    assert torch.allclose(norm(torch.tensor([1.0, -2.0, 2.0])), torch.tensor([1 / root, -4 / root, -2 / root]))


def test_the_norm_of_bfloat16_is_made_in_float32():
    torch.manual_seed(0)
    x, norm = torch.randn(4, 4096).bfloat16() * 30, RMSNorm(4096, eps=1e-6)
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), norm(x.float()).bfloat16())


def test_pairs_are_turned_by_their_positions():
    config = LlamaConfig(**SHAPE | dict(head_size=4, rope_theta=100.0))
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    cos, sin = angles(config, torch.tensor([5]))
    a, b = 5 * 1.0, 5 * 100 ** -0.5  # the first pair is (1, 3), the second (2, 4)
    by_hand = [math.cos(a) - 3 * math.sin(a), 2 * math.cos(b) - 4 * math.sin(b), 3 * math.cos(a) + math.sin(a), 4 * math.cos(b) + 2 * math.sin(b)]
    assert torch.allclose(turn(x, cos, sin).flatten(), torch.tensor(by_hand), atol=1e-5)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_a_product_depends_on_the_distance_only(scaling):
    config, (q, k) = LlamaConfig(**SHAPE | dict(head_size=16, rope_scaling=scaling)), torch.randn(2, 1, 1, 1, 16)
    at = lambda x, position: turn(x, *angles(config, torch.tensor([position])))
    products = [(at(q, position + 7) * at(k, position)).sum() for position in (0, 1, 30, 2000)]
    assert torch.allclose(torch.stack(products), products[0].expand(4), atol=2e-3)
    assert abs((at(q, 3) * at(k, 0)).sum() - products[0]) > 0.05, "it does not depend on the distance at all"


def test_frequencies_by_hand():
    config = lambda scaling: LlamaConfig(**SHAPE | dict(head_size=8, rope_theta=16.0, rope_scaling=scaling))
    plain = torch.tensor([1.0, 0.5, 0.25, 0.125])  # 16^(-i/4)
    assert torch.allclose(frequencies(config(None)), plain)
    assert torch.allclose(frequencies(config({"rope_type": "linear", "factor": 4.0})), plain / 4)
    found = frequencies(config(LLAMA3))  # in 32 positions they turn 5.09, 2.55, 1.27 and 0.64 times
    s = [(32 * f / (2 * math.pi) - 1) / 3 for f in (0.5, 0.25)]
    assert torch.allclose(found, torch.tensor([1.0, (1 - s[0]) * 0.5 / 8 + s[0] * 0.5, (1 - s[1]) * 0.25 / 8 + s[1] * 0.25, 0.125 / 8]))


def test_angles_are_made_in_float32_whatever_the_weights_are():
    model = tiny().bfloat16()
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad()):
        with context:
            cos, sin = angles(model.config, torch.tensor([256, 257]))
    assert cos.dtype == torch.float32 and not torch.equal(cos[0, 0], cos[0, 1])
    assert not list(model.buffers()), "a buffer would be cast with the model, and no folder fills it"


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_shared_heads_equal_copied_ones(n_kv_head):
    shared, copied = tiny(n_kv_head=n_kv_head), tiny(n_kv_head=4)
    copied.load_state_dict({name: p for name, p in shared.state_dict().items() if not name.split(".")[-2] in ("k_proj", "v_proj")}, strict=False)
    for a, b in zip(shared.blocks, copied.blocks):
        for name in ("k_proj", "v_proj"):  # head h of the copies is head h // G: each stands G times in a row
            heads = getattr(a.self_attn, name).weight.view(n_kv_head, 6, 12)
            getattr(b.self_attn, name).weight.data = heads.repeat_interleave(4 // n_kv_head, dim=0).reshape(24, 12)
    ids = torch.randint(50, (2, 20))
    assert torch.allclose(shared(ids), copied(ids), atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"qkv_bias": True}], ids=str)
def test_attention_by_brute_force(settings):
    config = LlamaConfig(**SHAPE | settings)
    attention, x = tiny(**settings).blocks[0].self_attn, torch.randn(1, 5, 12)
    norm = lambda h, gain: h / (h.pow(2).mean() + config.norm_eps).sqrt() * gain if config.qk_norm else h
    def vector(layer, t, head, gain=None):
        h = layer(x[0, t]).view(-1, 6)[head]
        return h if gain is None else turn(norm(h, getattr(gain, "weight", 1))[None, None, None], *angles(config, torch.tensor([t]))).flatten()
    out = torch.zeros(5, 24)
    for t in range(5):
        for head in range(4):
            q = vector(attention.q_proj, t, head, attention.q_norm)
            scores = torch.stack([q @ vector(attention.k_proj, s, head // 2, attention.k_norm) / 6 ** 0.5 for s in range(t + 1)])
            out[t, head * 6:head * 6 + 6] = scores.softmax(0) @ torch.stack([vector(attention.v_proj, s, head // 2) for s in range(t + 1)])
    assert torch.allclose(attention(x, *angles(config, torch.arange(5)))[0], attention.o_proj(out), atol=1e-5)


def test_the_gated_mlp_by_hand():
    mlp, x = tiny().blocks[0].mlp, torch.randn(3, 12)
    g = x @ mlp.gate_proj.weight.t()
    assert torch.allclose(mlp(x), (g / (1 + (-g).exp()) * (x @ mlp.up_proj.weight.t())) @ mlp.down_proj.weight.t(), atol=1e-5)
    assert not any(name.endswith("bias") for name, _ in tiny().named_parameters())


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "tie": True}, {"qkv_bias": True, "rope_scaling": LLAMA3}], ids=str)
@torch.inference_mode()
def test_cached_equals_uncached_for_ragged_rows(settings):
    model = tiny(**settings).eval()
    prompts = [torch.randint(50, (n,)).tolist() for n in (1, 30, 6, 17)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(15):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        expected.append(ids[len(prompt):])
    assert generate(model, prompts, 15, temperature=0.0) == expected


def test_causal_and_initialised_as_gpt2():
    model, ids = tiny(), torch.randint(50, (2, 10))
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 50
    assert torch.equal(model(ids)[:, :6], model(changed)[:, :6]) and not torch.allclose(model(ids)[:, 6:], model(changed)[:, 6:])
    fresh = Llama(like_gpt(64, 500, 8, 4, 128))
    assert fresh.blocks[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert fresh.blocks[3].self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    with pytest.raises(ValueError, match="do not fit a context of 48"):
        model(torch.zeros(1, 49, dtype=torch.long))


def test_checkpointing_changes_no_gradient():
    ids, gradients = torch.randint(50, (3, 10)), []
    for checkpointing in (False, True):
        model = tiny(checkpointing=checkpointing, dropout=0.2)
        torch.manual_seed(1)
        model(ids).log_softmax(-1)[..., 0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_the_tiny_one_is_as_large_as_the_tiny_gpt():
    sizes = [sum(p.numel() for p in model.parameters()) for model in (Llama(like_gpt(**TINY)), GPT(GPTConfig(**TINY)))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.005)


# ---- folders ---------------------------------------------------------------------------------------------------------

def rewrite(folder, **settings):
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder, n=3):
    """model.safetensors -> n files and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = [f"model-0000{i + 1}-of-0000{n}.safetensors" for i in range(n)], {}
    for i, name in enumerate(names):
        part = {key: tensors[key] for key in sorted(tensors)[i::n]}
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return names


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_of_shards_and_links_is_read(folder, tmp_path):
    for name in shard(folder):  # as the hub's cache keeps them
        (folder / name).rename(tmp_path / f"blob-{name}")
        (folder / name).symlink_to(tmp_path / f"blob-{name}")
    ids = torch.randint(50, (2, 9))
    assert torch.equal(checkpoints.load(folder)(ids), tiny()(ids))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/model.safetensors", "a\\model.safetensors", "..", "model.bin", 7])
def test_an_index_may_name_files_in_its_folder_only(folder, name):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="same folder only"):
        checkpoints.load(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', "{}"])
def test_a_damaged_index_is_one_sentence(folder, index):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="index.json (is damaged|names)"):
        checkpoints.load(folder)


def test_a_missing_shard_and_a_pickle_are_refused(folder):
    (folder / shard(folder)[1]).unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is damaged or missing"):
        checkpoints.load(folder)
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="a pickle that could run any code"):
        checkpoints.load(folder)


@pytest.mark.parametrize("settings, words", [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scales positions by 'yarn'"), ({"rope_scaling": [1]}, r"rope_scaling = \[1\], but it has to be an object"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"), ({"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor = 0, but it has to be a number from 1"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor = 0.5"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"), ({"model_type": "mixtral"}, "type 'mixtral'.*gpt2, llama, mistral, qwen2, qwen3"),
    ({"num_key_value_heads": 3}, "4 heads cannot share 3"), ({"head_dim": 5}, "size 5 is odd"), ({"hidden_size": "12"}, "hidden_size = '12'"),
    ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers = 1000000000"), ({"vocab_size": 0}, "vocab_size = 0"), ({"vocab_size": None}, "has no vocab_size"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no', but it has to be true or false"), ({"num_attention_heads": True}, "num_attention_heads"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan"), ({"hidden_size": 16}, r"shape \(50, 12\), but config.json says \(50, 16\)"),
    ({"num_hidden_layers": 3}, "lacks model.layers.2"), ({"num_hidden_layers": 1}, "holds model.layers.1.*no place"),
    ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"), ({"model_type": "qwen3"}, "lacks .*q_norm"),
], ids=str)
def test_what_config_json_cannot_say_is_one_sentence(folder, settings, words):
    rewrite(folder, **settings)
    with pytest.raises(UserError, match=words):
        checkpoints.load(folder)


def test_an_untied_folder_without_its_head_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="lacks lm_head.weight"):
        checkpoints.load(folder)


def test_a_tied_folder_may_hold_its_head_twice(tmp_path):
    model = tiny(tie=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert torch.equal(checkpoints.load(tmp_path)(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_weights_that_are_no_floats_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(12, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight is of I8.*not quantized"):
        checkpoints.load(folder)


def test_what_does_not_fit_is_said_before_anything_is_read(folder, monkeypatch):
    needed = 4 * sum(p.numel() for p in tiny().parameters())
    monkeypatch.setattr(hub, "free_memory", lambda: needed)
    checkpoints.load(folder)
    monkeypatch.setattr(hub, "free_memory", lambda: needed - 1)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=rf"weights need {needed / 1e9:.3g} GB of memory and .* GB are free"):
        checkpoints.load(folder)


def test_free_memory_is_a_number_here():
    assert 10 ** 6 < hub.free_memory() < 10 ** 14


def test_of_a_sliding_window_only_what_lies_within_it_is_read(folder):
    rewrite(folder, model_type="mistral", sliding_window=32)
    with pytest.raises(ValueError, match="do not fit a context of 32"):
        checkpoints.load(folder)(torch.zeros(1, 33, dtype=torch.long))
    for window, context in ((None, 48), (64, 48)):
        rewrite(folder, sliding_window=window)
        assert checkpoints.load(folder).config.block_size == context
    rewrite(folder, model_type="qwen2", sliding_window=32, use_sliding_window=False)
    assert Llama.read_config(folder).block_size == 48
    rewrite(folder, use_sliding_window=True)
    assert Llama.read_config(folder).block_size == 32


@pytest.mark.parametrize("name, is_one", [("HuggingFaceTB/SmolLM2-135M-Instruct", True), ("gpt2", True), ("out/sft", False), ("a/b/c", False),
                                          ("/a/b", False), ("./a", False), ("../b", False), ("a", False), ("a/..", False)])
def test_which_names_may_be_on_the_hub(name, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert hub.is_name(name) == is_one


def test_a_name_on_the_hub_is_fetched_without_pickles(folder, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(folder))
    assert isinstance(checkpoints.load("Some-Owner/Model_1.5"), Llama)
    (name, patterns), = asked
    assert name == "Some-Owner/Model_1.5" and "model-?????-of-?????.safetensors" in patterns and not any("bin" in p for p in patterns)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match="no folder Some-Owner/Model, and Some-Owner/Model could not be fetched"):
        checkpoints.load("Some-Owner/Model")
