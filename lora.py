"""LoRA: fine-tuning through a low-rank sum beside each frozen weight (Hu et al. 2021, equation 3), and its merges.

    y = x W'^T + bias + alpha/r * dropout(x) A^T B^T,    A (r, in) random, B (out, r) zero, W' frozen

Only A and B are trained. B = 0 makes the first forward pass the base model's; r much smaller than in and out makes the
adapter small. With W' in four bits (quant.py) this is QLoRA (Dettmers et al. 2023). Afterwards the product can be added
to the weight, once, and which weight that is decides what one gets:

    careful merge    W' + alpha/r B A         W' as training saw it, dequantize(quantize(W)) after QLoRA: the same model
    simple merge     bf16(W) + alpha/r B A    adapters beside weights they were never trained with

    python lora.py --adapter out/sft-lora --out out/merged    merges an adapter into the base that it names
    python lora.py --adapter out/sft-lora --compare           what both merges change, against the unmerged model

On the island python sft.py --lora-r 16 trains 131,840 parameters beside 941,696 frozen ones; the adapter's file has
0.5 MB (three seeds: 100 % of the held-out facts, as with all weights, but 69 ... 85 % of the questions about itself:
facts come from the base, while what is new takes longer to learn at rank 16). docs/results.md has QLoRA and the
merges beside it. Memory is not saved at this size (0.8 GB each, mostly activations and Python) but where weights
count: a model of GPT-2 XL's shape, 6.2 GB as floats, is read, quantized and takes a QLoRA step of two short rows in
2.4 GB; all weights with AdamW: 25 GB.

Adapters are stored as PEFT stores them (checkpoints.py): PEFT reads ours, we read its (tests/parity).
"""
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.flags import parse
from model import wide
from quant import NF4Linear, dequantize_nf4

# ---- the two trained layers ------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """A frozen linear layer (nn.Linear or NF4Linear) and its adapter: x (..., in) -> (..., out).

    scaling is alpha / r, so that the learning rate need not change with r; rslora: alpha / sqrt(r), which keeps the
    adapter's output stable at large r (Kalajdzievski 2023). dropout falls on the adapter's input only.
    Raises ValueError where r is below 1.
    """

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__()
        if r < 1:
            raise ValueError(f"r is {r}: an adapter has a rank of at least 1")
        self.frozen = base.requires_grad_(False)
        self.r, self.alpha, self.rslora, self.off = r, alpha, rslora, False
        self.scaling = alpha / r ** 0.5 if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        device = base.packed.device if isinstance(base, NF4Linear) else base.weight.device
        bound = base.in_features ** -0.5  # what nn.Linear itself starts with: kaiming_uniform with a = sqrt(5)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x):
        y = self.frozen(x)
        if self.off:
            return y
        down = F.linear(self.dropout(x), self.lora_A)  # (..., in) -> (..., r)
        return y + self.scaling * F.linear(down, self.lora_B)  # (..., r) -> (..., out)

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}, rslora={self.rslora}"


class TrainedTokens(nn.Module):
    """A frozen matrix of token vectors (V, C) of which the rows `ids` are trained, where they are read and in the head.

    A token that the base model has never seen has an embedding that means nothing, and no adapter in the layers above
    can give it one. The rows start as they are. The whole matrix is never copied: rows are overridden where they are
    read, and the head's few columns are corrected. Raises ValueError for ids that repeat or lie outside the embedding.
    """

    def __init__(self, embedding, ids):
        super().__init__()
        size, device = embedding.num_embeddings, embedding.weight.device
        if not ids or len(set(ids)) < len(ids) or not all(0 <= i < size for i in ids):
            raise ValueError(f"token ids {ids}: they must differ and lie between 0 and {size - 1}")
        self.frozen, self.off = embedding.requires_grad_(False), False
        self.register_buffer("ids", torch.tensor(ids, device=device), persistent=False)
        row_of = torch.full((size,), -1, device=device)  # which trained row a token has; -1: none
        row_of[self.ids] = torch.arange(len(ids), device=device)
        self.register_buffer("row_of", row_of, persistent=False)
        self.rows = nn.Parameter(wide(embedding.weight.detach()[self.ids]))  # (len(ids), C)

    def forward(self, ids):
        x = self.frozen(ids)  # (..., C)
        if self.off:
            return x
        row = self.row_of[ids]  # (...)
        trained = F.embedding(row.clamp(min=0), self.rows)  # (..., C), only good where there is a row
        return torch.where((row >= 0).unsqueeze(-1), trained, x)

    def logits(self, hidden):
        """(..., C) -> (..., V), float32 as TokenMatrix.logits."""
        logits = self.frozen.logits(hidden)
        if self.off:
            return logits
        # adds what the rows have moved: writing new columns would make the backward pass copy the logits' gradient
        moved = self.rows - self.frozen.weight[self.ids]  # (len(ids), C)
        with torch.autocast(hidden.device.type, enabled=False):
            return logits.index_add_(-1, self.ids, F.linear(hidden.to(moved.dtype), moved))


# ---- adding adapters to a model, and switching them off --------------------------------------------------------------

def adapted(model):
    """{path: layer} of the linear layers that have an adapter."""
    return {path: layer for path, layer in model.linears().items() if isinstance(layer, LoRALinear)}


def matching(paths, targets):
    """The paths that end with one of the targets, by whole names as in PEFT: a name may be of several layers of a
    block."""
    return [path for path in paths if any(f".{path}".endswith(f".{target}") for target in targets)]


def endings(paths):
    """What the layers of a block are called -> sorted names, without their block."""
    return sorted({path.split(".", 2)[2] for path in paths})


def is_adapted(model):
    """Has add_lora (or load_adapter) been here? Such a model is saved with save_adapter."""
    return bool(adapted(model))


def add_lora(model, r, alpha, dropout=0.0, targets="all", rslora=False, tokens=()):
    """Freezes a network and adds adapters to its blocks' linear layers, in place -> number of trainable parameters.

    targets: "all", "attention", or names of layers (`endings` lists them), with commas or as a list. tokens: ids
    whose rows of all token matrices are trained too. Their other rows and the norms stay frozen. Raises UserError
    where a target names no layer, ValueError where the model has adapters already.
    """
    if is_adapted(model):
        raise ValueError("the model has adapters already: merge them first")
    layers = model.linears()
    if isinstance(targets, str):
        groups = {"all": list(layers), "attention": model.attention_paths}  # the LoRA paper's choice; QLoRA needs all
        targets = groups[targets] if targets in groups else [name.strip() for name in targets.split(",")]
    for name in targets:
        if not matching(layers, [name]):
            raise UserError(f"no linear layer is named {name!r}: choose all, attention, or among "
                            f"{', '.join(endings(layers))}")
    model.requires_grad_(False)
    for path in matching(layers, targets):
        model.replace(path, LoRALinear(layers[path], r, alpha, dropout, rslora))
    for name in model.token_matrices if tokens else ():
        model.replace(name, TrainedTokens(model.get_submodule(name), list(dict.fromkeys(tokens))))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise UserError("there is no linear layer to adapt in the blocks of this model, so nothing would be trained")
    return trained


@contextmanager
def lora_off(model):
    """Inside it the model is its base again, bit for bit: a reference model that needs no memory of its own."""
    layers = [m for m in model.modules() if isinstance(m, (LoRALinear, TrainedTokens))]
    before = [layer.off for layer in layers]
    try:
        for layer in layers:
            layer.off = True
        yield model
    finally:
        for layer, off in zip(layers, before):
            layer.off = off


# ---- merging ---------------------------------------------------------------------------------------------------------

MERGES = ("careful", "simple")


@torch.no_grad()
def merged_weight(layer, how):
    """nn.Linear, NF4Linear or either with an adapter -> one weight (out, in)."""
    base = layer.frozen if isinstance(layer, LoRALinear) else layer
    if how == "simple":
        if isinstance(base, NF4Linear):
            raise ValueError("the simple merge needs the weights as they were before: load the base as floats")
        weight = wide(base.weight.bfloat16())
    else:
        weight = dequantize_nf4(base.quantized) if isinstance(base, NF4Linear) else wide(base.weight)
    return weight + layer.scaling * layer.lora_B @ layer.lora_A if isinstance(layer, LoRALinear) else weight


def merge_lora(model, how="careful"):
    """Back to a plain network with plain nn.Linear layers, in place -> model; every parameter is trainable again.

    careful: the weights as training saw them + scaling * BA, so the logits stay what they were. simple: bf16(W) +
    scaling * BA, in every linear layer of the blocks. Neither rounds back to four bits: that would add an error that
    training has not seen.
    Raises ValueError for another `how`, and for "simple" where the base is quantized.
    """
    if how not in MERGES:
        raise ValueError(f"how is {how!r}: it must be careful or simple")
    for path, layer in model.linears().items():
        base = layer.frozen if isinstance(layer, LoRALinear) else layer
        linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")  # no random numbers
        linear.weight = nn.Parameter(merged_weight(layer, how))
        linear.bias = base.bias
        model.replace(path, linear.train(layer.training))
    for parameter in model.parameters():
        parameter.data = wide(parameter.data)
    for name in model.token_matrices:
        tokens = model.get_submodule(name)
        if isinstance(tokens, TrainedTokens):
            tokens.frozen.weight.data[tokens.ids] = tokens.rows.data
            model.replace(name, tokens.frozen)
    return model.requires_grad_(True)


# ---- python lora.py --------------------------------------------------------------------------------------------------

@dataclass
class Config:
    adapter: str = ""  # the adapter's folder
    base: str = ""  # the base model's folder; empty: the one that the adapter names
    out: str = ""  # folder for the merged model
    overwrite: bool = False  # replace the checkpoint in --out
    merge: str = "careful"  # careful (the weights that training saw) or simple (the base in bfloat16)
    compare: bool = False  # print what both merges change, and on the island their scores
    text: str = ""  # text file for --compare; empty: the island's plain text


if __name__ == "__main__":
    from evals.weights import merge  # it reads whole checkpoints and knows the island: both are above this file
    merge(parse(Config))
