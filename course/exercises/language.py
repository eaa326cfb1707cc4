"""Lessons 0 and 1: probabilities, attention, norm, cache, and the choice of a token."""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from course.exercise import Exercise
from generate import nucleus
from model import Cache

# ---- softmax ---------------------------------------------------------------------------------------------------------

def softmax_shown(x):
    powers = (x - x.amax(dim=-1, keepdim=True)).exp()  # the largest is e^0, so nothing overflows
    return powers / powers.sum(dim=-1, keepdim=True)


def softmax_cases(draw):
    return [[draw(2)], [draw(2, 3)], [draw(2, 3, 4)], [torch.tensor([[1000.0, 0.0], [-1000.0, -1000.0]])]]


softmax = Exercise(
    '''
def softmax(x):
    """Scores to probabilities.

    x (..., V) -> (..., V), the probabilities of the last dimension. Scores of 1000 and -1000 are no trouble.

        softmax(x)_i = e^{x_i} / sum_j e^{x_j}

    Hint: the same number can be subtracted from all x_j before, and one choice of it keeps e^x from overflowing.
    """
''',
    reference=lambda x: torch.softmax(x, dim=-1), cases=softmax_cases, grads=(0,), shows=(softmax_shown,),
    wrongs={
        "the largest score is not subtracted first: e^1000 is infinite, and infinity over infinity is no number":
            lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        "the largest score of all rows is subtracted from every row: a row far below it is 0 / 0":
            lambda x: (x - x.max()).exp() / (x - x.max()).exp().sum(-1, keepdim=True),
        "the sum runs over all numbers and not over the last dimension": lambda x: x.flatten().softmax(0).view(x.shape),
        "the first dimension is normalised in place of the last": lambda x: x.softmax(0),
        "the logarithm of the probabilities is returned": lambda x: x.log_softmax(-1),
    },
    put=lambda f: {"torch.Tensor.softmax": lambda x, dim=-1, dtype=None: f(x.transpose(dim, -1)).transpose(dim, -1)},
    scripts=("generate.py", "ppo.py", "dpo.py"), tests="tests/test_model.py")


# ---- cross-entropy ---------------------------------------------------------------------------------------------------

def cross_entropy_shown(logits, targets):
    logps = logits - logits.logsumexp(dim=-1, keepdim=True)  # (N, V): log softmax
    return -logps.gather(-1, targets[:, None]).mean()


def cross_entropy_cases(draw):
    extreme = torch.tensor([[200.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1])
    return [[draw(1, 2), draw.ints(2, 1)], [draw(3, 5), draw.ints(5, 3)], [4 * draw(8, 6), draw.ints(6, 8)], [*extreme]]


def of_target(x, targets):
    return x.gather(-1, targets[:, None])


def put_cross_entropy(f):
    def full(logits, targets, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
             label_smoothing=0.0):
        if reduction == "none":
            return torch.stack([f(logits[i:i + 1], targets[i:i + 1]) for i in range(len(targets))])
        if not len(targets):
            return logits.sum()
        return f(logits, targets) * (len(targets) if reduction == "sum" else 1)

    return {"torch.nn.functional.cross_entropy": full}


cross_entropy = Exercise(
    '''
def cross_entropy(logits, targets):
    """How surprised is the model by the tokens that came?

    logits (N, V), targets (N,) ids -> scalar, the mean over the N positions, in nats.

        L = -1/N sum_n log softmax(logits_n)[target_n]

    Hint: log softmax(x)_i = x_i - log sum_j e^{x_j}. A logit of 200 for the wrong token costs 200, not infinity.
    """
''',
    reference=lambda logits, targets: torch.nn.functional.cross_entropy(logits, targets), cases=cross_entropy_cases,
    grads=(0,), shows=(cross_entropy_shown,),
    wrongs={
        "the losses are added up and not averaged": lambda x, t: -of_target(x.log_softmax(-1), t).sum(),
        "the minus is missing: training would make the right token unlikely":
            lambda x, t: of_target(x.log_softmax(-1), t).mean(),
        "softmax is taken twice": lambda x, t: -of_target(x.softmax(-1).log_softmax(-1), t).mean(),
        "the logarithm is taken of a probability that was rounded to 0: use logsumexp":
            lambda x, t: -of_target(x.softmax(-1), t).log().mean(),
        "the probability stands where its logarithm should": lambda x, t: -of_target(x.softmax(-1), t).mean(),
        "softmax runs over the positions and not over the vocabulary":
            lambda x, t: -of_target(x.log_softmax(0), t).mean(),
    },
    put=put_cross_entropy, scripts=("pretrain.py", "sft.py", "dpo.py", "ppo.py"), tests="tests/test_sft.py")


# ---- attention -------------------------------------------------------------------------------------------------------

def attention_shown(q, k, v):
    T = q.size(2)
    scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5  # (B, H, T, T): row t, what t thinks of each position
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v


def attend(q, k, v, scale=None, hidden=1, dim=-1):
    """Attention with a scale, what is hidden (triu of that diagonal; None: nothing), and what softmax sums over."""
    scores = q @ k.transpose(2, 3) * (q.size(3) ** -0.5 if scale is None else scale(q.size(3)))
    if hidden is not None:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(hidden).bool(), -math.inf)
    return scores.softmax(dim) @ v


def put_attention(f):
    def full(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        if not is_causal or dropout_p or k.size(1) != q.size(1):  # one token that continues a cache sees all of it
            return sdpa(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **more)
        return f(q, k, v)

    return {"torch.nn.functional.scaled_dot_product_attention": full}


sdpa = F.scaled_dot_product_attention
causal_attention = Exercise(
    '''
def causal_attention(q, k, v):
    """Every position takes a weighted mean of the values of the positions up to itself (Vaswani et al. 2017, equation 1).

    q, k, v (B, H, T, D): batch, heads, time, size of a head -> (B, H, T, D).

        softmax( q k^T / sqrt(D) + mask ) v,      mask = -infinity where a position would look into its future

    Hint: torch.ones(T, T).triu(1) marks the future. The first position sees itself and nothing else.
    """
''',
    reference=lambda q, k, v: sdpa(q, k, v, is_causal=True), grads=(0, 1, 2), shows=(attention_shown,),
    cases=lambda draw: [draw.several(3, 1, 1, 2, 2), draw.several(3, 2, 2, 4, 3), draw.several(3, 2, 3, 6, 8)],
    wrongs={
        "the scores are not divided by sqrt(D)": lambda q, k, v: attend(q, k, v, lambda D: 1.0),
        "the scores are divided by D and not by its root": lambda q, k, v: attend(q, k, v, lambda D: 1 / D),
        "there is no mask: every position sees the future, and the next token needs no prediction":
            lambda q, k, v: attend(q, k, v, hidden=None),
        "a position does not see itself: the first one has nothing to look at, 0 / 0":
            lambda q, k, v: attend(q, k, v, hidden=0),
        "one future position is seen: the mask begins one column too late": lambda q, k, v: attend(q, k, v, hidden=2),
        "the mask comes after softmax: the weights of a row no longer add up to 1":
            lambda q, k, v: (q @ k.mT * q.size(3) ** -0.5).softmax(-1).tril() @ v,
        "the mask is upside down: the past is hidden and the future seen":
            lambda q, k, v: (q @ k.mT * q.size(3) ** -0.5).masked_fill(
                torch.ones_like(q[0, 0] @ k[0, 0].mT).tril(-1).bool(), -math.inf).softmax(-1) @ v,
        "softmax runs over the queries and not over the keys": lambda q, k, v: attend(q, k, v, dim=-2),
    },
    put=put_attention, scripts=("pretrain.py", "sft.py", "reward.py", "dpo.py", "ppo.py"), tests="tests/test_model.py")


# ---- layer norm ------------------------------------------------------------------------------------------------------

def layer_norm_shown(x, weight, bias, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt((centred ** 2).mean(dim=-1, keepdim=True) + eps) * weight + bias


def layer_norm_cases(draw):
    tiny = [1e-3 * draw(1, 2, 4), draw(4), draw(4), 1e-5]
    return [[draw(1, 3), draw(3), draw(3), 1e-5], [2 + draw(2, 3, 5), draw(5), draw(5), 1e-5], tiny]


def norm_by(x, weight, bias, variance, eps, root=lambda variance, eps: (variance + eps).sqrt()):
    return (x - x.mean(-1, keepdim=True)) / root(variance, eps) * weight + bias


def put_layer_norm(f):
    def full(x, shape, weight=None, bias=None, eps=1e-5):
        zeros = torch.zeros_like(weight) if bias is None else bias
        return f(x, weight, zeros, eps)

    return {"torch.nn.functional.layer_norm": full}


layer_norm = Exercise(
    '''
def layer_norm(x, weight, bias, eps):
    """Every vector gets mean 0 and variance 1, then a gain and an offset that are learned (Ba et al. 2016, equation 4).

    x (..., C), weight (C,), bias (C,), eps a small number -> (..., C). The statistics are of each vector's C entries.

        y = (x - mean) / sqrt(variance + eps) * weight + bias,      variance = mean of (x - mean)^2

    Hint: x.var() divides by C - 1 unless it is told not to.
    """
''',
    reference=lambda x, weight, bias, eps: torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps),
    cases=layer_norm_cases, grads=(0, 1, 2), shows=(layer_norm_shown,),
    wrongs={
        "the variance is divided by C - 1: x.var() needs unbiased=False":
            lambda x, w, b, eps: norm_by(x, w, b, x.var(-1, keepdim=True), eps),
        "eps is added to the root and not under it": lambda x, w, b, eps: norm_by(
            x, w, b, x.var(-1, keepdim=True, unbiased=False), eps, lambda variance, eps: variance.sqrt() + eps),
        "the mean is not subtracted: that is RMSNorm with an offset":
            lambda x, w, b, eps: x / ((x ** 2).mean(-1, keepdim=True) + eps).sqrt() * w + b,
        "it divides by the variance and not by its root": lambda x, w, b, eps: norm_by(
            x, w, b, x.var(-1, keepdim=True, unbiased=False), eps, lambda variance, eps: variance + eps),
        "mean and variance are those of the whole batch": lambda x, w, b, eps:
            (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt() * w + b,
        "gain and offset are left out":
            lambda x, w, b, eps: torch.nn.functional.layer_norm(x, w.shape, None, None, eps),
    },
    put=put_layer_norm, scripts=("pretrain.py", "sft.py", "reward.py", "dpo.py", "ppo.py"), tests="tests/test_model.py")


# ---- the cache -------------------------------------------------------------------------------------------------------

def cached(keys, values, k, v, cursor):
    """What Cache.extend does, of one layer, with `seen` over the whole room."""
    B, H, room, D = keys.shape
    cache = Cache(SimpleNamespace(config=SimpleNamespace(n_layer=1, n_kv_head=H, head_size=D)), cursor, room)
    cache.keys, cache.values = keys.clone()[None], values.clone()[None]
    cache.positions(1)
    cache.extend(0, k, v)
    return cache.keys[0], cache.values[0], F.pad(cache.seen[:, 0, 0], (0, room - cache.longest))


def kv_cache_cases(draw):
    return [[*draw.several(2, 1, 1, 3, 1), *draw.several(2, 1, 1, 1, 1), torch.tensor([1])],
            [*draw.several(2, 2, 2, 4, 2), *draw.several(2, 2, 2, 1, 2), torch.tensor([2, 0])],
            [*draw.several(2, 3, 1, 6, 2), *draw.several(2, 3, 1, 1, 2), torch.tensor([4, 1, 3])]]


def cache_by(keys, values, k, v, cursor, column=None, seen=lambda columns, cursor: columns <= cursor):
    column, rows = cursor if column is None else column, torch.arange(len(keys))
    keys, values = keys.clone(), values.clone()
    keys[rows, :, column], values[rows, :, column] = k[:, :, 0], v[:, :, 0]
    return keys, values, seen(torch.arange(keys.size(2)), cursor[:, None]) & torch.ones(len(keys), keys.size(2)).bool()


def put_kv_cache(f):
    def extend(self, layer, k, v):
        if self.seen is None or self.keys is None:  # the prompts
            return prefill(self, layer, k, v)
        self.keys[layer], self.values[layer], seen = f(self.keys[layer], self.values[layer], k, v, self.cursor)
        seen = seen[:, None, None, :self.longest]
        return self.keys[layer, :, :, :self.longest], self.values[layer, :, :, :self.longest], seen

    return {"model.Cache.extend": extend}


prefill = Cache.extend
kv_cache = Exercise(
    '''
def kv_cache(keys, values, k, v, cursor):
    """The newest token of each row joins the keys and values of what was read before.

    keys, values (B, H, room, D): the cache of a layer; k, v (B, H, 1, D) of the newest token; cursor (B,): the column
    where it belongs, another in each row, because the prompts had different lengths.
    -> keys, values with k, v in these columns, and seen (B, room) bool: the columns that the newest token attends to.
    Behind a row's cursor lies rubbish (padding of its prompt). Return new tensors; leave the arguments as they are.

    Hint: keys[rows, :, cursor] with rows = torch.arange(B) picks one column of each row: (B, H, D).
    """
''',
    reference=cached, cases=kv_cache_cases, shows=(Cache.positions, Cache.extend),
    wrongs={
        "all rows are written in the column of the longest one":
            lambda *x: cache_by(*x, column=x[4].max().expand(len(x[0]))),
        "the newest token does not see itself": lambda *x: cache_by(*x, seen=lambda c, cursor: c < cursor),
        "all rows see as far as the longest one: a shorter row attends to its padding":
            lambda *x: cache_by(*x, seen=lambda c, cursor: c <= cursor.max()),
        "the whole room is seen, what nobody has written included":
            lambda *x: cache_by(*x, seen=lambda c, cursor: c >= 0),
        "the token is written one column too late":
            lambda *x: cache_by(*x, column=(x[4] + 1).clamp(max=x[0].size(2) - 1)),
        "keys and values are exchanged": lambda keys, values, k, v, cursor: cache_by(keys, values, v, k, cursor),
    },
    put=put_kv_cache, scripts=("generate.py", "sft.py", "dpo.py", "ppo.py"), tests="tests/test_model.py")


# ---- top-p -----------------------------------------------------------------------------------------------------------

def top_p_cases(draw):
    return [[torch.tensor([[0.5, 0.375, 0.125]]), 0.5], [draw(2, 4).softmax(-1), 0.6], [(2 * draw(4, 9)).softmax(-1), 0.9],
            [(3 * draw(4, 9)).softmax(-1), 0.3]]


def cut(probs, keep, largest=True):
    """keep: the sorted probabilities and their running sum -> which of them stay."""
    ordered, order = probs.sort(dim=-1, descending=largest)
    return torch.zeros_like(probs).scatter(-1, order, ordered * keep(ordered, ordered.cumsum(-1)))


top_p = Exercise(
    '''
def top_p(probs, p):
    """Nucleus sampling keeps the fewest tokens that have the probability p together (Holtzman et al. 2020, section 3.1).

    probs (B, V), p above 0 and below 1 -> (B, V): the probability of what stays, unchanged, and 0 for the rest. At
    least one token stays in every row. (Whoever draws divides by what is left.)

    Hint: sort downwards. A token goes where those before it have reached p already without it.
    """
''',
    reference=nucleus, cases=top_p_cases,
    wrongs={
        "the token that reaches p is dropped (sum < p): what stays has less than p, and a confident row loses everything":
            lambda probs, p: cut(probs, lambda x, total: total < p),
        "the token that crosses p is dropped (sum <= p): what stays has p at most, and a confident row loses everything":
            lambda probs, p: cut(probs, lambda x, total: total <= p),
        "all tokens stay up to p, and one more, even where p is reached exactly":
            lambda probs, p: cut(probs, lambda x, total: total - x <= p),
        "p is taken as the smallest probability that stays": lambda probs, p: probs * (probs >= p),
        "the running sum is in the order of the ids, not of the probabilities":
            lambda probs, p: probs * (probs.cumsum(-1) - probs < p),
        "the least likely tokens are kept: the sort is upwards":
            lambda probs, p: cut(probs, lambda x, total: total - x < p, largest=False),
        "the result is sorted: probabilities stand at the wrong ids":
            lambda probs, p: (lambda x: x * (x.cumsum(-1) - x < p))(probs.sort(dim=-1, descending=True).values),
    },
    put=lambda f: {"generate.nucleus": f}, scripts=("generate.py",), tests="tests/test_model.py")

EXERCISES = [softmax, cross_entropy, causal_attention, layer_norm, kv_cache, top_p]
