"""Beside lm-evaluation-harness: its own tasks on our rows, its own arithmetic, its own loglikelihood of our model."""
import random
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

import datasets
import transformers
from lm_eval.api.metrics import aggregate_subtask_metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from evals import choice
import trainer
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig

TASKS = Path(lm_eval.__file__).parent / "tasks"
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


def test_loglikelihoods_of_a_model(tmp_path):
    """The same folder read by both. What a document begins with here is written out for the harness."""
    tok = get_tokenizer("tiny")
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=48, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=32))
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.save_pretrained(tmp_path)
    tok.save(tmp_path)
    theirs = HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
                  tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path), batch_size=3, max_length=48)
    rng = random.Random(0)
    pairs = [(phrase(rng, 30) + rng.choice([":", "", " ", "\n"]), phrase(rng, 6)) for _ in range(40)]
    assert 3 < sum(len(choice.encode_pair(tok, *pair)[0]) > 49 for pair in pairs) < 37  # some are cut, some are not
    requests = [lm_eval.api.instance.Instance("loglikelihood", {}, (f"<|endoftext|> {context}", f" {text}"), i)
                for i, (context, text) in enumerate(pairs)]
    expected = [ll for ll, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    assert choice.loglikelihoods(ours, tok, pairs, RUN, micro_tokens=200) == pytest.approx(expected, rel=1e-5, abs=1e-4)
