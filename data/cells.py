"""Tables: the rows of .csv and .tsv files, of which no line is lost unsaid.

A cell in quotes may hold commas, line breaks and doubled quotes; in other files a quote is a character like others, and
a cell may begin with one: "Yes," he said. No ending tells which, so both readings are tried on the whole file.
"""
import contextlib
import csv
import itertools
import json
from collections import deque

from data.shapes import BadRow

LIMIT = 10_000_000  # bytes in a line or in a cell: more is a broken file, not an example
TOO_LONG = "\0too long\n"
LISTS_IN_CELLS = ("messages", "conversations", "conversation", "answers", "completions", "responses", "turns",
                  "history", "info", "summaries", "data", "choices", "endings", "instances",
                  "mc1_targets", "mc2_targets")


def read(path, open_text, tabs):
    """(row number, raw row or BadRow). The header names the keys, in any case ("Best Answer" is best_answer).

    open_text(path, newline) gives the stream; tabs: they separate the cells, or else what the header has most of.
    """
    csv.field_size_limit(LIMIT)
    with open_text(path, newline="") as stream:
        header = stream.readline(LIMIT)
    comma = "\t" if tabs else max(",;\t", key=header.count)  # Excel writes ; in much of Europe

    @contextlib.contextmanager
    def lines():
        with open_text(path, newline="") as stream:
            yield within_limit(stream)

    rows = records(lines, comma, is_quoted(lines, comma))
    names = next(rows, [])
    if isinstance(names, BadRow):  # without a header no row has a name for anything
        yield 1, names
        return
    names = [name.strip().lower().replace(" ", "_") for name in names]
    for number, cells in enumerate(rows, 1):
        yield number, cells if isinstance(cells, BadRow) else {name: value_of(name, cell)
                                                               for name, cell in zip(names, cells)}


def within_limit(stream):
    """The lines; TOO_LONG in place of one over LIMIT, which is never held in memory."""
    while line := stream.readline(LIMIT + 1):
        if len(line) > LIMIT:
            while line and not line.endswith(("\n", "\r")):
                line = stream.readline(LIMIT)
            line = TOO_LONG
        yield line


def is_quoted(lines, comma):
    """Do quotes stand around cells? Not where a tenth or more of the lines with a cell that begins with one could not
    be read so, and more lines can be read the other way. lines() opens the file."""

    def bad(quoted):
        return [isinstance(cells, BadRow) for cells in records(lines, comma, quoted)]

    unread = bad(True)
    if not any(unread) or unread[0]:  # [0]: the header
        return not any(unread)
    with lines() as stream:
        begun = [line.startswith('"') or f'{comma}"' in line for line in stream]
    return begun[0] or sum(begun) > 10 * sum(unread) or sum(unread) <= sum(bad(False))


def records(lines, comma, quoted):
    """The cells of each record, as many as in the first, the header; a BadRow for each line that belongs to none.

    Where a cell in quotes goes on, it is taken to end at the next line with an odd number of quotes. If that makes no
    record and the lines between are records by themselves, they are read as such, and the line alone is bad, or else
    all are: what a cell held is no row.
    """
    width, ahead = None, deque()  # ahead: lines that were read in search of the end of a cell

    def split(text):
        if text is TOO_LONG:
            return BadRow("line over 10 MB")
        cells = split_line(text, comma, quoted)
        if isinstance(cells, list) and len(cells) != (width or len(cells)):
            return BadRow("wrong number of columns", f"{len(cells)} where the header has {width}")
        return cells

    with lines() as stream:
        while line := ahead.popleft() if ahead else next(stream, ""):
            if not line.strip("\r\n"):
                continue
            cells, more = split(line), 0
            if isinstance(cells, BadRow) and quoted and odd(line):
                more = lines_to_odd(ahead, stream)
                after = list(itertools.islice(ahead, more))
                joined = split(line + "".join(after))
                between = [split(other) for other in after if other.strip("\r\n") and not odd(other)]
                if isinstance(joined, list):
                    cells = joined
                elif between and all(isinstance(other, list) for other in between):
                    more = 0
            for _ in range(more):
                if ahead.popleft().strip("\r\n") and isinstance(cells, BadRow):
                    yield cells
            if isinstance(cells, list):
                width = width or len(cells)
            yield cells


def odd(line):
    return line.count('"') % 2 == 1


def split_line(text, comma, quoted):
    """-> cells, or a BadRow."""
    if not (quoted and '"' in text):
        return text.rstrip("\r\n").split(comma)
    try:
        return next(csv.reader([text], delimiter=comma, strict=True))
    except csv.Error as error:
        return BadRow("not valid CSV", str(error))


def lines_to_odd(ahead, stream):
    """How many lines of `ahead` there are up to an odd one, LIMIT or the end; `ahead` is filled from the stream."""
    def read_on():
        for line in stream:
            ahead.append(line)
            yield line

    count = size = 0
    for count, line in enumerate(itertools.chain(ahead, read_on()), 1):
        size += len(line)
        if odd(line) or size > LIMIT:
            break
    return count


def value_of(name, cell):
    """A cell of a column that may hold lists holds them as JSON."""
    if name in LISTS_IN_CELLS and cell[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):  # the row's own check says what is wrong with it
            return json.loads(cell)
    return cell
