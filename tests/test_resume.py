"""--resume goes on with the run that was begun, or says in one sentence why not; a run never reads what it writes."""
import dataclasses
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import checkpoints
import dpo
import ppo
import pretrain
import reward
import sft
import trainer
from common.errors import UserError
from common.flags import TrainConfig, parse
from data.tokenizer import get_tokenizer
from lora import add_lora
from model import GPT, GPTConfig

TOK = get_tokenizer("tiny")


def new_run():
    return trainer.Run(torch.device("cpu"), torch.float32)


def save_base(folder):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=TOK.vocab_size, n_layer=1, n_head=1, n_embd=16))
    model.save_pretrained(folder)
    TOK.save(folder)
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---- a run never writes where it reads -------------------------------------------------------------------------------

SPELLINGS = {"the same": lambda x: str(x), "a slash": lambda x: f"{x}/.", "relative": os.path.relpath,
             "up and down": lambda x: f"{x}/../x", "a link": lambda x: str(x.with_name("link"))}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("script", [pretrain, sft, dpo, reward, ppo])
def test_the_start_is_never_overwritten(tmp_path, script, spelling):
    save_base(tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    before = contents(tmp_path / "x")
    with pytest.raises(UserError, match="--init .* reads .*--out"):
        script.main(script.Config(init=SPELLINGS[spelling](tmp_path / "x"), out=str(tmp_path / "x"), device="cpu"))
    assert contents(tmp_path / "x") == before


def test_nor_is_the_base_of_an_adapter_nor_a_reward_model(tmp_path):
    base = save_base(tmp_path / "x")
    add_lora(base, 2, 4)
    checkpoints.save_adapter(base, tmp_path / "adapter", "../x")
    with pytest.raises(UserError, match="--init .*adapter.* reads .*x"):
        sft.main(sft.Config(init=str(tmp_path / "adapter"), out=str(tmp_path / "x"), device="cpu"))
    for spec in (f"{tmp_path}/x", f"0.3*{tmp_path}/x+0.7*{tmp_path}/adapter"):
        with pytest.raises(UserError, match="--reward .* --out"):
            ppo.main(ppo.Config(reward=spec, out=str(tmp_path / "x"), device="cpu"))


def test_a_default_start_that_is_not_there_yet_is_no_place_to_write_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--init out/base reads .*--out"):
        sft.main(sft.Config(out="out/base", device="cpu"))
    assert not list(tmp_path.iterdir())
    assert trainer.start(sft.Config(out="out/sft", device="cpu")).device.type == "cpu"


# ---- the same run, or one sentence -----------------------------------------------------------------------------------

def linear(config):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = trainer.adamw(model, config)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def begin(config, steps=10, step=4, **state):
    run = new_run()
    config.resume = False
    model, optimizer = linear(config)
    assert trainer.load_state(config, run, steps, model, optimizer) == 0
    trainer.save_state(config, run, step, steps, model, optimizer)
    return model, optimizer


def go_on(config, steps=10):
    config.resume = True
    model, optimizer = linear(config)
    with torch.no_grad():
        model.weight += 1  # what was there before must not matter
    return trainer.load_state(config, new_run(), steps, model, optimizer), model, optimizer


@pytest.fixture
def config(tmp_path):
    (tmp_path / "my.jsonl").write_text('{"a": 1}')
    save_base(tmp_path / "base")
    return dpo.Config(out=str(tmp_path / "out"), data=str(tmp_path / "my.jsonl"), init=str(tmp_path / "base"), warmup=3)


@pytest.mark.parametrize("changes, words", [
    ({"batch_size": 16}, ["--batch-size 32 (now --batch-size 16)"]), ({"lr": 0.5}, ["--lr 0.0 (now --lr 0.5)"]),
    ({"beta1": 0.5, "beta": 0.1}, ["--beta1 0.9 (now --beta1 0.5)", "--beta 0.3 (now --beta 0.1)"]),
    ({"seed": 3}, ["--seed 0 (now --seed 3)"]), ({"data": ""}, ["my.jsonl (now --data '')"]),
    ({"nf4": True, "lora_r": 2}, ["--no-nf4 (now --nf4)", "--lora-r 0"]),
    ({"init": "gpt2"}, ["base (now --init gpt2)"]),
])
def test_other_flags_are_named_with_both_commands(config, changes, words):
    begin(config)
    with pytest.raises(UserError) as error:
        go_on(dataclasses.replace(config, **changes))
    sentence = str(error.value)
    assert all(part in sentence for part in words) and sentence.count("(now") == len(changes) and "\n" not in sentence
    finish = f"python dpo.py --data {config.data} --init {config.init} --warmup 3 --out {config.out} --resume"
    assert finish in sentence
    assert parse(dpo.Config, argv=finish.split()[2:]) == dataclasses.replace(config, resume=True)


def test_other_steps_and_another_script(config):
    begin(config)
    with pytest.raises(UserError, match="--steps 10 .now --steps 11"):
        go_on(config, 11)
    with pytest.raises(UserError, match="begun with dpo.py .now sft.py.: finish it with python dpo.py"):
        go_on(sft.Config(out=config.out))


def test_what_changes_no_result_may_change(config, tmp_path):
    begin(config)
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "my.jsonl").rename(tmp_path / "renamed.jsonl")
    (tmp_path / "base" / "README.md").write_text("of no weight")
    names = dict(out=str(tmp_path / "moved"), data=str(tmp_path / "renamed.jsonl"), init=f"{config.init}/../base")
    others = dict(device="cpu", dtype="float32", micro_tokens=7, save_every=1, eval_every=2, sample_every=3, steps=10,
                  checkpointing=True)
    assert go_on(dataclasses.replace(config, **names, **others))[0] == 4


@pytest.mark.parametrize("name", ["my.jsonl", "base/tokenizer_config.json", "base/model.safetensors"])
def test_another_content_of_a_file_is_another_run(config, tmp_path, name):
    begin(config)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    flag = "--data" if name == "my.jsonl" else "--init"
    with pytest.raises(UserError, match=f"{flag} .*which has changed since"):
        go_on(config)


def test_the_content_is_that_at_the_start_of_the_run(config, tmp_path):
    run = new_run()
    model, optimizer = linear(config)
    trainer.load_state(config, run, 10, model, optimizer)
    (tmp_path / "my.jsonl").write_text("edited while it ran")
    trainer.save_state(config, run, 4, 10, model, optimizer)
    with pytest.raises(UserError, match="has changed since"):
        go_on(config)


# ---- a damaged state -------------------------------------------------------------------------------------------------

def test_any_flipped_byte_is_the_same_run_or_one_sentence(config, tmp_path):
    model, optimizer = begin(config)
    path, rng, refused = tmp_path / "out" / trainer.STATE, random.Random(0), 0
    whole = path.read_bytes()
    for position in [*range(0, len(whole), 97), *(rng.randrange(len(whole)) for _ in range(200))]:
        flipped = bytearray(whole)
        flipped[position] ^= rng.choice([1 << rng.randrange(8), 255])
        path.write_bytes(flipped)
        try:
            step, found, again = go_on(config)
        except UserError as error:
            assert "damaged" in str(error) and "\n" not in str(error) and f"python dpo.py --data {config.data}" in error.code
            refused += 1
            continue
        states = [o.state_dict()["state"] for o in (optimizer, again)]
        assert step == 4 and all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
        assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert refused > 100


@pytest.mark.parametrize("harm, words", [
    (lambda state: state["model"].update(bias=torch.ones(1)), "other weights"),
    (lambda state: state["model"].pop("bias"), "other weights"),
    (lambda state: state["optimizers"][0]["state"][0].update(exp_avg=torch.ones(1)), "damaged"),
    (lambda state: state["optimizers"].clear(), "damaged"),
    (lambda state: state.update(step=11), "damaged"), (lambda state: state.update(step=-1), "damaged"),
    (lambda state: state.update(step=2.5), "damaged"), (lambda state: state.pop("settings"), "damaged"),
])
def test_a_state_of_another_shape_is_refused(config, tmp_path, harm, words):
    begin(config)
    path = tmp_path / "out" / trainer.STATE
    state = torch.load(path)
    harm(state)
    torch.save(state, path)
    with pytest.raises(UserError, match=words):
        go_on(config)


def test_a_full_disk_is_one_sentence_and_the_old_state_stays(config, tmp_path, monkeypatch):
    begin(config)
    before = contents(tmp_path / "out")

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598")  # torch's words

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="could not be written"):
        begin(config)
    assert contents(tmp_path / "out") == before


# ---- a stage that another one needs ----------------------------------------------------------------------------------

def test_an_earlier_stage_that_was_begun_with_other_flags_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base("out/base")
    needed = dict(steps=3, n_sft=40, eval_every=0, sample_every=0, save_every=1, mix=0.0)
    monkeypatch.setattr(sft, "report", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sft.main(sft.Config(out="out/x", batch_size=4, device="cpu", **needed))
    with pytest.raises(UserError) as error:
        trainer.ensure("out/x", sft, TrainConfig(seed=0, device="cpu"), new_run(), batch_size=5, **needed)
    sentence = str(error.value)
    assert "out/x" in sentence and "--batch-size 4 (now --batch-size 5)" in sentence
    finish, anew = ("python sft.py --steps 3 --batch-size 4", "python sft.py --steps 3 --batch-size 5")
    assert finish in sentence and anew in sentence and sentence.count("--resume") == 1
    command = sentence[sentence.index(finish):sentence.index(" --resume") + len(" --resume")]
    sft.main(parse(sft.Config, argv=command.split()[2:]))  # the advice can be followed
    assert trainer.is_finished("out/x")


# ---- weights that are none -------------------------------------------------------------------------------------------

def sft_run(tmp_path, **settings):
    if not (tmp_path / "base").exists():
        save_base(tmp_path / "base")
    small = dict(init=str(tmp_path / "base"), out=str(tmp_path / "x"), n_sft=40, batch_size=4, eval_every=0,
                 sample_every=0, mix=0.0, device="cpu", dtype="float32", warmup=0)
    sft.main(sft.Config(**small | settings))


@pytest.mark.parametrize("lr, clip", [(1e30, 1.0), (1e30, 0.0), (1e6, 1.0)])
@pytest.mark.parametrize("save_every", [0, 1])
def test_a_last_step_that_spoils_the_weights_is_not_saved(tmp_path, monkeypatch, lr, clip, save_every):
    monkeypatch.setattr(sft, "report", lambda *_: None)
    with pytest.raises(UserError, match="step 0: .*lower --lr") as error:
        sft_run(tmp_path, steps=1, lr=lr, clip=clip, save_every=save_every)
    assert "nothing was saved" in str(error.value) and "kept" not in str(error.value)
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"log.jsonl"}


def test_a_checkpoint_is_called_kept_where_this_run_has_saved_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "report", lambda *_: None)
    sft_run(tmp_path, steps=1, lr=1e-3)
    before = contents(tmp_path / "x")
    with pytest.raises(UserError, match="nothing was saved"):  # the checkpoint that is there is of another run
        sft_run(tmp_path, steps=2, lr=1e30, save_every=1, overwrite=True)
    assert contents(tmp_path / "x") | {"log.jsonl": b""} == before | {"log.jsonl": b""}
    rates = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate", lambda step, *rest: 1e30 if step == 3 else rates(step, *rest))
    with pytest.raises(UserError, match="step 3: .* checkpoint of step 2 .*kept"):
        sft_run(tmp_path, steps=5, lr=1e-3, save_every=2, overwrite=True)
    shutil.rmtree(tmp_path / "x")
    monkeypatch.setattr(trainer, "learning_rate", lambda step, *rest: 1e30 if step == 2 else rates(step, *rest))
    with pytest.raises(UserError, match="step 3: .*not finite.* checkpoint of step 2 .*kept"):
        sft_run(tmp_path, steps=5, lr=1e-3, save_every=2)
