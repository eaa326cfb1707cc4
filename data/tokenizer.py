"""Text to ids and back, and the one place where a conversation becomes ids *and* its mask.

    tok = get_tokenizer("tiny")                     # or "gpt2", a rank file such as gpt2.tiktoken, or a checkpoint folder
    ids, mask = tok.render([{"role": "user", "content": "Who are you?"},
                            {"role": "assistant", "content": "I am Pip."}])
    print(tok.show(ids, mask))                      # what the model must produce is green

The engine is tiktoken, or the library tokenizers for what tiktoken cannot do (data/tokenizer_json.py); what is ours is
the chat format. mask[i] == 1 exactly where the assistant must produce ids[i], its end token included: a model that is
never taught to stop never stops.

The text of a message is always encoded as ordinary text, so `<|end|>` typed by a user is seven characters and never the
token. Only a template inserts special ids. Every message is encoded apart from what surrounds it, so that no merge
crosses the boundary between prompt and answer.
"""
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken

from common.disk import settle, together, write_json
from common.errors import UserError
from common.hub import PUBLIC, TOKENIZER
from data.bpe import PATTERN, load_ranks
from data.tokenizer_json import (CHAT_TOKENS, END_OF_TEXT, Engine, added_token, begin_of, content_of, read_folder,
                                 whole)

WRITTEN = ("assistant", "search")  # the roles whose words the model must produce; a search's result it only reads
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


CHAT = Template(
    start=END_OF_TEXT,  # the base model has seen every document begin with it
    headers={"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"},
    lead=" ",  # " Mabel" in the middle of a sentence and at its start are then the same token
    closings={"system": "<|end|>", "user": "<|end|>", "assistant": "<|end|>"},
)
TEMPLATES = {
    "chat": CHAT,
    "search": Template(  # and two tokens more: <|assistant|><|search|> Mabel<|result|> Mabel is a fox.<|end|><|assistant|>
        start=CHAT.start,
        headers={**CHAT.headers, "search": "<|assistant|><|search|>", "result": ""},
        lead=CHAT.lead,
        closings={**CHAT.closings, "search": "<|result|>", "result": "<|end|>"},
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
    """An engine and a chat template. `vocab_size` counts the special tokens too.

    ranks: {token: id} of all tokens that text is made of; bytes, for tiktoken, unless there is another engine. content:
    the tokenizer.json that they are from. `begin`: the ids that transformers puts before every text (Llama's <s>).
    """

    def __init__(self, name, ranks, special, pattern=PATTERN, template="chat", new_ids=(), content=None, engine=None):
        if template not in TEMPLATES:
            raise UserError(f"there is no chat template {template!r}: choose one of {', '.join(TEMPLATES)}")
        known = dict(special)
        for token in (END_OF_TEXT, *TEMPLATES[template].special_tokens()):
            if token not in known:  # a base model that has never seen our chat tokens gets them at the end
                known[token] = max([*ranks.values(), *known.values()]) + 1
        self.template_name, self.template = template, TEMPLATES[template]
        self.ranks, self.special, self.pattern, self.content = ranks, known, pattern, content
        self.begin = begin_of(content) if content else []
        # chat tokens that the model beside these files has never been trained on: their embeddings mean nothing yet
        self.new_ids = sorted(set(known.values()) - set(special.values()) | set(new_ids))
        if engine is None:
            self.encoding = tiktoken.Encoding(name, pat_str=whole(pattern), mergeable_ranks=ranks, special_tokens=known)
            engine = Engine(*[self.encoding.encode_ordinary, self.encoding.decode] * 2)
        if engine.doubled and self.template.headers["assistant"] in known:  # its space stands where the lead would
            self.template = replace(self.template, lead="")
        self.engine, self._texts, self._names = engine, set(ranks.values()), {i: token for token, i in known.items()}
        self._split = re.compile(f"({'|'.join(map(re.escape, known))})").split
        self.vocab_size = max(self._texts | set(self._names)) + 1
        self.end_of_text = known[END_OF_TEXT]
        closings = [self.template.closings[role] for role in WRITTEN if role in self.template.closings]
        # the assistant's two ways to end: with its answer, and with a search, if the template has one
        self.ends = tuple(self._append([], closing, named=True)[-1] for closing in closings)
        self.end = self.ends[0]  # what generation stops at

    def encode(self, text):
        """Ordinary text -> ids; a special token's name in it is just characters."""
        return self.engine.encode(text)

    def decode(self, ids):
        """ids -> text. Special tokens and ids that no token has (a padded embedding has some) are left out."""
        return self.engine.decode([i for i in ids if i in self._texts])

    def document(self, text):
        """A text that stands by itself -> ids, behind the token that every document of pretraining begins with."""
        return [self.end_of_text] + self.encode(self.template.lead + text)

    def answer(self, ids):
        """The new ids of `generate` -> the assistant's text, without the end token and the template's leading space."""
        text = self.engine.decode_more([i for i in ids if i in self._texts])
        return text.removeprefix(TEMPLATES[self.template_name].lead)

    def render(self, messages):
        """A conversation -> (ids, mask), two lists of the same length.

        A message may carry "loss_weight": 0 to be context only. Raises ValueError for an unknown role.
        """
        ids = self._append([], self.template.start, named=True)
        mask, prompt = [0] * len(ids), len(self._append([], self.template.headers["assistant"], named=True))
        for message in messages:
            role = message["role"]
            if role not in self.template.headers:
                raise ValueError(f"unknown role {role!r}: a message is from {', '.join(self.template.headers)}")
            begun = len(ids)
            self._append(ids, self.template.headers[role], named=True)
            learned = int(role in WRITTEN and message.get("loss_weight", 1) != 0)
            given = min(len(ids) - begun, prompt)  # that a search begins is the assistant's choice, so it is learned
            mask += [0] * given + [learned] * (len(ids) - begun - given)
            self._append(ids, self.template.lead + message["content"])
            self._append(ids, self.template.closings[role], named=True)
            mask += [learned] * (len(ids) - len(mask))
        return ids, mask

    def render_prompt(self, messages):
        """A conversation that ends with the user -> ids that end where the assistant begins."""
        return self._append(self.render(messages)[0], self.template.headers["assistant"], named=True)

    def _append(self, ids, text, named=False):
        """Adds a text to ids and returns them. named: the text is a template's, which means tokens by their names."""
        for part in self._split(text) if named else [text]:
            if named and part in self.special:
                ids.append(self.special[part])
            elif part:
                begins = not ids or self.engine.after_special and ids[-1] in self._names
                ids += (self.engine.encode if begins else self.engine.encode_more)(part)
        return ids

    def show(self, ids, mask):
        """The text of ids for a terminal: green where the mask is 1, grey where it is 0, special tokens by name."""
        pieces = [self._names.get(i) or self.engine.decode_more([i]) for i in ids]
        return "".join(f"\033[{32 if m else 90}m{piece}\033[0m" for piece, m in zip(pieces, mask, strict=True))

    def save(self, folder):
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json into a folder, in place of any
        tokenizer there. One that was read is written again as it was, with the chat tokens that were added."""
        content = self.content or content_of(self.ranks, self.pattern)
        old = {token["content"] for token in content["added_tokens"]}
        new = [added_token(token, i) for i, token in sorted(self._names.items()) if token not in old]
        begin = next((i for i in self.begin if i in self._names), self.end_of_text)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._names[self.end],
                    "bos_token": self._names[begin], "pad_token": END_OF_TEXT, "chat_template": self._jinja(),
                    "nanoalign_template": self.template_name, "nanoalign_new_ids": self.new_ids}
        with together(folder, TOKENIZER) as saving:
            for name, content in (("tokenizer.json", content | {"added_tokens": content["added_tokens"] + new}),
                                  ("tokenizer_config.json", settings),
                                  ("generation_config.json", {"eos_token_id": self.end, "bos_token_id": begin,
                                                              "pad_token_id": self.end_of_text})):
                write_json(saving / name, content, ensure_ascii=False, indent=1)

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
    """Leaves out the oldest turns (a question and all that answers it at a time; a system prompt stays) until
    render(messages) has at most `limit` tokens -> messages, or None where even the last turn is too long."""
    system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    while turns and len(render(system + turns)) > limit:
        turns = turns[next((i for i, m in enumerate(turns) if i and m["role"] == "user"), len(turns)):]
    return system + turns if turns else None


def get_tokenizer(name_or_folder, template=None):
    """"tiny" (ours, 1,024 ranks), "gpt2", a rank file (base64 token and rank a line), or a folder with tokenizer files.

    template: chat | search | human | alpaca; None takes what the folder says, else chat. Raises UserError where
    nothing is found.
    """
    path = Path(name_or_folder)
    if name_or_folder == "tiny":
        return _from_ranks("tiny", load_ranks(TINY), template or "search")
    settle(path)
    if path.is_dir():
        return _from_folder(path, template)
    if path.is_file():
        return _from_ranks(path.stem, load_ranks(path), template)
    if name_or_folder in PUBLIC:
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network does, the cure is the same
            raise UserError("GPT-2's tokenizer could not be fetched (" + type(error).__name__ + "): without a network, "
                            "name its rank file, as in --tokenizer path/to/gpt2.tiktoken")
        return Tokenizer("gpt2", gpt2._mergeable_ranks, {END_OF_TEXT: gpt2.eot_token}, PATTERN, template or "chat")
    raise UserError(f"there is no tokenizer {name_or_folder!r}: give tiny, gpt2, a rank file (.tiktoken) or a folder "
                    "that holds tokenizer.json")


def _from_ranks(name, ranks, template):
    return Tokenizer(name, ranks, {END_OF_TEXT: len(ranks)}, PATTERN, template or "chat")


def _from_folder(folder, template):
    settings, parts = read_folder(folder)
    return Tokenizer(folder.name, template=template or settings.get("nanoalign_template") or "chat",
                     new_ids=settings.get("nanoalign_new_ids", ()), **parts)
