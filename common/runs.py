"""Is it the same run? What --resume compares, and which folders a run reads and so must not write to. A run is known by
its flags, a dataclass (common/flags.py), and by what is in the files and folders that they name."""
import contextlib
import inspect
import json
import re
import shlex
import zlib
from dataclasses import fields
from pathlib import Path

from common.errors import UserError
from common.flags import flag_of
from common.hub import MODEL, TOKENIZER

# What may change on the way: where a run is and how fast (it rounds in another way), what it prints, when it saves.
# steps and epochs are compared as the number of steps that they make.
MAY_CHANGE = ("out", "resume", "device", "dtype", "steps", "epochs", "micro_tokens", "checkpointing", "eval_every",
              "save_every", "sample_every", "plot")


def flag(name, value):
    """batch_size, 8 -> --batch-size 8; the script's own name stays."""
    if isinstance(value, bool):
        return flag_of(name if value else f"no_{name}")
    return value if name == "script" else f"{flag_of(name)} {shlex.quote(str(value))}"


def places(value):
    """A flag's value (a path, a weighted sum of folders) -> the paths that it may name, and bases of adapters there."""
    parts = dict.fromkeys([value, *re.split(r"[+*]", value)])
    found = [Path(part.strip()).resolve() for part in parts if part.strip()]
    for place in found:  # it grows on the way
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no adapter, or none that can be loaded
            base = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
            bases = [Path(base).resolve(), (place / base).resolve()]
            found += [path for path in bases if path.is_dir() and path not in found]
    return found


def checksum(value):
    """Of the file that a flag's value names, or of those that make a folder a model -> a number; None where none is."""
    crc = None
    for place in places(value):
        within = sorted({path for pattern in MODEL + TOKENIZER for path in place.glob(pattern)})
        for path in [place] if place.is_file() else within:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    crc = zlib.crc32(chunk, crc or 0)
    return crc


def refuse_overwriting(config):
    """Raises UserError where --out is a folder that the run reads: the reference, an adapter's base, or what --resume
    starts from would be half-trained weights. One rule for every script, though some could bear it."""
    out = Path(config.out).resolve()
    for name, value in vars(config).items():
        for place in places(value) if name != "out" and isinstance(value, str) else ():
            if place == out or place.exists() and out.exists() and place.samefile(out):  # not all disks know case
                raise UserError(f"{flag(name, value)} reads {place}, which is --out, so the run would overwrite what "
                                "it starts from: give another --out")


def identity(config, steps):
    """What a run is -> {"settings": {flag: (value, checksum of what it names)}, "command": its start, without
    --out}."""
    script = Path(inspect.getfile(type(config))).name
    changed = [flag(f.name, getattr(config, f.name)) for f in fields(config)
               if f.name not in ("out", "resume") and getattr(config, f.name) != f.default]
    settings = {name: (value, checksum(value) if isinstance(value, str) else None)
                for name, value in vars(config).items() if name not in MAY_CHANGE}
    return {"settings": settings | {"script": (script, None), "steps": (steps, None)},
            "command": " ".join(["python", script, *changed])}


def differences(before, now):
    """Two "settings" -> ["--batch-size 32 (now --batch-size 16)", ...]. A file that has moved is the same file; of
    another script the flags are others too, and are not listed."""
    def same(old, new):
        return old[0] == new[0] if None in (old[1], new[1]) else old[1] == new[1]

    def words(name, old, new):
        return flag(name, old) + (f" (now {flag(name, new)})" if old != new else ", which has changed since")

    names = ["script"] if before["script"] != now["script"] else before
    return [words(name, before[name][0], now[name][0]) for name in names if not same(before[name], now[name])]
