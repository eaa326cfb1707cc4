"""Pretraining: a base model learns to predict the next token of plain text (Radford et al. 2019, GPT-2).

    L = -mean_t log p(x_{t+1} | x_1 ... x_t)

The blocks' matrices are trained by Muon (trainer.py), all else by AdamW: on the island that takes half the steps.

    python pretrain.py                     the tiny base model on the island's plain text (out/base)
    python pretrain.py --family llama      the same as a Llama (llama.py)
    python pretrain.py --data my.txt       the same on your own text
    python pretrain.py --data my.txt --init gpt2       goes on from the public weights
"""
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from common.errors import UserError
from common.flags import Bounds, Positive, Share, TrainConfig, dropout_of, parse

import torch

import trainer
from checkpoints import load, save_checkpoint
from common.waits import bar
from common.hub import DEEPEST, check_room
from data import files
from data.tokenizer import get_tokenizer
from island.world import Island
from llama import Llama, like_gpt
from model import GPT, GPTConfig, resize_vocab, summed_logps

# ---- the loss --------------------------------------------------------------------------------------------------------

def next_token_loss(model, ids):
    """-mean log p(ids[:, 1:]) over all positions: ids (B, T) -> scalar. What pretraining minimises."""
    return -summed_logps(model, ids, torch.ones_like(ids)) / ids[:, 1:].numel()


def text_stream(documents, tok):
    """Documents -> one long row of ids, each document after an end-of-text token (N,)."""
    return torch.tensor([i for text in documents for i in tok.document(text)])


def text_windows(stream, rows, length, seed):
    """Random windows of the stream: (rows, length). The same seed gives the same windows."""
    starts = torch.randint(len(stream) - length + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return stream[starts[:, None] + torch.arange(length)]


def pretrain_step(model, stream, rows, step, config, run, weight=1.0):
    """Adds the gradient of `weight` times the loss on the step's windows of the stream -> that loss, this process's
    share."""
    length, total = min(model.config.block_size + 1, len(stream)), 0.0
    windows = run.share(text_windows(stream, rows, length, seed=config.seed * 1_000_003 + step))  # (rows, length)
    for ids in windows.split(max(1, config.micro_tokens // length)) if len(windows) else ():
        with run.autocast():
            loss = weight * next_token_loss(model, ids.to(run.device)) * len(ids) / rows
        loss.backward()
        total += loss.item()
    return total


@torch.inference_mode()
def text_loss(model, stream, run, rows=32):
    """Mean loss per token over a held-out stream, cut into whole contexts."""
    length = min(model.config.block_size + 1, len(stream))
    windows = stream[:len(stream) // length * length].view(-1, length)  # (contexts, length)
    model.eval()
    with run.autocast():
        losses = [next_token_loss(model, part.to(run.device)).item() * len(part)
                  for part in bar(windows.split(rows), "held-out loss")]
    model.train()
    return sum(losses) / len(windows)


# ---- plain text beside another loss ----------------------------------------------------------------------------------

def load_mix(config, tok, say, tales=0.0):
    """The plain text beside the conversations as one stream of ids, or None. tales: as in Config."""
    if config.mix and config.data and not config.mix_data:
        say("no plain text beside the conversations: name some with --mix-data to keep what the base model knows")
        return None
    if not config.mix:
        return None
    if not config.mix_data:
        return text_stream(Island().plain_text(10_000, tales=tales), tok)
    rows, report = files.load(config.mix_data, "text")
    say(report)
    return text_stream([row["text"] for row in rows], tok)


def mix_step(model, text, step, config, run):
    """Adds the gradient of --mix times the loss on plain text (InstructGPT's PPO-ptx idea, here for SFT)."""
    return pretrain_step(model, text, config.mix_rows, step, config, run, weight=config.mix)


# ---- training ------------------------------------------------------------------------------------------------------------

NEEDS, COSTS = {}, (0.25, 300, 10)  # what must be there before; what a run costs (common/waits.py)


@dataclass
class Config(TrainConfig):
    lora_r: ClassVar[int] = 0  # all weights learn: adapters come with sft.py
    lora_alpha: ClassVar[float] = 0.0
    lora_dropout: ClassVar[float] = 0.0
    lora_targets: ClassVar[str] = ""
    nf4: ClassVar[bool] = False
    data: str = ""  # a text file, or .jsonl with {"text"} rows; empty: the island's plain text
    init: str = ""  # go on from this checkpoint; empty: start from random weights
    out: str = "out/base"  # folder for the checkpoint and log.jsonl
    tokenizer: str = "tiny"  # tiny, gpt2, a rank file or a folder
    steps: int = 300  # optimizer steps
    batch_size: int = 16  # windows of --block-size tokens per optimizer step
    lr: float = 1e-2  # highest learning rate
    warmup: int = 40  # steps in which the learning rate rises from 0
    family: Literal["gpt2", "llama"] = "gpt2"  # without --init: a GPT (model.py), or a Llama of its size (llama.py)
    n_layer: Annotated[int, Bounds(0, DEEPEST)] = 4  # blocks
    n_head: Annotated[int, Bounds(1, 2 ** 12)] = 4  # attention heads
    n_embd: Annotated[int, Bounds(1, 2 ** 16)] = 128  # width
    block_size: Annotated[int, Bounds(2, 2 ** 20)] = 128  # context length
    muon: bool = True  # Muon (trainer.py) for the blocks' matrices; else AdamW for all, which needs twice the steps
    documents: Positive = 20000  # the island: documents of its plain text
    tales: Share = 0.0  # the island: share of them that is made up and told twice; 0.5 and 900 steps teach it to read


def load_text(config, tok):
    """-> training and held-out token streams."""
    if config.data:
        rows, report = files.load(config.data, "text")
        print(report)
        train, held = files.hold_out_text(rows, config.seed, say=print)
        train, held = [row["text"] for row in train], [row["text"] for row in held]
    else:
        train, held = (Island().plain_text(n, seed, config.tales) for n, seed in ((config.documents, 1), (400, 9)))
    return text_stream(train, tok), text_stream(held, tok)


def new_model(config, vocab_size):
    """-> a network with random weights."""
    network, shape = {"gpt2": (GPT, GPTConfig), "llama": (Llama, like_gpt)}[config.family]
    try:
        shape = shape(config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd,
                      dropout=dropout_of(config), checkpointing=config.checkpointing)
        with torch.device("meta"):
            size = sum(p.numel() for p in network(shape).parameters())
    except ValueError as error:
        raise UserError(f"--n-embd {config.n_embd} --n-head {config.n_head}: {error}")
    check_room(16 * size, f"{size:,} parameters with gradients and two moments each need", "take a lower --n-embd or --n-layer")
    return network(shape)


def main(config):
    run = trainer.start(config)
    trainer.prepare(config, run)
    tok = get_tokenizer(config.tokenizer or config.init, config.template or None)
    train, held = load_text(config, tok)
    torch.manual_seed(config.seed)
    if config.init:
        model = load(config.init, dropout=dropout_of(config), checkpointing=config.checkpointing)
        resize_vocab(model, tok.vocab_size)
    else:
        model = new_model(config, tok.vocab_size)
    model.to(run.device).train()
    length = min(model.config.block_size + 1, len(train))
    steps = config.steps or math.ceil(config.epochs * len(train) / (config.batch_size * length))
    run.print(f"pretraining {sum(p.numel() for p in model.parameters()):,} parameters on {len(train):,} tokens")

    optimizer = (trainer.muon if config.muon else trainer.adamw)(model, config)
    first = trainer.load_state(config, run, steps, model, optimizer)
    log = trainer.Log(config, run, first, steps)
    for step in log.steps():
        trainer.begin_step(step, steps, optimizer, config, run)
        loss = pretrain_step(model, train, config.batch_size, step, config, run)
        log.write(step, loss=run.sum(loss), **trainer.update(model, optimizer, config, run, step))
        if log.due(step, config.eval_every):
            log.write(step, held_out=text_loss(model, held[:32 * length], run))  # a part, in one pass; the whole at the end
        if log.due(step, config.save_every):
            save_checkpoint(config, run, step + 1, steps, model, tok, optimizer)
    trainer.finish(config, run, log, lambda: save_checkpoint(config, run, log.next, steps, model, tok, optimizer))
    run.print(f"held-out loss {text_loss(model, held, run):.3f}; the base model is in {config.out}\n"
              f"next: python sft.py --init {config.out}\n      python -m common.plots {config.out}    its log as a picture")


if __name__ == "__main__":
    main(parse(Config))
