"""Hugging Face folders: finding them, checking that they hold a GPT-2, reading their weights one by one.

Every function raises UserError with one sentence that names the folder and the cure. Nothing is ever unpickled.
"""
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError

PUBLIC = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def find(name_or_folder):
    """A checkpoint folder, or one of GPT-2's public names through huggingface_hub -> Path of a folder."""
    folder = Path(name_or_folder)
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
        raise UserError(f"fetching {name_or_folder} needs huggingface_hub: pip install huggingface_hub, or name a folder "
                        "that holds its config.json and model.safetensors")
    try:
        return Path(snapshot_download(f"openai-community/{name_or_folder}",
                                      allow_patterns=["config.json", "model.safetensors", "tokenizer.json"]))
    except Exception as error:  # no network, no such name, no space: the cure is the same
        raise UserError(f"{name_or_folder} could not be fetched ({type(error).__name__}): check the network, or download "
                        f"config.json and model.safetensors from huggingface.co/openai-community/{name_or_folder} by hand")


def read_config(folder):
    """config.json -> {block_size, vocab_size, n_layer, n_head, n_embd, bias}, checked to be a GPT-2 as model.py has it."""
    try:
        c = json.loads((folder / "config.json").read_text())
        if c.get("model_type") != "gpt2":
            raise UserError(f"{folder} holds a model of type {c.get('model_type')!r}: this project reads the GPT-2 family")
        if c.get("n_inner") == 4 * c["n_embd"]:
            c["n_inner"] = None  # the default, spelled out
        fixed = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True,
                 "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        for key, value in fixed.items():
            if c.get(key, value) != value:
                raise UserError(f"{folder}/config.json has {key} = {c[key]!r}, but GPT-2 as written here has {value!r}")
        return {"block_size": c["n_positions"], "vocab_size": c["vocab_size"], "n_layer": c["n_layer"],
                "n_head": c["n_head"], "n_embd": c["n_embd"], "bias": c.get("bias", True)}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}/config.json is damaged ({error!r}): write or download the folder again")


def open_weights(folder):
    """The folder's safetensors -> a function from our parameter name to its tensor, read on demand."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # large models come in several files
        files = set(json.loads(index.read_text())["weight_map"].values())
    elif (folder / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif (folder / "pytorch_model.bin").is_file():
        raise UserError(f"{folder} has only pytorch_model.bin, a pickle that could run any code: convert it with transformers: "
                        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)")
    else:
        raise UserError(f"{folder} has a config.json but no model.safetensors")
    where = {}
    try:
        for file in sorted(files):
            with safe_open(folder / file, framework="pt") as opened:
                where |= {key.removeprefix("transformer."): (file, key) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/{file} is damaged ({error}): write or download it again")

    def read(name):
        if name not in where:
            raise UserError(f"{folder}: model.safetensors lacks {name}, so it is not a whole GPT-2 checkpoint")
        file, key = where[name]
        # opened anew each time: what has been read of an open file stays in memory, at the end the whole file
        with safe_open(folder / file, framework="pt") as opened:
            return opened.get_tensor(key)

    return read
