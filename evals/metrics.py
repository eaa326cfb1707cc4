"""Numbers for answers that nobody can mark right or wrong, and how far a mean of numbers can be trusted.

    rouge("the cat sat", "the cat ran")     which words, pairs of words and sequences two texts share, each as an F1
    embedding_f1(x, y)                      the same idea with vectors in place of words: what looks alike counts too
    interval(values)                        a mean with its 95 % interval
    sign_test(wins, losses)                 could a fair coin have won as often?

F1 = 2 P R / (P + R), where P is the share of the candidate that is found in the reference, and R the other way round.

evaluate.py and judge.py call all this. How hard a text is to read is measured in data/readability.py.
"""
import re
from collections import Counter

import numpy as np
import torch

import trainer
from common.errors import UserError

# ---- ROUGE: words in common ------------------------------------------------------------------------------------------

def words(text):
    """ROUGE's words: runs of a-z and 0-9 in lower case. All else separates, so "don't" is two words."""
    return re.findall(r"[a-z0-9]+", text.lower())


def harmonic(precision, recall):
    """F1: near the smaller of the two, so that neither a single right word nor a whole dictionary scores well."""
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def f1(hits, n_candidate, n_reference):
    return harmonic(hits / max(1, n_candidate), hits / max(1, n_reference))


def rouge_n(reference, candidate, n):
    """Two lists of words -> F1 of their n-grams. One said ten times is found as often as the reference has it."""
    r, c = (Counter(zip(*(text[i:] for i in range(n)))) for text in (reference, candidate))
    return f1((r & c).total(), c.total(), r.total())


def lcs_table(a, b):
    """Lists of n and m words -> (n+1, m+1): entry i, j is the length of the longest common subsequence (words in the
    same order, with any gaps) of a[:i] and b[:j].

        t[i, j] = max(t[i-1, j], t[i, j-1], t[i-1, j-1] + [a_i is b_j])

    Row by row with numpy, where the running maximum is the term t[i, j-1]: 6 ms for 500 and 500 words, 20 times as fast
    as two loops in Python.
    """
    table, b = np.zeros((len(a) + 1, len(b) + 1), dtype=int), np.array(b, dtype=str)
    for i, word in enumerate(a):
        table[i + 1, 1:] = np.maximum.accumulate(np.maximum(table[i, 1:], table[i, :-1] + (b == word)))
    return table


def rouge_l(reference, candidate):
    """Two lists of words -> F1 of their longest common subsequence: word order counts, gaps cost nothing."""
    return f1(int(lcs_table(reference, candidate)[-1, -1]), len(candidate), len(reference))


def lcs_positions(a, b):
    """Where in `a` one longest common subsequence stands -> set of positions. Of several, the one that the original
    program finds: from the end, and upwards where both ways are equally long."""
    table, found = lcs_table(a, b), set()
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif table[i, j - 1] > table[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return found


def rouge_lsum(reference, candidate):
    """Two texts -> F1 over sentences, one a line, in any order. What a sentence of the reference has in common with
    *any* sentence of the candidate is found; a word counts at most as often as it stands in each of the two texts."""
    reference, candidate = ([words(line) for line in text.split("\n")] for text in (reference, candidate))
    n_reference, n_candidate = sum(map(len, reference)), sum(map(len, candidate))
    left = Counter(w for s in reference for w in s) & Counter(w for s in candidate for w in s)
    hits = 0
    for sentence in reference:
        for i in set().union(*(lcs_positions(sentence, other) for other in candidate)):
            hits += left[sentence[i]] > 0
            left[sentence[i]] -= 1
    return f1(hits, n_candidate, n_reference)


def rouge(reference, candidate):
    """Two texts -> {"rouge1", "rouge2", "rougeL", "rougeLsum": F1, 0 to 1} (Lin 2004).

    Several references in a list: the best F1 of each kind. As rouge-score 0.1.2 without its stemmer, to the last digit.
    Score the generated answer alone: a question in both texts is a gift of common words.
    """
    if not isinstance(reference, str):
        each = [rouge(one, candidate) for one in reference]
        return {kind: max(scores[kind] for scores in each) for kind in each[0]}
    r, c = words(reference), words(candidate)
    return {"rouge1": rouge_n(r, c, 1), "rouge2": rouge_n(r, c, 2), "rougeL": rouge_l(r, c),
            "rougeLsum": rouge_lsum(reference, candidate)}


# ---- vectors in common -----------------------------------------------------------------------------------------------

@torch.inference_mode()
def token_vectors(model, tok, texts, run, micro_tokens=16384):
    """The model's hidden states over each text -> [(tokens, C), ...], float32, in the order of `texts`. What does
    not fit the model's context is left out."""
    # no text, no vector: a document would make a token of the template's leading space
    rows = [(tok.document(text) if text else [tok.end_of_text])[:model.config.block_size] for text in texts]
    vectors, was_training = [None] * len(rows), model.training
    model.eval()
    for part in trainer.split(range(len(rows)), lambda i: len(rows[i]), micro_tokens):
        ids, _ = trainer.pad([(rows[i], [1] * len(rows[i])) for i in part], run.device)
        with run.autocast():
            hidden = model.hidden(ids).float()  # (B, T, C)
        for i, states in zip(part, hidden):
            vectors[i] = states[1:len(rows[i])]  # (tokens, C): the first one is of the token that starts a document
    model.train(was_training)
    return vectors


def embedding_f1(reference, candidate):
    """Vectors of two texts' tokens, (n, C) and (m, C) -> P, R, F1; zeros where a text has no token.

    Each token is matched with the most similar one of the other text, by cosine: R is the mean over the reference, P
    over the candidate (Zhang et al. 2020, BERTScore, section 3, without idf weights and rescaling). That is BERTScore's
    arithmetic; it is BERTScore only with the vectors of its encoder. A causal model has read what stands before a token
    and not what follows, and it sees form before truth: beside "Mabel eats plum pie." the island's base model gives
    0.87 to corn soup, 0.78 to "Each day Mabel eats some plum pie." and 0.41 to a sentence about something else.
    """
    if not len(reference) or not len(candidate):
        return 0.0, 0.0, 0.0
    unit = torch.nn.functional.normalize
    similarity = unit(reference, dim=1) @ unit(candidate, dim=1).T  # (n, m)
    recall, precision = similarity.amax(1).mean().item(), similarity.amax(0).mean().item()
    return precision, recall, harmonic(precision, recall)


def bert_score(references, candidates):
    """BERTScore with roberta-large, by its authors' library where it is installed -> [P, ...], [R, ...], [F1, ...]."""
    try:
        from bert_score import score
    except ImportError:
        raise UserError("BERTScore needs bert-score: pip install bert-score, or take embedding F1, which needs nothing")
    try:
        return tuple(part.tolist() for part in score(list(candidates), list(references), lang="en"))
    except OSError as error:  # transformers without a network
        raise UserError(f"BERTScore could not fetch roberta-large ({str(error).splitlines()[0]}): check the network")
