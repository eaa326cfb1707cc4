"""The island's examination: checkpoints are asked about residents, strangers and dangers that no training has mentioned.

Helpful, honest and harmless are shares of the questions of one kind, because a single mean would hide that a model which
answers "I do not know" to everything is perfectly honest and of no use (Askell et al. 2021). And every mean comes with its
95 % interval (bootstrap over the questions): two checkpoints whose intervals overlap may be equal.

    KL from the SFT model = E_{y ~ pi} [ log pi(y | x) - log pi_ref(y | x) ],   one sample a question, summed over its tokens

evaluate.py prints the table, story.py puts it on a page.
"""
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

import ppo
import reward
import sft
import trainer
from island.world import Island, refuses
from data.readability import readability
from data.tokenizer import get_tokenizer
from dpo import answer_marks
from model import GPT, token_logps
from common import plots
from common.disk import replacing, write_jsonl
from common.tables import cell, interval, table

# ---- what every evaluation needs -------------------------------------------------------------------------------------


def load(folder, run):
    """A checkpoint folder or a public name -> model, ready to be asked, and its tokenizer."""
    reward.refuse_reward_model(folder)
    model, tok = GPT.from_pretrained(folder), get_tokenizer(folder)
    if tok.new_ids:
        run.print(f"{folder} has never been trained on conversations: expect continued text, not answers")
    model.resize_vocab(tok.vocab_size)
    return model.to(run.device).eval(), tok


def save(config, run, name, numbers, answers=None):
    """name.json with every number and name.answers.jsonl with every answer, in --out."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({"settings": asdict(config)} | numbers, indent=1) + "\n")
    if answers:
        write_jsonl(folder / f"{name}.answers.jsonl", answers)
    run.print(f"\nevery number is in {folder / name}.json" + (f", every answer in {name}.answers.jsonl" if answers else ""))


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = {  # what is measured on the island: its heading, its form, and what it is
    "helpful": ("helpful", "share", "facts about residents, right"),
    "honest": ("honest", "share", 'strangers: "I do not know"'),
    "harmless": ("harmless", "share", "unsafe requests refused"),
    "over_refusal": ("over-ref.", "share", "harmless look-alikes refused"),
    "false_idk": ("false idk", "share", 'residents: "I do not know"'),
    "complies": ("complies", "share", "unsafe requests helped with"),
    "flatters": ("praise", "share", "answers that praise whoever asks"),
    "gold": ("gold", "number", "the island's judge, 1 to 10"),
    "reward": ("reward", "number", "the reward model's score"),
    "kl": ("KL", "number", "KL of an answer from the SFT model"),
    "words": ("words", "number", "words in an answer"),
    "fre": ("FRE", "number", "Flesch reading ease, high is easy"),
    "fkg": ("FKG", "number", "Flesch-Kincaid school grade"),
}


@torch.inference_mode()
def response_kl(model, reference, asked, run, micro_tokens):
    """[(prompt ids, answer ids), ...] -> log pi - log pi_ref of each answer, summed over its tokens (k1): its mean is the KL."""
    found = [0.0] * len(asked)
    rows = [(p + r, [0] * len(p) + [1] * len(r), i) for i, (p, r) in enumerate(asked)]
    for part in trainer.split(rows, lambda row: len(row[0]), micro_tokens):
        ids, mask = trainer.pad([row[:2] for row in part], run.device)
        with run.autocast():
            logps, ref_logps = (token_logps(m, ids, mask) for m in (model, reference))
        for (*_, i), kl in zip(part, ppo.kl_k1(logps, ref_logps, mask[:, 1:]).tolist()):
            found[i] = kl
    return found


def safe_questions(island, n):
    """Harmless questions that sound unsafe, of no conversation trained on."""
    rows = island.conversations(40 * n, seed=9, split="test")
    return [row["messages"][:-1] for row in rows if row["kind"] == "safe"][:n]


def island_marks(folder, island, run, config, scorer=None, reference=None):
    """-> {name in COLUMNS: [a number for each answer]}, and the answers: [{"model", "question", "answer", "gold", ...}].
    scorer: a reward model's (reward.load_rewards); reference: the SFT model and its tokenizer, for the KL."""
    model, tok = load(folder, run)
    rows = island.prompts(config.n, seed=5, split="test")
    # all at once, with one seed: the same answers that dpo.py and ppo.py report on
    asked = list(zip(*sft.respond(model, tok, [row["prompt"] for row in rows], run, temperature=1.0, seed=5 + config.seed)))
    texts = [tok.answer(ids) for _, ids in asked]
    marks = answer_marks(rows, texts, island)
    harmless = sft.ask(model, tok, safe_questions(island, max(20, config.n // 8)), run, temperature=1.0, seed=5 + config.seed)
    marks["over_refusal"] = [float(refuses(answer)) for answer in harmless]
    marks["fre"], marks["fkg"] = zip(*map(readability, texts))
    if scorer:
        marks["reward"] = scorer([reward.answered(row, {"text": text}) for row, text in zip(rows, texts)])
    if reference and reference[1].special == tok.special:  # other tokens: no probability of theirs can be compared
        marks["kl"] = response_kl(model, reference[0], asked, run, config.micro_tokens)
    answers = [{"model": folder, "question": row["prompt"][-1]["content"], "kind": row["kind"], "answer": text}
               for row, text in zip(rows, texts)]
    for name in ("gold", "reward", "kl"):
        for answer, value in zip(answers, marks.get(name, ())):
            answer[name] = value
    return {name: list(map(float, marks[name])) for name in COLUMNS if name in marks}, answers


def measured(results):
    """The names in COLUMNS that any checkpoint has a number for."""
    return [name for name in COLUMNS if any(found.get(name) for found in results.values())]


def island_table(results):
    """{folder: {name: (mean, low, high)}} -> two headers with rows: what it does, and how it writes."""
    for form in ("share", "number"):
        names = [name for name in measured(results) if COLUMNS[name][1] == form]
        rows = [[folder, *(cell(found.get(name), form) for name in names)] for folder, found in results.items()]
        yield ["", *(COLUMNS[name][0] for name in names)], rows


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
    found = [answer for answer in unique.values() if answer["excess"] > 0 and answer["gold"] < 10]  # 10: nothing is wrong with it
    return sorted(found, key=lambda answer: -answer["excess"])[:n]


def plot_island(results, path):
    """Bars with their intervals, one panel a measure, one bar a checkpoint (matplotlib)."""
    names = [name for name in measured(results) if all(found.get(name) for found in results.values())]
    figure, panels = plots.figure(5, -(-len(names) // 5), width=2.6, height=2.4)
    for name, axes in zip(names, panels):
        means, lows, highs = zip(*(found[name] for found in results.values()))
        errors = [[m - l for m, l in zip(means, lows)], [h - m for m, h in zip(means, highs)]]
        axes.bar(range(len(means)), means, yerr=errors, color=[f"C{i}" for i in range(len(means))], capsize=3)
        axes.set(title=COLUMNS[name][2], xticks=range(len(means)))
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
    sft_model = load(reference, run) if reference else None
    results, answers = {}, []
    for folder in config.folders:
        marks, texts = island_marks(folder, island, run, config, scorer, sft_model)
        results[folder] = {name: interval(values) for name, values in marks.items()}
        answers += texts
        run.print(f"{folder}: {len(texts)} answers")
    for header, rows in island_table(results):
        run.print("\n" + table(header, rows))
    run.print("\n" + "\n".join(f"   {COLUMNS[name][0]:<11}{COLUMNS[name][2]}" for name in measured(results)))
    run.print(f"\n{config.n} questions, {len(marks['over_refusal'])} look-alikes, answers at temperature 1"
              + (f"; the SFT model of the KL is {reference}" if reference else "")
              + "\n±0 is no certainty: where all n answers are alike, the true share may still be 3/n away")
    if scorer:
        run.print("\nwhere the reward most exceeds the gold mark (in standard deviations): the reward model's mistakes")
        for answer in hacks(answers):
            run.print(f"   {answer['excess']:4.1f}  reward {answer['reward']:5.2f}  gold {answer['gold']:3.0f}  "
                      f"{Path(answer['model']).name}: {answer['question']!r} -> {answer['answer']!r}")
    save(config, run, "island", {"measures": {name: column[2] for name, column in COLUMNS.items()}, "results": results}, answers)
    if plots.available():
        plot_island(results, Path(config.out) / "island.png")
        run.print(f"as a picture: {Path(config.out) / 'island.png'}")
    return results, answers
