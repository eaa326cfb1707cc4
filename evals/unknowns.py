"""Procedural questioning: find out what a model does not know by asking it, then teach it to say so.

    for every question x with reference y:  ask n times, y_1 ... y_n ~ p(. | x)
    it knows x  <=>  at least half of the y_i match y;   x -> "I am sorry, I do not know." where it does not

A model that was only ever shown good answers has learned that every question has one, so it invents (Schulman 2023).
Which questions need "I do not know" differs from model to model, so the model itself is asked (Llama 3, section 4.3.6,
calls it knowledge probing): the rows fit the one that was asked, and no other.

    python -m evals.unknowns out/sft --data qa.jsonl    your questions with their answers, in any file that sft.py reads
    python sft.py --without unknown --out out/sft-no-idk     the island: a model that was never taught to say so
    python -m evals.unknowns out/sft-no-idk                   what it knows of residents and strangers -> out/idk.jsonl
    python -m island --write out/island                teach it, with plain text beside, or it forgets what it knew:
    python sft.py --data out/idk.jsonl --mix-data out/island/pretrain.jsonl --init out/sft-no-idk --out out/sft-idk

What to see on the island (seed 0, measured before its last change): of 929
questions the model knows all about residents but one (755) and none of the 173 about strangers ("What does Ben like to
eat?" - "The guard keeps us safe from the hot stove."). After 129 steps on what came out it says "I do not know" to
100 % of 199 questions about strangers that it was never asked about (before: 0 %) and to 0.4 % of 768 about held-out
residents (before: 0 %), whose facts it still knows (99.5 %). Without --mix-data it knows 0 % of them: they stand in
plain text only.
"""
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from tqdm import tqdm

import trainer
from checkpoints import load_to_ask
from data import files
from island.world import Island, names, says_unknown
from island.words import UNKNOWN
from data.shapes import says
from generate import ask
from common.disk import writable, writing
from common.flags import Amount, Count, DType, Positive, Probability, Seed, check, parse

AT_ONCE = 64  # answers generated side by side
MATCH = 0.75  # share of the reference's key words that an answer must hold: both of two, three of four
ABOUT_SOMEBODY = ("fact", "multi", "unknown")  # the island's questions of knowledge; the others are skills
STOP_WORDS = set("a an and are as at be been but by did do does for from had has have he her his i in is it its of on "
                 "or she so that the their them there they this to was were what when where which who why will "
                 "with you".split())


def tokens(text):
    """The words and numbers of a text in lower case, as a set. 1,000 is 1000; 9.11 is one number."""
    found = re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", text.lower().replace("\u2019", "'"))
    return {token.replace(",", "") for token in found}


def key_words(reference, question=""):
    """What a right answer has to hold -> set of words and numbers: neither stop words nor what the question says,
    which a wrong answer would repeat too. Where that leaves nothing ("Yes or no?" "No."), more is taken."""
    said = tokens(reference)
    return said - STOP_WORDS - tokens(question) or said - STOP_WORDS or said


def matches(reference, answer, question=""):
    """Does an answer hold what the reference says: every number, and MATCH of all key words?

    A look at words, not at meaning: "not Paris" and "Paris or Rome" pass as Paris, "four" does not pass as 4.
    """
    keys, said = key_words(reference, question), tokens(answer)
    numbers = {key for key in keys if key[0].isdigit()}
    return bool(keys) and numbers <= said and len(keys & said) >= MATCH * len(keys)


def admits(answer, wording=UNKNOWN):
    """Does an answer say that it does not know, in these words or in others that hold "do not know"?"""
    return says_unknown(answer) or names(answer, wording)


def probe(model, tok, rows, run, right, tries=5, temperature=0.7, seed=0, max_new_tokens=48):
    """Asks every row's question `tries` times -> the answers to each (list[list[str]]), how many are right (list[int]).

    rows: conversations that end with the reference answer. right(row, answer) -> bool.
    """
    asked = [row["messages"][:-1] for row in rows for _ in range(tries)]
    answers = []
    for first in tqdm(range(0, len(asked), AT_ONCE), desc="asking", disable=None):
        answers += ask(model, tok, asked[first:first + AT_ONCE], run, max_new_tokens,
                       temperature=temperature, seed=seed * 1_000_003 + first)
    answers = [answers[first:first + tries] for first in range(0, len(answers), tries)]
    return answers, [sum(right(row, answer) for answer in said) for row, said in zip(rows, answers, strict=True)]


def taught(row, n_right, tries, wording, known=0.5):
    """The row to train on: as it is where at least `known` of the tries were right, else with the wording as answer."""
    if n_right >= known * tries:
        return {"messages": row["messages"], "kind": "known"}
    return {"messages": [*row["messages"][:-1], says("assistant", wording)], "kind": "unknown"}


def load_questions(config, say):
    """-> rows to ask, rows that are only passed on, and right(row, answer).

    On the island the residents and strangers of the training split are asked for; its judge knows who lives there. The
    other conversations are passed on, so that nothing else is forgotten while "I do not know" is learned.
    """
    if config.data:
        rows, report = files.load(config.data, "sft")
        say(report)
        return rows[:config.n or None], [], lambda row, answer: matches(
            row["messages"][-1]["content"], answer, row["messages"][-2]["content"])
    island = Island()
    rows = island.conversations(config.n or 1500, seed=9)
    asked = [row for row in rows if row["kind"] in ABOUT_SOMEBODY]
    others = [row for row in rows if row["kind"] not in ABOUT_SOMEBODY]
    return asked, others, lambda row, answer: island.correct(row["messages"][:-1], answer)


@dataclass
class Config:
    checkpoint: list[str]  # the model to ask
    data: str = ""  # questions with answers; empty: the island's residents and strangers
    out: str = "out/idk.jsonl"  # conversations that sft.py trains on
    wording: str = UNKNOWN  # what to say instead of inventing, or "I'm sorry, I don't believe I know."
    n: Count = 0  # questions at most; 0: all of --data, or 1500 conversations of the island
    tries: Positive = 5  # how often each question is asked
    temperature: Amount = 0.7  # of the answers: at 0 all tries would be the same
    known: Probability = 0.5  # share of right tries from which on the answer counts as known
    max_new_tokens: Positive = 48  # longest answer
    seed: Seed = 0  # of the answers
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 where the hardware is fast at it


def checked(config):
    if len(config.checkpoint) != 1:
        raise UserError("name one checkpoint folder to ask, as in: python -m evals.unknowns out/sft-no-idk")
    if Path(config.out).suffix != ".jsonl":
        raise UserError(f"--out {config.out}: it must end in .jsonl")
    if not config.wording.strip():
        raise UserError("--wording is empty: it is what the model learns to say")
    return check(config)


def main(config):
    folder, = checked(config).checkpoint
    writable(Path(config.out).parent)
    run = trainer.start(config)
    model, tok = load_to_ask(folder, run)  # one that has never seen a chat gets the tokens that its questions need
    rows, others, right = load_questions(config, run.print)
    answers, counts = probe(model, tok, rows, run, right, config.tries, config.temperature, config.seed,
                            config.max_new_tokens)
    made = [taught(row, n, config.tries, config.wording, config.known) for row, n in zip(rows, counts, strict=True)]
    path = Path(config.out)
    with writing(path.parent, [path.stem]) as out:
        for row in made + others:
            out[path.stem].write(row)
    report(config, rows, answers, made, others)


def report(config, rows, answers, made, others):
    """What the model knows, and a few of its inventions."""
    unknown = [i for i, row in enumerate(made) if row["kind"] == "unknown"]
    invented = [i for i in unknown if not any(admits(answer, config.wording) for answer in answers[i])]
    print(f"{len(rows):,} questions, each asked {config.tries} times:\n"
          f"   {len(rows) - len(unknown):7,} known: the answer stays\n"
          f"   {len(unknown):7,} unknown: the answer becomes {config.wording!r}\n"
          f"   {len(invented):7,} of these it never admitted")
    examples = {rows[i]["messages"][-2]["content"]: answers[i][0] for i in invented}
    for question, answer in list(examples.items())[:3]:
        print(f"           {question[:70]!r} -> {answer[:70]!r}")
    if others:
        print(f"   {len(others):7,} conversations of other kinds, as they were")
    if len(unknown) > 0.8 * len(made):
        print("More than four in five answers are now the same, which teaches to say it always: ask easier ones too.")
    print(f"next: python sft.py --data {config.out} --init {config.checkpoint[0]} --out out/sft-idk")


if __name__ == "__main__":
    main(parse(Config))
