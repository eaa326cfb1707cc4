"""PPO: every quantity against hand-worked numbers, brute force, or a problem whose optimum is known."""
import math

import pytest
import torch

import ppo
import trainer
from errors import UserError
from flags import check, parse
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
    assert torch.allclose(rewards, expected)  # the penalty is negative where the policy is likelier; the score sits on the end


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
            assert advantages[b, t].item() == pytest.approx(float(total), abs=1e-5)
            assert returns[b, t].item() == pytest.approx(float(total + values[b, t]), abs=1e-5)
    assert not advantages[MASK == 0].any() and not returns[MASK == 0].any()


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
    assert torch.allclose(returns, to_go, atol=1e-5)


def test_padding_and_its_values_never_count():
    rewards, values = noise(2, 5), noise(2, 5, seed=1)
    a = ppo.gae(rewards * MASK, values, MASK)
    b = ppo.gae(rewards * MASK, torch.where(MASK == 1, values, torch.tensor(1e6)), MASK)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_whiten_by_masked_statistics():
    x = torch.where(MASK == 1, noise(2, 5), torch.tensor(1e6))
    white = ppo.whiten(x, MASK)
    inside = white[MASK == 1]
    assert inside.mean().item() == pytest.approx(0, abs=1e-6) and inside.var(unbiased=False).item() == pytest.approx(1, rel=1e-4)
    assert not white[MASK == 0].any() and torch.equal(white, white + 0)
    assert torch.isfinite(ppo.whiten(torch.ones(1, 3), torch.ones(1, 3))).all()


# ---- losses ----------------------------------------------------------------------------------------------------------

def test_policy_loss_gradient_at_ratio_1_is_minus_the_advantage():
    old, advantages = noise(2, 5), noise(2, 5, seed=1)
    logps = old.clone().requires_grad_()
    loss, clipfrac = ppo.policy_loss(logps, old, advantages, MASK)
    loss.backward()
    assert torch.allclose(logps.grad, -advantages * MASK / MASK.sum(), atol=1e-7)
    assert clipfrac == 0 and loss.item() == pytest.approx(-(advantages * MASK).sum().item() / 6, abs=1e-6)


@pytest.mark.parametrize("ratio, advantage, expected, moves", [
    (1.5, 2.0, 1.2 * 2.0, False),   # likelier already: no more
    (1.5, -2.0, 1.5 * -2.0, True),  # likelier, but it should not be: the full gradient brings it back
    (0.5, -2.0, 0.8 * -2.0, False), (0.5, 2.0, 0.5 * 2.0, True), (1.1, 2.0, 1.1 * 2.0, True)])
def test_policy_loss_clips_on_the_right_side_only(ratio, advantage, expected, moves):
    logps = torch.tensor([[math.log(ratio), 123.0]]).requires_grad_()
    loss, clipfrac = ppo.policy_loss(logps, torch.zeros(1, 2), torch.tensor([[advantage, 5.0]]), torch.tensor([[1.0, 0.0]]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-expected, rel=1e-5)
    assert bool(logps.grad[0, 0] != 0) == moves == (clipfrac.item() == 0) and logps.grad[0, 1] == 0


def test_value_loss_hand_worked():
    values, old, returns = torch.tensor([[1.0, 0.5, 9.0]]), torch.tensor([[0.0, 0.4, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    # clipped value 0.2: max((1 - 2)^2, (0.2 - 2)^2) = 3.24;   within the clip: (0.5 - 1)^2 = 0.25
    assert ppo.value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (3.24 + 0.25) / 2)


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
    assert torch.allclose(ppo.kl_k1(logps, ref, MASK), torch.tensor([1.5, 1.5]))
    assert ppo.kl_k3(logps, ref, MASK).item() == pytest.approx(math.exp(-0.5) - 0.5)


def test_adapted_beta():
    assert ppo.adapted_beta(0.1, kl=6.0, target=6.0, n=64, horizon=640) == pytest.approx(0.1)
    assert ppo.adapted_beta(0.1, kl=6.6, target=6.0, n=64, horizon=640) == pytest.approx(0.1 * 1.01)
    assert ppo.adapted_beta(0.1, kl=60, target=6.0, n=64, horizon=640) == pytest.approx(0.1 * 1.02)  # clipped at 0.2
    assert ppo.adapted_beta(0.1, kl=0.0, target=6.0, n=64, horizon=640) == pytest.approx(0.1 * 0.98)


def test_explained_variance():
    returns = noise(2, 5)
    assert ppo.explained_variance(returns, returns, MASK) == pytest.approx(1)
    assert ppo.explained_variance(torch.zeros(2, 5), returns, MASK) == pytest.approx(0, abs=1e-5)


# ---- a problem whose optimum is known --------------------------------------------------------------------------------

def test_a_bandit_reaches_the_optimum_of_equation_4():
    """One step, four actions: the maximiser of E[r] - beta KL is pi = pi_ref exp(r / beta) / Z (DPO's equation 4)."""
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
