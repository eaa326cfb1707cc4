"""Text to ids and back, and the one place where a conversation becomes ids *and* its mask.

    tok = get_tokenizer("tiny")                     # or "gpt2", a rank file such as gpt2.tiktoken, or a checkpoint folder
    ids, mask = tok.render([{"role": "user", "content": "Who are you?"},
                            {"role": "assistant", "content": "I am Pip."}])
    print(tok.show(ids, mask))                      # what the model must produce is green

The engine is tiktoken; what is ours is the chat format. mask[i] == 1 exactly where the assistant must produce ids[i],
its end token included: a model that is never taught to stop never stops.

The text of a message is always encoded as ordinary text, so `<|end|>` typed by a user is seven characters and never the
token. Only a template inserts special ids. Every message is encoded apart from what surrounds it, so that no merge
crosses the boundary between prompt and answer.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from data.bpe import PATTERN, load_ranks
from common.disk import settle
from common.errors import UserError

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TINY = Path(__file__).with_name("tiny.tiktoken")


@dataclass(frozen=True)
class Template:
    """How a conversation is written: `start`, then for every message its header, `lead` + its text, and its closing."""

    start: str
    headers: dict[str, str]
    lead: str
    closings: dict[str, str]

    def special_tokens(self):
        text = self.start + "".join(self.headers.values()) + "".join(self.closings.values())
        return tuple(token for token in CHAT_TOKENS if token in text)


TEMPLATES = {
    "chat": Template(
        start=END_OF_TEXT,  # the base model has seen every document begin with it
        headers={"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"},
        lead=" ",  # " Mabel" in the middle of a sentence and at its start are then the same token
        closings={"system": "<|end|>", "user": "<|end|>", "assistant": "<|end|>"},
    ),
    "human": Template(  # QLoRA's Guanaco format: needs no new tokens
        start="",
        headers={"system": "### System:", "user": "### Human:", "assistant": " ### Assistant:"},
        lead=" ",
        closings={"system": " ", "user": "", "assistant": END_OF_TEXT},
    ),
    "alpaca": Template(
        start="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
        headers={"system": "### System:\n", "user": "### Instruction:\n", "assistant": "### Response:\n"},
        lead="",
        closings={"system": "\n\n", "user": "\n\n", "assistant": END_OF_TEXT},
    ),
}


class Tokenizer:
    """A tiktoken encoding and a chat template. `vocab_size` counts the special tokens too."""

    def __init__(self, name, ranks, special, pattern=PATTERN, template="chat", new_ids=()):
        if template not in TEMPLATES:
            raise UserError(f"there is no chat template {template!r}: choose one of {', '.join(TEMPLATES)}")
        known = dict(special)
        for token in (END_OF_TEXT, *TEMPLATES[template].special_tokens()):
            if token not in known:  # a base model that has never seen our chat tokens gets them at the end
                known[token] = max([*ranks.values(), *known.values()]) + 1
        self.template_name, self.template = template, TEMPLATES[template]
        self.ranks, self.special, self.pattern = ranks, known, pattern
        # chat tokens that the model beside these files has never been trained on: their embeddings mean nothing yet
        self.new_ids = sorted(set(known.values()) - set(special.values()) | set(new_ids))
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=known)
        self.vocab_size = self.encoding.max_token_value + 1
        self.end_of_text = known[END_OF_TEXT]
        self.end = self._template_ids(self.template.closings["assistant"])[-1]  # what generation stops at

    def encode(self, text):
        """Ordinary text -> ids; a special token's name in it is just characters."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """ids -> text. Special tokens and ids beyond the vocabulary (a padded embedding has some) are left out."""
        special = set(self.special.values())
        return self.encoding.decode([i for i in ids if i < self.vocab_size and i not in special])

    def document(self, text):
        """A text that stands by itself -> ids, behind the token that every document of pretraining begins with."""
        return [self.end_of_text] + self.encode(self.template.lead + text)

    def answer(self, ids):
        """The new ids of `generate` -> the assistant's text, without the end token and the template's leading space."""
        return self.decode(ids).removeprefix(self.template.lead)

    def render(self, messages):
        """A conversation -> (ids, mask), two lists of the same length.

        A message may carry "loss_weight": 0 to be context only. Raises ValueError for an unknown role.
        """
        ids = self._template_ids(self.template.start)
        mask = [0] * len(ids)
        for message in messages:
            role = message["role"]
            if role not in self.template.headers:
                raise ValueError(f"unknown role {role!r}: a message is from {', '.join(self.template.headers)}")
            header = self._template_ids(self.template.headers[role])
            text = self.encode(self.template.lead + message["content"])
            closing = self._template_ids(self.template.closings[role])
            learned = int(role == "assistant" and message.get("loss_weight", 1) != 0)
            ids += header + text + closing
            mask += [0] * len(header) + [learned] * (len(text) + len(closing))
        return ids, mask

    def render_prompt(self, messages):
        """A conversation that ends with the user -> ids that end where the assistant begins."""
        return self.render(messages)[0] + self._template_ids(self.template.headers["assistant"])

    def show(self, ids, mask):
        """The text of ids for a terminal: green where the mask is 1, grey where it is 0, special tokens by name."""
        names = {i: token for token, i in self.special.items()}
        pieces = [names.get(i) or self.encoding.decode([i]) for i in ids]
        return "".join(f"\033[{32 if m else 90}m{piece}\033[0m" for piece, m in zip(pieces, mask, strict=True))

    def _template_ids(self, text):
        return self.encoding.encode(text, allowed_special="all")

    # ---- files: Hugging Face's tokenizer.json, so that transformers reads what we write and we read what it writes

    def save(self, folder):
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json into an existing folder."""
        names = {i: token for token, i in self.special.items()}
        vocab = {_to_unicode(token): rank for token, rank in self.ranks.items()}
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [{"id": i, "content": names[i], "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for i in sorted(names)],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": [[_to_unicode(a), _to_unicode(b)] for a, b in _merges(self.ranks)]},
        }
        end = names[self.end]
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": END_OF_TEXT,
                    "pad_token": END_OF_TEXT, "chat_template": self._jinja(), "nanoalign_template": self.template_name,
                    "nanoalign_new_ids": self.new_ids}
        for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings),
                              ("generation_config.json", {"eos_token_id": self.end, "bos_token_id": self.end_of_text,
                                                          "pad_token_id": self.end_of_text})):
            Path(folder, name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def _jinja(self):
        """The same template in the language that transformers' apply_chat_template reads."""
        t, quote = self.template, json.dumps
        turns = "".join(
            f"{{% {'if' if i == 0 else 'elif'} m['role'] == {quote(role)} %}}"
            f"{{{{ {quote(t.headers[role] + t.lead)} + m['content'] + {quote(t.closings[role])} }}}}"
            for i, role in enumerate(t.headers))
        return (f"{{{{ {quote(t.start)} }}}}{{% for m in messages %}}{turns}{{% endif %}}{{% endfor %}}"
                f"{{% if add_generation_prompt %}}{{{{ {quote(t.headers['assistant'])} }}}}{{% endif %}}")


def fit(messages, render, limit):
    """Leaves out the oldest turns (a question and its answer at a time; a system prompt stays) until render(messages) has
    at most `limit` tokens -> messages, or None where even the last turn is too long."""
    system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    while turns and len(render(system + turns)) > limit:
        turns = turns[2:]
    return system + turns if turns else None


def get_tokenizer(name_or_folder, template=None):
    """"tiny" (ours, 1,024 ranks), "gpt2", a rank file (base64 token and rank a line), or a folder with tokenizer files.

    template: chat | human | alpaca; None takes what the folder says, else chat. Raises UserError where nothing is found.
    """
    path = Path(name_or_folder)
    if name_or_folder == "tiny":
        return _from_ranks("tiny", load_ranks(TINY), template)
    settle(path)
    if path.is_dir():
        return _from_folder(path, template)
    if path.is_file():
        return _from_ranks(path.stem, load_ranks(path), template)
    if name_or_folder in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network does, the cure is the same
            raise UserError("GPT-2's tokenizer could not be fetched (" + type(error).__name__ + "): without a network, "
                            "name its rank file, as in --tokenizer path/to/gpt2.tiktoken")
        return Tokenizer("gpt2", gpt2._mergeable_ranks, {END_OF_TEXT: gpt2.eot_token}, gpt2._pat_str, template or "chat")
    raise UserError(f"there is no tokenizer {name_or_folder!r}: give tiny, gpt2, a rank file (.tiktoken) or a folder "
                    "that holds tokenizer.json")


def _from_ranks(name, ranks, template):
    return Tokenizer(name, ranks, {END_OF_TEXT: len(ranks)}, PATTERN, template or "chat")


def _from_folder(folder, template):
    """tokenizer.json (or the older vocab.json) of a byte-level BPE, the kind GPT-2 and Llama 3 have."""
    settings, tokenizer = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "tokenizer.json")
    if tokenizer:
        vocab, pattern = tokenizer["model"].get("vocab", {}), _pattern_of(folder, tokenizer)
        special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        merged = [vocab.get("".join(m) if isinstance(m, list) else m.replace(" ", "", 1))
                  for m in tokenizer["model"].get("merges", [])]
        if None in merged or merged != sorted(merged):
            raise UserError(f"{folder}: its merges are not in the order of their ids, which tiktoken cannot express")
    elif (folder / "vocab.json").is_file():
        vocab, pattern = _read_json(folder / "vocab.json"), PATTERN
        special = {token: i for token, i in vocab.items() if token == END_OF_TEXT}
    else:
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json): name one, as in --tokenizer gpt2 or "
                        "--tokenizer path/to/gpt2.tiktoken")
    ranks = {_to_bytes(token): i for token, i in vocab.items() if token not in special}
    if any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{folder}: its vocabulary lacks single bytes, so it is not a byte-level BPE such as GPT-2's")
    return Tokenizer(folder.name, ranks, special, pattern, template or settings.get("nanoalign_template") or "chat",
                     settings.get("nanoalign_new_ids", ()))


def _pattern_of(folder, tokenizer):
    """The regular expression that cuts text into words before any merge."""
    steps = tokenizer.get("pre_tokenizer") or {}
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Split" and "Regex" in step.get("pattern", {}):
            return step["pattern"]["Regex"]
        if step.get("type") == "ByteLevel" and step.get("use_regex", True):
            return PATTERN
    raise UserError(f"{folder}/tokenizer.json is not a byte-level BPE such as GPT-2's or Llama 3's, the kinds read here")


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): copy it again")


def _merges(ranks):
    """The pair that every longer token was merged from, in order: what ranks say implicitly, tokenizer.json says aloud."""
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # merge as the encoder would, with the ranks below the token's own
            rank, i = min((ranks.get(a + b, len(ranks) * 2), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        yield parts


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
    return bytes(_BYTE[c] for c in token) if all(c in _BYTE for c in token) else token.encode()
