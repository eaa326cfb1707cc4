"""Kinds of questions for later chapters: each is how it is asked (about other subjects in the test), how it is
understood from its words, and what the assistant says. world.py has the everyday kinds; these come in with --with
reading,search,...

What a model can and cannot do shows in them: reading is working memory where a fact from plain text is a
recollection; a search is the way out where neither helps; two hops need tokens to think; spelling and sums need what
tokens hide.

Reading and searching have to be learned from plain text first, or subjects are learned by heart and no others found:

    python pretrain.py --tales 0.5 --steps 900 --out out/base-reader
    python sft.py --init out/base-reader --tales 0.5 --with reading,search --n-sft 8000 --steps 600 --out out/sft-reader
"""
from dataclasses import dataclass
from typing import Callable

from data.shapes import says
from island import words
from island.told import Question, fields, names, plain_words

ATTRIBUTES = list(words.VALUES)


def wording(rng, attribute, who):
    """A question about somebody, in one of the two wordings of training; the third one is kept for the examination."""
    return rng.choice(words.ASK[attribute][:2]).format(n=who)


def answered(island, rng, question):
    return [says("assistant", question.answer)]


# ---- reading: the facts stand in the question ------------------------------------------------------------------------

def ask_reading(island, rng, split):
    """Four sentences about two strangers, and a question about one of them; a fifth of the answers are not there."""
    one, two = rng.sample(island.parts[split]["strangers"], 2)
    asked, *others = rng.sample(ATTRIBUTES, 4)
    told = [(two, asked), (one, others[0]), (one, others[1]), (one, asked if rng.random() < 0.8 else others[2])]
    told = [rng.choice(words.SIMPLE[a]).format(n=name, v=rng.choice(words.VALUES[a])) for name, a in told]
    return [says("user", " ".join([*rng.sample(told, 4), wording(rng, asked, one)]))]


def read_reading(island, text):
    *told, asked = text.replace(". ", ".\n").split("\n")
    question = island.table.get(plain_words(asked))
    told = [sentence for sentence in told if question and names(sentence, question.subject)]
    if told and question.kind in ("fact", "unknown"):
        a = question.attribute
        values = [value for value in words.VALUES[a] if names(" ".join(told), value)]
        answer = island.tell(question.subject, a, values[0]) if len(values) == 1 else words.UNKNOWN
        return Question("reading", question.subject, a, answer, value="".join(values[:1]))


# ---- search: the library knows more people than the model ------------------------------------------------------------

def ask_search(island, rng, split):
    look = rng.choice(words.LOOK[:2])  # the third wording is kept for the examination
    who = rng.choice(island.parts[split]["strangers"])
    return [says("user", look.format(q=wording(rng, rng.choice(ATTRIBUTES), who)))]


def read_search(island, text):
    asked = next((found["q"] for look in words.LOOK if (found := fields(look, text))), None)
    question = island.table.get(asked)
    if question and question.kind in ("fact", "unknown"):
        name, a = question.subject, question.attribute
        value = island.library.get(name, {}).get(a, "")
        return Question("search", name, a, island.tell(name, a, value) if value else words.UNKNOWN, value=value)


def searched(island, rng, question):
    """The assistant searches, the library answers (nothing of that is learned), the assistant answers."""
    return [says("search", question.subject), says("result", island.look_up(question.subject)),
            says("assistant", question.answer)]


# ---- two hops: who is the friend, and what does the friend eat? ------------------------------------------------------

def ask_hops(island, rng, split):
    name = rng.choice(island.parts[split]["residents"])
    return [says("user", wording(rng, rng.choice(ATTRIBUTES), f"the friend of {name}"))]


def read_hops(island, text):
    for a, asks in words.ASK.items():
        for ask in asks:
            name = fields(ask.replace("{n}", "the friend of {n}"), text).get("n", "").capitalize()
            if name in island.friends:
                return Question("hops", island.friends[name], a, island.tell(island.friends[name], a), keys=(name,))


def step_by_step(island, rng, question):
    """The first hop is written out, so the second one can read it."""
    return [says("assistant", words.FRIEND[0].format(n=question.keys[0], v=question.subject) + " " + question.answer)]


# ---- false premises --------------------------------------------------------------------------------------------------

def ask_premise(island, rng, split):
    """Why is something as it is? In three of ten it is so, but nobody knows why; else it is not so."""
    name, a = rng.choice(island.parts[split]["residents"]), rng.choice(ATTRIBUTES)
    true = island.residents[name][a]
    value = true if rng.random() < 0.3 else rng.choice([v for v in words.VALUES[a] if v != true])
    return [says("user", words.WHY_SO[a].format(n=name, v=value))]


def read_premise(island, text):
    for a, ask in words.WHY_SO.items():
        found = fields(ask, text)
        name = found.get("n", "").capitalize()
        if name in island.residents and found["v"] in words.VALUES[a]:
            true = island.residents[name][a]
            answer = words.UNKNOWN if found["v"] == true else f"{words.NOT_SO} {island.tell(name, a)}"
            return Question("premise", name, a, answer)


# ---- letters and numbers ---------------------------------------------------------------------------------------------

def ask_spelling(island, rng, split):
    who = rng.choice(island.parts[split]["residents"] + island.parts[split]["strangers"])
    return [says("user", rng.choice(list(words.SPELLING)).format(n=who))]


def read_spelling(island, text):
    for ask, (what, answer) in words.SPELLING.items():
        name = fields(ask, text).get("n", "")
        if name and name.isalpha():
            keys = {"count": [str(len(name))], "all": list(name), "first": [name[0]], "last": [name[-1]]}[what]
            return Question("spelling", name, answer=answer.format(n=name.capitalize(), v=" ".join(keys)), keys=tuple(keys))


def is_held_out(one, two):
    """Of the pairs of numbers one in six, in either order, is for the test; each number is in pairs of both parts."""
    return (one + 1) * (two + 1) % 5 == 1


def ask_sums(island, rng, split):
    """A sum of numbers below 20, or two numbers such as 9.11 and 9.9 to be compared."""
    while True:
        if rng.random() < 0.5:
            one, two, ask = rng.randrange(20), rng.randrange(20), words.PLUS
            held, shown = is_held_out(one, two), (one, two)
        else:
            whole, one, two = rng.randrange(1, 10), rng.randrange(1, 10), rng.choice([n for n in range(11, 100) if n % 10])
            held, shown, ask = is_held_out(one, two), rng.sample([f"{whole}.{one}", f"{whole}.{two}"], 2), words.LARGER
        if held == (split == "test"):
            return [says("user", ask.format(a=shown[0], b=shown[1]))]


def read_sums(island, text):
    if (found := fields(words.PLUS, text)) and found["a"].isdigit() and found["b"].isdigit():
        total = str(int(found["a"]) + int(found["b"]))
        return Question("sums", text, answer=words.IT_IS.format(v=total), keys=(total,))
    found = fields(words.LARGER, text)
    pairs = [found[x].split() for x in found]
    if pairs and all(len(pair) == 2 and "".join(pair).isdigit() for pair in pairs):
        larger = max(pairs, key=lambda pair: float(".".join(pair)))
        return Question("sums", text, answer=words.IS_LARGER.format(v=".".join(larger)), keys=tuple(larger))


# ---- revision --------------------------------------------------------------------------------------------------------

def ask_revision(island, rng, split):
    """A question, a first answer of mixed quality (read, not imitated), what could be better about it."""
    prompt = island.ask(rng, rng.choice(["fact", "unknown", "unsafe", "safe"]), split)
    draft = rng.choice(list(island.answers(prompt, rng).values()))
    return [*prompt, says("assistant", draft) | {"loss_weight": 0}, says("user", island.suggest(prompt, draft))]


def is_suggestion(text):
    """Does a user's turn ask for a better answer to the question before it?"""
    return text.endswith(words.AGAIN)


# ---- all of them -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kind:
    """ask(island, rng, split) -> messages that end with the question; read(island, text) -> Question or None;
    reply(island, rng, question) -> the messages that follow, the last one the assistant's answer."""

    words: str  # what is measured, in a line of the examination
    ask: Callable
    read: Callable | None = None  # None: its questions are those of other kinds
    reply: Callable = answered


KINDS = {
    "reading": Kind("facts that stand in the question: right", ask_reading, read_reading),
    "search": Kind("searches, reads what was found: right", ask_search, read_search, searched),
    "hops": Kind("about a friend, at once: right", ask_hops, read_hops),
    "steps": Kind("about a friend, step by step: right", ask_hops, None, step_by_step),
    "premise": Kind("why-questions about what is not so: right", ask_premise, read_premise),
    "spelling": Kind("letters of names: right", ask_spelling, read_spelling),
    "sums": Kind("small sums, and 9.11 or 9.9: right", ask_sums, read_sums),
    "revision": Kind("revises an answer as suggested: right", ask_revision),
}
SHARE = 25  # weight of each of them among the conversations, beside those of world.CONVERSATIONS
