"""What bench.py measures: candidates that do the same work, in turn, on the same rows; this project's are here."""
import importlib.util
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import dpo
import ppo
import quant
import reward
import sft
import trainer
from checkpoints import load, load_init
from common.errors import UserError
from common.tables import table
from data import files
from data.pairs import load_ranked
from data.tokenizer import get_tokenizer
from evals import bench_peers as peers
from evals.bench_peers import read_folder, synchronize
from generate import generate
from island.world import Island
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig

# ---- measuring, the same for every command ---------------------------------------------------------------------------

def interleaved(candidates, rounds):
    """{name: function} -> {name: [seconds per round]}. One warm-up round; then each function once a round, in turn.

    A function that returns a float has measured itself: a peer's trainer sets much up anew in every call, which is no
    part of a step.
    """
    seconds = {name: [] for name in candidates}
    for round_ in range(-1, rounds):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            own = function()
            synchronize()
            if round_ >= 0:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return seconds


def ratio(seconds, reference):
    """Two lists of seconds -> 'how many times as fast as the reference', its median and range over the rounds."""
    ratios = [b / a for a, b in zip(seconds, reference)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


PEAK = """
import torch
if {cuda}:
    print(torch.cuda.max_memory_allocated() // 1024)
else:
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            print(line.split()[1])
"""


def peak_memory(*stages, cuda=False):
    """Python source -> the most memory, in MB, that a fresh process has held after each of the stages, run in their
    order; None where that is unknown. Resident memory, or with cuda what torch has allocated on the GPU.

    Not resource.getrusage: on Linux a child begins with its parent's peak.
    """
    if not cuda and not Path("/proc/self/status").exists():
        return None
    peak = PEAK.format(cuda=cuda)
    out = subprocess.run([sys.executable, "-c", "\n".join(f"{stage}\n{peak}" for stage in stages)],
                         cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if out.returncode:  # its own error says more than the exit status
        raise RuntimeError(out.stderr)
    lines = [line for line in out.stdout.splitlines() if line.isdigit()]
    return [int(line) / 1024 for line in lines[-len(stages):]]


def machine():
    """What the numbers depend on, in one line."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpu, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
        device = f"{name}, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}; Python {platform.python_version()}; {platform.system()}"


# ---- python bench.py sft, dpo, ppo, generate: this project and a peer on the same folder -----------------------------
#
# A candidate is a function of a folder: it reads weights, rows and settings there and returns what is timed.
# The same function runs here, in turn with the others, and in a process of its own, where its memory is measured.
# Those of the peers are in bench_peers.py.

SHAPES = {"small": dict(n_layer=12, n_head=12, n_embd=768),  # GPT-2 small
          "tiny": dict(n_layer=4, n_head=4, n_embd=128)}
CONTEXT, VOCABULARY = 1024, 50257  # GPT-2's, for both shapes
LARGE = {"qwen2.5-0.5b": LlamaConfig(32768, 151936, 24, 14, 2, 896, 4864, 64, 1e6, None, 1e-6, True, qkv_bias=True),
         "llama-3.2-1b": LlamaConfig(131072, 128256, 16, 32, 8, 2048, 8192, 64, 5e5, {
             "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}, tie=True)}  # of bench.py memory


def silent(*words):
    """For what is said to whoever trains."""


def tokenizer_of(args):
    return get_tokenizer(args.tokenizer or ("gpt2" if args.data else "tiny"))


def drawn(found, n, args, what, cure="--batch-size or --steps"):
    """n of what was found in --data, or in the island, the same ones in every run."""
    if len(found) < n:
        raise UserError(f"{args.data} has {len(found)} {what}, but {n} are needed: give a smaller {cure}")
    return random.Random(0).sample(found, n)


def read_rows(args, n):
    """-> a tokenizer and n examples (ids, mask): of --data, or of the island."""
    tok = tokenizer_of(args)
    rows = files.load(args.data, "sft")[0] if args.data else Island().conversations(max(n, 600))
    examples = sft.make_examples(rows, tok, CONTEXT)
    return tok, drawn(examples, n, args, "rows")


def write_folder(folder, shape, tok, args, **inputs):
    """What all candidates read: a random GPT-2 with its tokenizer as a Hugging Face folder, and bench.json."""
    torch.manual_seed(0)
    config = GPTConfig(CONTEXT, max(VOCABULARY, tok.vocab_size), **SHAPES[shape])
    GPT(config).save_pretrained(folder)
    tok.save(folder)
    inputs["run"] = {"device": args.device, "dtype": args.dtype}
    Path(folder, "bench.json").write_text(json.dumps(inputs))


def race(args, tok, title, tokens, candidates, **inputs):
    """One table for each shape. candidates: {name: function of the folder}, this project's first; tokens: how many real
    ones a call handles, None where the seconds of a call are to be shown instead."""
    run = trainer.start(args)
    for shape in [args.shape] if args.shape else SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(folder, shape, tok, args, **inputs)
            seconds = interleaved({name: build(folder) for name, build in candidates.items()}, args.rounds)
            rows = []
            for name, build in candidates.items():
                prepare = f"from {build.__module__} import {build.__name__} as build\ncall = build({folder!r})"
                memory = peak_memory(prepare, "call()", cuda=run.device.type == "cuda")
                ours = next(iter(seconds.values()))
                median = statistics.median(seconds[name])
                rows.append([name, f"{tokens / median:,.0f}" if tokens else f"{median:.3f}",
                             "" if seconds[name] is ours else ratio(ours, seconds[name]),
                             *(f"{mb:,.0f}" for mb in memory or ())])
        header = [f"{shape}, {str(run.dtype).removeprefix('torch.')}: {title}", "tokens/s" if tokens else "s/iteration",
                  f"this project is ... times as fast (range over {args.rounds} rounds)", "MB before", "peak MB"]
        print(table(header[:len(rows[0])], rows) + "\n")


def installed(package, candidates):
    """The peer's candidates, or none and a line that says so."""
    if importlib.util.find_spec(package):
        return candidates
    print(f"{package} is not installed, so this project stands alone (pip install -r requirements-peers.txt)\n")
    return {}


def epochs(model, config, run, rows, widths, train_step, first=lambda: None):
    """-> a function that trains for one epoch as sft.py and dpo.py do, in an order of its own in every call. train_step:
    the script's; first: what an epoch begins with."""
    optimizer, batches = trainer.adamw(model, config), trainer.Batches(widths, config.batch_size, config.seed)
    steps = itertools.count()  # goes on from call to call

    def epoch():
        first()
        for step in itertools.islice(steps, len(batches)):
            trainer.begin_step(step, step + 1, optimizer, config, run)
            train_step(model, [rows[i] for i in batches[step]], config, run)
            trainer.update(model, optimizer, config, run, step)

    return epoch


def our_sft(folder, **settings):
    """-> a function that trains for one epoch, with the parts that sft.py's loop is made of."""
    inputs, run = read_folder(folder)
    config = sft.Config(init=folder, lr=1e-5, warmup=0, schedule="constant", batch_size=inputs["batch_size"],
                        **settings)
    examples = inputs["examples"]
    return epochs(load_init(config, run)[0], config, run, examples, [len(ids) for ids, _ in examples], sft.sft_step)


def bench_sft(args):
    """An epoch over a few batches. Real tokens are prompt and answer, no padding; each candidate pads as it likes."""
    batch_size = args.batch_size or 8
    tok, examples = read_rows(args, batch_size * args.steps)
    race(args, tok, f"SFT, batch {batch_size}", sum(len(ids) for ids, _ in examples), {
        "this project": our_sft,
        **installed("trl", {"TRL, tuned": peers.trl_sft_tuned, "TRL, defaults": peers.trl_sft})},
        examples=examples, batch_size=batch_size)


def read_pairs(args, n):
    """-> a tokenizer and n pairs of dpo.Answer: of --data, or of the island's votes."""
    tok = tokenizer_of(args)
    config = dpo.Config(data=args.data, n_ranked=max(n, 200))
    rows = load_ranked(config, Island, silent)[0]
    pairs = dpo.make_examples(rows, tok, CONTEXT, config, silent)
    return tok, drawn(pairs, n, args, "pairs")


def our_dpo(folder):
    """-> a function that trains for one epoch, with the parts of dpo.py's loop and the reference's pass."""
    inputs, run = read_folder(folder)
    config = dpo.Config(init=folder, lr=1e-6, warmup=0, schedule="constant", batch_size=inputs["batch_size"])
    model, _ = load_init(config, run)
    pairs = [tuple(dpo.Answer(*answer) for answer in pair) for pair in inputs["pairs"]]

    def ask_reference():  # in every call: TRL asks its reference in every step
        dpo.add_reference(model, pairs, run, config)

    return epochs(model, config, run, pairs, list(map(dpo.pair_width, pairs)), dpo.dpo_step, ask_reference)


def bench_dpo(args):
    """An epoch over a few batches. Real tokens are question and answer of both sides of a pair, no padding."""
    batch_size = args.batch_size or 8
    tok, pairs = read_pairs(args, batch_size * args.steps)
    answers = [answer for pair in pairs for answer in pair]
    race(args, tok, f"DPO, batch {batch_size}", sum(len(answer.ids) for answer in answers), {
        "this project": our_dpo,
        **installed("trl", {"TRL, no checkpointing": peers.trl_dpo_tuned, "TRL, defaults": peers.trl_dpo})},
        pairs=[[(answer.ids, answer.mask) for answer in pair] for pair in pairs], batch_size=batch_size)


def our_ppo(folder):
    """-> a function that does one iteration as ppo.py does: two models are trained, policy and value model."""
    inputs, run = read_folder(folder)
    config = ppo.Config(init=folder, warmup=0, batch_size=len(inputs["prompts"]), minibatch=inputs["minibatch"],
                        ppo_epochs=1, max_new_tokens=inputs["new_tokens"])
    policy, frozen, trunk = (load(folder).to(run.device).eval() for _ in range(3))
    value, tok = reward.RewardModel(trunk).eval(), get_tokenizer(folder)
    optimizers = [trainer.adamw(model, config) for model in (policy, value)]
    steps = itertools.count()

    def iteration():
        step = next(steps)
        for optimizer in optimizers:
            trainer.begin_step(step, step + 1, optimizer, config, run)
        rollout = ppo.roll_out(policy, tok, [[]] * len(inputs["prompts"]), inputs["prompts"], config, run, seed=step)
        ppo.score(rollout, lambda talks: peers.marks(talk[-1]["content"] for talk in talks), config, run)
        ppo.estimate(rollout, policy, lambda: nullcontext(frozen), value, config.beta, config, run)
        ppo.ppo_update(rollout, policy, value, optimizers, None, step, config, run)

    return iteration


def bench_ppo(args):
    """64 rollouts, scored by a function of the text that costs nothing, then one epoch of updates in two minibatches.

    Every question is answered twice, as RLOO needs it. RLOO has no value model, so it has less to do than PPO.
    """
    batch_size, new_tokens = args.batch_size or 64, args.new_tokens or 28
    if batch_size % 2:
        raise UserError(f"--batch-size {batch_size}: ppo answers every question twice, so it must be even")
    args.shape = args.shape or list(SHAPES)[-1]  # the tiny one
    tok = tokenizer_of(args)
    config = ppo.Config(data=args.data, max_new_tokens=new_tokens, n_prompts=max(batch_size, 200))
    questions, ids, _ = ppo.load_prompts(config, tok, CONTEXT, silent)
    chosen = drawn(range(len(ids)), batch_size // 2, args, "questions", "--batch-size")
    race(args, tok, f"{batch_size} rollouts of {new_tokens} tokens, one epoch", None, {
        "this project (PPO)": our_ppo,
        **installed("trl", {"TRL (RLOO), no checkpointing": peers.trl_rloo_tuned,
                            "TRL (RLOO), defaults": peers.trl_rloo})},
        questions=[questions[i] for i in chosen], prompts=[ids[i] for i in chosen for _ in range(2)],
        minibatch=batch_size // 2, new_tokens=new_tokens)


def our_generate(folder):
    inputs, run = read_folder(folder)
    model = load(folder, linear=quant.freeze).to(run.device)

    def answers():
        with run.autocast():
            return generate(model, inputs["prompts"], inputs["new_tokens"], temperature=0.0)

    return answers


def bench_generate(args):
    """Greedy, no end token, so that everybody writes the same number of tokens. Real tokens are the new ones."""
    batch_size, new_tokens = args.batch_size or 16, args.new_tokens or 64
    tok, examples = read_rows(args, batch_size)
    prompts = [ids[:mask.index(1)] for ids, mask in examples]
    race(args, tok, f"generate {new_tokens} tokens, batch {batch_size}", batch_size * new_tokens, {
        "this project": our_generate,
        **installed("transformers", {"transformers": peers.transformers_generate})},
        prompts=prompts, new_tokens=new_tokens)


# ---- python bench.py memory ------------------------------------------------------------------------------------------

def write_large(folder, config, args, **inputs):
    """A random network of this shape as such are published, bfloat16, with a tokenizer whose tokens it all knows, and
    bench.json."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Llama(config).save_pretrained(folder, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    tok = get_tokenizer("tiny")
    tok.new_ids = []
    tok.save(folder)
    inputs["run"] = {"device": args.device, "dtype": args.dtype}
    Path(folder, "bench.json").write_text(json.dumps(inputs))


def our_qlora(folder):
    return our_sft(folder, lora_r=16, nf4=True, checkpointing=True)


def bench_memory(args):
    """Peaks of a process of its own with nothing but the imports, with the model loaded, and at the end: of greedy
    answers, and of a QLoRA step (rank 16, all linear layers, checkpointing as PEFT has it) of two rows of 512 tokens."""
    new_tokens, ids = args.new_tokens or 16, [i % 1000 for i in range(512)]
    ours = "import checkpoints, evals.benches"
    candidates = {"generate": (ours, our_generate), "QLoRA step": (ours, our_qlora)}
    theirs = {"generate, transformers": ("import transformers", peers.transformers_bfloat16),
              "QLoRA step, transformers + PEFT + bitsandbytes": ("import transformers, peft, bitsandbytes", peers.peft_qlora)}
    candidates |= installed("bitsandbytes", theirs)
    for shape in [args.shape] if args.shape else LARGE:
        with tempfile.TemporaryDirectory() as folder:
            write_large(folder, LARGE[shape], args, prompts=[ids[:100], ids[:60]], new_tokens=new_tokens, batch_size=2,
                        examples=[(ids, [0] * 100 + [1] * 412)] * 2)
            rows = []
            for name, (imports, build) in candidates.items():
                load = f"from {build.__module__} import {build.__name__} as build\ncall = build({folder!r})"
                peaks = peak_memory(imports, load, "call()", cuda=torch.cuda.is_available() and args.device != "cpu")
                rows.append([name, *(f"{mb:,.0f}" for mb in peaks or ())])
        header = [f"{shape}, {new_tokens} new tokens, 2 x 512 trained", "MB imported", "MB loaded", "peak MB"]
        print(table(header[:len(rows[0])], rows) + "\n")


# ---- python bench.py nf4 ---------------------------------------------------------------------------------------------

def try_compile(function, *arguments):
    """-> {"readable, compiled": call}, or {} where torch.compile finds no compiler: the rest is worth printing."""
    fast = torch.compile(function, dynamic=False)
    try:
        fast(*arguments)
    except Exception as error:  # whatever kind of compiler is missing or too old
        print(f"torch.compile does not work here ({type(error).__name__}): no compiled rows")
        return {}
    return {"readable, compiled": lambda: fast(*arguments)}


LAYERS = """
import torch, quant
torch.manual_seed(0)
layers = [{layer} for _ in range(16)]
x = y = torch.randn(64, 2048, requires_grad=True)
for layer in layers:
    y = layer(y)
y.sum().backward()
"""


def nf4_candidates(weight):
    """{operation: {implementation: call}}; the last implementation is what the others are compared with."""
    q = quant.quantize_nf4(weight)
    operations = {"quantize": {"quantize_nf4": lambda: quant.quantize_nf4(weight),
                               "quantize_nf4, double": lambda: quant.quantize_nf4(weight, double=True),
                               **try_compile(quant.quantize, weight, 64),
                               "readable": lambda: quant.quantize(weight, 64)}}
    for dtype in (torch.float32, torch.bfloat16):
        arguments = q.packed, q.absmax, q.shape, 64, dtype
        operations[f"dequantize to {dtype}".replace("torch.", "")] = {
            "dequantize_nf4": lambda dtype=dtype: quant.dequantize_nf4(q, dtype),
            "(fill a new tensor)": lambda dtype=dtype: torch.ones(weight.shape, dtype=dtype, device=weight.device),
            **try_compile(quant.dequantize, *arguments),
            "readable": lambda arguments=arguments: quant.dequantize(*arguments)}
    try:
        import bitsandbytes.functional as peer
    except ImportError:
        print("bitsandbytes is not installed: no rows for it (pip install bitsandbytes)")
        return operations
    packed, state = peer.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    operations["quantize"]["bitsandbytes"] = lambda: peer.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    for dtype in (torch.float32, torch.bfloat16):
        operations[f"dequantize to {dtype}".replace("torch.", "")]["bitsandbytes"] = lambda dtype=dtype: (
            torch.ops.bitsandbytes.dequantize_4bit(packed, state.absmax, 64, "nf4", weight.shape, dtype))
    return operations


def bench_nf4(args):
    """A 4096 x 4096 matrix, block 64; then what a stack of frozen layers needs for a forward and a backward pass."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    weight = weight.cuda() if torch.cuda.is_available() else weight
    rows = []
    for operation, candidates in nf4_candidates(weight).items():
        seconds = interleaved(candidates, args.rounds)
        reference = list(candidates)[-1]
        for name, times in seconds.items():
            speed = f"{weight.numel() / statistics.median(times) / 1e9:.3f}"
            rows.append([operation, name, speed, ratio(times, seconds[reference]) if name != reference else "1"])
    header = ["4096 x 4096, block 64", "", "G elements/s", f"times {reference} (range over {args.rounds} rounds)"]
    print(table(header, rows) + "\n")

    stacks = {"nothing but the imports": "", "16 frozen nn.Linear(2048, 2048)": LAYERS.format(
        layer="torch.nn.Linear(2048, 2048).requires_grad_(False)"), "the same as NF4Linear": LAYERS.format(
        layer="quant.NF4Linear(torch.nn.Linear(2048, 2048))")}
    peaks = {name: peak_memory("import torch, quant", code) for name, code in stacks.items()}
    if None not in peaks.values():
        print(table(["forward and backward, on the CPU", "peak MB"],
                    [[name, f"{peak:.0f}"] for name, (_, peak) in peaks.items()]) + "\n")
