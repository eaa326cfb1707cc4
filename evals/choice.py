"""Multiple choice: which of the given answers does the model find likeliest? Counted as the public leaderboards count.

    log p(choice | prompt) = sum_t log p(choice_t | prompt, choice_<t)

    acc         the right choice has the highest log p
    acc_norm    ... the highest log p per character: a long answer is unlikely for no other reason than its length
    acc_bytes   ... the highest log p per byte of UTF-8
    mc2         TruthfulQA: what share of the probability of all choices do the true ones have?

Nothing is generated, so a base model can be asked, and no judge is needed. But the number depends on how a question is
put. So prompts, their ids and the arithmetic are those of lm-evaluation-harness 0.4.13 (tests/parity checks all three):
plain text, nothing before it and no chat format around it. Models that have learned to converse are asked the same way:
so did the public leaderboard, and the rows of one table can be compared. Only the island's quiz is put in another one:
its sentences are those of pretraining, so they stand as they stood there, after the end-of-text token and a space.

    python evaluate.py out/base out/sft --choices quiz
    python evaluate.py gpt2 --choices arc_challenge.jsonl --shots 25 --examples arc_train.jsonl

A file (any that data/files.py opens) holds the public rows of ARC, HellaSwag, MMLU, PIQA, TruthfulQA (its csv too) or
WinoGrande (what follows the gap, after each of two beginnings), or your own, {"question": "...", "choices": ["...",
"..."], "answer": 0}. LEADERBOARD says how many examples the Open LLM Leaderboard showed before each question. Those of
TruthfulQA are always the same six (so it is called 0-shot); they are not part of this project: give them as examples
{"question": "...", "mc1_targets": {"choices": ["the answer"], "labels": [1]}}.
"""
import itertools
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import trainer
from data import files
from island import words
from island.world import ATTRIBUTES
from data.shapes import CHOICE_KEYS, BadRow, WrongForm, as_text, check_texts, has, shown
from common.errors import UserError
from common.tables import interval
from model import token_logps

HEADLINE = {"ARC": "acc_norm", "HellaSwag": "acc_norm", "MMLU": "acc_subjects", "TruthfulQA": "mc2",
            "PIQA": "acc_norm", "WinoGrande": "acc", "plain": "acc", "island": "acc"}  # the measure that is quoted for a task
LEADERBOARD = {"ARC": 25, "HellaSwag": 10, "MMLU": 5, "TruthfulQA": 6}  # examples before each question


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt and what may follow it, after one space."""

    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int  # which of them is right, from 0
    subject: str = ""  # of MMLU
    mc2: tuple[tuple[str, bool], ...] = ()  # of TruthfulQA: another list of choices, and whether each is true
    begun: tuple[str, ...] = ()  # of WinoGrande, in place of the prompt: the choices' own, each followed by the same words

    def candidates(self):
        """All that the model has to score."""
        return self.choices + tuple(choice for choice, _ in self.mc2)


# ---- from a row to a question ----------------------------------------------------------------------------------------

def text_of(row, key):
    text = as_text(row[key], key)
    if not text.strip():
        raise BadRow(f"{key} is empty")
    return text


def texts_of(value, name):
    """A list of texts -> tuple."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadRow(f"{name} is not a list of texts", f"it is {shown(value)}")
    return tuple(value)


def position(answer, labels, choices):
    """Where the answer's label stands. A label may be a number in one place and its text in another."""
    if len(labels) != len(choices) or str(answer) not in map(str, labels):
        raise BadRow("the answer is none of the choices", f"it is {shown(answer)}, beside {len(choices)} choices")
    return list(map(str, labels)).index(str(answer))


def arc(row):
    """Labels are A to D in most rows, 1 to 4 in some."""
    if not isinstance(row["choices"], dict) or not isinstance(row["choices"].get("label"), list):
        raise BadRow("choices is not an object of text and label", f"it is {shown(row['choices'])}")
    choices = texts_of(row["choices"].get("text"), "choices.text")
    return ChoiceQuestion("ARC", f"Question: {text_of(row, 'question')}\nAnswer:", choices,
                    position(row["answerkey"], row["choices"]["label"], choices))


def arc_nested(row):
    """ARC as it was published: the choices are in the question."""
    options = row["question"].get("choices")
    if not isinstance(options, list) or not all(isinstance(option, dict) for option in options):
        raise BadRow("question.choices is no list of text and label", f"it is {shown(options)}")
    lists = {key: [option.get(key) for option in options] for key in ("text", "label")}
    return arc({"question": row["question"].get("stem"), "choices": lists, "answerkey": row["answerkey"]})


def query(row):
    """ARC and PIQA as MosaicML's evaluation has them: "Question: ..." and the answers to it."""
    choices = texts_of(row["choices"], "choices")
    return ChoiceQuestion("plain", f"{text_of(row, 'query').rstrip()}\nAnswer:", choices,
                          position(row["gold"], range(len(choices)), choices))


def piqa(row):
    choices = tuple(text_of(row, key) for key in ("sol1", "sol2"))
    return ChoiceQuestion("PIQA", f"Question: {text_of(row, 'goal')}\nAnswer:", choices, position(row["label"], (0, 1), choices))


def winogrande(row):
    """Which word fills the gap? What follows the gap is the same after both, and the likelier it is the better."""
    begun, gap, rest = text_of(row, "sentence").partition("_")
    options = tuple(text_of(row, key) for key in ("option1", "option2"))
    if not gap or not rest.strip():
        raise BadRow("a sentence without a gap (_), or with nothing behind it")
    return ChoiceQuestion("WinoGrande", "", (rest.strip(),) * 2, position(row["answer"], (1, 2), options),
                          begun=tuple(begun + option for option in options))


def two_beginnings(row):
    """WinoGrande as MosaicML's evaluation has it."""
    begun = texts_of(row["context_options"], "context_options")
    return ChoiceQuestion("WinoGrande", "", (text_of(row, "continuation").strip(),) * len(begun),
                          position(row["gold"], range(len(begun)), begun), begun=begun)


def mmlu_as_read(row):
    """MMLU with the prompt already written: its options stand in it, and the output is a letter."""
    said = re.sub(r"^The following are multiple choice questions[^\n]*\n\n", "", text_of(row, "input"))
    asked, *options = re.split(r"\n([A-Z])\. ", said.rstrip().removesuffix("Answer:").rstrip())
    if len(options) < 4 or options[::2] != list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options) // 2]):
        raise BadRow("input has no options A., B., ...")
    letter = text_of(row, "output").strip()
    answer = position(letter, options[::2], options[1::2])
    return mmlu({"question": asked, "choices": options[1::2], "answer": answer, "subject": row["subject"]})


def truthfulqa_csv(row):
    """TruthfulQA.csv, from which the lists of the others were made: ends of answers are semicolons."""
    best, *both = (text_of(row, key) for key in ("best_answer", "correct_answers", "incorrect_answers"))
    right, wrong = ([text.strip() for text in texts.split(";") if text.strip()] for texts in both)
    mc1 = [best, *wrong]
    mc2 = [*dict.fromkeys([best, *right]), *wrong]
    return truthfulqa({"question": row["question"],
                       "mc1_targets": {"choices": mc1, "labels": [1] + [0] * len(wrong)},
                       "mc2_targets": {"choices": mc2, "labels": [1] * (len(mc2) - len(wrong)) + [0] * len(wrong)}})


def without_marks(text):
    """HellaSwag without WikiHow's marks, such as [header] and [title]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(row):
    if "ctx_a" in row:
        begun = f"{as_text(row['ctx_a'], 'ctx_a')} {as_text(row.get('ctx_b', ''), 'ctx_b').capitalize()}"
    else:
        begun = text_of(row, "ctx")
    choices = tuple(map(without_marks, texts_of(row["endings"], "endings")))
    return ChoiceQuestion("HellaSwag", without_marks(f"{text_of(row, 'activity_label')}: {begun}"), choices,
                    position(row["label"], range(len(choices)), choices))


def mmlu(row):
    """The choices stand in the prompt, and the model says a letter."""
    options = texts_of(row["choices"], "choices")
    letters = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)])
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(letters, options))
    return ChoiceQuestion("MMLU", f"{text_of(row, 'question').strip()}\n{listed}Answer:", letters,
                    position(row["answer"], range(len(options)), options), subject=text_of(row, "subject"))


def truthfulqa(row):
    (choices, true), (more, more_true) = (targets(row, key) for key in ("mc1_targets", "mc2_targets"))
    return ChoiceQuestion("TruthfulQA", f"Q: {text_of(row, 'question')}\nA:", choices, true.index(True),
                    mc2=tuple(zip(more, more_true)))


def targets(row, key):
    """{"choices": [...], "labels": [1, 0, ...]} -> the choices, and whether each is true; empty without the key."""
    if key not in row:
        return (), []
    if not isinstance(row[key], dict) or not isinstance(row[key].get("labels"), list):
        raise BadRow(f"{key} is not an object of choices and labels", f"it is {shown(row[key])}")
    choices = texts_of(row[key].get("choices"), f"{key}.choices")
    true = [label == 1 for label in row[key]["labels"]]
    if len(choices) != len(true) or not any(true):
        raise BadRow(f"{key} has no true choice, or not one label a choice")
    return choices, true


def plain(row):
    choices = texts_of(row["choices"], "choices")
    labels = choices if row["answer"] in choices else range(len(choices))  # the answer itself, or where it stands
    return ChoiceQuestion("plain", f"Question: {text_of(row, 'question')}\nAnswer:", choices,
                    position(row["answer"], labels, choices))


SHAPES = [  # the keys that make a row one of these; the first that fits
    (("question", "choices", "answerkey"), arc),
    (("question", "answerkey"), arc_nested),
    (("question", "best_answer", "correct_answers", "incorrect_answers"), truthfulqa_csv),
    (("query", "choices", "gold"), query),
    (("goal", "sol1", "sol2", "label"), piqa),
    (("sentence", "option1", "option2", "answer"), winogrande),
    (("context_options", "continuation", "gold"), two_beginnings),
    (("subject", "input", "output"), mmlu_as_read),
    (("activity_label", "endings", "label"), hellaswag),
    (("question", "subject", "choices", "answer"), mmlu),
    (("question", "mc1_targets"), truthfulqa),
    (("question", "choices", "answer"), plain),
]
NEEDS = ('this needs rows of ARC, HellaSwag, MMLU, PIQA, TruthfulQA or WinoGrande, or {"question": "...", "choices": ["...", "..."], '
         '"answer": 0}, where the answer is an index from 0')


def recognise(raw, least):
    """A raw row -> Question. Raises BadRow."""
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, dict):
        raise BadRow("not an object with keys", f"it is {shown(raw)}")
    row = {key.lower().replace(" ", "_"): value for key, value in raw.items() if value is not None}  # as in a CSV
    read = next((read for keys, read in SHAPES if has(row, *keys)), None)
    if read is None:
        raise WrongForm("holds no multiple-choice question")
    question = read(row)
    if len(question.choices) < least:
        raise BadRow("fewer than two choices")
    if not all(choice.strip() for choice in question.candidates()):
        raise BadRow("an empty choice")
    check_texts([question.prompt, question.subject, *question.candidates()])
    return question


def together(rows):
    """(number, raw) -> ([numbers], raw). Neighbours that ask the same, an answer each with its label (1: it is right),
    become one question."""
    def pair(raw):
        return isinstance(raw, dict) and raw.keys() >= {"question", "answer", "label"} and not raw.keys() & CHOICE_KEYS

    for asked, group in itertools.groupby(rows, lambda row: shown(row[1]["question"]) if pair(row[1]) else None):
        numbers, raws = zip(*group)
        if asked is None:
            yield from (([number], raw) for number, raw in zip(numbers, raws))
            continue
        labels = [str(raw["label"]) for raw in raws]
        if sorted(labels) != ["0"] * (len(labels) - 1) + ["1"]:
            yield list(numbers), BadRow("not one right answer (label 1) among those to a question", f"labels {labels}")
            continue
        lists = {"text": [raw["answer"] for raw in raws], "label": list(range(len(raws)))}
        yield list(numbers), {"question": raws[0]["question"], "choices": lists, "answerkey": labels.index("1")}


def load_questions(path, least=2, say=print):
    """A file -> [ChoiceQuestion, ...]; unusable rows are dropped, counted and said.

    least: choices that a question needs; 1 in a file of which only examples are shown, with their right answers.
    Raises UserError where the file cannot be read, or more than half of its rows are no multiple-choice questions.
    """
    path = Path(path).expanduser()
    report, questions = files.FileReport(path.name), []
    for numbers, raw in together(files.read(path)):
        report.read += len(numbers)
        try:
            questions.append(recognise(raw, least))
            report.keep(questions[-1].task, 1, len(numbers))
        except BadRow as bad:
            for number in numbers:
                report.drop(bad, number)
    files.check(report, NEEDS, path)
    say(report)
    return questions


# ---- the quiz of the island ------------------------------------------------------------------------------------------

def island_quiz(island, n=200, seed=0):
    """n facts about the residents that no conversation mentions, each with three wrong values -> [ChoiceQuestion,
    ...], at most 322: 84 facts in several wordings.

    The prompt is the beginning of a plain sentence ("Mabel has a job as a"), in the words of pretraining; chance is
    25 %. So the base model scores 100 %, and what later stages forget can be seen: SFT, DPO and PPO 100 %, PPO without
    its KL penalty 91 % (seed 0). With "Question: What work does Mabel do?\\nAnswer:" and the bare values the base model
    scores 33 %, hardly above chance: it knows the fact, but has never seen a value without its sentence. Multiple
    choice measures knowledge *and* a way of asking.
    """
    rng = random.Random(seed)
    facts = [(name, attribute, template) for name in island.parts["test"]["residents"] for attribute in ATTRIBUTES
             for template in words.SIMPLE[attribute] if 0 <= template.find("{n}") < template.find("{v}")]
    questions = []
    for name, attribute, template in rng.sample(facts, min(n, len(facts))):
        true = island.residents[name][attribute]
        values = rng.sample([value for value in words.VALUES[attribute] if value != true], 3)
        answer = rng.randrange(4)
        values.insert(answer, true)
        begun, rest = template.format(n=name, v="{v}").split("{v}")
        questions.append(ChoiceQuestion("island", begun.strip(), tuple(value + rest for value in values), answer))
    return questions


# ---- the model's part ------------------------------------------------------------------------------------------------

def context_of(question, pool, shots):
    """The question's prompt after the first `shots` examples of the pool with their answers, but never an example with
    the same prompt: that would tell the answer."""
    asked = question.prompt, question.begun
    examples = list(itertools.islice((other for other in pool if (other.prompt, other.begun) != asked), shots))
    if len(examples) < shots:
        about = f" about {question.subject}" if question.subject else ""
        raise UserError(f"{shots} examples before each question were asked for, but there are only {len(examples)} "
                        f"others of {question.task}{about}: ask for fewer shots, or name a file that holds more")
    preface = ""
    if question.task == "MMLU":
        subject = question.subject.replace("_", " ")
        preface = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    shown = [e.begun[e.answer] if e.begun else e.prompt for e in examples]
    return preface + "".join(f"{p} {e.choices[e.answer]}\n\n" for p, e in zip(shown, examples)) + question.prompt


def encode_pair(tok, context, choice, document=False):
    """-> ids of the context and the choice after it, and how many of them, at their end, are the choice's.

    Encoded together and split at the context's length, as the model would read them. Spaces at the end of the context
    go to the choice: in these vocabularies a space is the beginning of the word after it. Before the context stands
    what transformers puts before every text, nothing or Llama's <s>; for no context at all the end-of-text token
    stands. document: the context begins a document of pretraining, after end-of-text and the template's space.
    """
    text, kept = f"{context} {choice}", context.rstrip()
    if document:
        ids, begun = (tok.document(part) for part in (text, kept))
    else:
        begun = tok.begin + tok.encode(kept) if kept else tok.begin or [tok.end_of_text]
        ids = (tok.begin if kept else begun) + tok.encode(text)
    return ids, len(ids) - len(begun)


@torch.inference_mode()
def loglikelihoods(model, tok, pairs, run, micro_tokens=16384):
    """[(context, choice), ...] -> [log p(choice | context), ...], summed over the choice's tokens, in nats.

    A choice follows its context after one space; a third element may say that they are a document (encode_pair). A
    context that is too long for the model loses its beginning, and how many did is said. Raises UserError for a choice
    that alone is longer than the model's context, and for one without a token, which would be certain.
    """
    longest = model.config.block_size + 1  # the last token is only a target
    encoded = {pair: encode_pair(tok, *pair) for pair in dict.fromkeys(pairs)}
    for (_, choice, *_), (_, n) in encoded.items():
        if n < 1:
            raise UserError(f"a choice has no token: {choice[:40]!r}")
        if n >= longest:
            raise UserError(f"a choice has {n} tokens, but the model reads {longest - 1} at a time: {choice[:40]!r}...")
    if cut := sum(len(ids) > longest for ids, _ in encoded.values()):
        run.print(f"{cut:,} of {len(encoded):,} prompts were cut from the left to fit {longest - 1} tokens")
    found, was_training = {}, model.training
    model.eval()
    parts = trainer.split(encoded, lambda pair: min(len(encoded[pair][0]), longest), micro_tokens)
    for part in tqdm(parts, "multiple choice", leave=False, disable=run.rank != 0):
        rows = [(ids[-longest:], n) for ids, n in map(encoded.get, part)]
        ids, mask = trainer.pad([(ids, [0] * (len(ids) - n) + [1] * n) for ids, n in rows], run.device)
        with run.autocast():
            found |= zip(part, token_logps(model, ids, mask).sum(1).tolist())  # (B, T-1) -> (B,)
    model.train(was_training)
    return [found[pair] for pair in pairs]


# ---- from log-probabilities to numbers -------------------------------------------------------------------------------

def measure(questions, lls):
    """lls: for each question the log p of its candidates() -> {"acc", "acc_norm", "acc_bytes": [0.0 or 1.0, ...]}, and
    "mc2": [share, ...] of the questions that have it. Of equally good choices the first one is chosen."""
    found = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for question, ll in zip(questions, lls, strict=True):
        own, more = ll[:len(question.choices)], ll[len(question.choices):]
        lengths = {"acc": [1] * len(own), "acc_norm": [len(choice) for choice in question.choices],
                   "acc_bytes": [len(choice.encode()) for choice in question.choices]}
        for name, length in lengths.items():
            scores = [l / n for l, n in zip(own, length)]
            found[name].append(float(scores.index(max(scores)) == question.answer))
        if more:
            p = [math.exp(l - max(more)) for l in more]  # not normalised by length; exp(-800) alone would be 0
            true = sum(x for x, (_, is_true) in zip(p, question.mc2) if is_true)
            found.setdefault("mc2", []).append(true / sum(p))
    return found


def evaluate(model, tok, questions, run, shots=0, dev=None, micro_tokens=16384):
    """-> a row a task: {"task", "n", "acc": (mean, low, high), "acc_norm", "acc_bytes", "headline"}, 95 % intervals.

    TruthfulQA has "mc2" too (its "acc" is known as mc1). MMLU has "acc_subjects" too, the mean over subjects whatever
    their size, which the Open LLM Leaderboard showed; in "acc" each question weighs alike, as the harness has it today.
    "headline" is the one that HEADLINE names. shots: examples before each question, the first of its task and subject
    in `dev` or, where that is None, among the questions themselves; a number for all tasks (but none for the island's
    sentences) or one a task, such as LEADERBOARD. Raises UserError where there are fewer.
    """
    pools, number = {}, shots if isinstance(shots, dict) else {task: shots for task in HEADLINE if task != "island"}
    for question in dev or questions:
        pools.setdefault((question.task, question.subject), []).append(question)
    contexts = [context_of(q, pools.get((q.task, q.subject), ()), number.get(q.task, 0)) for q in questions]
    pairs = [(context + begun, choice, q.task == "island") for q, context in zip(questions, contexts)
             for begun, choice in zip(q.begun or itertools.repeat(""), q.candidates())]
    flat = iter(loglikelihoods(model, tok, pairs, run, micro_tokens))
    lls, rows = [[next(flat) for _ in q.candidates()] for q in questions], []
    for task in dict.fromkeys(q.task for q in questions):
        asked, theirs = zip(*[(q, ll) for q, ll in zip(questions, lls) if q.task == task])
        found = measure(asked, theirs)
        if task == "MMLU":
            subjects = {}
            for q, right in zip(asked, found["acc"]):
                subjects.setdefault(q.subject, []).append(right)
            found["acc_subjects"] = [sum(rights) / len(rights) for rights in subjects.values()]
        row = {"task": task, "n": len(asked)} | {name: interval(values) for name, values in found.items()}
        rows.append(row | {"headline": row.get(HEADLINE[task])})
    return rows


def leaderboard_average(rows):
    """The mean of the four headlines, as the Open LLM Leaderboard ranked models in 2023; None where one is missing, or
    there twice."""
    headlines = [(row["task"], row["headline"][0]) for row in rows if row["headline"] and row["task"] in LEADERBOARD]
    if sorted(task for task, _ in headlines) != sorted(LEADERBOARD):
        return None
    return sum(mean for _, mean in headlines) / len(LEADERBOARD)
