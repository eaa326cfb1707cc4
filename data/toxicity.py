"""How toxic a text is: a number that somebody else has to give, so it is said who gave it.

    scorer, name = load_toxicity()          Detoxify's "unbiased" model where it is installed, else a list of words
    scorer(["You are kind.", "Shut up!"])   [{"insult": 0.0, ...}, {"insult": 1.0, ...}]
    toxicity_of(row)                        the scores that a row brings along, as OpenAssistant's do

A text is clean if none of six scores is above 0.1. The word list is a stand-in: it finds some rude words, knows neither
spelling nor context, and scores 0 or 1. For the real thing: pip install detoxify, which fetches its model at first use.
"""
import contextlib
import json
import re

from data.shapes import as_number
from common.errors import UserError

SCORES = ("severe_toxicity", "obscene", "threat", "insult", "identity_attack", "sexual_explicit")
BATCH = 32  # texts in one forward pass of Detoxify

WORDS = {  # whole words and phrases
    "severe_toxicity": ("drop dead", "kill yourself", "hope you die"),
    "obscene": ("crap", "damn", "arse", "bastard", "bastards", "bloody hell", "bullshit", "piss off"),
    "threat": ("kill you", "hurt you", "hit you", "beat you up", "watch your back", "you will regret this"),
    "insult": ("idiot", "idiots", "moron", "morons", "imbecile", "imbeciles", "dimwit", "dimwits", "shut up",
               "you are stupid", "you're stupid", "you are dumb", "you're dumb"),
    "identity_attack": ("go back to your country", "your kind is", "your kind are"),
    "sexual_explicit": ("porn", "pornography", "nudes", "sexting"),
}


def is_clean(scores, most=0.1):
    """Is none of the six scores above `most`? A missing score counts as 0."""
    return all((scores.get(name) or 0) <= most for name in SCORES)


def toxicity_of(row):
    """The six scores in a row's `detoxify` (a dict, or a CSV cell that holds one as JSON); None where it has none."""
    scores = row.get("detoxify")
    if isinstance(scores, str):
        with contextlib.suppress(ValueError):
            scores = json.loads(scores)
    if not isinstance(scores, dict):
        return None
    numbers = {name: as_number(scores.get(name)) for name in SCORES}
    return {name: number for name, number in numbers.items() if number is not None} or None


def load_toxicity(kind="auto"):
    """-> (function: list of texts -> list of {score's name: 0 to 1}, the name of who scores).

    kind: "detoxify", "words", or "auto": Detoxify where it is installed and has its model, else the words. Raises
    UserError where Detoxify is asked for by name and cannot be used.
    """
    if kind not in ("auto", "detoxify", "words"):
        raise UserError(f"toxicity is {kind!r}: choose auto, detoxify or words")
    if kind == "words":
        return by_words, "a short list of rude words (a stand-in for Detoxify)"
    try:
        return by_detoxify(), 'Detoxify "unbiased"'
    except ImportError:
        why, cure = "Detoxify is not installed", "pip install detoxify"
    except Exception as error:  # it fetches its model from the network, which fails in many ways
        why, cure = f"Detoxify's model could not be loaded ({type(error).__name__})", "check the network"
    if kind == "detoxify":
        raise UserError(f"{why}: {cure}, or choose --toxicity words")
    return by_words, f"a short list of rude words ({why})"


def by_words(texts):
    """1.0 where a text holds a word or phrase of WORDS, in any case, else 0.0."""
    rows = []
    for text in texts:
        said = " ".join(["", *re.findall(r"[\w']+", text.lower().replace("\u2019", "'")), ""])
        rows.append({name: float(any(f" {phrase} " in said for phrase in phrases)) for name, phrases in WORDS.items()})
    return rows


def by_detoxify():
    """Detoxify (Hanu et al. 2020): RoBERTa-base trained on Jigsaw's "unintended bias" data; on a GPU where one is."""
    from detoxify import Detoxify  # first, so that where it is missing nobody waits for torch
    import torch
    model = Detoxify("unbiased", device="cuda" if torch.cuda.is_available() else "cpu")

    def score(texts):
        rows = []
        for start in range(0, len(texts), BATCH):
            found = model.predict(texts[start:start + BATCH])
            rows += [dict(zip(SCORES, values)) for values in zip(*(found[name] for name in SCORES))]
        return rows
    return score
