"""What a network offers is all that the other files use: a Llama, unlike GPT-2 wherever it can be, goes through them.

It shares K/V heads among query heads that together are not the width, turns and norms queries and keys inside attention, has no biases
and a head of its own. What is in its layers: test_llama.py.
"""
import json
import math
from contextlib import nullcontext

import pytest
import torch

import checkpoints
import dpo
import lora
import ppo
import reward
import sft
import trainer
from common import hub
from common.errors import UserError
from common.flags import check
from data.tokenizer import get_tokenizer
from generate import generate
from llama import Llama, LlamaConfig
from model import Cache, describe, resize_vocab, summed_logps, token_logps
from quant import NF4Linear, quantize_model

TOK = get_tokenizer("tiny")
RUN = trainer.Run(torch.device("cpu"), torch.float32)
SHAPE = dict(block_size=64, vocab_size=TOK.vocab_size, n_layer=2, n_head=4, n_kv_head=2, head_size=6, n_embd=20, n_inner=28, qk_norm=True)


def stir(model, seed, std=0.3):
    """Random values for whatever is trained: the usual start is too small, and an adapter's B of zeros hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=std, generator=generator)
    return model


def network(seed=0, **settings):
    return stir(Llama(LlamaConfig(**SHAPE | settings)), seed)


def adapted(nf4=False, tokens=(7, 5), **settings):
    model = quantize_model(network()) if nf4 else network()
    lora.add_lora(model, 3, 6, tokens=list(tokens), **settings)
    return stir(model, 1).eval()


IDS = torch.tensor([[3, 7, 9, 5, 1, 30, 2, 7], [5, 6, 7, 8, 9, 10, 11, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]])
KINDS = pytest.mark.parametrize("make", [network, adapted, lambda: adapted(nf4=True)], ids=["plain", "LoRA", "QLoRA"])


# ---- reading and writing ---------------------------------------------------------------------------------------------

@KINDS
@torch.inference_mode()
def test_cached_generation_of_ragged_rows_equals_the_uncached_network(make):
    model = make().eval()
    prompts = [list(range(3, 3 + n)) for n in (5, 1, 12, 60, 7)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < min(len(prompt) + 10, 64):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        expected.append(ids[len(prompt):])
    assert generate(model, prompts, 10, temperature=0.0) == expected, "keys turned by the column and not by the row's position?"


def test_the_cache_is_as_small_as_the_shared_heads():
    cache, ids = Cache(network(), torch.tensor([3, 1]), room=9), IDS[:, :3]
    network().hidden(ids, cache)
    assert cache.keys.shape == cache.values.shape == (2, 2, 2, 9, 6)  # layers, rows, K/V heads, room, head size


def test_the_sum_and_its_gradient_are_those_of_the_readable_log_probabilities():
    found = []
    for total in (lambda model: token_logps(model, IDS, MASK).sum(), lambda model: summed_logps(model, IDS, MASK)):
        model = network().double()
        total(model).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*found))
    by_hand = network()(IDS).log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None]).squeeze(2) * MASK[:, 1:]
    assert torch.allclose(token_logps(network(), IDS, MASK), by_hand, atol=1e-5)


def test_folders_round_trip_and_hold_the_names_of_the_network(tmp_path):
    model = network()
    model.save_pretrained(tmp_path)
    read, _ = hub.open_weights(tmp_path)
    assert torch.equal(read("model.layers.1.mlp.down_proj.weight"), model.blocks[1].mlp.down_proj.weight)
    assert torch.equal(read("model.layers.0.self_attn.k_proj.weight"), model.blocks[0].self_attn.k_proj.weight)
    assert torch.equal(checkpoints.load(tmp_path)(IDS), model(IDS))


def test_new_tokens_begin_at_the_mean_of_both_matrices():
    model = network()
    before, means = model(IDS), [model.get_submodule(name).weight.mean(dim=0) for name in model.token_matrices]
    resize_vocab(model, TOK.vocab_size + 3)
    assert model(IDS).shape[-1] == model.config.vocab_size == TOK.vocab_size + 3
    assert torch.equal(model(IDS)[..., :-3], before)
    for name, mean in zip(model.token_matrices, means):
        assert torch.allclose(model.get_submodule(name).weight[-3:], mean.expand(3, -1)), f"{name} was forgotten"


def test_the_table_of_its_parts_counts_every_parameter_once():
    model = network()
    table = describe(model)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in table
    assert f"{2 * 2 * 2 * 6} numbers" in table, "a cached token keeps the K/V heads, not all heads"


# ---- four bits -------------------------------------------------------------------------------------------------------

def test_quantized_while_read_equals_quantized_afterwards(tmp_path):
    network().save_pretrained(tmp_path)
    read, whole = checkpoints.load(tmp_path, linear=NF4Linear), quantize_model(network())
    assert [type(layer) for layer in read.linears().values()] == [NF4Linear] * 14
    assert torch.equal(read(IDS), whole(IDS)) and not torch.allclose(whole(IDS), network()(IDS), atol=1e-2)


ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"

# ---- adapters --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets, names", [("all", f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj"), ("up_proj", "mlp.up_proj"),
                                            ("attention", ATTENTION), ("self_attn.o_proj,gate_proj", "self_attn.o_proj mlp.gate_proj")])
def test_targets_are_the_networks_own_names(targets, names):
    model = network()
    lora.add_lora(model, 3, 6, targets=targets)
    assert set(lora.adapted(model)) == {f"blocks.{i}.{name}" for i in (0, 1) for name in names.split()}
    with pytest.raises(UserError, match="'c_attn'.*among mlp.down_proj, .*, self_attn.v_proj"):
        lora.add_lora(network(), 3, 6, targets="c_attn")


@pytest.mark.parametrize("nf4", [False, True])
@torch.no_grad()
def test_adapters_are_switched_off_bit_for_bit_and_merged_to_what_training_saw(nf4):
    model, base = adapted(nf4), quantize_model(network()) if nf4 else network()
    trained = model(IDS)
    with lora.lora_off(model):
        assert torch.equal(model(IDS), base(IDS)), "the reference is not the base"
    assert (trained - base(IDS)).abs().max() > 0.1
    merged = lora.merge_lora(model)
    assert torch.allclose(merged(IDS), trained, atol=1e-4) and not lora.is_adapted(merged)
    assert {type(m) for m in merged.modules()} == {type(m) for m in network().modules()}


def test_rows_of_tokens_are_trained_in_both_matrices():
    ours, dense = network(), network()
    lora.add_lora(ours, 3, 6, tokens=[7, 5])
    for model in (ours, dense):
        token_logps(model, IDS, MASK).sum().backward()
    for name in ours.token_matrices:
        found, wanted = ours.get_submodule(name).rows.grad, dense.get_submodule(name).weight.grad[[7, 5]]
        assert torch.allclose(found, wanted, atol=1e-4) and wanted.abs().min() > 0, name


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("targets", ["all", "attention", ["blocks.1.mlp.down_proj"]])
def test_adapters_in_pefts_files(tmp_path, targets, nf4):
    model = adapted(nf4, tokens=(TOK.vocab_size - 1, 5), targets=targets)
    network().save_pretrained(tmp_path / "base")
    checkpoints.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    beside = checkpoints.load(tmp_path / "adapter", merge=False).eval()
    assert torch.equal(beside(IDS), model(IDS))
    assert torch.allclose(checkpoints.load(tmp_path / "adapter")(IDS), model(IDS), atol=1e-4)
    config = json.loads((tmp_path / "adapter" / checkpoints.CONFIG).read_text())
    assert config["trainable_token_indices"] == {name: [TOK.vocab_size - 1, 5] for name in ("embed_tokens", "lm_head")}
    attention = [f"self_attn.{name}_proj" for name in "koqv"]
    assert config["target_modules"] == {"all": ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *attention],
                                        "attention": attention}.get(str(targets), ["model.layers.1.mlp.down_proj"])
    assert config["fan_in_fan_out"] is False
    names = set(checkpoints.read_tensors(tmp_path / "adapter"))
    assert "lm_head.token_adapter.trainable_tokens_delta" in names
    assert ("model.layers.0.self_attn.q_proj.lora_A.weight" in names) == (not isinstance(targets, list))


# ---- the losses and their steps --------------------------------------------------------------------------------------

def talk(i, answer):
    return [{"role": "user", "content": "why? " * (1 + i % 3)}, {"role": "assistant", "content": answer}]


ROWS = [{"prompt": talk(i, "")[:1], "answers": [{"text": "yes " * (1 + i % 4), "score": 1}, {"text": "no", "score": 0},
                                                {"text": "maybe " * (i % 2), "score": -1}]} for i in range(5)]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@KINDS
def test_an_sft_step_in_parts_is_the_loss_on_all_logits(make):
    examples = sft.make_examples([{"messages": talk(i, "yes " * (1 + i))} for i in range(5)], TOK, 65)
    model, whole = make(), make()
    loss = sft.sft_step(model, examples, sft.Config(micro_tokens=30), RUN)
    ids, mask = trainer.pad(examples)
    expected = sft.masked_loss(whole(ids)[:, :-1], ids[:, 1:], mask[:, 1:])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient(model), gradient(whole), rtol=1e-3, atol=1e-5)


@KINDS
def test_a_dpo_step_starts_at_ln_2_and_raises_the_chosen(make):
    model, config = make(), dpo.Config(micro_tokens=60)
    pairs = dpo.make_examples(ROWS, TOK, 65, config, lambda text: None)
    dpo.add_reference(model, pairs, RUN, config)
    assert dpo.dpo_step(model, pairs, config, RUN)["loss"] == pytest.approx(math.log(2), abs=1e-4)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
    means = dpo.evaluate(model, pairs, RUN, config)
    assert means["loss"] < math.log(2) and means["margin"] > 0


@pytest.mark.parametrize("make", [network, lambda: adapted(nf4=True)], ids=["plain", "QLoRA"])
def test_a_reward_model_learns_and_comes_back_from_its_folder(make, tmp_path):
    network().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model, config = reward.RewardModel(make()), reward.Config(lr=1e-2, init=str(tmp_path / "base"), out=str(tmp_path / "out"))
    rankings = reward.make_rankings(ROWS, TOK, 64, config, lambda text: None)
    optimizer, losses = trainer.adamw(model, config), []
    for step in range(8):
        losses.append(reward.reward_step(model, rankings, config, RUN))
        trainer.update(model, optimizer, config, RUN, step)
    assert losses[-1] < 0.9 * losses[0]
    checkpoints.save_model(config, model.network, TOK, extra=model.head_tensors())
    ids, lengths = IDS, torch.tensor([8, 5])
    again = reward.RewardModel.from_pretrained(tmp_path / "out")
    assert torch.allclose(again(ids, lengths), model.eval()(ids, lengths), atol=1e-4)
    with pytest.raises(UserError, match="is a reward model"):
        checkpoints.load_to_ask(tmp_path / "out", RUN)


@pytest.mark.parametrize("adapters", [False, True])
def test_an_iteration_of_ppo(adapters, capsys):
    policy, frozen = adapted() if adapters else network().eval(), network().eval()
    value, config = reward.RewardModel(network(seed=2)).eval(), ppo.Config(max_new_tokens=6, minibatch=4, micro_tokens=60, lr=1e-3)
    reference = (lambda: lora.lora_off(policy)) if adapters else (lambda: nullcontext(frozen))
    questions = [talk(i, "")[:1] for i in range(6)]
    rollout = ppo.roll_out(policy, TOK, questions, [TOK.render_prompt(q) for q in questions], config, RUN, seed=0)
    ppo.score(rollout, lambda conversations: [float(len(c[-1]["content"])) for c in conversations], config, RUN)
    ppo.estimate(rollout, policy, reference, value, 0.1, config, RUN)
    with torch.no_grad():  # the sampled probabilities, and those of the base, without any cache
        for model, found in ((policy, rollout.old_logps), (frozen, rollout.ref_logps)):
            logps = model(rollout.ids)[:, :-1].log_softmax(-1).gather(2, rollout.ids[:, 1:, None]).squeeze(2) * rollout.mask
            assert torch.allclose(found, logps, atol=1e-4)
    before = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (policy, value)]
    optimizers = [trainer.adamw(model, config) for model in (policy, value)]
    log = ppo.ppo_update(rollout, policy, value, optimizers, None, 0, config, RUN)
    assert "a ratio is" not in capsys.readouterr().out and all(map(math.isfinite, log.values()))
    for model, old in zip((policy, value), before):
        assert not torch.equal(old, torch.cat([p.detach().flatten() for p in model.parameters()]))


# ---- from folder to folder -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"lora_r": 2, "nf4": True}], ids=["all weights", "QLoRA"])
def test_a_script_trains_it_and_both_of_its_folders_are_read(tmp_path, settings):
    base = network(vocab_size=min(TOK.new_ids))  # a base that has never seen the chat tokens
    base.save_pretrained(tmp_path / "base")
    TOK.save(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": talk(i, f"answer {i}")}) for i in range(20)))
    config = dict(init=str(tmp_path / "base"), data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), steps=3, batch_size=4,
                  lr=1e-2, eval_every=0, sample_every=0, save_every=2, device="cpu", dtype="float32")
    sft.main(check(sft.Config(**config | settings)))
    model = checkpoints.load(tmp_path / "out")
    if settings:
        new = checkpoints.read_adapter_config(tmp_path / "out")["trainable_token_indices"]
        assert new == {name: TOK.new_ids for name in ("embed_tokens", "lm_head")}
    assert isinstance(model, Llama) and model.config.vocab_size == TOK.vocab_size
    assert model.unembedding.weight.shape == model.embedding.weight.shape == (TOK.vocab_size, 20)
    assert not torch.equal(model.blocks[0].self_attn.k_proj.weight, base.blocks[0].self_attn.k_proj.weight)
