"""The command line from a dataclass: every field is a flag, its default the default, its comment the help.

    class Config(TrainConfig):
        lr: float = 1e-3  # highest learning rate          ->  --lr 1e-3

So a script's flags can be read in one place, in Python, and a test can build the same Config without a command line.
"""
import argparse
import dataclasses
import difflib
import inspect
import math
import re
import sys
import typing
from dataclasses import dataclass

from common.errors import UserError, end_politely


@dataclass
class TrainConfig:
    """The flags that all training scripts have in common; each script adds its own and changes defaults."""

    data: str = ""  # your file (.jsonl, .json, .csv, each optionally .gz); empty: the embedded island
    init: str = "out/base"  # start from this checkpoint folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
    out: str = "out/run"  # folder for the checkpoint and log.jsonl
    tokenizer: str = ""  # tiny, gpt2, a rank file or a folder; empty: the one in --init
    template: str = ""  # how conversations are written: chat, search, human or alpaca; empty: as --init says, else chat
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes
    epochs: float = 0.0  # passes over the data, where --steps is 0
    batch_size: int = 32  # sequences per optimizer step, over all processes
    micro_tokens: int = 16384  # padded tokens in one forward pass; less needs less memory and changes no result
    lr: float = 1e-3  # highest learning rate
    min_lr: float = 0.1  # the last learning rate as a share of --lr
    warmup: int = 20  # steps in which the learning rate rises from 0
    schedule: str = "cosine"  # cosine, linear or constant
    beta1: float = 0.9  # AdamW: decay of the gradient's mean
    beta2: float = 0.95  # AdamW: decay of the gradient's square
    eps: float = 1e-8  # AdamW: added to the root of the square, against division by almost nothing
    weight_decay: float = 0.1  # AdamW: on matrices only
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    dropout: str = "0"  # of the residual branches; two numbers such as 0.0,0.3 make a ramp over the layers
    lora_r: int = 0  # rank of low-rank adapters: only they are trained, and saved; 0: all weights
    lora_alpha: float = 32.0  # adapters are scaled by alpha / r
    lora_dropout: float = 0.0  # of the adapters' input
    lora_targets: str = "all"  # adapters on all linear layers of the blocks, or attention only
    nf4: bool = False  # frozen base weights in 4 bits (QLoRA); needs --lora-r
    checkpointing: bool = False  # recompute activations in the backward pass to save memory
    eval_every: int = 50  # steps between measurements on held-out rows
    save_every: int = 100  # steps between checkpoints that --resume can go on from
    seed: int = 0  # of everything random
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: str = "auto"  # of the matrix products: float32 or bfloat16; auto: bfloat16 where the hardware is fast at it
    resume: bool = False  # go on from the state in --out


AT_LEAST = {"steps": 0, "epochs": 0, "batch_size": 1, "micro_tokens": 1, "warmup": 0, "eval_every": 0, "save_every": 0,
            "weight_decay": 0, "clip": 0, "min_lr": 0, "lr": 0, "beta1": 0, "beta2": 0, "mix": 0,
            "lora_r": 0, "max_pairs": 0, "n_ranked": 1, "noise": 0, "temperature": 0, "top_k": 0, "max_new_tokens": 1, "sample": 0}
ONE_OF = {"schedule": ("cosine", "linear", "constant"), "dtype": ("auto", "float32", "bfloat16"),
          "template": ("", "chat", "search", "human", "alpaca"), "lora_targets": ("all", "attention"),
          "pairs": ("all", "top2", "best-worst", "random")}


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the whole usage first
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        raise UserError(f"{self.prog}: {message}" + (f" (did you mean {near[0]}?)" if near else " (--help lists the flags)"))


def parse(Config, recipes=None, argv=None):
    """The command line -> a Config. The fields are the flags (batch_size is --batch-size), their comments the help; a
    field of type list[str] takes the words that belong to no flag.

    recipes: {name: {field: value}}, chosen with --recipe NAME: only other defaults, so any flag overrides them.
    Raises UserError with one line for an unknown flag or an impossible value.
    """
    if argv is None:
        end_politely()
    main = sys.modules.get("__main__")
    parser = _Parser(program(Config.__module__), description=inspect.getdoc(sys.modules[Config.__module__]) or inspect.getdoc(main),
                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = _comments(Config)
    for field in dataclasses.fields(Config):
        flag, shown = flag_of(field.name), "" if field.default == "" else f" (default {field.default})"
        kind = typing.get_type_hints(Config)[field.name]
        if kind == list[str]:  # not a flag but the words beside the flags
            parser.add_argument(field.name, nargs="*", help=comments[field.name])
        elif kind is bool:
            parser.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, default=field.default,
                                help=comments[field.name])
        else:
            parser.add_argument(flag, dest=field.name, type=kind, default=field.default, metavar=kind.__name__.upper(),
                                help=(comments[field.name] + shown).replace("%", "%%"))
    if recipes:
        parser.add_argument("--recipe", choices=sorted(recipes), help="defaults of a published recipe; any flag overrides them")
        chosen, _ = parser.parse_known_args(argv)
        parser.set_defaults(**recipes.get(chosen.recipe, {}))
    values = vars(parser.parse_intermixed_args(argv))  # words may stand between flags
    values.pop("recipe", None)
    return check(Config(**values))


def flag_of(name):
    """A field's flag: batch_size is --batch-size; with_, which Python does not let be called with, is --with."""
    return "--" + name.rstrip("_").replace("_", "-")


def program(module):
    """How a module is started, for --help: sft.py, or python -m data.eli5 where it lies in a folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # with -m, __main__ still knows its name
    name = spec.name if module == "__main__" and spec else module
    return f"python -m {name}" if "." in name else None


def check(config):
    """Returns config, or raises UserError with the first impossible value. Scripts call it on configs they build too."""
    for name, value in dataclasses.asdict(config).items():
        flag = flag_of(name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: it must be a finite number")
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise UserError(f"{flag} {value}: it must be at least {AT_LEAST[name]}")
        if name in ONE_OF and value not in ONE_OF[name]:
            raise UserError(f"{flag} {value}: it must be one of {', '.join(filter(None, ONE_OF[name]))}")
        if name in ("beta1", "beta2", "min_lr") and value > 1 or name in ("beta1", "beta2") and value == 1:
            raise UserError(f"{flag} {value}: it must be below 1")
        if name == "top_p" and not 0 < value <= 1:
            raise UserError(f"{flag} {value}: it must be above 0 and at most 1")
    if not isinstance(config, TrainConfig):
        return config
    dropout_of(config)
    if not 0 <= config.lora_dropout < 1:
        raise UserError(f"--lora-dropout {config.lora_dropout}: it must be from 0 to below 1")
    if config.nf4 and not config.lora_r:
        raise UserError("--nf4 freezes the weights, so something else has to learn: give --lora-r 16 too")
    return config


def _comments(Config):
    """{field: the comment behind it}, from the source of the class and its bases."""
    found = {}
    for cls in reversed(Config.__mro__[:-1]):
        found |= dict(re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(Config)}


def dropout_of(config):
    """The --dropout text -> a number, or (bottom, top) for a ramp."""
    try:
        numbers = tuple(float(x) for x in config.dropout.split(","))
        if len(numbers) in (1, 2) and all(0 <= x < 1 for x in numbers):
            return numbers[0] if len(numbers) == 1 else numbers
    except ValueError:
        pass
    raise UserError(f"--dropout {config.dropout}: give one number from 0 to below 1, or two with a comma between (bottom,top)")
