"""Chat formats: how a conversation is written as one text, and where in it the assistant's words stand.

    write(messages) -> text, [(begin, end), ...]    the spans of what the model must produce, each with its end token
    write(messages, ask=True)                       the text goes on to where the assistant begins

A Template says so in a few strings: ours, and those that many models share (ChatML, Llama 3, Llama 2, Zephyr). An
OwnFormat is whatever the chat_template beside a model does, a program in the language of jinja2. What it writes is
taken as it is; where the assistant's words begin is found by writing every prompt, too, and it is refused where that
does not say.
"""
import datetime
import json
import re
from dataclasses import dataclass, replace

from common.errors import UserError

WRITTEN = ("assistant", "search")  # the roles whose words the model must produce; a search's result it only reads


class Refused(UserError):
    """A conversation that the model's own chat template does not take. `why` says so without the conversation."""

    def __init__(self, why, messages):
        asked = next((m["content"] for m in messages if m["role"] == "user"), "")
        super().__init__(f"{why}: mend or leave out the conversation with {asked[:40]!r}, or write all of them in "
                         "another format, as in --template chatml")
        self.why = why


# ---- formats that strings can say ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    """`start`, then for every message its header, `lead` + its text, and its closing.

    {begin} and {end} stand for the tokens that a text of the model begins and ends with, {bos} for the first of them
    where it has one of its own (Llama's <s>).
    """

    start: str
    headers: dict[str, str]
    lead: str
    closings: dict[str, str]
    tokens: tuple = ()  # special tokens that it needs: a model that lacks them gets them
    strip: bool = False  # texts without the white space around them
    system: str = ""  # for want of a header: how a system prompt is written into the question behind it

    def filled(self, begin, end, bos):
        def fill(text):
            return text.replace("{begin}", begin).replace("{end}", end).replace("{bos}", bos)

        return replace(self, start=fill(self.start), headers={role: fill(text) for role, text in self.headers.items()},
                       closings={role: fill(text) for role, text in self.closings.items()})

    def write(self, messages, ask=False):
        text, spans, before = self.start, [], ""
        for message, after in zip(messages, [*messages[1:], {"role": "nobody"}]):
            role, content = message["role"], before + message["content"]
            if self.system and role == "system":
                if after["role"] != "user":
                    raise ValueError("a system message without a question behind it")
                before = self.system.format(content)
                continue
            if role not in self.headers:
                raise ValueError(f"unknown role {role!r}: a message is from {', '.join(self.headers)}")
            before = ""
            # what an assistant's header has more than all of them (a search's) is its choice, so it is learned
            begin = len(text) + len(self.headers["assistant"])
            text += self.headers[role] + self.lead + (content.strip() if self.strip else content) + self.closings[role]
            if role in WRITTEN:
                spans.append((begin, len(text.rstrip("\n"))))  # a newline behind the end token belongs to nobody
        return text + self.headers["assistant"] * ask, spans

    def jinja(self):
        """The same template in the language that transformers' apply_chat_template reads."""
        quote, content = json.dumps, "system.text + m['content']" if self.system else "m['content']"
        content = f"({content}).strip()" if self.strip else content
        turns = [(role, f"{{{{ {quote(self.headers[role] + self.lead)} + {content} + {quote(self.closings[role])} }}}}"
                  + "{% set system.text = '' %}" * bool(self.system)) for role in self.headers]
        set_system = ""
        if self.system:
            before, after = map(quote, self.system.split("{}"))
            set_system = "{% set system = namespace(text='') %}"
            turns.insert(0, ("system", f"{{% set system.text = {before} + m['content'] + {after} %}}"))
        turns = "".join(f"{{% {'elif' if i else 'if'} m['role'] == {quote(role)} %}}{does}"
                        for i, (role, does) in enumerate(turns))
        return (f"{set_system}{{{{ {quote(self.start)} }}}}{{% for m in messages %}}{turns}{{% endif %}}{{% endfor %}}"
                f"{{% if add_generation_prompt %}}{{{{ {quote(self.headers['assistant'])} }}}}{{% endif %}}")


CHAT = Template(
    start="{begin}",  # the base model has seen every document begin with it
    headers={"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"},
    lead=" ",  # " Mabel" in the middle of a sentence and at its start are then the same token
    closings={"system": "<|end|>", "user": "<|end|>", "assistant": "<|end|>"},
    tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {
    "chat": CHAT,
    "search": replace(
        CHAT,  # and two tokens more: <|assistant|><|search|> Mabel<|result|> Mabel is a fox.<|end|><|assistant|>
        headers={**CHAT.headers, "search": "<|assistant|><|search|>", "result": ""},
        closings={**CHAT.closings, "search": "<|result|>", "result": "<|end|>"},
        tokens=(*CHAT.tokens, "<|search|>", "<|result|>"),
    ),
    "human": Template(  # QLoRA's Guanaco format: needs no new tokens
        start="{bos}",
        headers={"system": "### System:", "user": "### Human:", "assistant": " ### Assistant:"},
        lead=" ",
        closings={"system": " ", "user": "", "assistant": "{end}"},
    ),
    "alpaca": Template(
        start="{bos}Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
        headers={"system": "### System:\n", "user": "### Instruction:\n", "assistant": "### Response:\n"},
        lead="",
        closings={"system": "\n\n", "user": "\n\n", "assistant": "{end}"},
    ),
    "chatml": Template(  # Qwen, SmolLM2
        start="{bos}",
        headers={role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
        lead="",
        closings=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>\n"),
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Template(
        start="<|begin_of_text|>",
        headers={role: LLAMA3.format(role) for role in ("system", "user", "assistant")},
        lead="",
        closings=dict.fromkeys(("system", "user", "assistant"), "<|eot_id|>"),
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=True,
    ),
    "llama2": Template(
        start="",
        headers={"user": "{begin}[INST]", "assistant": ""},
        lead=" ",
        closings={"user": " [/INST]", "assistant": " {end}"},
        strip=True,
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
    ),
    "zephyr": Template(  # TinyLlama; its <|user|> is plain text
        start="",
        headers={role: f"<|{role}|>\n" for role in ("system", "user", "assistant")},
        lead="",
        closings=dict.fromkeys(("system", "user", "assistant"), "{end}\n"),
    ),
}


# ---- the model's own format ------------------------------------------------------------------------------------------

class OwnFormat:
    """A chat_template, rendered as transformers renders it, in jinja2's sandbox. named: what it knows by name beside
    the messages, {"bos_token": "<s>", ...}; special: the model's special tokens; where: the folder, for messages.
    """

    lead = ""

    def __init__(self, source, named, special, where):
        self.where, self.named, self.special = where, named, re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.template = compiled(source, where)

    def render(self, messages, **settings):
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            return self.template.render(messages=plain, tools=None, documents=None, **self.named, **settings)
        except Exception as error:  # its own refusals, and whatever else a program can end with
            raise Refused(f"{self.where}: its chat template does not take a conversation ({error})", messages) from None

    def prompts(self, messages):
        """Up to where the assistant begins, without a thought or else as the template would have it."""
        yield self.render(messages, add_generation_prompt=True, enable_thinking=False)
        yield self.render(messages, add_generation_prompt=True)

    def write(self, messages, ask=False):
        """An answer begins where its prompt ends, and ends with the first special token behind that. Raises Refused
        where the text does not go on from the prompt, or holds something else than the answer there."""
        text, spans = next(self.prompts(messages)) if ask else self.render(messages, add_generation_prompt=False), []
        for i, message in enumerate(messages):
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"unknown role {message['role']!r}: a message is from system, user, assistant")
            if message["role"] == "assistant":
                begin = next((len(prompt) for prompt in self.prompts(messages[:i]) if text.startswith(prompt)), -1)
                end = begin >= 0 and self.special.search(text, begin)
                found, said = text[begin:end.start()].strip() if end else "", message["content"].strip()
                # a template may put an empty thought before the answer, or take a thought out of it
                if not end or bool(found) < bool(said) or not (found.endswith(said) or said.endswith(found)):
                    raise Refused(f"{self.where}: its chat template does not say where the assistant's words begin and "
                                  "end", messages)
                spans.append((begin, end.end()))
        return text, spans


def compiled(source, where):
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError(f"{where} has a chat format of its own, which jinja2 writes: pip install 'jinja2>=3.1.6', or "
                        "choose a format, as in --template chatml") from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise UserError(f"jinja2 {jinja2.__version__} lets a chat template out of its sandbox: pip install -U jinja2")

    def refuse(message):
        raise jinja2.TemplateError(message)

    today = datetime.datetime.now()  # the same all the time that a script runs
    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    room.globals |= {"raise_exception": refuse, "strftime_now": today.strftime}
    room.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    # transformers' {% generation %} is a mark that writes nothing
    source = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})",
                    lambda found: found[1] + ("endif" if found[2] else "if true") + found[3], source)
    try:
        return room.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: its chat template is damaged ({error}): copy it again, or choose a format, as in "
                        "--template chatml") from None


PROBE = [{"role": role, "content": content} for role, content in (
    ("system", " Be\n"), ("user", " a \nb"), ("assistant", " c "), ("user", "d"), ("assistant", "e\n"))]


def known(own, templates):
    """The name of the template, of {name: filled Template}, that writes what a model's own format does; else "own"."""
    try:
        for name, template in templates.items():
            if all(own.write(talk[:end], ask) == template.write(talk[:end], ask)
                   for talk in (PROBE, PROBE[1:], PROBE[1:3]) for end, ask in ((None, False), (-1, True))):
                return name
    except Refused:  # a conversation that all of the templates take
        pass
    return "own"
