"""common/download.py against a server in a thread that behaves, or misbehaves as asked."""
import errno
import hashlib
import http.server
import json
import threading

import pytest

from common import download
from common.errors import UserError

BODY = bytes(range(256)) * 2000  # 512,000 bytes, no two pieces of it alike at the same place
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files. ranges: honours Range; cuts: how often to hang up halfway; shift: sends another piece."""

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        if server.refusals:
            return self.send_error(server.refusals.pop(0))
        if self.path not in server.files:
            return self.send_error(404)
        body, start = server.files[self.path], 0
        if server.tags and self.headers.get("If-Range", server.tag(body)) != server.tag(body):
            del self.headers["Range"]  # the client has a piece of another file
        if server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        if server.tags:
            self.send_header("ETag", server.tag(body))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            rest = rest[:len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.refusals = {"/a/f.bin": BODY}, [], []
    server.ranges, server.cuts, server.shift, server.tags = True, 0, 0, False
    server.tag = lambda body: f'"{hashlib.sha256(body).hexdigest()[:8]}"'
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("NANOALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(download, "WAITS", (0, 0, 0))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ranges_asked(server):
    return [wanted for _, wanted in server.asked]


def test_a_file_is_fetched_once(server, tmp_path):
    path = download.fetch(f"{server.url}/a/f.bin", SHA, len(BODY))
    assert path == tmp_path / "cache" / f"127.0.0.1_{server.server_port}" / "a" / "f.bin"
    assert path.read_bytes() == BODY and not path.with_name("f.bin.part").exists()
    assert download.fetch(f"{server.url}/a/f.bin", SHA, len(BODY)) == path
    assert len(server.asked) == 1


def test_a_cut_connection_goes_on_where_it_was_cut(server):
    server.cuts, said = 2, []
    path = download.fetch(f"{server.url}/a/f.bin", SHA, say=said.append)
    assert path.read_bytes() == BODY
    assert ranges_asked(server) == [None, "bytes=256000-", "bytes=384000-"]
    assert len(said) == 2 and "cut after 0.3 MB of 0.5 MB" in said[0]


def test_a_server_without_ranges_starts_anew(server):
    server.cuts, server.ranges = 1, False
    assert download.fetch(f"{server.url}/a/f.bin", say=str).read_bytes() == BODY
    assert ranges_asked(server) == [None, "bytes=256000-"]


def test_what_is_kept_serves_the_next_run(server):
    server.cuts = 1000
    server.ranges = False  # so that no try gets further than the one before
    with pytest.raises(UserError) as error:
        download.fetch(f"{server.url}/a/f.bin", say=str)
    sentence, path = str(error.value), download.place(f"{server.url}/a/f.bin")
    assert sentence.startswith(f"{server.url}/a/f.bin could not be fetched") and "0.3 MB are kept" in sentence
    assert sentence.endswith(f"fetch it by hand and save it as {path}") and "\n" not in sentence
    assert len(server.asked) == 4
    assert not path.exists() and path.with_name("f.bin.part").stat().st_size == 256_000
    server.cuts, server.ranges = 0, True
    assert download.fetch(f"{server.url}/a/f.bin", SHA).read_bytes() == BODY
    assert ranges_asked(server)[-1] == "bytes=256000-"


def test_a_slow_connection_that_gets_further_each_time_never_gives_up(server):
    server.cuts = 12  # more than the tries allowed in a row
    assert download.fetch(f"{server.url}/a/f.bin", SHA, say=str).read_bytes() == BODY


@pytest.mark.parametrize("known", [{"size": len(BODY)}, {}])
def test_a_part_that_is_already_complete(server, known):
    path = download.place(f"{server.url}/a/f.bin")
    path.parent.mkdir(parents=True)
    path.with_name("f.bin.part").write_bytes(BODY)
    assert download.fetch(f"{server.url}/a/f.bin", SHA, **known).read_bytes() == BODY
    assert ranges_asked(server) == ([] if known else [f"bytes={len(BODY)}-"])


def test_a_part_of_another_file_is_thrown_away(server):
    path = download.place(f"{server.url}/a/f.bin")
    path.parent.mkdir(parents=True)
    path.with_name("f.bin.part").write_bytes(BODY + b"more")
    assert download.fetch(f"{server.url}/a/f.bin", SHA, say=str).read_bytes() == BODY


def test_a_piece_from_another_place_is_refused(server):
    server.cuts, server.shift = 1, 7
    with pytest.raises(UserError, match="another piece"):
        download.fetch(f"{server.url}/a/f.bin", say=str)


@pytest.mark.parametrize("known, why", [
    ({"sha256": "0" * 64}, "SHA-256"), ({"size": len(BODY) - 1}, "512,000 bytes in place")])
def test_a_damaged_file_is_removed_and_said(server, known, why):
    with pytest.raises(UserError, match=f"arrived damaged .*{why}.* removed"):
        download.fetch(f"{server.url}/a/f.bin", **known)
    path = download.place(f"{server.url}/a/f.bin")
    assert not path.exists() and not path.with_name("f.bin.part").exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(server):
    path = download.fetch(f"{server.url}/a/f.bin")
    path.write_bytes(b"x" + BODY[1:])
    assert download.fetch(f"{server.url}/a/f.bin", SHA, len(BODY)).read_bytes() == BODY


def test_a_missing_file_is_not_asked_for_twice(server):
    with pytest.raises(UserError, match="answers 404 .*check the address"):
        download.fetch(f"{server.url}/none")
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again(server):
    server.refusals = [503, 429]
    assert download.fetch(f"{server.url}/a/f.bin", SHA, say=str).read_bytes() == BODY


def test_nobody_listens(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="Connection refused.*by hand and save it as"):
        download.fetch(f"{server.url}/a/f.bin", say=str)


def test_a_full_disk_keeps_what_it_could_write(server, monkeypatch):
    class Full:
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, piece):
            if self.file.tell() + len(piece) > 100_000:
                self.file.write(piece[:100_000 - self.file.tell()])
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(piece)

    monkeypatch.setattr(download, "open", Full, raising=False)
    with pytest.raises(UserError, match="No space left on device; 0.1 MB are kept.*free some space"):
        download.fetch(f"{server.url}/a/f.bin")
    assert download.place(f"{server.url}/a/f.bin").with_name("f.bin.part").read_bytes() == BODY[:100_000]


def test_a_cache_that_is_no_folder(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="could not be written"):
        download.fetch(f"{server.url}/a/f.bin")


def test_control_c_keeps_the_part(server, monkeypatch):
    def interrupted(response):
        yield response.read(1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "pieces", interrupted)
    with pytest.raises(UserError, match="not complete; 0.0 MB are kept: run the same command again"):
        download.fetch(f"{server.url}/a/f.bin")
    assert download.place(f"{server.url}/a/f.bin").with_name("f.bin.part").read_bytes() == BODY[:1000]


@pytest.mark.parametrize("url", ["data.jsonl", "file:///etc/passwd", "ftp://host/file"])
def test_only_web_addresses(url):
    with pytest.raises(UserError, match="no address"):
        download.fetch(url)


def test_no_address_leaves_the_cache(tmp_path):
    assert download.place("https://host/../../%2e%2e/a%2f..%2fb?x=1&y", tmp_path) == tmp_path / "host" / "a" / "b_x=1_y"


# ---- the hub ---------------------------------------------------------------------------------------------------------

LIST = [{"type": "directory", "path": "data", "size": 0},
        {"type": "file", "path": "README.md", "size": 3, "oid": "1"},
        {"type": "file", "path": "data/train-0.bin", "size": len(BODY), "lfs": {"oid": SHA, "size": len(BODY)}},
        {"type": "file", "path": "data/train-1.bin", "size": 4, "lfs": {"oid": hashlib.sha256(b"four").hexdigest()}},
        {"type": "file", "path": "data/test-0.bin", "size": 9}]


@pytest.fixture
def hub(server):
    server.files = {"/api/datasets/some/set/tree/main?recursive=true": json.dumps(LIST).encode(),
                    "/datasets/some/set/resolve/main/data/train-0.bin": BODY,
                    "/datasets/some/set/resolve/main/data/train-1.bin": b"four"}
    return server


def test_the_hub_tells_names_sizes_and_hashes(hub):
    assert [path.read_bytes() for path in download.hub_files("some/set", "data/train-*", say=str)] == [BODY, b"four"]
    before = len(hub.asked)
    hub.files = {}  # what is in the cache needs no network
    assert download.hub_file("some/set", "data/train-1.bin").read_bytes() == b"four" and len(hub.asked) == before


def test_the_hub_s_hash_is_checked(hub):
    hub.files["/datasets/some/set/resolve/main/data/train-1.bin"] = b"five"
    with pytest.raises(UserError, match="arrived damaged"):
        download.hub_file("some/set", "data/train-1.bin", say=str)


def test_a_name_that_the_hub_does_not_have(hub):
    with pytest.raises(UserError, match="some/set has no file data/none: see .*/datasets/some/set/tree/main"):
        download.hub_file("some/set", "data/none", say=str)


def test_without_the_list_the_files_can_be_fetched_by_hand(hub):
    hub.files = {}
    with pytest.raises(UserError, match=f"by hand from {hub.url}/datasets/some/set/tree/main and .* --source"):
        download.hub_file("some/set", "data/train-1.bin", say=str)


def test_an_empty_file(server):
    server.files["/empty"] = b""
    assert download.fetch(f"{server.url}/empty", hashlib.sha256().hexdigest(), 0).read_bytes() == b""


def test_a_page_in_place_of_the_list_is_not_kept(hub):
    good = hub.files["/api/datasets/some/set/tree/main?recursive=true"]
    hub.files["/api/datasets/some/set/tree/main?recursive=true"] = b"<html>please log in</html>"
    with pytest.raises(UserError, match="no list of the files of some/set"):
        download.hub_list("some/set")
    hub.files["/api/datasets/some/set/tree/main?recursive=true"] = good
    assert download.hub_list("some/set")["data/train-1.bin"] == (4, hashlib.sha256(b"four").hexdigest())


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_changed_meanwhile_is_no_mixture_of_two(server, tags):
    server.tags, server.ranges, server.cuts = tags, False, 1000
    with pytest.raises(UserError):
        download.fetch(f"{server.url}/a/f.bin", say=str)
    server.ranges, server.cuts, server.files["/a/f.bin"] = True, 0, bytes(reversed(BODY))
    path = download.fetch(f"{server.url}/a/f.bin")
    assert (path.read_bytes() == bytes(reversed(BODY))) == tags  # without a tag nobody can tell
    assert [other.name for other in path.parent.iterdir()] == ["f.bin"]


def test_a_list_that_is_older_than_its_files_is_asked_for_again(server):
    def listed(body):
        return json.dumps([{"type": "file", "path": "x.jsonl", "size": len(body)}]).encode()

    tree, new = "/api/datasets/me/set/tree/main?recursive=true", b"more rows than before"
    server.files |= {tree: listed(b"rows"), "/datasets/me/set/resolve/main/x.jsonl": new}
    download.hub_list("me/set")
    server.files[tree] = listed(new)
    assert download.hub_file("me/set", "x.jsonl", say=str).read_bytes() == new
    server.files[tree] = server.files["/datasets/me/set/resolve/main/x.jsonl"] = b"[]"
    with pytest.raises(UserError, match="has no file"):
        download.place(f"{server.url}{tree}").unlink()
        download.hub_file("me/set", "x.jsonl", say=str)
