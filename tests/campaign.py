"""What a run meets in earnest, tried case by case: kills, full disks, strange places for --out. No part of the tests.

    python -m tests.campaign                     every campaign, and their table in docs/robust.md
    python -m tests.campaign kills disk_full     only these; the rows of the others stay

A campaign is a function that takes an empty folder and yields (case, outcome, what it said): "fine" (it did what was asked),
"sentence" (it stopped with status 1 and said why, and nothing was lost), or what should never be: "traceback", "hang",
"silent" (it stopped and said nothing), "lost" (a file that was there is not what it was), "left" (half a file or a
temporary one), "other" (a resumed run is another run).
"""
import argparse
import ctypes
import datetime
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests import crafted

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "robust.md"
OUTCOMES = ("fine", "sentence", "traceback", "hang", "silent", "lost", "left", "other")
LIMIT = 600  # seconds until a command hangs
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}

# ---- commands --------------------------------------------------------------------------------------------------------


def start(*words, cwd=ROOT, **options):
    """python with these words, from `cwd` -> the process; what it prints comes as text."""
    words = [str(ROOT / word) if str(word).endswith(".py") else str(word) for word in words]
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=ENV | {"PYTHONPATH": str(ROOT)}, text=True,
                            errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **options)


def outcome(process, limit=LIMIT):
    """Waits for a process -> what became of it, and what it said. A sentence is one line behind whatever bars show."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        return "hang", "".join(process.communicate())
    if "Traceback" in err or "Exception ignored" in err:
        return "traceback", err
    if process.returncode == 0:
        return "fine", out + err
    last = err.rstrip().splitlines()[-1:] or [""]
    return ("sentence" if process.returncode == 1 and len(last[0]) > 20 else "silent"), last[0]


def run(*words, **options):
    return outcome(start(*words, **options))


def contents(folder):
    """{path below the folder: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def strays(folder):
    """Files that a process has left and nobody will use."""
    return [name for name in contents(folder) if name.endswith(".tmp") or ".saving/" in name or ".saved/" in name]


SMALL = ["--steps", 24, "--batch-size", 4, "--save-every", 4, "--device", "cpu", "--dtype", "float32"]


def stages(folder):
    """Files of a few rows -> {stage: its command without --out}; folder/base, folder/sft and folder/reward are made."""
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"question {i}?", "chosen": f"yes, {i}", "rejected": "no"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{i} hens sat in a tree. " * 30}) for i in range(40)))
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"question {i}?"}) for i in range(40)))
    pairs = ["--data", folder / "pairs.jsonl", "--init", folder / "sft", *SMALL]
    talks = ["sft.py", "--data", folder / "pairs.jsonl", "--init", folder / "base", "--mix", 0, *SMALL]
    made = {"pretrain": ["pretrain.py", "--data", folder / "text.jsonl", "--n-layer", 1, "--n-embd", 32, "--block-size",
                         64, *SMALL],
            "sft": talks, "sft-lora": [*talks, "--lora-r", 4], "reward": ["reward.py", *pairs], "dpo": ["dpo.py", *pairs],
            "ppo": ["ppo.py", "--data", folder / "prompts.jsonl", "--init", folder / "sft", "--reward",
                    folder / "reward", "--max-new-tokens", 4, *SMALL]}
    for name, stage in {"base": "pretrain", "sft": "sft", "reward": "reward"}.items():
        what, said = run(*made[stage], "--out", folder / name)
        assert what == "fine", said
    return made


def interrupted(command, out):
    """Begins a run and ends it politely after some steps -> the bytes that are in --out then."""
    process, log = start(*command, "--out", out), Path(out) / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    outcome(process)
    return contents(out)


def uninterrupted(command, out):
    """-> the weights that a whole run ends with, and its seconds."""
    begun = time.time()
    what, said = run(*command, "--out", out)
    assert what == "fine", said
    made = weights(out)
    shutil.rmtree(out)
    return made, time.time() - begun


def weights(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


# ---- kills and signals -----------------------------------------------------------------------------------------------

def kills(folder, cases=36):
    """kill -9 at a random moment of each stage, from its imports to its last word, then the same command again, with
    --resume where a run is to be finished: it has to end as a run that nobody has killed."""
    yield from stops(folder, [signal.SIGKILL], cases)


def signals(folder, cases=36):
    """The same with Ctrl-C, SIGTERM and SIGHUP: the first run says no more than a sentence, and saves what it can."""
    yield from stops(folder, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], cases)


def stops(folder, numbers, cases, seed=0):
    rng, made = random.Random(seed), stages(folder / "stages")
    whole = {stage: uninterrupted(command, folder / "whole") for stage, command in made.items()}
    for case in range(cases):
        stage, number = list(made)[case % len(made)], numbers[case // len(made) % len(numbers)]
        out, after = folder / "out", rng.uniform(0.1, whole[stage][1])
        process = start(*made[stage], "--out", out)
        time.sleep(after)
        process.send_signal(number)
        said = outcome(process)[1]
        name = f"{stage}, {number.name} after {after:.2f} s"
        if "Traceback" in said:
            yield name, "traceback", said
            continue
        begun = any((out / path).is_file() for path in ("state.pt", ".saved/state.pt"))
        if not begun and weights(out) == whole[stage][0]:
            what = "fine"  # it was done
        else:
            what, said = run(*made[stage], "--out", out, *["--resume"] * begun)
            if what == "fine":
                what = "left" if strays(out) else "fine" if weights(out) == whole[stage][0] else "other"
        yield name + " --resume" * begun, what, said
        shutil.rmtree(out, ignore_errors=True)


# ---- a full disk -----------------------------------------------------------------------------------------------------

def mounted(disk, megabytes=2):
    """Mounts a disk of this size -> may this user do that?"""
    disk.mkdir(parents=True, exist_ok=True)
    return not ctypes.CDLL(None).mount(b"tmpfs", bytes(disk), b"tmpfs", 0, f"size={megabytes}m".encode())


def fill(disk, room):
    """Fills the disk up to `room` bytes -> the file that does."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * max(0, shutil.disk_usage(disk).free - room))
    return ballast


def disk_full(folder):
    """A disk of 2 MB with so many bytes left, for each stage from its start and resumed: one sentence, the old files as
    they were, and with room again it ends as if nothing had been. The data tools too."""
    disk, made = folder / "disk", stages(folder / "stages")
    if not mounted(disk):
        print("no disk of 2 MB can be mounted here (that takes root), so only file_limit is tried")
        return
    try:
        for stage, command in made.items():
            whole = uninterrupted(command, folder / "whole")[0]
            for room in (0, 70_000, 400_000):
                yield from squeezed(f"{stage}, {room} bytes left", command, whole, folder, disk, room=room)
        yield from full_tools(made, folder, disk)
    finally:
        ctypes.CDLL(None).umount2(bytes(disk), 2)


def file_limit(folder):
    """The same where each file may have so many bytes (ulimit -f) and a write beyond fails: another error, the same
    sentence."""
    made = stages(folder / "stages")
    for stage, command in made.items():
        whole = uninterrupted(command, folder / "whole")[0]
        for limit in (2_000, 150_000):
            yield from squeezed(f"{stage}, files up to {limit} bytes", command, whole, folder, folder, limit=limit)


def limited(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def squeezed(name, command, whole, folder, disk, room=None, limit=None):
    """One run from its start and one resumed, on a disk with so much room or with files up to a limit."""
    options = {} if limit is None else {"preexec_fn": limited(limit)}
    for resume in (False, True):
        out = disk / "out"
        before = interrupted(command, folder / "begun") if resume else {}
        if resume:
            shutil.copytree(folder / "begun", out)
        ballast = None if room is None else fill(disk, room)
        what, said = run(*command, "--out", out, *["--resume"] * resume, **options)
        kept = {path: content for path, content in before.items() if path != "log.jsonl"}
        if what == "sentence":
            now = contents(out) if out.exists() else {}
            what = "left" if strays(disk) else what if all(now.get(path) == kept[path] for path in kept) else "lost"
        yield name + " --resume" * resume, what, said
        if ballast:
            ballast.unlink()
        if resume and what == "sentence":
            shutil.copytree(out, folder / "again")  # where there is room
            what, said = run(*command, "--out", folder / "again", "--resume")
            yield name + ", then with room", what if weights(folder / "again") == whole else "other", said
        for path in (out, folder / "begun", folder / "again"):
            shutil.rmtree(path, ignore_errors=True)


def tools(made, folder, out):
    """{name: command} of whatever else writes; each into `out` or a file below it."""
    dump = folder / "dump"
    if not dump.exists():
        for what, said in (run("-m", "island", "--dump", dump), run(*made["sft-lora"], "--out", folder / "adapter")):
            assert what == "fine", said
    (folder / "cases.jsonl").write_text("\n".join(json.dumps({"text": f"{i} hens. " * 40}) for i in range(90)))
    sft, questions = folder / "stages" / "sft", folder / "stages" / "prompts.jsonl"
    return {"island --dump": ["-m", "island", "--dump", out], "island --write": ["-m", "island", "--write", out],
            "data.identity": ["-m", "data.identity", "--out", out / "id.jsonl"],
            "data.eli5": ["-m", "data.eli5", "--source", dump, "--out", out],
            "data.simple_wikipedia": ["-m", "data.simple_wikipedia", "--source", dump / "articles.jsonl", "--out", out],
            "data.clean": ["-m", "data.clean", folder / "cases.jsonl", "--out", out / "clean.jsonl", "--toxicity", "words"],
            "data.leakage": ["-m", "data.leakage", dump / "train.jsonl", dump / "test.jsonl", "--model", "tfidf", "--out",
                             out],
            "evals.unknowns": ["-m", "evals.unknowns", sft, "--data", folder / "stages" / "pairs.jsonl", "--out",
                               out / "idk.jsonl"],
            "evaluate": ["evaluate.py", sft, "--data", folder / "stages" / "pairs.jsonl", "--sample", 4, "--out", out],
            "lora": ["lora.py", "--adapter", folder / "adapter", "--out", out],
            "chat --file": ["chat.py", sft, "--file", questions, "--out", out / "answers.jsonl"]}


def full_tools(made, folder, disk):
    for name, command in tools(made, folder, disk / "out").items():
        for room in (0, 12_000):  # nothing, and not all
            ballast = fill(disk, room)
            what, said = run(*command)
            ballast.unlink()
            yield f"{name}, {room} bytes left", "left" if what == "sentence" and strays(disk) else what, said
            shutil.rmtree(disk / "out", ignore_errors=True)


# ---- places for --out ------------------------------------------------------------------------------------------------

def outs(folder):
    """--out that is a file, below a file, on a disk that is only read, in /proc, /dev/null, empty or too long a name: found
    before any work."""
    made, disk = stages(folder / "stages"), folder / "disk"
    (folder / "file").write_text("mine")
    places = {"a file": folder / "file", "below a file": folder / "file" / "x", "/dev/null": "/dev/null", "empty": "",
              "300 characters": folder / ("x" * 300), "in /proc": "/proc/x", "200 characters of two bytes": "ä" * 200}
    if mounted(disk):
        ctypes.CDLL(None).mount(b"tmpfs", bytes(disk), b"tmpfs", 32 | 1, None)  # again, only to be read
        places |= {"only read": disk, "below only read": disk / "x"}
    try:
        for name, place in places.items():
            for stage, command in {stage: [*command, "--out", place] for stage, command in made.items()}.items():
                yield from placed(f"{stage} --out {name}", command, folder)
            if name in ("a file", "below only read"):
                for tool, command in tools(made, folder, Path(place)).items():
                    yield from placed(f"{tool} --out {name}", command, folder)
    finally:
        ctypes.CDLL(None).umount2(bytes(disk), 2)


def placed(name, command, folder):
    """One command, started in an empty folder that has to stay so."""
    empty = folder / "here"
    empty.mkdir()
    begun = time.time()
    what, said = run(*command, cwd=empty)
    if contents(empty) or (folder / "file").read_text() != "mine":
        what = "lost"
    yield f"{name} ({time.time() - begun:.1f} s)", what, said
    shutil.rmtree(empty)


# ---- the table -------------------------------------------------------------------------------------------------------

CAMPAIGNS = {campaign.__name__: campaign for campaign in (kills, signals, disk_full, file_limit, outs, crafted.configs, crafted.bombs,
                                                          crafted.flags)}
HEAD = f"| campaign | what is tried | cases | {' | '.join(OUTCOMES)} | when |\n|---|---|{'---:|' * (len(OUTCOMES) + 1)}---|\n"


def table_row(name, counts):
    """A campaign's line of the table."""
    words = " ".join(CAMPAIGNS[name].__doc__.split())
    cells = [str(counts[what] or "") for what in OUTCOMES]
    return f"| {name} | {words} | {counts.total()} | {' | '.join(cells)} | {datetime.date.today()} |"


def write_page(rows):
    """docs/robust.md with these rows, {campaign: line}; those of other campaigns stay."""
    old = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    rows = {name: line for name in CAMPAIGNS for line in old if line.startswith(f"| {name} |")} | rows
    PAGE.write_text("# What a run has been through\n\nWritten by `python -m tests.campaign`, which says what the "
                    "outcomes mean: all from `traceback` on should be empty.\n\n" + HEAD
                    + "\n".join(rows[name] for name in CAMPAIGNS if name in rows) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser("python -m tests.campaign", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", metavar="campaign", help=", ".join(CAMPAIGNS) + "; none: all")
    names = parser.parse_args().campaigns or list(CAMPAIGNS)
    for name in names:
        counts = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for case, what, said in CAMPAIGNS[name](Path(folder)):
                counts[what] += 1
                print(f"{what:10}{name}: {case}", flush=True)
                if what != "fine":
                    print("          ", said[-1500:].strip(), flush=True)
        print(f"{name}: {dict(counts)}", flush=True)
        write_page({name: table_row(name, counts)})


if __name__ == "__main__":
    main()
