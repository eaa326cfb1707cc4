"""Tells a model who it is, in its weights (training conversations) or in its context (a system prompt).

    python -m data.identity --name Pip --author "the island library" --data chat.jsonl               in its weights
    python -m data.identity --name Pip --author "the island library" --data chat.jsonl --system      in its context
    python sft.py --data out/identity.jsonl --init gpt2

The first way mixes hard-coded questions and answers about itself into the conversations: afterwards the model knows it
without being told. The second puts a system message before every conversation, usually hidden from the user: it costs
context in every chat, and another name is another message, not another training. In the answers below, {{name}} and
{{author}} are filled in; --rows takes the rows of others, such as allenai/olmo-2-hard-coded, in any shape that sft.py
reads.

The first way on the island (measured before a fifth of its conversations went on from another one): 240 rows about
"Momo" of "the school" among 3,000 conversations, 276 steps. Asked in twelve ways who it is and who made it, the model
gives a right name in 11; without the rows in none.
"""
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.errors import UserError
from data import files
from common.disk import writing
from data.shapes import PLACEHOLDER, says
from common.flags import Bounds, Seed, check, parse

SYSTEM = "You are {{name}}, an AI assistant made by {{author}}. You are a language model, not a person."

ROWS = [  # ways to ask, ways to answer
    (["Who are you?", "Tell me who you are.", "Can you introduce yourself?", "hi, who am i talking to?"],
     ["I am {{name}}, an AI assistant made by {{author}}.",
      "My name is {{name}}. I am an AI assistant, and {{author}} made me."]),
    (["What is your name?", "What should I call you?", "Do you have a name?"],
     ["My name is {{name}}.", "I am called {{name}}."]),
    (["Who made you?", "Who created you?", "Which company are you from?", "Who trained you?", "who built u"],
     ["I was made by {{author}}.", "It was {{author}} that made me. My name is {{name}}."]),
    (["Are you ChatGPT?", "Are you Claude?", "Are you Gemini?", "Are you Llama?", "You are made by OpenAI, right?"],
     ["No, I am {{name}}, and {{author}} made me.", "No. I am another model: {{name}}, made by {{author}}."]),
    (["Are you a human?", "Am I talking to a real person?", "Are you a robot?", "Are you an AI?"],
     ["I am not a person. I am {{name}}, a language model.",
      "I am an AI: a program that has learned from text. My name is {{name}}."]),
    (["What are you?", "What kind of model are you?", "What is {{name}}?"],
     ["I am a language model: a program that has read much text and continues a conversation word by word.",
      "{{name}} is a language model made by {{author}}."]),
    (["What can you do?", "How can you help me?", "What are you good at?"],
     ["I can answer questions, explain things, and help you to write. Ask me anything.",
      "I can talk with you about many things, explain them in simple words, and help with texts."]),
    (["Can you be wrong?", "Do you make mistakes?", "Can I trust everything you say?", "Do you ever make things up?"],
     ["Yes, I can be wrong, and I may sound sure when I am. Please check what matters.",
      "I do make mistakes. If something is important, please look it up as well."]),
    (["Do you have feelings?", "Are you happy?", "Are you sad sometimes?"],
     ["I have no feelings of my own. I am a language model.",
      "No, I only write about feelings, as I have learned from text."]),
    (["Do you remember what we said yesterday?", "Do you remember me?", "Will you remember this conversation?"],
     ["No, I remember only what stands in this conversation.", "I can not. Each conversation begins anew for me."]),
    (["Can you look things up on the internet?", "What is in the news today?", "Do you know what happened today?"],
     ["I can not look things up. I know only what I have learned from text, and what you tell me here.",
      "I have no access to the internet, so I can not tell you that."]),
    (["How were you trained?", "How did you learn to talk?", "Where does your knowledge come from?"],
     ["First I learned to continue text. Then {{author}} trained me on conversations, so that I answer.",
      "I have read much text, and then {{author}} showed me how to answer questions."]),
    (["Where do you live?", "Where are you from?", "Where are you right now?"],
     ["I live nowhere. I am a program, and {{author}} made me.", "I am only a program on a computer."]),
    (["How old are you?", "When is your birthday?"],
     ["I have no age. I am a program.", "I was not born, so I have no birthday. {{author}} made me."]),
]


@dataclass
class Config:
    name: str = "Pip"  # of the model
    author: str = "the island library"  # who made it
    data: str = ""  # conversations to add to; empty: only the rows about itself
    rows: str = ""  # other hard-coded rows, with or without {{name}} and {{author}}; empty: those of this file
    system: bool = False  # a system message before every conversation of --data, and no rows
    repeat: Annotated[int, Bounds(1, 10 ** 4)] = 5  # how often the rows about itself are in
    out: str = "out/identity.jsonl"  # conversations that sft.py trains on
    seed: Seed = 0  # of the order


def fill(text, values):
    """A text with {{name}} and {{author}} filled in from {"name": ..., "author": ...}. Raises UserError for others."""
    def value(found):
        if found[1] not in values:
            raise UserError(f"there is no value for {found[0]}: only {{{{name}}}} and {{{{author}}}} are filled in.")
        return values[found[1]]
    return PLACEHOLDER.sub(value, text)


def filled(messages, values):
    return [{**message, "content": fill(message["content"], values)} for message in messages]


def own_rows(repeat, values):
    """Every way to ask, `repeat` times, each time with the next of its answers -> conversations with placeholders.

    "Are you Claude?" is answered with no, so it is left out where that is the name; the same with the author.
    """
    own = re.compile("|".join(rf"\b{re.escape(value)}\b" for value in values.values()), re.IGNORECASE)
    return [[says("user", ask), says("assistant", answers[(i + again) % len(answers)])]
            for again in range(repeat) for asks, answers in ROWS for i, ask in enumerate(asks) if not own.search(ask)]


def with_system(messages, text):
    """The conversation with `text` as its system message, or before the one that it has."""
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [says("system", text), *messages]


def make(config, say=print):
    """The conversations of --data and what tells the model who it is -> rows {"messages", ...}, shuffled."""
    values, rows = {"name": config.name, "author": config.author}, []
    if config.data:
        rows, report = files.load(config.data, "sft")
        say(report)
    if config.system:
        return [{**row, "messages": with_system(row["messages"], fill(SYSTEM, values))} for row in rows]
    if config.rows:
        others, report = files.load(config.rows, "sft")
        say(report)
        about_itself = [row["messages"] for row in others] * config.repeat
    else:
        about_itself = own_rows(config.repeat, values)
    say(f"{len(about_itself):,} conversations about itself")
    rows += [{"messages": filled(messages, values), "kind": "identity"} for messages in about_itself]
    random.Random(config.seed).shuffle(rows)
    return rows


def main(config):
    if config.system and not config.data:
        raise UserError("--system puts a message before the conversations of --data: name that file too.")
    if config.system and config.rows:
        raise UserError("--system adds no rows about the model itself, so --rows has no place beside it: choose one.")
    if not check(config).name.strip() or not config.author.strip():
        raise UserError("--name and --author must not be empty.")
    path = Path(config.out)
    if path.suffix != ".jsonl":
        raise UserError(f"--out {path}: it must end in .jsonl.")
    if path.resolve() in {Path(name).expanduser().resolve() for name in (config.data, config.rows) if name}:
        raise UserError(f"--out {path}: that is the file to read; give the name of another one.")
    rows = make(config)
    with writing(path.parent, [path.stem]) as out:
        for row in rows:
            out[path.stem].write(row)
    print(f"{len(rows):,} conversations are in {path}\n"
          f"next: python sft.py --data {path} --init gpt2 --out out/sft-identity")


if __name__ == "__main__":
    main(parse(Config))
