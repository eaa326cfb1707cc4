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
LIMIT = 120  # seconds until a command hangs
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
    made = {"pretrain": ["pretrain.py", "--data", folder / "text.jsonl", "--n-layer", 1, "--n-embd", 64, "--block-size",
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


def weights(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


# ---- kills -----------------------------------------------------------------------------------------------------------

def kills(folder, cases=60, seed=0):
    """kill -9 at a random moment of each stage, from its imports to its end, then the same command again, with
    --resume where a state is there: it has to end as a run that nobody has killed."""
    rng, made = random.Random(seed), stages(folder / "stages")
    whole, seconds = {}, {}
    for stage, command in made.items():
        begun = time.time()
        run(*command, "--out", folder / "whole")
        whole[stage], seconds[stage] = weights(folder / "whole"), time.time() - begun
        shutil.rmtree(folder / "whole")
    for case in range(cases):
        stage = list(made)[case % len(made)]
        out, after = folder / "out", rng.uniform(0.3, seconds[stage])
        process = start(*made[stage], "--out", out)
        time.sleep(after)
        process.kill()
        process.communicate()
        resume = ["--resume"] if (out / "state.pt").is_file() or (out / ".saved" / "state.pt").is_file() else []
        what, said = run(*made[stage], "--out", out, *resume)
        if what == "fine":
            what = "left" if strays(out) else "fine" if weights(out) == whole[stage] else "other"
        yield f"{stage} after {after:.2f} s{' --resume' * bool(resume)}", what, said
        shutil.rmtree(out, ignore_errors=True)


# ---- a full disk -----------------------------------------------------------------------------------------------------

def small_disk(folder, megabytes=2):
    """Mounts one -> True, or False where this user may not."""
    folder.mkdir(parents=True, exist_ok=True)
    return not ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={megabytes}m".encode())


def fill(disk, room):
    """Fills the disk up to `room` bytes -> the file that does."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        file.write(b"x" * max(0, shutil.disk_usage(disk).free - room))
    return ballast


def disk_full(folder, rooms=(0, 20_000, 150_000, 400_000, 900_000)):
    """A disk of 2 MB with so many bytes left, for each stage from its start and resumed: one sentence, the old files as
    they were, and with room again it ends as if nothing had been. The data tools too."""
    disk = folder / "disk"
    if not small_disk(disk):
        print("no disk of 2 MB can be mounted here (that takes root): writes beyond a limit (ulimit -f) fail instead")
        return
    try:
        made = stages(folder / "stages")
        for stage, command in made.items():
            yield from full_stage(stage, command, folder, disk, rooms)
        yield from full_tools(folder, disk)
    finally:
        ctypes.CDLL(None).umount2(bytes(disk), 2)


def full_stage(stage, command, folder, disk, rooms):
    run(*command, "--out", folder / "whole")
    whole = weights(folder / "whole")
    shutil.rmtree(folder / "whole")
    for room in rooms:
        before, out = interrupted(command, folder / "out"), disk / "out"
        shutil.copytree(folder / "out", out)
        ballast = fill(disk, room)
        what, said = run(*command, "--out", out, "--resume")
        if what == "sentence":
            now = contents(out)
            kept = {name: content for name, content in before.items() if name != "log.jsonl"}
            what = "lost" if any(now.get(name) != kept[name] for name in kept) else "left" if strays(out) else what
        ballast.unlink()
        yield f"{stage} --resume, {room} bytes left", what, said
        if what == "sentence":
            shutil.copytree(out, folder / "again")  # on a disk with room
            what, said = run(*command, "--out", folder / "again", "--resume")
            yield f"{stage} with room again", what if weights(folder / "again") == whole else "other", said
        for path in (out, folder / "out", folder / "again"):
            shutil.rmtree(path, ignore_errors=True)


def full_tools(folder, disk):
    run("-m", "island", "--dump", folder / "dump")
    tools = {"island --dump": ["-m", "island", "--dump", disk / "dump"],
             "island --write": ["-m", "island", "--write", disk / "rows"],
             "data.identity": ["-m", "data.identity", "--out", disk / "id.jsonl"],
             "data.eli5": ["-m", "data.eli5", "--source", folder / "dump", "--out", disk / "eli5"],
             "data.clean": ["-m", "data.clean", folder / "dump" / "articles.jsonl", "--out", disk / "clean.jsonl"],
             "lora merge": ["lora.py", "--adapter", folder / "adapter", "--out", disk / "merged"],
             "chat --file": ["chat.py", folder / "stages" / "sft", "--file", folder / "stages" / "prompts.jsonl", "--out",
                             disk / "answers.jsonl"]}
    run(*stages_lora(folder), "--out", folder / "adapter")
    for name, command in tools.items():
        for room in (0, 12_000):
            ballast = fill(disk, room)
            what, said = run(*command)
            ballast.unlink()
            yield f"{name}, {room} bytes left", "left" if what == "sentence" and strays(disk) else what, said
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def stages_lora(folder):
    return ["sft.py", "--data", folder / "stages" / "pairs.jsonl", "--init", folder / "stages" / "base", "--mix", 0, *SMALL,
            "--lora-r", 4]


# ---- places for --out ------------------------------------------------------------------------------------------------

def outs(folder):
    """--out that is a file, below a file, in a folder that may not be written, /dev/null, empty, too long: found before
    any work."""
    made = stages(folder / "stages")
    (folder / "file").write_text("mine")
    places = {"a file": folder / "file", "below a file": folder / "file" / "x", "/dev/null": "/dev/null", "empty": "",
              "300 characters": folder / ("x" * 300), "/proc": "/proc/x", "200 characters of two bytes": "ä" * 200}
    for stage, command in made.items():
        for name, place in places.items():
            empty = folder / "here"
            empty.mkdir()
            begun = time.time()
            what, said = run(*command, "--out", place, cwd=empty)
            if contents(empty) or (folder / "file").read_text() != "mine":
                what = "lost"
            yield f"{stage} --out {name} ({time.time() - begun:.1f} s)", what, said
            shutil.rmtree(empty)


# ---- the table -------------------------------------------------------------------------------------------------------

CAMPAIGNS = {campaign.__name__: campaign for campaign in (kills, disk_full, outs, crafted.configs, crafted.bombs, crafted.flags)}
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
