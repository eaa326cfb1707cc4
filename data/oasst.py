"""OpenAssistant: trees of messages, written and ranked by volunteers, become data for all three stages of RLHF.

    python -m data.oasst                              fetches OpenAssistant/oasst1 (42 MB of parquet, for pyarrow)
    python -m data.oasst --source trees.jsonl.gz      a file of trees, or of one message a row (.jsonl, .parquet, ...)
    python -m data.oasst --dataset OpenAssistant/oasst2 --lang de

    sft        a conversation per tree: the best-ranked reply to everything
    ranked     a row per question with two or more ranked replies: for reward.py and dpo.py
    prompts    every conversation up to a question: for ppo.py

(Köpf et al. 2023.) Messages in other languages, deleted, synthetic or toxic ones (one of the six scores that they carry
above 0.1) go, and with a message goes everything below it, which answers it. Trees that were not finished go. The
splits stay as they are: train and validation. 85,000 messages, as many as OASST1 has, take 6 seconds of one CPU core
and 160 MB of memory.
"""
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from tqdm import tqdm

from common.download import hub_files
from data.files import read
from data.report import PipelineReport
from data.shapes import BadRow, finished, is_flat, plant, tree_rows
from data.toxicity import is_clean, toxicity_of
from common.disk import writable, writing
from common.flags import Share, parse

SPLITS = ("train", "validation")
FORMS = ("sft", "ranked", "prompts")
READY = "ready_for_export"  # the state of a tree that volunteers have finished


@dataclass
class Config:
    source: str = ""  # a file of trees or messages, or a folder with train and validation; empty: fetched
    dataset: str = "OpenAssistant/oasst1"  # what is fetched; OpenAssistant/oasst2 has the same columns
    out: str = "out/oasst"  # folder for sft_train.jsonl, ranked_train.jsonl, ... and report.json
    lang: str = "en"  # the only language that stays; empty: all
    most_toxicity: Share = 0.1  # messages with any of six toxicity scores above this go; 1: none
    synthetic: bool = False  # keep what models wrote


# ---- from a file to messages -----------------------------------------------------------------------------------------

def find_files(config):
    """-> {split: [files]}. One file alone is train."""
    if not config.source:
        return {split: hub_files(config.dataset, f"data/{split}-*") for split in SPLITS}
    path = Path(config.source).expanduser()
    if not path.is_dir():
        return {"train": [path]}
    found = {split: files for split in SPLITS if (files := sorted(path.glob(f"{split}*.*")))}
    if "train" not in found:
        raise UserError(f"{path} has no file train.*: name its files train and validation, or give --source one file.")
    return found


def is_message(row):
    """Has the row a message's keys, and text where text belongs?"""
    return is_flat(row) and isinstance(row["text"], str) and isinstance(row.get("parent_id") or "", str)


def messages_of(raw):
    """A raw row -> the flat messages in it: itself, or those of the whole tree. Raises BadRow."""
    if isinstance(raw, BadRow):
        raise raw
    if isinstance(raw, dict) and is_message(raw):
        return [raw]
    if not isinstance(raw, dict) or not isinstance(raw.get("prompt"), dict):
        raise BadRow("neither a message nor a tree")
    flat, todo = [], [raw["prompt"] | {"parent_id": None}]
    for message in todo:  # grows while it is read: breadth first
        flat.append({**message, "tree_state": raw.get("tree_state")})
        replies = message.get("replies") or []
        if not is_message(message) or not isinstance(replies, list) or not all(isinstance(r, dict) for r in replies):
            raise BadRow("a message of the tree lacks message_id, role or text")
        todo += [{**reply, "parent_id": message["message_id"]} for reply in replies]
    return flat


def stays(message, config, report):
    """Does a message pass the filters by itself?"""
    scores, text, lang = toxicity_of(message), message["text"], config.lang
    if scores is None:
        report.count("no toxicity scores, taken as clean", example=text)
    return (report.keep("empty", text.strip(), message["message_id"])
            and report.keep("of an unfinished tree", (message.get("tree_state") or READY) == READY, text)
            and report.keep("deleted", not message.get("deleted"), text)
            and report.keep("synthetic", config.synthetic or not message.get("synthetic"), text)
            and (not lang or report.keep(f"not in {lang}", message.get("lang") == lang, text))
            and report.keep("toxic", is_clean(scores or {}, config.most_toxicity), text))


def read_trees(paths, config, report):
    """-> [root message with its replies, ...]. Rows stand in any order, so all messages that stay are in memory."""
    needed, kept = ("message_id", "parent_id", "role", "text", "rank"), {}
    for path in paths:
        good, reason = 0, "it is empty"
        for _, raw in tqdm(read(path), desc=path.name, unit=" rows", disable=None):
            try:
                messages = messages_of(raw)
            except BadRow as bad:
                messages, reason = [], f"{bad.reason} {bad.detail}".strip()
            good += report.keep("not OpenAssistant's", messages, reason)
            for message in messages:
                if (report.keep("message_id seen before", message["message_id"] not in kept, message["text"])
                        and stays(message, config, report)):
                    kept[message["message_id"]] = {key: message.get(key) for key in needed}
        if not good:
            raise UserError(f"{path} holds no row of OpenAssistant's ({reason}): it needs trees (prompt with replies) "
                            "or messages (message_id, parent_id, role, text).")
    trees, loose = plant(list(enumerate(kept.values())))
    for number, message in enumerate(kept.values()):
        report.keep("below a message that went", number not in loose, message["text"])
    return [root for root, _ in trees]


# ---- from trees to three files ---------------------------------------------------------------------------------------

def rows_of(trees, form, report):
    """The trees' rows in one form, as data.files reads them from the raw data set."""
    for root in trees:
        for internal in tree_rows(root, form):
            try:
                yield finished(internal, {}, form, False, "score")
            except BadRow as bad:
                report.count(f"{form}: {bad.reason}", example=root["text"])


def prepare(config):
    """Writes the files and the report -> PipelineReport."""
    writable(config.out)
    report, found = PipelineReport(), find_files(config)
    with writing(config.out, [f"{form}_{split}" for split in found for form in FORMS]) as out:
        for split, paths in found.items():
            report.section(split)
            trees = read_trees(paths, config, report)
            for form in FORMS:
                report.write(rows_of(trees, form, report), out[f"{form}_{split}"],
                             "--lang, --most-toxicity and --synthetic", f"{form}: written")
    report.save(Path(config.out) / "report.json")
    return report


def main(config):
    print(prepare(config))
    print(f"next: python sft.py --data {Path(config.out) / 'sft_train.jsonl'} --init gpt2 --out out/sft-oasst\n"
          f"      python reward.py --data {Path(config.out) / 'ranked_train.jsonl'} --init out/sft-oasst")


if __name__ == "__main__":
    main(parse(Config))
