"""Lessons 8 and 9: rewards for tokens, advantages, and how far a policy may move."""
import torch

import ppo
from course.exercise import Exercise

# ---- rewards ---------------------------------------------------------------------------------------------------------

def kl_cases(draw):
    def case(B, T):
        return [draw(B), draw(B, T), draw(B, T), draw.response(B, T), 0.4]

    return [case(1, 3), case(2, 5), case(4, 9)]


def last_of(mask):
    return mask * (mask.flip(1).cumsum(1).flip(1) == 1)


def kl_by(scores, logps, ref, mask, beta, sign=-1, where=last_of, penalised=None):
    return sign * beta * (logps - ref) * (mask if penalised is None else penalised) + scores[:, None] * where(mask)


kl_rewards = Exercise(
    '''
def kl_rewards(scores, logps, ref_logps, mask, beta):
    """A reward for every token: the price of leaving the reference, and the score at the end (Ouyang et al. 2022,
    equation 2; Ziegler et al. 2019, equation 2).

    scores (B,), one for each response; logps, ref_logps (B, T) of its tokens; mask (B, T): 1 on the response; beta a
    number -> (B, T), 0 outside of the response. What stands outside of the mask is rubbish.

        r_t = -beta (log pi_t - log pi_ref_t),      and the score on top of that at the last token of the response

    Hint: the response need not end in the last column. mask.flip(1).cumsum(1) counts from the right.
    """
''',
    reference=ppo.kl_rewards, cases=kl_cases,
    wrongs={
        "the penalty has the wrong sign: it is paid for leaving the reference": lambda *x: kl_by(*x, sign=1),
        "the score stands on every token": lambda *x: kl_by(*x, where=lambda mask: mask),
        "the score stands in the last column, which is padding in most rows":
            lambda *x: kl_by(*x, where=lambda mask: torch.eye(mask.size(1))[-1].to(mask.dtype).expand_as(mask)),
        "the score stands on the first token of the response":
            lambda *x: kl_by(*x, where=lambda mask: mask * (mask.cumsum(1) == 1)),
        "the score stands one token too early, before the end token":
            lambda *x: kl_by(*x, where=lambda mask: last_of(mask).roll(-1, 1)),
        "prompt and padding are penalised too": lambda *x: kl_by(*x, penalised=torch.ones_like(x[3])),
        "the score is left out": lambda *x: kl_by(*x, where=torch.zeros_like),
        "the last token has its score and no penalty": lambda *x: kl_by(*x, penalised=x[3] - last_of(x[3])),
    },
    put=lambda f: {"ppo.kl_rewards": f}, scripts=("ppo.py",), tests="tests/test_ppo.py")


def gae_cases(draw):
    def case(B, T, gamma, lam):
        mask = draw.response(B, T)
        return [draw(B, T) * mask, draw(B, T), mask, gamma, lam]

    return [case(1, 3, 1.0, 0.95), case(2, 6, 0.9, 0.8), case(4, 9, 0.95, 0.5)]


def gae_by(rewards, values, mask, gamma, lam, next_value=None, clean=True, fade=None, returns=None, minus=True):
    values = values * mask if clean else values
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1) if next_value is None else next_value(values)
    delta = (rewards + gamma * following - (values if minus else 0)) * mask
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        running = (delta[:, t] + (gamma * lam if fade is None else fade(gamma, lam)) * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask if returns is None else returns(advantages, values, mask)


def rewards_to_go(rewards, values, mask, gamma, lam):
    advantages = gae_by(rewards, values, mask, gamma, lam)[0]
    return advantages, gae_by(rewards, 0 * values, mask, gamma, 1.0)[0]


gae = Exercise(
    '''
def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation: was a token better than the value model expected? (Schulman et al. 2016,
    equation 16)

    rewards, values, mask (B, T); gamma, lam numbers -> advantages, returns, (B, T) each, 0 outside of the mask.
    values[:, t] is the expectation before token t; after the last token of the response nothing more comes: V = 0. What
    values have outside of the mask is rubbish.

        delta_t = r_t + gamma V_{t+1} - V_t,      A_t = delta_t + gamma lam A_{t+1},      returns_t = A_t + V_t

    Hint: from the last column to the first.
    """
''',
    reference=ppo.gae, cases=gae_cases,
    wrongs={
        "V_{t+1} after the last token is what the value model says of padding: nothing comes after the end":
            lambda r, v, m, gamma, lam: gae_by(r, v, m, gamma, lam, clean=False),
        "the mask is left out: prompt and padding have advantages too, and what they have runs into the response":
            lambda r, v, m, gamma, lam: gae_by(r, v, torch.ones_like(m), gamma, lam),
        "V_t stands where V_{t+1} should: delta knows nothing of the next state":
            lambda *x: gae_by(*x, next_value=lambda v: v),
        "lam is forgotten: every advantage is the whole rest of the response":
            lambda *x: gae_by(*x, fade=lambda g, l: g),
        "gamma lam A_{t+1} is forgotten: only delta is left": lambda *x: gae_by(*x, fade=lambda g, l: 0.0),
        "gamma is forgotten in the sum of the deltas": lambda *x: gae_by(*x, fade=lambda g, l: l),
        "V_t is not subtracted: these are returns and no advantages": lambda *x: gae_by(*x, minus=False),
        "the returns are the advantages: V is not added": lambda *x: gae_by(*x, returns=lambda a, v, m: a),
        "the returns are sums of rewards and not A + V": rewards_to_go,
        "the returns are made of whitened advantages: the value model would learn another scale":
            lambda *x: gae_by(*x, returns=lambda a, v, m: (ppo.whiten(a, m) + v) * m),
    },
    put=lambda f: {"ppo.gae": lambda rewards, values, mask, gamma=1.0, lam=0.95: f(rewards, values, mask, gamma, lam)},
    scripts=("ppo.py",), tests="tests/test_ppo.py")


def whiten_by(x, mask, over=None, mean=True, root=True, correction=0, outside=False):
    over = mask if over is None else over
    average = ppo.masked_mean(x, over)
    variance = ((x - average) ** 2 * over).sum() / (over.sum() - correction)
    return (x - mean * average) / ((variance + 1e-8) ** (0.5 if root else 1)) * (1 if outside else mask)


whiten = Exercise(
    '''
def whiten(x, mask):
    """Advantages with mean 0 and variance 1 over all response tokens of the batch (the "37 details" of PPO, Huang et al.
    2022, detail 7).

    x, mask (B, T) -> (B, T), 0 outside of the mask. Padding takes no part in either statistic.

        y = (x - mean) / sqrt(variance + 1e-8) on the mask,      variance = masked mean of (x - mean)^2

    Hint: the variance divides by the number of tokens, not by one less.
    """
''',
    reference=ppo.whiten, grads=(0,),
    cases=lambda draw: [[1 + draw(1, 5), torch.tensor([[0.0, 1, 1, 1, 0]])], [2 + draw(2, 6), draw.response(2, 6)],
                        [3 * draw(4, 9) - 1, draw.response(4, 9)]],
    wrongs={
        "padding takes part in mean and variance": lambda x, m: whiten_by(x, m, over=torch.ones_like(m)),
        "the mean is not subtracted": lambda x, m: whiten_by(x, m, mean=False),
        "it divides by the variance and not by its root": lambda x, m: whiten_by(x, m, root=False),
        "the variance is divided by n - 1": lambda x, m: whiten_by(x, m, correction=1),
        "outside of the mask it is not 0": lambda x, m: whiten_by(x, m, outside=True),
        "every response is whitened by itself: a good one and a bad one look alike":
            lambda x, m: torch.cat([ppo.whiten(a[None], b[None]) for a, b in zip(x, m)]),
    },
    put=lambda f: {"ppo.whiten": f}, scripts=("ppo.py",), tests="tests/test_ppo.py")


# ---- losses ----------------------------------------------------------------------------------------------------------

def policy_cases(draw):
    def case(B, T):
        old = draw(B, T) - 2
        return [old + 0.5 * draw(B, T), old, draw(B, T), draw.response(B, T), 0.2]

    return [case(1, 3), case(2, 6), case(4, 12)]


def clipped_by(logps, old, advantages, mask, clip, of=torch.minimum, ratio=None, mean=ppo.masked_mean, sign=-1):
    ratio = torch.exp((logps - old) * mask) if ratio is None else ratio(logps, old, mask)
    return sign * mean(of(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def put_policy_loss(f):
    def full(logps, old_logps, advantages, mask, clip=0.2):
        return f(logps, old_logps, advantages, mask, clip), ours(logps, old_logps, advantages, mask, clip)[1]

    return {"ppo.policy_loss": full}


ours = ppo.policy_loss
policy_loss = Exercise(
    '''
def policy_loss(logps, old_logps, advantages, mask, clip):
    """PPO's clipped loss: good tokens get likelier, until they have moved far enough (Schulman et al. 2017, equation 7).

    logps, old_logps, advantages, mask (B, T); clip a number -> scalar, the mean over the mask.

        L = -mean min( ratio A, clip(ratio, 1 - clip, 1 + clip) A ),      ratio = pi / pi_old

    Hint: the ratio of two probabilities whose logarithms you have. ratio.clamp(low, high).
    """
''',
    reference=lambda *x: ours(*x)[0], cases=policy_cases, grads=(0,), shows=(ours,),
    wrongs={
        "the larger of the two is taken: nothing holds it back": lambda *x: clipped_by(*x, of=torch.maximum),
        "nothing is clipped": lambda *x: clipped_by(*x, of=lambda plain, clipped: plain),
        "the clipped one is always taken: a token that moved the wrong way is never brought back":
            lambda *x: clipped_by(*x, of=lambda plain, clipped: clipped),
        "the minus is missing: good tokens get less likely": lambda *x: clipped_by(*x, sign=1),
        "the ratio is upside down": lambda *x: clipped_by(*x, ratio=lambda new, old, m: torch.exp((old - new) * m)),
        "the ratio is that of the log-probabilities": lambda *x: clipped_by(*x, ratio=lambda new, old, m: new / old),
        "prompt and padding take part in the mean": lambda *x: clipped_by(
            *x, ratio=lambda new, old, m: torch.exp(new - old), mean=lambda x, m: x.mean()),
        "the sum over the response is divided by all positions":
            lambda *x: clipped_by(*x, mean=lambda x, m: (x * m).mean()),
        "responses are averaged one by one: a token of a short one counts more":
            lambda *x: clipped_by(*x, mean=lambda x, m: ((x * m).sum(1) / m.sum(1)).mean()),
    },
    put=put_policy_loss, scripts=("ppo.py",), tests="tests/test_ppo.py")


def value_cases(draw):
    def case(B, T):
        old = draw(B, T)
        return [old + 0.5 * draw(B, T), old, draw(B, T), draw.response(B, T), 0.2]

    return [case(1, 3), case(2, 6), case(4, 12)]


def value_by(values, old, returns, mask, clip, of=torch.maximum, near=None, half=0.5, mean=ppo.masked_mean):
    near = old + (values - old).clamp(-clip, clip) if near is None else near(values, old, returns, clip)
    return half * mean(of((values - returns) ** 2, (near - returns) ** 2), mask)


value_loss = Exercise(
    '''
def value_loss(values, old_values, returns, mask, clip):
    """The value model learns the returns, in small steps (Schulman et al.'s baselines; Huang et al. 2022, detail 9).

    values, old_values, returns, mask (B, T); clip a number -> scalar.

        L = 1/2 mean max( (V - R)^2, (V_near - R)^2 ),      V_near = V_old + clip(V - V_old, -clip, clip)

    The mean is over the mask.

    Hint: the larger of the two errors, entry by entry: torch.maximum.
    """
''',
    reference=ppo.value_loss, cases=value_cases, grads=(0,),
    wrongs={
        "the smaller of the two errors is taken": lambda *x: value_by(*x, of=torch.minimum),
        "nothing is clipped": lambda *x: value_by(*x, of=lambda plain, clipped: plain),
        "only the clipped value is compared: a value that moved too far gets no gradient back":
            lambda *x: value_by(*x, of=lambda plain, clipped: clipped),
        "the half is forgotten": lambda *x: value_by(*x, half=1.0),
        "the value itself is clipped and not its distance from the old one":
            lambda *x: value_by(*x, near=lambda v, old, r, clip: v.clamp(-clip, clip)),
        "the value is clipped by a factor, as a ratio is":
            lambda *x: value_by(*x, near=lambda v, old, r, clip: old * (v / old).clamp(1 - clip, 1 + clip)),
        "prompt and padding take part in the mean": lambda *x: value_by(*x, mean=lambda x, m: x.mean()),
    },
    put=lambda f: {"ppo.value_loss": lambda values, old_values, returns, mask, clip=0.2: f(
        values, old_values, returns, mask, clip)},
    scripts=("ppo.py",), tests="tests/test_ppo.py")


# ---- the KL ----------------------------------------------------------------------------------------------------------

def kl_mean(logps, ref, mask, k, mean=ppo.masked_mean):
    return mean(k((logps - ref) * mask), mask)


kl_k3 = Exercise(
    '''
def kl_k3(logps, ref_logps, mask):
    """How far is the policy from its reference, from samples of the policy: never negative (Schulman 2020, "Approximating
    KL divergence", k3).

    logps, ref_logps (B, T) of sampled tokens, mask (B, T) -> scalar, the mean over the mask, in nats a token.

        k3 = e^{-k1} - 1 + k1,      k1 = log pi - log pi_ref

    Hint: both k1 and k3 have the mean KL(pi || pi_ref); k3 adds something of mean 0 to k1.
    """
''',
    reference=ppo.kl_k3, grads=(0,),
    cases=lambda draw: [[*draw.several(2, B, T), draw.response(B, T)] for B, T in ((1, 3), (2, 6), (4, 12))],
    wrongs={
        "it is k1: right on average, but negative on many batches": lambda *x: kl_mean(*x, lambda k1: k1),
        "it is k2 = k1^2 / 2: biased": lambda *x: kl_mean(*x, lambda k1: k1 ** 2 / 2),
        "the sign in the exponent is turned around: the samples would have to be the reference's":
            lambda *x: kl_mean(*x, lambda k1: k1.exp() - 1 - k1),
        "prompt and padding take part": lambda new, ref, m: ((ref - new).exp() - 1 + new - ref).mean(),
        "it is a sum over each response and not a mean over tokens":
            lambda *x: kl_mean(*x, lambda k1: (-k1).exp() - 1 + k1, lambda k, m: (k * m).sum(1).mean()),
        "the 1 is not subtracted": lambda *x: kl_mean(*x, lambda k1: (-k1).exp() + k1),
        "k1 is subtracted and not added": lambda *x: kl_mean(*x, lambda k1: (-k1).exp() - 1 - k1),
    },
    put=lambda f: {"ppo.kl_k3": f}, scripts=("ppo.py",), tests="tests/test_ppo.py")


def adapted(beta, kl, target, n, horizon, error=lambda kl, target: min(max(kl / target - 1, -0.2), 0.2)):
    return beta * (1 + error(kl, target) * n / horizon)


adaptive_beta = Exercise(
    '''
def adaptive_beta(beta, kl, target, n, horizon):
    """The price of the KL, adapted to keep the KL near a target (Ziegler et al. 2019, section 2.2).

    beta: the present price; kl: the KL of a response that was measured on n responses; target: what it should be;
    horizon: responses over which beta adapts -> the new beta, a number.

        error = clip( kl / target - 1, -0.2, 0.2 ),      beta <- beta (1 + error n / horizon)

    Hint: which way must beta move where the KL is too large?
    """
''',
    reference=ppo.adapted_beta, doubles=False,
    cases=lambda draw: [[0.3, 6.5 + float(draw.ints(3, 1)) / 10, 6.0, 64, 3200], [0.1, 30.0, 6.0, 64, 640],
                        [0.2, 0.5, 6.0, 32, 640]],
    wrongs={
        "the error is not clipped: one wild batch moves beta by a factor":
            lambda *x: adapted(*x, error=lambda kl, target: kl / target - 1),
        "beta falls where the KL is too large": lambda *x: adapted(
            *x, error=lambda kl, target: -min(max(kl / target - 1, -0.2), 0.2)),
        "n and horizon are left out: beta jumps by a fifth in each iteration":
            lambda beta, kl, target, n, horizon: adapted(beta, kl, target, 1, 1),
        "the change is added to beta and not a factor of it": lambda beta, kl, target, n, horizon:
            beta + min(max(kl / target - 1, -0.2), 0.2) * n / horizon,
        "the error is the difference kl - target, not its share": lambda *x: adapted(
            *x, error=lambda kl, target: min(max(kl - target, -0.2), 0.2)),
        "target and KL are exchanged": lambda *x: adapted(
            *x, error=lambda kl, target: min(max(target / kl - 1, -0.2), 0.2)),
        "horizon / n stands in place of n / horizon": lambda beta, kl, target, n, horizon:
            adapted(beta, kl, target, horizon, n),
    },
    put=lambda f: {"ppo.adapted_beta": f}, scripts=("ppo.py",), tests="tests/test_ppo.py")

EXERCISES = [kl_rewards, gae, whiten, policy_loss, value_loss, kl_k3, adaptive_beta]
