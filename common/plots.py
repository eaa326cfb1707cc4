"""Pictures: one set-up for every figure, one colour a checkpoint, shares from 0 to 100 %.

    python -m common.plots out/sft out/dpo                     draws any logs over each other
    python -m common.plots out/ppo out/ppo-no-penalty --names score,gold --out ppo.png

matplotlib is optional: what draws unasked looks with `available`.
"""
import importlib.util
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.disk import on_disk
from common.flags import parse

COLORS = {"base": "#7f7f7f", "sft": "#0072b2", "sft-community": "#56b4e9", "reward": "#cc79a7", "dpo": "#e69f00",
          "ppo": "#009e73", "ppo-no-penalty": "#d55e00"}  # told apart by the colour-blind too (Okabe and Ito 2008)
OTHERS = ("#332288", "#aa4499", "#117733", "#882255", "#999933", "#6699cc")
NAMES = ("loss", "held_out", "accuracy", "held_out_loss", "held_out_accuracy", "margin", "score", "gold", "kl",
         "entropy", "length", "ended", "clipfrac", "explained_variance", "grad_norm")  # of a log, in the order in which they are looked at
SHARES = {"accuracy", "held_out_accuracy", "ended", "clipfrac"}


def color(folder):
    """A checkpoint's colour, the same in every picture: by the name of its folder."""
    name = Path(folder).name
    return COLORS.get(name) or OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]


def available():
    return importlib.util.find_spec("matplotlib") is not None


def needed(flag):
    """Called first where somebody asks for a picture: raises UserError where matplotlib is missing."""
    if not available():
        raise UserError(f"{flag} needs matplotlib: pip install matplotlib, or leave the flag out")


def figure(columns=1, rows=1, width=4.2, height=3.2):
    """-> a figure, and its panels in reading order, each of width by height inches."""
    from matplotlib.figure import Figure  # not pyplot: that one looks for a display
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False).flatten()


def share_axis(axes):
    """Shares, 0 to 1, on an axis from 0 to 100 %: what is 3 % looks small in every picture."""
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def save(made, path):
    """Writes the figure into a file whose ending says how: .png, .pdf, .svg."""
    try:
        with on_disk(path):
            made.savefig(path, dpi=110)
    except ValueError as error:  # an ending that matplotlib does not know
        raise UserError(f"{path} could not be drawn ({error}): give it a name as plot.png")


# ---- logs ------------------------------------------------------------------------------------------------------------

def read_log(folder):
    """FOLDER/log.jsonl -> its lines. Raises UserError where there is none."""
    path = Path(folder) / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise UserError(f"{path} is not there: name a folder that a training script has written, as in out/sft")
    except ValueError:
        raise UserError(f"{path} is damaged: it needs a JSON object per line")


def finding(values, share=False):
    """What a curve says -> "rises from 1.2 to 3.4": the means of its first and last tenth."""
    n = max(1, len(values) // 10)
    first, last = sum(values[:n]) / n, sum(values[-n:]) / n
    texts = [f"{value:.0%}" if share else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
             for value in (first, last)]
    if texts[0] == texts[1]:
        return f"stays at {texts[0]}"
    return f"{'rises' if last > first else 'falls'} from {texts[0]} to {texts[1]}"


def titled(axes, label, findings):
    """A title that states the finding: one line, or one a checkpoint."""
    lines = [label if len(findings) > 1 else f"{label} {next(iter(findings.values()), '')}"]
    if len(findings) > 1:
        lines += [f"{name} {text}" for name, text in findings.items()]
    axes.set_title("\n".join(lines), fontsize=9)


def draw_logs(logs, names, path):
    """Panels, one a number, with a curve a log: each step, and the mean of some steps. logs: {folder: lines}."""
    columns = min(3, len(names))
    made, panels = figure(columns, -(-len(names) // columns))
    for name, axes in zip(names, panels):
        findings = {}
        for folder, lines in logs.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                steps, values = zip(*points)
                window = min(20, max(1, len(values) // 10))
                means = [sum(values[max(0, i - window + 1):i + 1]) / min(window, i + 1) for i in range(len(values))]
                axes.plot(steps, values, linewidth=0.5, alpha=0.35, color=color(folder))
                axes.plot(steps, means, color=color(folder), label=folder)
                findings[folder] = finding(values, name in SHARES)
        axes.set_xlabel("step")
        titled(axes, name.replace("_", " "), findings)
        if name in SHARES:
            share_axis(axes)
    panels[0].legend(fontsize=7)
    for axes in panels[len(names):]:
        axes.remove()
    save(made, path)


def draw_over_kl(logs, path):
    """Reward and gold over the square root of the KL from the SFT model (Gao et al. 2023), a panel each, a point an
    iteration of ppo.py. logs: {folder: lines}."""
    labels = {"score": "reward", "gold": "gold mark"}
    names = [name for name in labels if all(name in line for lines in logs.values() for line in lines[:1])]
    made, panels = figure(len(names))
    for axes, name in zip(panels, names):
        for folder, lines in logs.items():
            roots, values = [max(0.0, line["kl"]) ** 0.5 for line in lines], [line[name] for line in lines]
            axes.plot(roots, values, "o-", markersize=3, linewidth=0.5, color=color(folder), label=Path(folder).name)
        axes.set_xlabel("square root of a response's KL from SFT")
        titled(axes, labels[name], {Path(folder).name: finding([line[name] for line in lines])
                                    for folder, lines in logs.items()})
    panels[0].legend(fontsize=7)
    save(made, path)


@dataclass
class Config:
    folders: list[str] = field(default_factory=list)  # folders with a log.jsonl, drawn over each other
    names: str = ""  # numbers of the logs, with commas between; empty: the ones to look at first
    out: str = "logs.png"  # the picture: .png, .pdf or .svg


def main(config):
    if not config.folders:
        raise UserError("name the folders whose logs are drawn, as in python -m common.plots out/sft out/dpo")
    logs = {folder: read_log(folder) for folder in config.folders}
    there = {name: None for lines in logs.values() for line in lines for name, value in line.items()
             if isinstance(value, (int, float))}
    names = [name.strip() for name in config.names.split(",") if name.strip()] or [name for name in NAMES if name in there]
    if wrong := [name for name in names if name not in there]:
        raise UserError(f"--names {config.names}: no log has {wrong[0]}; there are {', '.join(there)}")
    needed("python -m common.plots")
    draw_logs(logs, names, config.out)
    print(f"the picture is {config.out}")


if __name__ == "__main__":
    main(parse(Config))
