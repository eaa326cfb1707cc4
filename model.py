"""The GPT: a decoder-only transformer, exactly GPT-2 (Radford et al. 2019).

    p(x_1 ... x_T) = prod_t p(x_t | x_<t),     one network gives all the factors of a text at once

    python model.py                     the tiny model: its parts, parameters, bytes and FLOPs a token
    python model.py gpt2-xl             the same of GPT-2's sizes (gpt2, gpt2-medium, gpt2-large) or of a folder
    model = GPT.from_pretrained("gpt2") the public weights; any folder of the GPT-2 family works

Reads and writes Hugging Face folders: transformers gives the same logits on both sides (tests/parity). How it is
trained stands in pretrain.py and sft.py, how it speaks in generate.py. All that those files use of a network:

    config (block_size, vocab_size, n_layer, n_head, n_kv_head, head_size, n_embd), device
    hidden(ids, cache), head(hidden), forward(ids), blocks
    embedding, token_matrices, drop_head()      the matrix of token vectors; the names of all matrices with a row a token
    linears(), replace(path, module), attention_paths, stacked       the blocks' linear layers, and what has taken their places
    hf_names()                     what its parameters are called in Hugging Face's files; it has no other tensors (buffers)
    from_pretrained, shapes, save_pretrained, linear_paths      folders (checkpoints.FAMILIES names the class), the linears' paths
"""
import functools
import math
import sys
from dataclasses import dataclass

from common.errors import UserError, end_politely

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import hub
from common.tables import table
from kernels import head


@dataclass
class GPTConfig:
    block_size: int = 1024  # the context length
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | tuple[float, float] = 0.0  # of both residual branches; (bottom, top) is a ramp over the layers
    attention_dropout: float = 0.0  # of the attention weights
    bias: bool = True  # in linear layers and layer norms, as GPT-2 has them
    checkpointing: bool = False  # recompute activations in the backward pass: a third slower, far less memory

    @property
    def n_kv_head(self):
        return self.n_head  # every head has keys and values of its own

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    def layer_dropout(self, layer):
        if isinstance(self.dropout, (int, float)):
            return float(self.dropout)
        bottom, top = self.dropout
        return bottom + (top - bottom) * layer / max(1, self.n_layer - 1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        self.attention_dropout = config.attention_dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, n_head, T, head size)
        k = k.view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, n_head, T, head size)
        v = v.view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, n_head, T, head size)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        # F.scaled_dot_product_attention does not look at self.training, so "off" has to be said here
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again: (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.layer_dropout(layer))

    def forward(self, x, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


def wide(x):
    """x as float32, where it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TokenMatrix(nn.Embedding):
    """A matrix (V, C) with a row a token: its vector where the token is read, and the direction of its logit where it
    is predicted. GPT-2 has one for both."""

    def forward(self, ids):
        return wide(super().forward(ids))

    def logits(self, hidden):
        """(..., C) -> (..., V), in float32 whatever autocast says: a network may give all tokens logits around -100
        (GPT-2 does), and bfloat16's three digits would put every probability off by up to a half."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.weight.itemsize < 4:  # of a frozen base, as it was read
                flat = hidden.float().reshape(-1, hidden.size(-1))  # (N, C)
                return head.Logits.apply(flat, self.weight).view(*hidden.shape[:-1], -1)
            return F.linear(hidden.to(self.weight.dtype), self.weight)


class Uninitialized(torch.overrides.TorchFunctionMode):
    """Leaves out all of torch.nn.init: on the meta device random numbers would import PyTorch's compiler, seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class Network(nn.Module):
    """What the two families share (this file and llama.py): how their parts are found, replaced and read."""

    headless = False  # has it lost its head? (drop_head)
    stacked = {}  # {path of a linear layer: how many matrices lie on top of each other in its weight}

    def __init__(self, config):
        super().__init__()
        self.config = config

    def drop_head(self):
        """For a network that shall only be read from, as a reward model: GPT-2's head is its token matrix and stays."""

    @property
    def device(self):
        return self.norm.weight.device

    def find_linears(self):
        """Notes where the blocks' linear layers are, in their order, while all of them are still nn.Linear."""
        self.linear_paths = [path for path, layer in self.named_modules()
                             if path.startswith("blocks.") and isinstance(layer, nn.Linear)]
        self.attention_paths = [path for path in self.linear_paths if "attn." in path]

    def initialize(self, residual):
        """Random weights as GPT-2's. residual: how the names of the matrices that add to the residual stream end."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # each layer adds two branches to the residual stream: without the scale its variance grows with depth
                scale = 1 / math.sqrt(2 * self.config.n_layer) if name.endswith(residual) else 1.0
                nn.init.normal_(parameter, mean=0.0, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def positions(self, ids, cache=None):
        """The positions of ids (B, T): (T,), or behind what a cache holds (B, 1)."""
        if ids.size(1) > self.config.block_size:
            raise ValueError(f"{ids.size(1)} tokens do not fit a context of {self.config.block_size}")
        return torch.arange(ids.size(1), device=ids.device) if cache is None else cache.positions(ids.size(1))

    def through(self, x, *more):
        """The blocks in their order: x (B, T, C) -> (B, T, C). more: what each of them is given too."""
        for block in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *more, use_reentrant=False)
            else:
                x = block(x, *more)
        return x

    def head(self, hidden):
        """(..., C) -> logits (..., V), float32. Call it only on the positions that need logits: with GPT-2's vocabulary
        the head is a third of the compute of the small model and most of its memory."""
        if self.headless:
            raise UserError("this is a reward model, which has no head that could write: take the model it was made of")
        return self.get_submodule(self.token_matrices[-1]).logits(hidden)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V), at every position."""
        return self.head(self.hidden(ids))

    def linears(self):
        """{path: layer} of the blocks' linear layers: nn.Linear, or what has taken its place (quant.py, lora.py)."""
        return {path: self.get_submodule(path) for path in self.linear_paths}

    def replace(self, path, module):
        """Puts a module in the place of the one at `path`, such as blocks.0.mlp."""
        parent, _, child = path.rpartition(".")
        setattr(self.get_submodule(parent), child, module)

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0, attention_dropout=0.0, checkpointing=False, linear=None,
                        head=True):
        """A folder of the family (config.json, safetensors), or a public name.

        Weights arrive one by one and as float32. linear: for a base that is not trained (hub.read_weights).
        head: False leaves out a head of its own.
        Raises UserError where there is no such folder, or a model that is not of the family's architecture.
        """
        folder = hub.find(name_or_folder)
        model = cls.shapes(folder, dropout, attention_dropout, checkpointing)
        if not head:
            model.drop_head()
        return hub.read_weights(model, folder, linear)

    @classmethod
    def shapes(cls, folder, dropout=0.0, attention_dropout=0.0, checkpointing=False):
        """The folder's network without its weights (the meta device): no memory, no time spent on random numbers."""
        config = cls.read_config(folder)
        config.dropout, config.attention_dropout, config.checkpointing = dropout, attention_dropout, checkpointing
        with torch.device("meta"), Uninitialized():
            return cls(config)


class GPT(Network):
    token_matrices = ("embedding",)

    def __init__(self, config):
        super().__init__(config)
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.embedding = TokenMatrix(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.layer_dropout(0))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.find_linears()
        self.stacked = {path: 3 for path in self.linear_paths if path.endswith("c_attn")}
        self.initialize(residual="c_proj.weight")

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the final norm's output (B, T, C). With a cache, ids continue what the cache holds."""
        x = self.drop(self.embedding(ids) + self.position_embedding(self.positions(ids, cache)))  # (B, T, C)
        return self.norm(self.through(x, cache))

    # ---- Hugging Face folders --------------------------------------------------------------------------------------

    def hf_names(self):
        """{our parameter: (its name in the files of GPT2LMHeadModel, whether it is stored transposed)}."""
        names = {"embedding.weight": ("transformer.wte.weight", False),
                 "position_embedding.weight": ("transformer.wpe.weight", False)}
        layers = {f"blocks.{i}.{name}": f"h.{i}.{name}" for i in range(self.config.n_layer)
                  for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")}
        for ours, theirs in (layers | {"norm": "ln_f"}).items():
            # GPT-2 was written with a layer of its own (Conv1D) that keeps its weight as (in, out)
            names[f"{ours}.weight"] = f"transformer.{theirs}.weight", ours in self.linear_paths
            names[f"{ours}.bias"] = f"transformer.{theirs}.bias", False
        return names

    @staticmethod
    def read_config(folder):
        """config.json -> GPTConfig, checked to be a GPT-2 as it is written here. Raises UserError where it is not."""
        c = hub.read_settings(folder)
        get = functools.partial(hub.setting, folder, c)
        width = get("n_embd", int)
        fixed = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                 "n_inner": 4 * width, "tie_word_embeddings": True, "scale_attn_weights": True,
                 "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        hub.must_be(folder, c, fixed)
        config = GPTConfig(get("n_positions", int), get("vocab_size", int), get("n_layer", int, low=0, high=hub.DEEPEST),
                           get("n_head", int), width, bias=get("bias", bool, True))
        if width % config.n_head:
            raise UserError(f"{folder}/config.json has n_embd = {width}, which n_head = {config.n_head} does not divide")
        return config

    def save_pretrained(self, folder, extra=None):
        """Writes config.json and model.safetensors, float32, as transformers reads them, in place of any model there.

        extra: tensors of a head that is not GPT-2's (a reward head), stored under their names in the same file.
        """
        c = self.config
        settings = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": c.block_size,
                    "vocab_size": c.vocab_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
                    "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                    "tie_word_embeddings": True, "resid_pdrop": c.layer_dropout(c.n_layer - 1),
                    "embd_pdrop": c.layer_dropout(0), "attn_pdrop": c.attention_dropout, "bias": c.bias,
                    "bos_token_id": None, "eos_token_id": None}
        zeros = {}
        if not c.bias:  # transformers' GPT-2 has no such option
            sizes = {path: layer.weight.size(0) for path, layer in self.named_modules()
                     if isinstance(layer, (nn.Linear, nn.LayerNorm))}
            zeros = {self.hf_names()[f"{path}.bias"][0]: torch.zeros(size) for path, size in sizes.items()}
        hub.write_folder(self, folder, settings, zeros | (extra or {}))


def resize_vocab(network, vocab_size):
    """Adds rows for new tokens, each the mean of the old ones: a new token starts as an average word, so the
    head gives it a moderate probability where random rows could give it any. Never shrinks."""
    for name in network.token_matrices:
        matrix = network.get_submodule(name)
        old = matrix.weight.data  # (V, C)
        if vocab_size > old.size(0):
            new = old.mean(dim=0, keepdim=True).expand(vocab_size - old.size(0), -1)
            larger = torch.cat([old, new])
            network.replace(name, type(matrix).from_pretrained(larger, freeze=not matrix.weight.requires_grad))
    network.config.vocab_size = max(vocab_size, network.config.vocab_size)


# ---- probabilities ---------------------------------------------------------------------------------------------------

def token_logps(model, ids, mask, temperature=1.0):
    """log p(ids[:, 1:]) where mask[:, 1:] is 1, and 0 elsewhere: (B, T) and (B, T) -> (B, T-1), float32.

    The losses on a policy are made of these numbers: pretraining (a mask of ones) and SFT of their mean, through
    summed_logps, DPO of differences of their sums, PPO of ratios. The head runs on the masked positions only.
    temperature: the one that the tokens were sampled with, for the probabilities that they had.
    """
    learned, (hidden, targets) = mask[:, 1:].bool(), supervised(model, ids, mask)
    logps = torch.cat([-F.cross_entropy(model.head(h) / temperature, t, reduction="none")  # log softmax at t
                       for h, t in slices(model, hidden, targets)])  # (N,)
    return logps.new_zeros(learned.shape).masked_scatter(learned, logps)


def summed_logps(model, ids, mask):
    """token_logps(model, ids, mask).sum() -> scalar, for losses that are means. Where the head is a plain matrix its
    gradient is made beside the logits (kernels/head.py), which then need not be kept for the backward pass."""
    matrix = model.get_submodule(model.token_matrices[-1])
    if type(matrix) is not TokenMatrix or not torch.is_grad_enabled():
        return token_logps(model, ids, mask).sum()
    hidden, targets = supervised(model, ids, mask)
    return head.summed_logps(hidden, matrix.weight, targets, rows=max(1, SLICE // model.config.vocab_size))


def supervised(model, ids, mask):
    """-> the hidden states (N, C) that predict the masked tokens, and these tokens (N,). The shift by one happens here
    and only here: position t predicts token t + 1."""
    learned = mask[:, 1:].bool()  # (B, T-1)
    return model.hidden(ids[:, :-1])[learned], ids[:, 1:][learned]


SLICE = 2 ** 23  # logits made at a time: 32 MB


def slices(model, hidden, targets):
    """hidden (N, C), targets (N,) -> pairs of their slices, as long as is good for the head.

    The logits of all positions at once would be the largest tensor of a whole step. A slice of them stays in the
    processor's cache: with GPT-2's vocabulary twice as fast (two CPU cores, forward and backward). Without gradients it
    is gone when the next one is made. With them every slice leaves its probabilities to the backward pass: N * V
    floats, as without slices.
    """
    n = max(1, SLICE // model.config.vocab_size)
    return zip(hidden.split(n), targets.split(n))


# ---- the cache -------------------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of every layer for rows of different lengths, and a cursor per row: how much of it is real.

    Prompts are padded on the right. Padding writes rubbish behind a row's cursor; the mask hides it and the row's own
    tokens overwrite it.
    """

    def __init__(self, model, lengths, room):
        c = model.config
        self.cursor, self.room = lengths - 1, room  # (B,): the column of each row's newest token
        self.shape = (c.n_layer, len(lengths), c.n_kv_head, room, c.head_size)
        self.keys = self.values = self.seen = None

    def positions(self, T):
        if self.keys is None:  # the prompts
            return torch.arange(T, device=self.cursor.device)
        # a row that has finished may still be in the cache: its cursor waits in the last column, harmlessly
        self.cursor = (self.cursor + 1).clamp(max=self.room - 1)
        self.longest = int(self.cursor.max()) + 1
        columns = torch.arange(self.longest, device=self.cursor.device)
        self.seen = (columns <= self.cursor[:, None])[:, None, None, :]  # (B, 1, 1, longest)
        return self.cursor[:, None]  # (B, 1)

    def extend(self, layer, k, v):
        """k, v (B, n_kv_head, T, head size) of the newest tokens -> all keys and values so far, and which count."""
        if self.keys is None:
            self.keys, self.values = k.new_zeros(self.shape), v.new_zeros(self.shape)
        if self.seen is None:
            self.keys[layer, :, :, :k.size(2)], self.values[layer, :, :, :k.size(2)] = k, v
            return k, v, None
        rows = torch.arange(len(self.cursor), device=k.device)
        self.keys[layer][rows, :, self.cursor], self.values[layer][rows, :, self.cursor] = k[:, :, 0], v[:, :, 0]
        return self.keys[layer, :, :, :self.longest], self.values[layer, :, :, :self.longest], self.seen

    def keep(self, rows):
        """Forgets all but these rows."""
        self.keys, self.values, self.cursor = self.keys[:, rows], self.values[:, rows], self.cursor[rows]


# ---- python model.py -------------------------------------------------------------------------------------------------

TINY = dict(block_size=128, vocab_size=1031, n_layer=4, n_head=4, n_embd=128)  # what pretrain.py trains
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


def parts(network):
    """-> [(part, parameters, FLOPs of a token's forward pass), ...]. Two FLOPs a multiplied weight; attention's own two
    products, over a full context, are a part by themselves. A norm's few FLOPs are not counted."""
    def size(module):
        return sum(p.numel() for p in module.parameters())

    def weights(paths):
        return sum(network.get_submodule(path).weight.numel() for path in paths)

    c = network.config
    others = [path for path in network.linears() if path not in network.attention_paths]
    matrices = [network.get_submodule(name) for name in network.token_matrices]
    linear = {path: size(layer) for path, layer in network.linears().items()}
    rest = size(network) - sum(map(size, matrices)) - sum(linear.values())
    tied = "" if len(matrices) > 1 else " (the head uses them again)"
    return [(f"token vectors{tied}", size(matrices[0]), 0),
            ("attention's linear layers", sum(linear[path] for path in network.attention_paths),
             2 * weights(network.attention_paths)),
            ("attention itself, over a full context", 0, 4 * c.n_layer * c.n_head * c.head_size * c.block_size),
            ("MLPs", sum(linear[path] for path in others), 2 * weights(others)),
            ("norms and positions", rest, 0),
            ("the head, per logit row", sum(map(size, matrices[1:])), 2 * c.vocab_size * c.n_embd)]


def describe(network):
    """-> the table that python model.py prints."""
    rows, c = parts(network), network.config
    rows.append(("in all", *(sum(column) for column in list(zip(*rows))[1:])))
    lines = [[name, f"{n:,}", f"{n * 4 / 1e6:,.1f}", f"{n * 2 / 1e6:,.1f}", f"{flops / 1e6:,.2f}"]
             for name, n, flops in rows]
    cached = 2 * c.n_layer * c.n_kv_head * c.head_size
    return (table(["part", "parameters", "MB float32", "MB bfloat16", "MFLOPs a token"], lines) +
            f"\n\n{c.n_layer} blocks of width {c.n_embd}, {c.n_head} heads, a context of {c.block_size:,} tokens, "
            f"{c.vocab_size:,} tokens known\n"
            f"a cached token keeps {cached:,} numbers (keys and values): {cached * 4 / 1e3:,.1f} kB in float32\n"
            f"a training step costs three forward passes: {3 * rows[-1][2] / 1e6:,.1f} MFLOPs a token")


def main(names, doc, network, configs, shapes):
    """Also of llama.py. configs: those that have a name, of such networks; shapes: what makes a network of a folder."""
    name = names[0] if names else "tiny"
    if len(names) > 1 or name.startswith("-"):
        print(doc)
        raise SystemExit(name not in ("-h", "--help"))
    with torch.device("meta"):  # shapes are enough
        found = network(configs[name]) if name in configs else shapes(name)
    print(f"{name}\n\n{describe(found)}\n\n"
          "next: python pretrain.py trains the tiny one, python sft.py teaches it to answer")


if __name__ == "__main__":
    from checkpoints import shapes  # it knows both families
    end_politely()
    known = {name: GPTConfig(n_layer=n, n_head=heads, n_embd=width) for name, (n, heads, width) in SIZES.items()}
    main(sys.argv[1:], __doc__, GPT, {"tiny": GPTConfig(**TINY), **known}, shapes)
