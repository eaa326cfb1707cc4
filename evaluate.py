"""Measuring checkpoints: what each stage changed, in one table with checkpoints as rows.

    python evaluate.py out/base out/sft out/dpo out/ppo      the island: helpful? honest? harmless? and what did it cost?
    python evaluate.py out/sft out/dpo --data my.jsonl       your data: loss, ROUGE against your answers, readability
    python evaluate.py gpt2 out/sft --data a.jsonl,b.jsonl --sample 100      each model on each file and on both together
    python evaluate.py out/base out/sft --choices quiz       multiple choice: the island's quiz, or ARC, HellaSwag, MMLU, ...
    python evaluate.py out/sft out/dpo --judge gold          a judge rates the answers and compares each model with the first
    python evaluate.py --story                               runs whatever stage is missing and writes out/story/README.md

Every mean comes with its 95 % interval (bootstrap over the questions): two checkpoints whose intervals overlap may be equal.
What is asked about the island stands in exam.py, ROUGE and the intervals in metrics.py, multiple choice in choice.py, judges
in judge.py.
"""
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

import choice
import exam
import judge
import metrics
import sft
import trainer
from data import files
from data.island import Island, plain_words
from data.readability import readability
from data.tokenizer import get_tokenizer
from errors import UserError
from exam import cell, load, save
from flags import parse
from model import GPT, token_logps
from tables import table

# ---- your data -------------------------------------------------------------------------------------------------------

def answers_of(model, tok, conversations, run, config):
    """-> (prompt ids, answer ids) for every conversation, in their order, in batches of similar lengths."""
    room = min(config.max_new_tokens, model.config.block_size // 2)
    order = sorted(range(len(conversations)), key=lambda i: sum(len(m["content"]) for m in conversations[i]))
    found = [None] * len(conversations)
    for i in range(0, len(order), config.batch_size):
        part = order[i:i + config.batch_size]
        prompts, responses = sft.respond(model, tok, [conversations[k] for k in part], run, room, temperature=config.temperature,
                                         top_p=config.top_p, seed=config.seed + i)  # a batch has random numbers of its own
        for k, *both in zip(part, prompts, responses):
            found[k] = both
    return found


@torch.inference_mode()
def row_losses(model, tok, rows, run, micro_tokens):
    """-> [(-log p of the answers in a conversation, how many tokens they have), ...], of the rows that fit."""
    found = []
    try:
        examples = sft.make_examples(rows, tok, model.config.block_size + 1, run.print)
    except UserError:  # none fits: there is no loss, but its answers can still be measured
        return []
    for part in trainer.split(examples, lambda example: len(example[0]), micro_tokens):
        ids, mask = trainer.pad(part, run.device)
        with run.autocast():
            found += zip((-token_logps(model, ids, mask).sum(1)).tolist(), mask[:, 1:].sum(1).tolist())
    return found


ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
BERT = ("precision", "recall", "F1")
TABLES = {  # of the user's data: title, and its columns
    "overlap with the reference answers (F1)": ROUGE,
    "BERTScore": {f"bert_{part}": part for part in BERT},
    "embedding F1: likeness of token vectors, those of the first model": {f"embedding_{part}": part for part in BERT},
    "readability of the answers": {"fre": "FRE", "fkg": "FKG"},
    "the answers": {"words": "words", "stops": "stop by themselves"},
}
DIGITS = {"fre": "number", "fkg": "number", "words": "number", "stops": "share"}


def data_marks(model, tok, encoder, rows, run, config):
    """One model on rows with "messages" -> {name: [a number for each row]}, and the answers. encoder: a model and its
    tokenizer, whose vectors compare answers.

    Only the generated answer is compared, never the prompt: words of the question in both texts would count as overlap.
    """
    questions, references = zip(*[(row["messages"][:-1], row["messages"][-1]["content"]) for row in rows])
    asked = answers_of(model, tok, questions, run, config)
    texts = [tok.answer(ids) for _, ids in asked]
    overlaps = [metrics.rouge(reference, text) for reference, text in zip(references, texts)]
    marks = {name: [overlap[name] for overlap in overlaps] for name in ROUGE}
    compared = {"embedding": zip(*likeness(encoder, references, texts, run, config))}
    if config.bert_score:
        compared["bert"] = metrics.bert_score(references, texts)
    marks |= {f"{kind}_{part}": list(values) for kind, parts in compared.items() for part, values in zip(BERT, parts)}
    marks["fre"], marks["fkg"] = map(list, zip(*map(readability, texts)))
    marks["words"] = [len(plain_words(text).split()) for text in texts]
    marks["stops"] = [float(ids[-1] == tok.end) for _, ids in asked]
    answers = [{"question": question[-1]["content"], "reference": reference, "answer": text}
               for question, reference, text in zip(questions, references, texts)]
    return marks, answers


def likeness(encoder, references, texts, run, config):
    """-> [(P, R, F1) of the token vectors, ...]. In batches: a vector of each token of a large file would fill the memory."""
    found = []
    for i in range(0, len(texts), config.batch_size):
        both = [metrics.token_vectors(*encoder, side[i:i + config.batch_size], run, config.micro_tokens)
                for side in (references, texts)]
        found += map(metrics.embedding_f1, *both)
    return found


def load_files(config, run):
    """--data -> {name: rows with "messages"}, each file's name without its ending."""
    sets = {}
    for path in filter(None, map(str.strip, config.data.split(","))):
        rows, report = files.load(path, "sft")
        run.print(report)
        if config.sample and len(rows) > config.sample:
            rows = random.Random(config.seed).sample(rows, config.sample)
        name = Path(path.removesuffix(".gz")).stem
        if name in sets or name == "full":  # "full" is the row of all files together
            raise UserError(f"--data {config.data}: {path}: the tables have another row called {name}: rename the file")
        sets[name] = rows
    return sets


def evaluate_data(config, run):
    """Each model on each file, and on all files together ("full"), with the held-out loss: tables with a row for each."""
    sets, marks, losses, answers, encoder = load_files(config, run), {}, {}, [], None
    for folder in config.folders:
        model, tok = load(folder, run)
        encoder = encoder or (model, tok)  # one for all, or their vectors could not be compared
        for name, rows in sets.items():
            losses[name, folder] = row_losses(model, tok, rows, run, config.micro_tokens)
            marks[name, folder], texts = data_marks(model, tok, encoder, rows, run, config)
            answers += [{"model": folder, "data": name} | text for text in texts]
            run.print(f"{folder} on {name}: {len(rows)} answers")
        if len(sets) > 1:
            losses["full", folder] = [loss for name in sets for loss in losses[name, folder]]
            parts = [marks[name, folder] for name in sets]
            marks["full", folder] = {key: [value for part in parts for value in part[key]] for key in parts[0]}
    keys = [(name, folder) for name in [*sets, *["full"] * (len(sets) > 1)] for folder in config.folders]
    results = {key: {name: metrics.interval(values) for name, values in marks[key].items()} for key in keys}
    run.print("\nheld-out loss per token\n" + table(["data", "model", "loss", "rows that fit"], [
        [*key, f"{mean_loss(losses[key]):.3f}", f"{len(losses[key]):,}"] for key in keys]))
    for title, names in TABLES.items():
        if all(name in results[key] for key in keys for name in names):
            rows = [[*key, *(cell(results[key][name], DIGITS.get(name, "fine")) for name in names)] for key in keys]
            run.print(f"\n{title}\n" + table(["data", "model", *names.values()], rows))
    save(config, run, "data", {"results": {" / ".join(key): {"loss": mean_loss(losses[key])} | results[key] for key in keys}}, answers)
    return results


def mean_loss(losses):
    """[(-log p of a row's answers, their tokens), ...] -> the mean per token."""
    if not losses:
        return float("nan")
    total, n = map(sum, zip(*losses))
    return total / n


# ---- multiple choice -------------------------------------------------------------------------------------------------

CHOICES = {"acc": "acc", "acc_norm": "acc_norm", "acc_bytes": "acc_bytes", "mc2": "mc2", "acc_subjects": "over subjects",
           "headline": "headline"}


def evaluate_choices(config, run):
    """Each model on the quiz and on each file of --choices: a row a model, file and task, and the leaderboard's mean of
    four where each of the four is there once."""
    if config.shots != "leaderboard" and not config.shots.isdecimal():
        raise UserError(f"--shots {config.shots}: give a number, or leaderboard")
    shots = choice.LEADERBOARD if config.shots == "leaderboard" else int(config.shots)
    sets = {}
    for path in map(str.strip, config.choices.split(",")):
        if path in sets:
            raise UserError(f"--choices {config.choices}: {path} is named twice")
        quiz = path == "quiz"
        sets[path] = choice.island_quiz(Island(), config.n) if quiz else choice.load_questions(path, say=run.print)
    dev = choice.load_questions(config.examples, least=1, say=run.print) if config.examples else None
    results, rows = {}, []
    for folder in config.folders:
        model, tok = GPT.from_pretrained(folder).to(run.device).eval(), get_tokenizer(folder)
        results[folder] = [{"file": path} | row for path, questions in sets.items()
                           for row in choice.evaluate(model, tok, questions, run, shots, dev, config.micro_tokens)]
        for row in results[folder]:
            rows.append([folder, row["file"], row["task"], f"{row['n']:,}",
                         *(cell(row.get(name), "share") for name in CHOICES)])
        average = choice.leaderboard_average(results[folder])
        if average is not None:
            rows.append([folder, "", "mean of the four", "",
                         *(f"{average:.1%}" if name == "headline" else "" for name in CHOICES)])
    ways = ["questions are plain text, as lm-evaluation-harness asks them"] * (set(sets) != {"quiz"})
    ways += ["the quiz continues documents, as in pretraining"] * ("quiz" in sets)
    run.print("\n" + "; ".join([f"examples before each question: {config.shots}", *ways]) + "\n" +
              table(["model", "file", "task", "n", *CHOICES.values()], rows))
    save(config, run, "choices", {"results": results})
    return results


# ---- judges ----------------------------------------------------------------------------------------------------------

def judged_questions(config, island, run):
    """-> [[message, ...], ...]: a system prompt, if any, and the user's turns, one or two; and the right answers to them,
    as far as they are known and wanted."""
    if island:
        rows = island.prompts(config.n, seed=5, split="test")
        more = [row for row in island.conversations(10 * len(rows), seed=9, split="test") if row["kind"] == "multi"]
        rows = [row["prompt"] for row in rows] + [row["messages"] for row in more[:len(rows) // 2]]
    else:
        rows = [row["messages"] for part in load_files(config, run).values() for row in part]
    asked, references = [], []
    for messages in rows:
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        end = users[:2][-1] + 2  # past the answer to the second turn, or to the only one
        asked.append([m for m in messages[:end] if m["role"] != "assistant"])
        references.append([m["content"] for m in messages[:end] if m["role"] == "assistant"])
    return asked, references


def own_answers(model, tok, asked, run, config):
    """The user's turns -> conversations with the model's own answer after each of them, the second with the first in view."""
    talks = [[m for m in messages if m["role"] == "system"] for messages in asked]
    turns = [[m for m in messages if m["role"] == "user"] for messages in asked]
    for turn in range(2):
        going = []
        for talk, users in zip(talks, turns):
            if turn < len(users):
                talk.append(users[turn])
                going.append(talk)
        for talk, (_, ids) in zip(going, answers_of(model, tok, going, run, config)):
            talk.append({"role": "assistant", "content": tok.answer(ids)})
    return talks


def evaluate_judge(config, run):
    """Ratings of every model's answers, in one turn and in two, and duels of each model with the first one."""
    if config.judge_reference and not config.data:
        raise UserError("--judge-reference shows the judge the answers in your --data, and none is given")
    island = None if config.data else Island()
    asked, references = judged_questions(config, island, run)
    judging, path, items = judge.load_judge(config.judge, run, island), Path(config.out) / "judgments.jsonl", {}
    for folder in config.folders:
        talks = own_answers(*load(folder, run), asked, run, config)
        items[folder] = [{"id": i, "model": folder, "messages": talk} | ({"reference": right} if config.judge_reference else {})
                         for i, (talk, right) in enumerate(zip(talks, references))]
    results, first = {"ratings": {}, "duels": {}}, config.folders[0]
    for folder in config.folders:
        results["ratings"][folder] = judge.rate(judging, judge.each_turn(items[folder]), path, run.print)[1]
    run.print("\nratings, 1 to 10\n" + table(["model", *judge.RATING_HEADER], [
        [folder, *judge.rating_cells(summary)] for folder, summary in results["ratings"].items()]))
    for folder in config.folders[1:]:
        last = [[item | {"reference": item["reference"][-1]} if "reference" in item else item for item in items[name]]
                for name in (folder, first)]
        results["duels"][f"{folder} against {first}"] = judge.duel(judging, *last, path, run.print)
    if results["duels"]:
        run.print("\nduels: a win is what wins in both orders\n" + table(["", *judge.DUEL_HEADER], [
            [name, *judge.duel_cells(summary)] for name, summary in results["duels"].items()]))
    save(config, run, "judge", {"results": results})
    run.print(f"every judgment with its prompt is in {path}")
    return results


# ---- the command line ------------------------------------------------------------------------------------------------

@dataclass
class Config:
    folders: list[str] = field(default_factory=list)  # checkpoint folders or gpt2 ...; none: out/base, out/sft, out/dpo, out/ppo
    story: bool = False  # run whatever stage is missing and write the whole story into --out (out/story)
    data: str = ""  # your files with conversations, with commas between; empty: the island
    sample: int = 100  # rows of each file, drawn by --seed; 0: all
    max_new_tokens: int = 512  # longest answer to your data; at most half the model's context
    temperature: float = 0.0  # of answers to your data and for a judge; 0: greedy (the island's table: always 1)
    top_p: float = 1.0  # of answers to your data: sample from the likeliest tokens that have this probability together
    choices: str = ""  # multiple choice: quiz (the island's), or files in the shape of ARC, HellaSwag, MMLU, TruthfulQA
    shots: str = "0"  # multiple choice: examples before each question; leaderboard: 25, 10, 5 and 6, as it counted
    examples: str = ""  # multiple choice: the file that the examples are from; empty: the questions' own
    judge: str = ""  # gold, a reward model's folder, or http://address/v1#model (key: OPENAI_API_KEY)
    judge_reference: bool = False  # show the judge the answers in your data as right ones
    bert_score: bool = False  # BERTScore of answers to your data too (needs pip install bert-score and a network)
    n: int = 400  # questions about the island, for its table, its quiz and its judge
    reward: str = "out/reward"  # a reward model's folder, or 0.7*out/a+0.3*out/b
    reference: str = ""  # KL is measured from this checkpoint; empty: out/sft-community or out/sft
    out: str = ""  # folder for numbers, answers and pictures; empty: out/evaluate
    batch_size: int = 32  # answers generated at a time
    micro_tokens: int = 16384  # padded tokens in one forward pass
    seed: int = 0  # of everything random
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: str = "auto"  # of the matrix products: float32 or bfloat16; auto: bfloat16 where the hardware is fast at it


def main(config):
    if config.n < 1:
        raise UserError(f"--n {config.n}: it must be at least 1")
    run = trainer.start(config)
    config.out = config.out or ("out/story" if config.story else "out/evaluate")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)  # now, not when everything has been measured
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be a folder ({error.strerror}): choose another one")
    if config.story:
        import story  # it stands on this file
        return story.main(config, run)
    config.folders = config.folders or list(filter(trainer.is_finished, ("out/base", "out/sft", "out/dpo", "out/ppo")))
    if not config.folders:
        raise UserError("no checkpoint to measure: name some folders, or train one with python sft.py")
    if config.choices and (config.judge or config.data):
        raise UserError(f"--choices and --{'judge' if config.judge else 'data'}: one at a time")
    if config.choices:
        return evaluate_choices(config, run)
    if config.judge:
        return evaluate_judge(config, run)
    if config.data:
        return evaluate_data(config, run)
    exam.evaluate_island(config, run)


if __name__ == "__main__":
    main(parse(Config))
