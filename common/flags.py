"""The command line from a dataclass: every field is a flag, its default the default, its comment the help.

    class Config(TrainConfig):
        lr: Amount = 1e-3  # highest learning rate          ->  --lr 1e-3, at least 0
        epochs: ClassVar[float] = 0.0  # an inherited flag that this script has no use for is taken back

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
from typing import Annotated, Literal

from common.errors import UserError, end_politely


@dataclass(frozen=True)
class Bounds:
    """The numbers that a flag may have: from low to high, each of the two only where it is `included`."""

    low: float
    high: float = math.inf
    included: str = "both"  # low, high or both


Count = Annotated[int, Bounds(0, 10 ** 9)]
Positive = Annotated[int, Bounds(1, 10 ** 9)]
Seed = Annotated[int, Bounds(0, 2 ** 32 - 1)]
Number = Annotated[float, Bounds(-1e6, 1e6)]
Amount = Annotated[float, Bounds(0, 1e6)]
Share = Annotated[float, Bounds(0, 1)]
Probability = Annotated[float, Bounds(0, 1, "high")]
Decay = Annotated[float, Bounds(0, 1, "low")]
DType = Literal["auto", "float32", "bfloat16"]
Template = Literal["", "own", "chat", "search", "human", "alpaca", "chatml", "llama3", "llama2", "zephyr"]


@dataclass
class TrainConfig:
    """The flags that all training scripts have in common; each script adds its own and changes defaults."""

    data: str = ""  # your file (.jsonl, .json, .csv, each optionally .gz); empty: the embedded island
    init: str = "out/base"  # start from this checkpoint folder, gpt2 ... gpt2-xl, or owner/model on the Hugging Face hub
    out: str = "out/run"  # folder for the checkpoint and log.jsonl
    tokenizer: str = ""  # tiny, gpt2, a rank file or a folder; empty: the one in --init
    template: Template = ""  # how conversations are written (data/formats.py); empty: as --init says, else chat
    steps: Count = 0  # optimizer steps; 0: as many as --epochs makes
    epochs: Amount = 0.0  # passes over the data, where --steps is 0
    batch_size: Positive = 32  # sequences per optimizer step, over all processes
    micro_tokens: Positive = 16384  # padded tokens in one forward pass; less needs less memory and changes no result
    lr: Amount = 1e-3  # highest learning rate
    min_lr: Share = 0.1  # the last learning rate as a share of --lr
    warmup: Count = 20  # steps in which the learning rate rises from 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # how the rate falls: cosine, linear or constant
    beta1: Decay = 0.9  # AdamW: decay of the gradient's mean
    beta2: Decay = 0.95  # AdamW: decay of the gradient's square
    eps: Amount = 1e-8  # AdamW: added to the root of the square, against division by almost nothing
    weight_decay: Amount = 0.1  # AdamW: on matrices only
    clip: Amount = 1.0  # largest norm of the gradient; 0: no clipping
    dropout: str = "0"  # of the residual branches; two numbers such as 0.0,0.3 make a ramp over the layers
    lora_r: Annotated[int, Bounds(0, 2 ** 12)] = 0  # rank of low-rank adapters: only they are trained, and saved; 0: all weights
    lora_alpha: Amount = 32.0  # adapters are scaled by alpha / r
    lora_dropout: Decay = 0.0  # of the adapters' input
    lora_targets: str = "all"  # adapters on all linear layers of the blocks, on attention's, or by name, as in q_proj
    nf4: bool = False  # frozen base weights in 4 bits (QLoRA); needs --lora-r
    checkpointing: bool = False  # recompute activations in the backward pass to save memory
    eval_every: Count = 50  # steps between measurements on held-out rows
    save_every: Count = 100  # steps between checkpoints that --resume can go on from
    seed: Seed = 0  # of everything random
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: DType = "auto"  # of the matrix products: float32 or bfloat16; auto: bfloat16 where hardware is fast at it
    resume: bool = False  # go on from the state in --out
    overwrite: bool = False  # replace what an earlier run has left in --out


FIRST = ("data", "init", "out", "steps", "lr", "resume")  # what training scripts are asked for most, first in --help
GROUPS = {"data": ("data", "mix_data", "merge_system", "max_tokens", "tokenizer", "template", "examples", "sample", "file",
                   "n_prompts", "documents", "score", "pairs", "max_pairs"),
          "model": ("init", "family", "n_layer", "n_head", "n_embd", "block_size", "dropout", "reward", "reference",
                    "system"),
          "training": (),  # all else of a training script
          "adapters": ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "nf4"),
          "machine": ("micro_tokens", "checkpointing", "seed", "device", "dtype", "resume", "overwrite", "save_every")}


def group_of(name, comment, training):
    """The heading in --help under which a flag stands, where it is none of the first."""
    found = next((group for group, names in GROUPS.items() if name in names), "")
    return "data" if comment.startswith(ISLAND) else found or ("training" if training else "more")


ISLAND = "the island: "  # a comment that begins so is of a flag that says nothing about your own file


class Parser(argparse.ArgumentParser):
    """argparse's, of which a mistake is one sentence."""

    def error(self, message):  # argparse would print the whole usage first
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        if "expected one argument" in message:
            hint = "a value that begins with - is written behind an equal sign: --flag=-value"
        raise UserError(f"{self.prog}: {message} ({hint})")


NAMED = set()  # the flags of the command that is running; empty: none was parsed


def advice(flag, words):
    """Advice that names a flag, for commands that have it; "" for others."""
    return words if not NAMED or flag in NAMED else ""


def parse(Config, recipes=None, argv=None):
    """The command line -> a Config. The fields are the flags (batch_size is --batch-size), their comments the help; a
    field of type list[str] takes the words that belong to no flag.

    recipes: {name: {field: value}}, chosen with --recipe NAME: only other defaults, so any flag overrides them.
    Raises UserError with one line for an unknown flag or an impossible value.
    """
    if argv is None:
        end_politely()
    main = sys.modules.get("__main__")
    description = inspect.getdoc(sys.modules[Config.__module__]) or inspect.getdoc(main)
    parser = Parser(program(Config.__module__), "%(prog)s [flags]", description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Config)
    NAMED.clear()
    NAMED.update(parser._option_string_actions)
    if recipes:
        parser.add_argument("--recipe", choices=sorted(recipes),
                            help="defaults of a published recipe; any flag overrides them")
        chosen, _ = parser.parse_known_args(argv)
        parser.set_defaults(**recipes.get(chosen.recipe, {}))
    values = vars(parser.parse_intermixed_args(argv))  # words may stand between flags
    values.pop("recipe", None)
    return check(Config(**values))


def add_flags(parser, Config):
    """Every field as a flag, in groups: those that are asked for most first."""
    comments, training = _comments(Config), issubclass(Config, TrainConfig)
    names = [field.name for field in dataclasses.fields(Config)]
    first = FIRST if training else [name for name in names if name not in GROUPS["machine"]][:6]
    headings = ["the first flags to know" if len(names) > 6 else "flags", *GROUPS, "more"]
    groups = {heading: parser.add_argument_group(heading) for heading in headings}  # one without flags is not shown
    for field in sorted(dataclasses.fields(Config), key=lambda field: (*first, field.name).index(field.name)):
        group = groups[headings[0] if field.name in first else group_of(field.name, comments[field.name], training)]
        flag, shown = flag_of(field.name), "" if field.default == "" else f" (default {field.default})"
        kind = typing.get_type_hints(Config)[field.name]
        kind = str if typing.get_origin(kind) is Literal else kind
        if kind == list[str]:  # not a flag but the words beside the flags
            group.add_argument(field.name, nargs="*", help=comments[field.name])
        elif kind is bool:
            group.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, default=field.default,
                               help=comments[field.name])
        else:
            group.add_argument(flag, dest=field.name, type=kind, default=field.default, metavar=kind.__name__.upper(),
                               help=(comments[field.name] + shown).replace("%", "%%"))


def flag_of(name):
    """A field's flag: batch_size is --batch-size; with_, which Python does not let be called with, is --with."""
    return "--" + name.rstrip("_").replace("_", "-")


def program(module):
    """How a module is started, for --help: sft.py, or python -m data.eli5 where it lies in a folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # with -m, __main__ still knows its name
    name = spec.name if module == "__main__" and spec else module
    return f"python -m {name}" if "." in name else None


def out_of_bounds(value, kind):
    """What a value has to be by its type, in words; "" where it is that."""
    if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
        return "one of " + ", ".join(filter(None, typing.get_args(kind)))
    for bounds in getattr(kind, "__metadata__", ()):
        low, high = (bounds.included in (side, "both") for side in ("low", "high"))
        if value < bounds.low or value == bounds.low and not low:
            return f"{'at least' if low else 'above'} {bounds.low:,}"
        if value > bounds.high or value == bounds.high and not high:
            return f"{'at most' if high else 'below'} {bounds.high:,}"
    return ""


def bounded(kind):
    """Such a kind of number as argparse wants it, for parsers that are made by hand."""
    def read(text):
        value = typing.get_args(kind)[0](text)
        if fault := "a finite number" if not math.isfinite(value) else out_of_bounds(value, kind):
            raise argparse.ArgumentTypeError(f"{text}: it must be {fault}")
        return value
    read.__name__ = typing.get_args(kind)[0].__name__
    return read


def check(config):
    """Returns config, or raises UserError with the first impossible value. Also for configs that scripts build."""
    Config, comments = type(config), _comments(type(config))
    # of the bases too: another default keeps its bounds
    kinds = [typing.get_type_hints(cls, include_extras=True) for cls in Config.__mro__[:-1]]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), flag_of(field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: it must be a finite number")
        for kind in [hints[field.name] for hints in kinds if field.name in hints]:
            fault = out_of_bounds(value, kind)
            if fault:
                raise UserError(f"{flag} {value}: it must be {fault}")
        if comments[field.name].startswith(ISLAND) and config.data and value != field.default:
            raise UserError(f"{flag} is about the embedded island, but --data names your own file: leave one out")
    if isinstance(config, TrainConfig):
        dropout_of(config)
        if config.resume and config.overwrite:
            raise UserError("--resume goes on with the run in --out, --overwrite replaces it: leave one out")
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
    raise UserError(f"--dropout {config.dropout}: give one number from 0 to below 1, or two (bottom,top) as in 0,0.3")
