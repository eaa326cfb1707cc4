"""Leaks: questions of a test set that are, in these or nearly the same words, in the training data too.

    python -m data.leakage train.jsonl validation.jsonl test.jsonl                  what leaks, and what nearly does
    python -m data.leakage train.jsonl validation.jsonl test.jsonl --out clean      the files without it
    python -m data.leakage train.jsonl test.jsonl --cut 0.7 --model ./my-mpnet      two files, another vector model

Every question becomes a vector v; two questions leak if their cosine v1.v2 / (|v1| |v2|) is --cut or more. The larger
set gives way: a question of train that is too close to one of validation or test is removed from train, one of test
that is too close to one of validation from test.

The vectors come from sentence-transformers (all-mpnet-base-v2) where it is installed, else they are TF-IDF: how often a
word occurs in a question, times the logarithm of how rare it is among all. TF-IDF sees the same words, not the same
meaning: look at the closest survivors, and set --cut by them.

100,000 questions against 5,000, of 25 words each, take 22 seconds and 0.7 GB on two CPU cores with TF-IDF.
"""
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, end_politely, visible

import numpy as np
import torch

from data.clean import rows_of
from data.files import read, stream
from data.report import shortened
from data.shapes import NEEDS, BadRow
from common.disk import writable, writing
from common.flags import Amount, Parser, bounded

MODEL = "all-mpnet-base-v2"  # 768 dimensions; what the cut of 0.6 was chosen for
BLOCK = 8192  # questions of the one set in a matrix product
CELLS = 2**24  # numbers in a dense block, 64 MB


# ---- vectors ---------------------------------------------------------------------------------------------------------

def vectors(texts, model=""):
    """-> (n, dim) float32 tensor whose rows have length 1 (0 for a text without words), and the name of who made it.

    model: "" (MODEL where it can be loaded, else TF-IDF), "tfidf", or what sentence-transformers is to load, a name or
    a folder. TF-IDF needs all texts that are to be compared in one call, and gives a sparse COO tensor. Raises
    UserError where a model is asked for by name and cannot be loaded.
    """
    if model == "tfidf":
        return tfidf(texts), "TF-IDF"
    try:
        from sentence_transformers import SentenceTransformer
        encoder = SentenceTransformer(model or MODEL)
    except ImportError:
        why, cure = "sentence-transformers is not installed", "pip install sentence-transformers"
    except Exception as error:  # it fetches the model from the network, which fails in many ways
        why, cure = f"{model or MODEL} could not be loaded ({type(error).__name__})", "check its name or the network"
    else:
        found = encoder.encode(texts, normalize_embeddings=True, convert_to_tensor=True,
                               show_progress_bar=len(texts) > 1000)
        return found.float().cpu(), f"sentence-transformers {model or MODEL}"
    if model:
        raise UserError(f"{why}: {cure}, or leave --model out")
    return tfidf(texts), f"TF-IDF ({why})"


def tfidf(texts):
    """-> (n, words) sparse COO tensor: count * (ln((1 + n) / (1 + df)) + 1), rows scaled to length 1, where df is the
    number of texts that hold the word (Salton and Buckley 1988; smoothed as in scikit-learn)."""
    vocabulary, found = {}, array("q")  # row, column, count, row, column, count, ...
    for i, text in enumerate(texts):
        words = Counter(re.findall(r"\w+", text.lower()))
        for column, count in sorted((vocabulary.setdefault(word, len(vocabulary)), n) for word, n in words.items()):
            found.extend((i, column, count))
    rows, columns, counts = torch.from_numpy(np.array(found)).view(-1, 3).T
    df = torch.bincount(columns, minlength=len(vocabulary))
    values = counts * (torch.log((1 + len(texts)) / (1 + df)) + 1)[columns]
    lengths = torch.zeros(len(texts)).index_add_(0, rows, values**2).sqrt()
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values / lengths[rows],
                                   (len(texts), len(vocabulary)), is_coalesced=True, check_invariants=True)


def take(matrix, index):
    """matrix[index] for a tensor of row numbers (k,), dense or sparse -> (k, dim)."""
    return matrix.index_select(0, index)


# ---- leaks -----------------------------------------------------------------------------------------------------------

def find_near(a, b, cut=0.6):
    """Which rows of a are too close to any row of b. a: (n, dim), b: (m, dim), as from `vectors`
    -> (n,) bool, (n,) float: the largest cosine, (n,) int: the row of b that it is with (0 where b is empty).

    In blocks of at most CELLS numbers, so the n x m cosines never exist at once.
    """
    if b.layout != torch.strided and len(b):  # words that b does not have add nothing to a cosine
        used = b.coalesce().indices()[1].unique()
        a, b = a.index_select(1, used), b.index_select(1, used)
    best, partner = torch.full((len(a),), -1.0), torch.zeros(len(a), dtype=torch.int64)
    width = max(1, CELLS // max(BLOCK, b.shape[1]))  # neither right nor the product below has more than CELLS numbers
    for j in range(0, len(b), width):
        right = take(b, torch.arange(j, min(j + width, len(b)))).to_dense().T.contiguous()  # (dim, width)
        for i in range(0, len(a), BLOCK):
            rows = torch.arange(i, min(i + BLOCK, len(a)))
            cosine, index = (take(a, rows) @ right).max(1)  # (BLOCK, width) -> (BLOCK,)
            better = cosine > best[rows]
            best[rows[better]], partner[rows[better]] = cosine[better], index[better] + j
    return best >= cut - 1e-6, best, partner  # in float32 a cosine of 0.6 may be 0.5999999


@dataclass
class Leaks:
    """What remove_leaks found."""

    train: list    # True for every question of train that has to go
    test: list     # the same for test
    closest: list  # (cosine, "train" or "test", its question, the other's), of those that stay, closest first
    name: str      # who made the vectors
    cut: float

    def __str__(self):
        lines = [f"vectors: {self.name}; a cosine of {self.cut:g} or more is a leak"]
        lines += [f"{split:5}  {sum(gone):,} of {len(gone):,} questions leak"
                  for split, gone in (("train", self.train), ("test", self.test)) if gone]
        lines += ["closest survivors:"] if self.closest else []
        lines += [f"{cosine:.3f}  {split:5}  {shortened(mine)}\n{'':14}{shortened(other)}"
                  for cosine, split, mine, other in self.closest]
        return "\n".join(lines)


def remove_leaks(train, validation, test, cut=0.6, model="", closest=10):
    """Three lists of questions -> Leaks. Validation loses none, test what leaks to validation, train what leaks to
    validation or to what is left of test."""
    texts = [*train, *validation, *test]
    found, name = vectors(texts, model)
    of_train, of_validation, of_test = torch.arange(len(texts)).split([len(train), len(validation), len(test)])
    test_gone, near_test = compare(found, of_test, of_validation, cut, closest)
    held = torch.cat([of_validation, of_test[~test_gone]])
    train_gone, near_train = compare(found, of_train, held, cut, closest)
    nearest = sorted(near_test + near_train, reverse=True)[:closest]
    pairs = [(cosine, "train" if i < len(train) else "test", texts[i], texts[j]) for cosine, i, j in nearest]
    return Leaks(train_gone.tolist(), test_gone.tolist(), pairs, name, cut)


def compare(found, mine, others, cut, closest):
    """mine, others: rows of found -> (mine,) bool: the leaks; the closest survivors [(cosine, mine, other), ...]."""
    gone, cosine, partner = find_near(take(found, mine), take(found, others), cut)
    top = cosine.masked_fill(gone, 0).topk(min(closest, len(mine)))
    return gone, [(near.item(), mine[i].item(), others[partner[i]].item()) for near, i in zip(*top) if near > 0]


def question_of(raw):
    """What the user says in a raw row, up to the answer; of a tree what its root says. Raises BadRow."""
    prompt = rows_of(raw, ("prompts",))[0]["prompt"]
    return "\n\n".join(message["content"] for message in prompt if message["role"] == "user")


def questions_of(path):
    """{row number: question} of a file; rows that cannot be used are left out."""
    rows = stream(path, question_of, NEEDS["prompts"])
    return {number: question for number, question in rows if not isinstance(question, BadRow)}


def main():
    parser = Parser(
        "python -m data.leakage", description="Finds questions that are in two splits, and removes them with --out.")
    parser.add_argument("train")
    parser.add_argument("held", nargs="+", metavar="held", help="validation and test, or test alone")
    parser.add_argument("--cut", type=bounded(Amount), default=0.6, help="from this cosine on two questions leak (default 0.6)")
    parser.add_argument("--model", default="", help="tfidf, or a sentence-transformers model, by name or folder")
    parser.add_argument("--out", help="folder for the files without leaks, named as they are here")
    args = parser.parse_args()
    paths = [Path(path).expanduser() for path in (args.train, *args.held)]
    if len(paths) > 3:
        raise UserError(f"{len(paths)} files: give train, validation and test, or train and test")
    if args.out:
        writable(args.out)
    questions = [questions_of(path) for path in paths]
    train, *validation, test = (list(found.values()) for found in questions)
    found = remove_leaks(train, validation[0] if validation else [], test, args.cut, args.model)
    print(visible(found))
    if args.out:
        gone = {paths[0]: found.train, paths[-1]: found.test}
        write_rest({path: {number for number, leak in zip(rows, gone.get(path, ())) if leak}
                    for path, rows in zip(paths, questions)}, Path(args.out))


def write_rest(leaking, out):
    """Copies files as .jsonl without the rows whose numbers leak. leaking: {path: row numbers}."""
    names = {path: path.name.split(".")[0] for path in leaking}
    if len(set(names.values())) < len(names) or any((out / f"{name}.jsonl").resolve() == path.resolve()
                                                    for path, name in names.items()):
        raise UserError(f"--out {out}: it needs files of different names, and another folder than theirs")
    with writing(out, names.values()) as files:
        for path, numbers in leaking.items():
            for number, raw in read(path):
                if number not in numbers and not isinstance(raw, BadRow):
                    files[names[path]].write(raw)
            files[names[path]].finish()
            print(f"{files[names[path]].rows:7,} rows  {files[names[path]].path}")


if __name__ == "__main__":
    end_politely()
    main()
