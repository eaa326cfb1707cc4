"""Text to ids and back, and the one place where a conversation becomes ids *and* its mask.

    tok = get_tokenizer("tiny")                     # or "gpt2", a rank file (gpt2.tiktoken), or a checkpoint folder
    ids, mask = tok.render([{"role": "user", "content": "Who are you?"},
                            {"role": "assistant", "content": "I am Pip."}])
    print(tok.show(ids, mask))                      # what the model must produce is green

    python -m data.tokenizer out/sft mine.jsonl     the same for a file's first conversations

The engine is tiktoken, or the library tokenizers for what tiktoken cannot do (data/tokenizer_json.py); what is ours is
the mask. mask[i] == 1 exactly where the assistant must produce ids[i], its end token included: a model that is never
taught to stop never stops.

A conversation is written in a chat format (data/formats.py): the model's own where its folder has one, so that what it
has learned goes on, else ours, or the one that --template names. So ids are those of transformers' apply_chat_template,
but for two things. The text of a message is always ordinary text, so `<|end|>` typed by a user is seven characters and
never the token: only a format inserts special ids. And an answer is encoded apart from its prompt, so that no merge
crosses the boundary between what is given and what is learned.

transformers' own apply_chat_template reads names of special tokens wherever they stand, so that whoever types `<|end|>`
ends a turn. The safe call gives generate the ids of this file:

    model.generate(torch.tensor([tok.render_prompt(messages)]))    # not apply_chat_template(messages) of strangers' words
"""
import re
import uuid
from dataclasses import replace
from pathlib import Path

from common.errors import UserError, end_politely, reading, visible
from common.flags import advice

import tiktoken

from common.disk import settle, together, write_json
from common.hub import PUBLIC, TOKENIZER, find, is_name
from data.bpe import PATTERN, load_ranks
from data.formats import TEMPLATES, WRITTEN, OwnFormat, Refused, known
from data.tokenizer_json import END_OF_TEXT, Engine, added_token, content_of, read_folder, whole

HIDDEN = uuid.uuid4().hex  # around the number of a special token whose name somebody typed: no text holds it
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>")  # what a text of pretraining ends with, by family
KNOWN = ("chatml", "llama3", "llama2", "zephyr")  # formats that a model's own may turn out to be
TINY = Path(__file__).with_name("tiny.tiktoken")


class Tokenizer:
    """An engine and a chat format. `vocab_size` counts the special tokens too.

    ranks: {token: id} of all tokens that text is made of; bytes, for tiktoken, unless there is another engine. content:
    the tokenizer.json that they are from. begin: the ids that transformers puts before every text (Llama's <s>).
    own: the chat_template beside them. named: {"bos_token": "<s>", ...}, as that calls them. stops: ids at which the
    model stops, beside the format's end token.
    """

    def __init__(self, name, ranks, special, pattern=PATTERN, template="chat", new_ids=(), content=None, engine=None,
                 begin=(), own="", named=None, stops=()):
        self.ranks, self.pattern, self.content, self.begin, self.own = ranks, pattern, content, list(begin), own
        self.special, self.named = dict(special), named or {}
        end = next((token for token in (*ENDS, self.named.get("eos_token")) if token in special), END_OF_TEXT)
        self.end_of_text = self._add(end)
        self.template_name, self.template = self._format(name, template, end)
        # chat tokens that the model beside these files has never been trained on: their embeddings mean nothing yet
        self.new_ids = sorted(set(self.special.values()) - set(special.values()) | set(new_ids))
        if not set(self.special.values()).issuperset(self.new_ids):
            raise UserError(f"{name}: tokenizer_config.json has nanoalign_new_ids that no special token has: copy it again")
        if engine is None:
            self.encoding = tiktoken.Encoding(name, pat_str=whole(pattern), mergeable_ranks=ranks,
                                              special_tokens=self.special)
            engine = Engine(*[self.encoding.encode_ordinary, self.encoding.decode] * 2)
        if engine.doubled and self.template_name in ("chat", "search"):  # its space stands where the lead would
            self.template = replace(self.template, lead="")
        self.engine, self._texts = engine, set(ranks.values())
        self.vocab_size = max(self._texts | set(self.special.values())) + 1
        # how an answer is written, and what stands around it that is not its text
        try:
            ids, mask = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except Refused as error:
            raise UserError(f"{error.why}: choose another format, as in --template chatml") from None
        answer = [i for i, learned in zip(ids, mask) if learned]
        lead, found, trail = self._text(answer).partition("b")
        self._around = (lead, trail) if found else ("", "")
        self.end = answer[-1]
        # the assistant's two ways to end: with its answer, and with a search, if the format has one
        self.ends = (self.end,) + ((self.special["<|result|>"],) if self.template_name == "search" else ())
        self.stops = {*self.ends, self.end_of_text, *stops}  # where generation stops

    def _add(self, token):
        """A special token's id; it gets the next one where the model beside these files has none."""
        return self.special.setdefault(token, max([*self.ranks.values(), *self.special.values()]) + 1)

    def _format(self, name, template, end):
        """-> the name of the chat format, and the format."""
        begin = next((token for token, i in self.special.items() if i in self.begin), None)
        formats = {key: form.filled(begin or end, end, begin or "") for key, form in TEMPLATES.items()}
        if template != "own" and template not in formats:
            raise UserError(f"there is no chat template {template!r}: choose one of {', '.join(formats)}, own")
        if template == "own":
            if not self.own:
                raise UserError(f"{name} has no chat format of its own (chat_template in tokenizer_config.json): "
                                f"choose another --template, such as {', '.join(KNOWN)}")
            own, there = OwnFormat(self.own, self.named, self.special, name), self.special.keys()
            template = known(own, {key: formats[key] for key in KNOWN if there >= set(formats[key].tokens)})
        for token in formats[template].tokens if template in formats else ():
            self._add(token)
        self._names = {i: token for token, i in self.special.items()}
        self._names_in = re.compile(f"({'|'.join(map(re.escape, sorted(self.special, key=len, reverse=True)))})")
        return template, formats[template] if template in formats else own

    def encode(self, text):
        """Ordinary text -> ids; a special token's name in it is just characters."""
        return self.engine.encode(text)

    def decode(self, ids):
        """ids -> text. Special tokens and ids that no token has (a padded embedding has some) are left out."""
        return self.engine.decode([i for i in ids if i in self._texts])

    def document(self, text):
        """A text that stands by itself -> ids, behind the token that every document of pretraining begins with."""
        lead = "" if self.engine.doubled else self.template.lead
        return (self.begin or [self.end_of_text]) + self.encode(lead + text)

    def answer(self, ids):
        """The new ids of `generate` -> the assistant's text, without the end token and the spaces that the format puts
        around it."""
        lead, trail = self._around
        return self._text(ids).removeprefix(lead).removesuffix(trail)

    def ended(self, ids):
        """Is that an answer which the model ended by itself? A search is none."""
        return bool(ids) and ids[-1] in self.stops - set(self.ends[1:])

    def render(self, messages):
        """A conversation -> (ids, mask), two lists of the same length.

        A message may carry "loss_weight": 0 to be context only. Raises ValueError for an unknown role, and
        formats.Refused for what the model's own format does not take.
        """
        return self._render(messages)

    def render_prompt(self, messages):
        """A conversation that ends with the user -> ids that end where the assistant begins."""
        return self._render(messages, ask=True)[0]

    def _render(self, messages, ask=False):
        hidden = [message | {"content": self._names_in.sub(self._hide, message["content"])} for message in messages]
        text, spans = self.template.write(hidden, ask)
        learned = [int(message.get("loss_weight", 1) != 0) for message in messages if message["role"] in WRITTEN]
        ids, mask, at = [], [], 0
        for (begin, end), one in zip([*spans, (len(text), len(text))], [*learned, 0], strict=True):
            for to, m in ((begin, 0), (end, one)):
                self._append(ids, text[at:to])
                mask += [m] * (len(ids) - len(mask))
                at = to
        return ids, mask

    def _hide(self, found):
        return f"{HIDDEN}{self.special[found[0]]}{HIDDEN}"

    def _append(self, ids, text):
        """Adds a format's text to ids. Special tokens' names in it are those tokens, but for the hidden ones."""
        for i, part in enumerate(self._names_in.split(text)):
            if i % 2:
                ids.append(self.special[part])
            elif part:
                part = re.sub(f"{HIDDEN}(\\d+){HIDDEN}", lambda found: self._names[int(found[1])], part)
                begins = not ids or self.engine.after_special and ids[-1] in self._names
                ids += (self.engine.encode if begins else self.engine.encode_more)(part)

    def _text(self, ids):
        return self.engine.decode_more([i for i in ids if i in self._texts])

    def show(self, ids, mask):
        """The text of ids for a terminal: green where the mask is 1, grey where it is 0, special tokens by name."""
        return "".join(f"\033[{32 if m else 90}m{self.piece(i)}\033[0m" for i, m in zip(ids, mask, strict=True))

    def piece(self, i):
        """A token as people read it: a special one by its name, control characters in words."""
        return visible(self._names.get(i) or self.engine.decode_more([i]))

    def save(self, folder):
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json into a folder, in place of any
        tokenizer there. One that was read is written again as it was, with the chat tokens that were added."""
        content = self.content or content_of(self.ranks, self.pattern)
        old = {token["content"] for token in content["added_tokens"]}
        new = [added_token(token, i) for i, token in sorted(self._names.items()) if token not in old]
        begin = next((i for i in self.begin if i in self._names), self.end_of_text)
        named = {"pad_token": self._names[self.end_of_text]} | self.named
        if self.begin or "bos_token" not in named:
            named["bos_token"] = self._names[begin]
        if not (self.own and "eos_token" in self.own):  # else it may be a part of the format
            named["eos_token"] = self._names[self.end]
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named,
                    "chat_template": self.own or self.template.jinja(),
                    "nanoalign_template": self.template_name, "nanoalign_new_ids": self.new_ids}
        stops = [self.end, *sorted(self.stops - {self.end})]
        with together(folder, TOKENIZER) as saving:
            for name, content in (("tokenizer.json", content | {"added_tokens": content["added_tokens"] + new}),
                                  ("tokenizer_config.json", settings),
                                  ("generation_config.json", {"eos_token_id": stops, "bos_token_id": begin,
                                                              "pad_token_id": self.special[named["pad_token"]]})):
                write_json(saving / name, content, ensure_ascii=False, indent=1)


def fit(messages, render, limit):
    """Leaves out the oldest turns (a question and all that answers it at a time; a system prompt stays) until
    render(messages) has at most `limit` tokens -> messages, or None where even the last turn is too long."""
    system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    while turns and len(render(system + turns)) > limit:
        turns = turns[next((i for i, m in enumerate(turns) if i and m["role"] == "user"), len(turns)):]
    return system + turns if turns else None


def get_tokenizer(name_or_folder, template=None):
    """"tiny" (ours, 1,024 ranks), "gpt2", a rank file (base64 token and rank a line), or a folder with tokenizer files.

    template: a chat format (formats.TEMPLATES), or own, the one that the folder's model came with; None takes what the
    folder says, else chat. Raises UserError where nothing is found.
    """
    path = Path(name_or_folder)
    if name_or_folder == "tiny":
        return _from_ranks("tiny", load_ranks(TINY), template or "search")
    settle(path)
    if path.is_dir():
        with reading(f"the tokenizer in {path}"):
            return _from_folder(path, template)
    if path.is_file():
        return _from_ranks(path.stem, load_ranks(path), template)
    if name_or_folder in PUBLIC:
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network does, the cure is the same
            cure = advice("--tokenizer", "without a network, name its rank file, as in --tokenizer path/to/gpt2.tiktoken")
            raise UserError(f"GPT-2's tokenizer could not be fetched ({type(error).__name__}): "
                            f"{cure or 'copy a tokenizer.json into the folder of the model'}")
        return Tokenizer("gpt2", gpt2._mergeable_ranks, {END_OF_TEXT: gpt2.eot_token}, PATTERN, template or "chat")
    if is_name(str(name_or_folder)):
        return get_tokenizer(find(name_or_folder), template)
    raise UserError(f"there is no tokenizer {name_or_folder!r}: give tiny, gpt2, a rank file (.tiktoken) or a folder "
                    "that holds tokenizer.json")


def _from_ranks(name, ranks, template):
    return Tokenizer(name, ranks, {END_OF_TEXT: len(ranks)}, PATTERN, template or "chat")


def _from_folder(folder, template):
    settings, own, parts = read_folder(folder)
    template = template or settings.get("nanoalign_template") or ("own" if own else "chat")
    keep = template == "own" or template in KNOWN and template == settings.get("nanoalign_template")
    return Tokenizer(str(folder), template=template, own=own if keep else "",
                     new_ids=settings.get("nanoalign_new_ids", ()), **parts)


if __name__ == "__main__":
    from common.flags import Count, Parser, bounded
    from data import files

    end_politely()
    parser = Parser("python -m data.tokenizer", description="Shows conversations as a model reads them: what it must "
                    "produce is green, special tokens by name.")
    parser.add_argument("tokenizer", help="tiny, gpt2, a rank file or a folder")
    parser.add_argument("file", help="conversations, in any shape that python -m data.files reads")
    parser.add_argument("--template", choices=[*TEMPLATES, "own"], help="the chat format; none: as the folder says")
    parser.add_argument("--show", type=bounded(Count), default=3, help="how many to print")
    args = parser.parse_args()
    tok = get_tokenizer(args.tokenizer, args.template)
    stops = ", ".join(tok.show([i], [0]) for i in sorted(tok.stops))
    print(f"format {tok.template_name}; generation stops at {stops}")
    for row in files.load(args.file, "sft")[0][:args.show]:
        print("\n" + tok.show(*tok.render(row["messages"])))
