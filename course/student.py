"""What learn.py does beside checking: the list, a file to fill in, ours to compare with."""
import hashlib
import inspect
import json
import textwrap
from pathlib import Path

from common.disk import replacing
from common.errors import UserError
from course.check import ROOT, check, exercise, file_of
from course.exercises import CHAPTERS, EXERCISES

HEAD = "import math\n\nimport torch\nimport torch.nn.functional as F\n\n\n"


def remembered(folder):
    """{exercise: checksum of the file that passed}."""
    path = Path(folder) / ".passed.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # no check has passed, or the file is damaged: it is only a note
        return {}


def checksum(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def state(name, folder):
    file = file_of(name, folder)
    if not file.is_file():
        return ""
    return "right" if remembered(folder).get(name) == checksum(file) else "begun"


def overview(folder):
    """The exercises by lesson, each with what is done."""
    lines, states = [], {name: state(name, folder) for name in EXERCISES}
    for chapter in CHAPTERS:
        lines.append(f"\n{chapter.__doc__.strip()}")
        lines += [f"   {states[e.name]:6} {e.name:20} {textwrap.shorten(e.title, 90)}" for e in chapter.EXERCISES]
    done = sum(found == "right" for found in states.values())
    lines.append(f"\n{done} of {len(EXERCISES)} are right. " + "next: python learn.py start "
                 + next((name for name, found in states.items() if not found), "NAME"))
    return "\n".join(lines).strip()


def start(name, folder):
    """Writes the file to fill in -> its path. Raises UserError where there is one already."""
    file = file_of(name, folder)
    if file.exists():
        raise UserError(f"{file} is there already: go on with it, or remove it to start anew")
    with replacing(file) as temporary:
        temporary.write_text(f"{HEAD}{exercise(name).text.strip()}\n    # your code\n", encoding="utf-8")
    return file


def check_all(names, folder, seed):
    """Checks these exercises, or all that were begun -> [Verdict, ...], and remembers what passed."""
    if not names:
        names = [name for name in EXERCISES if file_of(name, folder).is_file()]
    if not names:
        raise UserError(f"nothing is begun in {folder}/: python learn.py start softmax writes the first file")
    for name in names:
        verdict, passed = check(name, folder, seed), remembered(folder)
        passed.pop(name, None)
        if verdict.passed:
            passed[name] = checksum(file_of(name, folder))
        with replacing(Path(folder) / ".passed.json") as temporary:
            temporary.write_text(json.dumps(passed, indent=1))
        yield verdict


def solution(name):
    """The source of ours, with where it stands."""
    texts, chosen = [], exercise(name)
    for function in chosen.shows or (chosen.reference,):
        function = inspect.unwrap(function)
        source = textwrap.dedent(inspect.getsource(function))
        file, line = Path(inspect.getsourcefile(function)).relative_to(ROOT), inspect.getsourcelines(function)[1]
        if function.__name__.endswith("_shown"):  # torch's own is not to be read: the same, plainly
            source = source.replace(f"def {function.__name__}", f"def {name}", 1)
        texts.append(f"# {file}, line {line}\n{source}")
    return "\n".join(texts)
