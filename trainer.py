"""What every training script shares, as plain functions: the device, the order of the data, the optimizer, the
schedule, checkpoints, the log. The loop itself stays in each script, because that is what a reader comes for.

Two decisions make the rest short:
- The batch of a step and its random numbers are functions of (seed, step). Resuming needs no random state and no
position
  in the data: the step number is both.
- Gradients are sums over tokens divided by the number of supervised tokens of the whole optimizer step, over all
  micro-batches and processes. So the processes only have to add their gradients, and no mean of means can creep in.
"""
import json
import math
import os
import random
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError, no_command, visible

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.disk import on_disk, release, replacing, settle, together, write_json
from common.flags import TrainConfig
from common.hub import RECORD, STATE
from common.runs import claim_out, differences, flag, identity, script_of
from common.waits import PLAN, Stopwatch, busy, words


# ---- device, dtype, processes ----------------------------------------------------------------------------------------

@dataclass
class Run:
    """Where a script runs: the device, the dtype of its matrix products, and its place among torchrun's processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    begun: dict = field(default_factory=dict)  # what load_state found this run to be
    saved: int | None = None  # the step of its last checkpoint

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def share(self, rows):
        """This process's part of a batch: every world-th row, so that rows sorted by length divide evenly."""
        return rows[self.rank::self.world]

    def sum(self, number):
        """A number added over all processes."""
        if self.world == 1:
            return number
        total = torch.tensor(float(number), dtype=widest(self.device), device=self.device)
        dist.all_reduce(total)
        return total.item()

    def print(self, *words, **options):
        if self.rank == 0:
            print(*map(visible, words), flush=True, **options)


def widest(device):
    """The most exact floating-point numbers of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def start(config):
    """Chooses device and dtype, joins torchrun's processes where there are any -> Run. What a script does first."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if isinstance(config, TrainConfig) and rank == 0:
        claim_out(config)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device} cannot be used here ({str(error).splitlines()[0]}): try --device cpu")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = _dtype(config.dtype, device)
    torch.backends.cuda.matmul.allow_tf32 = dtype != torch.float32  # whoever asks for float32 gets all of its digits
    return Run(device, dtype, rank, world)


def _dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # a CPU without matrix units for bfloat16 emulates it, several times slower than float32
    fast = device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


# ---- batches ---------------------------------------------------------------------------------------------------------

class Batches:
    """Which rows make the batch of a step: batches[step] -> indices. A function of (seed, step) and of the lengths
    only.

    Every epoch visits every row once, in another order, in batches of similar lengths: rows are shuffled, sorted by
    length within windows of some batches, and the batches shuffled again.
    """

    def __init__(self, lengths, batch_size, seed, window=16):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.per_epoch = math.ceil(len(lengths) / batch_size)
        self.epoch = self.order = None

    def __len__(self):
        return self.per_epoch

    def __getitem__(self, step):
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._order(random.Random(f"{self.seed} {epoch}"))
        return self.order[position]

    def _order(self, rng):
        rows = list(range(len(self.lengths)))
        rng.shuffle(rows)
        size, batches = self.batch_size, []
        for i in range(0, len(rows), size * self.window):
            window = sorted(rows[i:i + size * self.window], key=self.lengths.__getitem__)
            batches += [window[j:j + size] for j in range(0, len(window), size)]
        rng.shuffle(batches)
        return batches


def split(rows, width, micro_tokens):
    """Rows -> parts of at most micro_tokens padded tokens (a wider single row still makes one), sorted by width(row):
    the tokens that a row takes when it is padded to its own length."""
    parts = []
    for row in sorted(rows, key=width):
        if parts and width(row) * (len(parts[-1]) + 1) <= micro_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def micro_batches(examples, micro_tokens, device):
    """[(ids, mask), ...] -> [(ids (B, T), mask (B, T)), ...], padded on the right, each of at most micro_tokens tokens.
    Padding is id 0 with mask 0: which id it is can never matter."""
    return [pad(part, device) for part in split(examples, lambda example: len(example[0]), micro_tokens)]


def pad(examples, device="cpu"):
    """[(ids, mask), ...] -> ids (B, T), mask (B, T), padded on the right with 0."""
    T = max(len(ids) for ids, _ in examples)
    return tuple(torch.tensor([row[k] + [0] * (T - len(row[k])) for row in examples], device=device) for k in (0, 1))


# ---- one optimizer step ----------------------------------------------------------------------------------------------

def adamw(model, config):
    """AdamW with weight decay on matrices only: decaying a bias or a norm's gain regularises nothing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)  # one kernel for all tensors
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


class Muon(torch.optim.AdamW):
    """For the matrices of the blocks, in place of AdamW (Jordan et al. 2024; its scale: Liu et al. 2025,
    arXiv:2502.16982):

        M <- mu M + G,    W <- W - lr (0.2 sqrt(max(m, n)) orth(G + mu M) + weight_decay W),    W (m, n), G its gradient

    orth(U S V^T) = U V^T: every direction is learned at the same speed, and an entry's step is as large as one of
    AdamW's, so that one learning rate serves both. A group's "parts": how many matrices lie on top of each other in
    its weights (q, k and v in one layer), each orthogonalised by itself. Groups without them are AdamW's.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parts, lr = group.get("parts"), group["lr"]
            for p in [p for p in group["params"] if parts and p.grad is not None]:
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))  # AdamW's loader looks for a step
                mean = state["momentum"].mul_(self.MOMENTUM).add_(p.grad)
                ahead = torch.add(p.grad, mean, alpha=self.MOMENTUM).view(parts, -1, p.size(1))  # (parts, m, n)
                scale = 0.2 * max(ahead.shape[1:]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"]).sub_(orthogonalize(ahead).view_as(p), alpha=lr * scale)
                p.grad = None  # so that AdamW leaves it alone
        super().step()


def orthogonalize(G, steps=5):
    """G (..., m, n) = U S V^T -> nearly U V^T, singular values from 0.7 to 1.2, by Newton-Schulz steps X <- aX + (bA
    + cA^2)X, A = XX^T (coefficients: Jordan et al. 2024): matrix products only."""
    X = G.mT if G.size(-2) > G.size(-1) else G  # the smaller A
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X.mT if G.size(-2) > G.size(-1) else X


def muon(model, config):
    """Muon for the blocks' matrices, AdamW for the rest (token vectors, biases, gains)."""
    parts = {layer.weight: model.stacked.get(path, 1) for path, layer in model.linears().items()}
    others = adamw(model, config).param_groups
    groups = [{**group, "params": [p for p in group["params"] if p not in parts]} for group in others]
    groups += [{"params": [p for p in parts if parts[p] == n], "parts": n, "weight_decay": config.weight_decay}
               for n in sorted(set(parts.values()))]
    return Muon(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def learning_rate(step, steps, config):
    """Linear warm-up to config.lr, then cosine or linear decay to min_lr * lr at the last step, or constant."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - 1 - config.warmup)  # 0 ... 1
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr + (1 - config.min_lr) * shape)


def begin_step(step, steps, optimizer, config, run):
    """Sets the step's learning rate and its random numbers (dropout), which depend on (seed, step, rank) alone."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, config)
    torch.manual_seed(random.Random(f"{config.seed} {step} {run.rank}").getrandbits(62))


def update(model, optimizer, config, run, step):
    """Adds the gradients of all processes, clips, checks, steps -> {"lr", "grad_norm"}.

    Raises UserError before anything is changed where the gradient is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if run.world > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # this process may have had no rows
        flat = torch.cat([p.grad.flatten() for p in parameters])  # one message instead of one per tensor
        dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf).item()
    if not math.isfinite(norm):
        _stop(step, "the loss or its gradient is not finite", config, run)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}


def _stop(step, why, config, run):
    kept = "nothing was saved" if run.saved is None else f"the checkpoint of step {run.saved} in {config.out} is kept"
    raise UserError(f"step {step}: {why}, so training stopped; {kept}: start anew with a lower --lr, or look for "
                    "broken rows")


TOO_LARGE = 100.0  # root mean square of trained weights: those of working networks are below 1


def check_weights(parameters, step, config, run):
    """The next update notices what a step has spoiled, but a checkpoint may come before it, and the last step has none:
    so this looks at weights that will be saved. While they are finite and of a network's size, so is the loss."""
    norm = torch.stack([torch.linalg.vector_norm(p) for p in parameters]).norm().item()
    size = norm / math.sqrt(sum(p.numel() for p in parameters))
    if not size < TOO_LARGE:  # NaN is no less
        _stop(step, f"its update has made the trained weights as large as {size:.0e} (root mean square)", config, run)


# ---- files: atomic, resumable ----------------------------------------------------------------------------------------

def save_state(config, run, step, steps, model, *optimizers, extra=None):
    """Everything --resume needs, in one file: it is either the old one or the new one, never half of each. extra: a
    dict of numbers that a script adapts while it trains. Raises UserError where the weights are none that anybody
    would keep.

    The weights are in it as well as in model.safetensors, so that no kill between two files can pair the weights of one
    step with the optimizer of another. Adapters: only what is trained.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    check_weights(list(trained.values()), step - 1, config, run)
    if run.rank == 0:
        state = {"step": step, "model": trained, "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                 "extra": extra or {}} | (run.begun or identity(config, steps))
        with together(config.out, ()) as folder:
            try:
                torch.save(state, folder / STATE)
            except RuntimeError:  # what torch makes of a full disk, in words that nobody understands
                raise OSError("it took only a part of the state for --resume")
            write_json(folder / RECORD, {"script": script_of(config), "command": state["command"], "step": step,
                                         "steps": steps})
    run.saved = step


def load_state(config, run, steps, model, *optimizers, extra=None):
    """With --resume: loads the state in --out, `extra` included -> the first step still to do. Without: 0.

    Raises UserError where the run was begun with other flags or data, or the file is damaged, with what to do instead.
    """
    path, run.begun, run.saved = Path(config.out) / STATE, identity(config, steps), None
    if not config.resume:
        return 0
    if not path.is_file():
        raise UserError(f"--resume: {path} is not there, so {config.out} holds no unfinished run: start without --resume")
    out = flag("out", config.out)
    anew = f"start anew with {run.begun['command']} {out} --overwrite"
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not read its checksums, and a "folder" is nothing to it
            if archive.testzip() or any(record.external_attr for record in archive.infolist()):
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location=run.device, weights_only=True)
        if found := differences(state["settings"], run.begun["settings"]):
            raise UserError(f"the unfinished run in {config.out} was begun with {', '.join(found)}: finish it with "
                            f"{state['command']} {out} --resume, or {anew}")
        if state["step"] not in range(steps + 1):
            raise ValueError(f"step {state['step']} of {steps}")
        restore(state, model, optimizers)
        if extra is not None:
            extra.update(state["extra"])
    except Exception as error:  # a cut or foreign file fails in many ways; the cure is one
        why = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} does not fit or is damaged ({why}): {anew}")
    run.saved = state["step"]
    run.print(f"resumed {config.out} at step {state['step']} of {steps}")
    return state["step"]


@torch.no_grad()
def restore(state, model, optimizers):
    """Puts a state's tensors into the model and its optimizers. Raises ValueError where a shape is another one: copy_
    would broadcast it, and optimizers do not look."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def shapes(tensors):
        return {name: tensor.shape for name, tensor in tensors.items()}

    if shapes(state["model"]) != shapes(trained):
        raise ValueError("it holds other weights than this model trains")
    for name, tensor in state["model"].items():
        trained[name].copy_(tensor)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
        if any(t.dim() and t.shape != p.shape for p, moments in optimizer.state.items() for t in moments.values()):
            raise ValueError("its optimizer is of other weights")


def is_finished(folder):
    """A stage is finished when its checkpoint is there and no state waits to be resumed."""
    settle(folder)
    whole = any((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json"))
    return whole and not (Path(folder) / STATE).is_file()


def missing(config, script):
    """What a run of a script needs and is not there yet, in order, itself last -> {folder: (script, config)}. A script's
    NEEDS is {a flag that names a folder: (the script that makes its default, with which settings)}."""
    found = {}
    for name, (earlier, settings) in script.NEEDS.items():
        folder = getattr(config, name)
        if folder == getattr(type(config), name) and not is_finished(folder):
            found |= missing(earlier.Config(out=folder, **settings), earlier)
    return found | {config.out: (script, config)}


def prepare(config, run):
    """Says what will happen, a line a stage, and how long it takes; runs the earlier stages that are missing."""
    script = sys.modules[type(config).__module__]
    if not PLAN.depth:  # else it is part of another command's plan
        tell(missing(config, script), run)
    for name, (earlier, settings) in script.NEEDS.items():
        if getattr(config, name) == getattr(type(config), name):
            ensure(getattr(config, name), earlier, config, run, **settings)


def tell(stages, run):
    """Prints the plan of a command: stages as `missing` gives them, or none."""
    if not stages:
        return
    costs = {}
    for folder, (script, config) in stages.items():
        step, steps, rest = script.COSTS
        costs[folder] = None if config.data else (step, config.steps or steps, rest)
    PLAN.begin(costs)
    for folder, (script, _) in stages.items():
        what = script.__doc__.splitlines()[0].rstrip(".").partition(" (")[0]
        run.print(f"{PLAN.place(folder)}{Path(script.__file__).name}, {folder}: {what}")
    known = [folder for folder in costs if costs[folder]]
    time_ = f"about {words(PLAN.seconds(known))}{' in all' * (len(known) > 1)} on an idle core" if known else ""
    later = "the first steps will tell how long it takes" if len(known) < len(costs) else ""
    run.print("; ".join(filter(None, (time_, later, "Ctrl-C saves, and --resume goes on from there"))))


def ensure(folder, stage, config, run, **settings):
    """Runs an earlier stage (a module with Config and main) whose checkpoint is missing, or goes on with an unfinished
    one, and says so. settings: fields of the stage's Config."""
    if not is_finished(folder):
        begun = (Path(folder) / STATE).is_file()
        flags = "".join(f" {flag(*setting)}" for setting in settings.items())
        run.print(f"{PLAN.place(folder)}{folder} is not {'finished' if begun else 'there yet'}, so this runs first: "
                  f"python {Path(stage.__file__).name}{flags} --out {folder}{' --resume' * begun}")
        with PLAN.within():
            stage.main(stage.Config(out=folder, seed=config.seed, device=config.device, dtype=config.dtype, resume=begun,
                                    **settings))
        release(folder)
        run.print()


def finish(config, run, log, save):
    """After the loop: saves, and stops the script with one line where a signal ended the loop early. A complete run
    does not need its state (three times the weights) any more."""
    with signals(lambda *_: None, "SIGTERM", "SIGHUP"):  # in a moment it ends by itself
        save()
    if log.stopped:
        raise UserError(f"stopped before step {log.next} of {log.total}; saved in {config.out}: --resume goes on from there")
    if run.rank == 0:
        (Path(config.out) / STATE).unlink(missing_ok=True)


class Clock:
    """Where the time of a step goes: clock.lap("rollout") ends a part; clock.laps is {"rollout_s": seconds, ...}."""

    def __init__(self, run):
        self.run, self.laps, self.last = run, {}, time.perf_counter()

    def lap(self, name):
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()  # kernels are only queued when a call returns
        now = time.perf_counter()
        self.laps[f"{name}_s"], self.last = now - self.last, now


# ---- signals and the log ---------------------------------------------------------------------------------------------

@contextmanager
def signals(handler, *names):
    """These signals call the handler within the block. Who asked with nohup to hear no SIGHUP hears none; Windows has none."""
    before = {}
    with suppress(ValueError):  # not the main thread (a notebook, a test)
        for name in names:
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                before[number] = signal.signal(number, handler) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)



class Log:
    """The bar on the terminal and out/log.jsonl, a JSON object per line with its step. Written by process 0 only."""

    def __init__(self, config, run, first, steps, bar=("loss", "held_out", "grad_norm")):
        """bar: the numbers to look at while it runs; the first three of them that are measured stand on the bar."""
        self.config, self.run, self.next, self.total = config, run, first, steps
        self.shown, self.stopped = dict.fromkeys(bar), False
        self.path = Path(config.out) / "log.jsonl"
        if run.rank == 0:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in self.lines_before(first)))

    def lines_before(self, first):
        """The log's lines of steps that will not be done again; half a line, of a run that was killed, is none."""
        lines = self.path.read_text(errors="replace").splitlines() if first and self.path.is_file() else []
        for line in lines:
            with suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] < first:
                    yield line

    def steps(self):
        """Yields the steps still to do. Ctrl-C, SIGTERM and SIGHUP end it after the step in progress, so the script
        saves as it always does; a second Ctrl-C kills."""
        terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]

        def stop(signum, frame):
            self.stopped = True
            if signum == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            for terminal in terminals:  # one that was closed sends SIGHUP, and refuses what is printed from then on
                if not os.isatty(terminal):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

        self.bar = tqdm(total=self.total, initial=self.next, desc=self.config.out, disable=self.run.rank != 0,
                        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15)
        watch = Stopwatch()
        with signals(stop, "SIGINT", "SIGTERM", "SIGHUP"), self.bar:
            for step in range(self.next, self.total):
                yield step
                self.next = step + 1
                self.bar.update()
                if measured := watch.step():
                    seconds, share = measured
                    self.print(PLAN.estimate(self.config.out, seconds, self.total - self.next)
                               + busy(share if self.run.device.type == "cpu" else 1.0))
                self.stopped = bool(self.run.sum(self.stopped))
                if self.stopped:
                    break

    def write(self, step, **numbers):
        """Adds numbers to the log and to the bar."""
        if self.run.rank == 0:
            saved = "" if self.run.saved is None else f"; the checkpoint of step {self.run.saved} is kept"
            with on_disk(self.path, kept=lambda: saved), open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
            self.shown |= {name: f"{numbers[name]:.3g}" for name in self.shown if name in numbers}
            there = [(name, text) for name, text in self.shown.items() if text is not None]
            self.bar.set_postfix(dict(there[:3]), refresh=False)

    def print(self, text):
        """A line above the bar."""
        if self.run.rank == 0:
            tqdm.write(visible(text))

    def due(self, step, every):
        """After this step, is it time? Every `every` steps, and after the last one."""
        return bool(every) and ((step + 1) % every == 0 or step + 1 == self.total)


if __name__ == "__main__":
    no_command(__doc__)
