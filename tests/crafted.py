"""Campaigns of tests/campaign.py: folders, files and flags that somebody has crafted, or broken. A case is a fork of this
process, in which everything is imported already, so that thousands of them take minutes."""
import contextlib
import copy
import gzip
import json
import os
import re
import resource
import runpy
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

import evaluate  # noqa: F401  imports all that a case will need
import chat  # noqa: F401
import llama
from checkpoints import load, save_adapter
from common.errors import end_politely
from data.tokenizer import get_tokenizer
from lora import add_lora
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
LIMIT, ROOM = 600, 3 * 2 ** 30  # seconds, and bytes more than this process has: a case that needs more has failed

# ---- one case --------------------------------------------------------------------------------------------------------


def forked(act, stdin="", limit=LIMIT, room=ROOM):
    """Calls act() in a fork of this process -> what became of it (campaign.OUTCOMES), and what it said."""
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(open(os.memfd_create("said"), "w+", errors="replace")) for _ in range(2)]
        sys.stdout.flush()
        child = os.fork()
        if not child:
            status = 99
            try:
                status = in_child(act, stdin, said, room)
            finally:
                os._exit(status)
        status = wait(child, limit)
        out, err = [(file.seek(0), file.read())[1] for file in said]
    if status is None:
        return "hang", err
    if "Traceback" in err or "panicked" in err or os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 99:
        return "traceback", err + f" (status {status})"
    if os.WEXITSTATUS(status) == 0:
        return "fine", out + err
    last = err.rstrip().splitlines()[-1:] or [""]
    return ("sentence" if os.WEXITSTATUS(status) == 1 and len(last[0]) > 20 else "silent"), last[0]


def in_child(act, stdin, said, room):
    """-> the exit status that a script would have."""
    here = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (here + room, here + room))
    questions = os.memfd_create("questions")
    os.write(questions, stdin.encode())
    os.lseek(questions, 0, os.SEEK_SET)
    for number, file in zip(range(3), (questions, *(file.fileno() for file in said))):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, encoding="utf-8", errors="surrogateescape" if n < 1 else "replace")
                                         for n, mode in enumerate(("r", "w", "w")))
    try:
        act()
        return 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return 1 if isinstance(error.code, str) else error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def wait(child, limit):
    """-> a child's status; None where it had to be killed."""
    end = time.time() + limit
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def script(*words, stdin="", **options):
    """forked, of a command: the path of a script, or a module, and its words."""
    def act():
        sys.argv = [str(word) for word in words]
        end_politely()
        if sys.argv[0].endswith(".py"):
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    return forked(act, stdin, **options)


# ---- folders ---------------------------------------------------------------------------------------------------------

SIZE = dict(block_size=64, vocab_size=1029, n_layer=2, n_head=2, n_embd=16)
WRONG = (None, True, -1, 0, 3, 5, 1.0, 2.5, 10 ** 6, 10 ** 9, 10 ** 30, float("nan"), float("inf"), "", "2", "x", "../x", "(", [],
         [-1], ["x", {}], {}, {"x": 1})
FEW = 4  # of a long list or object the first, and the last


def made(folder):
    """folder/gpt2, llama, shards and adapter, each with its tokenizer -> {name: the JSON files in it}."""
    tok = get_tokenizer("tiny")
    torch.manual_seed(0)
    GPT(GPTConfig(**SIZE)).save_pretrained(folder / "gpt2")
    llama.Llama(llama.like_gpt(**SIZE)).save_pretrained(folder / "llama")
    shutil.copytree(folder / "gpt2", folder / "shards")
    os.rename(folder / "shards" / "model.safetensors", folder / "shards" / "model-00001-of-00001.safetensors")
    with safe_open(folder / "shards" / "model-00001-of-00001.safetensors", "pt") as file:
        names = {name: "model-00001-of-00001.safetensors" for name in file.keys()}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    model = load(folder / "gpt2")
    add_lora(model, 2, 4)
    save_adapter(model, folder / "adapter", str(folder / "gpt2"))
    for name in ("gpt2", "llama", "shards", "adapter"):
        tok.save(folder / name)
    return {"gpt2": ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
            "llama": ("config.json",), "shards": ("model.safetensors.index.json",), "adapter": ("adapter_config.json",)}


def places(value, path=()):
    """Yields the path of every value inside of a JSON value; of long lists a few."""
    if path:
        yield path
    inside = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in inside if len(inside) <= 24 else inside[:FEW] + inside[-1:]:
        yield from places(inner, (*path, key))


def mutated(content, path, wrong):
    """A copy of a JSON value with another value at a path; wrong = ...: with none."""
    content = copy.deepcopy(content)
    around = content
    for key in path[:-1]:
        around = around[key]
    if wrong is ...:
        del around[path[-1]]
    else:
        around[path[-1]] = wrong
    return content


def loaded(folder):
    """What every command does first."""
    get_tokenizer(str(folder))
    load(str(folder))


def uses(folder, data, out):
    """{command: its case} of a checkpoint's folder."""
    small = ("--device", "cpu", "--dtype", "float32")
    return {"chat": lambda: script("chat.py", folder, "--max-new-tokens", 4, *small, stdin="Who are you?\n"),
            "evaluate": lambda: script("evaluate.py", folder, "--data", data, "--max-new-tokens", 4, "--out", out, *small),
            "sft": lambda: script("sft.py", "--init", folder, "--data", data, "--steps", 1, "--batch-size", 2, "--mix", 0,
                                  "--sample-every", 0, "--eval-every", 0, "--out", out, *small)}


def configs(folder, every=41, only=None):
    """Each single value of config.json (GPT-2, Llama), tokenizer.json, tokenizer_config.json, generation_config.json,
    adapter_config.json and an index, left out or replaced by each of two dozen others, of these one in 41: read, and
    where it can be read, chatted with, measured and trained."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"question {i}?", "completion": f"yes, {i}"}) for i in range(12)))
    count = 0
    for name, files in made(folder).items():
        for file in files if only is None else [f for f in files if f in only]:
            path = folder / name / file
            before = path.read_bytes()
            content = json.loads(before)
            for place in places(content):
                for wrong in (..., *WRONG):
                    count += 1
                    if count % every:
                        continue
                    path.write_text(json.dumps(mutated(content, place, wrong)))
                    case = f"{name}/{file} {'.'.join(map(str, place))[:60]} = {'(left out)' if wrong is ... else wrong!r:.30}"
                    what, said = forked(lambda: loaded(folder / name))
                    yield case, what, said
                    for use, act in uses(folder / name, data, folder / "out").items() if what == "fine" and only is None else ():
                        yield f"{case}: {use}", *act()
                    shutil.rmtree(folder / "out", ignore_errors=True)
            path.write_bytes(before)


# ---- files -----------------------------------------------------------------------------------------------------------

def bombs(folder, megabytes=300):
    """A gigabyte of zeros and 300 MB of spaces and of one letter as .jsonl.gz, .json.gz, .csv.gz and .txt.gz; lines of 50 MB;
    a pipe, a device, a folder and what the ending does not say: read as conversations, questions and text, in 1 GB."""
    room = 2 ** 30
    for filler in (b"\0", b" ", b"x"):
        packed = gzip.compress(filler * 2 ** 20)
        for ending in ("jsonl", "json", "csv", "txt"):
            path = folder / f"bomb.{ending}.gz"
            with open(path, "wb") as file:
                for _ in range(megabytes if filler.strip(b"\0") else 1000):
                    file.write(packed)
            for want in ("sft", "text"):
                yield f"{path.name} of {filler}, {want}", *script("data.files", path, "--want", want, room=room)
            path.unlink()
    rows = {"jsonl": '{"prompt": "q", "completion": "%s"}\n', "json": '[{"prompt": "q", "completion": "%s"}]', "txt": "%s\n\nmore\n",
            "csv": "prompt,completion\nq,%s\n"}
    for ending, row in rows.items():
        path = folder / f"line.{ending}"
        path.write_text(row % ("x" * 50_000_000))
        for want in ("sft", "prompts", "text"):
            yield f"a line of 50 MB, {path.name}, {want}", *script("data.files", path, "--want", want, room=room)
        path.unlink()
    os.mkfifo(folder / "pipe.jsonl")
    os.symlink("/dev/zero", folder / "zero.csv")
    (folder / "folder.txt").mkdir()
    (folder / "gzip.jsonl").write_bytes(gzip.compress(b"{}"))
    (folder / "plain.jsonl.gz").write_text("{}")
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"prompt,completion\n" * 10_000)[:-20])
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "number.json").write_text("9" * 100_000)
    for path in sorted(folder.iterdir()):
        yield path.name, *script("data.files", path)


# ---- flags -----------------------------------------------------------------------------------------------------------

NUMBERS = ("-1", "-5", "0", "1e308", "-1e308", "nan", "inf", "9" * 30, "1000000000", "4096", "x", "", "2.5", "0x10", "1_000")
WORK = r"--(steps|epochs|ppo-epochs|n|n-sft|n-ranked|n-dump|documents|tries|batch-size|minibatch|pairs|max-pairs)"  # much of it is no mistake
WORDS = ("", "x", "x" * 300, "~nobody/x", "--data", "--no-such-flag", "/dev/null", "/proc/x", "a\nb", "gold", "\x1b[2J", "é" * 200, "0,1", ",")


def flags(folder, every=17):
    """Every flag of sixteen commands with numbers that are negative, nothing, huge or no numbers, and with words that are
    names of 300 characters, of nobody's folder, of devices, or look like flags; of these one in 17."""
    made(folder)
    pairs, text, talks = folder / "pairs.jsonl", folder / "text.jsonl", folder / "talks.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": f"q {i}?", "chosen": f"yes {i}", "rejected": "no"}) for i in range(20)))
    talks.write_text("\n".join(json.dumps({"prompt": f"q {i}?", "completion": f"yes {i}"}) for i in range(20)))
    text.write_text("\n".join(json.dumps({"text": f"{i} hens sat in a tree. " * 9}) for i in range(20)))
    model, out = folder / "gpt2", folder / "out"
    small = ["--device", "cpu", "--dtype", "float32", "--out", out]
    steps = ["--steps", 1, "--batch-size", 2, *small]
    commands = {
        "pretrain.py": ["--data", text, "--n-layer", 1, "--n-embd", 16, "--block-size", 32, *steps],
        "sft.py": ["--data", talks, "--init", model, "--mix", 0, *steps],
        "reward.py": ["--data", pairs, "--init", model, *steps], "dpo.py": ["--data", pairs, "--init", model, *steps],
        "ppo.py": ["--data", talks, "--init", model, "--reward", "readability", "--max-new-tokens", 4, *steps],
        "chat.py": [model, "--max-new-tokens", 4, *small[:4]], "generate.py": [model, "Once", "--max-new-tokens", 4, *small[:4]],
        "evaluate.py": [model, "--data", talks, "--max-new-tokens", 4, *small], "lora.py": ["--adapter", folder / "adapter", "--out", out],
        "evals.unknowns": [model, "--data", talks, "--max-new-tokens", 4, "--tries", 1, "--out", folder / "idk.jsonl"],
        "data.identity": ["--data", talks, "--out", folder / "identity.jsonl"], "data.files": [talks], "data.clean": [text],
        "data.leakage": [talks, talks], "quant.py": [model], "island": ["--ask", "What does Mabel eat?"]}
    count = 0
    for command, words in commands.items():
        usage = script(command, "--help")[1]
        for flag in dict.fromkeys(re.findall(r"^  (?:-\w, )?(--[a-z][\w-]*) ([A-Z{]\S*)", usage, re.MULTILINE)):
            name, kind = flag
            for value in NUMBERS if kind in ("INT", "FLOAT") else WORDS:
                count += 1
                if count % every or re.fullmatch(WORK, name) and value in ("1000000000", "4096", "1_000"):
                    continue
                yield f"{command} {name} {value[:20]!r}", *script(command, *words, name, value, stdin="Who are you?\n")
                shutil.rmtree(out, ignore_errors=True)
