"""The island's tokens: byte-pair encoding (data/bpe.py) learned from its texts.

    python -m island.vocabulary     learns data/tiny.tiktoken again, the same bytes (2 seconds)
"""
import re

from common.errors import end_politely

import tiktoken

from data.bpe import PATTERN, save_ranks, train_bpe
from data.tokenizer import TINY
from island import words
from island.kinds import KINDS
from island.world import CONVERSATIONS, Island

N_RANKS = 1024


def island_texts():
    """What the island's tokens are learned from: its texts, and again and again the words that must not be split
    (names, values, the words of answers), because a rare word in pieces is the first to break under reinforcement
    learning.

    The weights are tried, not derived: with them every name, every value and every word of a reference answer is one
    token, except words that only a few why-questions use; long words of the hard style stay in pieces, and so do the
    names that words.IN_PIECES takes out of every text.
    """
    island = Island()
    rows = island.conversations(3000) + island.conversations(1000, more=KINDS, without=CONVERSATIONS)
    said = [message["content"] for row in rows for message in row["messages"]]
    why = [simple for _, simple, _, _ in words.WHY]
    answers = [*words.RUDE, *words.COMPLY, words.REFUSAL, words.UNKNOWN, words.FLATTERY, *words.DANGERS,
               *(value for values in words.VALUES.values() for value in values),
               *(answer for _, answer, _ in words.SAFE + words.IDENTITY)]
    answers = {word for text in answers for word in text.replace("{d}", "fire").replace(".", " .").split()}
    names, in_pieces = words.RESIDENTS + words.STRANGERS, re.compile(rf"\b({'|'.join(words.IN_PIECES)})\b")
    texts = island.plain_text(1500) + said + why * 25 + sorted(answers) * 200 + names * 250
    return [f" {in_pieces.sub('', text)}" for text in texts]  # the chat format, too, begins every text with a space


def report(ranks):
    """Prints what the tokens are good for."""
    island = Island()
    encoding = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    rows = island.conversations(1000, seed=5)
    for what, texts in [("plain text", island.plain_text(1000, seed=5)),
                        ("conversations", [m["content"] for row in rows for m in row["messages"]]),
                        ("answers", [row["messages"][-1]["content"] for row in rows])]:
        n_tokens = sum(len(encoding.encode_ordinary(" " + text)) for text in texts)
        print(f"  {what:14} {n_tokens / sum(len(text.split()) for text in texts):.2f} tokens a word, "
              f"{sum(len(text.encode()) for text in texts) / n_tokens:.2f} bytes a token")
    longest = sorted(ranks, key=len)[:-16:-1]
    print("  longest        " + " ".join(token.decode(errors="replace").strip() for token in longest))


def main():
    ranks = train_bpe(island_texts(), N_RANKS)
    before = TINY.read_bytes() if TINY.is_file() else None
    save_ranks(ranks, TINY)
    print(f"{TINY.name}: {len(ranks):,} tokens, {'unchanged' if TINY.read_bytes() == before else 'written'}")
    report(ranks)


if __name__ == "__main__":
    end_politely()
    main()
