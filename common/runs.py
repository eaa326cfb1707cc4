"""Is it the same run? What --resume compares, which folders a run reads and so must not write to, and what lies where
it writes. A run is known by its flags, a dataclass (common/flags.py), and by what is in the files and folders that they
name."""
import contextlib
import datetime
import inspect
import json
import os
import re
import shlex
import zlib
from dataclasses import fields
from pathlib import Path

from common.disk import claim, settle
from common.errors import UserError
from common.flags import flag_of
from common.hub import MODEL, RECORD, STATE, TOKENIZER, open_weights

# What may change on the way: where a run is and how fast (it rounds in another way), what it prints, when it saves.
# steps and epochs are compared as the number of steps that they make.
MAY_CHANGE = ("out", "resume", "overwrite", "device", "dtype", "steps", "epochs", "micro_tokens", "checkpointing",
              "eval_every", "save_every", "sample_every", "watch_every", "plot")


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
        for path in [place] if os.path.isfile(place) else within:
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
            there = os.path.exists(place) and os.path.exists(out)  # unlike Path's, they know names that are too long
            if place == out or there and place.samefile(out):  # not all disks know case
                raise UserError(f"{flag(name, value)} reads {place}, which is --out, so the run would overwrite what "
                                "it starts from: give another --out")


def script_of(config):
    return Path(inspect.getfile(type(config))).name


def found(folder):
    """The checkpoint in a folder -> (is it a reward model's?, what it is, by which script, steps, date), or None."""
    there = [Path(folder, name) for name in (STATE, "config.json", "adapter_config.json")
             if os.path.isfile(Path(folder, name))]
    if not there:
        return None
    try:
        record = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
        script, step, steps = (record[key] for key in ("script", "step", "steps"))
    except (OSError, ValueError, KeyError, TypeError):  # of no script here
        script = step = steps = None
    marks = script == "reward.py"
    adapter = there[0].name.startswith("adapter")
    with contextlib.suppress(UserError, OSError, ValueError, KeyError, TypeError):
        marks |= not script and "score.weight" in (json.loads(there[0].read_text(encoding="utf-8"))["nanoalign_extra"]
                                                   if adapter else open_weights(Path(folder))[1])
    date = f"{datetime.datetime.fromtimestamp(there[0].stat().st_mtime):%Y-%m-%d %H:%M}"
    if there[0].name == STATE:
        return marks, f"an unfinished run ({f'{script}, step {step} of {steps}, ' * bool(script)}{date})"
    kind = "a reward model" if marks else "an adapter" if adapter else "a model"
    return marks, f"{kind} ({f'{script}, {step} steps, ' * bool(script)}{date})"


def refuse_replacing(config):
    """Raises UserError where --out holds a checkpoint and neither --resume nor --overwrite says what becomes of it, or
    where it is of another kind, which no flag replaces."""
    settle(config.out)
    script, there = script_of(config), found(config.out)
    if there and not getattr(config, "resume", False):
        marks, words = there
        if marks != (script == "reward.py"):
            made = "reward model" if script == "reward.py" else "model that answers"
            raise UserError(f"--out {config.out} holds {words}, and {script} makes a {made}: choose another --out, or "
                            "remove that folder first")
        if not config.overwrite:
            raise UserError(f"--out {config.out} holds {words}: --overwrite replaces it, --resume goes on with a run "
                            "that was stopped, another --out keeps it")


def claim_out(config):
    """What a run does first: makes --out its own. Raises UserError where that would cost anybody anything."""
    if not config.out.strip():
        raise UserError("--out is empty: name a folder")
    refuse_overwriting(config)
    refuse_replacing(config)
    claim(config.out)


def identity(config, steps):
    """What a run is -> {"settings": {flag: (value, checksum of what it names)}, "command": its start, without
    --out}."""
    script = script_of(config)
    changed = [flag(f.name, getattr(config, f.name)) for f in fields(config)
               if f.name not in ("out", "resume", "overwrite") and getattr(config, f.name) != f.default]
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
