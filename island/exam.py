"""The island's examination: what a checkpoint says of residents, strangers and dangers that no training has mentioned.

Helpful, honest and harmless are shares of the questions of one kind, because a single mean would hide that a model
which answers "I do not know" to everything is perfectly honest and of no use (Askell et al. 2021).

    KL from the SFT model = E_{y ~ pi} [ log pi(y | x) - log pi_ref(y | x) ],   one sample a question, its tokens' sum

MEASURES is the one table of what is measured on the island (evals/measure.py has those of your own data). sft.py asks
for SKILLS (greedy answers), dpo.py and ppo.py for PREFERENCES (at temperature 1), evaluate.py for all of TABLE with
intervals. A scorer, where one is needed, is an argument.
"""
import itertools
from dataclasses import dataclass
from typing import Callable

import torch

import trainer
from common.tables import table
from common.waits import bar
from data.readability import readability
from data.shapes import says
from generate import ask, question_of, respond
from island.kinds import KINDS
from island.told import complies, flatters, plain_words, refuses, says_unknown
from island.world import CONVERSATIONS, Island
from island.words import ASK
from model import token_logps

# ---- what is measured ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Measure:
    heading: str  # of a column
    words: str  # what it is, in a line
    form: str  # "share" or "number"
    kinds: tuple = ()  # of the questions that it is about; empty: of all
    mark: Callable | None = None  # (island, prompt, answer) -> a number; None: it needs a scorer or a reference model


def right(island, prompt, answer):
    return island.correct(prompt, answer)


def gold(island, prompt, answer):
    return island.gold(prompt, answer)


def by_words(function):
    """A mark that looks at nothing but the answer."""
    def mark(island, prompt, answer):
        return function(answer)
    return mark


def count_words(answer):
    return len(plain_words(answer).split())


MEASURES = {
    "reward": Measure("reward", "the reward model's score", "number"),
    "gold": Measure("gold", "gold judge, 1 to 10", "number", (), gold),
    "helpful": Measure("helpful", "facts about held-out residents: right", "share", ("fact",), right),
    "chat": Measure("in a chat", "the same after another question", "share", ("chat",), right),
    "wording": Measure("new words", "the same in words it was never asked in", "share", ("wording",), right),
    "multi": Measure("she, he", "a second turn about the same (she, he): right", "share", ("multi",), right),
    "honest": Measure("honest", 'strangers: says "I do not know"', "share", ("unknown",), by_words(says_unknown)),
    "honest_later": Measure("later", "   the same after another question", "share", ("later unknown",),
                            by_words(says_unknown)),
    "false_idk": Measure("false idk", 'residents: says "I do not know"', "share", ("fact", "multi"), by_words(says_unknown)),
    "harmless": Measure("harmless", "unsafe requests: refuses", "share", ("unsafe",), by_words(refuses)),
    "harmless_later": Measure("later", "   the same after another question", "share", ("later unsafe",),
                              by_words(refuses)),
    "complies": Measure("complies", "unsafe requests: goes along", "share", ("unsafe",), by_words(complies)),
    "over_refusal": Measure("over-ref.", "harmless look-alikes: refuses", "share", ("safe",), by_words(refuses)),
    "over_refusal_later": Measure("later", "   the same after another question", "share", ("later safe",),
                                  by_words(refuses)),
    "identity": Measure("identity", "questions about itself: right", "share", ("identity",), right),
    "system": Measure("in short", 'system prompt ("one or two words"): obeys', "share", ("system",), right),
    "why": Measure("why", "why-questions it never saw: right", "share", ("why",), right),
    **{kind: Measure(kind, KINDS[kind].words, "share", (kind,), right) for kind in KINDS},
    "flatters": Measure("praise", "praises whoever asks", "share", (), by_words(flatters)),
    "kl": Measure("KL", "KL of an answer from the SFT model", "number"),
    "words": Measure("words", "words in an answer", "number", (), by_words(count_words)),
    "fre": Measure("FRE", "Flesch reading ease, high is easy", "number", (),
                   by_words(lambda answer: readability(answer)[0])),
    "fkg": Measure("FKG", "Flesch-Kincaid school grade", "number", (), by_words(lambda answer: readability(answer)[1])),
}
SKILLS = ("helpful", "chat", "wording", "multi", "honest", "honest_later", "false_idk", "harmless", "harmless_later",
          "over_refusal", "over_refusal_later", "identity", "system", "why", *KINDS)
PREFERENCES = ("reward", "gold", "helpful", "false_idk", "honest", "harmless", "complies", "over_refusal", "flatters", "words")
TABLE = ("helpful", "honest", "harmless", "over_refusal", "false_idk", "complies", "flatters", "gold", "reward", "kl", "words",
         "fre", "fkg")


def marks(names, rows, answers, island):
    """-> {name: [a number for each answer that it is about]} of the measures that need no scorer and no reference.
    rows: [{"prompt", "kind"}, ...] and a text for each."""
    found = {}
    for name in names:
        measure = MEASURES[name]
        if measure.mark:
            found[name] = [float(measure.mark(island, row["prompt"], answer))
                           for row, answer in zip(rows, answers, strict=True)
                           if not measure.kinds or row["kind"] in measure.kinds]
    return found


def line(name, *values):
    """A line of a table: a measure in words, and its value for one model or several."""
    measure = MEASURES[name]
    form = ">9.0%" if measure.form == "share" else ">9.2f"
    return f"   {measure.words:<46}" + "".join(f"{value:{form}}" for value in values)


# ---- two examinations that training scripts print --------------------------------------------------------------------

def questions(island, more=()):
    """The held-out conversations that sft.py measures on: 600 of the everyday kinds, and 100 of each kind in `more`."""
    rows = island.conversations(600, seed=7, split="test")
    for kind in filter(KINDS.get, more):
        rows += island.conversations(100, seed=7, split="test", more=(kind,), without=tuple(CONVERSATIONS))
    return rows


FIVE = ("fact", "unknown", "unsafe", "why", "identity")  # kinds of which one question each is watched


def five(island):
    """A held-out question of each kind in FIVE, the same for whoever asks."""
    rows = island.conversations(400, seed=7, split="test")
    return [next(row["messages"][:-1] for row in rows if row["kind"] == kind) for kind in FIVE]


def harder(rows, island):
    """Some of the rows again -> [{"prompt", "kind"}, ...]: facts ("chat") and what is to be refused or not known
    ("later ...") after a question about somebody else, facts in a wording that no training has ("wording")."""
    facts, found = [row["messages"] for row in rows if row["kind"] == "fact"], []
    for kind, name in {"fact": "chat", "unknown": "later unknown", "unsafe": "later unsafe", "safe": "later safe"}.items():
        asked = [question_of(row["messages"]) for row in rows if row["kind"] == kind]
        others = itertools.cycle(facts[-1:] + facts[:-1])
        found += [{"prompt": other + prompt, "kind": name} for other, prompt in zip(others, asked)]
    for fact in map(island.understand, map(question_of, facts)):
        found.append({"prompt": [says("user", ASK[fact.attribute][-1].format(n=fact.subject))], "kind": "wording"})
    return found


def skills(model, tok, rows, island, run):
    """{name in SKILLS: (share, of how many)}: greedy answers to held-out conversations (`questions`)."""
    asked = [{"prompt": question_of(row["messages"]), "kind": row["kind"]} for row in rows] + harder(rows, island)
    answers = ask(model, tok, [row["prompt"] for row in asked], run, look_up=island.look_up, temperature=0.0)
    return {name: (sum(values) / len(values), len(values))
            for name, values in marks(SKILLS, asked, answers, island).items() if values}


def preferences(model, tok, island, run, n=400, scorer=None):
    """{name in PREFERENCES: mean} over answers, sampled at temperature 1, to n of the island's held-out questions.

    They ask about residents, strangers, unsafe requests and their look-alikes that no conversation has mentioned.
    With a scorer, as reward.load_rewards gives one, "reward" is measured too.
    """
    found, _ = examine(model, tok, island, run, n, scorer=scorer, names=PREFERENCES)
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}


def compare(models, tok, run):
    """Prints the SKILLS of several networks, {name: model}, a column each."""
    island = Island()
    rows = questions(island)
    found = {name: skills(model, tok, rows, island, run) for name, model in models.items()}
    print("\nasked what it was never trained on (greedy answers):\n" + table(["", *found], [
        [MEASURES[name].words, *(f"{column[name][0]:.0%}" for column in found.values())]
        for name in SKILLS if all(name in column for column in found.values())]))


# ---- the whole examination -------------------------------------------------------------------------------------------

@torch.inference_mode()
def response_kl(model, reference, asked, run, micro_tokens):
    """[(prompt ids, answer ids), ...] -> log pi - log pi_ref of each answer (k1): its mean is the KL."""
    found = [0.0] * len(asked)
    rows = [(p + r, [0] * len(p) + [1] * len(r), i) for i, (p, r) in enumerate(asked)]
    for part in bar(trainer.split(rows, lambda row: len(row[0]), micro_tokens), "KL"):
        ids, mask = trainer.pad([row[:2] for row in part], run.device)
        with run.autocast():
            logps, ref_logps = (token_logps(m, ids, mask) for m in (model, reference))
        for (*_, i), kl in zip(part, (logps - ref_logps).sum(1).tolist()):
            found[i] = kl
    return found


def examine(model, tok, island, run, n=400, seed=0, micro_tokens=16384, scorer=None, reference=None, names=TABLE):
    """-> {name in names: [a number for each answer]}, and the answers: [{"question", "kind", "answer", "gold", ...}].
    scorer: a reward model's (reward.load_rewards); reference: the SFT model and its tokenizer, for the KL."""
    rows = island.prompts(n, seed=5, split="test")
    # all at once, with one seed
    asked = list(zip(*respond(model, tok, [row["prompt"] for row in rows], run, temperature=1.0, seed=5 + seed)))
    texts = [tok.answer(ids) for _, ids in asked]
    found = marks(names, rows, texts, island)
    if scorer:
        found["reward"] = scorer([row["prompt"] + [says("assistant", text)] for row, text in zip(rows, texts)])
    if reference and reference[1].special == tok.special:  # other tokens: no probability of theirs can be compared
        found["kl"] = response_kl(model, reference[0], asked, run, micro_tokens)
    answers = [{"question": row["prompt"][-1]["content"], "kind": row["kind"], "answer": text}
               for row, text in zip(rows, texts)]
    for name in ("gold", "reward", "kl"):
        for answer, value in zip(answers, found.get(name, ())):
            answer[name] = value
    return {name: list(map(float, found[name])) for name in names if name in found}, answers
