"""Reads a user's file of examples, whatever its shape; what cannot be used is counted and said.

    python -m data.files FILE [--want sft] [--merge-system] [--show 3]

shows how a file was understood. Endings: .jsonl, .json (an array, one object per line, or the array inside one object),
.csv, .tsv, .txt (documents separated by blank lines), each also with .gz; .parquet where pyarrow is installed. What the
rows may look like, and the four forms that are made of them, stands in shapes.py.
"""
import codecs
import gzip
import io
import itertools
import json
import random
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError, end_politely, visible
from common.hub import free_memory
from data import cells
from data.cells import LIMIT
from data.shapes import BAD_ANSWER, FORMS, NEEDS, SHAPES, BadRow, WrongForm, finished, parts, plant, recognise, shown
from common.flags import Count, Parser, bounded


# ---- files: every ending becomes (row number, raw row or BadRow) ----

MAGIC = [(b"\x1f\x8b", "is gzip-compressed: add .gz to its name"), (b"PK\x03\x04", "is a zip archive: unpack it"),
         (b"PAR1", "is a parquet file: let its name end in .parquet"),
         (codecs.BOM_UTF16_LE, "is UTF-16: save it as UTF-8"),
         (codecs.BOM_UTF16_BE, "is UTF-16: save it as UTF-8"),
         (b"\0\0", "begins with NUL bytes, so it is no text: download it again"),
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
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device: save what comes out of it as a file first.")
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
        most = min(2 ** 32, free_memory() or 2 ** 32) // 8  # what becomes of it takes several times its size
        text = stream.read(most + 1)
        if len(text) > most:
            raise UserError(f"{path} is over {most / 1e9:.2g} GB (unpacked), too large to be read whole: write one object per "
                            "line as .jsonl.")
        text = text.decode("utf-8", "surrogateescape")
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
    return cells.read(path, open_text, tabs=ending_of(path) == ".tsv")


def read_txt(path):
    """Documents separated by blank lines; line ends become newlines."""
    with open_text(path, newline=None) as stream:
        pieces = iter(lambda: stream.readline(LIMIT + 1), "")
        documents = itertools.groupby(pieces, key=lambda piece: bool(piece.strip()))
        for number, document in enumerate((group for full, group in documents if full), 1):
            text = ""
            for piece in document:
                text += piece if len(text) <= LIMIT else ""
            whole = {"text": text.removesuffix("\n")}
            yield number, whole if len(text) <= LIMIT else BadRow("document over 10 MB")


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
FINE = ("fewer than two answers", BAD_ANSWER, "a tree without the wanted form")
CURES = {
    BAD_ANSWER: "rename the key if it does not judge the answer",
    "a label that is no verdict": "use true and false, or rename the key if it does not judge the answer",
    "unknown keys": "rename the keys to one of the shapes " + ", ".join(shape.name for shape in SHAPES),
    "not UTF-8, or half of a surrogate pair": "save the file as UTF-8",
    "NUL byte": "save the file as UTF-8, without NUL bytes",
    "not valid CSV": "double the quotes inside of a cell in quotes",
    "not valid JSON": "write one JSON object per line",
    "line over 10 MB": "write one example per line",
    "document over 10 MB": "put blank lines between documents",
    "a tool's turn": "tool use is not supported, so remove those conversations",
    "unknown role": "use system, user and assistant",
}


@dataclass
class FileReport:
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
        return visible(self.counts() + "".join(
            f"\n  look: {what} ({count:,} row{'s' * (count != 1)}, first: row {first:,}{example and ', ' + example})"
            for what, (count, first, example) in self.notes.items()))

    def counts(self):
        shapes = ", ".join(self.shapes if len(self.shapes) == 1 else (f"{k} {n:,}" for k, n in self.shapes.items()))
        kept = f"{self.kept:,} kept" if self.kept == self.used else f"{self.kept:,} made from {self.used:,} of them"
        text = self.name.lower().removesuffix(".gz").endswith(".txt")
        line = f"{self.name}: {self.read:,} {'document' if text else 'row'}{'s' * (self.read != 1)} read"
        line += f"{' (blank lines separate them)' * (text and self.read > 1)}, {kept}"
        line += f" ({shapes})" if shapes else ""
        if not self.dropped:
            return line
        line += f"; dropped {sum(count for count, _ in self.dropped.values()):,}: "
        if len(self.dropped) == 1:
            return line + "".join(f"{reason} (first: row {first:,})" for reason, (_, first) in self.dropped.items())
        return line.rstrip() + "".join(f"\n  {count:>9,}  {reason} (first: row {first:,})" for reason, (count, first)
                                       in sorted(self.dropped.items(), key=lambda item: -item[1][0]))


def load(path, want, merge_system=False, score="score"):
    """Reads the rows of a file in the wanted form: (list of rows as in the module's docstring, FileReport).

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
    report, found, flat = FileReport(path.name), [], {}
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
    that the answer is bad. Where a tenth of the labels or more say neither, numbers are classes of something else."""
    labels = [label for _, _, label, *_ in found if label]
    judges, rows = labels.count("odd") * 10 < len(labels), []
    for numbers, shape, label, made, notes in found:
        if want == "sft" and (label == "bad" or judges and label in ("zero", "odd")):
            report.drop(BadRow("a label that is no verdict" if label == "odd" else BAD_ANSWER), *numbers)
            continue
        rows += made
        report.keep(f"{shape}, judged" if judges and label and want == "sft" else shape, len(made), len(numbers))
        if want == "sft" and label == "zero":
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
    report = FileReport(path.name)
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
    cure = "" if ": rename " in detail else f"; {cure}"  # the detail says it better
    raise UserError(f"{path}: {much}; most often: {reason} ({count:,}, first: row {first:,}{detail}){cure}.")


def hold_out(rows, share=0.1, seed=0, at_least=1, at_most=500, say=lambda line: None):
    """rows -> (train, held), both in the order of `rows`. Rows that share their first question, or their text, are held
    out together or not at all: nothing is measured by what was trained on.

    held has round(share * len(rows)) rows, within [at_least, at_most], or somewhat fewer: groups are drawn by `seed`,
    and one with more rows than are still wanted stays in training. Where all have more, held is the smallest group.
    say: told how many rows share. Raises UserError where nothing could be held out, or nothing be left to train on.
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
        drawn = sum(group[0] in held for group in groups)
        say(f"{shared:,} of {len(rows):,} rows share their question or text with others: {len(held):,} rows of "
            f"{drawn:,} group{'s' * (drawn != 1)} are held out")
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def hold_out_text(rows, seed=0, say=lambda line: None):
    """hold_out for rows of plain text, of which one is enough: then its last tenth is held out."""
    if len(rows) > 1:
        return hold_out(rows, seed=seed, say=say)
    words = re.split(r"(?<=\s)", rows[0]["text"])
    last = max(1, len(words) // 10)
    if len(words) < 2:
        raise UserError("one word is too short a text to train on: add some.")
    say(f"one document (blank lines would separate several): its last {last:,} of {len(words):,} words are held out")
    return [{"text": "".join(words[:-last])}], [{"text": "".join(words[-last:])}]


def enough(kept, rows, limit, cure):
    """Raises UserError where under a tenth of a file's conversations fit what the model can read."""
    if kept * 10 < rows:
        raise UserError(f"only {kept:,} of {rows:,} conversations fit {limit:,} tokens: {cure}.")


def subject(row):
    """What a row is about, as a number: its text, or its first question, in any case and with any white space."""
    asked = (message["content"] for message in row.get("messages", row.get("prompt", ())) if message["role"] == "user")
    return hash(" ".join(row.get("text", next(asked, "")).casefold().split()))


def main():
    parser = Parser("python -m data.files", description="Shows how a file of examples is understood.")
    parser.add_argument("file")
    parser.add_argument("--want", choices=FORMS, default="sft", help="the form to make of it")
    parser.add_argument("--merge-system", action="store_true", help="fold the system prompt into the first user turn")
    parser.add_argument("--score", default="score", help="the number that ranks an answer")
    parser.add_argument("--show", type=bounded(Count), default=3, help="how many rows to print")
    args = parser.parse_args()
    rows, report = load(args.file, args.want, args.merge_system, args.score)
    print(report)
    for row in rows[:args.show]:
        print("\n" + json.dumps(row, indent=2))  # escaped, so that tabs, newlines and look-alikes can be seen


if __name__ == "__main__":
    end_politely()
    main()
