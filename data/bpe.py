"""Byte-pair encoding: how the tokens of a language model are learned from text.

    python -m island.vocabulary     learns data/tiny.tiktoken, the 1,024 tokens of the island, again (2 seconds)

The algorithm (Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019, GPT-2):

    1. Cut the text into words, a leading space belonging to its word, and count them.
    2. Write every word as a row of single bytes. The 256 bytes are the first tokens, so no text is ever unknown.
    3. Find the pair of neighbours that occurs most often in all words and glue it into a new token, everywhere.
    4. Repeat 3 until there are as many tokens as you want.

A token's number is its rank, the moment of its birth. To encode a new text, glue the pair of lowest rank again and
again: that replays the training, and it is what tiktoken does with the ranks that we give it.
"""
import base64
from collections import Counter
from pathlib import Path

import regex  # the standard library's `re` has no \p{L}; tiktoken installs this one

from common.disk import replacing
from common.errors import UserError

# GPT-2's words: a contraction, or letters, or digits, or signs, each with its leading space; then the white space left
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def train_bpe(texts, n_ranks, pattern=PATTERN):
    """Learns `n_ranks` tokens from an iterable of strings -> {token (bytes): rank (int)}.

    The single bytes come first, in their order; fewer than n_ranks come back when every word has become one token.
    Of pairs that are equally frequent the one that sorts first is taken, so the same texts always give the same ranks.
    Raises ValueError for n_ranks < 256.
    """
    if n_ranks < 256:
        raise ValueError(f"n_ranks is {n_ranks}, but the 256 single bytes are always tokens")
    words = Counter(word for text in texts for word in regex.findall(pattern, text))
    rows = {word: [bytes([b]) for b in word.encode()] for word in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < n_ranks:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(rows[word], rows[word][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))  # "a"+"bc" may already be known as "ab"+"c"
        for word, row in rows.items():
            if len(row) > 1:
                rows[word] = merge(row, best)
    return ranks


def merge(row, pair):
    """Glues every occurrence of `pair` in a row of tokens, left to right: merge([a, b, a, b], (a, b)) = [ab, ab]."""
    merged, i = [], 0
    while i < len(row):
        if tuple(row[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(row[i])
            i += 1
    return merged


def save_ranks(ranks, path):
    """Writes tiktoken's file format: one token a line, in base64, a space, its rank."""
    tokens = sorted(ranks, key=ranks.get)
    lines = [f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in tokens]
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="ascii", newline="\n")


def load_ranks(path):
    """Reads tiktoken's file format -> {token (bytes): rank (int)}; UserError when the file is missing or not that."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no rank file {path}: give the path of a .tiktoken file")
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise UserError(f"{path}, line {number}: expected a token in base64, a space and its rank") from None
    if not ranks:
        raise UserError(f"{path} is empty: a rank file has one line for each token")
    return ranks
