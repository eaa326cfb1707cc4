"""Beside lm-evaluation-harness: its own tasks on our rows, its own arithmetic, its own loglikelihood of our model."""
import csv
import io
import json
import random
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

import datasets
import tokenizers
import transformers
from lm_eval.api.metrics import aggregate_subtask_metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from evals import choice
import trainer
from data.tokenizer import get_tokenizer
from model import GPT

TASKS = Path(lm_eval.__file__).parent / "tasks"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
RUN = trainer.Run(torch.device("cpu"), torch.float32)
WORDS = "the a Two 12 naïve cat's 東京 it, is? [header] [title] no. \u00e9e well-known".split(" ")


def phrase(rng, longest=8):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def arc(rng):
    labels = list(rng.choice(["ABCDE", "12345"])[:rng.randint(2, 5)])
    return {"question": phrase(rng), "choices": {"text": [phrase(rng) for _ in labels], "label": labels},
            "answerKey": rng.choice(labels)}


def hellaswag(rng):
    return {"activity_label": phrase(rng, 2), "ctx_a": phrase(rng), "ctx_b": rng.choice(["", phrase(rng)]), "ctx": "",
            "endings": ["x " + phrase(rng) for _ in range(4)], "label": str(rng.randrange(4))}


def mmlu(rng):
    return {"question": f" {phrase(rng)}\n", "subject": "abstract_algebra", "choices": [phrase(rng) for _ in range(4)],
            "answer": rng.randrange(4)}


def truthfulqa(rng):
    first, n = [phrase(rng) for _ in range(rng.randint(2, 5))], rng.randint(2, 7)
    more = [1] + [rng.randrange(2) for _ in range(n)]
    return {"question": phrase(rng), "mc1_targets": {"choices": first, "labels": [1] + [0] * (len(first) - 1)},
            "mc2_targets": {"choices": [phrase(rng) for _ in more], "labels": more}}


KINDS = {"ARC": ("arc/arc_challenge", arc), "HellaSwag": ("hellaswag/hellaswag", hellaswag),
         "MMLU": ("mmlu/default/mmlu_abstract_algebra", mmlu), "mc1": ("truthfulqa/truthfulqa_mc1", truthfulqa),
         "mc2": ("truthfulqa/truthfulqa_mc2", truthfulqa)}


def harness(kind, rows, shots):
    """The harness's task on these rows, which are its examples too -> the task, its rows, [(prompt, choices), ...]."""
    config = load_yaml(TASKS / f"{KINDS[kind][0]}.yaml")
    config |= {"custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)),
               "training_split": None, "validation_split": None, "test_split": "test", "num_fewshot": shots,
               "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}, "metadata": {}}
    if kind != "mc2":
        config["metric_list"] = [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                                 for name in ("acc", "acc_norm", "acc_bytes")]
    task = ConfigurableTask(config=config)
    task.build_all_requests(rank=0, world_size=1)
    asked = {}
    for instance in task.instances:
        prompt, continuation = instance.args
        asked.setdefault(instance.doc_id, (prompt, []))[1].append(continuation)
    return task, list(task.eval_docs), list(asked.values())


def some_lls(rng, choices):
    """Log-probabilities near and far from 0: alike, so that there are ties, or about as long as their texts."""
    scale, by_length = rng.choice([0.1, 1, 10]), rng.random() < 0.5
    return [-scale * (len(text) * rng.uniform(0.9, 1.1) if by_length else rng.randint(1, 4)) for text in choices]


@pytest.mark.parametrize("kind, shots", [("ARC", 0), ("ARC", 3), ("HellaSwag", 0), ("HellaSwag", 2), ("MMLU", 0),
                                         ("MMLU", 5), ("mc1", 0), ("mc2", 0)])
def test_prompts_and_measures(kind, shots):
    rng = random.Random(f"{kind} {shots}")
    rows = [KINDS[kind][1](rng) for _ in range(40)]
    task, docs, asked = harness(kind, rows, shots)
    ours = [choice.recognise(row, 2) for row in rows]
    examples, before = ours, shots
    if kind.startswith("mc"):  # its six fixed questions come with the harness, not with this project
        *fixed, _ = asked[0][0].split("\n\n")
        assert len(fixed) == 6
        pairs = [text.removeprefix("Q: ").split("\nA: ") for text in fixed]
        examples, before = [choice.recognise({"question": q, "mc1_targets": {"choices": [a], "labels": [1]}}, 1)
                            for q, a in pairs], 6
    for question, doc, (prompt, continuations) in zip(ours, docs, asked, strict=True):
        assert choice.context_of(question, examples, before) == prompt
        theirs = question.candidates()[len(question.choices):] if kind == "mc2" else question.choices
        assert [f" {text}" for text in theirs] == continuations
        lls = some_lls(rng, theirs)
        expected = task.process_results(doc, [(ll, False) for ll in lls])
        found = choice.measure([question], [[0.0] * len(question.choices) + lls if kind == "mc2" else
                                            lls + [-1.0] * len(question.mc2)])
        if kind == "mc2":
            assert found["mc2"] == [pytest.approx(expected["acc"], abs=1e-12)]
        else:
            assert {name: values[0] for name, values in found.items() if name != "mc2"} == expected


def test_means_over_subjects(monkeypatch):
    rng = random.Random(0)
    questions = [choice.ChoiceQuestion("MMLU", f"{i}\nAnswer:", ("A", "B"), rng.randrange(2), subject)
                 for subject, n in (("law", 5), ("biology", 1), ("art", 14)) for i in range(n)]
    monkeypatch.setattr(choice, "loglikelihoods", lambda *args: [0.0, -1.0] * len(questions))
    row, = choice.evaluate(None, None, questions, RUN)
    means, sizes = zip(*[(sum(q.answer == 0 for q in of) / len(of), len(of)) for subject in ("law", "biology", "art")
                         if (of := [q for q in questions if q.subject == subject])])
    assert row["acc"][0] == pytest.approx(aggregate_subtask_metrics(means, sizes, weight_by_size=True))
    assert row["acc_subjects"][0] == pytest.approx(aggregate_subtask_metrics(means, sizes, weight_by_size=False))
    assert row["acc"][0] != pytest.approx(row["acc_subjects"][0])


# ---- log-likelihoods of a model in a folder --------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["tiny", "trained", "Llama's", "GPT-2's"])
def both(request, tmp_path_factory):
    """A random GPT-2 that transformers made, a tokenizer beside it -> our model and tokenizer, and the harness's model.

    trained: a tokenizer by the library, which lower-cases; Llama's: with <s> before every text and a space of its own.
    """
    folder = tmp_path_factory.mktemp("gpt2")
    if request.param == "GPT-2's" and not SHARED.exists():
        pytest.skip("../shared/data is not here")
    if request.param in ("tiny", "GPT-2's"):
        get_tokenizer("tiny" if request.param == "tiny" else str(SHARED / "gpt2.tiktoken")).save(folder)
    else:
        trained(llama=request.param == "Llama's").save(str(folder / "tokenizer.json"))
        get_tokenizer(str(folder)).save(folder)
    tok = get_tokenizer(str(folder))
    torch.manual_seed(0)
    random_gpt2 = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(
        vocab_size=tok.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    for p in random_gpt2.parameters():
        torch.nn.init.normal_(p, std=0.3)
    random_gpt2.save_pretrained(folder)
    theirs = HFLM(pretrained=str(folder), batch_size=3, device="cpu", dtype="float32")
    assert theirs.max_length == 64
    return GPT.from_pretrained(folder), tok, theirs


def trained(llama):
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer, steps = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers
    made.pre_tokenizer = steps.Metaspace() if llama else steps.ByteLevel(add_prefix_space=False)
    made.train_from_iterator([" ".join(WORDS)] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>"] + [f"<0x{b:02X}>" for b in range(256)] * llama,
        initial_alphabet=[] if llama else steps.ByteLevel.alphabet(), show_progress=False))
    if llama:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def assert_equal(both, pairs):
    model, tok, theirs = both
    requests = [lm_eval.api.instance.Instance("loglikelihood", {}, (context, f" {text}"), i)
                for i, (context, text) in enumerate(pairs)]
    expected = [ll for ll, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    assert choice.loglikelihoods(model, tok, pairs, RUN, micro_tokens=300) == pytest.approx(expected, rel=0, abs=1e-4)


def test_loglikelihoods(both):
    """Empty contexts, contexts that are longer than the window, spaces at their ends, characters of several bytes."""
    rng = random.Random(0)
    pairs = [(phrase(rng, 90) + rng.choice([":", "", " ", "\n", "  \n"]), phrase(rng, 6)) for _ in range(60)]
    pairs += [("", phrase(rng, 6)) for _ in range(8)]
    pairs += [("\u6771\U0001f642", "\U0001f642\u4eac"), ("x\u00e9", "\u00e9 x")]
    lengths = [len(choice.encode_pair(both[1], *pair)[0]) for pair in pairs]
    assert 3 < sum(length > 65 for length in lengths) < len(pairs) - 3  # some are cut, some are not
    assert_equal(both, pairs)


def rows_of(name):
    """The first rows of a public file -> [(context, choice), ...], its own prompts or the harness's."""
    text = (SHARED / "shapes" / name).read_text(encoding="utf-8")
    if name == "truthfulqa.csv":
        for row in csv.DictReader(io.StringIO(text)):
            for key in ("Correct Answers", "Incorrect Answers"):
                yield from ((f"Q: {row['Question']}\nA:", answer) for answer in row[key].split("; ") if answer)
        return
    for row in map(json.loads, text.splitlines()):
        if name == "hellaswag.jsonl":
            question = choice.recognise(row, 2)
            yield from ((question.prompt, ending) for ending in question.choices)
        elif name == "mmlu_val.json":
            yield from ((row["input"], letter) for letter in "ABCD")
        elif name == "winogrande.jsonl":
            yield from ((context, row["continuation"]) for context in row["context_options"])
        else:
            yield from ((f"{row['query']}\nAnswer:", text) for text in row["choices"])


@pytest.mark.parametrize("name", ["arc_easy.jsonl", "hellaswag.jsonl", "mmlu_val.json", "piqa.jsonl", "truthfulqa.csv",
                                  "winogrande.jsonl"])
def test_loglikelihoods_of_public_rows(both, name):
    if not SHARED.exists():
        pytest.skip("../shared/data is not here")
    pairs = [(context, text) for context, text in rows_of(name) if len(both[1].encode(text)) < 60]
    assert len(pairs) >= 20
    assert_equal(both, pairs)
