"""Talking to checkpoints: what is streamed is what is generated, conversations are kept apart, files resume."""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import chat
import trainer
from island.world import Island, says
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.flags import check, parse
from checkpoints import save_adapter
from lora import add_lora
from generate import fit_question, generate
from model import GPT, GPTConfig
from reward import RewardModel

ROOT = Path(__file__).resolve().parents[1]
TOK = get_tokenizer("tiny")
TOK.new_ids = []  # as after fine-tuning
RUN = trainer.Run(torch.device("cpu"), torch.float32)
ASK = "What does Mabel eat?"


def tiny(seed, block_size=96):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, TOK.vocab_size, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():  # the usual initialisation always says the same word
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two chat models, a base model, a reward model and an adapter."""
    where = tmp_path_factory.mktemp("out")
    for seed, name in enumerate(("sft", "ppo", "base", "reward")):
        model = tiny(seed) if name != "reward" else RewardModel(tiny(seed))
        model.save_pretrained(where / name)
        (get_tokenizer("tiny") if name == "base" else TOK).save(where / name)
    for name, extra in (("adapter", None), ("reward-adapter", RewardModel(tiny(0)).head_tensors())):
        model = tiny(0)
        add_lora(model, 2, 4)
        (where / name).mkdir()
        save_adapter(model, where / name, str(where / "sft"), extra)
        TOK.save(where / name)
    return {path.name: str(path) for path in where.iterdir()}


def config(**settings):
    return check(chat.Config(**{"device": "cpu", "dtype": "float32", "max_new_tokens": 12} | settings))


def speaker(folder, **settings):
    return chat.Speaker(folder, config(**settings), RUN)


def pipe(monkeypatch, capsys, text, folders, **settings):
    """What main prints for piped text: (stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.main(config(folders=folders, **settings))
    return capsys.readouterr()


def scripted(monkeypatch, *answers):
    """Lets the models say these texts, in turn -> the prompts they were given, as text."""
    asked, script = [], iter(answers)

    def stream(model, prompts, **sampling):
        asked.append(TOK.encoding.decode(prompts[0]))
        for token in [*TOK.encode(" " + next(script)), TOK.end]:
            yield [(0, token)]

    monkeypatch.setattr(chat, "stream", stream)
    return asked


# ---- one answer ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(6))
def test_what_is_streamed_is_what_is_generated(folders, seed):
    me, pieces = speaker(folders["sft"], temperature=1.5, max_new_tokens=40), []
    _, answer = me.reply([says("user", ASK)], seed, pieces.append, False)
    new, = generate(me.model, [TOK.render_prompt([says("user", ASK)])], 40, 1.5, 0.9, stop=TOK.stops, seed=seed)
    assert "".join(pieces) == answer + "\n" and answer == TOK.answer(new)
    assert len(pieces) > 5  # it came in pieces


def test_no_piece_ends_within_a_character(folders, monkeypatch):
    text = "caf\u00e9 \u2603 \U0001f600 \u65e5\u672c, \u00fc"
    scripted(monkeypatch, text)
    pieces, me = [], speaker(folders["sft"])
    assert len(TOK.encode(text)) > len(text)  # some characters are several tokens
    assert me.reply([says("user", "?")], 0, pieces.append, False)[1] == text
    assert "".join(pieces) == text + "\n" and not any("\ufffd" in piece for piece in pieces)
    assert "\U0001f600" in pieces


def test_half_a_character_at_the_end_is_shown_as_generate_gives_it(folders, monkeypatch):
    ids = TOK.encode(" a\U0001f600")[:-1]
    monkeypatch.setattr(chat, "stream", lambda *a, **k: ([(0, token)] for token in ids))
    pieces = []
    _, answer = speaker(folders["sft"]).reply([says("user", "?")], 0, pieces.append, False)
    assert "".join(pieces) == answer + "\n" == TOK.answer(ids) + "\n" and answer.startswith("a")


def test_a_base_model_continues_the_text_and_has_no_turns(folders, monkeypatch, capsys):
    out, err = pipe(monkeypatch, capsys, "Mabel eats\nand so\n", [folders["base"]], system="Be kind.", temperature=0.0)
    model = GPT.from_pretrained(folders["base"]).eval()
    prompts = [[TOK.end_of_text] + TOK.encode(f" {text}") for text in ("Mabel eats", "and so")]
    assert out == "".join(TOK.decode(new) + "\n" for new in generate(model, prompts, 12, 0.0, stop=TOK.end_of_text))
    assert "continues each text" in err and f"sft.py --init {folders['base']}" in err


def test_an_adapter_talks_as_its_base_with_it(folders, monkeypatch, capsys):
    ours, plain = (pipe(monkeypatch, capsys, ASK + "\n", [folders[name]]).out for name in ("adapter", "sft"))
    assert ours == plain and len(plain) > 5  # lora_B is 0 before training


# ---- a conversation --------------------------------------------------------------------------------------------------

def test_the_turns_so_far_are_in_the_prompt_and_reset_empties_it(folders, monkeypatch, capsys):
    asked = scripted(monkeypatch, "one", "two", "three", "four")
    lines = "first\n\n second \n/reset\nthird\n/system Be kind.\nfourth\n"
    out, _ = pipe(monkeypatch, capsys, lines, [folders["sft"]], system="S.")
    start = "<|endoftext|><|system|> S.<|end|>"
    first = f"{start}<|user|> first<|end|><|assistant|>"
    assert asked == [first, f"{first} one<|end|><|user|> second<|end|><|assistant|>",
                     f"{start}<|user|> third<|end|><|assistant|>",
                     "<|endoftext|><|system|> Be kind.<|end|><|user|> fourth<|end|><|assistant|>"]
    assert out == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize("memory, remembered", [(-1, "123"), (1, "3"), (2, "23"), (0, "")])
def test_memory_is_a_number_of_questions(folders, monkeypatch, capsys, memory, remembered):
    asked = scripted(monkeypatch, "a1", "a2", "a3", "a4")
    pipe(monkeypatch, capsys, "q1\nq2\nq3\nq4\n", [folders["sft"]], memory=memory)
    assert [n for n in "1234" if f"q{n}" in asked[-1]] == [*remembered, "4"]
    assert [n for n in "1234" if f"a{n}" in asked[-1]] == [*remembered]


def test_several_models_get_the_same_question_and_keep_their_own_turns(folders, monkeypatch, capsys):
    asked = scripted(monkeypatch, "s1", "p1", "s2", "p2")
    out, _ = pipe(monkeypatch, capsys, "a\nb\n", [folders["sft"], folders["ppo"], folders["sft"]])
    assert out == "".join(f"[{folders[name]}]\n{name[0]}{n}\n" for n in (1, 2) for name in ("sft", "ppo"))
    assert "<|user|> a<|end|><|assistant|> s1<|end|><|user|> b" in asked[2] and "<|assistant|> p1<|end|>" in asked[3]
    assert asked[0] == asked[1] and "p1" not in asked[2]


def test_a_full_context_forgets_the_oldest_turns_and_says_so_once(folders, monkeypatch, capsys):
    asked = scripted(monkeypatch, *["yes " * 6] * 9)
    lines = "".join(f"{'word ' * 6}q{n}\n" for n in range(7))
    _, err = pipe(monkeypatch, capsys, lines, [folders["sft"]], system="Be kind.")
    assert all(len(TOK.encoding.encode(text, allowed_special="all")) <= 96 - 12 for text in asked)
    assert "q0" in asked[1] and "q0" not in asked[-1] and "q5" in asked[-1]
    assert all("Be kind." in text and text.count("<|user|>") == text.count("<|assistant|>") for text in asked)
    assert err.count("the oldest turns are forgotten") == 1 and "96 tokens" in err


def test_a_question_longer_than_the_context_is_read_from_its_end(folders, monkeypatch, capsys):
    asked = scripted(monkeypatch, "yes")
    _, err = pipe(monkeypatch, capsys, f"first {'word ' * 100}last\n", [folders["sft"]])
    n = len(TOK.encoding.encode(asked[0], allowed_special="all"))
    assert n == 96 - 12 and "first" not in asked[0] and asked[0].endswith(" last<|end|><|assistant|>")
    assert "too long" in err and "reads the end only" in err


@pytest.mark.parametrize("max_new_tokens, room", [(10, 86), (48, 48), (1000, 48)])
def test_half_the_context_is_kept_for_the_question(max_new_tokens, room):
    kept, ids = fit_question([says("user", "word " * 200)], TOK, 96, max_new_tokens)
    assert len(ids) == room and len(kept) == 1
    turn = [says("user", "hello"), says("assistant", "word " * 30), says("user", "and you?")]
    kept, ids = fit_question(turn, TOK, 96, max_new_tokens)
    assert len(ids) <= room and kept == (turn if room > 80 else turn[-1:])


def test_the_same_seed_gives_the_same_chat_and_each_question_other_numbers(folders, monkeypatch, capsys):
    def ask(seed):
        return pipe(monkeypatch, capsys, "hm\n/reset\nhm\n", [folders["sft"]], seed=seed, temperature=1.0).out
    a, b, c = ask(1), ask(1), ask(2)
    assert a == b != c and len(set(a.split("\n")[:2])) == 2


def test_marks_are_the_judge_and_the_reward_on_request(folders, monkeypatch, capsys):
    right = Island().truth(ASK)
    scripted(monkeypatch, right, right, "Hm.", right)
    out, err = pipe(monkeypatch, capsys, f"{ASK}\n/marks\n{ASK}\nHow tall is Pip?\n/marks\n{ASK}\n", [folders["sft"]],
                    memory=0)
    blocks = out.split("\n")
    verdict = "   " + Island().verdict([says("user", ASK)], right)
    unknown = "   the island does not know this question: no mark"
    assert blocks == [right, right, verdict, "", "Hm.", unknown, "", right, ""]
    assert verdict.endswith("[[10]]") and "no reward: out/reward is missing" in err


def test_reward_marks_from_the_start(folders, monkeypatch, capsys):
    scripted(monkeypatch, "Hm.")
    out, _ = pipe(monkeypatch, capsys, "hello\n", [folders["sft"]], reward=f"2*{folders['reward']}")
    score = chat.load_rewards(folders["reward"], RUN)([[says("user", "hello"), says("assistant", "Hm.")]])[0]
    assert out.split("\n")[2] == f"   reward {2 * score:.2f}" and abs(score) > 0.005


def test_commands_that_are_none_are_said_to_be_none(folders, monkeypatch, capsys):
    asked = scripted(monkeypatch, "yes")
    out, err = pipe(monkeypatch, capsys, "/help\n/rest\nhello\n/quit\nunheard\n", [folders["sft"]])
    assert "there is no command /rest" in err and all(name in err for name in chat.COMMANDS)
    assert out == "yes\n" and len(asked) == 1


# ---- a terminal ------------------------------------------------------------------------------------------------------

def at_terminal(monkeypatch, *lines):
    """input() gives these lines; an exception among them is raised."""
    script = iter(lines)

    def typed(prompt):
        line = next(script)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, "/quit"])
def test_a_terminal_chat_ends_politely(folders, monkeypatch, capsys, end):
    scripted(monkeypatch, "I am Pip.")
    at_terminal(monkeypatch, "Who are you?", end)
    chat.main(config(folders=[folders["sft"]]))
    out, err = capsys.readouterr()
    assert out.startswith("I am Pip.\n") and "/help" in err and f"next: python evaluate.py {folders['sft']}" in err


def interrupted(monkeypatch, *texts):
    """A model that is stopped by Ctrl-C when it has said the first of these texts -> the prompts."""
    prompts, script = [], iter(texts)

    def stream(model, ids, **sampling):
        prompts.append(TOK.encoding.decode(ids[0]))
        text = next(script)
        for token in TOK.encode(f" {text}") if text else []:
            yield [(0, token)]
        if len(prompts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", stream)
    return prompts


@pytest.mark.parametrize("said", ["one two", ""])
def test_ctrl_c_stops_the_answer_not_the_chat(folders, monkeypatch, capsys, said):
    prompts = interrupted(monkeypatch, said, "three")
    at_terminal(monkeypatch, "first", "second", EOFError)
    chat.main(config(folders=[folders["sft"]]))
    assert capsys.readouterr().out.startswith(f"{said}\nthree\n")
    assert ("<|user|> first<|end|><|assistant|> one two<|end|><|user|> second" in prompts[1]) == bool(said)
    assert ("first" in prompts[1]) == bool(said)  # what was never answered is not remembered


def test_ctrl_c_ends_a_pipe(folders, monkeypatch, capsys):
    interrupted(monkeypatch, "one", "two")
    with pytest.raises(SystemExit) as stopped:
        pipe(monkeypatch, capsys, "first\nsecond\n", [folders["sft"]])
    assert stopped.value.code == 130 and "two" not in capsys.readouterr().out


def test_a_pipe_as_a_user_has_it(folders):
    flags = ["--temperature", "0", "--max-new-tokens", "9", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "chat.py"), folders["sft"], *flags]
    done = subprocess.run(command, input=f"{ASK}\n", capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}, timeout=60)
    new, = generate(GPT.from_pretrained(folders["sft"]), [TOK.render_prompt([says("user", ASK)])], 9, 0.0, stop=TOK.stops)
    assert (done.stdout, done.stderr, done.returncode) == (TOK.answer(new) + "\n", "", 0)


# ---- a file ----------------------------------------------------------------------------------------------------------

def questions_file(path):
    """Lengths that are not in order, one question twice, a conversation, a system prompt."""
    turns = [says("user", "hello"), says("assistant", "hi"), says("user", "and you?")]
    rows = [{"prompt": "word " * n + "?"} for n in (9, 1, 5, 30, 2, 9, 14, 3)]
    rows += [{"messages": turns}, {"messages": [says("system", "S."), says("user", "hello")]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answered(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def answer(tmp_path, folders, out="answers.jsonl", **settings):
    settings = {"temperature": 1.0, "micro_tokens": 96, "out": str(tmp_path / out)} | settings
    chat.main(config(folders=folders, file=questions_file(tmp_path / "questions.jsonl"), **settings))
    return answered(tmp_path / out)


def test_a_file_is_answered_in_its_order_by_every_model(folders, tmp_path, capsys):
    both = [folders["sft"], folders["ppo"]]
    rows = answer(tmp_path, both, "sub/answers.jsonl", temperature=0.0)
    prompts = [row["prompt"] for row in chat.files.load(tmp_path / "questions.jsonl", "prompts")[0]]
    assert [(row["model"], row["prompt"]) for row in rows] == [(name, prompt) for name in both for prompt in prompts]
    for folder in both:  # greedy answers do not depend on who is in the batch
        model = GPT.from_pretrained(folder).eval()
        new = generate(model, [TOK.render_prompt(prompt)[-84:] for prompt in prompts], 12, 0.0, stop=TOK.stops)
        assert [row["answer"] for row in rows if row["model"] == folder] == list(map(TOK.answer, new))
    err = capsys.readouterr().err
    assert "20 answers by" in err and "10 rows read" in err


def test_a_file_gets_the_system_prompt_where_it_has_none(folders, tmp_path):
    rows = answer(tmp_path, [folders["sft"]], system="Be kind.")
    assert [row["prompt"][0] for row in rows] == [says("system", "Be kind.")] * 9 + [says("system", "S.")]


@pytest.mark.parametrize("calls, torn", [(1, ""), (3, '{"pro'), (8, '{"prompt": [{"content": "caf\udcc3')])
def test_an_interrupted_file_resumes_to_the_same_answers(folders, tmp_path, monkeypatch, capsys, calls, torn):
    both = [folders["sft"], folders["ppo"]]
    answer(tmp_path, both, "whole.jsonl")
    real, asked = chat.Speaker.replies, []

    def replies(self, prompts, seed):
        asked.append(len(prompts))
        if len(asked) > calls:
            raise KeyboardInterrupt
        return real(self, prompts, seed)

    with monkeypatch.context() as patch:
        patch.setattr(chat.Speaker, "replies", replies)
        with pytest.raises(UserError, match=f"stopped; {sum(asked[:calls])} of 20|stopped; \\d+ of 20 .* goes on"):
            answer(tmp_path, both)
    first = (tmp_path / "answers.jsonl").read_text()
    assert first.count("\n") == sum(asked[:calls]) > 0
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(torn.encode("utf-8", "surrogateescape"))  # the last one is cut within a character
    seen = []
    monkeypatch.setattr(chat.Speaker, "replies", lambda *args: seen.append(args) or real(*args))
    answer(tmp_path, both)
    assert (tmp_path / "answers.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert f"holds {sum(asked[:calls])} of the 20 answers already" in capsys.readouterr().err
    assert sum(len(prompts) for _, prompts, _ in seen) == 20 - sum(asked[:calls])  # nothing is answered twice


@pytest.mark.parametrize("lost", [0, 3, 9])  # the first is a question that comes twice
def test_a_lost_line_is_answered_as_before_though_its_batch_is_there(folders, tmp_path, lost):
    whole = answer(tmp_path, [folders["sft"]], micro_tokens=10_000)  # one batch
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:lost] + lines[lost + 1:]))
    again = answer(tmp_path, [folders["sft"]], micro_tokens=10_000)
    if lost:
        assert again == whole
    else:  # which of two equal questions an answer was to, the file does not say
        assert [row["prompt"] for row in again] == [row["prompt"] for row in whole] and again[1:5] == whole[1:5]


def test_every_batch_of_a_file_has_its_own_random_numbers(folders, tmp_path):
    twice = [row["answer"] for row in answer(tmp_path, [folders["sft"]], micro_tokens=1)]  # each question is a batch
    assert twice[0] != twice[5]


def test_another_model_joins_the_file_and_a_whole_file_asks_nothing(folders, tmp_path, monkeypatch):
    ppo, = {row["model"] for row in answer(tmp_path, [folders["ppo"]])}
    rows = answer(tmp_path, [folders["sft"]])
    assert [row["model"] for row in rows] == [ppo] * 10 + [folders["sft"]] * 10
    monkeypatch.setattr(chat.Speaker, "replies", None)
    assert sorted(answer(tmp_path, [folders["sft"], ppo]), key=str) == sorted(rows, key=str)


def test_long_questions_and_follow_ups_of_a_file_are_counted(folders, tmp_path, capsys):
    rows = [{"prompt": "hi"}, {"prompt": "word " * 99}, {"turns": ["a", "b"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat.main(config(folders=[folders["sft"]], file=str(tmp_path / "q.jsonl"), out=str(tmp_path / "a.jsonl")))
    err = capsys.readouterr().err
    assert f"1 of 3 questions are longer than {folders['sft']} can read" in err
    assert "1 of 3 rows have follow-up questions" in err


@pytest.mark.parametrize("text", ["hello\n", '{"prompt": []}\n', '["prompt", "answer", "model"]\n', "no line end"])
def test_a_file_that_is_not_ours_is_left_alone(folders, tmp_path, text):
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(UserError, match="answers.jsonl, line 1 is no answer of this script"):
        answer(tmp_path, [folders["sft"]])
    assert (tmp_path / "answers.jsonl").read_text() == text


# ---- mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, words", [
    ({"folders": ["nowhere"]}, "no checkpoint folder nowhere"),
    ({"folders": ["{reward}"]}, "is a reward model, which marks answers and writes none"),
    ({"folders": ["{reward-adapter}"]}, "is a reward model"),
    ({"folders": ["{sft}"], "reward": "{ppo}"}, "has no reward head"),
    ({"folders": ["{sft}"], "tokenizer": "nothing"}, "there is no tokenizer 'nothing'"),
    ({"folders": ["{sft}"], "file": "q.jsonl"}, "give both"),
    ({"folders": ["{sft}"], "out": "a.jsonl"}, "give both"),
    ({"folders": ["{sft}"], "file": "q.jsonl", "out": "a.jsonl", "reward": "{reward}"}, "not those of --file"),
    ({"folders": ["{sft}"], "file": "q.jsonl", "out": "a.jsonl"}, "q.jsonl does not exist"),
    ({"folders": ["{sft}"], "top_p": 0.0}, "--top-p 0.0: it must be above 0"),
    ({"folders": ["{sft}"], "top_p": 1.5}, "--top-p 1.5"),
    ({"folders": ["{sft}"]}, "the input holds no question"),
    ({}, "none of out/ppo, out/dpo, out/sft .* python sft.py"),
])
def test_a_mistake_is_one_sentence(folders, monkeypatch, tmp_path, settings, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    def fill(value):
        return value.format(**folders) if isinstance(value, str) else [v.format(**folders) for v in value] \
            if isinstance(value, list) else value
    with pytest.raises(UserError, match=words) as stopped:
        chat.main(config(**{name: fill(value) for name, value in settings.items()}))
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("flag, words", [("--temperature=-1", "at least 0"), ("--top-k=-2", "at least 0"),
                                         ("--max-new-tokens=0", "at least 1"), ("--top_p=1", "did you mean --top-p")])
def test_impossible_flags_stop(flag, words):
    with pytest.raises(UserError, match=words):
        parse(chat.Config, argv=["out/sft", flag])


def test_a_tokenizer_of_another_model_is_noticed(folders, tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(32, 300, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    TOK.save(tmp_path)
    with pytest.raises(UserError, match=f"{TOK.vocab_size:,} tokens, but the model knows 300"):
        speaker(str(tmp_path))


def test_questions_that_are_not_utf8_are_one_sentence(folders, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), "utf-8"))
    with pytest.raises(UserError, match="not UTF-8"):
        chat.main(config(folders=[folders["sft"]]))


def test_without_a_folder_it_is_the_stage_trained_last(folders, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for age, (name, stage) in enumerate([("sft", "sft"), ("ppo", "ppo"), ("sft", "dpo")]):
        model = tiny(age)
        model.save_pretrained(f"out/{stage}")
        os.utime(f"out/{stage}", (1000 - age, 1000 - age if stage != "ppo" else 2000))
    assert chat.newest() == "out/ppo"
    Path("out/ppo", trainer.STATE).touch()  # unfinished
    os.utime("out/ppo", (3000, 3000))
    assert chat.newest() == "out/sft"
