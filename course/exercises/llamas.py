"""After lesson 1: what Llama does otherwise."""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.func import functional_call

import llama
from common.errors import UserError
from course.exercise import Exercise

NEEDS = {"family": "llama"}

# ---- RoPE ------------------------------------------------------------------------------------------------------------

def of_llama(x, positions, theta):
    config = SimpleNamespace(head_size=x.size(3), rope_theta=theta, rope_scaling=None)
    return turn(x, *angles(config, positions))


def rope_by(x, positions, theta, exponent=lambda i, D: 2 * i / D, neighbours=False, sign=1, plus=False):
    D = x.size(3)
    angle = positions[:, None] / theta ** exponent(torch.arange(D // 2), D)  # (T, D / 2)
    cos, sin = angle.cos(), sign * angle.sin()
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)
    pairs = a * cos + (b if plus else -b) * sin, a * sin + b * cos
    return torch.stack(pairs, -1).flatten(-2) if neighbours else torch.cat(pairs, -1)


def put_rope(f):
    """angles hands on what turn needs in place of cos and sin: positions and config."""
    def turned(x, positions, config):
        if config.rope_scaling:
            raise UserError("rope as you wrote it knows no rope_scaling: use a model without")
        if positions.dim() == 1:
            return f(x, positions, config.rope_theta)
        return torch.cat([f(row[None], at, config.rope_theta) for row, at in zip(x, positions)])

    return {"llama.angles": lambda config, positions: (positions, config), "llama.turn": turned}


angles, turn = llama.angles, llama.turn
rope = Exercise(
    '''
def rope(x, positions, theta):
    """Queries and keys are turned by angles that grow with their positions (Su et al. 2021, RoFormer, equation 34).

    x (B, H, T, D), D even; positions (T,) int; theta a number, 10000 mostly -> (B, H, T, D).
    Pair i, for i from 0 to D/2 - 1, is (x_i, x_{i + D/2}), as Llama's files have it, and is turned by

        angle = position / theta^(2i/D):      (a, b) -> (a cos - b sin, a sin + b cos)

    Then q.k depends on the distance of the two positions only.

    Hint: all pairs at once: a, b = x.chunk(2, dim=-1), angles (T, D/2).
    """
''',
    reference=of_llama, grads=(0,), doubles=False, shows=(llama.frequencies, angles, turn),
    cases=lambda draw: [[draw(1, 1, 2, 2), torch.tensor([0, 1]), 100.0], [draw(2, 2, 3, 4), torch.tensor([2, 3, 4]), 100.0],
                        [draw(1, 2, 4, 8), torch.tensor([0, 5, 6, 30]), 10000.0]],
    wrongs={
        "neighbours are paired, (x_0, x_1), (x_2, x_3): right in itself, but Llama's weights pair x_i with x_{i + D/2}":
            lambda *x: rope_by(*x, neighbours=True),
        "the exponent is i/D and not 2i/D": lambda *x: rope_by(*x, exponent=lambda i, D: i / D),
        "the exponent has the wrong sign: later pairs turn faster":
            lambda *x: rope_by(*x, exponent=lambda i, D: -2 * i / D),
        "it turns the other way round": lambda *x: rope_by(*x, sign=-1),
        "the minus is missing: that is no turn, and lengths change": lambda *x: rope_by(*x, plus=True),
        "positions are counted from 0, whatever the argument says":
            lambda x, positions, theta: rope_by(x, torch.arange(len(positions)), theta),
    },
    put=put_rope, needs=NEEDS, scripts=("pretrain.py",), tests="tests/test_llama.py")


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------

def of_norm(x, weight, eps):
    return functional_call(llama.RMSNorm(len(weight), eps), {"weight": weight}, (x,))


def rms_by(x, weight, eps, centre=False, of=lambda s: s.mean(-1, keepdim=True), root=lambda s, eps: (s + eps).sqrt()):
    x = x - x.mean(-1, keepdim=True) if centre else x
    return x / root(of(x ** 2), eps) * weight


rms_norm = Exercise(
    '''
def rms_norm(x, weight, eps):
    """Layer norm without mean and offset (Zhang and Sennrich 2019, equation 4).

    x (..., C), weight (C,), eps a small number -> (..., C).

        y = x / sqrt( mean of x^2 + eps ) * weight,      the mean over the C entries of each vector

    Hint: keepdim=True lets the result be divided by.
    """
''',
    reference=of_norm, grads=(0, 1), doubles=False, shows=(llama.RMSNorm.forward,),
    cases=lambda draw: [[1 + draw(1, 3), draw(3), 1e-5], [2 + draw(2, 3, 5), draw(5), 1e-5], [1e-3 * draw(2, 4), draw(4), 1e-5]],
    wrongs={
        "the mean is subtracted: that is LayerNorm": lambda *x: rms_by(*x, centre=True),
        "eps is added to the root and not under it": lambda *x: rms_by(*x, root=lambda s, eps: s.sqrt() + eps),
        "the sum of the squares stands in place of their mean: vectors get length 1":
            lambda *x: rms_by(*x, of=lambda s: s.sum(-1, keepdim=True)),
        "it divides by the mean square and not by its root": lambda *x: rms_by(*x, root=lambda s, eps: s + eps),
        "the gain is left out": lambda x, weight, eps: rms_by(x, 1.0, eps),
        "the mean is that of the whole batch": lambda *x: rms_by(*x, of=lambda s: s.mean()),
    },
    put=lambda f: {"llama.RMSNorm.forward": lambda self, x: f(x, self.weight, self.eps)}, needs=NEEDS,
    scripts=("pretrain.py",), tests="tests/test_llama.py")


# ---- the gated MLP ---------------------------------------------------------------------------------------------------

def of_mlp(x, gate, up, down):
    with torch.device("meta"):
        mlp = llama.MLP(SimpleNamespace(n_embd=x.size(-1), n_inner=len(gate), mlp_bias=False))
    names = dict(mlp.named_parameters())  # in their order
    return functional_call(mlp, dict(zip(names, (gate, up, down), strict=True)), (x,))


def put_swiglu(f):
    def forward(self, x):
        weights = list(self.parameters())
        if len(weights) != 3:
            raise UserError("swiglu as you wrote it has neither biases nor adapters: use a model without")
        return f(x, *weights)

    return {"llama.MLP.forward": forward}


swiglu = Exercise(
    '''
def swiglu(x, gate, up, down):
    """An MLP with a gate (Shazeer 2020, equation 6).

    x (..., C), gate and up (I, C), down (C, I) as nn.Linear keeps its weights -> (..., C).

        y = ( silu(x gate^T) * x up^T ) down^T,      silu(z) = z sigmoid(z)

    Hint: F.linear(x, W) is x W^T.
    """
''',
    reference=of_mlp, grads=(0, 1, 2, 3), shows=(llama.MLP.forward,),
    cases=lambda draw: [[draw(1, 2), draw(2, 2), draw(2, 2), draw(2, 2)], [draw(2, 3, 4), draw(6, 4), draw(6, 4), draw(4, 6)]],
    wrongs={
        "gate and up are exchanged": lambda x, g, u, d: (F.silu(x @ u.T) * (x @ g.T)) @ d.T,
        "the gate is a sigmoid: that is GLU": lambda x, g, u, d: (torch.sigmoid(x @ g.T) * (x @ u.T)) @ d.T,
        "the gate is a gelu: that is GEGLU": lambda x, g, u, d: (F.gelu(x @ g.T) * (x @ u.T)) @ d.T,
        "silu is taken of the product": lambda x, g, u, d: F.silu((x @ g.T) * (x @ u.T)) @ d.T,
        "gate and up are added and not multiplied": lambda x, g, u, d: (F.silu(x @ g.T) + x @ u.T) @ d.T,
        "there is no gate": lambda x, g, u, d: F.silu(x @ u.T) @ d.T,
    },
    put=put_swiglu, needs=NEEDS, scripts=("pretrain.py",), tests="tests/test_llama.py")


# ---- shared heads ----------------------------------------------------------------------------------------------------

def grouped(q, k, v):
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def grouped_shown(q, k, v):
    n, T = q.size(1) // k.size(1), q.size(2)
    k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)  # (B, H, T, D): a copy for every query head
    scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v


def put_grouped(f):
    def full(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False, **more):
        if not is_causal or dropout_p:  # one token that continues a cache sees all of it
            return sdpa(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa, **more)
        return f(q, k, v)

    return {"torch.nn.functional.scaled_dot_product_attention": full}


sdpa = F.scaled_dot_product_attention
grouped_attention = Exercise(
    '''
def grouped_attention(q, k, v):
    """Causal attention whose keys and values are shared by several query heads (Ainslie et al. 2023, section 2.2).

    q (B, H, T, D), k and v (B, G, T, D), H a multiple of G -> (B, H, T, D). Query heads 0 to H/G - 1 meet K/V head 0,
    the next H/G of them K/V head 1, and so on; otherwise it is causal_attention:

        softmax( q k^T / sqrt(D) + mask ) v

    Hint: repeat_interleave copies each head, repeat the whole row of heads.
    """
''',
    reference=grouped, grads=(0, 1, 2), shows=(grouped_shown,),
    cases=lambda draw: [[draw(1, 4, 2, 2), *draw.several(2, 1, 2, 2, 2)], [draw(2, 6, 4, 3), *draw.several(2, 2, 2, 4, 3)],
                        [draw(2, 4, 3, 4), *draw.several(2, 2, 1, 3, 4)]],
    wrongs={
        "query head h meets K/V head h % G: repeat in place of repeat_interleave": lambda q, k, v: grouped(
            q, k.repeat(1, q.size(1) // k.size(1), 1, 1), v.repeat(1, q.size(1) // k.size(1), 1, 1)),
        "all query heads meet the first K/V head": lambda q, k, v: grouped(q, k[:, :1], v[:, :1]),
        "the K/V heads are averaged": lambda q, k, v: grouped(q, k.mean(1, keepdim=True), v.mean(1, keepdim=True)),
        "there is no mask: every position sees the future": lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        "the scores are not divided by sqrt(D)": lambda q, k, v: grouped(q * q.size(3) ** 0.5, k, v),
        "the keys are shared as they should be, and the values by h % G": lambda q, k, v: grouped(
            q, k.repeat_interleave(q.size(1) // k.size(1), 1), v.repeat(1, q.size(1) // k.size(1), 1, 1)),
    },
    put=put_grouped, needs=NEEDS, scripts=("pretrain.py",), tests="tests/test_llama.py")

EXERCISES = [rope, rms_norm, swiglu, grouped_attention]
