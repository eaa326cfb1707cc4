"""One idea: a user's file of examples just works, and what did not work is counted and said.

    python data/files.py FILE [--want sft] [--merge-system] [--show 3]

shows how a file was understood. Endings: .jsonl, .json (an array, one object per line, or the array inside one object),
.csv, .tsv, .txt (documents separated by blank lines), each also with .gz; .parquet where pyarrow is installed. What the
rows may look like, and the four forms that are made of them, stands in shapes.py.
"""
import argparse
import codecs
import csv
import gzip
import io
import itertools
import json
import random
import sys
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # started as a script, Python looks for modules in data/ only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.shapes import FORMS, NEEDS, SHAPES, BadRow, WrongForm, finished, parts, plant, recognise, shown
from errors import UserError, end_politely

LIMIT = 10_000_000  # bytes in a line or in a CSV cell: more is a broken file, not an example
LISTS_IN_CELLS = ("messages", "conversations", "conversation", "answers", "completions", "responses", "turns",
                  "history", "info", "summaries", "data", "choices", "endings", "mc1_targets", "mc2_targets",
                  "instances")


# ---- files: every ending becomes (row number, raw row or BadRow) ----

MAGIC = [(b"\x1f\x8b", "is gzip-compressed: add .gz to its name"), (b"PK\x03\x04", "is a zip archive: unpack it"),
         (b"PAR1", "is a parquet file: let its name end in .parquet"),
         (codecs.BOM_UTF16_LE, "is UTF-16: save it as UTF-8"),
         (codecs.BOM_UTF16_BE, "is UTF-16: save it as UTF-8"),
         (b"version https://git-lfs", "is a Git LFS pointer, not the data: run git lfs pull")]


def open_bytes(path):
    """A buffered stream of the unpacked bytes, past a UTF-8 byte order mark."""
    packed = path.name.lower().endswith(".gz")
    stream = gzip.open(path) if packed else open(path, "rb")
    stream = io.BufferedReader(stream) if packed else stream
    head = stream.peek(32)
    for magic, what in MAGIC:
        if head.startswith(magic):
            stream.close()
            raise UserError(f"{path} {what}.")
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def open_text(path, newline):
    return io.TextIOWrapper(open_bytes(path), "utf-8", "surrogateescape", newline=newline)  # one bad byte costs one row


def ending_of(path):
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(path):
    """(row number, raw row). The number is the line in files of one row a line, elsewhere the position from 1."""
    ending = ending_of(path)
    readers = {".jsonl": read_json, ".ndjson": read_json, ".json": read_json, ".csv": read_csv, ".tsv": read_csv,
               ".txt": read_txt, ".parquet": read_parquet}
    if path.is_dir():
        raise UserError(f"{path} is a directory: name one file in it.")
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path.")
    if ending not in readers:
        raise UserError(f"{path}: the ending {ending or '(none)'} is unknown: use .jsonl, .json, .csv, .tsv or .txt "
                        "(each also with .gz), or .parquet.")
    return readers[ending](path)


def lines(stream):
    """(line number, bytes); None in place of a line over LIMIT, which is never held in memory."""
    number = 0
    while line := stream.readline(LIMIT + 1):
        number += 1
        if len(line) > LIMIT:
            while line and not line.endswith(b"\n"):
                line = stream.readline(LIMIT)
            yield number, None
        elif line.strip():
            yield number, line


def parsed(line):
    """One line -> its value, or a BadRow."""
    if line is None:
        return BadRow("line over 10 MB")
    if b"\0" in line:
        return BadRow("NUL byte")
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return BadRow("not valid JSON", str(error)[:100])


def read_json(path):
    """One object a line is streamed; an array, or an object around one, has to be read whole."""
    with open_bytes(path) as stream:
        head = [line for _, line in itertools.islice(lines(stream), 2)]
    if row_a_line(head, path):
        with open_bytes(path) as stream:
            for number, line in lines(stream):
                yield number, parsed(line)
        return
    with open_bytes(path) as stream:
        text = stream.read().decode("utf-8", "surrogateescape")
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}; the file begins with {shown(text[:30])}"
        raise UserError(f"{path} is not valid JSON ({where}): mend it there, or write one object per line "
                        "as .jsonl.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON (nested too deeply, or a number too long): mend it.") from None
    yield from enumerate(unwrapped(whole), 1)


def row_a_line(head, path):
    """Judged by the first two lines that are not blank, because .json files come in both kinds."""
    by_name = ending_of(path) != ".json"
    if len(head) < 2:
        return by_name and head == [None]
    first, second = head
    good = not isinstance(parsed(first), BadRow)
    if first is not None and (first.lstrip().startswith(b"[") or first.strip() == b"{"):  # an array, or pretty-printed
        return good
    return good or by_name or (second is not None and second.startswith(b"{"))


def unwrapped(whole):
    """The rows of an array, of {"data": [...]} under any key, or of a page of the Hugging Face rows API."""
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    pages = whole.get("rows")
    if isinstance(pages, list) and pages and all(isinstance(page, dict) and "row" in page for page in pages):
        return [page["row"] for page in pages]
    inner = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)
             and not {"role", "from"} & set(value[0])]  # a list of turns is one conversation, not rows
    known = any(shape.test(whole) for shape in SHAPES)
    return inner[0] if len(inner) == 1 and (len(whole) == 1 or not known) else [whole]


def read_csv(path):
    """The header names the keys, in any case ("Best Answer" is best_answer). A cell may hold a list as JSON."""
    csv.field_size_limit(LIMIT)
    with open_text(path, newline="") as stream:
        header = stream.readline(LIMIT)
    comma = "\t" if ending_of(path) == ".tsv" else max(",;\t", key=header.count)  # Excel writes ; in much of Europe
    rows = records(path, comma, is_quoted(path, comma))
    names = next(rows, [])
    if isinstance(names, BadRow):
        raise UserError(f"{path}: its first line names no columns ({names.detail}): mend it.")
    names = [name.strip().lower().replace(" ", "_") for name in names]
    for number, cells in enumerate(rows, 1):
        bad = isinstance(cells, BadRow)
        yield number, cells if bad else {name: cell_value(name, cell) for name, cell in zip(names, cells)}


def is_quoted(path, comma):
    """Does a cell in quotes hold what is between them, or are they its own? Whichever leaves fewer lines unread."""
    bad = lambda quoted: sum(isinstance(cells, BadRow) for cells in records(path, comma, quoted))
    return not (unread := bad(True)) or unread <= bad(False)


def records(path, comma, quoted):
    """The cells of each record, as many as in the first, the header; a BadRow for each line that belongs to none.

    quoted: a cell in quotes may hold commas, line breaks and doubled quotes. It ends at the latest at the next line with
    an odd number of quotes. Where that makes no record, the line stands alone if those up to there are records by
    themselves; or else all are bad, as they may be what a cell held.
    """
    width, ahead = None, deque()  # ahead: lines that were read in search of the end of a cell

    def split(text):
        cells = split_line(text, comma, quoted)
        if isinstance(cells, list) and len(cells) != (width or len(cells)):
            return BadRow("wrong number of columns", f"{len(cells)} where the header has {width}")
        return cells

    with open_text(path, newline="") as stream:
        while line := ahead.popleft() if ahead else stream.readline():
            if not line.strip("\r\n"):
                continue
            cells, more = split(line), 0
            if isinstance(cells, BadRow) and quoted and line.count('"') % 2:
                more = lines_to_quote(ahead, stream)
                between = list(itertools.islice(ahead, more))
                joined = split(line + "".join(between))
                if isinstance(joined, list):
                    cells = joined
                else:
                    others = [split(other) for other in between if other.strip("\r\n") and not other.count('"') % 2]
                    more = 0 if others and all(isinstance(other, list) for other in others) else more
            for _ in range(more):
                other = ahead.popleft()
                if isinstance(cells, BadRow) and other.strip("\r\n"):
                    yield cells
            width = width or len(cells)
            yield cells


def split_line(text, comma, quoted):
    """-> cells, or a BadRow."""
    if not (quoted and '"' in text):
        return text.rstrip("\r\n").split(comma)
    try:
        return next(csv.reader([text], delimiter=comma, strict=True))
    except csv.Error as error:
        return BadRow("not valid CSV", str(error))


def lines_to_quote(ahead, stream):
    """How many lines of `ahead`, which is filled from the stream, end with one that has an odd number of quotes, or with
    the file, or with LIMIT."""
    def read_on():
        for line in stream:
            ahead.append(line)
            yield line

    number = size = 0
    for number, line in enumerate(itertools.chain(ahead, read_on()), 1):
        size += len(line)
        if line.count('"') % 2 or size > LIMIT:
            break
    return number


def cell_value(name, cell):
    if name in LISTS_IN_CELLS and cell[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass  # the row's own check says what is wrong with it
    return cell


def read_txt(path):
    """Documents separated by blank lines; line ends become newlines."""
    with open_text(path, newline=None) as stream:
        documents = itertools.groupby(stream, key=lambda line: bool(line.strip()))
        for number, document in enumerate((group for full, group in documents if full), 1):
            yield number, {"text": "".join(document).removesuffix("\n")}


def read_parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow, or use the data set's .jsonl.") from None
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({str(error)[:100]}): download it again.") from None


# ---- what others call ----

# no fault of the file's, so these do not count towards "more than half are bad"
FINE = ("fewer than two answers", "labelled as a bad answer", "a tree without the wanted form")
CURES = {
    "unknown keys": "rename the keys to one of the shapes " + ", ".join(shape.name for shape in SHAPES),
    "not UTF-8, or half of a surrogate pair": "save the file as UTF-8",
    "NUL byte": "save the file as UTF-8, without NUL bytes",
    "not valid CSV": "double the quotes inside of a cell in quotes",
    "not valid JSON": "write one JSON object per line",
    "line over 10 MB": "write one example per line",
    "a tool's turn": "tool use is not supported, so remove those conversations",
    "unknown role": "use system, user and assistant",
}


@dataclass
class Report:
    """What became of a file's rows. A tree gives several rows, so `kept` (rows returned) may exceed `read`;
    used + the sum of the dropped == read, always."""
    name: str
    read: int = 0    # rows of the file
    used: int = 0    # of these, the ones that something was made of
    kept: int = 0    # rows returned
    dropped: dict = field(default_factory=dict)   # reason -> (count, number of the first such row)
    shapes: dict = field(default_factory=dict)    # shape name -> rows used
    details: dict = field(default_factory=dict)   # reason -> what the first such row holds
    notes: dict = field(default_factory=dict)     # what to look at in kept rows -> (count, the first's number, example)
    forms: dict = field(default_factory=dict)     # reason -> True where the row is sound, but of another form

    def keep(self, shape, made, rows=1):
        self.used, self.kept = self.used + rows, self.kept + made
        self.shapes[shape] = self.shapes.get(shape, 0) + rows

    def drop(self, bad, row):
        count, first = self.dropped.get(bad.reason, (0, row))
        self.dropped[bad.reason] = (count + 1, first)
        self.details.setdefault(bad.reason, bad.detail)
        self.forms[bad.reason] = isinstance(bad, WrongForm)

    def note(self, what, row, example=""):
        """Something about a row that is kept, which the user should know."""
        count, first, example = self.notes.get(what, (0, row, example))
        self.notes[what] = (count + 1, first, example)

    def __str__(self):
        return self.counts() + "".join(
            f"\n  look: {what} ({count:,} row{'s' * (count != 1)}, first: row {first:,}{example and ', ' + example})"
            for what, (count, first, example) in self.notes.items())

    def counts(self):
        shapes = ", ".join(self.shapes if len(self.shapes) == 1 else (f"{k} {n:,}" for k, n in self.shapes.items()))
        kept = f"{self.kept:,} kept" if self.kept == self.used else f"{self.kept:,} made from {self.used:,} of them"
        line = f"{self.name}: {self.read:,} row{'s' * (self.read != 1)} read, {kept}"
        line += f" ({shapes})" if shapes else ""
        if not self.dropped:
            return line
        line += f"; dropped {sum(count for count, _ in self.dropped.values()):,}: "
        if len(self.dropped) == 1:
            return line + "".join(f"{reason} (first: row {first:,})" for reason, (_, first) in self.dropped.items())
        return line.rstrip() + "".join(f"\n  {count:>9,}  {reason} (first: row {first:,})" for reason, (count, first)
                                       in sorted(self.dropped.items(), key=lambda item: -item[1][0]))


def load(path, want, merge_system=False, score="score"):
    """Reads the rows of a file in the wanted form: (list of rows as in the module's docstring, Report).

    want          "sft", "ranked", "prompts" or "text"
    merge_system  fold the system prompt into the first user turn
    score         which number of an answer ranks it: "score" (or, where there is none, the negated rank or the
                  overall_score), or any other field beside the answer's text, such as "helpful"

    Unusable rows are dropped and counted. Raises UserError where the file cannot be read, holds another form, where no
    row survives or more than half are bad.
    """
    if want not in FORMS:
        raise ValueError(f"want is one of {', '.join(FORMS)}, not {want!r}")
    path = Path(path).expanduser()
    report, found, flat = Report(path.name), [], {}
    for number, raw in read(path):
        report.read += 1
        try:
            shape, internal = recognise(raw, want)
            if "flat" in internal:
                if internal["flat"]["message_id"] in flat:
                    raise BadRow("message_id seen before")
                flat[internal["flat"]["message_id"]] = (number, internal["flat"])
                continue
            label, internal["label"] = internal["label"], None  # judged when all labels have been seen
            found.append(((number,), shape.name, label, *made_of(internal, raw, want, merge_system, score)))
        except BadRow as bad:
            report.drop(bad, number)
    found += flat_rows(flat, want, merge_system, score, report)
    rows = judged(found, want, report)
    check(report, NEEDS[want], path)
    return rows, report


def made_of(internal, raw, want, merge_system, score):
    """An internal row -> the rows in the wanted form, what is noted on them. Raises BadRow."""
    rows = parts(internal, want)
    made = [finished(part, raw, want, merge_system, score) for part in rows]
    if not made:
        raise BadRow("a tree without the wanted form")
    return made, rows[0]["notes"]


def judged(found, want, report):
    """[(row numbers, shape, label, rows made of them, notes), ...] -> the rows; for SFT without those whose label says
    that the answer is bad. Where a tenth of the labels or more say neither good nor bad, they are classes of something."""
    labels = [label for _, _, label, *_ in found if label]
    judges = want == "sft" and labels.count("odd") * 10 < len(labels)
    rows = []
    for numbers, shape, label, made, notes in found:
        if judges and label in ("bad", "odd"):
            report.drop(BadRow("labelled as a bad answer" if label == "bad" else "a label that is no verdict"), *numbers)
            continue
        rows += made
        report.keep(f"{shape}, judged" if judges and label else shape, len(made), len(numbers))
        if want == "sft" and label == "bad":
            notes["a label is taken for a class of something, not for a bad answer"] = ""
        for what, example in notes.items():
            report.note(what, numbers[0], example)
    return rows


def read(path):
    """read_rows, with one sentence where the file cannot be read, or from where on it is damaged."""
    try:
        yield from read_rows(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(unreadable(path, error)) from None


def stream(path, convert, needs):
    """Row by row, for files that do not fit into memory -> (row number, convert(raw row) or the BadRow it raised).

    needs: what a row has to be, for the sentence of a file that holds something else ("a post has a title and ...").
    Raises UserError where the file cannot be read and, after its last row, where more than half of the rows are bad.
    """
    path = Path(path).expanduser()
    report = Report(path.name)
    for number, raw in read(path):
        report.read += 1
        try:
            if isinstance(raw, BadRow):
                raise raw
            made = convert(raw)
            report.keep("", 1)
        except BadRow as bad:
            report.drop(bad, number)
            made = bad
        yield number, made
    check(report, needs, path)


def flat_rows(flat, want, merge_system, score, report):
    """Flat OASST rows stand in any order, so their trees exist only when the whole file is read. -> as in judged."""
    trees, loose = plant(list(flat.values()))
    for number in loose:
        report.drop(BadRow("hangs on a message that is not there"), number)
    for root, numbers in trees:
        internal = {"tree": root, "label": None, "unread": {}}
        try:
            yield numbers, "OASST messages", None, *made_of(internal, {}, want, merge_system, score)
        except BadRow as bad:
            for number in numbers:
                report.drop(bad, number)


def unreadable(path, error):
    if isinstance(error, PermissionError):
        return f"{path} may not be read: change its permissions."
    if isinstance(error, gzip.BadGzipFile):
        return f"{path} is not gzip: take .gz off its name, or compress it."
    if isinstance(error, (EOFError, zlib.error)):
        return f"{path} is cut short or damaged: download or compress it again."
    return f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): check the path and the disk."


def check(report, needs, path):
    """Stops where nothing is left, or where so much is bad that the file was probably misunderstood."""
    if not report.read:
        raise UserError(f"{path} is empty: it needs at least one row.")
    bad = sum(count for reason, (count, _) in report.dropped.items() if reason not in FINE)
    if report.kept and bad * 2 <= report.read:
        return
    reason, (count, first) = max(report.dropped.items(), key=lambda item: (item[0] not in FINE, item[1][0]))
    if report.forms[reason]:
        where = f"row {first:,}, {count:,} of {report.read:,} rows"
        raise UserError(f"{path} {reason}; {needs} (first: {where}).")
    detail = f": {report.details[reason]}" if report.details[reason] else ""
    much = (f"{bad:,} of its {report.read:,} rows are bad" if report.kept else
            f"none of its {report.read:,} rows can be used")
    cure = CURES.get(reason, needs if reason in FINE else "mend or remove those rows")
    raise UserError(f"{path}: {much}; most often: {reason} ({count:,}, first: row {first:,}{detail}); {cure}.")


def hold_out(rows, share=0.1, seed=0, at_least=1, at_most=500, say=lambda line: None):
    """rows -> (train, held), both in the order of `rows`. What shares its first question or its text with others is held
    out with them or not at all, as nothing is measured by what was trained on.

    held has round(share * len(rows)) rows, within [at_least, at_most], or somewhat fewer: groups are drawn by `seed`, and
    one that is too large for what is left to draw stays in training. Where all are too large, held is the smallest.
    say: told of rows that share. Raises UserError where nothing could be held out, or nothing would be left to train on.
    """
    count = min(max(round(share * len(rows)), at_least), at_most)
    if count and count >= len(rows):
        raise UserError(f"{len(rows)} row{'s are' if len(rows) != 1 else ' is'} too few to hold {count} out for "
                        "evaluation: add rows.")
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault(subject(row), []).append(i)
    if count and len(groups) < 2:
        raise UserError(f"all {len(rows):,} rows share one question or text, so none can be held out for evaluation: "
                        "add rows that ask something else.")
    groups, held = random.Random(seed).sample(list(groups.values()), len(groups)), []
    for group in groups:
        held += group if len(held) + len(group) <= count else []
    held = set(held or min(groups, key=len) if count else [])
    shared = sum(len(group) for group in groups if len(group) > 1)
    if shared:
        say(f"{shared:,} of {len(rows):,} rows share their question or text with others: {len(held):,} rows of "
            f"{sum(group[0] in held for group in groups):,} groups are held out")
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def subject(row):
    """What a row is about, as a number: its text, or its first question, in any case and with any white space."""
    asked = (message["content"] for message in row.get("messages", row.get("prompt", ())) if message["role"] == "user")
    return hash(" ".join(row.get("text", next(asked, "")).casefold().split()))


def main():
    parser = argparse.ArgumentParser(description="Shows how a file of examples is understood.")
    parser.add_argument("file")
    parser.add_argument("--want", choices=FORMS, default="sft", help="the form to make of it")
    parser.add_argument("--merge-system", action="store_true", help="fold the system prompt into the first user turn")
    parser.add_argument("--score", default="score", help="the number that ranks an answer")
    parser.add_argument("--show", type=int, default=3, help="how many rows to print")
    args = parser.parse_args()
    rows, report = load(args.file, args.want, args.merge_system, args.score)
    print(report)
    for row in rows[:max(args.show, 0)]:
        print("\n" + json.dumps(row, indent=2))  # escaped, so that tabs, newlines and look-alikes can be seen


if __name__ == "__main__":
    end_politely()
    main()
