"""Files on the disk: whole or not there at all, rows that survive a kill, and one sentence where the disk refuses.

    with replacing("out/report.json") as temporary: ...      a file gets its name when its block has ended well
    with writing("out", ["sft_train", "sft_test"]) as out:   the same for several files of rows, which are streamed
        out["sft_train"].write({"messages": [...]})
    with together("out/sft", [...]) as folder: ...           files that are one thing, a model's: all of them or none
    done = Ledger("out/answers.jsonl", {"question": str, "answer": str}, "an answer")    rows that were paid for, as they come
"""
import contextlib
import json
import os
import shutil
from pathlib import Path

from common.errors import UserError

CURE = "free some space or choose another --out"
SAVING, SAVED, GONE = ".saving", ".saved", ".gone"  # of together: new files, the same when whole, names that go


@contextlib.contextmanager
def on_disk(path, cure=CURE, kept=lambda: ""):
    """Turns the disk's refusals into one sentence. kept: says what is there already, too late for the rest."""
    try:
        yield
    except OSError as error:
        path = Path(*(part for part in Path(path).parts if part != SAVING))  # under its name to be
        raise UserError(f"{path} could not be written ({error.strerror or error}{kept()}): {cure}") from None


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path` and renames it when the block ends well: nobody ever sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def together(folder, old):
    """Gives a temporary folder. When the block ends well, its files take the places of those in `folder` whose names
    match a pattern in `old`; others stay.

    Until the temporary folder is renamed nothing has happened, and from then on anybody can end it (settle): so a kill
    at any moment leaves all the old files or all the new ones to those who call settle before they read.
    """
    folder, saving = Path(folder), Path(folder) / SAVING
    try:
        with on_disk(folder):
            settle(folder)
            shutil.rmtree(saving, ignore_errors=True)  # of a run that was killed
            saving.mkdir(parents=True)
            yield saving
            gone = {path.name for pattern in old for path in folder.glob(pattern)} - set(os.listdir(saving))
            (saving / GONE).write_text("\n".join(sorted(gone)), encoding="utf-8")
            os.replace(saving, folder / SAVED)
        settle(folder)
    finally:
        shutil.rmtree(saving, ignore_errors=True)


def settle(folder):
    """Ends what a kill may have left of `together`. Two processes may do it at once: a file that is not there any more
    is in its place, and what is removed is never one of the new."""
    folder, saved = Path(folder), Path(folder) / SAVED
    if saved.is_dir():
        missing = contextlib.suppress(FileNotFoundError)
        with on_disk(folder):
            with missing:
                for name in (saved / GONE).read_text(encoding="utf-8").splitlines():
                    (folder / name).unlink(missing_ok=True)
            for name in sorted(set(os.listdir(saved)) - {GONE}, reverse=True):  # weights before config.json
                with missing:
                    os.replace(saved / name, folder / name)
            (saved / GONE).unlink(missing_ok=True)  # last: until here all of this can be done again
            with missing:
                saved.rmdir()


def write_json(path, content, **options):
    """Anything that JSON knows, the whole file at once; half of a surrogate pair becomes "?"."""
    with replacing(path) as temporary:
        temporary.write_bytes(json.dumps(content, **options).encode("utf-8", "replace") + b"\n")


def json_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path, rows):
    """A row a line, the whole file at once."""
    with replacing(path) as temporary:
        temporary.write_text("".join(map(json_line, rows)), encoding="utf-8", newline="\n")


# ---- rows that are streamed ------------------------------------------------------------------------------------------

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
        with on_disk(self.path):
            self.file.write(json_line(row).encode("utf-8", "replace"))  # half of a surrogate pair becomes "?"
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


# ---- rows that were paid for -----------------------------------------------------------------------------------------

class Ledger:
    """Rows, one JSON object a line, on the disk as they come: what an interrupted run has paid for is not asked again.

    fields: {key: type or types} of every row, in the order in which rows are written. `rows` are those of earlier runs
    and those added since; a last line that a kill has cut short is dropped. Raises UserError for a file that holds
    anything else (what: the name of a row in that sentence) and leaves it alone.
    """

    def __init__(self, path, fields, what):
        self.path, self.rows, self.size = Path(path), [], 0  # size: bytes of the whole lines
        begin = f'{{"{next(iter(fields))}": '.encode()
        try:
            for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
                if not line.endswith(b"\n") and line.startswith(begin[:len(line)]):
                    break
                row = json.loads(line)
                if not all(isinstance(row[key], kind) for key, kind in fields.items()):
                    raise ValueError
                self.rows.append(row)
                self.size += len(line)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {len(self.rows) + 1} is no {what}, so the file is left alone: choose "
                            "another one") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): choose another file") from None

    def add(self, *rows):
        """Writes them behind the others. Raises UserError where the disk refuses; what is written is kept."""
        with on_disk(self.path, "free some space or choose another place; what is written is kept"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self.size)
                self.size += file.write("".join(json.dumps(row) + "\n" for row in rows).encode())  # ASCII
        self.rows += rows
