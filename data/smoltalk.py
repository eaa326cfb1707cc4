"""SmolTalk: subsets of conversations become one mixture, every row of which passed the same few filters.

    python -m data.smoltalk                              fetches the subsets (parquet; 1.4 GB are Magpie Ultra's)
    python -m data.smoltalk --source folder              files that you have, named as the subsets (smol-rewrite.jsonl)
    python sft.py --data out/smoltalk/mixture.jsonl --init gpt2

    everyday-conversations          whole
    smol-magpie-ultra               without math and coding
    smol-rewrite, smol-constraints, smol-summarize       5,000 rows of each, drawn at random

All but the first keep conversations of at most two turns (a question and its answer are one) and 512 tokens; exactly
512 still fits. A system prompt is folded into the first question, for models that know no system role. The subsets
(Allal et al. 2025, SmolLM2) are written one after the other, then shuffled into mixture.jsonl, where "source" says
which one a row is from. A row is in memory only while it is judged or in a sample: 100,000 rows (165 MB) take 21
seconds of one CPU core and 61 MB of memory.
"""
import contextlib
import importlib.util
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from tqdm import tqdm

from data.clean import at_most_turns, fits, in_category
from common.download import hub_files
from data.files import read
from data.report import PipelineReport
from data.shapes import BadRow, finished, recognise
from data.tokenizer import get_tokenizer
from common.disk import writable, writing
from common.flags import Positive, Seed, parse

LEFT_OUT = ("math", "coding", "coding & debugging")  # SmolTalk's names and those of the original Magpie Ultra


@dataclass(frozen=True)
class Subset:
    dataset: str  # where it lives on the Hugging Face hub
    files: str
    filtered: bool = True  # by turns and tokens
    categories: bool = False  # has them, so math and coding can be told apart
    sampled: bool = True  # --sample rows of it, or all


SUBSETS = {
    "everyday-conversations": Subset("HuggingFaceTB/everyday-conversations-llama3.1-2k", "data/train*", filtered=False,
                                     sampled=False),
    "smol-magpie-ultra": Subset("HuggingFaceTB/smoltalk", "data/smol-magpie-ultra/train-*", categories=True,
                                sampled=False),
    "smol-rewrite": Subset("HuggingFaceTB/smoltalk", "data/smol-rewrite/train-*"),
    "smol-constraints": Subset("HuggingFaceTB/smoltalk", "data/smol-constraints/train-*"),
    "smol-summarize": Subset("HuggingFaceTB/smoltalk", "data/smol-summarize/train-*"),
}


@dataclass
class Config:
    source: str = ""  # a folder with files or folders named as the subsets; empty: they are fetched
    out: str = "out/smoltalk"  # folder for the subsets, mixture.jsonl and report.json
    tokenizer: str = ""  # counts tokens: gpt2, tiny, a rank file or a checkpoint; empty: gpt2, tiny without a network
    most_tokens: Positive = 512  # longer conversations go
    most_turns: Positive = 2  # conversations in which the user speaks more often go
    sample: Positive = 5000  # rows of each sampled subset
    seed: Seed = 0  # of the samples and of the order


def find_files(name, source):
    """The training files of a subset: fetched, or those in the folder `source` whose name or folder is the subset's."""
    if not source:
        if importlib.util.find_spec("pyarrow") is None:  # better now than after the download
            raise UserError("SmolTalk is made of parquet files: pip install pyarrow, or name a folder of .jsonl files "
                            "with --source.")
        return hub_files(SUBSETS[name].dataset, SUBSETS[name].files)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"--source {source} is no folder: it has to hold files named as the subsets: {name}.jsonl.")
    found = [*folder.glob(f"{name}*.*"), *folder.glob(f"{name}/train*")]
    return sorted(path for path in found if "test" not in path.name)


def counting_tokenizer(name, say):
    """The tokenizer that --tokenizer names -> (Tokenizer, its name)."""
    try:
        return get_tokenizer(name or "gpt2"), name or "gpt2"
    except UserError as error:
        if name:
            raise
        say(f"{error}\nTokens are counted with this project's tiny tokenizer, which makes about twice as many of them.")
        return get_tokenizer("tiny"), "tiny"


def filtered_rows(paths, name, tok, config, report):
    """The rows of a subset that pass its filters: {"messages", "source"}, one by one, every decision counted."""
    for path in paths:
        rows = usable = 0
        for rows, (_, raw) in enumerate(tqdm(read(path), desc=path.name, unit=" rows", disable=None), 1):
            messages, reason = conversation(raw, report)
            if not report.keep("not a conversation", messages is not None, reason):
                continue
            usable += 1
            if passes(raw, messages, SUBSETS[name], tok, config, report):
                report.count("passed")
                yield {"messages": messages, "source": name}
        if not usable:
            raise UserError(f"{path} is empty: download it again." if not rows else
                            f"{path} holds no conversation in its {rows:,} rows (the last: {reason}): {name} needs "
                            "messages, a list of role and content.")


def passes(raw, messages, subset, tok, config, report):
    """Do the subset's filters let the conversation in? The quick ones are asked first."""
    if subset.categories:  # a file without the column would let all the math in
        category = raw.get("category") or raw.get("primary_tag")
        if not (report.keep("without a category", category, messages)
                and report.keep("math and coding", not in_category(raw, LEFT_OUT), messages[0]["content"])):
            return False
    return not subset.filtered or (
        report.keep(f"more than {config.most_turns} turns", at_most_turns(messages, config.most_turns), messages)
        and report.keep(f"more than {config.most_tokens} tokens", fits(messages, tok, config.most_tokens), messages))


def conversation(raw, report):
    """A raw row -> (its messages without a system prompt, ""), or (None, why not)."""
    try:
        shape, internal = recognise(raw, "sft")
        if "messages" not in internal:
            raise BadRow(f"no conversation: {shape.name}")
        messages = finished(internal, {}, "sft", True, "score")["messages"]
    except BadRow as bad:
        return None, f"{bad.reason} {bad.detail}".strip()
    if internal["messages"][0]["role"] == "system":
        report.count("system prompt folded into the question", example=messages[0]["content"])
    return messages, ""


def reservoir(rows, n, seed):
    """n of the rows, each equally likely, in one pass and in the memory of n (Vitter 1985, algorithm R)."""
    rng, rows = random.Random(seed), iter(rows)
    kept = list(itertools.islice(rows, n))
    for i, row in enumerate(rows, n + 1):
        if (j := rng.randrange(i)) < n:
            kept[j] = row
    return kept


def shuffled(paths, seed):
    """The rows of several JSONL files in random order. In memory are only the places where their lines begin."""
    with contextlib.ExitStack() as stack:
        places = []
        for file in [stack.enter_context(open(path, "rb")) for path in paths]:
            begins = 0
            for line in file:
                places.append((file, begins))
                begins += len(line)
        random.Random(seed).shuffle(places)
        for file, begins in places:
            file.seek(begins)
            yield json.loads(file.readline())


def mix(config, say=print):
    """Writes the subsets, the mixture and the report -> PipelineReport."""
    if config.source and Path(config.source).resolve() == Path(config.out).resolve():
        raise UserError("--source and --out are the same folder, so the subsets would be overwritten: change --out.")
    writable(config.out)
    report, found = PipelineReport(), {name: paths for name in SUBSETS if (paths := find_files(name, config.source))}
    if not found:
        raise UserError(f"{config.source} has no file named as a subset: {', '.join(SUBSETS)}.")
    tok, tok_name = counting_tokenizer(config.tokenizer, say)
    report.note(f"tokens of conversations as the chat renders them, by the tokenizer {tok_name}")
    if len(found) < len(SUBSETS):
        report.note(f"not in --source: {', '.join(name for name in SUBSETS if name not in found)}")
    with writing(config.out, [*found, "mixture"]) as out:
        for name, paths in found.items():
            report.section(name)
            rows = filtered_rows(paths, name, tok, config, report)
            if SUBSETS[name].sampled:
                rows = reservoir(rows, config.sample, f"{config.seed} {name}")
            report.write(rows, out[name], "its files, --most-tokens and --most-turns")
        report.section("mixture")
        report.write(shuffled([out[name].path for name in found], config.seed), out["mixture"], "the subsets")
    report.save(Path(config.out) / "report.json")
    return report


def main(config):
    print(mix(config))
    print(f"next: python sft.py --data {Path(config.out) / 'mixture.jsonl'} --init gpt2")


if __name__ == "__main__":
    main(parse(Config))
