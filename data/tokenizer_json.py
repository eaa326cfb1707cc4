"""Hugging Face's tokenizer.json: what it says, whether tiktoken does exactly that, and the library that does the rest.

It is a pipeline: a normalizer changes the text, a pre-tokenizer cuts it into words, a model (BPE, ...) makes ids of
each word, and a decoder leads back. tiktoken is one such pipeline, GPT-2's: no normalizer, one regular expression, BPE
of bytes. A file that says more (`obstacle`) is run by the library that wrote it, tokenizers, which is optional. So a
text has the ids that transformers gives it, but for one thing: the name of a special token in it is just characters, in
both engines. An added token that is not special is found in ordinary text, as it is there. (Where a folder names the
class LlamaTokenizer, transformers 5 may make another pipeline than the file's, with fewer spaces. We, and the folders
that we save, stay with the file.)
"""
import contextlib
import json
import math
import os
import uuid
from typing import Callable, NamedTuple

import regex  # tiktoken installs it

from data.bpe import PATTERN
from common.errors import UserError
from common.flags import advice

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|search|>", "<|result|>",
               "<|im_start|>", "<|im_end|>")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

ROOM = 1000  # ids that no token has, beside as many as there are tokens


class Engine(NamedTuple):
    """Ordinary text -> ids and back.

    Some tokenizers put a space before a text and take it away again. encode and decode do that, as transformers does;
    the other two leave a text as it is: they are for what follows other text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    encode_more: Callable[[str], list[int]]
    decode_more: Callable[[list[int]], str]
    after_special: bool = False  # such a space is put behind a special token, too
    doubled: bool = False  # ... even before a text that begins with one


# ---- the files -------------------------------------------------------------------------------------------------------

def read_folder(folder):
    """tokenizer.json (or the older vocab.json and merges.txt) -> tokenizer_config.json, the chat_template or "", and
    what a Tokenizer is made of, {"ranks", "special", "engine", ...}, the engine None where tiktoken can be it.

    Raises UserError where there is no tokenizer, where it is damaged, and where it needs a library that is missing.
    """
    settings, path = _read(folder / "tokenizer_config.json"), folder / "tokenizer.json"
    content = _read(path) or _older_files(folder, settings)
    if not content:
        named = advice("--tokenizer", ", or name one, as in --tokenizer gpt2 or --tokenizer path/to/gpt2.tiktoken")
        raise UserError(f"{folder} holds no tokenizer: copy its model's tokenizer.json there{named}")
    with _undamaged(folder / "tokenizer_config.json"):
        named, own = _named(_read(folder / "special_tokens_map.json") | settings), _chat_template(folder, settings)
    with _undamaged(path):
        content = _complete(content, settings, named)
        special = _special(content)
        ranks = vocab_of(content) | {token["content"]: token["id"] for token in content["added_tokens"]}
        named = {key: token for key, token in named.items() if token in ranks}
        ranks = {token: i for token, i in ranks.items() if token not in special}
        why, begin = obstacle(content, ranks), begin_of(content)
    with _undamaged(folder / "generation_config.json"):
        stops = (_read(folder / "generation_config.json") or _read(folder / "config.json")).get("eos_token_id")
        stops = {*(stops if isinstance(stops, list) else [stops]), special.get(named.get("eos_token"))} - {None}
        if not all(isinstance(i, int) for i in stops):
            raise ValueError(f"eos_token_id: {stops}")
    engine = _library(path, content, why) if why else None
    ranks = ranks if why else {_to_bytes(token): i for token, i in ranks.items()}
    return settings, own, {"ranks": ranks, "special": special, "pattern": _pattern(content), "content": content,
                           "engine": engine, "begin": begin, "named": named, "stops": stops}


@contextlib.contextmanager
def _undamaged(path):
    """Turns what only a file can raise that holds something else into one sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): copy it again") from None


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): copy it again")


def _named(settings):
    """-> {"bos_token": "<s>", ...}: special tokens as tokenizer_config.json calls them."""
    return {key: token if isinstance(token, str) else token["content"] for key in NAMED if (token := settings.get(key))}


def _chat_template(folder, settings):
    """The model's own chat format, a program for jinja2, or ""; of several the default."""
    path, found = folder / "chat_template.jinja", settings.get("chat_template") or ""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return found if isinstance(found, str) else {one["name"]: one["template"] for one in found}["default"]


def _older_files(folder, settings):
    vocab, merges = _read(folder / "vocab.json"), folder / "merges.txt"
    if not vocab or not merges.is_file():
        return {}
    lines = [line.strip() for line in merges.read_text(encoding="utf-8").split("\n")]
    content = content_of({}, PATTERN)
    content["model"] |= {"vocab": vocab, "merges": [x for x in lines if x and not x.startswith("#version")]}
    return content | {"pre_tokenizer": BYTES | {"add_prefix_space": bool(settings.get("add_prefix_space"))}}


def _complete(content, settings, named):
    """-> content with all added tokens of the folder, in the order of their ids, our own special ones among them.

    A gap between the ids gets a token of its own: the library would give the tokens behind it other ids than the file.
    """
    vocab, added = vocab_of(content), {token["content"]: token for token in content["added_tokens"]}
    last = max(vocab.values())
    for i, token in settings.get("added_tokens_decoder", {}).items():
        added.setdefault(token["content"], token | {"id": int(i)})
    ids = vocab | {name: token["id"] for name, token in added.items()}
    if len(set(ids.values())) < len(ids) or any(ids[name] != i for name, i in vocab.items()):
        raise ValueError("two tokens have one id, or one token has two")
    for name, i in ids.items():
        if type(i) is not int or not 0 <= i < 2 * len(ids) + ROOM:  # ids far beyond would make as many tokens here
            raise ValueError(f"{name!r} has the id {i!r} in a vocabulary of {len(ids):,}")
    ours = (*CHAT_TOKENS, *(named[key] for key in ("bos_token", "eos_token", "pad_token") if key in named))
    names = [(name, ids[name]) for name in ours if name in ids]
    gaps = [(f"<|unused {i}|>", i) for i in set(range(max(ids.values()))) - set(ids.values())]
    added |= {name: added_token(name, i) for name, i in names + gaps}
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = vocab | {name: x["id"] for name, x in added.items() if x["id"] < last}
    return content | {"model": model, "added_tokens": sorted(added.values(), key=lambda token: token["id"])}


def added_token(name, i):
    return {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True}


def _special(content):
    """-> {token: id}. A byte such as <0x41> is text, though whoever trains with these may have to call them special."""
    return {token["content"]: token["id"] for token in content["added_tokens"]
            if token["special"] and not regex.fullmatch("<0x[0-9A-F]{2}>", token["content"])}


def vocab_of(content):
    """The model's tokens -> {token: id}. Unigram's are a list of [token, score]."""
    vocab = content["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def content_of(ranks, pattern):
    """What tiktoken's ranks and pattern are as tokenizer.json, without special tokens."""
    merges = [[_to_unicode(part) for part in pair] for pair in merges_of(ranks)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                BYTES | {"use_regex": False}]},
            "post_processor": None, "decoder": BYTES | {"add_prefix_space": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": len(merges) < sum(len(token) > 1 for token in ranks),  # some only come whole
                      "vocab": {_to_unicode(token): rank for token, rank in ranks.items()}, "merges": merges}}


PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def _steps(content, part):
    """The steps of one of the PARTS, without the sequences around them."""
    step = content.get(part) or {"type": "Sequence", PARTS[part]: []}
    if step["type"] != "Sequence":
        return [step]
    return [one for inner in step[PARTS[part]] for one in _steps({part: inner}, part)]


def begin_of(content):
    """The ids that transformers puts before every text."""
    step = content.get("post_processor") or {}
    for step in step.get("processors", [step]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"]
    return []


# ---- tiktoken, where it does exactly what the file says --------------------------------------------------------------

# Regular expressions that both engines read alike: no flags, no anchors (but GPT-2's, as tiktoken spells it), and of
# classes only \s and Unicode's own
PORTABLE = (r"(?s)(?!.*(?:\[:|&&|--|~~))(?:[^\\^$.(){}]|\)|\\[pP]\{\w+\}|\\[sSrnt\W]|\\s\+\+\$|(?<=\[)\^|\((?!\?)"
            r"|\(\?(?:[:!]|i:)|\{\d+(?:,\d*)?\}(?![+?]))+")


def _pattern(content):
    """The regular expression that cuts text into words; None where it is cut in a way that tiktoken does not know."""
    steps = _steps(content, "pre_tokenizer")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if steps[-1].get("use_regex", True):
        return PATTERN if len(steps) == 1 else None
    step = steps[0]
    if len(steps) != 2 or step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return None
    pattern = step["pattern"].get("Regex", "")
    try:
        return pattern if regex.fullmatch(PORTABLE, pattern) and not regex.match(pattern, "") else None
    except regex.error:
        return None


def whole(pattern):
    """The pattern and what lies between its matches, which the library keeps and tiktoken would drop."""
    return pattern if pattern == PATTERN else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def obstacle(content, vocab):
    """What tiktoken cannot do of a tokenizer.json, in words; "" where it does exactly the same. vocab: {token: id},
    without the special tokens.

    tiktoken glues neighbours that make a token, the lowest id first, and takes a word that is a token whole. The
    library glues pairs that are listed, the first in the list first. That is the same where the list is in the order of
    the ids and holds the last two parts of every token (`_parts`): no others ever stand where the token will be.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its model is not a BPE of bytes"
    if _steps(content, "normalizer"):
        return "it changes the text first (normalizer)"
    if any(not token["special"] for token in content["added_tokens"]):
        return "it finds added tokens in ordinary text"
    if not _pattern(content) or (content.get("decoder") or BYTES)["type"] != "ByteLevel":
        return "it is not a byte-level BPE that cuts words as GPT-2's or Llama 3's does"
    if not all(token and set(token) <= _BYTE.keys() for token in vocab) or not _BYTE.keys() <= vocab.keys():
        return "its vocabulary lacks single bytes, or holds other things"
    ranks = {_to_bytes(token): i for token, i in vocab.items()}
    merges = [tuple(map(_to_bytes, pair.split(" ") if isinstance(pair, str) else pair)) for pair in model["merges"]]
    order = [ranks.get(a + b, -1) for a, b in merges]
    if -1 in order or order != sorted(order) or model.get("dropout"):
        return "its merges are not in the order of their ids"
    listed, alone = set(merges), model.get("ignore_merges")  # alone: a word that is a token is taken whole
    parts = (tuple(_parts(token, ranks)) for token in ranks if len(token) > 1)
    if not all(pair in listed or alone and len(pair) > 2 for pair in parts):
        return "its merges are not those that its ids imply"
    return ""


def _parts(token, ranks):
    """The last two parts that a token is glued from; more of them where it cannot be glued."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges_of(ranks):
    """The pair that every longer token was merged from, in order: ranks imply what tokenizer.json says aloud."""
    parts = (_parts(token, ranks) for token in sorted(ranks, key=ranks.get))
    return [pair for pair in parts if len(pair) == 2]


def _byte_alphabet():
    """GPT-2's bijection from bytes to printable characters: printable bytes stay, the others move above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}


_CHARACTER = _byte_alphabet()
_BYTE = {character: byte for byte, character in _CHARACTER.items()}


def _to_unicode(token):
    return "".join(_CHARACTER[b] for b in token)


def _to_bytes(token):
    return bytes(_BYTE[c] for c in token)


# ---- the library, for everything else --------------------------------------------------------------------------------

def _library(path, content, why):
    """tokenizer.json -> Engine."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path}: {why}, which tiktoken cannot do: pip install tokenizers, which can") from None
    if content["model"].get("dropout"):
        raise UserError(f'{path}: with its "dropout" the same text has other ids each time: set it to null')
    content = _unnamed(content)
    more = _unspaced(content)
    try:
        with _quiet():
            first = tokenizers.Tokenizer.from_str(json.dumps(content))
            other = tokenizers.Tokenizer.from_str(json.dumps(more)) if more != content else first
            other.decode(first.encode("Who, me? 42 times!").ids + other.encode(" \n").ids)
    except BaseException as error:  # the library has no narrower class, and its panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"{path} is damaged, or nothing that the tokenizers library knows ({error})") from None
    spaced = [step for part in ("normalizer", "pre_tokenizer") for step in _steps(content, part)
              if step not in _steps(more, part)]

    def encode(engine):
        return lambda text: engine.encode(_repaired(text), add_special_tokens=False).ids

    def decode(engine):
        return lambda ids: engine.decode(ids, skip_special_tokens=False)

    return Engine(encode(first), decode(first), encode(other), decode(other),
                  after_special=any(step.get("prepend_scheme") != "first" for step in spaced),
                  doubled=any(step["type"] == "Prepend" for step in spaced))


@contextlib.contextmanager
def _quiet():
    """Without what Rust prints about a panic before that becomes an error."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _repaired(text):
    """Text in which halves of characters, which the library refuses, are replaced as tiktoken replaces them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unnamed(content):
    """content with names of special tokens that nobody can type, and without what cuts, pads or completes a text."""
    secret = {token: uuid.uuid4().hex for token in _special(content)}
    model, name = dict(content["model"]), lambda token: secret.get(token, token)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name(token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[name(token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = name(model["unk_token"])
    return content | {"model": model, "truncation": None, "padding": None, "added_tokens": [
        token | {"content": name(token["content"])} for token in content["added_tokens"]]}


def _unspaced(content):
    """content without what puts a space before a text, or takes one away from what is decoded."""
    def never(step):
        scheme = {"prepend_scheme": "never"} if step["type"] == "Metaspace" else {}
        return step | scheme | ({"add_prefix_space": False} if "add_prefix_space" in step else {})

    before, decoder = _steps(content, "pre_tokenizer"), _steps(content, "decoder")
    steps = {"normalizer": [step for step in _steps(content, "normalizer") if step["type"] != "Prepend"],
             "pre_tokenizer": [*map(never, before[:1]), *before[1:]],  # a later one puts spaces between words
             "decoder": [step if step["type"] == "ByteLevel" else never(step) for step in decoder
                         if step["type"] != "Strip"]}
    return content | {part: {"type": "Sequence", PARTS[part]: new} for part, new in steps.items()
                      if new != _steps(content, part)}
