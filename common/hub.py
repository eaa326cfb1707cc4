"""Hugging Face folders: finding them, and moving tensors between them and a network, which says what its own are called
there (hf_names). Every function raises UserError with one sentence that names the folder and the cure. Nothing is
unpickled.
"""
import contextlib
import ctypes
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.disk import settle, together, write_json
from common.errors import UserError

PUBLIC = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# The files that make a folder one model, by whoever wrote it. Where one is saved, those of the model that was there go.
STATE = "state.pt"  # what a run of that model needs to go on (trainer.save_state)
RECORD = "run.json"  # which run has made it, and how far that is
OF_A_RUN = (STATE, RECORD)
SHARD = "-?????-of-?????"
MODEL = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "config.json", "model.safetensors",
         f"model{SHARD}.safetensors", "model.safetensors.index.json", "pytorch_model.bin", f"pytorch_model{SHARD}.bin",
         "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json", "vocab.json",
             "chat_template.jinja", "merges.txt", "added_tokens.json", "special_tokens_map.json", "questions.json")
BUFFERS = (".attn.bias", ".attn.masked_bias", ".inv_freq")  # no parameters: old versions of transformers wrote them too


FLOATS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}  # what safetensors calls the dtypes that weights may have: bits
DEEPEST, LARGEST = 2 ** 10, 2 ** 24  # layers, and any other size: beyond is no model but a damaged config.json


def is_name(name):
    """Can it be a model's name on the hub? That is owner/model, the owner no folder here."""
    owner = name.partition("/")[0]
    return name in PUBLIC or bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(owner).exists()


def find(name_or_folder):
    """A checkpoint folder, or a name on the hub through huggingface_hub -> Path of a folder."""
    folder, name = Path(name_or_folder), str(name_or_folder)
    settle(folder)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise UserError(f"{folder} holds no config.json, so it is not a checkpoint folder")
    if not is_name(name):
        raise UserError(f"there is no checkpoint folder {folder}: give a folder with config.json and "
                        f"model.safetensors, a name on the hub (owner/model), or one of {', '.join(PUBLIC)}")
    name = f"openai-community/{name}" if name in PUBLIC else name
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"there is no folder {folder}, and fetching {name} needs huggingface_hub: pip install "
                        "huggingface_hub, or name a folder that holds its config.json and model.safetensors")
    try:
        wanted = [pattern for pattern in (*MODEL, *TOKENIZER) if not pattern.endswith((".bin", ".bin.index.json"))]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no network, no such name, no space: the cure is the same
        raise UserError(f"there is no folder {folder}, and {name} could not be fetched ({type(error).__name__}): check "
                        "name and network, or download config.json and model.safetensors by hand from "
                        f"huggingface.co/{name}")


def write_tensors(tensors, path):
    """{name: tensor} -> a file of safetensors. Called where a disk's refusal becomes a sentence (disk.on_disk)."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error))


def read_settings(folder):
    """config.json -> a dict, whatever family it is of."""
    try:
        settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no object")
        return settings
    except ValueError as error:
        raise UserError(f"{folder}/config.json is damaged ({error!r}): write or download the folder again")


def setting(folder, settings, key, kind, default=None, low=1, high=LARGEST, file="config.json"):
    """One setting of config.json, or of another file, checked: a bool, a dict, or an int or float from low to high.
    default: what it is where the key is absent or null; without one it has to be there. Raises UserError."""
    found = default if settings.get(key) is None else settings[key]
    words = {bool: "true or false", dict: "an object", int: f"a whole number from {low:,} to {high:,}",
             float: f"a number from {low:,} to {high:,}"}[kind]
    right = type(found) in ((int, float) if kind is float else (kind,))  # to isinstance True is an int
    if found is None:
        raise UserError(f"{folder}/{file} has no {key}, which has to be {words}: write or download the folder again")
    if not right or kind in (int, float) and not low <= found <= high:
        raise UserError(f"{folder}/{file} has {key} = {found!r:.80}, but it has to be {words}: write or download the "
                        "folder again")
    return found


def must_be(folder, settings, fixed):
    """Raises UserError where a setting of config.json that the code takes for granted is another one."""
    for key, value in fixed.items():
        if settings.get(key) not in (None, value):
            raise UserError(f"{folder}/config.json has {key} = {settings[key]!r:.80}, but this project reads only "
                            f"models whose {key} is {value!r}")


# ---- tensors ---------------------------------------------------------------------------------------------------------

def weight_files(folder):
    """The names of the files that hold the folder's weights."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if index.is_file():  # large models come in several files
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error!r}): write or download it again")
        for file in files:
            if not (isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file)):
                raise UserError(f"{index} names {file!r:.80}: weights are read from .safetensors files in the same "
                                "folder only")
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} has only pytorch_model.bin, a pickle that could run any code: convert it with "
                        "transformers: AutoModelForCausalLM.from_pretrained(folder)"
                        ".save_pretrained(folder, safe_serialization=True)")
    raise UserError(f"{folder} has a config.json but no model.safetensors")


def open_weights(folder):
    """The folder's safetensors -> a function from a name to its tensor, read on demand, or with look=True to its
    (shape, dtype) alone; and the names in the files."""
    where = {}
    for file in weight_files(folder):
        try:
            with safe_open(folder / file, framework="pt") as opened:
                where |= {key: (file, key) for key in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder}/{file} is damaged or missing ({error}): write or download it again")

    def read(name, look=False):
        found = where.get(name) or where.get(name.partition(".")[2])  # a trunk saved by itself lacks the wrapper's name
        if found is None:
            raise UserError(f"{folder}: model.safetensors lacks {name}, so it is no checkpoint of its config.json")
        file, key = found
        # opened anew each time: what has been read of an open file stays in memory, at the end the whole file
        with safe_open(folder / file, framework="pt") as opened:
            piece = opened.get_slice(key)
            return (tuple(piece.get_shape()), piece.get_dtype()) if look else opened.get_tensor(key)

    return read, set(where)


def free_memory():
    """Bytes that a new process may use: what is available, or less where a container has a limit. None where the system
    does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # "max", where there is no limit, is no number
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # neither Linux: all that there is
        found += [] if found else [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(found, default=None)


def give_back_at_once():
    """From here on tensors of 2 MB get pages of their own, which go back when they are freed. In one heap the small
    lasting ones (adapters' gradients) break up the places of large passing ones, and it grows with every layer: 120 MB
    a layer of Qwen2.5-0.5B's shape in place of 16. glibc only; it costs time, so it is for large frozen bases."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 2 ** 21)  # M_MMAP_THRESHOLD


def check_room(needed, what, cure):
    """Raises UserError where there is no memory for so many bytes. what: who needs them; cure: what helps."""
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(f"{what} {needed / 1e9:.3g} GB of memory and {free / 1e9:.3g} GB are free: close other programs, or "
                        f"{cure}")


def check_weights(network, folder, read, linear=None):
    """Before anything is allocated: does every tensor have the shape that config.json says, and is there room for all
    of them? network: made of shapes only. Raises UserError where not."""
    needed, names = 0, network.hf_names()
    for ours, parameter in network.named_parameters():
        theirs, transposed = names[ours]
        shape, dtype = read(theirs, look=True)
        if dtype not in FLOATS:
            raise UserError(f"{folder}: {theirs} is of {dtype}, but weights are floats ({', '.join(FLOATS)}): take a "
                            "folder whose weights are not quantized")
        if shape[::-1 if transposed else 1] != tuple(parameter.shape):
            raise UserError(f"{folder}: {theirs} has shape {shape}, but config.json says "
                            f"{tuple(parameter.shape)[::-1 if transposed else 1]}: the two files are not of one model")
        bits = min(32, FLOATS[dtype]) if linear and parameter.dim() == 2 else 32  # as read_weights has it
        if ours.rpartition(".")[0] in network.linear_paths and parameter.dim() == 2:
            bits = getattr(getattr(linear, "func", linear), "bits", bits)  # functools.partial keeps it in func
        needed += parameter.numel() * bits / 8
    check_room(needed, f"{folder}: its weights need", "take a smaller model")


def finite(tensor, what):
    """-> the tensor. Raises UserError where it holds NaN or infinities: whatever is computed from those is neither
    sampled nor trained."""
    if tensor.numel() and not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        raise UserError(f"{what} holds numbers that are not finite (NaN or infinity), so the model is lost: take an earlier "
                        "checkpoint, or copy it again")
    return tensor


def read_weights(network, folder, linear=None):
    """Fills a network that was made of shapes only (the meta device) from its folder, a tensor at a time, float32 ->
    network.

    linear: for a base that is not trained, whose matrices stay in the dtype of the file. Called with each linear layer
    of the blocks as soon as it is filled; what it returns takes the layer's place (quant.freeze, or quant.NF4Linear:
    at no time all weights are floats). Its `bits`, where it has them, are what a weight takes then.
    """
    (read, there), names = open_weights(folder), network.hf_names()
    check_weights(network, folder, read, linear)
    taken = [names[ours][0] for ours, _ in network.named_parameters()]
    taken = {name for theirs in taken for name in (theirs, theirs.partition(".")[2])}  # whichever is in the files
    for path in [path for path, _ in network.named_modules()]:  # paths only: a list of modules would keep replaced ones alive
        module = network.get_submodule(path)
        for name, _ in list(module.named_parameters(recurse=False)):
            theirs, transposed = names[f"{path}.{name}"]
            tensor = finite(read(theirs), f"{folder}: {theirs}")
            if linear is None or tensor.dim() < 2 or tensor.itemsize > 4:
                tensor = tensor.float()
            setattr(module, name, nn.Parameter(tensor.t().contiguous() if transposed else tensor.clone()))
        if linear is not None and path in network.linear_paths:
            network.replace(path, linear(module))
    trunk = {part for theirs, _ in names.values() for part in theirs.split(".")[:2]}  # all else is of some head
    for name in sorted(there - taken):  # zeros: the biases of a model without biases (write_folder)
        if name.split(".")[0] in trunk and not name.endswith(BUFFERS) and read(name).any():
            raise UserError(f"{folder}: model.safetensors holds {name}, but a model of its config.json has no place "
                            "for it: the two files are not of one model")
    return network


def write_folder(network, folder, settings, extra=None, dtype=torch.float32):
    """config.json with these settings, and model.safetensors with the network's tensors, in dtype, and extra's."""
    tensors = {}
    for ours, (theirs, transposed) in network.hf_names().items():
        path, _, name = ours.rpartition(".")
        parameter = getattr(network.get_submodule(path), name)
        if parameter is not None:
            tensor = parameter.detach().cpu().to(dtype)
            tensors[theirs] = tensor.t() if transposed else tensor
    tensors = {name: tensor.contiguous() for name, tensor in (tensors | (extra or {})).items()}
    with together(folder, (*MODEL, *OF_A_RUN)) as new:
        write_json(new / "config.json", settings | {"dtype": str(dtype).removeprefix("torch.")}, indent=2)
        write_tensors(tensors, new / "model.safetensors")
