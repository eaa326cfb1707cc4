"""PPO: every quantity against hand-worked numbers, brute force, or a problem whose optimum is known."""
import json
import math

import pytest
import torch

import ppo
import trainer
from checkpoints import load
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.flags import check, parse
from model import GPT, GPTConfig

RUN = trainer.Run(torch.device("cpu"), torch.float32)
# two responses: after one and after two columns of prompt, with padding behind the first
MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).float()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- rewards ---------------------------------------------------------------------------------------------------------

def test_kl_rewards_hand_worked():
    logps = torch.tensor([[9.0, -1.0, -2.0, -1.0, 9.0], [9.0, 9.0, -1.0, -1.0, -3.0]])
    ref = torch.tensor([[5.0, -2.0, -1.5, -1.0, 5.0], [5.0, 5.0, -1.0, -2.0, -1.0]])
    rewards = ppo.kl_rewards(torch.tensor([3.0, -4.0]), logps, ref, MASK, beta=0.1)
    expected = torch.tensor([[0, -0.1, 0.05, 3.0, 0], [0, 0, 0, -0.1, -4.0 + 0.2]])
    # the penalty is negative where the policy is likelier; the score sits on the end
    assert torch.allclose(rewards, expected), \
        "the KL has the wrong sign, or the score is not on the last response token"


def test_a_response_of_one_token_has_its_score_on_that_token():
    zeros, mask = torch.zeros(1, 4), torch.tensor([[0.0, 0, 1, 0]])
    rewards = ppo.kl_rewards(torch.tensor([3.0]), zeros, zeros, mask, 0.1)
    assert rewards.tolist() == [[0, 0, 3, 0]], "the prompt is rewarded"


def test_the_mean_over_nothing_is_0():
    assert ppo.masked_mean(torch.ones(2, 3), torch.zeros(2, 3)) == 0


def test_policy_equal_to_reference_leaves_the_score_alone():
    logps, scores = noise(2, 5), torch.tensor([1.5, -2.0])
    rewards = ppo.kl_rewards(scores, logps, logps.clone(), MASK, beta=10.0)
    assert torch.equal(rewards.sum(1), scores) and rewards[0, 3] == 1.5 and rewards[1, 4] == -2.0
    assert ppo.kl_k1(logps, logps, MASK).tolist() == [0, 0] and ppo.kl_k3(logps, logps, MASK) == 0


# ---- advantages ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    rewards, values = noise(2, 5) * MASK, noise(2, 5, seed=1)  # values outside the mask are rubbish, as a real model's are
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for b in range(2):
        steps = MASK[b].nonzero().flatten().tolist()
        for i, t in enumerate(steps):
            total = 0.0
            for k, s in enumerate(steps[i:]):
                later = values[b, s + 1] if s != steps[-1] else 0.0
                total += (gamma * lam) ** k * (rewards[b, s] + gamma * later - values[b, s])
            assert advantages[b, t].item() == pytest.approx(float(total), abs=1e-5), \
                "values are off by one, or one follows the end"
            assert returns[b, t].item() == pytest.approx(float(total + values[b, t]), abs=1e-5)
    assert not advantages[MASK == 0].any() and not returns[MASK == 0].any(), "prompt and padding have advantages"
    default = ppo.gae(rewards, values, MASK)[0]
    assert torch.equal(default, ppo.gae(rewards, values, MASK, gamma=1.0, lam=0.95)[0]), "by default gamma is 1 and lambda 0.95"


def test_gae_hand_worked():
    rewards, values = torch.tensor([[0.0, 1.0, 2.0, 0.0]]), torch.tensor([[0.5, 0.4, 0.2, 7.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # t = 2: 2 + 0 - 0.2 = 1.8;   t = 1: 1 + 0.5 * 0.2 - 0.4 + 0.25 * 1.8 = 1.15
    assert advantages.tolist() == [[0.0, pytest.approx(1.15), pytest.approx(1.8), 0.0]]
    assert returns.tolist() == [[0.0, pytest.approx(1.55), pytest.approx(2.0), 0.0]]


def test_gamma_and_lambda_1_give_the_reward_to_go():
    rewards, values = noise(2, 5) * MASK, noise(2, 5, seed=1)
    _, returns = ppo.gae(rewards, values, MASK, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * MASK
    assert torch.allclose(returns, to_go, atol=1e-5), "returns are not advantages + values"


def test_padding_and_its_values_never_count():
    rewards, values = noise(2, 5), noise(2, 5, seed=1)
    a = ppo.gae(rewards * MASK, values, MASK)
    b = ppo.gae(rewards * MASK, torch.where(MASK == 1, values, torch.tensor(1e6)), MASK)
    assert all(torch.equal(x, y) for x, y in zip(a, b)), "a value outside the mask counts"


def test_whiten_by_masked_statistics():
    x = torch.where(MASK == 1, noise(2, 5), torch.tensor(1e6))
    white = ppo.whiten(x, MASK)
    inside = white[MASK == 1]
    assert inside.mean().item() == pytest.approx(0, abs=1e-6), "the mean is taken over padding too"
    assert inside.var(unbiased=False).item() == pytest.approx(1, rel=1e-4), "the variance is taken over padding too"
    assert not white[MASK == 0].any(), "padding gets an advantage: minus the mean"
    assert torch.isfinite(ppo.whiten(torch.ones(1, 3), torch.ones(1, 3))).all()


# ---- losses ----------------------------------------------------------------------------------------------------------

def test_policy_loss_gradient_at_ratio_1_is_minus_the_advantage():
    old, advantages = noise(2, 5), noise(2, 5, seed=1)
    logps = old.clone().requires_grad_()
    loss, clipfrac = ppo.policy_loss(logps, old, advantages, MASK)
    loss.backward()
    assert torch.allclose(logps.grad, -advantages * MASK / MASK.sum(), atol=1e-7), \
        "the sign, or a mean over padding too"
    assert clipfrac == 0 and loss.item() == pytest.approx(-(advantages * MASK).sum().item() / 6, abs=1e-6)


@pytest.mark.parametrize("ratio, advantage, expected, moves", [
    (1.5, 2.0, 1.2 * 2.0, False),   # likelier already: no more
    (1.5, -2.0, 1.5 * -2.0, True),  # likelier, but it should not be: the full gradient brings it back
    (0.5, -2.0, 0.8 * -2.0, False), (0.5, 2.0, 0.5 * 2.0, True), (1.1, 2.0, 1.1 * 2.0, True)])
def test_policy_loss_clips_on_the_right_side_only(ratio, advantage, expected, moves):
    logps = torch.tensor([[math.log(ratio), 123.0]]).requires_grad_()
    loss, clipfrac = ppo.policy_loss(logps, torch.zeros(1, 2), torch.tensor([[advantage, 5.0]]), torch.tensor([[1.0, 0.0]]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-expected, rel=1e-5), \
        "the larger of the two was taken, or only one side is clipped"
    assert bool(logps.grad[0, 0] != 0) == moves == (clipfrac.item() == 0) and logps.grad[0, 1] == 0


@pytest.mark.parametrize("sign", [1, -1])  # a value that rises too far, and one that falls too far
def test_value_loss_hand_worked_is_clipped_on_both_sides(sign):
    values, old = torch.tensor([[1.0, 0.5, 2.1, 1.0, 9.0]]), torch.tensor([[0.0, 0.4, 2.0, 0.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 1.0, 2.0, -1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    # clipped value 0.2: max((1 - 2)^2, (0.2 - 2)^2) = 3.24;   within the clip: (0.5 - 1)^2 = 0.25, (2.1 - 2)^2 = 0.01;
    # clipped value 0.2, nearer to the return than the value itself: max((1 + 1)^2, (0.2 + 1)^2) = 4
    loss = ppo.value_loss(sign * values, sign * old, sign * returns, mask)  # clipped by 0.2, as it should be by default
    assert loss.item() == pytest.approx(0.5 * (3.24 + 0.25 + 0.01 + 4) / 4), \
        "the smaller of the two was taken, or the value is clipped on one side only"


# ---- the KL ----------------------------------------------------------------------------------------------------------

def test_k1_and_k3_estimate_the_exact_kl_of_a_categorical():
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.3, 0.3, 0.2, 0.2])
    exact = (p * (p / q).log()).sum().item()
    draws = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    logps, ref = p.log()[draws][:, None], q.log()[draws][:, None]
    ones = torch.ones_like(logps)
    k1, k3 = ppo.kl_k1(logps, ref, ones), ppo.kl_k3(logps, ref, ones)
    assert k1.mean().item() == pytest.approx(exact, rel=0.02) and k3.item() == pytest.approx(exact, rel=0.02)
    assert k1.min() < 0 <= (torch.exp(ref - logps) - 1 + logps - ref).min()


def test_k1_sums_over_the_response_and_k3_averages_over_tokens():
    logps, ref = torch.full((2, 5), -1.0), torch.full((2, 5), -1.5)
    assert torch.allclose(ppo.kl_k1(logps, ref, MASK), torch.tensor([1.5, 1.5])), \
        "k1 of a response is a sum, over the mask"
    assert ppo.kl_k3(logps, ref, MASK).item() == pytest.approx(math.exp(-0.5) - 0.5), "k3 is a mean over tokens"
    far = torch.where(MASK == 1, ref, torch.tensor(1000.0))  # exp of it is infinite, and infinity times a mask of 0 is NaN
    assert ppo.kl_k3(logps, far, MASK).item() == pytest.approx(math.exp(-0.5) - 0.5), "what stands outside the mask counts"


def test_adapted_beta():
    assert ppo.adapted_beta(0.1, kl=6.0, target=6.0, n=64, horizon=640) == pytest.approx(0.1)
    assert ppo.adapted_beta(0.1, kl=6.6, target=6.0, n=64, horizon=640) == pytest.approx(0.1 * 1.01)
    assert ppo.adapted_beta(0.1, kl=60, target=6.0, n=64, horizon=640) == pytest.approx(0.1 * 1.02)  # clipped at 0.2
    assert ppo.adapted_beta(0.1, kl=0.0, target=6.0, n=64, horizon=640) == pytest.approx(0.1 * 0.98)


def test_explained_variance():
    returns = noise(2, 5)
    assert ppo.explained_variance(returns, returns, MASK) == pytest.approx(1)
    assert ppo.explained_variance(torch.zeros(2, 5), returns, MASK) == pytest.approx(0, abs=1e-5)
    assert ppo.explained_variance(returns / 2 + 3, returns, MASK) == pytest.approx(0.75), "a variance is about the mean"


# ---- a problem whose optimum is known --------------------------------------------------------------------------------

def test_a_bandit_reaches_the_optimum_of_equation_4():
    """One step, four actions: the maximiser of E[r] - beta KL is pi = pi_ref exp(r / beta) / Z (Rafailov et al. 2023, equation 4)."""
    reward, ref, beta = torch.tensor([1.0, 0.0, 0.5, -1.0]), torch.tensor([0.1, 0.4, 0.3, 0.2]), 0.5
    optimum = ref * torch.exp(reward / beta)
    optimum = optimum / optimum.sum()
    theta = ref.log().clone().requires_grad_()
    optimizer, generator = torch.optim.Adam([theta], lr=0.02), torch.Generator().manual_seed(0)
    value = torch.zeros(1, requires_grad=True)
    value_optimizer = torch.optim.Adam([value], lr=0.05)
    for _ in range(300):
        with torch.no_grad():
            actions = torch.multinomial(theta.softmax(0), 256, replacement=True, generator=generator)
            old, ones = theta.log_softmax(0)[actions][:, None], torch.ones(256, 1)
            rewards = ppo.kl_rewards(reward[actions], old, ref.log()[actions][:, None], ones, beta)
            old_values = value.expand(256, 1).clone()
            advantages, returns = ppo.gae(rewards, old_values, ones)
        for _ in range(2):
            loss, _ = ppo.policy_loss(theta.log_softmax(0)[actions][:, None], old, advantages, ones)
            v_loss = ppo.value_loss(value.expand(256, 1), old_values, returns, ones)
            (loss + v_loss).backward()
            for o in (optimizer, value_optimizer):
                o.step()
                o.zero_grad()
    assert torch.allclose(theta.softmax(0), optimum, atol=0.04)


# ---- the whole algorithm, on a model of nothing ----------------------------------------------------------------------

SMALL = dict(steps=4, batch_size=6, minibatch=4, max_new_tokens=8, save_every=2, sample_every=0, device="cpu", dtype="float32",
             reward="readability", lr=1e-2)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("sft"), get_tokenizer("tiny")
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=64, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=16)).save_pretrained(folder)
    tok.save(folder)
    questions = [f'{{"prompt": "{"Why? " * (1 + i % 5)}"}}' for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(questions))
    return folder


def run_ppo(start, out, **settings):
    settings = SMALL | dict(init=str(start), data=str(start / "prompts.jsonl"), out=str(out)) | settings
    ppo.main(check(ppo.Config(**settings)))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return torch.cat([p.detach().flatten() for p in load(folder).parameters()])


@pytest.mark.parametrize("settings", [{}, {"lora_r": 2, "nf4": True}, {"temperature": 0.7},
                                      {"checkpointing": True, "micro_tokens": 40}])
def test_every_run_starts_at_the_reference_with_ratio_1(start, tmp_path, capsys, settings):
    log = run_ppo(start, tmp_path / "out", **settings)
    assert "a ratio is" not in capsys.readouterr().out
    assert log[0]["kl"] == pytest.approx(0, abs=1e-4) and log[-1]["kl"] != 0
    assert not torch.equal(weights(start), weights(tmp_path / "out"))


def test_five_questions_are_watched_token_by_token_and_change_no_training(start, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "report", lambda *_: None)
    island = dict(data="", n_prompts=20, watch_every=2, steps=3, max_new_tokens=6, beta=0.5, reward="gold")
    log = run_ppo(start, tmp_path / "a", **island)
    other = run_ppo(start, tmp_path / "b", **island | {"watch_every": 0})
    assert not (tmp_path / "b" / "watched.jsonl").exists() and [line["score"] for line in log] == [line["score"] for line in other]
    looks = [json.loads(line) for line in (tmp_path / "a" / "watched.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 2, 3]  # before the iteration; the last one after all
    for look in looks:
        assert len(look["answers"]) == len(ppo.exam.FIVE) and all(1 <= len(a["tokens"]) <= 6 for a in look["answers"])
        for answer in look["answers"]:  # its tokens' rewards are the score less beta times their log-ratios
            kl = sum(logp - ref for _, logp, ref, _, _ in answer["tokens"])
            assert sum(token[4] for token in answer["tokens"]) == pytest.approx(answer["score"] - 0.5 * kl, abs=2e-3)
    assert all(token[1] == token[2] for answer in looks[0]["answers"] for token in answer["tokens"])  # still the reference
    assert any(token[1] != token[2] for answer in looks[-1]["answers"] for token in answer["tokens"])


def test_a_ratio_that_is_not_1_is_said(capsys):
    logps, mask = torch.zeros(2, 3), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    ppo.check_ratio(logps, logps + torch.tensor([0, 0, 5.0]), mask, 0, RUN)  # outside the mask
    assert capsys.readouterr().out == ""
    ppo.check_ratio(logps, logps + 0.01, mask, 7, RUN)
    assert "step 7: before the first update a ratio is 1.00995" in capsys.readouterr().out
    half = trainer.Run(RUN.device, torch.bfloat16)
    ppo.check_ratio(logps, logps + 0.01, mask, 7, half)  # bfloat16 rounds more than that
    assert capsys.readouterr().out == ""
    ppo.check_ratio(logps, logps + 0.05, mask, 8, half)
    assert "step 8" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"target_kl": 0.5}, {"lora_r": 2}])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(start, tmp_path, monkeypatch, settings):
    whole = run_ppo(start, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        measure = ppo.measure
        patch.setattr(ppo, "measure", lambda log, step, *a: measure(log, step, *a) if step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_ppo(start, tmp_path / "cut", **settings)
    cut = run_ppo(start, tmp_path / "cut", resume=True, **settings)
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    def timeless(log):
        return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in log]
    assert timeless(cut) == timeless(whole)


def test_a_response_without_end_token_gets_the_missing_score(start, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "reading_ease", lambda text: 5.0)
    log = run_ppo(start, tmp_path / "out", missing_eos_score=-3.0, steps=1)
    assert log[0]["score"] == pytest.approx(5.0 * log[0]["ended"] - 3.0 * (1 - log[0]["ended"])) and log[0]["ended"] < 1


def test_stop_kl_ends_the_run(start, tmp_path, capsys):
    assert len(run_ppo(start, tmp_path / "out", stop_kl=1e-9, lr=0.1)) < 4


def test_rollout_masks_the_response_and_its_end_token():
    tok, config = get_tokenizer("tiny"), ppo.Config(max_new_tokens=6)
    torch.manual_seed(0)
    policy = GPT(GPTConfig(64, tok.vocab_size, 1, 1, 8)).eval()
    prompts = [[5, 6, 7], [8], [9, 10]]
    r = ppo.roll_out(policy, tok, [[]] * 3, prompts, config, RUN, seed=0)
    ids, mask, ended = r.ids, r.mask, r.ended
    assert mask.shape == (3, ids.size(1) - 1)
    for row, prompt in enumerate(prompts):
        assert ids[row, :len(prompt)].tolist() == prompt
        on = mask[row].nonzero().flatten().tolist()
        assert on == list(range(len(prompt) - 1, len(prompt) - 1 + len(on))), \
            "column t is token t + 1: the mask is off by one"
        assert bool(ended[row]) == (ids[row, on[-1] + 1].item() == tok.end) and (ended[row] or len(on) == 6)


def rollout_of(lengths, tok, seed=0):
    """A rollout of prompts and responses of these lengths, with everything in it that an update needs."""
    g = torch.Generator().manual_seed(seed)
    ids, mask = trainer.pad([(torch.randint(5, 100, (p + r,), generator=g).tolist(), [0] * p + [1] * r) for p, r in lengths])
    shape = mask[:, 1:].shape
    noise = {name: torch.randn(shape, generator=g) * mask[:, 1:] for name in ("ref_logps", "old_values", "advantages", "returns")}
    return ppo.Rollout([[]] * len(lengths), ids, mask[:, 1:].float(), torch.ones(len(lengths), dtype=torch.bool),
                       torch.randn(len(lengths), generator=g), -3 - torch.rand(shape, generator=g), **noise)


def two_models(tok):
    """A policy and a value model of nothing, the same at every call."""
    torch.manual_seed(0)
    policy, trunk = (GPT(GPTConfig(64, tok.vocab_size, 1, 1, 8)).eval() for _ in range(2))
    return policy, ppo.RewardModel(trunk).eval()


def test_micro_batches_change_no_gradient_and_no_number():
    """Masked means over a minibatch are not means of the means of its parts: responses differ in length."""
    tok, found = get_tokenizer("tiny"), []
    rollout = rollout_of([(3, 9), (8, 2), (2, 1), (5, 6), (4, 4)], tok)
    for budget in (10**6, 20):
        (policy, value), config = two_models(tok), ppo.Config(micro_tokens=budget)
        parts = [part for _, part in rollout.parts(budget)]
        logs = [ppo.accumulate(part, policy, value, rollout.mask.sum(), False, 0, config, RUN) for part in parts]
        grads = [p.grad for model in (policy, value) for p in model.parameters()]
        found.append((len(parts), {name: sum(log[name] for log in logs) for name in logs[0]}, torch.cat([g.flatten() for g in grads])))
    logps, values = ppo.response_logps(policy, rollout, 1.0), value.values(rollout.ids)[:, :-1]
    loss, clipfrac = ppo.policy_loss(logps, rollout.old_logps, rollout.advantages, rollout.mask)
    v_loss = ppo.value_loss(values, rollout.old_values, rollout.returns, rollout.mask)
    expected = torch.autograd.grad(loss + v_loss, [p for model in (policy, value) for p in model.parameters()])
    (one, numbers, whole), (several, summed, pieces) = found
    assert numbers["policy_loss"] == pytest.approx(loss.item(), rel=1e-4) and numbers["clipfrac"] == clipfrac.item()
    assert numbers["value_loss"] == pytest.approx(v_loss.item(), rel=1e-4)
    approx_kl = ppo.kl_k3(rollout.old_logps, logps, rollout.mask).item()
    assert numbers["approx_kl"] == pytest.approx(approx_kl, rel=1e-4), "of the old policy from the new one"
    expected = torch.cat([g.flatten() for g in expected])
    assert torch.allclose(whole, expected, atol=1e-6), "not the gradient of both losses"
    assert one == 1 < several and summed == pytest.approx(numbers, rel=1e-4), \
        "a mean of means: the parts have different numbers of tokens"
    assert torch.allclose(whole, pieces, atol=1e-6) and whole.abs().max() > 1e-3, "a mean of means in the gradient"


def test_the_ratio_is_checked_before_the_first_update_only(capsys):
    tok = get_tokenizer("tiny")
    rollout = rollout_of([(3, 9), (2, 1)], tok)  # of no model: its ratios are far from 1
    for first in (False, True):
        ppo.accumulate(rollout, *two_models(tok), rollout.mask.sum(), first, 3, ppo.Config(), RUN)
        assert ("step 3: before the first update a ratio is" in capsys.readouterr().out) is first


def test_parts_of_a_rollout_are_its_rows_as_wide_as_they_need():
    rollout = rollout_of([(3, 9), (8, 2), (2, 1), (5, 6), (4, 4)], get_tokenizer("tiny"))
    for budget, pair in ((22, [([1, 3], (2, 11))]), (21, [([1], (1, 10)), ([3], (1, 11))])):
        parts = [(rows.tolist(), tuple(part.ids.shape)) for rows, part in rollout.parts(budget)]
        assert parts == [([2, 4], (2, 8)), *pair, ([0], (1, 12))], "a part is wider than it needs, or than the budget"


def test_what_an_update_needs_is_estimated_from_the_models():
    tok = get_tokenizer("tiny")
    (policy, value), reference = two_models(tok), GPT(GPTConfig(64, tok.vocab_size, 1, 1, 8)).eval()
    config = ppo.Config(micro_tokens=20, temperature=0.7, gamma=0.9, lam=0.8)
    r = rollout_of([(3, 9), (8, 2), (2, 1)], tok)
    ppo.estimate(r, policy, lambda: ppo.nullcontext(reference), value, 0.3, config, RUN)
    with torch.no_grad():
        for model, found in ((policy, r.old_logps), (reference, r.ref_logps)):
            logps = (model(r.ids)[:, :-1] / 0.7).log_softmax(-1).gather(2, r.ids[:, 1:, None]).squeeze(2)
            assert torch.allclose(found, logps * r.mask, atol=1e-5), "of another model, or at another temperature"
        values = value.values(r.ids)[:, :-1] * r.mask
    assert torch.allclose(r.old_values, values, atol=1e-5), "the value is of the state before the token: off by one"
    rewards = ppo.kl_rewards(r.scores, r.old_logps, r.ref_logps, r.mask, 0.3)
    advantages, returns = ppo.gae(rewards, values, r.mask, 0.9, 0.8)
    assert torch.allclose(r.returns, returns, atol=1e-4), "returns are of the advantages before they are whitened"
    assert torch.allclose(r.advantages, ppo.whiten(advantages, r.mask), atol=1e-4)


def test_an_update_passes_over_every_response_in_minibatches(monkeypatch):
    tok, seen, mixed = get_tokenizer("tiny"), [], []
    rollout = rollout_of([(3, 9), (8, 2), (2, 1), (5, 6), (4, 4)], tok)
    rollout.scores = torch.arange(5.0)  # to tell the rows from each other

    def accumulate(part, policy, value, n, first, step, config, run):
        seen.append((sorted(part.scores.int().tolist()), int(n), first))
        return {"loss": float(part.mask.sum())}

    norms = iter(range(100))
    monkeypatch.setattr(ppo, "accumulate", accumulate)
    monkeypatch.setattr(ppo, "mix_step", lambda policy, text, *_: mixed.append(text))
    monkeypatch.setattr(trainer, "update", lambda *_: {"grad_norm": float(next(norms))})
    config = ppo.Config(minibatch=2, ppo_epochs=3, micro_tokens=10**6)
    found = ppo.ppo_update(rollout, "policy", "value", ("a", "b"), "text", 4, config, RUN)
    for epoch in range(3):
        rows = [row for part, *_ in seen[3 * epoch:3 * epoch + 3] for row in part]
        assert sorted(rows) == [0, 1, 2, 3, 4], "a response is learned twice in a pass, or never"
    assert [len(rows) for rows, *_ in seen] == [2, 2, 1] * 3
    assert len({str(rows) for rows, *_ in seen}) > 3, "every pass has the same minibatches"
    tokens = [9, 2, 1, 6, 4]
    assert all(n == sum(tokens[row] for row in rows) for rows, n, _ in seen), "n is of the whole minibatch"
    assert [first for *_, first in seen] == [True] + [False] * 8, "the ratio is 1 before the first update only"
    assert mixed == ["text"] * 9  # beside each minibatch
    assert found == {"loss": 22 / 3, "grad_norm": 8.0, "value_grad_norm": 9.0}, "not the means over the minibatches"
    ppo.ppo_update(rollout, "policy", "value", ("a", "b"), None, 4, config, RUN)
    assert len(mixed) == 9
    del seen[:]
    config = ppo.Config(minibatch=5, ppo_epochs=1, micro_tokens=20)
    found = ppo.ppo_update(rollout, "policy", "value", ("a", "b"), None, 4, config, RUN)
    assert found["loss"] == 22, "the numbers of the parts are not added up"
    assert len(seen) > 2 and {tuple(rest) for _, *rest in seen} == {(22, True)}, "the parts of a minibatch share its tokens"


def test_rows_of_a_rollout_keep_their_columns_together():
    rollout = rollout_of([(3, 9), (2, 2), (4, 1)], get_tokenizer("tiny"))
    rollout.conversations = ["a", "b", "c"]
    part = rollout.rows(torch.tensor([2, 1]))
    assert part.conversations == ["c", "b"] and part.ids.shape == (2, 5) and part.mask.shape == (2, 4)
    assert torch.equal(part.ids, rollout.ids[[2, 1], :5]) and torch.equal(part.returns, rollout.returns[[2, 1], :4])
    assert part.scores.tolist() == rollout.scores[[2, 1]].tolist()


def test_approx_kl_is_of_the_old_policy_from_the_new_one():
    """k3 on samples of old has to weigh with new/old; the other way round its mean is another number."""
    torch.manual_seed(0)
    old, new = torch.randn(12).log_softmax(0), torch.randn(12).log_softmax(0)
    exact = (old.exp() * (old - new)).sum().item()
    samples = torch.multinomial(old.exp(), 200_000, replacement=True)
    ones = torch.ones(1, len(samples))
    assert ppo.kl_k3(old[samples][None], new[samples][None], ones).item() == pytest.approx(exact, rel=0.05)
    assert ppo.kl_k3(new[samples][None], old[samples][None], ones).item() != pytest.approx(exact, rel=0.2)


@pytest.mark.runs
@pytest.mark.parametrize("flag", ["--flattery", "--noise", "--aspect", "--pairs", "--max-pairs", "--epochs", "--eval-every",
                                  "--dropout", "--lora-dropout"])
def test_a_flag_that_would_do_nothing_is_refused(flag):
    with pytest.raises(UserError, match=f"unrecognized arguments: {flag}"):
        parse(ppo.Config, argv=[flag, "1"])


def half_long(prompt, response):
    return len(response) / 2


@pytest.mark.runs
def test_a_reward_of_the_users_own():
    scorer = ppo.load_scorer(ppo.Config(reward=f"{__name__}:half_long"), RUN, None)
    assert scorer([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "four"}]]) == [2.0]


@pytest.mark.runs
@pytest.mark.parametrize("spec, words", [
    ("gold", "cannot mark the answers"), ("nowhere:f", "No module named"), ("math:nothing", "no attribute"),
    ("math:nan_of", "no attribute"), ("out/no-such-reward", "no-such-reward")])
def test_a_reward_that_is_not_there_is_one_sentence(spec, words):
    with pytest.raises(UserError, match=words):
        ppo.load_scorer(ppo.Config(reward=spec), RUN, None)


@pytest.mark.runs
def test_greedy_answers_are_no_samples():
    with pytest.raises(UserError, match="--temperature 0.*above 0"):
        ppo.main(ppo.Config(temperature=0.0, device="cpu"))


def test_reading_ease_is_bounded_and_wordless_answers_get_the_worst():
    assert ppo.reading_ease("...!") == -1.0 and ppo.reading_ease("Go. Do. Be. Go. Do.") <= 1.2
    assert ppo.reading_ease("The cat sat.") > ppo.reading_ease("Institutional considerations necessitate deliberation.")


def test_whitening_is_over_all_responses_so_that_a_good_one_stays_better_than_a_bad_one():
    x = torch.tensor([[5.0, 7.0, 0.0], [-5.0, -7.0, -6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    white = ppo.whiten(x, mask)
    inside = x[mask.bool()]
    expected = (inside - inside.mean()) / inside.std(correction=0)
    torch.testing.assert_close(white[mask.bool()], expected, rtol=1e-3, atol=1e-3)
    assert white[0, :2].min() > 0.5 and white[1].max() < -0.2
