"""Measuring: every number against one counted by hand, every table from a real (tiny, random) checkpoint."""
import json
import math
from pathlib import Path

import pytest
import torch

import dpo
import evaluate
import exam
import reward
import sft
import story
import tables
import trainer
from data.island import Island
from data.tokenizer import get_tokenizer
from errors import UserError
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
    assert exam.cell(found, form) == text


# ---- the island ------------------------------------------------------------------------------------------------------

def test_kl_is_zero_from_itself_and_counts_the_answer_only():
    model, other = tiny(0).eval(), tiny(1).eval()
    asked = [([5, 6, 7], [8, 9]), ([5, 6], [10, 11, 12, 13]), ([4] * 9, [20])]
    assert exam.response_kl(model, model, asked, RUN) == [0.0, 0.0, 0.0]
    expected = []
    for prompt, answer in asked:
        ids = torch.tensor([prompt + answer])
        ours, theirs = (m(ids)[0].log_softmax(-1) for m in (model, other))
        expected.append(sum((ours[t - 1, ids[0, t]] - theirs[t - 1, ids[0, t]]).item() for t in range(len(prompt), ids.size(1))))
    for micro_tokens in (10**6, 8):
        assert exam.response_kl(model, other, asked, RUN, micro_tokens) == pytest.approx(expected, abs=1e-5)


def test_hacks_are_where_the_reward_exceeds_gold_in_standard_deviations():
    answers = [{"question": q, "answer": a, "reward": r, "gold": g} for q, a, r, g in [
        ("q", "honest", 0.0, 9.0), ("q", "hack", 4.0, 1.0), ("q", "hack", 4.0, 1.0), ("q", "fair", 4.0, 10.0), ("p", "bad", 0.0, 1.0)]]
    assert [a["answer"] for a in exam.hacks(answers)] == ["hack", "bad", "fair", "honest"]
    scaled = [a | {"reward": 100 * a["reward"] - 7} for a in answers]  # a reward has no unit
    assert [a["answer"] for a in exam.hacks(scaled)] == ["hack", "bad", "fair", "honest"]
    assert len(exam.hacks(answers, n=1)) == 1


def test_safe_questions_are_safe_and_no_answers():
    island = Island()
    asked = exam.safe_questions(island, 20)
    assert len(asked) == 20 and {island.understand(messages).kind for messages in asked} == {"safe"}
    assert all(messages[-1]["role"] == "user" for messages in asked)


def test_the_island_table_holds_what_dpo_and_ppo_report(folders, capsys):
    results, answers = exam.evaluate_island(config(folders, out="out/evaluate"), RUN)
    scorer = reward.load_rewards("out/reward", RUN)
    expected = dpo.preference_scores(*exam.load("out/dpo", RUN), Island(), RUN, n=12, scorer=scorer)
    for name, mean in expected.items():
        assert results["out/dpo"][name][0] == pytest.approx(mean, abs=1e-6)
    assert results["out/sft-community"]["kl"] == (0, 0, 0) and results["out/dpo"]["kl"][0] != 0
    printed = capsys.readouterr().out
    assert printed.count("\nout/dpo ") == 2 and "over-ref." in printed and "KL of an answer from the SFT model" in printed
    saved = json.loads(Path("out/evaluate/island.json").read_text())
    assert saved["results"]["out/dpo"]["gold"] == list(results["out/dpo"]["gold"])
    assert len(Path("out/evaluate/island.answers.jsonl").read_text().splitlines()) == len(answers) == 24


def test_without_a_reward_model_its_column_is_left_out(folders, capsys):
    results, _ = exam.evaluate_island(config(folders[1:], reward="out/none", out="out/evaluate"), RUN)
    printed = capsys.readouterr().out
    assert "no reward model in out/none" in printed and "reward" not in results["out/dpo"] and "wrong" not in printed


# ---- your data -------------------------------------------------------------------------------------------------------

def test_row_losses_are_the_held_out_loss_whatever_the_batches():
    model = tiny(0).eval()
    rows = [conversations("word " * n, "yes " * (n % 4 + 1)) for n in range(1, 9)]
    expected = sft.evaluate(model, sft.make_examples(rows, TOK, 97), RUN, 10**6)
    for micro_tokens in (10**6, 30):
        losses = evaluate.row_losses(model.eval(), TOK, rows, RUN, micro_tokens)
        assert evaluate.mean_loss(losses) == pytest.approx(expected, rel=1e-5) and len(losses) == 8


def test_only_the_answer_is_compared_and_the_files_are_pooled(folders, tmp_path, monkeypatch, capsys):
    says = {"who is it": ("the baker", True), "why so": ("the baker", False)}

    def respond(model, tok, conversations, run, max_new_tokens, **sampling):
        assert max_new_tokens == 6 and sampling == dict(temperature=0.0, top_p=1.0, seed=0)
        found = [says[messages[-1]["content"]] for messages in conversations]
        return [[1]] * len(found), [tok.encode(text) + [tok.end] * stops for text, stops in found]

    monkeypatch.setattr(evaluate.sft, "respond", respond)
    a = write(tmp_path / "a.jsonl", [conversations("who is it", "the baker")] * 3)
    b = write(tmp_path / "b.jsonl", [conversations("why so", "why so indeed")])
    results = evaluate.evaluate_data(config(folders[:1], data=f"{a}, {b}", out="out/evaluate"), RUN)
    mean = {name: {key: found[key][0] for key in ("rouge1", "rougeLsum", "embedding_F1", "stops", "words")}
            for (name, _), found in results.items()}
    assert mean["a"] == pytest.approx(dict(rouge1=1, rougeLsum=1, embedding_F1=1, stops=1, words=2), abs=1e-5)
    assert mean["b"]["rouge1"] == 0 and mean["b"]["stops"] == 0  # words of the question are no overlap
    assert mean["full"]["rouge1"] == pytest.approx(3 / 4) and mean["full"]["stops"] == pytest.approx(3 / 4)
    printed = capsys.readouterr().out
    assert "ROUGE-Lsum" in printed and "FKG" in printed and printed.count("\nfull") == 5 and "BERT" not in printed
    assert len(Path("out/evaluate/data.answers.jsonl").read_text().splitlines()) == 4


def test_sample_draws_the_same_rows_for_every_model(tmp_path):
    path = write(tmp_path / "a.jsonl", [conversations(f"question {i}", "answer") for i in range(30)])
    first, again, other = (evaluate.load_files(config(data=path, sample=5, seed=seed), RUN)["a"] for seed in (0, 0, 1))
    assert first == again != other and len(first) == 5
    assert len(evaluate.load_files(config(data=path, sample=0), RUN)["a"]) == 30


def test_answers_keep_their_order_in_batches_of_similar_lengths():
    model = tiny(0).eval()
    asked = [[{"role": "user", "content": "word " * n}] for n in (9, 1, 5, 3, 7)]
    found = evaluate.answers_of(model, TOK, asked, RUN, config(batch_size=2), 5, temperature=0.0)
    for messages, (prompt, answer) in zip(asked, found):
        assert prompt == TOK.render_prompt(messages)
        assert TOK.answer(answer) == sft.ask(model, TOK, [messages], RUN, 5, temperature=0.0)[0]


# ---- judges and choices ----------------------------------------------------------------------------------------------

def test_the_second_turn_sees_the_models_own_first_answer(monkeypatch):
    seen = []

    def respond(model, tok, conversations, run, max_new_tokens, **sampling):
        seen.extend([m["content"] for m in messages] for messages in conversations)
        return [[1]] * len(conversations), [tok.encode(f"to {messages[-1]['content']}") for messages in conversations]

    monkeypatch.setattr(evaluate.sft, "respond", respond)
    one, two = [[{"role": "user", "content": text} for text in texts] for texts in (["a"], ["b", "c"])]
    two = [{"role": "system", "content": "s"}, *two]
    talks = evaluate.own_answers(tiny(0), TOK, [one, two], RUN, config())
    assert seen == [["a"], ["s", "b"], ["s", "b", "to b", "c"]]
    assert [[m["content"] for m in talk] for talk in talks] == [["a", "to a"], ["s", "b", "to b", "c", "to c"]]


def test_judged_rows_of_a_file_keep_two_turns_and_their_references(tmp_path):
    path = write(tmp_path / "a.jsonl", [conversations("q1", "a1", "q2", "a2", "q3", "a3"), conversations("p1", "b1")])
    asked, references = evaluate.judged_questions(config(data=path, sample=0), None, RUN)
    assert [[m["content"] for m in messages] for messages in asked] == [["q1", "q2"], ["p1"]]
    assert references == [["a1", "a2"], ["b1"]]


def test_the_judges_tables(folders, capsys):
    made = config(folders, judge="gold", sample=6, out="out/evaluate")
    results = evaluate.evaluate_judge(made, RUN)
    assert results["ratings"]["out/dpo"]["rated"] == 6 + 2 * 3  # three of two turns
    duel = results["duels"]["out/dpo against out/sft-community"]
    assert duel["wins"] + duel["ties"] + duel["losses"] == 9 and duel["swayed"] == 0
    evaluate.evaluate_judge(made, RUN)
    assert "judgments were there already" in capsys.readouterr().out


def test_references_reach_the_judge(folders, tmp_path, monkeypatch):
    prompts = []
    monkeypatch.setattr(evaluate.judge, "load_judge", lambda *_: lambda prompt: prompts.append(prompt) or "Rating: [[3]] [[C]]")
    path = write(tmp_path / "a.jsonl", [conversations("q1", "first right", "q2", "second right")])
    for wanted in (False, True):
        prompts.clear()
        evaluate.evaluate_judge(config(folders, judge="x", data=path, judge_reference=wanted, out=f"out/{wanted}"), RUN)
        rating = [prompt for prompt in prompts if "[[A]]" not in prompt]
        assert [("first right" in p, "second right" in p) for p in rating] == [(wanted, False), (False, wanted)] * 2


def test_choices_print_a_row_a_model_and_task(folders, tmp_path, capsys):
    path = write(tmp_path / "own.jsonl", [{"question": "one?", "choices": ["yes", "no"], "answer": 0}] * 2)
    evaluate.evaluate_choices(config(folders, choices=f"quiz,{path}", out="out/evaluate"), RUN)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("out/dpo ") for line in lines) == 2 and any("island" in line for line in lines)


# ---- the command line ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, words", [
    ({}, "no checkpoint to measure.*python sft.py"),
    ({"folders": ["out/nowhere"]}, "out/nowhere"),
    ({"folders": ["x"], "data": "missing.jsonl"}, "missing.jsonl does not exist"),
    ({"folders": ["x"], "data": "empty.jsonl"}, "empty.jsonl"),
    ({"folders": ["x"], "data": "a.jsonl,./a.jsonl"}, "two files are called a"),
    ({"folders": ["x"], "choices": "empty.jsonl"}, "empty.jsonl"),
    ({"folders": ["x"], "judge": "gold", "judge_reference": True}, "--judge-reference.*none is given"),
    ({"folders": ["x"], "choices": "quiz", "shots": "some"}, "--shots some: give a number"),
    ({"folders": ["x"], "judge": "nobody"}, "--judge nobody"),
])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    write("a.jsonl", [conversations("q", "a")])
    with pytest.raises(UserError, match=words) as error:
        evaluate.main(config(**settings))
    assert "\n" not in str(error.value)


def test_a_mode_is_chosen_by_its_flag(folders, monkeypatch):
    called = []
    for module, name in ((exam, "island"), (evaluate, "data"), (evaluate, "choices"), (evaluate, "judge")):
        monkeypatch.setattr(module, f"evaluate_{name}", lambda config, run, name=name: called.append((name, config.out, config.folders)))
    for settings in ({}, {"data": "a"}, {"choices": "quiz"}, {"judge": "gold", "data": "a"}):
        evaluate.main(config(**settings))
    assert called == [(name, "out/evaluate", ["out/dpo"]) for name in ("island", "data", "choices", "judge")]


# ---- the story -------------------------------------------------------------------------------------------------------

def test_the_story_runs_what_is_missing_and_tells_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reward, "HELD_OUT", 20)
    ran = []

    def ensure(folder, script, config, run, **settings):
        ran.append((folder, Path(script.__file__).name, settings))
        made = reward.RewardModel(tiny(2)) if folder == "out/reward" else tiny(len(ran))
        made.save_pretrained(folder)
        TOK.save(folder)
        lines = [{"step": i, "loss": 2.0 - i, "kl": 0.5 * i, "score": 0.1 * i, "gold": 3.0} for i in range(3)]
        write(Path(folder) / "log.jsonl", lines)

    monkeypatch.setattr(trainer, "ensure", ensure)
    evaluate.main(config(story=True, n=20))
    assert [folder for folder, *_ in ran] == list(story.STAGES)
    assert ("out/sft-community", "sft.py", {"answers": "community"}) in ran and ("out/ppo-no-penalty", "ppo.py", {"beta": 0.0}) in ran
    text = Path("out/story/README.md").read_text()
    for folder in story.POLICIES:
        assert f"| {folder} |" in text
    assert " nan" not in text and text.count("](") == text.count("![") in (0, 5)  # pictures with matplotlib only
    for name in {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}:
        assert Path("out/story", name).is_file()
    ran.clear()
    evaluate.main(config(story=True, n=20))
    assert not ran  # everything was there


def test_ensure_gets_what_the_command_line_said(monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "is_finished", lambda folder: False)
    monkeypatch.setattr(trainer, "ensure", lambda folder, script, config, run, **settings: seen.append(config.seed))
    assert set(story.run_stages(RUN, config(seed=3))) == set(story.STAGES) and set(seen) == {3}
    assert all(math.isfinite(s) for s in story.run_stages(RUN, config()).values())
