"""Downloads: a file is fetched once, whole and undamaged, however often the connection is cut.

    python -m common.download HuggingFaceTB/smoltalk                                what the Hugging Face hub has of it
    python -m common.download HuggingFaceTB/smoltalk "data/smol-rewrite/train-*"    fetches these files
    python -m common.download https://example.org/rows.jsonl --sha256 9f86d0...     from anywhere

prints where each file lies: below ~/.cache/nanoalign, or wherever NANOALIGN_CACHE says. HF_ENDPOINT names a mirror of
the hub. What has been fetched stays in a .part file beside it, and the next run asks the server for the rest only (HTTP
Range). The hub tells the size of every file and the SHA-256 of every large one, so both are checked; a file gets its
name only when they are right.
"""
import fnmatch
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from common.errors import UserError, end_politely

from tqdm import tqdm

from common.disk import on_disk
from common.flags import Parser

WAITS = (1, 2, 4)  # seconds before the next try; as soon as a try gets further than the one before, it begins anew
PATIENCE = 30  # seconds without a byte
RETRIED = (408, 429, 500, 502, 503, 504)  # the server is busy or broken, which may pass; any other refusal will not


class Damaged(UserError):
    """A file is not what was said of it."""


class Cut(Exception):
    """The connection failed or ended early: worth another try."""


# ---- where things are ------------------------------------------------------------------------------------------------

def cache_folder():
    return Path(os.environ.get("NANOALIGN_CACHE") or "~/.cache/nanoalign").expanduser()


def place(url, cache=None):
    """The file in the cache that belongs to an address: its host and path, with other signs than these as _."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{url} is no address: it has to begin with https://")
    names = [parts.netloc, *urllib.parse.unquote(parts.path).split("/")]
    names = [re.sub(r"[^\w.=-]", "_", name) for name in names if name not in ("", ".", "..")]
    names[-1] += re.sub(r"[^\w.=-]", "_", f"?{parts.query}") if parts.query else ""
    return Path(cache or cache_folder()).joinpath(*names)


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


# ---- one file --------------------------------------------------------------------------------------------------------

def fetch(url, sha256=None, size=None, cache=None, say=print, by_hand=""):
    """The file at an address -> its Path in the cache, fetched if it is not there yet.

    sha256 (hex), size (bytes): what the file must have, where that is known. Raises UserError with one sentence where
    it cannot be fetched or stored; what has arrived by then is kept, and the next call goes on from there. A file that
    arrives damaged is removed. by_hand: what the sentence advises, if not to save the file in the cache.
    """
    path = place(url, cache)
    if path.is_file() and fault(path, sha256, size) is None:
        return path
    part = path.with_name(path.name + ".part")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    by_hand = by_hand or f"fetch it by hand and save it as {path}"
    try:
        with_patience(lambda: fetch_rest(url, part, size), part, lambda line: say(f"{url}: {line}"))
    except Cut as cut:
        raise UserError(f"{url} could not be fetched ({cut}{kept(part)}): run the same command again, or "
                        f"{by_hand}") from None
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} could not be fetched (the server answers {error.code} {error.reason}): check the "
                        f"address, or {by_hand}") from None
    except KeyboardInterrupt:
        raise UserError(f"{url} is not complete{kept(part)}: run the same command again") from None
    wrong = fault(part, sha256, size)
    if wrong:
        forget(part)
        raise Damaged(f"{url} arrived damaged ({wrong}) and has been removed: run the same command again, or "
                        f"{by_hand}")
    with storing(path):
        os.replace(part, path)
        forget(part)
    return path


def with_patience(attempt, part, say):
    """Calls attempt() until it succeeds. Raises the last Cut where len(WAITS) + 1 tries in a row got no further than
    the best one before."""
    failures, furthest = 0, size_of(part)
    while True:
        try:
            return attempt()
        except Cut as cut:
            failures = 1 if size_of(part) > furthest else failures + 1
            furthest = max(furthest, size_of(part))
            if failures > len(WAITS):
                raise
            wait = WAITS[failures - 1]
            say(f"{cut}; next try in {wait} s")
            time.sleep(wait)


def fetch_rest(url, part, size):
    """One try: appends to `part` what it lacks. Raises Cut, or HTTPError where the server refuses."""
    have = size_of(part)
    if size and have >= size:
        return  # complete, but the run before was stopped before it could be checked
    headers, version = {"User-Agent": "nanoAlign"}, tag_of(part)
    if have:  # the rest, but where the file has changed meanwhile all of it
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version.read_text()} if version.exists() else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing to send from there on: the part is as long as the file, or of another file
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            forget(part)
            raise Cut("what was kept does not fit the file") from None
        if error.code in RETRIED:
            raise Cut(f"the server answers {error.code} {error.reason}") from None
        raise
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise Cut(in_words(getattr(error, "reason", error))) from None
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not resumed and response.status == 206:
            raise Cut("the server sent another piece than was asked for")
        have = have if resumed else 0  # a server without Range, or with a new file, sends everything: start anew
        if not resumed:
            keep_tag(response.headers, part)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        append(response, part, have, total)
    if total is not None and size_of(part) < total:
        raise Cut(f"the connection was cut after {megabytes(size_of(part))} of {megabytes(total)}")


def tag_of(part):
    """The file that says of which version a part is, as its server has called it."""
    return part.with_name(part.name + ".version")


def keep_tag(headers, part):
    tag = headers.get("ETag") or ""
    tag = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag  # a weak one promises no bytes
    with storing(part):
        tag_of(part).unlink(missing_ok=True)
        if tag:
            tag_of(part).write_text(tag)


def forget(part):
    for path in (part, tag_of(part)):
        path.unlink(missing_ok=True)


def append(response, part, have, total):
    """Writes the response to the file behind its first `have` bytes."""
    bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=None)
    with bar, storing(part), open(part, "ab" if have else "wb") as file:
        for piece in pieces(response):
            file.write(piece)
            bar.update(len(piece))


def pieces(response):
    """The body in pieces; Cut in place of whatever the network raises, so that other OSErrors are the disk's."""
    while True:
        try:
            piece = response.read1(1 << 20)  # what has arrived, not what fills a megabyte: a cut then loses nothing
        except (OSError, http.client.HTTPException) as error:
            raise Cut(in_words(error)) from None
        if not piece:
            return
        yield piece


# ---- checks and sentences --------------------------------------------------------------------------------------------

def fault(path, sha256, size):
    """What is wrong with a file, in words, or None."""
    if size is not None and size_of(path) != size:
        return f"{size_of(path):,} bytes in place of {size:,}"
    if sha256 is None:
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    found = digest.hexdigest()
    return None if found == sha256.lower() else f"its SHA-256 is {found[:12]}..., not {sha256[:12]}..."


def in_words(error):
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def kept(part):
    return f"; {megabytes(size_of(part))} are kept" if size_of(part) else ""


def megabytes(count):
    return f"{count / 1e6:,.1f} MB"


def storing(path):
    """on_disk, for a file in the cache."""
    return on_disk(path, "free some space or name another folder in NANOALIGN_CACHE, and run the same command again",
                   lambda: kept(path))


# ---- the Hugging Face hub --------------------------------------------------------------------------------------------

def hub_list(dataset, cache=None, say=print, anew=False):
    """{name: (bytes, SHA-256 or None)} of a public data set's files, the first 1,000. The list is kept in the cache
    like any file, so that what has been fetched once needs no network again. anew: it is fetched again."""
    by_hand = (f"fetch its files by hand from {endpoint()}/datasets/{dataset}/tree/main and name them with the "
               "--source of the script that reads them")
    url = f"{endpoint()}/api/datasets/{dataset}/tree/main?recursive=true"
    if anew:
        place(url, cache).unlink(missing_ok=True)
    listing = fetch(url, cache=cache, say=say, by_hand=by_hand)
    try:
        entries = [entry for entry in json.loads(listing.read_text(encoding="utf-8")) if entry["type"] == "file"]
        return {entry["path"]: (entry["size"], entry.get("lfs", {}).get("oid")) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError):
        listing.unlink()
        raise UserError(f"{endpoint()} sent no list of the files of {dataset}: check HF_ENDPOINT and the network, and "
                        "run again") from None


def hub_files(dataset, pattern, cache=None, say=print):
    """The files of a public data set whose names fit a pattern such as data/train-*.parquet -> their Paths, fetched."""
    files = hub_list(dataset, cache, say)
    names = sorted(fnmatch.filter(files, pattern))
    if not names:
        raise UserError(f"{dataset} has no file {pattern}: see {endpoint()}/datasets/{dataset}/tree/main")
    missing = [name for name in names if not place(address(dataset, name), cache).is_file()]
    if missing:
        say(f"{dataset}: {len(missing)} file{'s' * (len(missing) > 1)} to fetch, "
            f"{megabytes(sum(files[name][0] for name in missing))}")
    found = []
    for name in names:
        try:
            found.append(fetch(address(dataset, name), files[name][1], files[name][0], cache, say))
        except Damaged:  # or the list in the cache is older than the file: ask for it again, once
            old, files = files, hub_list(dataset, cache, say, anew=True)
            if files.get(name) in (None, old[name]):
                raise
            say(f"{dataset}: {name} has changed since its list was fetched, so both are fetched again")
            found.append(fetch(address(dataset, name), files[name][1], files[name][0], cache, say))
    return found


def address(dataset, name):
    return f"{endpoint()}/datasets/{dataset}/resolve/main/{urllib.parse.quote(name)}"


def hub_file(dataset, name, cache=None, say=print):
    """One file of a public data set on the Hugging Face hub -> its Path in the cache."""
    return hub_files(dataset, name, cache, say)[0]


def main():
    parser = Parser("python -m common.download",
                                     description="Fetches a file into the cache and prints where it lies.")
    parser.add_argument("source", help="an address (https://...) or the name of a data set on the Hugging Face hub")
    parser.add_argument("files", nargs="?", help="which of the data set's files, as in data/train-*; none: list them")
    parser.add_argument("--sha256", help="what the file must have, for an address")
    args = parser.parse_args()
    if "://" in args.source:
        print(fetch(args.source, args.sha256))
    elif args.files:
        print(*hub_files(args.source, args.files), sep="\n")
    else:
        for name, (size, _) in hub_list(args.source).items():
            print(f"{megabytes(size):>12}  {name}")


if __name__ == "__main__":
    end_politely()
    main()
