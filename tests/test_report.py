"""The counts are right, the table shows them, and whatever happens while rows are written, what is finished stays."""
import errno
import json

import pytest

from data.report import PREVIEW, PipelineReport
from common.disk import whole_rows, writing
from common.errors import UserError


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- counting --------------------------------------------------------------------------------------------------------

def filled():
    report = PipelineReport()
    report.note("by hand")
    for name, texts in (("train", [" a b", "c", " d"]), ("test", ["e ", "f"])):
        report.section(name)
        for text in texts:
            text = report.change("white space", str.strip, text)
            if report.keep("no letter of abc", set(text) & set("abc"), text):
                report.count("letters", len(text.split()), text)
    return report


def test_counts():
    report = filled()
    assert report.counts("train") == {"white space": 2, "no letter of abc": 1, "letters": 3}
    assert report.counts("test") == {"white space": 1, "no letter of abc": 2}
    assert report.counts() == {"white space": 3, "no letter of abc": 3, "letters": 3}


def test_change_returns_the_text_and_keep_a_bool():
    report = PipelineReport()
    assert report.change("upper", str.upper, "a") == "A" and report.change("upper", str.upper, "B") == "B"
    assert report.keep("some", [1]) is True and report.keep("some", []) is False
    assert report.counts() == {"upper": 1, "some": 1}


def test_the_first_victim_is_shown_and_shortened():
    report = PipelineReport()
    report.keep("long", True, "fine")
    report.keep("long", False, "x\n y " * 1000)
    report.keep("long", False, "later")
    step = report.steps["long"]
    assert step.first.startswith("x y x y") and step.first.endswith("...") and len(step.first) == PREVIEW
    report.keep("row", False, {"text": "\u00e9"})
    assert report.steps["row"].first == '{"text": "\u00e9"}'
    report.change("end", str.strip, "word " * 500 + "last  ")
    assert report.steps["end"].first.endswith("last") and len(report.steps["end"].first) <= PREVIEW  # where it differs


def test_table():
    lines = str(filled()).splitlines()
    assert lines[0] == "by hand" and lines[1].split() == ["train", "rows", "in", "rows", "left", "first"]
    assert lines[2].split() == ["white", "space", "3", "2", "changed", "3", "a", "b"]
    assert lines[3].split() == ["no", "letter", "of", "abc", "3", "1", "removed", "2", "d"]
    assert lines[4].split() == ["letters", "3", "counted", "a", "b"]
    assert lines[5].startswith("test") and len(lines) == 8


def test_save(tmp_path):
    filled().save(tmp_path / "new" / "report.json")
    saved = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    assert saved["notes"] == ["by hand"] and list(saved["sections"]) == ["train", "test"]
    assert saved["sections"]["train"]["no letter of abc"] == {"kind": "removed", "rows": 3, "hit": 1, "first": "d"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


def test_one_step_is_of_one_kind():
    report = PipelineReport()
    report.count("step")
    with pytest.raises(ValueError, match="counted in one place and removed in another"):
        report.keep("step", True)


# ---- writing ---------------------------------------------------------------------------------------------------------

def test_files_get_their_names_at_the_end(tmp_path):
    with writing(tmp_path / "new", ["a", "b"]) as out:
        out["a"].write({"text": "\u00e9\n"})
        out["b"].finish()
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.unfinished.jsonl", "b.jsonl"]
    assert rows_in(tmp_path / "new" / "a.jsonl") == [{"text": "\u00e9\n"}] and out["a"].rows == 1
    assert (tmp_path / "new" / "a.jsonl").read_bytes() == '{"text": "\u00e9\\n"}\n'.encode()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.jsonl", "b.jsonl"]


def test_an_older_file_stays_until_the_new_one_is_finished(tmp_path):
    (tmp_path / "a.jsonl").write_text("old")
    with pytest.raises(UserError):
        with writing(tmp_path, ["a"]) as out:
            out["a"].write({"n": 1})
            raise UserError("bad file.")
    assert (tmp_path / "a.jsonl").read_text() == "old"
    with writing(tmp_path, ["a"]) as out:
        out["a"].write({"n": 2})
    assert rows_in(tmp_path / "a.jsonl") == [{"n": 2}] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error, says", [(UserError("x.gz is cut short: download it again."),
                                          "x.gz is cut short: download it again"),
                                         (KeyboardInterrupt(), "stopped by Ctrl-C")])
def test_what_is_finished_stays(tmp_path, error, says):
    with pytest.raises(UserError) as caught:
        with writing(tmp_path, ["a", "b", "c"]) as out:
            out["a"].write({"n": 1})
            out["a"].finish()
            out["b"].write({"n": 2})
            raise error
    assert str(caught.value) == f"{says}; complete: a.jsonl (1 rows); unfinished: b.unfinished.jsonl (1 rows)."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.unfinished.jsonl"]  # c had no row
    assert rows_in(tmp_path / "b.unfinished.jsonl") == [{"n": 2}]


class FullDisk:
    """A file that takes `room` bytes, and then, like a full disk, only part of what it is given."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.file.write(data[:self.room])
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        self.file.close()
        raise OSError(errno.ENOSPC, "No space left on device")  # the rest of a buffer has no room either


def test_a_full_disk_leaves_whole_rows(tmp_path):
    says = (r"b.jsonl could not be written \(No space left on device\): free some space .*; "
            r"complete: a.jsonl \(1 rows\); unfinished: b.unfinished.jsonl \(2 rows\).")
    with pytest.raises(UserError, match=says):
        with writing(tmp_path, ["a", "b"]) as out:
            out["a"].write({"n": 0})
            out["a"].finish()
            out["b"].file = FullDisk(out["b"].file, room=22)
            for n in range(9):
                out["b"].write({"n": n})  # 9 bytes a row
    assert rows_in(tmp_path / "b.unfinished.jsonl") == [{"n": 0}, {"n": 1}]


def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with writing(tmp_path, ["a"]) as out:
            out["a"].write({"n": 1})
            1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.unfinished.jsonl"] and out["a"].file.closed


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        with writing(tmp_path / "file" / "folder", ["a"]):
            pass
    with pytest.raises(UserError, match="could not be written"):
        PipelineReport().save(tmp_path / "file" / "report.json")


@pytest.mark.parametrize("content, rows, left", [
    (b"", 0, b""), (b"1\n2\n", 2, b"1\n2\n"), (b"1\n2", 1, b"1\n"), (b"1", 0, b"")])
def test_whole_rows(tmp_path, content, rows, left):
    path = tmp_path / "x"
    path.write_bytes(content)
    assert whole_rows(path) == rows and path.read_bytes() == left


def test_half_of_a_surrogate_pair_stops_nobody(tmp_path):
    with writing(tmp_path, ["a"]) as out:
        out["a"].write({"text": "\ud83d!"})
    assert rows_in(tmp_path / "a.jsonl") == [{"text": "?!"}]
    PipelineReport().save(tmp_path / "r.json")
