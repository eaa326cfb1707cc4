"""Files on the disk: whole or not there at all, rows that survive a kill, and one sentence where the disk refuses.

    with replacing("out/report.json") as temporary: ...      a file gets its name when its block has ended well
    with writing("out", ["sft_train", "sft_test"]) as out:   the same for several files of rows, which are streamed
        out["sft_train"].write({"messages": [...]})
    with together("out/sft", [...]) as folder: ...           files that are one thing, a model's: all of them or none
    done = Ledger("out/answers.jsonl", {"question": str, "answer": str}, "an answer")    rows that were paid for, as they come

`claim` makes a folder this process's to write to, before any work.
"""
import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from common.errors import UserError

CURE = "free some space or choose another --out"
DAY = 86_400  # seconds
SAVING, SAVED, GONE = ".saving", ".saved", ".gone"  # of together: new files, the same when whole, names that go


@contextlib.contextmanager
def on_disk(path, cure=CURE, kept=lambda: ""):
    """Turns the disk's refusals into one sentence. kept: says what is there already, too late for the rest."""
    try:
        yield
    except OSError as error:
        path = Path(*(part for part in Path(path).parts if part != SAVING))  # under its name to be
        raise UserError(f"{path} could not be written ({error.strerror or error}{kept()}): {cure}") from None


def flush(target, *paths):
    """Waits until files, or a folder's names, are where no power cut takes them; files get the mode that this user's
    files have (safetensors would keep others from reading them). Not for a target within the temporary folder of a
    `together`, which does it once for all."""
    for path in paths if SAVING not in target.parts else ():
        folder = path.is_dir()
        if not folder:
            os.umask(mask := os.umask(0o077))  # the only way to ask for it
            with contextlib.suppress(OSError):  # a disk without modes
                path.chmod(0o666 & ~mask)
        with contextlib.suppress(*[OSError] * folder):  # not every system can open one
            descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path` and renames it when the block ends well: nobody ever sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            yield temporary
            flush(path, temporary)
            os.replace(temporary, path)
            flush(path, path.parent)
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
            flush(folder, *saving.iterdir(), saving)
            os.replace(saving, folder / SAVED)
            flush(folder, folder)
        settle(folder)
    finally:
        shutil.rmtree(saving, ignore_errors=True)


def settle(folder):
    """Ends what a kill may have left of `together`. Two processes may do it at once: a file that is not there any more
    is in its place, and what is removed is never one of the new."""
    folder, saved = Path(folder), Path(folder) / SAVED
    if os.path.isdir(saved):  # unlike Path's, it knows names that are too long
        missing = contextlib.suppress(FileNotFoundError)
        with on_disk(folder):
            with missing:
                for name in (saved / GONE).read_text(encoding="utf-8").splitlines():
                    (folder / name).unlink(missing_ok=True)
            for name in sorted(set(os.listdir(saved)) - {GONE}, reverse=True):  # weights before config.json
                with missing:
                    os.replace(saved / name, folder / name)
            flush(folder, folder)
            (saved / GONE).unlink(missing_ok=True)  # last: until here all of this can be done again
            with missing:
                saved.rmdir()


def sweep(folder):
    """Removes the temporary files of `replacing` whose process is dead. Where that cannot be asked (on Windows signal 0
    would end it), those older than a day."""
    for path in Path(folder).glob(".*.tmp"):
        process = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        with contextlib.suppress(OSError, OverflowError):  # gone by now, or not ours
            dead = process and time.time() - path.stat().st_mtime > DAY
            if process and os.name == "posix":
                try:
                    os.kill(int(process[1]), 0)
                except ProcessLookupError:
                    dead = True
            if dead:
                path.unlink()


# ---- a folder of one's own -------------------------------------------------------------------------------------------

CLAIMED = {}  # (device, inode) of a folder: the descriptor that holds its lock


def writable(folder):
    """Makes the folder and tries whether a file can be written there: now, not when the work is done. What killed
    processes have left goes. Raises UserError."""
    folder = Path(folder)
    with on_disk(folder, "it has to be a folder in which files can be written, choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        probe = folder / f".try.{os.getpid()}.tmp"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)


def claim(folder):
    """Makes sure that the folder is writable, and that no other process can claim it until this one ends, however it
    does, or calls release. Raises UserError where another one has."""
    writable(folder)
    if not lock(folder):
        print(f"this system cannot lock {folder}: do not start a second run with this --out while it runs")
    settle(folder)
    shutil.rmtree(Path(folder) / SAVING, ignore_errors=True)  # of a process that was killed


def lock(folder):
    """-> False where there are no locks: on Windows, on some network disks. Raises UserError where it is another's."""
    if fcntl is None:
        return False
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        place = os.fstat(descriptor)
        if (place.st_dev, place.st_ino) not in CLAIMED:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            CLAIMED[place.st_dev, place.st_ino], descriptor = descriptor, None
        return True
    except BlockingIOError:
        raise UserError(f"another process is writing to {folder}: wait until it ends, or choose another --out") from None
    except OSError:
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)


def release(folder):
    """Others may claim it again."""
    with contextlib.suppress(OSError):
        place = os.stat(folder)
        os.close(CLAIMED.pop((place.st_dev, place.st_ino), -1))


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
        writable(self.path.parent)  # now, not when the first row has been paid for
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
