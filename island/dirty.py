"""The island's dirty dump: dirt that is counted, so that every filter can be watched at work.

The public sets are large and nobody knows what is wrong with them. So the island has a dirty dump of its own: posts in
the schema of ELI5 (Fan et al. 2019) and articles in that of Wikipedia, with the mistakes of the real ones, each in a
known number, and each made so that one filter catches it and no other would. What the filters must find stands in
victims.json.

    python -m island --dump dump                                   train, validation, test and articles, as .jsonl
    python -m data.eli5 --source dump --out out/eli5                    posts -> SFT, ranked answers, prompts
    python -m data.simple_wikipedia --source dump/articles.jsonl        articles -> questions and answers

The answers are the island's facts, told in five or six sentences. Train asks about other residents than validation and
test, as everywhere on the island, so what a model learns from the dump can be measured on residents it was never told
of: of a dump of 8,000 posts, with the island's plain text as --mix-data, sft.py learned in 500 steps to answer 117 of
120 questions of test.jsonl right in its first sentence. (Of 4,000 posts, in 250 steps, 18.)
"""
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from island import words
from common.disk import replacing, write_json
from common.errors import UserError

SPLITS = {"train": 0.8, "test": 0.1, "validation": 0.1}  # share of the posts; a leak copies from one further right
TORN = 5  # after so many lines of a file comes one that is cut short
LARGEST = 500_000  # posts: for more there are not enough different questions
BODIES = [  # names twice, so that questions of two splits, which know other people, are never similar by chance
    "I asked {a} and {b}. Now {a} and {b} want to know too.",
    "My bet with {a} depends on it. If {a} is right, {b} pays, and {b} is poor.",
    "Somebody told {a}, and {a} told {b}, but {b} will not tell me.",
]
STATEMENTS = ["A short story about {n}", "{n} got one more hat today", "Thanks to {n} for the soup"]
MEETINGS = ["Ask Anything Wednesday: what would you like to know about {n}?", "Megathread: what is new with {n}?"]
EDITS = ["Edit: typos", "EDIT: thanks for all the votes", "Edit 2: more typos", "Edit - the baker told me so"]
INSULT = "Ask no more, you idiot."
QUOTES = ["> I would like to know it.\n", "&gt; Please tell me.\n"]


def plain(dump, *about):
    """An answer to a question about a resident's attribute (`about` is both) without any dirt."""
    return " ".join(dump.told(*about))


def marked_up(dump, *about):
    first, rest = plain(dump, *about).split(" ", 1)
    marks = dump.rng.choice(["**{}**", "*{}*", "[{}](https://example.org/island)", "~~{}~~", "`{}`"])
    return f"{marks.format(first)} {rest}"


DIRT = {  # the same with one thing wrong: (dump, resident, attribute) -> text
    "plain": plain,
    "wrong": lambda dump, *about: " ".join(dump.told(*about, wrong=True)),
    "hard": lambda dump, *about: " ".join(dump.told(*about, words.HARD)),
    "short": lambda dump, *about: " ".join(dump.told(*about)[:2]),
    "toxic": lambda dump, *about: f"{plain(dump, *about)} {INSULT}",
    "edited": lambda dump, *about: plain(dump, *about) + "\n\n" + dump.rng.choice(EDITS),
    "marked up": marked_up,
    "quoting": lambda dump, *about: dump.rng.choice(QUOTES) + plain(dump, *about),
    "with url": lambda dump, *about: plain(dump, *about) + dump.rng.choice(["_url_0_", "_URL_1_", "_url_12_"]),
    "spaced": lambda dump, *about: dump.rng.choice(["  ", " \t "]).join(dump.told(*about)),
}


@dataclass(frozen=True)
class Kind:
    """A kind of post: how many of them, the dirt and the votes of its answers, and what eli5.py has to count for it."""

    share: int      # of every 100 posts
    answers: tuple  # (dirt, lowest and highest vote)
    counts: dict    # step of the report, or file -> how many
    title: tuple = ()  # in place of a question


GOOD_VOTES = (5, 90)
KINDS = {
    "one answer": Kind(20, (("plain", GOOD_VOTES),), {"sft": 1}),
    "ranked": Kind(20, (("plain", (40, 90)), ("plain", (20, 39)), ("wrong", (4, 19))), {"ranked": 1}),
    "rejected only": Kind(7, (("toxic", (50, 90)), ("plain", (30, 49)), ("edited", (20, 29)), ("plain", (4, 19)),
                              ("wrong", (1, 3))), {"ranked": 1, "rejected only": 3}),
    "equal scores": Kind(5, (("plain", (30, 30)), ("plain", (30, 30)), ("wrong", (4, 29))),
                         {"ranked": 1, "sft": 1, "equal score, moved to SFT": 1}),
    "two equal scores": Kind(2, (("plain", (9, 9)), ("plain", (9, 9))), {"sft": 2, "equal score, moved to SFT": 1}),
    "none to choose": Kind(2, (("plain", (3, 3)), ("wrong", (1, 2))), {"prompts": 1, "no answer fit to be chosen": 1}),
    "mark-up": Kind(5, (("marked up", GOOD_VOTES),), {"sft": 1, "Reddit mark-up": 1}),
    "quote": Kind(4, (("quoting", GOOD_VOTES),), {"sft": 1, "quotes": 1}),
    "url": Kind(4, (("with url", GOOD_VOTES),), {"sft": 1, "URL placeholders": 1}),
    "white space": Kind(4, (("spaced", GOOD_VOTES),), {"sft": 1, "white space": 1}),
    "short": Kind(5, (("short", GOOD_VOTES),), {"prompts": 1, "fewer than 20 words": 1}),
    "hard": Kind(5, (("hard", GOOD_VOTES),), {"prompts": 1, "hard to read": 1}),
    "low score": Kind(4, (("plain", (1, 3)),), {"prompts": 1, "SFT: score under 4": 1}),
    "toxic": Kind(3, (("toxic", GOOD_VOTES),), {"prompts": 1, "SFT: toxic": 1}),
    "edited": Kind(3, (("edited", GOOD_VOTES),), {"prompts": 1, "SFT: ends in an edit": 1}),
    "unanswered": Kind(1, (), {"prompts": 1}),
    "no question": Kind(2, (("plain", GOOD_VOTES),), {"not a question": 1}, title=STATEMENTS),
    "meeting": Kind(1, (("plain", GOOD_VOTES),), {"not a question": 1}, title=MEETINGS),
    "leak": Kind(3, (("plain", GOOD_VOTES),), {"leaks": 1}),
}


@dataclass(frozen=True)
class Article:
    """A kind of article: how many, of how many residents it tells, and what simple_wikipedia.py has to count."""

    share: int
    residents: int
    counts: dict
    mark: str = ""  # wiki mark-up in front of the first paragraph


ARTICLES = {
    "good": Article(50, 2, {"sft": 1}),
    "cut": Article(10, 16, {"sft": 1, "cut after 300 words": 1}),
    "short": Article(10, 1, {"fewer than 50 words": 1}),
    "long": Article(10, 20, {"more than 500 words": 1}),
    "hard": Article(10, 2, {"hard to read": 1}),
    "image": Article(5, 2, {"wiki mark-up": 1}, "[[File:{n}.jpg|thumb|{n} at home]]\n"),
    "table": Article(5, 2, {"wiki mark-up": 1}, '{{| class="wikitable"\n|-\n| {n} || at home\n|}}\n'),
}


class Dump:
    """Posts and articles about the residents of an island; `counts` is what the filters must find in the last ones."""

    def __init__(self, island, seed=0):
        self.island, self.rng, self.counts, self.questions = island, random.Random(seed), Counter(), set()
        train, held = island.parts["train"], island.parts["test"]
        self.people = {split: {who: part[who][which] for who in ("residents", "strangers")} for split, part, which in (
            ("train", train, slice(None)), ("validation", held, slice(0, None, 2)), ("test", held, slice(1, None, 2)))}

    def told(self, name, first, templates=words.SIMPLE, wrong=False, more=(4, 5)):
        """A sentence about a resident's attribute `first` (wrong: a false one), and 4 or 5 about other attributes."""
        facts = self.island.residents[name]
        value = self.rng.choice([v for v in words.VALUES[first] if v != facts[first]]) if wrong else facts[first]
        others = self.rng.sample([a for a in words.VALUES if a != first], self.rng.randint(*more))
        return [self.island.tell(name, a, value if a == first else facts[a], self.rng.choice(templates[a]))
                for a in [first, *others]]

    def question(self, split, kind):
        """-> (resident, attribute, title, body). No two questions are the same: one would be no prompt where the other
        has an answer to learn from."""
        while True:
            name, attribute = self.rng.choice(self.people[split]["residents"]), self.rng.choice(list(words.ASK))
            a, b = self.rng.sample(self.people[split]["strangers"], 2)
            title = self.rng.choice(kind.title or words.ASK[attribute]).format(n=name)
            body = "" if kind.title else self.rng.choice(BODIES).format(a=a, b=b)
            if kind.title or (title, body) not in self.questions:
                self.questions.add((title, body))
                return name, attribute, title, body

    def post(self, q_id, kind, question):
        """One row of the public set's schema."""
        name, attribute, title, body = question
        texts = [DIRT[dirt](self, name, attribute) for dirt, _ in kind.answers]
        votes = [self.rng.randint(*between) for _, between in kind.answers]
        return {"q_id": q_id, "title": title, "selftext": body, "document": "", "subreddit": "explainlikeimfive",
                "answers": {"a_id": [f"{q_id}a{i}" for i in range(len(texts))], "text": texts, "score": votes},
                "title_urls": {"url": []}, "selftext_urls": {"url": []}, "answers_urls": {"url": []}}

    def posts(self, split, n, others=()):
        """About n posts, at least one of each kind, one after the other.

        others: questions of other splits; the leaks ask them again with a word more. Without them there are no leaks.
        When all have been taken, `counts` holds what the filters must find, and `asked` the questions to copy.
        """
        kinds = drawn({name: kind.share for name, kind in KINDS.items() if name != "leak" or others}, n, self.rng)
        self.counts, self.asked = Counter(), []
        for number, name in enumerate(kinds):
            question = self.question(split, KINDS[name])
            if name == "leak":
                who, attribute, title, body = self.rng.choice(others)
                question = who, attribute, "Please, " + title, body
            elif name == "one answer":
                self.asked.append(question)
            self.counts.update(KINDS[name].counts)
            yield self.post(f"{split}{number}", KINDS[name], question)

    def article(self, number, name):
        """One row of the public set's schema: the stories of residents, a paragraph of six facts each (28 to 48 simple
        words). Paragraphs are separated by a blank line."""
        kind, facts = ARTICLES[name], list(words.VALUES)
        names = self.rng.sample(self.people["train"]["residents"], kind.residents)
        templates = words.HARD if name == "hard" else words.SIMPLE
        paragraphs = [" ".join(self.told(who, self.rng.choice(facts), templates, more=(5, 5))) for who in names]
        if kind.mark:
            paragraphs[0] = kind.mark.format(n=names[0]) + paragraphs[0]
        return {"id": str(number), "url": f"https://example.org/island/{names[0]}", "title": names[0],
                "text": (" " if name == "long" else "\n\n").join(paragraphs)}

    def articles(self, n):
        """About n articles, at least one of each kind, one after the other; see `posts`."""
        kinds = drawn({name: kind.share for name, kind in ARTICLES.items()}, n, self.rng)
        self.counts = Counter()
        for number, name in enumerate(kinds):
            self.counts.update(ARTICLES[name].counts)
            yield self.article(number, name)


def drawn(shares, n, rng):
    """{name: share of 100} -> about n names in random order, each at least once."""
    names = [name for name, share in shares.items() for _ in range(max(1, round(n * share / 100)))]
    rng.shuffle(names)
    return names


def write(folder, island, n=600, seed=0):
    """Writes train, validation, test and articles (.jsonl) and victims.json: {file: {step, or file made of it: count}}.

    Raises UserError where the folder is a file, n is too large or the disk is full."""
    folder = Path(folder).expanduser()
    if n > LARGEST:
        raise UserError(f"{n:,} posts are too many: the island has questions for {LARGEST:,}.")
    if folder.is_file():
        raise UserError(f"{folder} is a file: give --dump the name of a folder.")
    dump, others, victims = Dump(island, seed), [], {}

    def save(name, rows):
        with replacing(folder / name) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for number, row in enumerate(rows, 1):
                line = json.dumps(row)
                file.write(line + "\n")
                if number == TORN:
                    file.write(line[:len(line) // 2] + "\n")
        victims[name] = {"unreadable": 1, **dump.counts}
        print(f"{folder / name}: " + ", ".join(f"{count:,} {step}" for step, count in victims[name].items()))

    for split, share in reversed(SPLITS.items()):  # the larger split comes later: it copies from the smaller ones
        save(f"{split}.jsonl", dump.posts(split, n * share, others))
        others = others + dump.asked
    save("articles.jsonl", dump.articles(n / 5))
    write_json(folder / "victims.json", victims, indent=1)
    print(f"next: python -m data.eli5 --source {folder}\n"
          f"      python -m data.simple_wikipedia --source {folder / 'articles.jsonl'}")
