"""ELI5: posts with voted answers become the three data sets of RLHF, and every rule on the way says what it takes.

    python -m data.eli5                                    fetches vblagoje/lfqa (226,147, 3,020 and 10,000 posts)
    python -m data.eli5 --source dump --out out/eli5       a folder with train, validation and test in the same schema,
    python -m data.eli5 --source my_posts.jsonl            or one file, which is split by question

Posts without a question go. Of questions that are nearly the same in two splits one goes (leakage.py). Answers lose
mark-up, quotes, placeholders of addresses and white space (clean.py); those of fewer than 20 words and those that are
hard to read go. What is left is divided:

    sft       the only answer to a question, if it has 4 points or more, is not toxic and does not end in an edit
    ranked    two or more answers, each with another score; of equal scores one stays, and the others move to sft
    prompts   every question in neither of the two, those that lost all answers included

A low score, toxic words or an edit do not remove a ranked answer: they make it one that is only ever rejected. Votes
would not see to that (people vote for insults too), so in the file such answers all have the score --least-score minus
1, which is below every other, and equal scores make no pairs (reward.py, dpo.py). What people voted is kept as "votes".

What to see: of the 481 lines of the dump's train.jsonl come 221 rows for sft, 154 for ranked and 110 for prompts, and
every filter has the count that victims.json says. 99,700 posts with 175,000 answers (--n-dump 100000) took 75 seconds
of one core and 510 MB. Posts pass through; only their questions are held, to be compared with each other.
"""
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.errors import UserError
from common import download
from common.disk import writable, writing
from common.flags import Amount, Count, Number, Seed, Share, parse
from data import clean, files, leakage
from data.readability import is_simple
from data.report import PipelineReport
from data.shapes import BadRow, as_number, as_text, check_texts, recognise, says

DATASET = "vblagoje/lfqa"  # ELI5 (Fan et al. 2019) without most of its leaks (Krishna et al. 2021)
NEEDS = 'a post has a "title", a "selftext" and "answers" with the lists "text" and "score"'
SPLITS = ("train", "validation", "test")
FORMS = ("sft", "ranked", "prompts")
HELD_OUT = 0.05  # of a single file's questions, for validation and for test each
BATCH = 64  # posts whose answers are judged together: a toxicity model is slow one by one


@dataclass
class Config:
    source: str = ""  # a folder with train, validation and test, or one file; empty: fetches vblagoje/lfqa
    out: str = "out/eli5"  # folder for sft_*, ranked_* and prompts_* (.jsonl) and report.json
    least_words: Count = 20  # shorter answers go; 0: none
    simple: bool = True  # answers that are hard to read go (FRE under 60, or FKG 9 and more)
    keep_quotes: bool = False  # leave quoted text in the answers
    keep_urls: bool = False  # leave addresses and their placeholders in the answers
    least_score: Number = 4  # with fewer points an answer is not imitated, and only ever rejected
    most_toxicity: Share = 0.1  # the same for an answer with any of six toxicity scores above this; 1: for none
    toxicity: str = "auto"  # who judges that: detoxify, words or auto (Detoxify where it is installed)
    keep_edits: bool = False  # imitate answers that end in "Edit: typos" too
    cut: Amount = 0.6  # questions of two splits with this cosine similarity or more are a leak; above 1: none is
    leak_model: str = ""  # what compares them: tfidf, or a sentence-transformers model; empty: see leakage.py
    seed: Seed = 0  # of the split of a single file


# ---- posts -----------------------------------------------------------------------------------------------------------

@dataclass
class Post:
    id: str
    split: str
    question: str
    answers: list  # of (text, votes)


@dataclass
class Answer:
    text: str
    votes: float
    checks: dict  # step of the report -> passed

    @property
    def fit(self):
        """May it be imitated, and chosen over another answer?"""
        return all(self.checks.values())


def as_post(raw):
    """A row in ELI5's schema -> (id, title, body, [(text, votes), ...]). Raises BadRow."""
    shape, row = recognise(raw, "ranked")
    if shape.name != "ELI5":
        raise BadRow("not a post", f"it looks like {shape.name}")
    votes = [as_number(answer["scores"].get("score")) for answer in row["answers"]]
    if None in votes:
        raise BadRow("a score is not a number")
    answers = [(answer["text"], number) for answer, number in zip(row["answers"], votes)]
    title, body = as_text(raw["title"], "title"), as_text(raw.get("selftext") or "", "selftext")
    check_texts([title, body, *(text for text, _ in answers)])
    return str(raw.get("q_id", "")), title, body, answers


def sources(source):
    """-> [(file, the splits that are made of it), ...], the small splits first."""
    if not source:
        return [(download.hub_file(DATASET, f"{split}.json"), (split,)) for split in reversed(SPLITS)]
    path = Path(source).expanduser()
    if not path.is_dir():
        return [(path, SPLITS)]
    found = {split: sorted(path.glob(f"{split}.*")) for split in reversed(SPLITS)}
    for split, paths in found.items():
        if len(paths) != 1:
            raise UserError(f"{path} has {len(paths)} files named {split}.*: give one each for {', '.join(SPLITS)}.")
    return [(paths[0], (split,)) for split, paths in found.items()]


def split_of(question, splits, seed):
    """The file's own split, or one drawn from the question's words: whoever asks the same is in the same split."""
    if len(splits) == 1:
        return splits[0]
    number = random.Random(f"{seed} {question}").random()
    return "validation" if number < HELD_OUT else "test" if number < 2 * HELD_OUT else "train"


def read_posts(path, splits, config, report):
    """Posts that ask something, in a stream, their questions cleaned: title, blank line, body."""
    for number, row in files.stream(path, as_post, NEEDS):
        if isinstance(row, BadRow):
            report.section(splits[0])
            report.keep("unreadable", False, f"row {number:,}: {row.reason} {row.detail}")
            continue
        name, title, body, answers = row
        title, body = clean_question(title), clean_question(body)
        question = f"{title}\n\n{body}".strip()
        split = split_of(question, splits, config.seed)
        report.section(split)
        report.keep("unreadable", True)
        if report.keep("not a question", clean.is_question(title, body), question):
            yield Post(name, split, question, answers)


# ---- cleaning --------------------------------------------------------------------------------------------------------

def clean_question(text):
    """What a person quotes in a question belongs to it, so quotes stay."""
    return clean.strip_space(clean.strip_placeholders(clean.strip_markup(text)))


def clean_answer(text, config, report):
    """-> the answer without what only Reddit needs, or None where it is too short or too hard."""
    kept = {"quotes": config.keep_quotes, "URL placeholders": config.keep_urls}
    text = clean.changed(text, report, [step for step, keep in kept.items() if keep])
    kept = (report.keep(f"fewer than {config.least_words} words", clean.enough_words(text, config.least_words), text)
            and (not config.simple or report.keep("hard to read", is_simple(text), text)))
    return text if kept else None


def clean_posts(posts, leaked, toxicity, config, report):
    """Posts -> posts whose answers are clean and judged: list[Answer]. Questions in `leaked` are left out."""
    while batch := list(islice(posts, BATCH)):
        cleaned = []
        for post in batch:
            report.section(post.split)
            if report.keep("leaks", (post.split, post.question) not in leaked, post.question):
                texts = [(clean_answer(text, config, report), votes) for text, votes in post.answers]
                cleaned.append((post, [(text, votes) for text, votes in texts if text is not None]))
        scores = iter(toxicity([text for _, answers in cleaned for text, _ in answers]))
        for post, answers in cleaned:
            post.answers = [judged(text, votes, next(scores), config) for text, votes in answers]
            yield post


def judged(text, votes, scores, config):
    return Answer(text, votes, {
        f"SFT: score under {config.least_score:g}": votes >= config.least_score,
        "SFT: toxic": clean.is_clean(scores, config.most_toxicity),
        "SFT: ends in an edit": config.keep_edits or not clean.ends_in_edit(text)})


def find_leaks(jobs, config, report):
    """Questions that are too similar to one of another split -> {(split, question)}. Of train and another split that of
    train goes, of test and validation that of test. Reads all posts, but keeps only the questions."""
    asked = {split: {} for split in SPLITS}  # a dict keeps the order, and every question once
    for path, splits in jobs:
        for post in read_posts(path, splits, config, PipelineReport()):
            asked[post.split][post.question] = None
    found = leakage.remove_leaks(*map(list, asked.values()), config.cut, config.leak_model)
    report.note(str(found))
    leaked = {("train", question) for question, gone in zip(asked["train"], found.train) if gone}
    return leaked | {("test", question) for question, gone in zip(asked["test"], found.test) if gone}


# ---- dividing --------------------------------------------------------------------------------------------------------

def divide(answers):
    """One question's answers -> (ranked, moved): only different scores say which answer is better, so of equal ones the
    first stays in the ranking, and the others are moved to SFT."""
    ranked, moved = {}, []
    for answer in answers:
        if answer.votes in ranked:
            moved.append(answer)
        else:
            ranked[answer.votes] = answer
    return list(ranked.values()), moved


def ranked_row(question, answers, lowest):
    """A row for reward.py and dpo.py, best answer first. Answers that are not fit get the score `lowest` in place of
    their votes: below all others, and all the same, so that they are rejected and never chosen over each other."""
    rows = [{"text": answer.text, "score": answer.votes if answer.fit else lowest, "votes": answer.votes}
            for answer in answers]
    return {"prompt": question, "answers": sorted(rows, key=lambda row: -row["score"])}


def write_posts(posts, out, config, report):
    """Every post to the file where it belongs; the prompts when it is known that a question is in no other file."""
    used, rest = set(), {}
    for post in posts:
        report.section(post.split)
        key = post.split, post.question
        rest[key] = post.id
        ranked, moved = divide(post.answers)
        if moved:
            report.count("equal score, moved to SFT", len(moved), post.question)
        if len(ranked) == 1:  # nothing to compare it with
            ranked, moved = [], ranked + moved
        for answer in moved:
            if all(report.keep(step, ok, answer.text) for step, ok in answer.checks.items()):
                messages = [says("user", post.question), says("assistant", answer.text)]
                out[f"sft_{post.split}"].write({"q_id": post.id, "messages": messages})
                used.add(key)
        if ranked and report.keep("no answer fit to be chosen", any(answer.fit for answer in ranked), post.question):
            report.count("rejected only", sum(not answer.fit for answer in ranked))
            row = ranked_row(post.question, ranked, config.least_score - 1)
            out[f"ranked_{post.split}"].write({"q_id": post.id, **row})
            used.add(key)
    for (split, question), name in rest.items():
        if (split, question) not in used:
            out[f"prompts_{split}"].write({"q_id": name, "prompt": question})


def main(config):
    writable(config.out)
    report, jobs = PipelineReport(), sources(config.source)
    toxicity, judge = clean.load_toxicity(config.toxicity)
    report.note(f"toxicity is judged by {judge}")
    leaked = find_leaks(jobs, config, report) if config.cut <= 1 else set()
    for path, splits in jobs:  # each finished before the next one begins, so that a full disk costs one and not all
        with writing(config.out, [f"{form}_{split}" for split in splits for form in FORMS]) as out:
            posts = read_posts(path, splits, config, report)
            write_posts(clean_posts(posts, leaked, toxicity, config, report), out, config, report)
            for name, writer in out.items():
                report.section(name.partition("_")[2])
                report.count(name.partition("_")[0], writer.rows)
    report.save(Path(config.out) / "report.json")
    print(report)
    print(f"next: python sft.py --data {config.out}/sft_train.jsonl --out out/sft-eli5\n"
          f"      python reward.py --data {config.out}/ranked_train.jsonl --init out/sft-eli5\n"
          f"      python dpo.py --data {config.out}/ranked_train.jsonl --init out/sft-eli5\n"
          f"      python ppo.py --data {config.out}/prompts_train.jsonl --init out/sft-eli5")
    return report


if __name__ == "__main__":
    main(parse(Config))
