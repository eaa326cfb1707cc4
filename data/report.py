"""One idea: a pipeline says what it did to how many rows, and leaves no half-written file behind.

    report = Report()
    report.section("train")
    text = report.change("white space", strip_space, text)               counts the texts that changed
    if report.keep("fewer than 20 words", enough_words(text), text): ...  counts the rows that were removed
    print(report); report.save("out/report.json")

    with writing("out", ["sft_train", "sft_test"]) as out:               out/sft_train.jsonl, out/sft_test.jsonl
        out["sft_train"].write({"messages": [...]})

A report keeps numbers and one example a step, so it takes any number of rows; writing streams to the disk.
"""
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

SHOWN = 60  # characters of a step's first example


# ---- counting --------------------------------------------------------------------------------------------------------

@dataclass
class Step:
    """What one filter did. hit: rows removed, texts changed, or whatever else was counted."""

    kind: str        # "removed", "changed" or "counted"
    rows: int = 0    # rows or texts that came in
    hit: int = 0
    first: str = ""  # the first one hit, shortened

    def add(self, hit, example):
        self.rows += 1
        if hit:
            self.first = self.first or shortened(example())
            self.hit += 1


class Report:
    """Counts for every step of a pipeline, in the order of the steps' first use, in one or several sections."""

    def __init__(self):
        self.sections, self.notes = {}, []
        self.section("")

    def section(self, name):
        """From here on count under this name, for instance that of a file or split. One may come back to a section."""
        self.steps = self.sections.setdefault(name, {})

    def note(self, line):
        """A line for the head of the report, for instance which toxicity scorer was used."""
        self.notes.append(line)

    def change(self, step, function, text):
        """function(text), counted where it differs from text."""
        changed = function(text)
        self._step(step, "changed").add(changed != text, lambda: where_different(text, changed))
        return changed

    def keep(self, step, ok, example=""):
        """Returns ok as a bool; the row counts as seen, and as removed where it is not ok."""
        self._step(step, "removed").add(not ok, lambda: example)
        return bool(ok)

    def count(self, step, n=1, example=""):
        """Counts something that neither changes nor removes a row."""
        found = self._step(step, "counted")
        found.rows, found.hit, found.first = found.rows + n, found.hit + n, found.first or shortened(example)

    def _step(self, name, kind):
        step = self.steps.setdefault(name, Step(kind))
        if step.kind != kind:
            raise ValueError(f"step {name!r} is {step.kind} in one place and {kind} in another")
        return step

    def counts(self, section=None):
        """{step: rows removed, texts changed or things counted} of a section, or added over all sections."""
        total = {}
        for name, steps in self.sections.items():
            for step, found in steps.items() if section in (None, name) else ():
                total[step] = total.get(step, 0) + found.hit
        return total

    def __str__(self):
        """The notes, then a table: step, rows in, what was done, rows left, the first one it was done to."""
        wide = max((len(step) for steps in self.sections.values() for step in steps), default=0)
        lines = list(self.notes)
        for name, steps in self.sections.items():
            if steps:
                lines.append(f"{name:<{wide}}  {'rows in':>9}  {'':17}  {'rows left':>9}  first")
            for step, found in steps.items():
                came, left = (f"{found.rows:,}", f"{found.rows - found.hit:,}") if found.kind == "removed" else (
                    ("", "") if found.kind == "counted" else (f"{found.rows:,}", f"{found.rows:,}"))
                line = f"{step:<{wide}}  {came:>9}  {found.hit:>9,} {found.kind}  {left:>9}  {found.first}"
                lines.append(line.rstrip())
        return "\n".join(lines)

    def save(self, path):
        """The same as JSON: {"notes": [...], "sections": {name: {step: {"kind", "rows", "hit", "first"}}}}."""
        sections = {name: {step: vars(found) for step, found in steps.items()}
                    for name, steps in self.sections.items() if steps}
        text = json.dumps({"notes": self.notes, "sections": sections}, ensure_ascii=False, indent=1)
        path = Path(path)
        temporary = path.with_name(path.name + ".unfinished")
        with on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(text.encode("utf-8", "replace") + b"\n")
            os.replace(temporary, path)


def shortened(example):
    """A text, or a row as JSON, in one line of at most SHOWN characters."""
    text = example if isinstance(example, str) else json.dumps(example, ensure_ascii=False, default=str)
    text = " ".join(text[:10 * SHOWN].split())  # so that a long text costs nothing
    return text if len(text) <= SHOWN else text[:SHOWN - 3] + "..."


def where_different(before, after):
    """The text before the change, from a few characters ahead of the first one that changed."""
    start = max(0, len(os.path.commonprefix([before, after])) - SHOWN // 3)
    return ("..." if start else "") + before[start:start + 10 * SHOWN]


# ---- writing ---------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def on_disk(path):
    """Turns the disk's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}): free some space or choose another "
                        "--out") from None


class Writer:
    """Rows as JSON, one a line, into `path`; until `finish` the file is called *.unfinished.jsonl."""

    def __init__(self, path):
        self.path, self.rows, self.finished = path, 0, False
        self.temporary = path.with_name(path.stem + ".unfinished" + path.suffix)
        with on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.temporary, "wb")

    def write(self, row):
        """One row, a dict. Raises UserError where the disk is full."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with on_disk(self.path):
            self.file.write(line.encode("utf-8", "replace"))  # half of a surrogate pair becomes "?"
        self.rows += 1

    def finish(self):
        """Gives the file its name. A second call does nothing."""
        if not self.finished:
            with on_disk(self.path):
                self.file.close()
                os.replace(self.temporary, self.path)
            self.finished = True

    def keep(self):
        """After a failure: what was written so far stays under the unfinished name, whole rows only -> their number."""
        with contextlib.suppress(OSError):  # a full disk refuses the last bytes once more
            self.file.close()
        self.rows = whole_rows(self.temporary)
        if not self.rows:
            self.temporary.unlink(missing_ok=True)
        return self.rows


def whole_rows(path):
    """Cuts a torn last line off -> the number of lines left."""
    rows = end = 0
    with open(path, "r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                rows, end = rows + 1, end + len(line)
        file.truncate(end)
    return rows


@contextlib.contextmanager
def writing(folder, names):
    """{name: Writer} for the files folder/name.jsonl. They get these names when the block ends well, or one by one with
    out[name].finish(). Where it ends badly (a UserError, a full disk, Ctrl-C), finished files stay as they are, rows of
    the others are kept as name.unfinished.jsonl, and the one sentence says which are which."""
    out = {}
    try:
        for name in names:
            out[name] = Writer(Path(folder) / f"{name}.jsonl")
        yield out
        for writer in out.values():
            writer.finish()
    except (UserError, KeyboardInterrupt) as error:
        what = "stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error).rstrip(".")
        raise UserError(f"{what}; {left_over(out.values())}") from None
    except BaseException:  # a bug: its traceback passes, but no file is left open or torn
        left_over(out.values())
        raise


def left_over(writers):
    """Closes what is not finished -> which files are complete and which are not, in words."""
    complete = [f"{writer.path.name} ({writer.rows:,} rows)" for writer in writers if writer.finished]
    parts = [f"{writer.temporary.name} ({writer.rows:,} rows)" for writer in writers
             if not writer.finished and writer.keep()]
    sentences = [f"complete: {', '.join(complete) or 'nothing'}"]
    return "; ".join(sentences + ([f"unfinished: {', '.join(parts)}"] if parts else [])) + "."
