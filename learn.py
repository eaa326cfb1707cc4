"""Student mode: write the functions of this project yourself, and be told which mistake you made.

    python learn.py                          the exercises, lesson by lesson, and what is done
    python learn.py start dpo_loss           writes my/dpo_loss.py: signature, shapes, equation, a hint, an empty body
    python learn.py check dpo_loss           runs yours beside ours, results and gradients; without a name: all begun
    python learn.py use dpo_loss -- dpo.py --steps 50     the real script with your function, its curves beside ours
    python learn.py solution dpo_loss        shows ours

Yours runs in a process of its own, with limits of time and memory. Where its results are those of a known mistake, on
three random seeds, the mistake is named; else the smallest case that fails is shown, expected and found.

For teachers: pytest --mine=FOLDER checks a folder of files and ends with a score; --seed 7 takes other numbers,
--junitxml report.xml writes a report, -k "gae or whiten" chooses. python -m course.mutants: do our own tests notice?
"""
import sys
from dataclasses import dataclass, field

from common.errors import UserError, end_politely
from common.flags import Seed, parse
from course import student
from course.use import use


@dataclass
class Config:
    words: list[str] = field(default_factory=list)  # start, check, use or solution, and the exercise; none: the list
    folder: str = "my"  # where your files are
    seed: Seed = 0  # of the numbers that check draws


def main(config, script=()):
    """script: what stands behind -- , for use."""
    command, *names = config.words or ["list"]
    if command in ("start", "use", "solution") and len(names) != 1:
        raise UserError(f"{command} takes one exercise, as in python learn.py {command} dpo_loss")
    if script and command != "use":
        raise UserError(f"only use takes a script behind --, {command} does not: leave it out")
    if command == "list":
        print(student.overview(config.folder))
    elif command == "start":
        file = student.start(names[0], config.folder)
        print(f"{file} is there: write the body, then python learn.py check {names[0]}")
    elif command == "check":
        verdicts = []
        for verdict in student.check_all(names, config.folder, config.seed):
            print(f"{verdict.name}: {verdict.sentence}", flush=True)
            verdicts.append(verdict)
        if len(verdicts) > 1:
            print(f"\n{sum(verdict.passed for verdict in verdicts)} of {len(verdicts)} are right")
        raise SystemExit(not all(verdict.passed for verdict in verdicts))
    elif command == "use":
        use(names[0], list(script), config.folder)
    elif command == "solution":
        print(student.solution(names[0]), end="")
    else:
        raise UserError(f"{command!r} is not something to do: start, check, use or solution")


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    end_politely()
    main(parse(Config, argv=words[:cut]), words[cut + 1:])
