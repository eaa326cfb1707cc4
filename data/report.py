"""What a pipeline did to how many rows, counted filter by filter.

    report = PipelineReport()
    report.section("train")
    text = report.change("white space", strip_space, text)               counts the texts that changed
    if report.keep("fewer than 20 words", enough_words(text), text): ...  counts the rows that were removed
    print(report); report.save("out/report.json")

A report keeps numbers and one example a step, so it takes any number of rows.
"""
import json
import os
from dataclasses import dataclass

from common.disk import write_json
from common.errors import UserError

PREVIEW = 60  # characters of a step's first example


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


class PipelineReport:
    """Counts for every step of a pipeline, in the order of the steps' first use, in one or several sections."""

    def __init__(self):
        self.sections, self.notes = {}, []
        self.section("")

    def section(self, name):
        """From here on count under this name, for instance that of a file or split. One may come back to a section."""
        self.name, self.steps = name, self.sections.setdefault(name, {})

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

    def write(self, rows, writer, see, step="written"):
        """All rows into one file (a Writer of common/disk), which then stays whatever happens to the next. see: where
        to look if the filters leave none, for the UserError that says so."""
        for row in rows:
            writer.write(row)
        if not writer.rows:
            counts = self.counts(self.name)
            raise UserError(f"the filters leave no row for {writer.path.name} ({counts}): see {see}.")
        writer.finish()
        self.count(step, writer.rows)

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
        write_json(path, {"notes": self.notes, "sections": sections}, ensure_ascii=False, indent=1)


def shortened(example):
    """A text, or a row as JSON, in one line of at most PREVIEW characters."""
    text = example if isinstance(example, str) else json.dumps(example, ensure_ascii=False, default=str)
    text = " ".join(text[:10 * PREVIEW].split())  # so that a long text costs nothing
    return text if len(text) <= PREVIEW else text[:PREVIEW - 3] + "..."


def where_different(before, after):
    """The text before the change, from a few characters ahead of the first one that changed."""
    start = max(0, len(os.path.commonprefix([before, after])) - PREVIEW // 3)
    return ("..." if start else "") + before[start:start + 10 * PREVIEW]
