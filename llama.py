"""Llama: GPT-2 with four changes (Touvron et al. 2023). One file for Llama 1 to 3, SmolLM, Mistral, Qwen2 and Qwen3.

               GPT-2                     here                          why
    norm       LayerNorm with a bias     x / sqrt(mean x^2 + eps) g    as good, and cheaper (Zhang and Sennrich 2019)
    positions  learned, added at first   turn q and k in every layer   q.k depends on the distance alone (RoPE: Su 2021)
    MLP        gelu(x U) D               (silu(x G) * x U) D           a gate: better at equal size (Shazeer 2020)
    attention  K and V for every head    for n_head / n_kv_head heads  a small cache, nearly as good (GQA: Ainslie 2023)
    biases     everywhere                none; Qwen2: q, k, v          stabler without (PaLM 2022), longer with (Qwen)
    q and k    as they are               Qwen3: normed in each head    bounds attention's logits (Dehghani et al. 2023)
    head       the tokens' matrix        that, or one of its own       only large models can afford (Press, Wolf 2017)

    python llama.py [FOLDER]            a Llama as large as the tiny GPT, or a folder's: its parts, bytes, FLOPs a token
    python pretrain.py --family llama   trains it

What a network offers stands in model.py. Folders are those of transformers (tests/parity); of a sliding window
(Mistral) only what lies within it is read. Mixtures of experts are other models.
"""
import functools
import math
import sys
from dataclasses import asdict, dataclass

from common.errors import UserError, end_politely

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import hub
from model import TINY, GPTConfig, Network, TokenMatrix, main


@dataclass
class LlamaConfig:
    block_size: int = 2048  # the context length
    vocab_size: int = 32000
    n_layer: int = 22
    n_head: int = 32
    n_kv_head: int = 4  # heads of keys and values, each shared by n_head / n_kv_head query heads
    n_embd: int = 2048
    n_inner: int = 5632  # width inside the MLP
    head_size: int = 64  # n_head of them need not be n_embd
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor", ...} as config.json has it
    norm_eps: float = 1e-5
    tie: bool = False  # is the head the token matrix again?
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normed in each head
    family: str = ""  # config.json's model_type; empty: the one that has such biases and norms
    dropout: float | tuple[float, float] = 0.0  # this and the next as GPTConfig's
    attention_dropout: float = 0.0
    checkpointing: bool = False
    layer_dropout = GPTConfig.layer_dropout

    def __post_init__(self):
        if self.n_head % self.n_kv_head or self.head_size % 2:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_kv_head}, or their size {self.head_size} is odd")
        self.family = self.family or ("qwen3" if self.qk_norm else "qwen2" if self.qkv_bias > self.o_bias else "llama")


def like_gpt(block_size, vocab_size, n_layer, n_head, n_embd, **settings):
    """A Llama with as many parameters as such a GPT: what shared K/V heads and no biases save, the gate takes."""
    return LlamaConfig(block_size, vocab_size, n_layer, n_head, n_head if n_head % 2 else n_head // 2, n_embd,
                       25 * n_embd // 8, n_embd // n_head, tie=True, **settings)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        h = x.float()  # in bfloat16 the mean would lose what it is made of
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight.to(x.dtype)


# ---- positions -------------------------------------------------------------------------------------------------------

def frequencies(config):
    """-> (head size / 2,) float32, theta^(-2i / d): how far pair i of a head is turned from a position to the next.
    To read further than was trained, `linear` scaling divides all of them, `llama3` those that turn less than
    low_freq_factor times in the original context, with a passage to those that turn high_freq_factor times."""
    d, scaling = config.head_size, config.rope_scaling or {}
    frequency = 1 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    slow = frequency / scaling.get("factor", 1.0)
    if scaling.get("rope_type") != "llama3":
        return slow
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    s = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - s) * slow + s * frequency


def angles(config, positions):
    """positions (T,) or (B, T) -> their cos and sin, float32: in bfloat16 position 257 would be 256."""
    turned = positions[..., None].float() * frequencies(config).to(positions.device)  # (..., T, d / 2)
    turned = torch.cat([turned, turned], dim=-1).unsqueeze(-3)  # (..., 1, T, d): the same for every head
    return turned.cos(), turned.sin()


def turn(x, cos, sin):
    """x (B, heads, T, d): each pair (x_i, x_{i + d/2}) turned by its angle, in x's dtype."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


# ---- the network -----------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_size, self.attention_dropout = layer, c.head_size, c.attention_dropout
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=c.o_bias)
        norm = RMSNorm if c.qk_norm else nn.Identity  # one gain for all heads
        self.q_norm, self.k_norm = norm(c.head_size, c.norm_eps), norm(c.head_size, c.norm_eps)

    def forward(self, x, cos, sin, cache=None):
        q, k, v = (layer(x).unflatten(2, (-1, self.head_size)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        # q (B, n_head, T, head size), k and v (B, n_kv_head, T, head size)
        q, k, mask = turn(q, cos, sin), turn(k, cos, sin), None
        if cache is not None:  # it keeps keys as they were turned: a token's position stays
            k, v, mask = cache.extend(self.layer, k, v)
        # enable_gqa: query heads hG ... hG + G - 1 meet K/V head h, of which no copies are made
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.attention_dropout * self.training,
                                           is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # heads side by side: (B, T, n_head * head size)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_bias) for _ in range(2))
        self.down_proj = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn, self.mlp, self.drop = Attention(c, layer), MLP(c), nn.Dropout(c.layer_dropout(layer))

    def forward(self, x, cos, sin, cache=None):
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Llama(Network):
    def __init__(self, config):
        super().__init__(config)
        c = config
        self.embedding, self.drop = TokenMatrix(c.vocab_size, c.n_embd), nn.Dropout(c.layer_dropout(0))
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.token_matrices = ("embedding",) if c.tie else ("embedding", "unembedding")
        self.unembedding = None if c.tie else TokenMatrix(c.vocab_size, c.n_embd)
        self.find_linears()
        self.parameter_names = [name for name, _ in self.named_parameters()]  # before any is replaced
        self.initialize(residual=("o_proj.weight", "down_proj.weight"))

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the final norm's output (B, T, C). With a cache, ids continue what the cache holds."""
        positions = self.positions(ids, cache)
        return self.norm(self.through(self.drop(self.embedding(ids)), *angles(self.config, positions), cache))

    def drop_head(self):
        if self.unembedding is not None:
            self.unembedding, self.token_matrices, self.headless = None, ("embedding",), True
            self.parameter_names = [name for name in self.parameter_names if not name.startswith("unembedding.")]

    # ---- Hugging Face folders, as in model.py ------------------------------------------------------------------------

    def hf_names(self):
        theirs = dict(embedding="model.embed_tokens", blocks="model.layers", norm="model.norm", unembedding="lm_head")
        names = [(name, *name.split(".", 1)) for name in self.parameter_names]
        return {name: (f"{theirs[first]}.{rest}", False) for name, first, rest in names}  # below, names are the same

    @staticmethod
    def read_config(folder):
        c = hub.read_settings(folder)
        get, family = functools.partial(hub.setting, folder, c), c.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{folder} holds a model of type {family!r:.80}: llama.py reads {', '.join(FAMILIES)}")
        hub.must_be(folder, c, {"hidden_act": "silu"})
        kv_heads, context = FAMILIES[family]
        width, heads = get("hidden_size", int), get("num_attention_heads", int)
        kv_heads = heads if "num_key_value_heads" in c else kv_heads or heads  # null: all
        head_size = 128 if family == "qwen3" and "head_dim" not in c else max(1, width // heads)
        context = get("max_position_embeddings", int, context)
        slides = family == "mistral" or family.startswith("qwen") and get("use_sliding_window", bool, False)
        if slides and c.get("sliding_window", 4096) is not None:  # beyond it the model is another one
            context = min(context, get("sliding_window", int, 4096))
        bias = family in ("llama", "qwen3") and get("attention_bias", bool, False)
        try:
            return LlamaConfig(
                context, get("vocab_size", int), get("num_hidden_layers", int, low=0, high=hub.DEEPEST), heads,
                get("num_key_value_heads", int, kv_heads), width, get("intermediate_size", int),
                get("head_dim", int, head_size), *read_rope(folder, c), get("rms_norm_eps", float, 1e-6, low=0),
                get("tie_word_embeddings", bool, False), bias or family == "qwen2", bias,
                family == "llama" and get("mlp_bias", bool, False), family == "qwen3", family)
        except ValueError as error:
            raise UserError(f"{folder}/config.json cannot be: {error}")

    def save_pretrained(self, folder, extra=None, dtype=torch.float32):
        settings = {KEYS.get(name, name): value for name, value in asdict(self.config).items() if name not in OURS}
        settings |= {"architectures": [f"{self.config.family.capitalize()}ForCausalLM"], "hidden_act": "silu",
                     "sliding_window": None, "use_sliding_window": False, "bos_token_id": None, "eos_token_id": None}
        hub.write_folder(self, folder, settings, extra, dtype)


KEYS = {"block_size": "max_position_embeddings", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "n_inner": "intermediate_size",
        "head_size": "head_dim", "norm_eps": "rms_norm_eps", "tie": "tie_word_embeddings", "o_bias": "attention_bias",
        "family": "model_type"}
OURS = ("qkv_bias", "qk_norm", "dropout", "checkpointing")  # the family says the first two
# K/V heads (None: as many as heads) and context where config.json does not say them
FAMILIES = {"llama": (None, 2048), "mistral": (8, 131072), "qwen2": (32, 32768), "qwen3": (32, 32768)}


def read_rope(folder, settings):
    """-> theta, and the scaling as LlamaConfig has it. transformers 5 writes both into one object."""
    get = functools.partial(hub.setting, folder, settings)
    given = get("rope_scaling", dict, {}) or get("rope_parameters", dict, {})
    kind, original = given.get("rope_type", given.get("type", "default")), "original_max_position_embeddings"
    get = functools.partial(hub.setting, folder, settings | given)
    hub.must_be(folder, settings | given, {"partial_rotary_factor": 1.0})
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{folder}/config.json scales positions by {kind!r:.80}: this project reads linear and llama3")
    scaling = None if kind == "default" else {"rope_type": kind, "factor": get("factor", float)}
    if kind == "llama3":
        low = get("low_freq_factor", float, low=0)
        scaling |= {"low_freq_factor": low, "high_freq_factor": get("high_freq_factor", float, low=low),
                    original: get(original, int, settings.get("max_position_embeddings", 2048))}
    return get("rope_theta", float, 10000.0, high=1e12), scaling


if __name__ == "__main__":
    from checkpoints import shapes  # it knows both families
    end_politely()
    main(sys.argv[1:], __doc__, Llama, {"tiny": like_gpt(**TINY)}, shapes)
