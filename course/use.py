"""A real script with a student's function in the place of ours, and its curves beside ours.

    python -m course.use NAME FILE SCRIPT FLAGS...      what learn.py use starts, twice; FILE is - for ours
"""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from common import plots
from common.disk import replacing
from common.errors import UserError, end_politely
from common.flags import flag_of, parse
from common.tables import table
from course.check import ROOT, check, exercise, file_of
from course.child import line_of, load, said
from course.put import kernels_off, put

CURVES = ("loss", "score", "kl", "held_out", "held_out_loss", "accuracy", "margin", "policy_loss", "value_loss",
          "clipfrac", "gold", "beta", "lr", "grad_norm")  # of a log, the first of them where nothing differs


def read(script, argv):
    """A script's name and its flags -> its module and its Config."""
    path = ROOT / script
    if not (path.suffix == ".py" and path.parent == ROOT and path.is_file()):
        raise UserError(f"{script!r} is no script of this project: name one as in dpo.py --steps 50")
    module = importlib.import_module(path.stem)
    if not hasattr(module, "Config"):
        raise UserError(f"{script} has no flags that could be read: use {', '.join(sorted(ALL))}")
    sys.argv = [script, *argv]
    return module, parse(module.Config, getattr(module, "RECIPES", None), argv)


ALL = ("pretrain.py", "sft.py", "reward.py", "dpo.py", "ppo.py", "generate.py")


def refuse(chosen, script, config):
    """Raises UserError where the script never calls the function, or asks for what the minimal signature lacks."""
    if chosen.put is None or not chosen.scripts:
        raise UserError(f"no script calls {chosen.name}: it can be checked, but not used")
    if script not in chosen.scripts:
        raise UserError(f"{script} does not call {chosen.name}: use it with {', '.join(chosen.scripts)}")
    for field, value in chosen.needs.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if getattr(config, field, value) not in allowed and hasattr(config, field):
            flag = flag_of(field) + ("" if allowed[0] is True else f" {' or '.join(map(str, allowed))}")
            raise UserError(f"{chosen.name} as you wrote it is for {flag} only, and this command has "
                            f"{getattr(config, field)!r}")


def use(name, command, folder="my"):
    """Runs the script with ours, unless that was done, and with the student's function; draws the curves of both."""
    chosen, file = exercise(name), file_of(name, folder)
    if not command:
        raise UserError(f"name a script and its flags, as in python learn.py use {name} -- "
                        f"{(chosen.scripts or ALL)[0]} --steps 50")
    if "--out" in command:
        raise UserError("--out is chosen here, a folder for yours and one for ours: leave it out")
    verdict = check(name, folder)
    refuse(chosen, command[0], read(command[0], command[1:])[1])
    print(f"{name}: {verdict.sentence}" + ("" if verdict.passed else "\nIt is used all the same: see what it does."))
    folders = {who: Path("out/mine") / name / who for who in ("ours", "mine")}
    for who, out in folders.items():
        kept = out / "command.json"
        if who == "ours" and kept.is_file() and json.loads(kept.read_text()) == command:
            print(f"ours: {out} is there from an earlier run")
            continue
        print(f"\n{who}: {' '.join(command)}\n", flush=True)
        kept.unlink(missing_ok=True)
        start([name, str(file.resolve()) if who == "mine" else "-", *command, "--out", str(out)])
        if out.is_dir():
            with replacing(kept) as temporary:
                temporary.write_text(json.dumps(command))
    logs = [out / "log.jsonl" for out in folders.values()]
    if all(log.is_file() for log in logs):
        print(compare(*logs, logs[0].parents[1] / "curves.png"))


def start(arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # out/ is in the present folder
    command = [sys.executable, "-m", "course.use", *arguments]
    if subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode:
        raise UserError("the run has stopped, so there is nothing to compare")


def run(name, file, script, *argv):
    """In the process of its own: puts the function in its place and calls the script's main."""
    end_politely()
    argv = list(argv)
    module = importlib.import_module(Path(script).stem)
    if not any(field == "out" for field in module.Config.__dataclass_fields__):
        argv = argv[:argv.index("--out")]
    module, config = read(script, argv)
    kernels_off()
    if file == "-":
        return module.main(config)
    function = load(Path(file), name)
    if isinstance(function, str):
        raise UserError(function)
    calls = put(exercise(name).put(function))
    try:
        module.main(config)
    except Exception as error:
        if where := line_of(error, Path(file)):
            raise UserError(f"{Path(file).name}{where}: {said(error)}")
        raise UserError(f"{script} cannot go on with what {name} has given it ({said(error)}): python learn.py check {name} "
                        "says what is wrong")
    print(f"\n{name} was called {len(calls):,} times" + ("" if calls else ": this run does not need it"))


# ---- curves ----------------------------------------------------------------------------------------------------------

def read_log(path):
    """log.jsonl -> {name: {step: number}}."""
    found = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for name, value in line.items():
            if name in CURVES:
                found.setdefault(name, {})[line["step"]] = value
    return found


def apart(a, b):
    """The first step at which two curves differ by more than rounding, or None."""
    size = max([abs(x) for x in b.values()] or [0.0])
    return next((step for step, x in b.items() if not abs(a.get(step, x) - x) <= 1e-3 * size), None)


def compare(ours, mine, picture):
    """Two logs -> the text that says how they differ; where matplotlib is installed, also as a picture."""
    a, b = read_log(ours), read_log(mine)
    shared = [name for name in CURVES if name in a and name in b]
    parted = {name: apart(b[name], a[name]) for name in shared}
    chosen = sorted(shared, key=lambda name: (parted[name] is None, CURVES.index(name)))[:4]
    steps = sorted(set(a[chosen[0]]) & set(b[chosen[0]]))
    steps = steps[::max(1, len(steps) // 8)] + steps[-1:] * (len(steps) % max(1, len(steps) // 8) != 1)
    rows = [[str(step), *(f"{log[name][step]:.4g}" if step in log[name] else "" for name in chosen for log in (a, b))]
            for step in dict.fromkeys(steps)]
    text = "\n" + table(["step", *(f"{name}, {who}" for name in chosen for who in ("ours", "yours"))], rows)
    first = [f"{name} from step {step}" for name, step in parted.items() if step is not None]
    text += "\n\n" + (f"the runs part: {', '.join(first)}" if first else "both runs are the same but for rounding")
    if not plots.available():
        return text + "\n(pip install matplotlib draws the curves)"
    figure, panels = plots.figure(columns=len(chosen))
    for axes, name in zip(panels, chosen):
        for log, who, style in ((a, "ours", "-"), (b, "yours", "--")):
            axes.plot(list(log[name]), list(log[name].values()), style, label=who)
        axes.set(xlabel="step", title=name)
        axes.legend()
    plots.save(figure, picture)
    return text + f"\nthe curves: {picture}"


if __name__ == "__main__":
    if len(sys.argv) < 4:
        print(__doc__)
        raise SystemExit(sys.argv[1:] not in (["-h"], ["--help"]))
    run(*sys.argv[1:])
