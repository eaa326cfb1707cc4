"""Hugging Face folders: finding them, and moving tensors between them and a network, which says what its own are called
there (hf_names). Every function raises UserError with one sentence that names the folder and the cure. Nothing is
unpickled.
"""
import json
from pathlib import Path

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
             "chat_template.jinja", "merges.txt", "added_tokens.json", "special_tokens_map.json")
BUFFERS = (".attn.bias", ".attn.masked_bias", ".inv_freq")  # no parameters: old versions of transformers wrote them too


def find(name_or_folder):
    """A checkpoint folder, or one of GPT-2's public names through huggingface_hub -> Path of a folder."""
    folder = Path(name_or_folder)
    settle(folder)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise UserError(f"{folder} holds no config.json, so it is not a checkpoint folder")
    if name_or_folder not in PUBLIC:
        raise UserError(f"there is no checkpoint folder {name_or_folder}: give a folder with config.json and "
                        f"model.safetensors, or one of {', '.join(PUBLIC)}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"fetching {name_or_folder} needs huggingface_hub: pip install huggingface_hub, or name a "
                        "folder that holds its config.json and model.safetensors")
    try:
        return Path(snapshot_download(f"openai-community/{name_or_folder}",
                                      allow_patterns=["config.json", "model.safetensors", "tokenizer.json"]))
    except Exception as error:  # no network, no such name, no space: the cure is the same
        raise UserError(f"{name_or_folder} could not be fetched ({type(error).__name__}): check the network, or "
                        "download config.json and model.safetensors by hand from "
                        f"huggingface.co/openai-community/{name_or_folder}")


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


def open_weights(folder):
    """The folder's safetensors -> a function from a name to its tensor, read on demand; and the names in the files."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif index.is_file():  # large models come in several files
        files = set(json.loads(index.read_text())["weight_map"].values())
    elif (folder / "pytorch_model.bin").is_file():
        raise UserError(f"{folder} has only pytorch_model.bin, a pickle that could run any code: convert it with "
                        "transformers: AutoModelForCausalLM.from_pretrained(folder)"
                        ".save_pretrained(folder, safe_serialization=True)")
    else:
        raise UserError(f"{folder} has a config.json but no model.safetensors")
    where = {}
    try:
        for file in sorted(files):
            with safe_open(folder / file, framework="pt") as opened:
                where |= {key: (file, key) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/{file} is damaged ({error}): write or download it again")

    def read(name):
        found = where.get(name) or where.get(name.partition(".")[2])  # a trunk saved by itself lacks the wrapper's name
        if found is None:
            raise UserError(f"{folder}: model.safetensors lacks {name}, so it is no checkpoint of its config.json")
        file, key = found
        # opened anew each time: what has been read of an open file stays in memory, at the end the whole file
        with safe_open(folder / file, framework="pt") as opened:
            return opened.get_tensor(key)

    return read, set(where)


def read_weights(network, folder, linear=None):
    """Fills a network that was made of shapes only (the meta device) from its folder, a tensor at a time, float32 ->
    network.

    linear: called with each linear layer of the blocks as soon as it is filled; what it returns takes the layer's
    place.
    """
    (read, there), names = open_weights(folder), network.hf_names()
    taken = set()  # names in the files
    for path in [path for path, _ in network.named_modules()]:  # paths only: a list of modules would keep replaced ones alive
        module = network.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            theirs, transposed = names[f"{path}.{name}"]
            taken |= {theirs, theirs.partition(".")[2]}
            tensor = read(theirs).float()
            tensor = tensor.t().contiguous() if transposed else tensor.clone()
            if tensor.shape != parameter.shape:
                raise UserError(f"{folder}: {theirs} has shape {tuple(tensor.shape)}, but config.json says "
                                f"{tuple(parameter.shape)}: the two files are not of one model")
            setattr(module, name, nn.Parameter(tensor))
        if linear is not None and path in network.linear_paths:
            network.replace(path, linear(module))
    trunk = {part for theirs, _ in names.values() for part in theirs.split(".")[:2]}  # all else is of some head
    for name in sorted(there - taken):  # zeros: the biases of a model without biases (write_folder)
        if name.split(".")[0] in trunk and not name.endswith(BUFFERS) and read(name).any():
            raise UserError(f"{folder}: model.safetensors holds {name}, but a model of its config.json has no place "
                            "for it: the two files are not of one model")
    return network


def write_folder(network, folder, settings, extra=None):
    """config.json with these settings, and model.safetensors with the network's tensors, float32, and extra's."""
    tensors = {}
    for ours, (theirs, transposed) in network.hf_names().items():
        path, _, name = ours.rpartition(".")
        parameter = getattr(network.get_submodule(path), name)
        if parameter is not None:
            tensor = parameter.detach().cpu().float()
            tensors[theirs] = tensor.t() if transposed else tensor
    tensors = {name: tensor.contiguous() for name, tensor in (tensors | (extra or {})).items()}
    with together(folder, (*MODEL, *OF_A_RUN)) as new:
        write_json(new / "config.json", settings, indent=2)
        write_tensors(tensors, new / "model.safetensors")
