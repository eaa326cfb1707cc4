"""Student mode: what is right passes, every known mistake is named, and whatever else a student's file may do is one
sentence."""
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import learn
from common.errors import UserError
from course import student
from course import use as using
from course.check import Verdict, check, judge, known
from course.child import run
from course.exercise import agree, outcome
from course.exercises import EXERCISES
from course.use import compare, read, refuse

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (5, 6, 7)


def outcomes(exercise, function):
    """What the process of a student's function would find."""
    return {"error": "", "outcomes": [[outcome(function, case, exercise.grads) for case in exercise.inputs(seed)]
                                      for seed in SEEDS]}


# ---- the exercises ---------------------------------------------------------------------------------------------------

def test_there_are_enough_exercises_and_mistakes():
    assert len(EXERCISES) >= 28 and all(len(e.wrongs) >= 2 for e in EXERCISES.values())
    assert sum(len(e.wrongs) for e in EXERCISES.values()) >= 80


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_one_passes_and_every_mistake_is_named(name):
    exercise = EXERCISES[name]
    assert judge(exercise, outcomes(exercise, exercise.reference), SEEDS) == ""
    for why, wrong in exercise.wrongs.items():
        assert judge(exercise, outcomes(exercise, wrong), SEEDS) == f"this is what comes out when {why}"


@pytest.mark.parametrize("name", EXERCISES)
def test_no_two_versions_give_the_same(name):
    for seed in SEEDS:
        right, wrongs = known(name, seed)
        for (a, mine), (b, other) in itertools.combinations([("right", right), *wrongs.items()], 2):
            assert not all(map(agree, mine, other)), f"{a}, and {b}"


@pytest.mark.parametrize("name", EXERCISES)
def test_what_is_shown_as_the_solution_is_right(name):
    exercise = EXERCISES[name]
    for function in exercise.shows:
        if function.__name__.endswith("_shown"):
            assert judge(exercise, outcomes(exercise, function), SEEDS) == ""
    assert f"def {name}" in student.solution(name) or any(not f.__name__.endswith("_shown") for f in
                                                          exercise.shows or (exercise.reference,))


@pytest.mark.parametrize("name", EXERCISES)
def test_no_reference_and_no_mistake_changes_its_arguments(name):
    exercise = EXERCISES[name]
    for function in (exercise.reference, *exercise.wrongs.values()):
        assert not any(found["changed"] for of_seed in outcomes(exercise, function)["outcomes"] for found in of_seed)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_file_to_fill_in_is_python_with_an_empty_body(name, tmp_path):
    text = student.start(name, tmp_path).read_text()
    scope = {}
    exec(compile(text, name, "exec"), scope)
    assert "Hint: " in scope[name].__doc__ and scope[name](*EXERCISES[name].inputs(0)[0]) is None
    with pytest.raises(UserError, match="there already"):
        student.start(name, tmp_path)


# ---- a student's file ------------------------------------------------------------------------------------------------

def judged(file):
    """As check, without the process."""
    return judge(EXERCISES["whiten"], run(file, "whiten", SEEDS), SEEDS)


BODIES = {  # what the body of whiten does: what is said about it
    "return None": "returns None",
    "return {}": "and not tensors or numbers",
    "x += 1\n    return x * mask": "changes its argument x in place",
    "x[0] = 0\n    return x * mask": "changes its argument x in place",
    "return (x * mask).sum()": r"shape \(\), but should have \(1, 5\)",
    "return x, mask": "returns a tuple of 2, but should return a tensor",
    "return x.sum().item()": "returns a number, but should return a tensor of shape .*item",
    "return (x * mask).double()": "float64, but should be float32",
    "return torch.zeros(2, 3)[7]": r"whiten.py, line 4, case 1: IndexError",
    "raise ValueError": "line 4, case 1: ValueError",
    "import sys; sys.exit(0)": "calls sys.exit",
    "import os; os._exit(3)": "ended the process",
    "return x * mask +": "is no Python: invalid syntax",
    "return torch.zeros(2 ** 40)": "asks for more than 4 GB",
    "return whiten(x, mask)": "calls itself again and again",
    "raise NotImplementedError": "not written yet",
}


def write(folder, body, head="def whiten(x, mask):"):
    file = folder / "whiten.py"
    file.write_text(f"import torch\n\n{head}\n    {body}\n")
    return file


@pytest.mark.parametrize("body", BODIES)
def test_whatever_else_a_function_does_is_one_sentence(body, tmp_path):
    file = write(tmp_path, body)
    in_a_process = "_exit" in body or "2 **" in body  # the others take seconds less without one
    found = check("whiten", tmp_path).sentence if in_a_process else judged(file)
    assert re.search(BODIES[body], found) and "Traceback" not in found, found


RIGHT = ("m = (x * mask).sum() / mask.sum()\n    v = ((x - m) ** 2 * mask).sum() / mask.sum()\n"
         "    return (x - m) / (v + 1e-8).sqrt() * mask")


def test_a_loop_without_end_is_interrupted(tmp_path, monkeypatch):
    file = write(tmp_path, "while True:\n        try:\n            x = x + 0\n        except Exception:\n            pass")
    code = f"import course.child as c; c.SECONDS = 1; c.main({str(file)!r}, 'whiten', '0', {str(tmp_path / 'r')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
    assert "a loop that never ends" in torch.load(tmp_path / "r")["error"]


def test_a_right_one_passes_on_any_seed_and_is_remembered_until_it_changes(tmp_path, capsys):
    file = write(tmp_path, RIGHT)
    for seed in (0, 40):
        assert [v.passed for v in student.check_all(["whiten"], tmp_path, seed)] == [True]
    assert student.state("whiten", tmp_path) == "right" and "1 of" in student.overview(tmp_path)
    file.write_text(file.read_text() + "\n")
    assert student.state("whiten", tmp_path) == "begun"


def test_what_is_printed_is_noticed_and_does_not_fail(tmp_path, capfd):
    write(tmp_path, "print('hello')\n    " + RIGHT)
    verdict = check("whiten", tmp_path)
    assert verdict.passed and "prints (hello)" in verdict.sentence and "hello" not in capfd.readouterr().out


@pytest.mark.parametrize("head, said", [("def white(x, mask):", "has no function whiten, only white"),
                                        ("def whiten(x):", r"whiten\(x\) takes other arguments than whiten\(x, mask\)"),
                                        ("1 / 0\ndef whiten(x, mask):", "line 3, fails while it is read: ZeroDivision"),
                                        ("import sys; sys.exit()\ndef whiten(x, mask):", "calls sys.exit")])
def test_a_file_without_the_function_is_one_sentence(head, said, tmp_path):
    assert re.search(said, judged(write(tmp_path, RIGHT, head)))


def test_a_gradient_that_is_cut_and_one_that_is_wrong(tmp_path):
    cut = judged(write(tmp_path, RIGHT.replace("return ", "x = x.detach()\n    m = m.detach()\n    return ").replace("v +", "v.detach() +")))
    assert "no gradient arrives at x" in cut
    wrong = judged(write(tmp_path, RIGHT.replace("(v +", "(v.detach() +")))
    assert "its gradient with respect to x is not" in wrong and "expected [[" in wrong and "found " in wrong


def test_an_unknown_mistake_shows_the_smallest_case(tmp_path):
    found = judged(write(tmp_path, RIGHT.replace("1e-8", "0.3")))
    assert "not the right numbers. The smallest case" in found and "x = [[" in found and "expected [[" in found


def test_a_mistake_is_named_although_another_case_raises(tmp_path):
    body = "if x.size(0) == 4:\n        raise ValueError('four')\n    return x * mask"
    assert judged(write(tmp_path, body)).startswith("not the right numbers")
    head = RIGHT.replace("return ", "if len(x) == 4:\n        raise ValueError('four')\n    return ")
    found = judged(write(tmp_path, head.replace("(v + 1e-8).sqrt()", "(v + 1e-8)")))
    assert "it divides by the variance and not by its root. And whiten.py" in found and "ValueError: four" in found
    assert "case 3: ValueError: four" in judged(write(tmp_path, head))


def test_a_file_that_is_not_there(tmp_path):
    for call in (lambda: check("whiten", tmp_path), lambda: list(student.check_all([], tmp_path, 0))):
        with pytest.raises(UserError, match="learn.py start"):
            call()
    with pytest.raises(UserError, match="no exercise"):
        check("whitening", tmp_path)


# ---- in the place of ours --------------------------------------------------------------------------------------------

PUT_TWICE = """
import sys, types
import torch, dpo, model
sys.modules["test_alias"] = types.ModuleType("test_alias")
sys.modules["test_alias"].dpo_loss = dpo.dpo_loss
from course.exercises import EXERCISES
from course.put import kernels_off, put
kernels_off()
calls = put(EXERCISES["dpo_loss"].put(lambda *x: x[0].sum()))
four = torch.zeros(4, 2) + 1
found = dpo.dpo_loss(*four)[0].item(), len(calls)
put(EXERCISES["cross_entropy"].put(lambda x, t: 10 * torch.nn.functional.cross_entropy(x, t)))
logits, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
print(found, "alias" if __import__("test_alias").dpo_loss is dpo.dpo_loss else "old", torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist())
"""


def test_every_alias_is_replaced_calls_are_counted_and_a_function_may_call_what_it_replaces():
    done = subprocess.run([sys.executable, "-c", PUT_TWICE], cwd=ROOT, capture_output=True, text=True, check=True)
    thirteen = f"{10 * torch.tensor(4.0).log().item():.4f}"
    found, losses = re.match(r"(\(.*\) alias) (\[.*\])", done.stdout.splitlines()[-1]).groups()
    assert found == "(2.0, 1) alias" and [f"{x:.4f}" for x in json.loads(losses)] == [thirteen] * 3


@pytest.mark.parametrize("name, command, said", [
    ("dpo_loss", "sft.py", "sft.py does not call dpo_loss: use it with dpo.py"),
    ("dpo_loss", "dpo.py --loss ipo", "for --loss sigmoid only"),
    ("dpo_loss", "dpo.py --label-smoothing 0.1", "for --label-smoothing 0.0 only"),
    ("ipo_loss", "dpo.py", "for --loss ipo only"),
    ("answer_logps", "dpo.py --loss ipo", "for --loss sigmoid or hinge or robust only"),
    ("optimal_policy", "dpo.py", "no script calls optimal_policy"),
    ("rope", "pretrain.py", "for --family llama only")])
def test_what_the_minimal_signature_lacks_is_refused(name, command, said):
    script, *flags = command.split()
    with pytest.raises(UserError, match=said):
        refuse(EXERCISES[name], script, read(script, flags)[1])


def test_every_script_of_an_exercise_is_one_and_has_the_fields_that_it_needs():
    for exercise in EXERCISES.values():
        configs = [read(script, [])[1] for script in exercise.scripts]
        assert not exercise.needs or all(any(hasattr(config, field) for config in configs) for field in exercise.needs)


def log(path, losses):
    path.write_text("".join(json.dumps({"step": i, "loss": x, "lr": 0.1}) + "\n" for i, x in enumerate(losses)))
    return path


def test_curves_are_compared_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    ours = log(tmp_path / "ours.jsonl", [3.0, 2.0, 1.0])
    same = compare(ours, log(tmp_path / "same.jsonl", [3.0, 2.0, 1.0000001]), tmp_path / "a.png")
    other = compare(ours, log(tmp_path / "mine.jsonl", [3.0, 2.5, 1.0]), tmp_path / "b.png")
    assert "the same but for rounding" in same and "the runs part: loss from step 1" in other
    assert "loss, yours" in other and (tmp_path / "b.png").stat().st_size > 5000


WRONG_RATE = "def lr_schedule(step, steps, warmup, lr, min_lr):\n    return lr * step / steps\n"


@pytest.mark.runs
def test_a_real_run_with_a_students_function(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Fox {i} lives at tower {i * i} and likes soup {i}." for i in range(400)))
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "lr_schedule.py").write_text(WRONG_RATE)
    command = "pretrain.py --data text.txt --steps 3 --batch-size 2 --device cpu".split()
    learn.main(learn.Config(["use", "lr_schedule"]), command)
    found = capfd.readouterr().out
    assert "the runs part" in found and "lr, yours" in found and "lr_schedule was called" in found
    rates = [json.loads(line)["lr"] for line in (tmp_path / "out/mine/lr_schedule/mine/log.jsonl").read_text().splitlines()
             if "lr" in line]
    assert rates[0] == 0.0 and rates[2] == pytest.approx(2 * rates[1]) and rates[1] > 0


def test_ours_runs_once_for_the_same_command(tmp_path, monkeypatch, capsys):
    started = []

    def start(arguments):
        started.append(arguments[1] == "-")
        out = Path(arguments[-1])
        out.mkdir(parents=True, exist_ok=True)
        log(out / "log.jsonl", [2.0, 1.0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(using, "start", start)
    monkeypatch.setattr(using, "check", lambda *_: Verdict("dpo_loss", True, "right"))
    for steps in ("5", "5", "6"):
        using.use("dpo_loss", ["dpo.py", "--steps", steps])
    assert started == [True, False, False, True, False] and "is there from an earlier run" in capsys.readouterr().out
    for command, said in ((["dpo.py", "--out", "x"], "--out is chosen here"), ([], "name a script"), (["x.py"], "no script")):
        with pytest.raises(UserError, match=said):
            using.use("dpo_loss", command)


@pytest.mark.runs
def test_a_teacher_gets_a_score_and_a_report(tmp_path):
    (tmp_path / "gae.py").write_text("def gae(rewards, values, mask, gamma, lam):\n    return rewards\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--mine={tmp_path}", "--seed", "9",
                           "--junitxml", str(tmp_path / "report.xml"), "-k", "gae or softmax"], cwd=ROOT,
                          capture_output=True, text=True)
    assert "0 of 2 right (0%), 1 wrong, 1 not begun" in done.stdout and done.returncode == 1
    assert "it returns a tensor of shape" in (tmp_path / "report.xml").read_text()
