"""Checkpoints: a folder becomes a network and the tensors of its head, and the reverse.

    model = load("out/sft")                        a folder of a GPT-2 or Llama, gpt2 ... gpt2-xl, or owner/model on the hub
    model = load("out/sft-lora")                   an adapter names its base: together, merged, they are a model like any other
    model = load("out/sft-lora", merge=False)      beside each other, as training saw them

Folders are Hugging Face's: transformers reads the models, PEFT the adapters, and we read theirs (tests/parity). A
reward model's head is one more tensor in the same file. What training needs to go on (trainer.save_state) lies beside
them.
"""
import functools
import json
from pathlib import Path

from common.errors import UserError, no_command

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import llama
import lora
import trainer
from common import hub
from common.disk import settle, together, write_json
from common.flags import dropout_of
from data.questions import Questions
from data.tokenizer import get_tokenizer
from model import GPT, resize_vocab
from quant import NF4Linear, freeze

FAMILIES = {"gpt2": GPT} | dict.fromkeys(llama.FAMILIES, llama.Llama)  # config.json's model_type: what reads the folder

# ---- a folder becomes a network --------------------------------------------------------------------------------------


def load(name_or_folder, merge=True, base="", how="careful", linear=None, **settings):
    """A checkpoint's folder, an adapter's folder, or a public name -> network, float32. Of a reward model: without the
    head of its own that it may have, which nobody asks.

    merge: an adapter is merged into its base, `how` says which way (lora.merge_lora); False: it stays beside it, and
    the base is quantized where training had it so. base: in place of the base that an adapter names. linear: for what
    is not trained, which stays bfloat16 where its file is (quant.freeze), or is quantized while it is read (NF4Linear):
    takes the place of each linear layer of the blocks. settings: dropout, attention_dropout, checkpointing. Raises
    UserError where there is no such folder, or it is damaged, or of a family that this project does not know.
    """
    adapter = is_adapter(name_or_folder)
    folder = name_or_folder if adapter else hub.find(name_or_folder)
    settings = {"head": not is_reward_model(folder)} | settings
    if not adapter:
        return family(folder).from_pretrained(folder, linear=linear, **settings)
    quantized = read_adapter_config(name_or_folder)["nanoalign_nf4"]
    frozen = None if merge else freeze
    if quantized and (how == "careful" or not merge):
        frozen = functools.partial(NF4Linear, **quantized)
    model = load(base or base_of(name_or_folder), linear=frozen, **settings)
    load_adapter(model, name_or_folder)
    if merge:
        lora.merge_lora(model, how)
    for path, layer in model.linears().items() if linear else ():
        model.replace(path, linear(layer))
    return model


def family(folder):
    """-> the class of network that reads the folder. Raises UserError where there is none."""
    name = hub.read_settings(folder).get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{folder} holds a model of type {name!r:.80}: this project reads {', '.join(FAMILIES)}")
    return FAMILIES[name]


def shapes(name_or_folder):
    """The network of a folder or a public name, without its weights."""
    folder = hub.find(name_or_folder)
    return family(folder).shapes(folder)


def load_to_ask(folder, run):
    """A checkpoint folder or a public name -> model, ready to be asked, and its tokenizer."""
    refuse_reward_model(folder)
    model, tok = load(folder, linear=freeze), get_tokenizer(folder)
    if tok.new_ids:
        run.print(f"{folder} has never been trained on conversations: expect continued text, not answers")
    resize_vocab(model, tok.vocab_size)
    return model.to(run.device).eval(), tok


def frozen_as(config):
    """How a base is kept beside adapters: what `load` takes as linear. None: all weights are trained."""
    return NF4Linear if config.nf4 else freeze if config.lora_r else None


def load_init(config, run):
    """-> model, ready to train, and tokenizer of --init. With --lora-r adapters are added and all else is frozen, as it
    is in its file, or with --nf4 in four bits, layer by layer as it is read."""
    if config.lora_r:
        hub.give_back_at_once()
    model = load(config.init, dropout=dropout_of(config), checkpointing=config.checkpointing, linear=frozen_as(config))
    tok = get_tokenizer(config.tokenizer or config.init, config.template or None)
    resize_vocab(model, tok.vocab_size)
    model.to(run.device)
    if config.lora_r:
        torch.manual_seed(config.seed)
        trained = lora.add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_targets, tokens=tok.new_ids)
        frozen = sum(p.numel() for p in model.parameters()) - trained
        run.print(f"adapters of rank {config.lora_r}: {trained:,} trained parameters beside {frozen:,} frozen ones"
                  + (" and the 4-bit weights" if config.nf4 else ""))
    tok.new_ids = []  # from here on they are trained
    return model.train(), tok


# ---- and the reverse -------------------------------------------------------------------------------------------------

def save_checkpoint(config, run, step, steps, model, tok, optimizer):
    """A folder that transformers (an adapter: PEFT) and every script here can read, and the state for --resume. The
    state comes first: a folder with a state beside it is known to be unfinished."""
    trainer.save_state(config, run, step, steps, model, optimizer)
    if run.rank == 0:
        save_model(config, model, tok)


def save_model(config, model, tok, extra=None):
    """The folder alone: of the whole model, or of its adapter with the name of its base. extra: tensors of another
    head."""
    with together(config.out, hub.MODEL + hub.TOKENIZER) as folder:
        if lora.is_adapted(model):
            save_adapter(model, folder, config.init, extra)
        else:
            model.save_pretrained(folder, extra)
        tok.save(folder)
        if questions := Questions.load(config.init) if config.init else None:
            questions.save(folder)  # until the script counts its own


# ---- a reward model's head -------------------------------------------------------------------------------------------

HEAD_NAMES = {"weight": "score.weight", "bias": "score.bias"}  # in the file, as GPT2ForSequenceClassification of transformers


def read_head(folder):
    """A reward model's folder, or adapter -> {"weight": (1, C), "bias": (1,)}. Raises UserError where there is no
    head."""
    try:
        read = read_extra(folder).__getitem__ if is_adapter(folder) else hub.open_weights(hub.find(folder))[0]
        return {name: read(theirs) for name, theirs in HEAD_NAMES.items()}
    except (UserError, KeyError):
        raise UserError(f"{folder} has no reward head: train one with python reward.py --init {folder}")


def is_reward_model(folder):
    """Does a checkpoint, or adapter, have a reward head? Then it marks answers and writes none."""
    try:
        return bool(read_head(folder))
    except UserError:
        return False


def refuse_reward_model(folder):
    """Raises UserError where somebody is about to ask a reward model for an answer."""
    if is_reward_model(folder):
        raise UserError(f"{folder} is a reward model, which marks answers and writes none: name it with --reward")


# ---- adapters: PEFT's files ------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper inside PEFT's wrapper

# What may stand in a config: the settings that are read, and those that change nothing once the adapter is trained
# (which layers were chosen shows in the weights' names). Any other must be off: a setting skipped is a model silently
# wrong.
KNOWN = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias",
         "trainable_token_indices", "nanoalign_nf4", "nanoalign_extra", "target_modules", "exclude_modules",
         "layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode", "init_lora_weights", "revision",
         "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
ONE_OF = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none",),
          "init_lora_weights": (True, False, "gaussian", "orthogonal")}  # others (PiSSA, LoftQ) change the base weights


def peft_paths(model):
    """{path of a linear layer of ours: what it is called in PEFT's files}: its name in Hugging Face's."""
    names = model.hf_names()
    return {path: names[f"{path}.weight"][0].removesuffix(".weight") for path in model.linears()}


def token_rows(model):
    """{the name that PEFT gives to trained token rows: the matrix that they are of}; the file holds the rows,
    whatever it is called."""
    matrices = model.token_matrices
    names = [model.hf_names()[f"{name}.weight"][0].removesuffix("weight") for name in matrices]
    return {f"{theirs}token_adapter.trainable_tokens_delta": name for theirs, name in zip(names, matrices)}


def peft_parameters(model):
    """{name in PEFT's file, without its prefix: parameter} of adapters and token rows."""
    paths = peft_paths(model)
    named = {f"{paths[path]}.{name}.weight": getattr(layer, name)
             for path, layer in lora.adapted(model).items() for name in ("lora_A", "lora_B")}
    for theirs, name in token_rows(model).items():
        matrix = model.get_submodule(name)
        if isinstance(matrix, lora.TrainedTokens):
            named[theirs] = matrix.rows
    return named


def save_adapter(model, folder, base_name, extra=None):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT reads them, in place of any model in the folder.

    base_name: folder or public name of the base model, recorded for `load` and for PEFT. extra: tensors of a head
    that goes with the adapter (a reward head), stored beside it under their names (read_extra). Besides PEFT's settings
    the config records whether the base was quantized in training: "nanoalign_nf4": {"block", "double"} or null.
    """
    adapted, paths = lora.adapted(model), peft_paths(model)
    if not adapted:
        raise ValueError("the model has no adapters to save")
    layer, path = next(iter(adapted.values())), next(iter(adapted))
    theirs = [paths[path] for path in adapted]
    ends = sorted({name.split(f".{path.split('.')[1]}.", 1)[1] for path, name in zip(adapted, theirs)})
    in_all_blocks = lora.matching(paths.values(), ends) == theirs
    matrix = model.get_submodule(model.token_matrices[0])
    tokens = matrix.ids.tolist() if isinstance(matrix, lora.TrainedTokens) else None
    nf4 = [m for m in model.modules() if isinstance(m, NF4Linear)]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name), "r": layer.r,
              "lora_alpha": layer.alpha, "lora_dropout": layer.dropout.p, "use_rslora": layer.rslora, "bias": "none",
              "target_modules": ends if in_all_blocks else theirs,
              "fan_in_fan_out": model.hf_names()[f"{path}.weight"][1],  # stored as (in, out), as GPT-2's Conv1D is
              "trainable_token_indices": tokens and {name.split(".")[-3]: tokens for name in token_rows(model)},
              "inference_mode": True, "init_lora_weights": True,
              "nanoalign_nf4": {"block": nf4[0].block, "double": nf4[0].double} if nf4 else None,
              "nanoalign_extra": sorted(extra or {})}
    tensors = peft_parameters(model) | (extra or {})
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with together(folder, (*hub.MODEL, *hub.OF_A_RUN)) as new:
        hub.write_tensors(tensors, new / WEIGHTS)
        write_json(new / CONFIG, config, indent=2)


def is_adapter(folder):
    """Does the folder hold an adapter, ours or PEFT's?"""
    settle(folder)
    return (Path(folder) / CONFIG).is_file()


def read_adapter_config(folder):
    """adapter_config.json -> its settings; token indices by matrix, our own keys filled in where PEFT wrote the file.

    Raises UserError for a damaged file and for settings that would make another model (DoRA, trained biases, ...).
    """
    path = Path(folder) / CONFIG
    settle(folder)
    try:
        config = {"nanoalign_nf4": None, "nanoalign_extra": [], "lora_dropout": 0.0, "use_rslora": False,
                  "base_model_name_or_path": None} | json.loads(path.read_text())
        unknown = [key for key, value in config.items() if value and key not in KNOWN]
        unknown += [key for key, allowed in ONE_OF.items() if config.get(key, allowed[0]) not in allowed]
        if unknown:
            raise UserError(f"{path} has {unknown[0]} = {config[unknown[0]]!r}: this project reads adapters "
                            "without that setting")
        get = functools.partial(hub.setting, folder, file=CONFIG)
        get(config, "r", int), get(config, "lora_alpha", float, low=1e-6), get(config, "use_rslora", bool)
        get(config, "lora_dropout", float, low=0, high=1 - 1e-6)
        tokens = config.get("trainable_token_indices") or {}
        tokens = tokens if isinstance(tokens, dict) else {"": tokens}  # a list is of the embedding
        for ids in tokens.values():
            for i in range(len(ids)):
                get(dict(enumerate(ids)), i, int, low=0)
        config["trainable_token_indices"] = tokens
        if not isinstance(config["base_model_name_or_path"], (str, type(None))):
            raise ValueError(f"its base is {config['base_model_name_or_path']!r}")
        if set(map(type, config["nanoalign_extra"])) - {str}:
            raise ValueError(f"its nanoalign_extra is {config['nanoalign_extra']!r}")
        nf4 = config["nanoalign_nf4"]
        if nf4:
            get(nf4, "block", int, low=2), get(nf4, "double", bool)
        config["nanoalign_nf4"] = {"block": nf4["block"], "double": nf4["double"]} if nf4 else None
        return config
    except OSError:
        raise UserError(f"{folder} holds no {CONFIG}, so it is not an adapter folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): save or copy the adapter again")


def read_tensors(folder):
    """-> {name without PEFT's prefix: tensor}."""
    path = Path(folder) / WEIGHTS
    try:
        return {name.removeprefix(PREFIX): hub.finite(tensor, f"{path}: {name}") for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise UserError(f"{folder} has an {CONFIG} but no {WEIGHTS}: save or copy the adapter again")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): save or copy the adapter again")


def read_extra(folder):
    """-> {name: tensor} that save_adapter got as extra; empty where there was none."""
    tensors = read_tensors(folder)
    names = read_adapter_config(folder)["nanoalign_extra"]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{folder}/{WEIGHTS} lacks {missing[0]}, which {CONFIG} names: save or copy the adapter again")
    return {name: tensors[name] for name in names}


def trained_tokens(model, indices, folder):
    """{the matrix's name in PEFT's config: ids} -> the ids, the same in every matrix of the model. Raises UserError."""
    known = [name.split(".")[-3] for name in token_rows(model)]
    strange = [name for name in indices if name not in ("", *known)]
    if strange or any(ids != next(iter(indices.values())) for ids in indices.values()):
        raise UserError(f"{folder}/{CONFIG} trains tokens of {', '.join(indices)}: this project reads the same tokens of "
                        f"{', '.join(known)}")
    return next(iter(indices.values()), [])


def load_adapter(model, folder):
    """Adds the adapter in the folder (ours or PEFT's) to its base model, in place -> number of trainable parameters.

    Raises UserError where the files are damaged or made for another model.
    """
    config, tensors = read_adapter_config(folder), read_tensors(folder)
    ours = {theirs: path for path, theirs in peft_paths(model).items()}
    ours |= {theirs.partition(".")[2]: path for theirs, path in ours.items()}  # an adapter made on the trunk alone
    tensors = {name: tensor for name, tensor in tensors.items() if name not in config["nanoalign_extra"]}
    places = {name: name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in tensors}
    rows = [name for theirs in token_rows(model) for name in (theirs, theirs.partition(".")[2])]
    strange = [name for name, place in places.items() if not (place != name and place in ours or name in rows)]
    if strange:
        raise UserError(f"{folder}/{WEIGHTS} is not for this base model, which has no place for {strange[0]}")
    wanted = list(dict.fromkeys(ours[place] for place in places.values() if place in ours))
    if not wanted:
        raise UserError(f"{folder}/{WEIGHTS} holds no adapter of a linear layer")
    ranks = {tensor.size(0) if tensor.dim() else 0 for name, tensor in tensors.items() if ".lora_A." in name}
    if ranks and config["r"] not in ranks:  # before anything of such a rank is allocated
        raise UserError(f"{folder}/{CONFIG} has r = {config['r']:,}, but {WEIGHTS} holds adapters of rank "
                        f"{', '.join(map(str, sorted(ranks)))}: save or copy the adapter again")
    tokens = trained_tokens(model, config["trainable_token_indices"], folder)
    if tokens:  # chat tokens that training had added
        hub.check_room(4 * max(tokens) * model.config.n_embd, f"{folder}: a vocabulary of {max(tokens) + 1:,} tokens needs",
                       f"mend {CONFIG}")
        resize_vocab(model, max(tokens) + 1)
    count = lora.add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], wanted,
                          config["use_rslora"], tokens)
    for name, parameter in peft_parameters(model).items():
        tensor = tensors.get(name, tensors.get(name.partition(".")[2]))
        if tensor is None or tensor.shape != parameter.shape:
            there = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UserError(f"{folder}/{WEIGHTS}: {name} {there}, but base and {CONFIG} ask for shape "
                            f"{tuple(parameter.shape)}")
        parameter.data.copy_(tensor)
    return count


def base_of(folder):
    """The adapter's base, which may be an adapter itself -> str, as named_base.

    Raises UserError where that leads back to the adapter.
    """
    base, seen = named_base(folder), {Path(folder).resolve()}
    here = base
    while is_adapter(here):
        if Path(here).resolve() in seen:
            raise UserError(f"{folder}/{CONFIG}: the adapters {folder} and {here} name each other as base: give a model with "
                            f"python lora.py --base FOLDER --adapter {folder} --out MERGED")
        seen.add(Path(here).resolve())
        here = named_base(here)
    return base


def named_base(folder):
    """What the adapter names as its base: a public name, or a folder, as given or else relative to the adapter's ->
    str. Raises UserError naming both places where the base is in neither."""
    name = read_adapter_config(folder)["base_model_name_or_path"]
    if not name:
        raise UserError(f"{folder}/{CONFIG} names no base model: give it with --base")
    beside = Path(folder) / name
    for place in (Path(name), beside):
        if place.is_dir() and place.resolve() != Path(folder).resolve():
            return str(place)
    if hub.is_name(name):
        return name.removeprefix("openai-community/")
    raise UserError(f"the adapter {folder} is of {name}, but there is no folder {name} and no folder {beside}: "
                    f"put the base there, or name it with python lora.py --base FOLDER --adapter {folder} --out MERGED")


if __name__ == "__main__":
    no_command(__doc__)
