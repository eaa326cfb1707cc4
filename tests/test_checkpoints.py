"""A folder holds exactly what was saved last: whatever was there before, and wherever a kill falls."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import trainer
from checkpoints import load
from common import disk, hub
from common.errors import UserError
from data.tokenizer import get_tokenizer
from lora import add_lora
from model import GPT, GPTConfig

TOK = get_tokenizer("tiny")
IDS = torch.tensor([[3, 47, 9, 49, 1, 30, 2, 47]])


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"block_size": 16, "vocab_size": 1029, "n_layer": 2, "n_head": 2, "n_embd": 8} | settings))


def adapted(seed=0, **settings):
    model = tiny(**settings)
    torch.manual_seed(seed)
    add_lora(model, 2, 4)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    return model


def same_model(folder, model):
    return torch.equal(load(folder, merge=False).eval()(IDS), model.eval()(IDS))


@pytest.fixture
def base(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save(model, folder, base, tok=TOK, extra=None):
    checkpoints.save_model(SimpleNamespace(out=str(folder), init=str(base)), model, tok, extra)


# ---- what was there before -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first, second", [(adapted, tiny), (tiny, adapted)], ids=["adapter, model", "model, adapter"])
@pytest.mark.parametrize("how", ["with its tokenizer", "alone"])
def test_a_model_takes_the_place_of_whatever_model_was_there(base, tmp_path, first, second, how):
    folder, head = tmp_path / "x", {"score.weight": torch.ones(1, 8), "score.bias": torch.ones(1)}
    save(first(1), folder, base, extra=head)
    (folder / "notes.json").write_text("mine")
    (folder / trainer.STATE).write_bytes(b"of the first run")
    assert checkpoints.is_reward_model(folder)
    new = second(2)
    if how == "alone":  # no run that saves its state: the one that is there can be of another model only
        new.save_pretrained(folder) if second is tiny else checkpoints.save_adapter(new, folder, base)
        assert not (folder / trainer.STATE).exists()
    else:
        save(new, folder, base)
        assert (folder / trainer.STATE).exists()  # save_state has just written it
    assert same_model(folder, new) and not checkpoints.is_reward_model(folder)
    kinds = {"config.json", "model.safetensors"}, {checkpoints.CONFIG, checkpoints.WEIGHTS}
    assert {path.name for path in folder.iterdir()} & (kinds[0] | kinds[1]) == kinds[second is adapted]
    assert (folder / "notes.json").read_text() == "mine" and not list(folder.glob(".*"))


def test_files_of_others_that_would_win_or_mislead_go(base, tmp_path):
    folder = tmp_path / "x"
    tiny(1, n_layer=1).save_pretrained(folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"weight_map": dict.fromkeys(load_file(folder / shard), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("pytorch_model.bin", "chat_template.jinja", "vocab.json", "my-model.safetensors", "README.md"):
        (folder / name).write_text("{}")
    assert load(folder).config.n_layer == 1
    new = tiny(2)
    save(new, folder, base)
    assert same_model(folder, new) and {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "my-model.safetensors", "README.md"}


def test_of_one_file_and_shards_the_one_file_is_read_as_transformers_does(tmp_path):
    model = tiny(1)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert same_model(tmp_path, model)


# ---- a kill ----------------------------------------------------------------------------------------------------------

class Killed(BaseException):
    pass


left = [0]  # touches of the disk until the kill; 0: none is to come


TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")


def hook(event, args):
    if left[0] and event in TOUCHES:
        left[0] -= left[0] > 1
        if left[0] == 1:  # and it stays so: who is dead does not tidy up
            raise Killed


sys.addaudithook(hook)


def killed_at(event, action):
    """Runs action, which from its event-th touch of the disk on can do nothing any more -> was it killed?"""
    left[0] = event + 1
    try:
        action()
        return False
    except Killed:
        return True
    finally:
        left[0] = 0


@pytest.mark.parametrize("first, second", [
    (adapted, tiny), (tiny, adapted), (tiny, lambda seed: tiny(seed, n_layer=1))], ids=["to model", "to adapter", "smaller"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_model_whole(base, tmp_path, first, second):
    old, new, seen = first(1), second(2), []
    tok = lambda name: SimpleNamespace(save=lambda folder: (folder / "tokenizer.json").write_text(name))
    for event in range(1, 200):
        folder = tmp_path / str(event)
        save(old, folder, base, tok("old"))
        killed = killed_at(event, lambda: save(new, folder, base, tok("new")))
        model = "old" if same_model(folder, old) else "new" if same_model(folder, new) else "a mixture"
        assert model == (folder / "tokenizer.json").read_text(), f"killed at {event}"
        seen.append(model)
        if not killed:
            break
        save(new, folder, base, tok("new"))  # what the kill has left is no obstacle, and goes
        assert same_model(folder, new) and not list(folder.glob(".*"))
    assert not killed and event > 15 and {"old", "new"} == set(seen)


@pytest.mark.parametrize("read, found", [
    (load, lambda model: model.config.n_layer == 1), (get_tokenizer, lambda tok: tok.template_name == "alpaca"),
    (checkpoints.is_adapter, lambda it_is: not it_is), (trainer.is_finished, bool),
    (checkpoints.is_reward_model, lambda it_is: not it_is)])
def test_whoever_reads_a_folder_first_ends_what_a_kill_has_left(base, tmp_path, monkeypatch, read, found):
    save(adapted(1), tmp_path / "x", base, extra={"score.weight": torch.ones(1, 8), "score.bias": torch.ones(1)})
    settle = disk.settle  # as if killed when the new files were whole
    monkeypatch.setattr(disk, "settle", lambda folder: settle(folder) if folder.name == disk.SAVING else None)
    save(tiny(2, n_layer=1), tmp_path / "x", base, get_tokenizer("tiny", "alpaca"))
    monkeypatch.undo()
    assert (tmp_path / "x" / disk.SAVED).is_dir()
    assert found(read(str(tmp_path / "x"))) and not list((tmp_path / "x").glob(".*"))


def test_a_full_disk_leaves_the_old_model(base, tmp_path, monkeypatch):
    old = adapted(1)
    save(old, tmp_path / "x", base)
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}

    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save(tiny(2), tmp_path / "x", base)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


# ---- config.json and the weights -------------------------------------------------------------------------------------

def change(folder, settings={}, tensors={}):
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    save_file(load_file(weights) | tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("settings, tensors, words", [
    ({"n_layer": 1}, {}, "transformer.h.1.*no place"), ({"n_layer": 0}, {}, "transformer.h.0.*no place"),
    ({"bias": False}, {}, r"ln_1.bias|c_attn.bias.*no place"),
    ({}, {"transformer.h.0.attn.q_norm.weight": torch.ones(4)}, "q_norm.*no place"),
])
def test_weights_that_config_has_no_place_for_are_refused(tmp_path, settings, tensors, words):
    model = tiny()
    for name, p in model.named_parameters():
        p.data += 0.01 * name.endswith("bias")
    model.save_pretrained(tmp_path)
    change(tmp_path, settings, tensors)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("trunk", [False, True], ids=["whole", "as the public gpt2 folders are"])
def test_buffers_and_other_heads_are_fine(tmp_path, trunk):
    model = tiny()
    model.save_pretrained(tmp_path)
    if trunk:
        tensors = {name.partition(".")[2]: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
        save_file(tensors, tmp_path / "model.safetensors")
    block = "h.0." if trunk else "transformer.h.0."
    change(tmp_path, tensors={f"{block}attn.bias": torch.ones(1, 1, 16, 16),
                              f"{block}attn.masked_bias": torch.tensor(-1e4), f"{block}attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(1029, 8),
                              "score.weight": torch.ones(1, 8), "v_head.summary.weight": torch.ones(1, 8)})
    assert same_model(tmp_path, model)


def test_without_biases_the_zeros_in_the_file_are_fine(tmp_path):
    model = tiny(bias=False)
    model.save_pretrained(tmp_path)
    assert same_model(tmp_path, model)
