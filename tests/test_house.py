"""The house: which file may import which, and that every command that is printed or written down can be run as it stands."""
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [  # a file imports from floors below, and within its own folder without going in a circle
    ["common", "kernels"], ["data", "model", "trainer", "island.words"], ["island.told"], ["island.kinds"],
    ["llama", "quant", "island.world"], ["lora"], ["checkpoints"], ["generate"], ["island.exam", "island.vocabulary", "island.dirty"], ["island.__main__", "pretrain"], ["sft"], ["reward", "dpo"],
    ["ppo"], ["evals"], ["course"], ["chat", "evaluate", "bench", "learn", "conftest"]]
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "tests"
         and not any(part.startswith(".") or part in ("venv", "out", "my") for part in path.relative_to(ROOT).parts)]


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module(path): path for path in FILES if path.name != "__init__.py"}


def floor(name):
    """Which floor a module is on, and the entry there that names it."""
    return next((i, entry) for i, entries in enumerate(FLOORS) for entry in entries if name == entry or name.startswith(f"{entry}."))


def imports(path):
    """[(imported module of ours, is it at the top of the file?), ...], without the __main__ block, which may look up."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    found = []
    for top in body:
        for node in ast.walk(top):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            else:
                continue
            found += [(name, node is top) for name in names if name in MODULES]
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_imports_from_floors_below(name):
    own, entry = floor(name)
    for other, at_the_top in imports(MODULES[name]):
        there, their_entry = floor(other)
        assert at_the_top, f"{name} hides its import of {other} inside a function"
        assert there < own or entry == their_entry, f"{name} (floor {own}) imports {other} (floor {there})"
    assert "sys.path" not in MODULES[name].read_text(encoding="utf-8"), f"{name}: files in folders are run with -m"


def test_no_circle():
    graph, done = {name: {other for other, _ in imports(path)} - {name} for name, path in MODULES.items()}, set()
    while len(done) < len(graph):
        free = {name for name, others in graph.items() if name not in done and others <= done}
        assert free, f"a circle among {sorted(set(graph) - done)}"
        done |= free


def test_the_network_can_be_taken_out_and_looked_at():
    code = "import sys; from model import GPT; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "common" in loaded and not {"data", "island", "trainer", "lora", "quant", "tiktoken"} & set(loaded)


@pytest.mark.parametrize("file, names", [("model", r"c_attn|c_proj|c_fc|\bwte\b|\bwpe\b|ln_f|position_embedding\b"),
                                         ("llama", r"[kovxdn]_proj|gate_proj|q_norm|embed_tokens|lm_head|layernorm")])
def test_no_other_file_knows_the_names_of_the_layers(file, names):
    knowing = [name for name, path in MODULES.items() if re.search(names, path.read_text(encoding="utf-8"))]
    assert knowing == [file], "what a network offers (linears, attention_paths, hf_names) is said in model.py"


# ---- commands --------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"python ((?:-m (?:data|island|evals|common|course(?!\.child))[\w.]*)|\w+\.py)([^`\n]*)")


def commands():
    """{(program, its flags)} of every command in README and code. What stands in braces is filled in while it runs."""
    found = {}
    for path in [ROOT / "README.md", *FILES, *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))  # strings that go on in the next line
        for program, rest in COMMAND.findall(text):
            flags = re.findall(r"(?<!\S)--[a-z][\w-]*", re.split(r"\s{2,}|[;)]", rest)[0])  # behind it stands what it does
            found.setdefault((program, tuple(flags)), path.relative_to(ROOT))
    return sorted((program, flags, str(path)) for (program, flags), path in found.items())


@pytest.fixture(scope="module")
def helps():
    """{program: what it prints with --help}, each started once."""
    programs = {program for program, *_ in commands()}
    running = {program: subprocess.Popen([sys.executable, *shlex.split(program), "--help"], cwd=ROOT, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) for program in sorted(programs)}
    return {program: (*process.communicate(timeout=300), process.returncode) for program, process in running.items()}


@pytest.mark.parametrize("program, flags, where", commands())
def test_commands_run_as_they_are_written(helps, program, flags, where):
    out, err, status = helps[program]
    assert status == 0 and out, f"{where}: python {program} --help: {err}"
    for flag in flags:
        assert flag.replace("--no-", "--") in out.replace("--no-", "--"), f"{where}: python {program} has no {flag}"


def test_the_collection_finds_commands():
    found = {program for program, *_ in commands()}
    assert {"sft.py", "reward.py", "ppo.py", "-m data.eli5", "-m island", "model.py"} <= found
    assert any("--beta" in flags for program, flags, _ in commands() if program == "ppo.py")
