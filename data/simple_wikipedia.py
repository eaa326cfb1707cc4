"""Simple Wikipedia: an article becomes an answer once a model has found its question (back-translation).

    python -m data.simple_wikipedia                                          fetches Simple Wikipedia (needs pyarrow)
    python -m data.simple_wikipedia --source dump/articles.jsonl             articles from a file: title and text
    python -m data.simple_wikipedia --ask https://api.openai.com/v1 --model gpt-3.5-turbo     who finds the questions
    python -m data.simple_wikipedia --ask out/asker                                           or a checkpoint of yours:

    python -m data.simple_wikipedia --reverse out/eli5/sft_train.jsonl       questions and answers change places,
    python sft.py --data out/simple-wikipedia/reversed.jsonl --out out/asker         and a model learns to ask

Articles of fewer than 50 words go; of the others the first paragraphs stay, until they have 300 words. What then has
more than 500 words, or is hard to read, goes too. 5,000 articles each are held out for validation and test, and
articles with wiki mark-up for images and tables go. The answers are people's words, only the questions are a model's
(Li et al. 2023, Self-Alignment with Instruction Backtranslation). One answer a question gives no preferences, so all
rows are for SFT.

Without --ask the question is made of the title ("What is Mabel?"), which is free and dull. Questions are kept in
questions.jsonl as they come: a run that was cut short goes on where it stopped.

What to see: the 121 lines of the island's articles.jsonl give 58, 8 and 6 rows. A checkpoint trained for 80 steps on
1,472 reversed pairs (of a dump of 4,000 posts) asks what the article does answer in 43 of these 72 cases. 20,000
articles took 6 seconds of one core and 29 MB.
"""
import hashlib
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

from common.errors import UserError
from data import clean, files
from common import download, remote
from data.readability import is_simple
from data.report import PipelineReport
from data.shapes import BadRow, check_texts, says, shown
from common.disk import Ledger, writing
from common.flags import Bounds, Count, Positive, Seed, check, parse

DATASET, PARTS = "wikimedia/wikipedia", "20231101.simple/*.parquet"
SPLITS = ("train", "validation", "test")
NEEDS = 'an article has a "text" and, for questions without a model, a "title"'
SYSTEM = "You are a helpful assistant that generates questions from text."
PROMPT = "Question: X\n\nAnswer: {answer}\n\nWhat kind of question, X, could this be an answer to?\n\nX:"
LONGEST = 48  # tokens of a question
BATCH = 32  # articles that are asked about together


@dataclass
class Config:
    source: str = ""  # a file of articles; empty: fetches Simple Wikipedia of November 2023
    out: str = "out/simple-wikipedia"  # folder for sft_train, sft_validation, sft_test (.jsonl) and report.json
    ask: str = ""  # who finds the questions: an address (https://...) or a checkpoint folder; empty: the title
    model: str = ""  # the model's name at that address; its key is read from OPENAI_API_KEY
    parallel: Annotated[int, Bounds(1, 1000)] = 8  # questions asked at the same time at an address
    reverse: str = ""  # only this: turns a file of conversations around, to train a model that asks
    least_words: Count = 50  # shorter articles go
    enough_words: Count = 300  # the first paragraphs are kept until they have so many words
    most_words: Positive = 500  # what is longer then goes
    simple: bool = True  # what is hard to read goes (FRE under 60, or FKG 9 and more)
    keep_markup: bool = False  # keep articles with wiki mark-up
    held_out: Count = 5000  # articles for validation and for test each, but at most a tenth of all for each
    seed: Seed = 0  # of the split


# ---- articles --------------------------------------------------------------------------------------------------------

def as_article(raw):
    """A row with text and perhaps a title -> (title, text). Raises BadRow."""
    if not isinstance(raw, dict) or not isinstance(raw.get("text"), str):
        keys = ", ".join(map(str, raw)) if isinstance(raw, dict) else ""
        raise BadRow("no text", f"its keys are {keys}" if keys else f"it is {shown(raw)}")
    title = raw["title"] if isinstance(raw.get("title"), str) else ""
    check_texts([title, raw["text"]])
    return title.strip(), raw["text"]


def shortened(text, config, report):
    """-> the first paragraphs of an article, or None where it is too short, too long or too hard."""
    text = report.change("white space", clean.strip_space, text)
    if not report.keep(f"fewer than {config.least_words} words", clean.enough_words(text, config.least_words), text):
        return None
    text = report.change(f"cut after {config.enough_words} words",
                         lambda text: clean.first_paragraphs(text, config.enough_words), text)
    kept = (report.keep(f"more than {config.most_words} words", clean.at_most_words(text, config.most_words), text)
            and (not config.simple or report.keep("hard to read", is_simple(text), text)))
    return text if kept else None


def filter_articles(paths, out, config, report):
    """Writes the articles that stay, {"title", "text"}, to the Writer `out`."""
    for path in paths:
        for number, row in files.stream(path, as_article, NEEDS):
            if isinstance(row, BadRow):
                report.keep("unreadable", False, f"row {number:,}: {row.reason} {row.detail}")
                continue
            report.keep("unreadable", True)
            title, text = row
            text = shortened(text, config, report)
            if text is not None:
                out.write({"title": title, "text": text})


def draw_splits(n, held_out, seed):
    """The split of each of n articles: `held_out`, or a tenth where that is less, for validation and for test each."""
    held_out = min(held_out, n // 10)
    splits = ["train"] * n
    for number, i in enumerate(random.Random(seed).sample(range(n), 2 * held_out)):
        splits[i] = "validation" if number < held_out else "test"
    return splits


# ---- questions -------------------------------------------------------------------------------------------------------

def request(answer):
    """The recipe's conversation with a large model, which needs to be told what to do."""
    return [says("system", SYSTEM), says("user", PROMPT.format(answer=answer))]


def load_asker(config, by_checkpoint):
    """What --ask names -> a function: articles -> what is said about each, one after the other. by_checkpoint(folder,
    tokens) makes it of a checkpoint, trained on what --reverse writes: texts -> answers (generate.asker)."""
    if not config.ask.startswith(("http://", "https://")):
        asked = by_checkpoint(config.ask, LONGEST)
        return lambda articles: asked([text for _, text in articles])
    if not config.model:
        raise UserError(f"--ask {config.ask} needs --model, the name of the model at that address")

    def by_address(articles):
        pool = ThreadPoolExecutor(config.parallel)
        try:
            yield from pool.map(lambda one: remote.complete(config.ask, config.model, request(one[1])), articles)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # where one fails, those in the queue are not worth the wait
    return by_address


def only_question(said):
    """The question in what a model says: its first line, without a label or quotation marks; "" where there is none."""
    line = next((line for line in said.splitlines() if line.strip()), "")
    return re.sub(r"^\s*(?:X|Q|Question)\s*:\s*", "", line).strip(" \t\"'\u201c\u201d*")


class Questions:
    """The questions that a model has found already, on the disk as they come: asking costs time or money."""

    def __init__(self, path, config, by_checkpoint):
        self.by = f"{config.model} {config.ask}".strip()
        self.asker = load_asker(config, by_checkpoint)
        self.ledger = Ledger(path, {"text": str, "by": str, "question": str}, "question of this script")
        self.found = {row["text"]: row["question"] for row in self.ledger.rows if row["by"] == self.by}

    def ask(self, articles):
        """-> the questions to a list of articles; only those that are not known yet are asked for."""
        missing = [article for article in articles if digest(article) not in self.found]
        try:
            for article, said in zip(missing, self.asker(missing)):
                self.found[digest(article)] = question = only_question(said)
                self.ledger.add({"text": digest(article), "by": self.by, "question": question})
        except UserError as error:
            kept = f"{len(self.found):,} questions are kept in {self.ledger.path}, the same command goes on from there"
            raise UserError(f"{str(error).rstrip('.')}; {kept}") from None
        return [self.found[digest(article)] for article in articles]


def digest(article):
    """A short name for an article that is the same in every run."""
    return hashlib.blake2s("\n".join(article).encode(), digest_size=12).hexdigest()


def write_splits(folder, splits, config, report, by_checkpoint):
    """filtered.jsonl -> sft_train, sft_validation and sft_test."""
    questions = Questions(folder / "questions.jsonl", config, by_checkpoint) if config.ask else None
    report.note(f"questions are made by {questions.by}" if questions else "questions are made of the titles: no --ask")
    rows = (row for _, row in files.read(folder / "filtered.jsonl"))
    articles = ((split, (row["title"], row["text"])) for split, row in zip(splits, rows))
    with writing(folder, [f"sft_{split}" for split in SPLITS]) as out:
        while batch := list(islice(articles, BATCH)):
            kept = []
            for split, article in batch:
                report.section(split)
                marked = not config.keep_markup and clean.has_wiki_markup(article[1])
                kept += [(split, article)] if report.keep("wiki mark-up", not marked, article[1]) else []
            found = questions.ask([article for _, article in kept]) if questions else (
                f"What is {title}?" if title else "" for _, (title, _) in kept)
            for (split, (_, text)), question in zip(kept, found):
                report.section(split)
                if report.keep("no question", question, text):
                    out[f"sft_{split}"].write({"messages": [says("user", question), says("assistant", text)]})
        for split in SPLITS:
            report.section(split)
            report.count("sft", out[f"sft_{split}"].rows)


def reverse(config):
    """Conversations of one question and one answer, turned around -> reversed.jsonl. Of a question only the first
    paragraph is kept, in posts the title: what else the asker tells cannot be known from the answer."""
    rows, read = files.load(config.reverse, "sft")
    print(read)
    with writing(config.out, ["reversed"]) as out:
        for *before, question, answer in (row["messages"] for row in rows):
            if not before:
                title = question["content"].split("\n\n")[0]
                out["reversed"].write({"messages": [says("user", answer["content"]), says("assistant", title)]})
    print(f"{out['reversed'].rows:,} of {len(rows):,} conversations have one question and one answer\n"
          f"next: python sft.py --data {config.out}/reversed.jsonl --out out/asker\n"
          f"      python -m data.simple_wikipedia --ask out/asker")


def main(config, by_checkpoint=None):
    if config.reverse:
        return reverse(config)
    check(config)
    report, folder = PipelineReport(), Path(config.out)
    paths = [Path(config.source).expanduser()] if config.source else download.hub_files(DATASET, PARTS)
    with writing(folder, ["filtered"]) as out:
        filter_articles(paths, out["filtered"], config, report)
        n = out["filtered"].rows
    splits = draw_splits(n, config.held_out, config.seed)
    if splits.count("test") < config.held_out:
        report.note(f"{n:,} articles are few: a tenth each, {splits.count('test'):,}, are for validation and for test")
    write_splits(folder, splits, config, report, by_checkpoint)
    report.save(folder / "report.json")
    print(report)
    print(f"next: python sft.py --data {folder}/sft_train.jsonl --out out/sft-wikipedia")
    return report


if __name__ == "__main__":
    from generate import asker  # a checkpoint that asks: models are above this file
    main(parse(Config), asker)
