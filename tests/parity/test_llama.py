"""Llama beside transformers: every family and variant, from one file and from shards, the same logits and greedy tokens, both ways."""
import functools
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import checkpoints
import lora
import sft
from generate import generate
from llama import Llama, LlamaConfig, frequencies
from quant import NF4Linear

V = 120
SIZES = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
          "rope_theta": 50.0}
VARIANTS = {
    "llama": ("llama", {}), "all heads": ("llama", {"num_key_value_heads": None}), "one K/V head": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}), "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head size": ("llama", {"head_dim": 10}), "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "llama3": ("llama", {"rope_parameters": SCALED}), "eps": ("llama", {"rms_norm_eps": 0.1}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}}),
    "mistral": ("mistral", {"sliding_window": None}), "mistral's window": ("mistral", {"sliding_window": 32}),
    "qwen2": ("qwen2", {}), "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}), "qwen3": ("qwen3", {"head_dim": 6}),
    "qwen3 with 128": ("qwen3", {"tie_word_embeddings": True}), "qwen3 biases": ("qwen3", {"attention_bias": True, "head_dim": 8}),
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)


def theirs_of(variant, seed=0, dtype=torch.float32):
    family, settings = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(family, **SIZES | settings, attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)  # biases and gains too
    return model.to(dtype)


def same(ours, theirs, limit=1e-4):
    """Within a ten-thousandth of the largest logit."""
    return (ours - theirs).abs().max() <= limit * theirs.abs().max()


def length(model):
    return min(model.config.block_size, 40)


@EVERY
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@torch.inference_mode()
def test_their_folder_gives_the_same_logits_and_greedy_tokens_here(tmp_path, variant, shards):
    theirs = theirs_of(variant)
    theirs.save_pretrained(tmp_path, max_shard_size="12KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == shards
    ours = checkpoints.load(tmp_path).eval()
    assert isinstance(ours, Llama)
    ids = torch.randint(V, (3, length(ours)))
    assert same(ours(ids), theirs(ids).logits)
    prompts = [torch.randint(V, (n,)).tolist() for n in (4, 9, 1)]
    for prompt, row in zip(prompts, generate(ours, prompts, 16, temperature=0.0)):
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=16,
                                   do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(prompt):].tolist()
        assert row == expected


@EVERY
@torch.inference_mode()
def test_what_we_write_is_the_same_model_there(tmp_path, variant):
    theirs = theirs_of(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs").eval()
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs) and set(again.state_dict()) == set(theirs.state_dict())
    ids = torch.randint(V, (3, length(ours)))
    assert same(ours(ids), again.eval()(ids).logits) and same(checkpoints.load(tmp_path / "ours")(ids), theirs(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"tie": True, "n_kv_head": 4}, {"qkv_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
                                      {"qk_norm": True, "head_size": 10}], ids=str)
@torch.inference_mode()
def test_a_network_made_here_is_read_there(tmp_path, settings):
    ours = Llama(LlamaConfig(**{"block_size": 64, "vocab_size": V, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 24, "n_inner": 40,
                                "head_size": 6} | settings)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.save_pretrained(tmp_path)
    ids = torch.randint(V, (3, 40))
    assert same(ours(ids), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits)


def test_gradients_are_the_same(tmp_path):
    theirs = theirs_of("qwen3")
    theirs.save_pretrained(tmp_path)
    ours, ids = checkpoints.load(tmp_path), torch.randint(V, (3, 20))
    mask = (torch.rand(3, 20) < 0.4).long()
    sft.sft_loss(ours, ids, mask).backward()
    theirs(ids, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    names, wanted = ours.hf_names(), dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = wanted[names[name][0]].grad
        assert grad.abs().max() > 1e-4 and torch.allclose(p.grad, grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-6), name


@EVERY
def test_frequencies_are_theirs(tmp_path, variant):
    theirs = theirs_of(variant)
    theirs.config.save_pretrained(tmp_path)
    assert torch.allclose(frequencies(Llama.read_config(tmp_path)), theirs.model.rotary_emb.inv_freq, rtol=1e-6)


OLD = {"rope_scaling": {"type": "linear", "factor": 2.0}}  # as before transformers 4.43


@pytest.mark.parametrize("family, settings", [
    ("llama", {}), ("mistral", {"num_attention_heads": 16}), ("qwen2", {"num_attention_heads": 32, "hidden_size": 64}),
    ("qwen3", {"num_attention_heads": 32, "hidden_size": 64}), ("llama", OLD | {"rope_theta": 20.0}),
    ("llama", OLD | {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
    ("llama", {"rope_theta": 20.0, "rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
    ("llama", {"rope_scaling": {key: value for key, value in SCALED.items() if not key.startswith("original")}}),
    ("qwen3", {"num_key_value_heads": None, "hidden_size": 64})], ids=str)
def test_what_config_json_leaves_out_is_what_they_take_for_it(tmp_path, family, settings):
    given = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4} | settings
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | given))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = Llama.read_config(tmp_path)
    assert ours.block_size == (4096 if family == "mistral" else theirs.max_position_embeddings)
    assert (ours.n_kv_head, ours.tie, ours.norm_eps) == (theirs.num_key_value_heads, theirs.tie_word_embeddings, theirs.rms_norm_eps)
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    assert torch.allclose(frequencies(ours), model.model.rotary_emb.inv_freq, rtol=1e-6)
    shapes = {theirs: tuple(p.shape) for (name, p), (theirs, _) in zip(Llama(ours).named_parameters(), Llama(ours).hf_names().values())}
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}


# ---- adapters --------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 47, 9, 49, 1, 30, 2, 47], [5, 6, 7, 8, 9, 10, 11, 49]])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = pytest.mark.parametrize("variant", ["llama", "tied", "mistral", "qwen2", "qwen3"])
CASES = pytest.mark.parametrize("targets, tokens", [("all", None), ("attention", [49, 47]), ("q_proj,down_proj", None)])


def theirs_with(variant, targets, tokens):
    modules = {"all": ALL, "attention": ALL[:4]}.get(targets, targets.split(","))
    model = theirs_of(variant)
    matrices = ["embed_tokens"] + ["lm_head"] * (not model.config.tie_word_embeddings)
    return stir(peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM",
        trainable_token_indices={name: tokens for name in matrices} if tokens else None)).eval())


def stir(model):
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3, generator=generator)
    return model


@ADAPTERS
@CASES
def test_an_adapter_of_peft_is_the_same_here(tmp_path, variant, targets, tokens):
    theirs_of(variant).save_pretrained(tmp_path / "base")
    theirs = theirs_with(variant, targets, tokens)
    theirs.save_pretrained(tmp_path / "theirs")
    beside, merged = (checkpoints.load(tmp_path / "theirs", merge=merge, base=str(tmp_path / "base")).eval() for merge in (False, True))
    logits = theirs(IDS).logits
    assert same(beside(IDS), logits) and same(merged(IDS), logits) and not same(theirs_of(variant)(IDS).logits, logits, 0.05)
    for output in (logits, beside(IDS)):
        output.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).sum().backward()
    wanted = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    found = {checkpoints.PREFIX + name: p for name, p in checkpoints.peft_parameters(beside).items()}
    assert set(wanted) == set(found)
    for name in wanted:
        assert torch.allclose(found[name].grad, wanted[name].grad, rtol=1e-2, atol=1e-3 * wanted[name].grad.abs().max().item()), name


@ADAPTERS
@CASES
@torch.inference_mode()
def test_our_adapter_is_the_same_in_peft(tmp_path, variant, targets, tokens):
    theirs_of(variant).save_pretrained(tmp_path / "base")
    ours = checkpoints.load(tmp_path / "base").eval()
    lora.add_lora(ours, 4, 8, targets=targets, tokens=tokens or ())
    checkpoints.save_adapter(stir(ours), tmp_path / "ours", tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    assert same(ours(IDS), theirs(IDS).logits) and not same(ours(IDS), theirs_of(variant)(IDS).logits, 0.05)
    assert theirs.peft_config["default"].fan_in_fan_out is False
    lora.merge_lora(ours).save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-5), name


@ADAPTERS
def test_a_quantized_base_has_the_codes_of_bitsandbytes(tmp_path, variant):
    bnb = pytest.importorskip("bitsandbytes.functional")
    theirs = theirs_of(variant, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours, wanted = checkpoints.load(tmp_path, linear=functools.partial(NF4Linear, double=False)), dict(theirs.named_parameters())
    for path, layer in ours.linears().items():
        packed, state = bnb.quantize_4bit(wanted[ours.hf_names()[f"{path}.weight"][0]].data, blocksize=64, quant_type="nf4")
        assert torch.equal(layer.packed, packed.flatten()) and torch.equal(layer.absmax, state.absmax)
