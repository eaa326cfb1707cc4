"""Whatever a file of somebody else's says, or a flag: one sentence, before anything large is allocated. (tests/campaign.py
tries thousands of these.)"""
import dataclasses
import errno
import importlib
import json
import shutil
import sys
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import pretrain
from common import errors, flags, hub
from common.errors import UserError
from data.tokenizer import get_tokenizer
from tests.crafted import made

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    made(folder)
    return folder


@pytest.fixture
def folder(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "x")
    return tmp_path / "x"


def change(path, *keys, to=...):
    """Writes another value into a JSON file; none: takes the key away."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    path.write_text(json.dumps(content))


# ---- folders ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, key, value", [
    *[("gpt2", "n_layer", n) for n in (10 ** 6, 10 ** 9, 0, -1, "2", 2.0)], ("gpt2", "n_embd", 10 ** 9), ("gpt2", "n_embd", -64),
    *[("gpt2", "n_head", n) for n in (0, -4, 3, 4.0)], ("gpt2", "vocab_size", -1), ("gpt2", "n_positions", -1),
    ("gpt2", "model_type", []), ("llama", "model_type", {}), ("llama", "num_hidden_layers", 10 ** 9),
    ("llama", "head_dim", -1), ("llama", "intermediate_size", 10 ** 12)])
def test_an_impossible_config_is_a_sentence(folder, name, key, value):
    change(folder / name / "config.json", key, to=value)
    with pytest.raises(UserError, match="config.json|of type|of one model"):
        checkpoints.load(str(folder / name))


@pytest.mark.parametrize("keys, value", [
    (["model"], ...), (["added_tokens", 2, "id"], 10 ** 6), (["added_tokens", 2, "id"], -1), (["added_tokens", 2, "id"], "x"),
    (["added_tokens", 2, "id"], 5), (["model", "vocab", "a"], -1), (["model", "vocab", "a"], 1.5), (["model"], 5), (["model", "vocab"], [5]),
    (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], "("), (["added_tokens", 2, "content"], None)])
def test_an_impossible_tokenizer_is_a_sentence(folder, keys, value):
    change(folder / "gpt2" / "tokenizer.json", *keys, to=value)
    with pytest.raises(UserError, match="damaged|has the id|pip install tokenizers"):
        get_tokenizer(str(folder / "gpt2"))


def test_a_panic_of_the_library_is_a_sentence_and_prints_nothing(folder, capfd):
    pytest.importorskip("tokenizers")
    change(folder / "gpt2" / "tokenizer.json", "model", "continuing_subword_prefix", to="../x")
    with pytest.raises(UserError, match="damaged"):
        get_tokenizer(str(folder / "gpt2"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", [5, [10 ** 9], ["x", {}], None])
def test_impossible_settings_of_a_tokenizer_are_a_sentence(folder, value):
    change(folder / "gpt2" / "tokenizer_config.json", "nanoalign_new_ids", to=value)
    with pytest.raises(UserError, match="damaged|nanoalign_new_ids"):
        get_tokenizer(str(folder / "gpt2"))


@pytest.mark.parametrize("key, value", [("r", 10 ** 7), ("r", 0), ("lora_alpha", "8"), ("lora_alpha", -8), ("base_model_name_or_path", 5),
                                        ("trainable_token_indices", [10 ** 7]), ("trainable_token_indices", 5)])
def test_an_impossible_adapter_is_a_sentence(folder, key, value):
    change(folder / "adapter" / "adapter_config.json", key, to=value)
    with pytest.raises(UserError, match="adapter_"):
        checkpoints.load(str(folder / "adapter"))


def test_adapters_that_name_each_other_are_a_sentence(folder):
    shutil.copytree(folder / "adapter", folder / "other")
    for name, base in {"adapter": "other", "other": "adapter"}.items():
        change(folder / name / "adapter_config.json", "base_model_name_or_path", to=str(folder / base))
    with pytest.raises(UserError, match="name each other"):
        checkpoints.load(str(folder / "adapter"))


@pytest.mark.parametrize("name, file", [("gpt2", "model.safetensors"), ("adapter", "adapter_model.safetensors")])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found_when_they_are_read(folder, name, file, number):
    tensors = load_file(folder / name / file)
    next(iter(tensors.values())).view(-1)[3] = number
    save_file(tensors, folder / name / file)
    with pytest.raises(UserError, match="not finite"):
        checkpoints.load(str(folder / name))


@pytest.mark.parametrize("index", ['{"weight_map": []}', '{"weight_map": {"x": "../model.safetensors"}}', '{"weight_map": {"x": 5}}',
                                   "[", '{"weight_map": {"x": "/etc/passwd"}}', "5"])
def test_an_impossible_index_is_a_sentence(folder, index):
    (folder / "shards" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="index.json"):
        checkpoints.load(str(folder / "shards"))


def test_what_does_not_fit_into_memory_is_said_before_it_is_made(folder, monkeypatch):
    monkeypatch.setattr(hub, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match="need .* GB of memory and 1e-06 GB are free"):
        checkpoints.load(str(folder / "gpt2"))
    with pytest.raises(UserError, match="GB of memory"):
        pretrain.new_model(pretrain.Config(n_layer=1), 1029)


# ---- flags -----------------------------------------------------------------------------------------------------------

CONFIGS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("[!t]*/*.py")
                 if "\nclass Config" in path.read_text(encoding="utf-8"))
CONFIGS += sorted(path.stem for path in ROOT.glob("*.py") if "\nclass Config" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [name for name in CONFIGS if not name.startswith(("out.", "tests."))])
def test_every_number_on_the_command_line_has_bounds(module):
    Config = importlib.import_module(module).Config
    kinds = [typing.get_type_hints(cls, include_extras=True) for cls in Config.__mro__[:-1]]
    for field in dataclasses.fields(Config):
        if typing.get_type_hints(Config)[field.name] in (int, float):
            bounds = [b for hints in kinds for b in getattr(hints.get(field.name), "__metadata__", ())]
            assert bounds and all(b.high < 1e10 for b in bounds), f"{module}: {field.name} has no bounds on both sides"


def test_a_value_that_looks_like_a_flag_is_told_how_to_be_written(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(UserError, match="--flag=-value"):
        flags.parse(pretrain.Config, argv=["--out", "--data"])


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "choose another one"), (MemoryError(), "memory is full"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), "memory is full"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory is full"), (ValueError("a bug"), ""), (RuntimeError("a bug"), "")])
def test_what_no_code_can_prevent_is_a_sentence_and_bugs_are_not(error, words):
    assert words in errors.nothing_of_ours(error) and (words != "") == (errors.nothing_of_ours(error) != "")


def test_a_user_who_is_not_there_is_a_sentence():
    with pytest.raises(RuntimeError) as raised:
        Path("~nobody-of-that-name/x").expanduser()
    assert "begins with ~" in errors.nothing_of_ours(raised.value)
