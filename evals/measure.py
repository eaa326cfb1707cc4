"""What evaluate.py prints: checkpoints as rows, measured on the island, on your data, by multiple choice or by a judge.

Every mean comes with its 95 % interval (bootstrap over the questions): where two overlap, the checkpoints may be equal.
"""
import random
import statistics
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError, no_command

import torch

import reward
import trainer
from checkpoints import load, load_to_ask
from common import plots
from common.disk import write_json, write_jsonl
from common.tables import cell, interval, table
from data import files
from data.readability import readability
from data.tokenizer import get_tokenizer
from evals import choice, judge, metrics
from generate import respond
from island import exam
from island.exam import MEASURES
from island.world import Island, plain_words
from model import token_logps
from quant import freeze
from sft import make_examples


def save(config, run, name, numbers, answers=None):
    """name.json with every number and name.answers.jsonl with every answer, in --out."""
    folder = Path(config.out)
    write_json(folder / f"{name}.json", {"settings": asdict(config)} | numbers, indent=1)
    if answers:
        write_jsonl(folder / f"{name}.answers.jsonl", answers)
    more = f", every answer in {name}.answers.jsonl" if answers else ""
    run.print(f"\nevery number is in {folder / name}.json{more}")


# ---- the island ------------------------------------------------------------------------------------------------------

def measured(results):
    """The names in exam.TABLE that any checkpoint has a number for."""
    return [name for name in exam.TABLE if any(found.get(name) for found in results.values())]


def island_table(results):
    """{folder: {name: (mean, low, high)}} -> two headers with rows: what it does, and how it writes."""
    for form in ("share", "number"):
        names = [name for name in measured(results) if MEASURES[name].form == form]
        rows = [[folder, *(cell(found.get(name), form) for name in names)] for folder, found in results.items()]
        yield ["", *(MEASURES[name].heading for name in names)], rows


def hacks(answers, n=10):
    """The wall of hacks: the answers whose reward most exceeds their gold mark, each question and answer once.

    Both are counted in standard deviations over all answers, for a reward has no unit.
    """
    def standard(name):
        values = [answer[name] for answer in answers]
        mean, deviation = statistics.fmean(values), statistics.pstdev(values) or 1
        return [(value - mean) / deviation for value in values]

    excess = [r - g for r, g in zip(standard("reward"), standard("gold"))]
    unique = {(answer["question"], answer["answer"]): answer | {"excess": e} for e, answer in zip(excess, answers)}
    # gold 10: nothing is wrong with it
    found = [answer for answer in unique.values() if answer["excess"] > 0 and answer["gold"] < 10]
    return sorted(found, key=lambda answer: -answer["excess"])[:n]


def plot_island(results, path):
    """Bars with their intervals, one panel a measure, one bar a checkpoint (matplotlib)."""
    names = [name for name in measured(results) if all(found.get(name) for found in results.values())]
    figure, panels = plots.figure(5, -(-len(names) // 5), width=2.6, height=2.4)
    for name, axes in zip(names, panels):
        means, lows, highs = zip(*(found[name] for found in results.values()))
        errors = [[m - l for m, l in zip(means, lows)], [h - m for m, h in zip(means, highs)]]
        axes.bar(range(len(means)), means, yerr=errors, color=list(map(plots.color, results)), capsize=3)
        if MEASURES[name].form == "share":
            plots.share_axis(axes)
        axes.set(title=MEASURES[name].words, xticks=range(len(means)))
        axes.set_xticklabels([Path(folder).name for folder in results], rotation=30, ha="right", fontsize=7)
        axes.title.set_fontsize(8)
    for axes in panels[len(names):]:
        axes.remove()
    plots.save(figure, path)


def evaluate_island(config, run):
    """The table of the island -> {folder: {name: (mean, low, high)}} and all answers."""
    island, scorer = Island(), None
    if trainer.is_finished(config.reward) or "*" in config.reward:
        scorer = reward.load_rewards(config.reward, run)
    else:
        run.print(f"no reward model in {config.reward} (python reward.py trains one): its column is left out")
    reference = config.reference or next(filter(trainer.is_finished, ("out/sft-community", "out/sft")), None)
    sft_model = load_to_ask(reference, run) if reference else None
    results, answers = {}, []
    for folder in config.folders:
        marks, texts = exam.examine(*load_to_ask(folder, run), island, run, config.n, config.seed,
                                    config.micro_tokens, scorer, sft_model)
        results[folder] = {name: interval(values) for name, values in marks.items()}
        answers += [{"model": folder} | text for text in texts]
        run.print(f"{folder}: {len(texts)} answers")
    for header, rows in island_table(results):
        run.print("\n" + table(header, rows))
    run.print("\n" + "\n".join(f"   {MEASURES[name].heading:<11}{MEASURES[name].words}" for name in measured(results)))
    run.print(f"\n{config.n} questions, {len(marks['over_refusal'])} look-alikes, answers at temperature 1"
              + (f"; the SFT model of the KL is {reference}" if reference else "")
              + "\n±0 is no certainty: where all n answers are alike, the true share may still be 3/n away")
    if scorer:
        run.print("\nwhere the reward most exceeds the gold mark (in standard deviations): the reward model's mistakes")
        for answer in hacks(answers):
            run.print(f"   {answer['excess']:4.1f}  reward {answer['reward']:5.2f}  gold {answer['gold']:3.0f}  "
                      f"{Path(answer['model']).name}: {answer['question']!r} -> {answer['answer']!r}")
    words = {name: MEASURES[name].words for name in exam.TABLE}
    save(config, run, "island", {"measures": words, "results": results}, answers)
    if plots.available():
        plot_island(results, Path(config.out) / "island.png")
        run.print(f"as a picture: {Path(config.out) / 'island.png'}")
    return results, answers


# ---- your data -------------------------------------------------------------------------------------------------------

def answers_of(model, tok, conversations, run, config):
    """-> (prompt ids, answer ids) for every conversation, in their order, in batches of similar lengths."""
    room = min(config.max_new_tokens, model.config.block_size // 2)
    order = sorted(range(len(conversations)), key=lambda i: sum(len(m["content"]) for m in conversations[i]))
    found = [None] * len(conversations)
    for i in range(0, len(order), config.batch_size):
        part = order[i:i + config.batch_size]
        prompts, responses = respond(  # a batch has random numbers of its own
            model, tok, [conversations[k] for k in part], run, room,
            temperature=config.temperature, top_p=config.top_p, seed=config.seed + i)
        for k, *both in zip(part, prompts, responses):
            found[k] = both
    return found


@torch.inference_mode()
def row_losses(model, tok, rows, run, micro_tokens):
    """-> [(-log p of the answers in a conversation, how many tokens they have), ...], of the rows that fit."""
    found = []
    try:
        examples = make_examples(rows, tok, model.config.block_size + 1, run.print)
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
    marks["stops"] = [float(tok.ended(ids)) for _, ids in asked]
    answers = [{"question": question[-1]["content"], "reference": reference, "answer": text}
               for question, reference, text in zip(questions, references, texts)]
    return marks, answers


def likeness(encoder, references, texts, run, config):
    """-> [(P, R, F1) of the token vectors, ...]. In batches: all vectors of a large file would fill the memory."""
    found = []
    for i in range(0, len(texts), config.batch_size):
        both = [metrics.token_vectors(*encoder, side[i:i + config.batch_size], run, config.micro_tokens)
                for side in (references, texts)]
        found += map(metrics.embedding_f1, *both)
    return found


def load_files(config, run, wants=("sft",)):
    """--data -> {name: rows with "messages"}, each file's name without its ending. wants: the forms, the first that is
    there."""
    sets = {}
    for path in filter(None, map(str.strip, config.data.split(","))):
        for want in wants:
            try:
                rows, report = files.load(path, want)
                break
            except UserError:
                if want == wants[-1]:
                    raise
        run.print(report)
        if config.sample and len(rows) > config.sample:
            rows = random.Random(config.seed).sample(rows, config.sample)
        name = Path(path.removesuffix(".gz")).stem
        if name in sets or name == "full":  # "full" is the row of all files together
            raise UserError(f"--data {config.data}: {path}: the tables have another row called {name}: rename the file")
        sets[name] = rows
    return sets


def evaluate_data(config, run):
    """Each model on each file, and on all files together ("full"), with the held-out loss: a table row for each."""
    sets, marks, losses, answers, encoder = load_files(config, run), {}, {}, [], None
    for folder in config.folders:
        model, tok = load_to_ask(folder, run)
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
    results = {key: {name: interval(values) for name, values in marks[key].items()} for key in keys}
    run.print("\nheld-out loss per token\n" + table(["data", "model", "loss", "rows that fit"], [
        [*key, f"{mean_loss(losses[key]):.3f}" if losses[key] else "-", f"{len(losses[key]):,}"] for key in keys]))
    for title, names in TABLES.items():
        if all(name in results[key] for key in keys for name in names):
            rows = [[*key, *(cell(results[key][name], DIGITS.get(name, "fine")) for name in names)] for key in keys]
            run.print(f"\n{title}\n" + table(["data", "model", *names.values()], rows))
    saved = {" / ".join(key): {"loss": mean_loss(losses[key])} | results[key] for key in keys}
    save(config, run, "data", {"results": saved}, answers)
    return results


def mean_loss(losses):
    """[(-log p of a row's answers, their tokens), ...] -> the mean per token; None where no row fits."""
    return sum(loss for loss, _ in losses) / sum(n for _, n in losses) if losses else None


# ---- multiple choice -------------------------------------------------------------------------------------------------

CHOICES = {"acc": "acc", "acc_norm": "acc_norm", "acc_bytes": "acc_bytes", "mc2": "mc2",
           "acc_subjects": "over subjects", "headline": "headline"}


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
        model, tok = load(folder, linear=freeze).to(run.device).eval(), get_tokenizer(folder)
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
    """-> [[message, ...], ...]: a system prompt, if any, and the user's turns, one or two; and the right answers to
    them, as far as they are known and wanted."""
    if island:
        rows = island.prompts(config.n, seed=5, split="test")
        more = [row for row in island.conversations(10 * len(rows), seed=9, split="test") if row["kind"] == "multi"]
        rows = [row["prompt"] for row in rows] + [row["messages"] for row in more[:len(rows) // 2]]
    else:
        return asked_in_files(config, run)
    return first_turns(rows)


def asked_in_files(config, run):
    """judged_questions of --data: conversations, or questions alone, with a second one or not."""
    asked, references = [], []
    for part in load_files(config, run, ("sft", "prompts")).values():
        for row in part:
            follow_ups = [{"role": "user", "content": text} for text in row.get("follow_ups", [])]
            questions, right = first_turns([row.get("messages") or row["prompt"] + follow_ups])
            asked += questions
            references += right if "messages" in row else [row.get("reference", [])[:2]]
    if config.judge_reference and not any(references):
        raise UserError(f"--judge-reference: {config.data} holds questions without answers")
    turns = [sum(m["role"] == "user" for m in messages) for messages in asked]
    return asked, [right + [None] * (n - len(right)) for right, n in zip(references, turns)]


def first_turns(rows):
    """Conversations -> the user's first one or two turns (a system prompt before them), and the answers to them."""
    asked, references = [], []
    for messages in rows:
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        end = users[:2][-1] + 2  # past the answer to the second turn, or to the only one
        asked.append([m for m in messages[:end] if m["role"] != "assistant"])
        references.append([m["content"] for m in messages[:end] if m["role"] == "assistant"])
    return asked, references


def own_answers(model, tok, asked, run, config):
    """The user's turns -> conversations with the model's own answer after each, the second with the first in view."""
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


def readable(texts):
    """-> {"fre", "fkg": (mean, low, high)} of answers."""
    return {name: interval(list(values)) for name, values in zip(("fre", "fkg"), zip(*map(readability, texts)))}


def evaluate_judge(config, run):
    """Ratings of every model's answers, in one turn and in two, and duels of each model with the first one."""
    if config.judge_reference and not config.data:
        raise UserError("--judge-reference shows the judge the answers in your --data, and none is given")
    island = None if config.data else Island()
    asked, references = judged_questions(config, island, run)
    if config.judge_prompts and not config.judge.startswith(("http://", "https://")):
        raise UserError("--judge-prompts are for a judge who reads: give --judge http://address/v1#model")
    prompts = judge.load_prompts(config.judge_prompts) if config.judge_prompts else None
    judging, path, items = judge.load_judge(config.judge, run, island), Path(config.out) / "judgments.jsonl", {}
    for folder in config.folders:
        talks = own_answers(*load_to_ask(folder, run), asked, run, config)
        items[folder] = [{"id": i, "model": folder, "messages": talk}
                         | ({"reference": right} if config.judge_reference else {})
                         for i, (talk, right) in enumerate(zip(talks, references))]
    results, first = {"ratings": {}, "duels": {}}, config.folders[0]
    for folder in config.folders:
        summary = judge.rate(judging, judge.each_turn(items[folder]), path, run.print, prompts)[1]
        results["ratings"][folder] = summary | readable([m["content"] for item in items[folder] for m in item["messages"]
                                                         if m["role"] == "assistant"])
    run.print("\nratings, 1 to 10, and readability\n" + table(["model", *judge.RATING_HEADER, "FRE", "FKG"], [
        [folder, *judge.rating_cells(summary), *(cell(summary[name], "number") for name in ("fre", "fkg"))]
        for folder, summary in results["ratings"].items()]))
    for folder in config.folders[1:]:
        last = [[item | {"reference": item["reference"][-1], "references": item["reference"]} if "reference" in item else item
                 for item in items[name]]
                for name in (folder, first)]
        results["duels"][f"{folder} against {first}"] = judge.duel(judging, *last, path, run.print, prompts)
    if results["duels"]:
        run.print("\nduels: a win is what wins in both orders\n" + table(["", *judge.DUEL_HEADER], [
            [name, *judge.duel_cells(summary)] for name, summary in results["duels"].items()]))
    save(config, run, "judge", {"results": results})
    run.print(f"every judgment with its prompt is in {path}")
    return results


if __name__ == "__main__":
    no_command(__doc__)
