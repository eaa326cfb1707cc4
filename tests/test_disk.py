"""What a disk, a signal or another process does to a run: a sentence, and nothing is lost (tests/campaign.py tries it in
earnest)."""
import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dpo
import lora
import pretrain
import reward
import sft
import trainer
from common import disk, runs
from common.errors import UserError
from common.flags import TrainConfig, check
from data.tokenizer import get_tokenizer
from evals import weights
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
TOK = get_tokenizer("tiny")
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
RUN = trainer.Run(torch.device("cpu"), torch.float32)
SMALL = dict(steps=4, batch_size=4, save_every=2, eval_every=0, warmup=0, device="cpu", dtype="float32")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint that nobody has trained, and rows to train it on."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=64, vocab_size=TOK.vocab_size, n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder)
    TOK.save(folder)
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(start, out, script=sft, **settings):
    settings = SMALL | dict(init=str(start), data=str(start / "pairs.jsonl"), out=str(out)) | settings
    script.main(check(script.Config(**settings)))


# ---- files whole, for good, and for everybody ------------------------------------------------------------------------

def test_all_files_of_a_checkpoint_have_the_mode_of_any_file(start, tmp_path):
    (tmp_path / "any").write_text("")
    train(start, tmp_path / "x")
    assert "model.safetensors" in contents(tmp_path / "x")
    assert {path.stat().st_mode for path in (tmp_path / "x").iterdir()} == {(tmp_path / "any").stat().st_mode}


@linux
def test_bytes_are_on_the_disk_before_their_name_is_and_the_name_before_anybody_goes_on(tmp_path, monkeypatch):
    did, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: did.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda old, new: (did.append(f"-> {new}"), replace(old, new)))
    disk.write_json(tmp_path / "a.json", 1)
    temporary = str(tmp_path / f".a.json.{os.getpid()}.tmp")
    assert did == [temporary, f"-> {tmp_path / 'a.json'}", str(tmp_path)]
    did.clear()
    with disk.together(tmp_path / "x", ()) as folder:
        disk.write_json(folder / "b.json", 1)
        with disk.together(folder, ()) as within:
            (within / "c").write_text("c")
    saving, saved = str(folder), f"-> {tmp_path / 'x' / disk.SAVED}"
    before, after = did[:did.index(saved)], did[did.index(saved) + 1:]
    assert {f"{saving}/b.json", f"{saving}/c", saving} <= set(before) and len(set(before)) == len(before)
    assert after[0] == after[-1] == str(tmp_path / "x") and f"-> {tmp_path / 'x' / 'c'}" in after


def test_temporary_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {f".log.jsonl.{ended.pid}.tmp": False, f".a.b.json.{ended.pid}.tmp": False, f".x.{os.getpid()}.tmp": True,
             ".x.1.tmp": True, ".mine.tmp": True, f"x.{ended.pid}.tmp": True, f".x.{10**30}.tmp": True}
    for name in names:
        (tmp_path / name).write_text("")
    disk.claim(tmp_path)
    assert set(contents(tmp_path)) == {name for name, stays in names.items() if stays}


def test_windows_asks_no_process_whether_it_lives(tmp_path, monkeypatch):
    for name, age in {".a.1234567.tmp": 0, ".b.1234567.tmp": 2 * disk.DAY}.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    monkeypatch.setattr(disk, "os", SimpleNamespace(name="nt"))  # without kill
    disk.sweep(tmp_path)
    assert set(contents(tmp_path)) == {".a.1234567.tmp"}


def test_a_tokenizer_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    TOK.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("of another tokenizer")
    before, write = contents(tmp_path), disk.write_json

    def full(path, content, **options):
        if path.name == "tokenizer_config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content, **options)

    monkeypatch.setattr("data.tokenizer.write_json", full)
    with pytest.raises(UserError, match="could not be written .No space"):
        get_tokenizer("tiny", "alpaca").save(tmp_path)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    get_tokenizer("tiny", "alpaca").save(tmp_path)
    assert get_tokenizer(str(tmp_path)).template_name == "alpaca" and "chat_template.jinja" not in contents(tmp_path)


# ---- a place for --out -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("out, words", [
    ("file", "File exists"), ("file/x", "Not a directory"), ("/dev/null", "File exists"), ("/proc/x", "No such file"),
    ("x" * 300, "File name too long"), ("ä" * 200, "File name too long"), ("", "--out is empty"), (" ", "--out is empty")])
def test_a_place_where_nothing_can_be_written_is_found_before_any_work(tmp_path, monkeypatch, out, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    monkeypatch.setattr(sft, "load_init", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=words) as error:
        sft.main(check(sft.Config(out=out, device="cpu")))
    assert "--out" in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "write_bytes"])
def test_so_is_a_place_that_only_refuses(tmp_path, monkeypatch, call, number):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(UserError, match=f"{os.strerror(number)}.*choose another --out"):
        trainer.start(sft.Config(out=str(tmp_path / "x"), device="cpu"))


def test_other_flags_may_be_longer_than_names_of_files(tmp_path):
    trainer.start(sft.Config(out=str(tmp_path / "x"), data="x" * 300, device="cpu"))


# ---- two runs in one place -------------------------------------------------------------------------------------------

HOLD = "import sys; from common import disk; disk.claim(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def holding(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return process, process.stdout.readline().strip()


def test_a_second_run_in_one_folder_is_refused_until_the_first_has_ended_however_it_does(tmp_path):
    process, said = holding(tmp_path / "x")
    assert said == "held"
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for name in ("x", "link"):
        with pytest.raises(UserError, match="another process is writing to .*another --out"):
            trainer.start(sft.Config(out=str(tmp_path / name), device="cpu"))
    trainer.start(sft.Config(out=str(tmp_path / "y"), device="cpu"))
    process.kill()
    process.wait()
    for _ in range(2):  # a process does not wait for itself
        trainer.start(sft.Config(out=str(tmp_path / "x"), device="cpu"))
    process, said = holding(tmp_path / "x")
    assert not said and "another process" in process.communicate()[1]
    disk.release(tmp_path / "x")
    process, said = holding(tmp_path / "x")
    assert said == "held"
    process.communicate()


def test_a_system_without_locks_says_so_and_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk, "fcntl", None)
    trainer.start(sft.Config(out=str(tmp_path / "x"), device="cpu"))
    assert "cannot lock" in capsys.readouterr().out
    monkeypatch.setattr(disk, "fcntl", SimpleNamespace(LOCK_EX=1, LOCK_NB=2, flock=lambda *_: os.close(-1)))  # an OSError
    trainer.start(sft.Config(out=str(tmp_path / "y"), device="cpu"))
    assert "cannot lock" in capsys.readouterr().out


def test_windows_has_no_fcntl_and_no_sighup():
    code = ("import sys, signal; sys.modules['fcntl'] = None; del signal.SIGHUP; import trainer; from common import disk\n"
            "with trainer.signals(print, 'SIGTERM', 'SIGHUP'): print(disk.fcntl, signal.getsignal(signal.SIGTERM) is print)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["None", "True"], done.stderr


# ---- nothing is overwritten silently ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """out/NAME: what scripts have finished; half: a run that was stopped."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for script in (sft, dpo, reward):
            patch.setattr(script, "report", lambda *_: None)
        train(start, folder / "sft")
        train(start, folder / "reward", reward)
        train(start, folder / "adapter", lora_r=2)
        train(start, folder / "reward-adapter", reward, lora_r=2)
        begin = trainer.begin_step
        patch.setattr(trainer, "begin_step", lambda step, *rest: 1 / (4 - step) and begin(step, *rest))
        with pytest.raises(ZeroDivisionError):
            train(start, folder / "half", steps=5)
    return folder


@pytest.mark.parametrize("name, script, words", [
    ("sft", sft, "a model .sft.py, 4 steps, 20"), ("sft", dpo, "a model .sft.py, 4 steps, 20"),
    ("adapter", sft, "an adapter .sft.py, 4 steps, 20"), ("reward", reward, "a reward model .reward.py, 4 steps, 20"),
    ("reward-adapter", reward, "a reward model .reward.py, 4 steps, 20"),
    ("half", sft, "an unfinished run .sft.py, step 4 of 5, 20"), ("half", dpo, "an unfinished run .sft.py, step 4 of 5, 20")])
@pytest.mark.parametrize("record", [True, False], ids=["", "of older versions"])
def test_what_is_there_is_replaced_only_on_demand(start, finished, tmp_path, monkeypatch, name, script, words, record):
    monkeypatch.setattr(script, "report", lambda *_: None)
    out = tmp_path / "out"
    shutil.copytree(finished / name, out)
    if not record:
        (out / "run.json").unlink()
        words = words.partition(" .")[0] + " .20"
    before = contents(out)
    with pytest.raises(UserError, match=words) as error:
        train(start, out, script)
    assert all(flag in str(error.value) for flag in ("--overwrite", "--resume", "--out")) and "\n" not in str(error.value)
    assert contents(out) == before
    train(start, out, script, overwrite=True, steps=1)
    assert json.loads(contents(out)["run.json"]) | {"command": ""} == {"script": f"{script.__name__}.py", "command": "",
                                                                     "step": 1, "steps": 1}
    assert trainer.is_finished(out) and contents(out)["log.jsonl"].count(b"\n") == 1


@pytest.mark.parametrize("name, script", [("sft", reward), ("adapter", reward), ("half", reward), ("reward", sft),
                                          ("reward-adapter", dpo), ("reward", pretrain)])
@pytest.mark.parametrize("record", [True, False], ids=["", "of older versions"])
def test_another_kind_of_checkpoint_is_replaced_by_no_flag(start, finished, tmp_path, name, script, record):
    out = tmp_path / "out"
    shutil.copytree(finished / name, out)
    if not record:
        (out / "run.json").write_text("[]")
    before = contents(out)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="choose another --out, or remove"):
            script.main(script.Config(out=str(out), init=str(start), overwrite=overwrite, device="cpu"))
    assert contents(out) == before


def test_a_merge_asks_too_and_a_merged_model_is_of_no_run(start, finished, tmp_path):
    train(start, tmp_path / "merged", steps=1)
    config = lora.Config(adapter=str(finished / "adapter"), out=str(tmp_path / "merged"))
    with pytest.raises(UserError, match="a model .sft.py, 1 steps.*--overwrite"):
        weights.merge(config)
    config.overwrite = True
    weights.merge(config)
    assert "run.json" not in contents(tmp_path / "merged") and "a model (2" in runs.found(tmp_path / "merged")[1]
    with pytest.raises(UserError, match="would overwrite what it starts from"):
        weights.merge(lora.Config(adapter=str(finished / "adapter"), out=str(finished / "adapter"), overwrite=True))


def test_a_stopped_run_goes_on_and_a_finished_one_does_not(start, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "report", lambda *_: None)
    shutil.copytree(finished / "half", tmp_path / "out")
    train(start, tmp_path / "out", steps=5, resume=True)
    with pytest.raises(UserError, match="holds no unfinished run"):
        train(start, tmp_path / "out", steps=5, resume=True)
    with pytest.raises(UserError, match="leave one out"):
        train(start, tmp_path / "out", resume=True, overwrite=True)


def test_an_earlier_stage_that_is_missing_is_made_and_free_for_others_again(start, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "report", lambda *_: None)
    out = str(tmp_path / "x")
    trainer.ensure(out, sft, TrainConfig(device="cpu"), RUN, init=str(start), data=str(start / "pairs.jsonl"), steps=1)
    process, said = holding(out)
    assert said == "held"
    process.communicate()


# ---- the log ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1', b"{", b"\xff\xfe", b"3\n[]\n{}\n", b""])
def test_half_a_last_line_of_the_log_is_dropped(start, finished, tmp_path, monkeypatch, torn):
    monkeypatch.setattr(sft, "report", lambda *_: None)
    shutil.copytree(finished / "half", tmp_path / "out")
    log = tmp_path / "out" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]) + torn)
    train(start, tmp_path / "out", steps=5, resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert log.read_bytes().splitlines(keepends=True)[:4] == lines[:4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("saved, words", [(None, "No space left.*free some space"), (7, "checkpoint of step 7 is kept")])
def test_a_full_disk_ends_a_run_with_a_sentence_that_says_what_is_kept(tmp_path, saved, words):
    run = trainer.Run(torch.device("cpu"), torch.float32, saved=saved)
    log = trainer.Log(TrainConfig(out=str(tmp_path)), run, 0, 10)
    log.path = Path("/dev/full")
    with pytest.raises(UserError, match=words):
        for step in log.steps():
            log.write(step, loss=1.0)


# ---- signals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_loop_after_its_step_and_then_means_what_it_did(tmp_path, number):
    before = signal.getsignal(number)
    log, done = trainer.Log(TrainConfig(out=str(tmp_path)), RUN, 0, 10), []
    for step in log.steps():
        if step == 3:
            os.kill(os.getpid(), number)
        done.append(step)
    assert done == [0, 1, 2, 3] and log.next == 4 and log.stopped
    assert signal.getsignal(number) == before
    with pytest.raises(UserError, match="stopped before step 4 of 10.*--resume"):
        trainer.finish(TrainConfig(out=str(tmp_path)), RUN, log, lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        log = trainer.Log(TrainConfig(out=str(tmp_path)), RUN, 0, 5)
        for step in log.steps():
            os.kill(os.getpid(), signal.SIGHUP)
        assert log.next == 5 and not log.stopped
    finally:
        signal.signal(signal.SIGHUP, before)


@linux
def test_a_closed_terminal_saves(tmp_path):
    code = ("import time, torch, trainer\n"
            "from common.flags import TrainConfig\n"
            f"log = trainer.Log(TrainConfig(out={str(tmp_path)!r}), trainer.Run(torch.device('cpu'), torch.float32), 0, 400)\n"
            "for step in log.steps():\n"
            "    log.write(step, loss=1.0); log.print(f'step {step}'); time.sleep(0.05)\n"
            f"open({str(tmp_path / 'saved')!r}, 'w').write(str(log.next))\n")
    ours, theirs = os.openpty()
    process = subprocess.Popen(["setsid", "-c", "-w", sys.executable, "-c", code], cwd=ROOT, stdin=theirs, stdout=theirs,
                               stderr=theirs)
    os.close(theirs)
    read = b""
    while b"step 1" not in read:
        read += os.read(ours, 1 << 16)
    os.close(ours)  # the window is gone
    process.wait(timeout=60)
    assert 2 <= int((tmp_path / "saved").read_text()) < 400


SCRIPTS = [path for folder in (".", "common", "data", "evals", "island") for path in sorted((ROOT / folder).glob("*.py"))
           if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_ctrl_c_while_a_script_is_imported_ends_it_quietly(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    imported = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in ast.parse(text).body
                if isinstance(node, (ast.Import, ast.ImportFrom))]
    first = next(name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names)
    assert first in ("common.errors", "common.flags"), f"import common.errors before {first}"
    assert any(call in text for call in ("parse(", "end_politely()", "no_command("))  # from there Ctrl-C is Python's again
    fake = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    for name in ("torch", "tqdm", "numpy"):
        (tmp_path / f"{name}.py").write_text(fake)
    words = [str(path)] if path.parent == ROOT else ["-m", ".".join(path.relative_to(ROOT).with_suffix("").parts)]
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode in (0, -signal.SIGINT) and "Traceback" not in done.stderr  # 0: it needs none of the three


@pytest.mark.parametrize("script", ["sft.py", "chat.py", "learn.py"])
def test_what_is_not_installed_is_one_sentence(script, tmp_path):
    code = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (tmp_path / "torch.py").write_text(code)
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (1, "torch is not installed: pip install -r requirements.txt\n")


def test_whoever_imports_us_keeps_ctrl_c():
    code = "import signal, common.errors; assert signal.getsignal(signal.SIGINT) == signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
