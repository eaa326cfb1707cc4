"""What a checkpoint was asked while it was trained: three questions to try, and how far a new question is from them.

    -log p(question) / tokens,   p(t | s) = 0.9 n(s t) / n(s) + 0.1 (n(t) + 1/2) / (N + V/2),   n: counts in the questions

The network itself cannot tell: fine-tuning never asks it to predict what a user says (the mask), so it finds the questions
that it was trained on as unlikely as any others. Their pairs of neighbouring tokens can. What is said of a new question is
where it stands among the questions that were held out: "far" is beyond 99 % of them.
"""
import json
import math
from collections import Counter
from pathlib import Path

from common.disk import write_json

FILE, MOST = "questions.json", 5000  # beside the weights; questions that are counted


def asked_in(rows):
    """Rows with messages or a prompt -> what the user says in them, each once."""
    return list(dict.fromkeys(message["content"] for row in rows for message in row.get("messages", row.get("prompt", ()))
                              if message["role"] == "user"))


class Questions:
    """Counts of neighbouring tokens, {(s, t): n}; try_: three questions; far: nats a token, beyond which one is far."""

    def __init__(self, pairs, size, about="", try_=(), far=math.inf):
        self.pairs, self.size, self.about, self.try_, self.far = Counter(pairs), size, about, list(try_), far
        self.before, self.tokens = Counter(), Counter()
        for (s, t), n in self.pairs.items():
            self.before[s] += n
            self.tokens[t] += n
        self.total = sum(self.tokens.values())

    @classmethod
    def of(cls, rows, held, tok, about):
        """From the rows that are trained on, and held-out ones."""
        pairs = Counter(pair for text in asked_in(rows)[:MOST] for pair in neighbours(tok, text))
        found, asked = cls(pairs, tok.vocab_size, about), asked_in(held)
        distances = sorted(found.distance(tok, text) for text in asked)
        found.far = distances[math.ceil(0.99 * len(distances)) - 1] if distances else math.inf
        near = [text for text in asked if len(text) <= 80] or asked
        found.try_ = near[::max(1, len(near) // 3)][:3]
        return found

    def distance(self, tok, text):
        """-log p of a question's tokens, in nats a token."""
        logps = []
        for s, t in neighbours(tok, text):
            follows = 0.9 * self.pairs[s, t] / self.before[s] if self.before[s] else 0.0
            logps.append(math.log(follows + 0.1 * (self.tokens[t] + 0.5) / (self.total + 0.5 * self.size)))
        return -sum(logps) / max(1, len(logps))

    def is_far(self, tok, text):
        return self.distance(tok, text) > self.far

    def save(self, folder):
        write_json(Path(folder) / FILE, {"about": self.about, "try": self.try_, "far": self.far, "size": self.size,
                                         "pairs": [[s, t, n] for (s, t), n in self.pairs.items()]})

    @classmethod
    def load(cls, folder):
        """Of a checkpoint's folder -> Questions, or None where nobody has counted any, or not in this form."""
        try:
            found = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
            pairs = {(int(s), int(t)): int(n) for s, t, n in found["pairs"]}
            return cls(pairs, int(found["size"]), str(found["about"]), list(map(str, found["try"])), float(found["far"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def neighbours(tok, text):
    """A question's pairs of neighbouring tokens, the first behind -1."""
    ids = [-1, *tok.encode(text)]
    return zip(ids, ids[1:])
