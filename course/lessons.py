"""Keeps the lessons true: what they quote is copied from where it stands, and a test says when the two differ.

    python -m course.lessons            refreshes every marked place in README.md and docs
    python -m course.lessons --check    changes nothing; says what is out of date and what is named but not there

Marks are comments of Markdown, so a reader sees only what stands between them:

    <!-- code: dpo.py answer_logps -->                    a function or class without its docstring
    <!-- code: dpo.py dpo_loss | chosen = | h, e = -->    its lines from the first that holds one text to the next that
                                                          holds the other
    <!-- section: docs/course/one_run.md A vote -->       what stands below a heading of a page, here of the numbers that
                                                          `python -m course.figures` measures on a chain of stages
    <!-- n: held-out loss @ base -->0.665<!-- end -->    a cell of a table of docs/results.md or of that page: the row's
                                                          name (#2 behind it: the second of that name), the column's

Each of the first three ends with <!-- end --> on a line of its own.
"""
import ast
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.disk import replacing
from common.errors import UserError
from common.flags import parse
from course.exercises import EXERCISES

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("docs/results.md", "docs/course/one_run.md")
END = "<!-- end -->"
BLOCK = re.compile(rf"(<!-- (code|section): (.+?) -->\n).*?({END})", re.DOTALL)
NUMBER = re.compile(rf"(<!-- n: ([^>]+?) @ ([^>]+?) -->).*?({END})", re.DOTALL)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(path):
    """A file of the house, by its path from the root."""
    if not (ROOT / path).is_file():
        raise UserError(f"{path} is not there")
    return (ROOT / path).read_text(encoding="utf-8")


# ---- what is quoted --------------------------------------------------------------------------------------------------

def find(path, name):
    """The part of a file's syntax tree that is called `name`: function, Class, Class.method or an assigned NAME."""
    node = ast.parse(read(path))
    for part in name.split("."):
        named = [n for n in node.body if getattr(n, "name", "") == part or isinstance(n, (ast.Assign, ast.AnnAssign))
                 and part in [getattr(t, "id", "") for t in getattr(n, "targets", [getattr(n, "target", None)])]]
        if not named:
            raise UserError(f"{path} has no {name}")
        node = named[0]
    return node


def code(path, name, first="", last=""):
    """Its source without the docstring, from the line that holds `first` to the next that holds `last`."""
    node, lines = find(path, name), read(path).split("\n")
    kept = list(range(node.lineno - 1, node.end_lineno))
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
        said = node.body[0]
        kept = [i for i in kept if not said.lineno - 1 <= i < said.end_lineno]
    found = [lines[i] for i in kept]
    start = next((i for i, line in enumerate(found) if first in line), None)
    stop = start is not None and next((i for i, line in enumerate(found) if i >= start and last in line), None)
    if start is None or stop is None:
        raise UserError(f"{path} {name} has no lines from {first!r} to {last!r}")
    return "```python\n" + textwrap.dedent("\n".join(found[start:stop + 1 if last else None])).strip("\n") + "\n```\n"


def section(path, heading):
    """What stands below a page's heading of the second level, up to the next."""
    parts = re.split(r"^## (.+)\n", read(path), flags=re.MULTILINE)
    found = [text for title, text in zip(parts[1::2], parts[2::2]) if title.startswith(heading)]
    if not found:
        raise UserError(f"{path} has no section {heading!r}")
    return found[0].strip("\n") + "\n"


@cache
def tables(text):
    """The tables of a page -> [(header, rows), ...], of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        found.append((header, rows))
    return found


def number(row, column):
    """A cell of one of the pages of NUMBERS, by the names of its row and column."""
    name, _, which = row.partition(" #")
    for header, rows in [table for path in NUMBERS for table in tables(read(path))]:
        matching = [cells for cells in rows if cells[0] == name]
        if column in header and len(matching) >= int(which or 1):
            return matching[int(which or 1) - 1][header.index(column)]
    raise UserError(f"no table of {' or '.join(NUMBERS)} has a row {row!r} and a column {column!r}")


def refreshed(text):
    """A page with every marked place as it should be."""
    def block(match):
        head, kind, what, end = match.groups()
        if kind == "section":
            return f"{head}{section(*what.split(' ', 1))}{end}"
        named, *span = what.split(" | ")
        return f"{head}{code(*named.split(' ', 1), *span)}{end}"

    return NUMBER.sub(lambda m: f"{m[1]}{number(m[2], m[3])}{m[4]}", BLOCK.sub(block, text))


# ---- what is named ---------------------------------------------------------------------------------------------------

def missing(page, text):
    """Links, files, `file.py: name` and exercises that a page names and that are not there -> sentences."""
    found = []
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        if not (page.parent / target).exists():
            found.append(f"links to {target}, which is not there")
    for path in re.findall(r"`(?!out/|my/)([\w/]+\.(?:py|md))\b", text):
        if not (ROOT / path).is_file():
            found.append(f"names {path}, which is not there")
    for path, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", text):
        for name in names.split(", "):
            try:
                find(path, name)
            except UserError as error:
                found.append(f"names what is not there: {error}")
    for name in re.findall(r"learn\.py (?:start|check|use|solution) ([a-z]\w+)", text):
        if name not in EXERCISES:
            found.append(f"names the exercise {name}, which is not there")
    return found


def faults():
    """Everything that is wrong in any page -> sentences, each beginning with the page."""
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(ROOT)
        try:
            if refreshed(text) != text:
                found.append(f"{name} is out of date: python -m course.lessons refreshes it")
        except UserError as error:
            found.append(f"{name}: {error}")
        if text.count("<!-- n: ") + len(re.findall(r"<!-- (?:code|section): ", text)) != text.count(END):
            found.append(f"{name}: a mark without its end, or an end without its mark")
        found += [f"{name} {fault}" for fault in missing(page, text)]
    return found


@dataclass
class Config:
    check: bool = False  # change nothing; say what is out of date and what is named but not there


def main(config):
    if not config.check:
        for page in pages():
            text = page.read_text(encoding="utf-8")
            new = refreshed(text)
            if new != text:
                with replacing(page) as temporary:
                    temporary.write_text(new, encoding="utf-8")
                print(f"refreshed {page.relative_to(ROOT)}")
    if wrong := faults():
        raise UserError("\n".join(wrong))
    print("the lessons say what the code and docs/results.md say")


if __name__ == "__main__":
    main(parse(Config))
