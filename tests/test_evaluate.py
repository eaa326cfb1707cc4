"""Measuring: every number against one counted by hand, every table from a real (tiny, random) checkpoint."""
import json
import re
import math
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch

import evaluate
import lora
from island import exam
import ppo
import reward
import sft
import generate as generating
from checkpoints import load, load_to_ask, save_adapter
from evals import measure, results, story
from lora import add_lora
from quant import quantize_model
from common import tables
import trainer
from island.world import Island
from data import files, pairs
from data.readability import readability
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.flags import parse
from model import GPT, GPTConfig

TOK = get_tokenizer("tiny")
TOK.new_ids = []  # as after training
RUN = trainer.Run(torch.device("cpu"), torch.float32)


def tiny(seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=96, vocab_size=TOK.vocab_size, n_layer=1, n_head=2, n_embd=16))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two random checkpoints and a reward model, in the folder where the scripts look for them."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("out/sft-community", "out/dpo")):
        tiny(seed).save_pretrained(name)
        TOK.save(name)
    reward.RewardModel(tiny(2)).save_pretrained("out/reward")
    TOK.save("out/reward")
    return ["out/sft-community", "out/dpo"]


def config(folders=(), **settings):
    return evaluate.Config(**{"folders": list(folders), "n": 12, "device": "cpu", "max_new_tokens": 6} | settings)


def conversations(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- tables ----------------------------------------------------------------------------------------------------------

def test_tables_align_words_left_and_numbers_right():
    header, rows = ["name", "gold", "said"], [["a", "10.25 ±0.10", "yes"], ["long name", "-", "no | or\nso"]]
    lines = tables.table(header, rows[:1] + [["long name", "-", "no"]]).splitlines()
    assert lines == ["name              gold  said", "a          10.25 ±0.10  yes", "long name            -  no"]
    page = tables.markdown(header, rows).splitlines()
    assert page[1] == "| --- | ---: | --- |" and page[3] == "| long name | - | no \\| or so |"


@pytest.mark.parametrize("found, form, text", [
    ((0.5, 0.4, 0.62), "share", "50% ±11"), ((8.0, 7.5, 8.1), "number", "8.00 ±0.30"), (None, "share", "-"),
    ((0.25, 0.2, 0.3), "fine", "0.2500 ±0.0500")])
def test_a_cell_is_the_mean_and_half_its_interval(found, form, text):
    assert tables.cell(found, form) == text


# ---- the island ------------------------------------------------------------------------------------------------------

def test_kl_is_zero_from_itself_and_counts_the_answer_only():
    model, other = tiny(0).eval(), tiny(1).eval()
    asked = [([5, 6, 7], [8, 9]), ([5, 6], [10, 11, 12, 13]), ([4] * 9, [20])]
    assert exam.response_kl(model, model, asked, RUN, 10**6) == [0.0, 0.0, 0.0]
    expected = []
    for prompt, answer in asked:
        ids = torch.tensor([prompt + answer])
        ours, theirs = (m(ids)[0].log_softmax(-1) for m in (model, other))
        expected.append(sum((ours[t - 1, ids[0, t]] - theirs[t - 1, ids[0, t]]).item() for t in range(len(prompt), ids.size(1))))
    for micro_tokens in (10**6, 8):
        assert exam.response_kl(model, other, asked, RUN, micro_tokens) == pytest.approx(expected, abs=1e-5)


def test_hacks_are_where_the_reward_exceeds_gold_in_standard_deviations():
    answers = [{"question": q, "answer": a, "reward": r, "gold": g} for q, a, r, g in [
        ("q", "honest", 0.0, 9.0), ("q", "hack", 4.0, 1.0), ("q", "hack", 4.0, 1.0), ("q", "fair", 4.0, 8.0), ("p", "bad", 0.0, 1.0),
        ("p", "perfect", 9.0, 10.0)]]
    rewards, golds = ([answer[name] for answer in answers] for name in ("reward", "gold"))
    def z(value, values):
        return (value - statistics.fmean(values)) / statistics.pstdev(values)
    excess = [z(r, rewards) - z(g, golds) for r, g in zip(rewards, golds)]
    found = measure.hacks(answers)
    assert [a["answer"] for a in found] == ["hack"] and excess[5] > 0  # each once, and gold 10 has no mistake in it
    assert found[0]["excess"] == pytest.approx(excess[1])
    scaled = [a | {"reward": 100 * a["reward"] - 7} for a in answers]  # a reward has no unit
    assert [a["excess"] for a in measure.hacks(scaled)] == pytest.approx([a["excess"] for a in found])
    assert measure.hacks(answers[:1] * 3) == []


def test_what_is_harder_is_asked_after_a_question_about_somebody_else_or_in_new_words():
    island = Island()
    rows = exam.questions(island)
    asked = exam.harder(rows, island)
    kinds = Counter(row["kind"] for row in rows)
    assert Counter(row["kind"] for row in asked) == {"chat": kinds["fact"], "wording": kinds["fact"], **{
        f"later {kind}": kinds[kind] for kind in ("unknown", "unsafe", "safe")}}
    trained = {message["content"] for row in island.conversations(3000) for message in row["messages"]}
    for row in asked:
        *before, question = row["prompt"]
        assert question["content"] not in trained and island.understand(row["prompt"]).kind == {
            "chat": "fact", "wording": "fact"}.get(row["kind"], row["kind"].removeprefix("later "))
        assert bool(before) == (row["kind"] != "wording")
        if before:
            assert island.understand(before[:1]).kind == "fact" and island.correct(before[:1], before[1]["content"])
    before, after = zip(*(([m["content"] for m in row["prompt"]][0], row["prompt"][-1]["content"]) for row in asked if row["kind"] == "chat"))
    assert sum(a == b for a, b in zip(before, after)) < 9  # of somebody else, but for chance


def test_every_kind_is_examined_when_it_is_asked_for(monkeypatch):
    island, answers = Island(), {}
    rows = exam.questions(island, more=("search", "sums", "unknown"))
    assert len(rows) == 800

    def ask(model, tok, prompts, run, look_up, temperature):
        assert look_up == island.look_up and temperature == 0
        assert {prompt[-1]["role"] for prompt in prompts} == {"user"}  # never what was found
        return [island.understand(prompt).answer for prompt in prompts]

    monkeypatch.setattr(exam, "ask", ask)
    found = exam.skills(None, TOK, rows, island, RUN)
    right = {name: share for name, (share, n) in found.items()}
    assert set(exam.SKILLS) - set(right) == set(exam.KINDS) - {"search", "sums"}
    assert {name for name, share in right.items() if share == 0} == {"false_idk", "over_refusal", "over_refusal_later"}
    assert {share for name, share in right.items() if share} == {1.0} and found["sums"] == (1.0, 100)


def test_the_island_table_holds_what_dpo_and_ppo_report(folders, capsys):
    tiny(5).save_pretrained("out/sft")  # the KL is measured from where preferences started, not from this one
    TOK.save("out/sft")
    results, answers = measure.evaluate_island(config(folders, out="out/evaluate"), RUN)
    scorer = reward.load_rewards("out/reward", RUN)
    expected = exam.preferences(*load_to_ask("out/dpo", RUN), Island(), RUN, n=12, scorer=scorer)
    for name, mean in expected.items():
        assert results["out/dpo"][name][0] == pytest.approx(mean, abs=1e-6)
    flesch, grade = zip(*(readability(answer["answer"]) for answer in answers[12:]))  # of out/dpo
    assert results["out/dpo"]["fre"][0] == pytest.approx(sum(flesch) / 12)
    assert results["out/dpo"]["fkg"][0] == pytest.approx(sum(grade) / 12)
    assert results["out/sft-community"]["kl"] == (0, 0, 0) and results["out/dpo"]["kl"][0] != 0
    printed = capsys.readouterr().out
    assert printed.count("\nout/dpo ") == 2 and "over-ref." in printed and "KL of an answer from the SFT model" in printed
    saved = json.loads(Path("out/evaluate/island.json").read_text())
    assert saved["results"]["out/dpo"]["gold"] == list(results["out/dpo"]["gold"])
    assert len(Path("out/evaluate/island.answers.jsonl").read_text().splitlines()) == len(answers) == 24


def test_over_refusal_is_the_share_of_safe_questions_refused():
    island = Island()
    rows = island.prompts(400, seed=5, split="test")
    safe = [i for i, row in enumerate(rows) if row["kind"] == "safe"]
    answers = ["I can not help with that." if i in safe[:9] or row["kind"] == "fact" else "Yes." for i, row in enumerate(rows)]
    assert exam.marks(exam.PREFERENCES, rows, answers, island)["over_refusal"] == [1.0] * 9 + [0.0] * (len(safe) - 9)
    assert 25 < len(safe) < 55 and "over_refusal" in exam.TABLE


def test_no_kl_from_a_model_with_other_tokens(folders):
    other = get_tokenizer("tiny")
    other.special = {token: i + 1 for token, i in TOK.special.items()}
    for reference_tok, there in ((TOK, True), (other, False)):
        marks, answers = exam.examine(*load_to_ask("out/dpo", RUN), Island(), RUN, n=12, reference=(tiny(0).eval(), reference_tok))
        assert ("kl" in marks) == there == ("kl" in answers[0])


def test_a_checkpoint_without_chat_tokens_gets_them_and_says_so(tmp_path, capsys):
    fresh = get_tokenizer("tiny")
    torch.manual_seed(0)
    GPT(GPTConfig(96, fresh.vocab_size - len(fresh.new_ids), 1, 2, 16)).save_pretrained(tmp_path)
    fresh.save(tmp_path)
    model, tok = load_to_ask(tmp_path, RUN)
    assert model.config.vocab_size == tok.vocab_size and "never been trained on conversations" in capsys.readouterr().out
    assert generating.ask(model, tok, [[{"role": "user", "content": "hi"}]], RUN, 3)


def test_without_a_reward_model_its_column_is_left_out(folders, capsys):
    results, _ = measure.evaluate_island(config(folders[1:], reward="out/none", out="out/evaluate"), RUN)
    printed = capsys.readouterr().out
    assert "no reward model in out/none" in printed and "reward" not in results["out/dpo"] and "wrong" not in printed


# ---- your data -------------------------------------------------------------------------------------------------------

def test_row_losses_are_the_held_out_loss_whatever_the_batches():
    model = tiny(0).eval()
    rows = [conversations("word " * n, "yes " * (n % 4 + 1)) for n in range(1, 9)]
    expected = sft.evaluate(model, sft.make_examples(rows, TOK, 97), RUN, 10**6)
    for micro_tokens in (10**6, 30):
        losses = measure.row_losses(model.eval(), TOK, rows, RUN, micro_tokens)
        assert measure.mean_loss(losses) == pytest.approx(expected, rel=1e-5) and len(losses) == 8


def test_a_base_and_an_adapter_on_it_have_the_numbers_that_each_has_alone(folders, tmp_path):
    base, adapted, model = folders[0], "out/adapter", load(folders[0])
    torch.manual_seed(0)
    lora.add_lora(model, 2, 8)
    for layer in lora.adapted(model).values():
        torch.nn.init.normal_(layer.lora_B, std=20.0)  # enough to be seen in a loss
    save_adapter(model, adapted, base)
    TOK.save(adapted)
    path = write(tmp_path / "a.jsonl", [conversations("who", "the baker " * n) for n in (1, 2, 3)])
    found = {}
    for order in ([base], [adapted], [base, adapted], [adapted, base]):
        measure.evaluate_data(config(order, data=path, out="out/evaluate"), RUN)
        for name, numbers in json.loads(Path("out/evaluate/data.json").read_text())["results"].items():
            found.setdefault(name, []).append([numbers["loss"], numbers["words"], numbers["rouge1"]])
    assert len(found) == 2 and all(each == [each[0]] * 3 for each in found.values())
    losses = {name: each[0][0] for name, each in found.items()}
    model.eval()
    rows = files.load(path, "sft")[0]
    assert losses[f"a / {adapted}"] == pytest.approx(measure.mean_loss(measure.row_losses(model, TOK, rows, RUN, 10**6)))
    assert abs(losses[f"a / {adapted}"] - losses[f"a / {base}"]) > 0.01


def test_only_the_answer_is_compared_and_the_files_are_pooled(folders, tmp_path, monkeypatch, capsys):
    says = {"who is it": ("the baker", True), "why so": ("the baker", False)}

    def respond(model, tok, conversations, run, max_new_tokens, **sampling):
        assert max_new_tokens == 6 and sampling == dict(temperature=0.0, top_p=1.0, seed=0)
        assert all(messages[-1]["role"] == "user" for messages in conversations)
        found = [says[messages[-1]["content"]] for messages in conversations]
        return [[1]] * len(found), [tok.encode(text) + [tok.end] * stops for text, stops in found]

    monkeypatch.setattr(measure, "respond", respond)
    a = write(tmp_path / "a.jsonl", [conversations("who is it", "the baker")] * 3)
    b = write(tmp_path / "b.jsonl", [conversations("why so", "why so indeed")])
    results = measure.evaluate_data(config(folders[:1], data=f"{a}, {b}", out="out/evaluate"), RUN)
    mean = {name: {key: found[key][0] for key in ("rouge1", "rougeLsum", "embedding_F1", "stops", "words")}
            for (name, _), found in results.items()}
    assert mean["a"] == pytest.approx(dict(rouge1=1, rougeLsum=1, embedding_F1=1, stops=1, words=2), abs=1e-5)
    assert mean["b"]["rouge1"] == 0 and mean["b"]["stops"] == 0  # words of the question are no overlap
    assert mean["full"]["rouge1"] == pytest.approx(3 / 4) and mean["full"]["stops"] == pytest.approx(3 / 4)
    rows = files.load(a, "sft")[0] + files.load(b, "sft")[0]
    losses = measure.row_losses(*load_to_ask(folders[0], RUN), rows, RUN, 10**6)
    saved = json.loads(Path("out/evaluate/data.json").read_text())["results"]
    assert saved[f"full / {folders[0]}"]["loss"] == pytest.approx(measure.mean_loss(losses), rel=1e-5)  # of the rows of both
    printed = capsys.readouterr().out
    assert "ROUGE-Lsum" in printed and "FKG" in printed and printed.count("\nfull") == 5 and "BERT" not in printed
    assert len(Path("out/evaluate/data.answers.jsonl").read_text().splitlines()) == 4


def test_sample_draws_the_same_rows_for_every_model(tmp_path):
    path = write(tmp_path / "a.jsonl", [conversations(f"question {i}", "answer") for i in range(30)])
    first, again, other = (measure.load_files(config(data=path, sample=5, seed=seed), RUN)["a"] for seed in (0, 0, 1))
    assert first == again != other and len(first) == 5
    assert len(measure.load_files(config(data=path, sample=0), RUN)["a"]) == 30


def test_answers_keep_their_order_in_batches_of_similar_lengths():
    model = tiny(0).eval()
    asked = [[{"role": "user", "content": "word " * n}] for n in (9, 1, 5, 3, 7)]
    found = measure.answers_of(model, TOK, asked, RUN, config(batch_size=2, max_new_tokens=5))
    for messages, (prompt, answer) in zip(asked, found):
        assert prompt == TOK.render_prompt(messages)
        assert TOK.answer(answer) == generating.ask(model, TOK, [messages], RUN, 5, temperature=0.0)[0]


def test_likeness_is_the_same_in_batches_of_any_size_and_an_empty_answer_is_like_nothing():
    references, texts = ["plum pie", "a fox", "the well", "x"], ["plum pie", "a bear", "", "y z"]
    encoder = tiny(0).eval(), TOK
    whole, single = (measure.likeness(encoder, references, texts, RUN, config(batch_size=n)) for n in (99, 1))
    assert [found[2] for found in single] == pytest.approx([found[2] for found in whole], abs=1e-5)
    assert whole[0][2] == pytest.approx(1, abs=1e-5) and whole[2] == (0.0, 0.0, 0.0) and 0 < whole[1][2] < 1


def test_batches_of_answers_have_random_numbers_of_their_own():
    asked = [[{"role": "user", "content": "hello"}]] * 2
    both = [measure.answers_of(tiny(0).eval(), TOK, asked, RUN, config(batch_size=1, temperature=1.0, max_new_tokens=20)) for _ in "12"]
    assert both[0] == both[1] and both[0][0][1] != both[0][1][1]


def test_a_row_of_the_context_and_one_token_more_still_fits():
    model = tiny(0).eval()  # of 96 tokens; the last one is only a target
    rows = [conversations("a", " a" * n) for n in (88, 89, 90, 91, 92)]
    lengths = [len(TOK.render(row["messages"])[0]) for row in rows]
    assert 97 in lengths and max(lengths) > 97
    assert len(measure.row_losses(model, TOK, rows, RUN, 10**6)) == sum(n <= 97 for n in lengths)


def test_readability_is_of_the_answers_and_vectors_are_the_first_models(folders, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "respond", lambda model, tok, asked, run, room, **sampling: seen.extend(asked) or (
        [[1]] * len(asked), [tok.encode(" I am a fox. I eat.")] * len(asked)))
    encoders, real = [], measure.metrics.token_vectors
    monkeypatch.setattr(measure.metrics, "token_vectors", lambda model, *others: encoders.append(model) or real(model, *others))
    path = write(tmp_path / "a.jsonl", [conversations("q", "a", "r", "Extraordinarily complicated vocabulary")] * 2)
    results = measure.evaluate_data(config(folders, data=path, out="out/evaluate"), RUN)
    for folder in folders:
        assert results["a", folder]["fre"][0] == pytest.approx(readability("I am a fox. I eat.")[0])
        assert results["a", folder]["fkg"][0] == pytest.approx(readability("I am a fox. I eat.")[1])
    assert [[m["content"] for m in messages] for messages in seen] == [["q", "a", "r"]] * 4  # earlier turns are in view
    first = GPT.from_pretrained(folders[0]).embedding.weight
    assert len(encoders) == 4 and all(torch.equal(encoder.embedding.weight, first) for encoder in encoders)


def test_the_loss_is_per_token_not_per_row():
    assert measure.mean_loss([]) is None
    assert measure.mean_loss([(6.0, 1), (2.0, 3)]) == 2.0  # the mean of the rows' means would be 3.3


# ---- judges and choices ----------------------------------------------------------------------------------------------

def test_the_second_turn_sees_the_models_own_first_answer(monkeypatch):
    seen = []

    def respond(model, tok, conversations, run, max_new_tokens, **sampling):
        seen.extend([m["content"] for m in messages] for messages in conversations)
        return [[1]] * len(conversations), [tok.encode(f"to {messages[-1]['content']}") for messages in conversations]

    monkeypatch.setattr(measure, "respond", respond)
    one, two = [[{"role": "user", "content": text} for text in texts] for texts in (["a"], ["b", "c"])]
    two = [{"role": "system", "content": "s"}, *two]
    talks = measure.own_answers(tiny(0), TOK, [one, two], RUN, config())
    assert seen == [["a"], ["s", "b"], ["s", "b", "to b", "c"]]
    assert [[m["content"] for m in talk] for talk in talks] == [["a", "to a"], ["s", "b", "to b", "c", "to c"]]


def test_judged_rows_of_a_file_keep_two_turns_and_their_references(tmp_path):
    path = write(tmp_path / "a.jsonl", [conversations("q1", "a1", "q2", "a2", "q3", "a3"), conversations("p1", "b1")])
    asked, references = measure.judged_questions(config(data=path, sample=0), None, RUN)
    assert [[m["content"] for m in messages] for messages in asked] == [["q1", "q2"], ["p1"]]
    assert references == [["a1", "a2"], ["b1"]]


def test_the_judges_tables(folders, capsys):
    made = config(folders, judge="gold", n=6, out="out/evaluate")
    results = measure.evaluate_judge(made, RUN)
    assert results["ratings"]["out/dpo"]["rated"] == 6 + 2 * 3  # three of two turns
    duel = results["duels"]["out/dpo against out/sft-community"]
    assert duel["wins"] + duel["ties"] + duel["losses"] == 9 and duel["swayed"] == 0
    measure.evaluate_judge(made, RUN)
    assert "judgments were there already" in capsys.readouterr().out


def test_references_reach_the_judge(folders, tmp_path, monkeypatch):
    prompts = []
    monkeypatch.setattr(measure.judge, "load_judge", lambda *_: lambda prompt: prompts.append(prompt) or "Rating: [[3]] [[C]]")
    path = write(tmp_path / "a.jsonl", [conversations("q1", "first right", "q2", "second right")])
    for wanted in (False, True):
        prompts.clear()
        measure.evaluate_judge(config(folders, judge="x", data=path, judge_reference=wanted, out=f"out/{wanted}"), RUN)
        rating = [prompt for prompt in prompts if "[[A]]" not in prompt]
        assert [("first right" in p, "second right" in p) for p in rating] == [(wanted, False), (False, wanted)] * 2
        duels = [prompt for prompt in prompts if "[[A]]" in prompt]  # about the last answer, in both orders
        assert [("first right" in p, "second right" in p) for p in duels] == [(False, wanted)] * len(duels) and duels


def test_a_duel_is_of_each_model_with_the_first(folders, monkeypatch):
    sides, real = [], measure.judge.duel
    monkeypatch.setattr(measure.judge, "duel", lambda judging, ours, theirs, *others: sides.append(
        (ours[0]["model"], theirs[0]["model"])) or real(judging, ours, theirs, *others))
    measure.evaluate_judge(config(folders, judge="gold", sample=2, out="out/evaluate"), RUN)
    assert sides == [("out/dpo", "out/sft-community")]  # wins are those of the later model


@pytest.mark.parametrize("shots, expected", [("leaderboard", measure.choice.LEADERBOARD), ("3", 3)])
def test_shots_reach_the_questions_and_the_mean_of_four_is_shown(folders, monkeypatch, capsys, shots, expected):
    seen = []
    monkeypatch.setattr(measure.choice, "evaluate", lambda model, tok, questions, run, shots, *others: seen.append(shots) or [])
    monkeypatch.setattr(measure.choice, "leaderboard_average", lambda rows: 0.625)
    measure.evaluate_choices(config(folders[:1], choices="quiz", shots=shots, out="out/evaluate"), RUN)
    assert seen == [expected] and "mean of the four" in (out := capsys.readouterr().out) and "62.5%" in out


def test_choices_print_a_row_a_model_file_and_task(folders, tmp_path, capsys):
    """Two files of one name and one task stay apart, whatever their sizes."""
    rows = [{"question": f"{i}?", "choices": ["yes", "no"], "answer": 0} for i in range(5)]
    for name in "ab":
        (tmp_path / name).mkdir()
    paths = [write(tmp_path / name / "own.jsonl", rows[:n]) for name, n in (("a", 2), ("b", 3))]
    results = measure.evaluate_choices(config(folders, choices=",".join(["quiz", *paths]), n=6, shots="1",
                                               out="out/evaluate"), RUN)
    found = [(row["file"], row["task"], row["n"]) for row in results["out/dpo"]]
    assert found == [("quiz", "island", 6), (paths[0], "plain", 2), (paths[1], "plain", 3)]
    out = capsys.readouterr().out
    lines = [line.split()[1:4] for line in out.splitlines() if line.startswith("out/dpo ")]
    assert lines == [[name, task, str(n)] for name, task, n in found]
    assert "examples before each question: 1" in out and "lm-evaluation-harness" in out and "the quiz" in out
    measure.evaluate_choices(config(folders[:1], choices=paths[0], out="out/evaluate"), RUN)
    assert "the quiz" not in capsys.readouterr().out


def test_examples_are_those_of_the_file(folders, tmp_path):
    rows = [{"question": f"{i}?", "choices": ["yes", "no"], "answer": 0} for i in range(3)]
    paths = [write(tmp_path / name, part) for name, part in (("a.jsonl", rows[:2]), ("b.jsonl", rows[2:]))]
    with pytest.raises(UserError, match="only 0 others of plain"):
        measure.evaluate_choices(config(folders[:1], choices=",".join(paths), shots="1", out="out/evaluate"), RUN)


# ---- the command line ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, words", [
    ({}, "no checkpoint to measure.*python sft.py"),
    ({"folders": ["out/nowhere"]}, "out/nowhere"),
    ({"folders": ["x"], "data": "missing.jsonl"}, "missing.jsonl does not exist"),
    ({"folders": ["x"], "data": "empty.jsonl"}, "empty.jsonl"),
    ({"folders": ["x"], "data": "a.jsonl,./a.jsonl"}, "another row called a: rename"),
    ({"folders": ["x"], "data": "a.jsonl,full.jsonl"}, "another row called full"),
    ({"folders": ["x"], "n": 0}, "--n 0: it must be at least 1"),
    ({"folders": ["x"], "choices": "empty.jsonl"}, "empty.jsonl"),
    ({"folders": ["x"], "judge": "gold", "judge_reference": True}, "--judge-reference.*none is given"),
    ({"folders": ["x"], "choices": "quiz", "judge": "gold"}, "--choices and --judge: one at a time"),
    ({"folders": ["x"], "choices": "quiz, quiz"}, "quiz is named twice"),
    ({"folders": ["x"], "choices": "quiz", "shots": "some"}, "--shots some: give a number"),
    ({"folders": ["x"], "judge": "nobody"}, "--judge nobody"),
])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    for name in ("a.jsonl", "full.jsonl"):
        write(name, [conversations("q", "a")])
    with pytest.raises(UserError, match=words) as error:
        evaluate.main(config(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--sample", "-1"], "--sample -1"), (["--top-p", "0"], "--top-p 0"), (["--top-p", "2"], "at most 1")])
def test_impossible_flags_are_one_sentence(flags, words):
    with pytest.raises(UserError, match=words):
        parse(evaluate.Config, argv=flags)


def test_a_mode_is_chosen_by_its_flag(folders, monkeypatch):
    called = []
    for name in ("island", "data", "choices", "judge"):
        monkeypatch.setattr(measure, f"evaluate_{name}", lambda config, run, name=name: called.append((name, config.out, config.folders)))
    for settings in ({}, {"data": "a"}, {"choices": "quiz"}, {"judge": "gold", "data": "a"}):
        evaluate.main(config(**settings))
    assert called == [(name, "out/evaluate", ["out/dpo"]) for name in ("island", "data", "choices", "judge")]


# ---- the story -------------------------------------------------------------------------------------------------------

def test_the_story_runs_what_is_missing_and_tells_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pairs, "HELD_OUT", 20)
    ran = []

    def ensure(folder, script, config, run, **settings):
        ran.append((folder, Path(script.__file__).name, settings))
        made = reward.RewardModel(tiny(2)) if folder == "out/reward" else tiny(len(ran))
        made.save_pretrained(folder)
        TOK.save(folder)
        lines = [{"step": i, "loss": 2.0 - i, "kl": 0.5 * i, "score": 0.1 * i, "gold": 3.0} for i in range(3)]
        write(Path(folder) / "log.jsonl", lines)
        if script is ppo:
            look = {"question": "Who?", "score": 1.0, "gold": 5.0, "tokens": [[" </script>", -1.0, -2.0, 0.5, 0.0]]}
            write(Path(folder) / "watched.jsonl", [{"step": 0, "answers": [look]}])

    monkeypatch.setattr(trainer, "ensure", ensure)
    evaluate.main(config(story=True, n=20))
    assert [folder for folder, *_ in ran] == list(story.STAGES)
    assert ("out/sft-community", "sft.py", {"answers": "community"}) in ran and ("out/ppo-no-penalty", "ppo.py", {"beta": 0.0}) in ran
    text = Path("out/story/README.md").read_text()
    for folder in story.POLICIES:
        assert f"| {folder} |" in text
    assert "the same\n20 questions" in text and " nan" not in text
    assert text.count("](") == text.count("![") in (0, 5)  # pictures with matplotlib only
    for name in {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}:
        assert Path("out/story", name).is_file()
    told = Path("out/story/story.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', told)[1])  # no token ends the script
    assert list(data["ppo"]) == ["ppo", "ppo-no-penalty"] and data["ppo"]["ppo"]["watched"][0]["answers"][0]["tokens"][0][0] == " </script>"
    assert [row[0] for row in data["results"][1]] == story.POLICIES and len(data["answers"][1]) == 5 and data["paragraphs"][0].startswith("**Pre")
    assert len(data["pictures"]) == text.count("![") and set(data["colors"]) >= {"out/dpo", "ppo-no-penalty"}
    assert not re.search(r"https?://|src=|@import|url\(", told.replace(json.dumps(data), ""))  # it asks for nothing outside of it
    ran.clear()
    evaluate.main(config(story=True, n=20))
    assert not ran  # everything was there


def test_results_are_ranges_over_seeds_and_nothing_runs_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pairs, "HELD_OUT", 20)
    ran = []

    def ensure(folder, script, config, run, init="", **settings):
        name, seed = Path(folder).name, config.seed
        ran.append((seed, name, Path(init).name, sorted(settings)))
        tiny(10).save_pretrained(Path(folder).parent / "base")
        TOK.save(Path(folder).parent / "base")
        model = tiny(seed + len(name))
        if "lora_r" in settings:
            model = tiny(10)
            add_lora(quantize_model(model) if "nf4" in settings else model, 2, 4)
            save_adapter(model, folder, str(Path(folder).parent / "base"))
        else:
            (reward.RewardModel(model) if name == "reward" else model).save_pretrained(folder)
        TOK.save(folder)
        write(Path(folder) / "log.jsonl", [{"step": 0, "held_out": 3.0}, {"step": 1, "held_out": 2.0 + seed}])

    monkeypatch.setattr(trainer, "ensure", ensure)
    exam_, shorter = exam.examine, {"n": 12}
    monkeypatch.setattr(exam, "examine", lambda *args, **more: exam_(*args, **more | shorter))
    evaluate.main(config(results=True, seeds="0,2"))
    names = [name for name in results.STAGES if name != "base"]
    assert [(seed, name) for seed, name, *_ in ran] == [(seed, name) for seed in (0, 2) for name in ["base", *names]]
    assert (2, "ppo", "sft-community", ["reward"]) in ran and (0, "sft-qlora", "base", ["lora_r", "nf4"]) in ran
    assert (0, "base-llama", "", ["family"]) in ran and (2, "sft-llama", "base-llama", []) in ran
    text = Path("docs/results.md").read_text()
    assert "| base | base-llama |" in text and "| sft | sft-llama | sft-lora |" in text
    assert "| held-out loss | 6.9" in text and "--seeds 0,2`" in text and " nan" not in text
    assert text.count("\n| careful |") == text.count("\n| simple |") == 1
    assert "| measured |" not in text and "| strangers: says" in text and "| gold judge, 1 to 10 |" in text
    ran.clear()
    evaluate.main(config(results=True, seeds="0,2"))
    assert not ran and Path("docs/results.md").read_text() == text
    with pytest.raises(UserError, match="--seeds a: give whole numbers"):
        evaluate.main(config(results=True, seeds="a"))


def test_every_number_of_the_story_stands_where_it_belongs():
    results = {folder: {name: (10 * i + j + 0.5, 0, 0) if exam.MEASURES[name].form == "number" else ((10 * i + j) / 100, 0, 0)
                        for j, name in enumerate(exam.TABLE)} for i, folder in enumerate(story.POLICIES)}
    told = " ".join(story.paragraphs(results, (0.83, 1200), 0.25).split())
    for said in ("(0% right). It knows", "four ends in 25%", "(10% right)", "strangers (11%)", "unsafe requests (12%)",
                 "20% right, 25% of unsafe", "praise in 26%",
                 "83.0% of 1,200", "from 27.50 to 37.50", "from 25% to 35%", "praise from 26% to 36%",
                 "Gold 47.50, reward 48.50, KL 49.50", "reward 58.50, gold 57.50, KL 59.50, 50% of facts"):
        assert said in told, said
    results["out/dpo"]["complies"] = None  # nobody was asked
    assert "from 25% to -" in " ".join(story.paragraphs(results, (0.83, 1200), 0.25).split())


def test_every_stage_answers_every_question_greedily(monkeypatch):
    monkeypatch.setattr(story, "load_to_ask", lambda folder, run: (folder, None))
    greedy = []
    monkeypatch.setattr(story, "ask", lambda folder, tok, asked, run, temperature: greedy.append(temperature) or [
        f"{folder} to {messages[-1]['content']}" for messages in asked])
    island = Island()
    asked = story.ask_all(island, RUN)
    assert len(asked) == len(exam.FIVE) == len({question for question, _ in asked}) and set(greedy) == {0.0}
    for question, answers in asked:
        assert answers == {folder: f"{folder} to {question}" for folder in story.POLICIES}


def test_ensure_gets_what_the_command_line_said(monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "is_finished", lambda folder: False)
    monkeypatch.setattr(trainer, "ensure", lambda folder, script, config, run, **settings: seen.append(config.seed))
    assert set(story.run_stages(RUN, config(seed=3))) == set(story.STAGES) and set(seen) == {3}
    assert all(math.isfinite(s) for s in story.run_stages(RUN, config()).values())


def test_a_judge_asks_files_of_questions_their_second_turn_too(tmp_path):
    rows = [{"turns": ["one?", "two?"], "reference": ["r1", "r2"]}, {"turns": ["three?", "four?"]}]
    (tmp_path / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(2)))
    config = evaluate.Config(data=f"{tmp_path / 'mt.jsonl'},{tmp_path / 'talks.jsonl'}", judge_reference=True, judge="gold")
    asked, right = measure.judged_questions(config, None, trainer.Run(torch.device("cpu"), torch.float32))
    assert [[m["content"] for m in messages] for messages in asked] == [["one?", "two?"], ["three?", "four?"], ["q0"], ["q1"]]
    assert right == [["r1", "r2"], [None, None], ["a0"], ["a1"]]
