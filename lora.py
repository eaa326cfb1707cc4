"""LoRA: fine-tuning through a low-rank sum beside each frozen weight (Hu et al. 2021, equation 3), and its merges.

    y = x W'^T + bias + alpha/r * dropout(x) A^T B^T,    A (r, in) random, B (out, r) zero, W' frozen

Only A and B are trained. B = 0 makes the first forward pass the base model's; r much smaller than in and out makes the
adapter small. With W' in four bits (quant.py) this is QLoRA (Dettmers et al. 2023). Afterwards the product can be added
to the weight, once, and which weight that is decides what one gets:

    careful merge    W' + alpha/r B A         W' as training saw it, dequantize(quantize(W)) after QLoRA: the same model
    simple merge     bf16(W) + alpha/r B A    adapters beside weights they were never trained with

    python lora.py --adapter out/sft-lora --out out/merged    merges an adapter into the base that it names
    python lora.py --adapter out/sft-lora --compare           what both merges change, against the unmerged model

On the island (python sft.py, with --lora-r 16, with --nf4 too; 350 steps; seeds 0, 1, 2; one thread of a CPU):

                   trained parameters     file   CPU seconds   held-out facts   questions about itself
    all weights               941,440   3.8 MB            89            100 %                    100 %
    LoRA                      131,584   0.5 MB            94            100 %              65 ... 81 %
    QLoRA                     131,584   0.5 MB           115    99 ... 100 %              65 ... 81 %

Facts come from the base; what is new, such as its name, takes longer to learn at rank 16. After QLoRA (seed 0) the careful
merge moves no logit by more than 5e-5, the simple one by 0.17 on average, and it changes 1.5 % of the likeliest tokens.
Memory is not saved at this size (0.8 GB each, mostly activations and Python) but where weights count: a model of GPT-2 XL's
shape, 6.2 GB as floats, is read, quantized and takes a QLoRA step of two short rows in 2.4 GB; all weights with AdamW: 25 GB.

Adapters are stored as PEFT stores them: PEFT reads ours, we read its (tests/parity).
"""
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.disk import replacing
from common.errors import UserError
from common.flags import parse
from common.hub import PUBLIC
from quant import NF4Linear, dequantize_nf4, quantize_model
from trainer import Run

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
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora, self.off = r, alpha, rslora, False
        self.scaling = alpha / r ** 0.5 if rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        device = base.packed.device if isinstance(base, NF4Linear) else base.weight.device
        bound = base.in_features ** -0.5  # what nn.Linear itself starts with: kaiming_uniform with a = sqrt(5)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x):
        y = self.base(x)
        if self.off:
            return y
        down = F.linear(self.dropout(x), self.lora_A)  # (..., in) -> (..., r)
        return y + self.scaling * F.linear(down, self.lora_B)  # (..., r) -> (..., out)

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}, rslora={self.rslora}"


class TrainedTokens(nn.Module):
    """A frozen embedding (V, C) of which the rows `ids` are trained: as input and, the matrix being tied, in the head.

    A token that the base model has never seen has an embedding that means nothing, and no adapter in the layers above
    can give it one. The rows start as they are. The whole matrix is never copied: rows are overridden where they are
    read, and the head's few columns are corrected. Raises ValueError for ids that repeat or lie outside the embedding.
    """

    def __init__(self, embedding, ids):
        super().__init__()
        size, device = embedding.num_embeddings, embedding.weight.device
        if not ids or len(set(ids)) < len(ids) or not all(0 <= i < size for i in ids):
            raise ValueError(f"token ids {ids}: they must differ and lie between 0 and {size - 1}")
        self.base, self.off = embedding.requires_grad_(False), False
        self.register_buffer("ids", torch.tensor(ids, device=device), persistent=False)
        row_of = torch.full((size,), -1, device=device)  # which trained row a token has; -1: none
        row_of[self.ids] = torch.arange(len(ids), device=device)
        self.register_buffer("row_of", row_of, persistent=False)
        self.rows = nn.Parameter(embedding.weight.detach()[self.ids].clone())  # (len(ids), C)

    def forward(self, ids):
        x = self.base(ids)  # (..., C)
        if self.off:
            return x
        row = self.row_of[ids]  # (...)
        trained = F.embedding(row.clamp(min=0), self.rows)  # (..., C), only good where there is a row
        return torch.where((row >= 0).unsqueeze(-1), trained, x)

    def logits(self, hidden):
        """(..., C) -> (..., V)."""
        logits = self.base.logits(hidden)
        if self.off:
            return logits
        # adds what the rows have moved: writing new columns would make the backward pass copy the logits' gradient
        moved = self.rows - self.base.weight[self.ids]  # (len(ids), C)
        return logits.index_add_(-1, self.ids, F.linear(hidden, moved))


# ---- adding adapters to a model, and switching them off --------------------------------------------------------------

ATTENTION = ("c_attn", "attn.c_proj")  # what the LoRA paper adapts; QLoRA found that all layers are needed


def _linear_layers(model):
    """{path: layer} of every linear layer of the blocks, adapted or not; not what is frozen inside an adapter."""
    return {f"h.{path}": layer for path, layer in model.h.named_modules()
            if isinstance(layer, (nn.Linear, NF4Linear, LoRALinear)) and not path.endswith(".base")}


def _adapted(model):
    return {path: layer for path, layer in _linear_layers(model).items() if isinstance(layer, LoRALinear)}


def _matching(paths, targets):
    """The paths that end with one of the targets, by whole names as in PEFT: c_proj is both projections of a block."""
    return [path for path in paths if any(f".{path}".endswith(f".{target}") for target in targets)]


def is_adapted(model):
    """Has add_lora (or load_adapter) been here? Such a model is saved with save_adapter."""
    return bool(_adapted(model))


def _put(model, path, layer):
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def add_lora(model, r, alpha, dropout=0.0, targets="all", rslora=False, tokens=()):
    """Freezes a GPT and adds adapters to its blocks' linear layers, in place -> number of trainable parameters.

    targets: "all", "attention", or names of layers such as "c_fc,attn.c_proj" or a list of them. tokens: ids whose rows
    of the embedding are trained too. Other embeddings, the norms and the head stay frozen.
    Raises UserError where a target names no layer, ValueError where the model has adapters already.
    """
    if is_adapted(model):
        raise ValueError("the model has adapters already: merge them first")
    layers = _linear_layers(model)
    if isinstance(targets, str):
        groups = {"all": list(layers), "attention": ATTENTION}
        targets = groups[targets] if targets in groups else [name.strip() for name in targets.split(",")]
    for name in targets:
        if not _matching(layers, [name]):
            known = sorted({re.sub(r"^h\.\d+\.", "", path) for path in layers})
            raise UserError(f"no linear layer is named {name!r}: choose all, attention, or among {', '.join(known)}")
    model.requires_grad_(False)
    for path in _matching(layers, targets):
        _put(model, path, LoRALinear(layers[path], r, alpha, dropout, rslora))
    if tokens:
        model.wte = TrainedTokens(model.wte, list(dict.fromkeys(tokens)))
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

HOW = ("careful", "simple")


@torch.no_grad()
def _merged_weight(layer, how):
    """nn.Linear, NF4Linear or either with an adapter -> one weight (out, in)."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    if how == "simple":
        if isinstance(base, NF4Linear):
            raise ValueError("the simple merge needs the weights as they were before: load the base as floats")
        weight = base.weight.bfloat16().to(base.weight.dtype)
    else:
        weight = dequantize_nf4(base.quantized) if isinstance(base, NF4Linear) else base.weight
    return weight + layer.scaling * layer.lora_B @ layer.lora_A if isinstance(layer, LoRALinear) else weight


def merge_lora(model, how="careful"):
    """Back to a plain GPT with plain nn.Linear layers, in place -> model; every parameter is trainable again.

    careful: the weights as training saw them + scaling * BA, so the logits stay what they were. simple: bf16(W) +
    scaling * BA, in every linear layer of the blocks. Neither rounds back to four bits: that would add an error that
    training has not seen.
    Raises ValueError for another `how`, and for "simple" where the base is quantized.
    """
    if how not in HOW:
        raise ValueError(f"how is {how!r}: it must be careful or simple")
    for path, layer in _linear_layers(model).items():
        base = layer.base if isinstance(layer, LoRALinear) else layer
        linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")  # no random numbers
        linear.weight = nn.Parameter(_merged_weight(layer, how))
        linear.bias = base.bias
        _put(model, path, linear.train(layer.training))
    if isinstance(model.wte, TrainedTokens):
        embedding, tokens = model.wte.base, model.wte
        embedding.weight.data[tokens.ids] = tokens.rows.data
        model.wte = embedding
    return model.requires_grad_(True)


# ---- PEFT's files ----------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper inside PEFT's wrapper; "transformer." is transformers' GPT2LMHeadModel
TOKENS = "transformer.wte.token_adapter.trainable_tokens_delta"  # holds the rows, whatever it is called

# What may stand in a config: the settings that are read, and those that change nothing once the adapter is trained
# (which layers were chosen shows in the weights' names). Any other must be off: a setting skipped is a model silently
# wrong.
KNOWN = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias",
         "trainable_token_indices", "nanoalign_nf4", "nanoalign_extra", "target_modules", "exclude_modules",
         "layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode", "init_lora_weights", "revision",
         "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
ONE_OF = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none",),
          "init_lora_weights": (True, False, "gaussian", "orthogonal")}  # others (PiSSA, LoftQ) change the base weights


def peft_parameters(model):
    """{name in PEFT's file, without its prefix: parameter} of adapters and token rows."""
    named = {f"transformer.{path}.{name}.weight": getattr(layer, name)
             for path, layer in _adapted(model).items() for name in ("lora_A", "lora_B")}
    return named | ({TOKENS: model.wte.rows} if isinstance(model.wte, TrainedTokens) else {})


def save_adapter(model, folder, base_name, extra=None):
    """Writes adapter_model.safetensors and adapter_config.json, each replaced in one step, as PEFT reads them.

    base_name: folder or public name of the base model, recorded for load_merged and for PEFT. extra: tensors of a head
    that goes with the adapter (a reward head), stored beside it under their names (read_extra). Besides PEFT's settings
    the config records whether the base was quantized in training: "nanoalign_nf4": {"block", "double"} or null.
    """
    folder, adapted = Path(folder), _adapted(model)
    if not adapted:
        raise ValueError("the model has no adapters to save")
    layer = next(iter(adapted.values()))
    endings = sorted({re.sub(r"^h\.\d+\.", "", path) for path in adapted})
    in_all_blocks = _matching(_linear_layers(model), endings) == list(adapted)
    tokens = model.wte.ids.tolist() if isinstance(model.wte, TrainedTokens) else None
    nf4 = [m for m in model.modules() if isinstance(m, NF4Linear)]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), "r": layer.r,
              "lora_alpha": layer.alpha, "lora_dropout": layer.dropout.p, "use_rslora": layer.rslora, "bias": "none",
              "target_modules": endings if in_all_blocks else list(adapted),
              "fan_in_fan_out": True,  # GPT-2's Conv1D keeps its weight as (in, out); A and B are stored alike for both
              "trainable_token_indices": tokens and {"wte": tokens},
              "inference_mode": True, "init_lora_weights": True,
              "nanoalign_nf4": {"block": nf4[0].block, "double": nf4[0].scale is not None} if nf4 else None,
              "nanoalign_extra": sorted(extra or {})}
    tensors = peft_parameters(model) | (extra or {})
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as temporary:  # last: where it stands, the adapter is whole
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def is_adapter(folder):
    """Does the folder hold an adapter, ours or PEFT's?"""
    return (Path(folder) / CONFIG).is_file()


def read_adapter_config(folder):
    """adapter_config.json -> its settings; token indices as a list, our own keys filled in where PEFT wrote the file.

    Raises UserError for a damaged file and for settings that would make another model (DoRA, trained biases, ...).
    """
    path = Path(folder) / CONFIG
    try:
        config = {"nanoalign_nf4": None, "nanoalign_extra": [], "lora_dropout": 0.0, "use_rslora": False,
                  "base_model_name_or_path": None} | json.loads(path.read_text())
        unknown = [key for key, value in config.items() if value and key not in KNOWN]
        unknown += [key for key, allowed in ONE_OF.items() if config.get(key, allowed[0]) not in allowed]
        if unknown:
            raise UserError(f"{path} has {unknown[0]} = {config[unknown[0]]!r}: this project reads adapters of GPT-2 "
                            "without that setting")
        tokens = config.get("trainable_token_indices") or []
        config["trainable_token_indices"] = [int(i) for i in (tokens["wte"] if isinstance(tokens, dict) else tokens)]
        if not (int(config["r"]) >= 1 and float(config["lora_alpha"]) > 0 and 0 <= float(config["lora_dropout"]) < 1):
            raise ValueError("r, lora_alpha or lora_dropout is impossible")
        nf4 = config["nanoalign_nf4"]
        config["nanoalign_nf4"] = {"block": int(nf4["block"]), "double": bool(nf4["double"])} if nf4 else None
        return config
    except OSError:
        raise UserError(f"{folder} holds no {CONFIG}, so it is not an adapter folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): save or copy the adapter again")


def _read_tensors(folder):
    """-> {name without PEFT's prefix: tensor}. An adapter made on GPT2Model lacks "transformer.": it is added."""
    path = Path(folder) / WEIGHTS
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise UserError(f"{folder} has an {CONFIG} but no {WEIGHTS}: save or copy the adapter again")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): save or copy the adapter again")
    bare = ("h.", "wte.")
    return {f"transformer.{name}" if name.startswith(bare) else name: tensor for name, tensor in tensors.items()}


def read_extra(folder):
    """-> {name: tensor} that save_adapter got as extra; empty where there was none."""
    tensors = _read_tensors(folder)
    names = read_adapter_config(folder)["nanoalign_extra"]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{folder}/{WEIGHTS} lacks {missing[0]}, which {CONFIG} names: save or copy the adapter again")
    return {name: tensors[name] for name in names}


def load_adapter(model, folder):
    """Adds the adapter in the folder (ours or PEFT's) to its base model, in place -> number of trainable parameters.

    Raises UserError where the files are damaged or made for another model.
    """
    config, tensors = read_adapter_config(folder), _read_tensors(folder)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in config["nanoalign_extra"]}
    found = [re.fullmatch(r"transformer\.(h\.\d+\..+)\.lora_[AB]\.weight", name) for name in tensors]
    wanted, present = list(dict.fromkeys(match[1] for match in found if match)), _linear_layers(model)
    strange = [name for name, match in zip(tensors, found) if not (match and match[1] in present or name == TOKENS)]
    if strange:
        raise UserError(f"{folder}/{WEIGHTS} is not for this base model, which has no place for {strange[0]}")
    if not wanted:
        raise UserError(f"{folder}/{WEIGHTS} holds no adapter of a linear layer")
    tokens = config["trainable_token_indices"]
    if tokens and max(tokens) >= model.config.vocab_size:  # chat tokens that training had added
        model.resize_vocab(max(tokens) + 1)
    count = add_lora(model, int(config["r"]), config["lora_alpha"], config["lora_dropout"], wanted,
                     config["use_rslora"], tokens)
    for name, parameter in peft_parameters(model).items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            there = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UserError(f"{folder}/{WEIGHTS}: {name} {there}, but base and {CONFIG} ask for shape "
                            f"{tuple(parameter.shape)}")
        parameter.data.copy_(tensor)
    return count


def base_of(folder):
    """The adapter's base: a public name, or a folder, as given or else relative to the adapter's folder -> str.

    Raises UserError naming both places where the base is in neither.
    """
    name = read_adapter_config(folder)["base_model_name_or_path"]
    if not name:
        raise UserError(f"{folder}/{CONFIG} names no base model: give it with --base")
    beside = Path(folder) / name
    for place in (Path(name), beside):
        if place.is_dir() and place.resolve() != Path(folder).resolve():
            return str(place)
    if name.removeprefix("openai-community/") in PUBLIC:
        return name.removeprefix("openai-community/")
    raise UserError(f"the adapter {folder} is of {name}, but there is no folder {name} and no folder {beside}: "
                    f"put the base there, or name it with python lora.py --base FOLDER --adapter {folder} --out MERGED")


def load_unmerged(folder, load_base, base="", nf4=True):
    """The model as training saw it: base, quantized where training had it so (nf4), and adapter -> GPT, not merged.

    load_base: name or folder -> GPT with float weights. base: in place of the one that the adapter names.
    """
    quantized = read_adapter_config(folder)["nanoalign_nf4"]
    model = load_base(base or base_of(folder))
    if nf4 and quantized:
        quantize_model(model, **quantized)
    load_adapter(model, folder)
    return model


def load_merged(folder, load_base, base="", how="careful"):
    """As load_unmerged, but merged -> a plain GPT."""
    return merge_lora(load_unmerged(folder, load_base, base, nf4=how == "careful"), how)


# ---- python lora.py --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def logit_differences(model, other, windows):
    """windows (n, T) of ids -> largest and mean |logit difference|, share of positions with another likeliest token."""
    largest, total, changed = 0.0, 0.0, 0.0
    for ids in windows:
        a, b = model(ids[None]), other(ids[None])  # (1, T, V)
        gap = (a - b).abs()
        largest, total = max(largest, gap.max().item()), total + gap.mean().item()
        changed += (a.argmax(-1) != b.argmax(-1)).float().mean().item()
    return largest, total / len(windows), changed / len(windows)


def compare(trained, merges, tok, documents, windows=32):
    """Prints what each merge changes against the unmerged model. merges: {name: GPT}; documents: list of texts."""
    from model import text_stream

    stream = text_stream(documents, tok)
    T = min(trained.config.block_size, len(stream))
    ids = stream[:min(windows, len(stream) // T) * T].view(-1, T)  # (n, T)
    print(f"against the unmerged model, on {ids.numel():,} tokens of text:\n"
          f"{'':18}{'largest':>12}{'mean |logit difference|':>27}{'greedy tokens that differ':>29}")
    for name, merged in merges.items():
        largest, mean, changed = logit_differences(trained, merged, ids)
        print(f"   {name + ' merge':<15}{largest:>12.1e}{mean:>27.1e}{changed:>29.2%}")


def compare_on_the_island(models, tok):
    """Prints the island's scores, one column a model."""
    from island.world import Island
    from sft import island_scores

    island, run = Island(), Run(torch.device("cpu"), torch.float32)
    rows = island.conversations(600, seed=7, split="test")  # the held-out ones of sft.py
    scores = {name: island_scores(model, tok, rows, island, run) for name, model in models.items()}
    print("\nasked what it was never trained on (greedy answers):")
    print(" " * 45 + "".join(f"{name:>10}" for name in scores))
    for question in next(iter(scores.values())):
        print(f"   {question:<42}" + "".join(f"{column[question][0]:>10.0%}" for column in scores.values()))


@dataclass
class Config:
    adapter: str = ""  # the adapter's folder
    base: str = ""  # the base model's folder; empty: the one that the adapter names
    out: str = ""  # folder for the merged model
    merge: str = "careful"  # careful (the weights that training saw) or simple (the base in bfloat16)
    compare: bool = False  # print what both merges change, and on the island their scores
    text: str = ""  # text file for --compare; empty: the island's plain text


def main(config):
    from data import files
    from island.world import Island
    from data.tokenizer import get_tokenizer
    from model import GPT

    if not config.adapter or not (config.out or config.compare):
        raise UserError("name an adapter and what to do with it: --adapter FOLDER with --out FOLDER or --compare")
    if config.merge not in HOW:
        raise UserError(f"--merge {config.merge}: it must be careful or simple")
    base = config.base or base_of(config.adapter)
    own = (Path(config.adapter) / "tokenizer.json").is_file()  # an adapter from PEFT may come without a tokenizer
    tok = get_tokenizer(config.adapter if own else base)
    if config.compare:
        trained = load_unmerged(config.adapter, GPT.from_pretrained, base).eval()
        merges = {how: load_merged(config.adapter, GPT.from_pretrained, base, how).eval() for how in HOW}
        rows = files.load(config.text, "text")[0] if config.text else []
        compare(trained, merges, tok, [row["text"] for row in rows] or Island().plain_text(400, seed=9))
        if tok.ranks == get_tokenizer("tiny").ranks:  # the island's vocabulary
            compare_on_the_island({"unmerged": trained} | merges, tok)
    if config.out:
        load_merged(config.adapter, GPT.from_pretrained, base, config.merge).save_pretrained(config.out)
        tok.save(config.out)
        print(f"the {config.merge} merge of {config.adapter} and {base} is in {config.out} (transformers loads it too)")


if __name__ == "__main__":
    main(parse(Config))
