"""Multiple choice: the public shapes, shots, the split between prompt and choice, the arithmetic, the island's quiz."""
import gzip
import json
import math

import pytest
import torch

from evals import choice
import trainer
from evals.choice import ChoiceQuestion, context_of, encode_pair, evaluate, island_quiz, load_questions, loglikelihoods, measure
from island import words
from island.world import Island
from data.tokenizer import get_tokenizer
from common.errors import UserError
from model import GPT, GPTConfig, token_logps
from pretrain import text_stream

RUN = trainer.Run(torch.device("cpu"), torch.float32)
ARC = {"question": "What is wet?", "choices": {"text": ["Sand", "Rain"], "label": ["A", "B"]}, "answerKey": "B"}
HELLASWAG = {"activity_label": "Baking", "ctx_a": "A man bakes. [header] Bread [title] Dough", "ctx_b": "HE then",
             "ctx": "", "endings": ["eats  it.", "[step] flies."], "label": "1"}
MMLU = {"question": " How many legs has a hen?\n", "subject": "animal_legs", "choices": ["one", "two", "three", "four"],
        "answer": 1}
TRUTHFULQA = {"question": "Do pigs fly?", "mc1_targets": {"choices": ["No", "Yes"], "labels": [1, 0]},
              "mc2_targets": {"choices": ["No", "They do not", "Yes", "At night"], "labels": [1, 1, 0, 0]}}
PLAIN = {"question": "Who bakes?", "choices": ["Mabel", "Otto", "Lulu"], "answer": 2}


@pytest.fixture(scope="module")
def tok():
    return get_tokenizer("tiny")


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=40, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=16, dropout=0.5))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- from a row to a question ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, expected", [
    (ARC, ChoiceQuestion("ARC", "Question: What is wet?\nAnswer:", ("Sand", "Rain"), 1)),
    (ARC | {"choices": {"text": ["Sand", "Rain"], "label": ["1", "2"]}, "answerKey": "1"},
     ChoiceQuestion("ARC", "Question: What is wet?\nAnswer:", ("Sand", "Rain"), 0)),
    (ARC | {"choices": {"text": ["Sand", "Rain"], "label": [1, 2]}, "answerKey": "2"},
     ChoiceQuestion("ARC", "Question: What is wet?\nAnswer:", ("Sand", "Rain"), 1)),
    (HELLASWAG, ChoiceQuestion("HellaSwag", "Baking: A man bakes. Bread. Dough He then", ("eats it.", " flies."), 1)),
    ({"activity_label": "Baking", "ctx": "A man", "endings": ["eats.", "sits."], "label": 0},
     ChoiceQuestion("HellaSwag", "Baking: A man", ("eats.", "sits."), 0)),
    (MMLU, ChoiceQuestion("MMLU", "How many legs has a hen?\nA. one\nB. two\nC. three\nD. four\nAnswer:",
                    ("A", "B", "C", "D"), 1, subject="animal_legs")),
    (TRUTHFULQA, ChoiceQuestion("TruthfulQA", "Q: Do pigs fly?\nA:", ("No", "Yes"), 0, mc2=(
        ("No", True), ("They do not", True), ("Yes", False), ("At night", False)))),
    ({"question": "Do pigs fly?", "mc1_targets": {"choices": ["Yes", "No"], "labels": [0, 1]}},
     ChoiceQuestion("TruthfulQA", "Q: Do pigs fly?\nA:", ("Yes", "No"), 1)),
    (PLAIN, ChoiceQuestion("plain", "Question: Who bakes?\nAnswer:", ("Mabel", "Otto", "Lulu"), 2)),
    (PLAIN | {"subject": None, "answer": "2"},
     ChoiceQuestion("plain", "Question: Who bakes?\nAnswer:", ("Mabel", "Otto", "Lulu"), 2)),
])
def test_shapes(tmp_path, row, expected):
    assert load_questions(write(tmp_path / "rows.jsonl", row), say=lambda report: None) == [expected]


def test_what_a_csv_makes_of_a_row(tmp_path):
    """Names in lower case, numbers as text, lists as JSON in a cell."""
    path = tmp_path / "rows.csv"
    path.write_text('id,question,choices,answerKey\n'
                    '1,What is wet?,"{""text"": [""Sand"", ""Rain""], ""label"": [""A"", ""B""]}",B\n')
    assert load_questions(path) == [choice.recognise(ARC, 2)]
    path.write_text('question,choices,answer\nWho bakes?,"[""Mabel"", ""Otto"", ""Lulu""]",2\n')
    assert load_questions(path) == [choice.recognise(PLAIN, 2)]


def test_other_files(tmp_path):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": [ARC, MMLU]}).encode()))
    assert [q.task for q in load_questions(path)] == ["ARC", "MMLU"]
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(__import__("pyarrow").Table.from_pylist([ARC, ARC]), tmp_path / "rows.parquet")
    assert load_questions(tmp_path / "rows.parquet") == [choice.recognise(ARC, 2)] * 2


BAD = [
    ({"prompt": "Hi", "completion": "Ho"}, "holds no multiple-choice question"), ([1], "not an object"),
    (ARC | {"choices": ["Sand", "Rain"]}, "choices is not an object of text and label"),
    (ARC | {"answerKey": "C"}, "the answer is none of the choices"),
    (ARC | {"choices": {"text": ["Sand"], "label": ["A", "B"]}}, "the answer is none of the choices"),
    (HELLASWAG | {"label": ""}, "the answer is none of the choices"),  # the public test split hides its labels
    (HELLASWAG | {"endings": ["[header]", "x"]}, "an empty choice"),
    (MMLU | {"answer": 4}, "the answer is none of the choices"),
    (MMLU | {"answer": -1}, "the answer is none of the choices"),
    (TRUTHFULQA | {"mc1_targets": {"choices": ["No", "Yes"], "labels": [0, 0]}}, "mc1_targets has no true choice"),
    (TRUTHFULQA | {"mc2_targets": {"choices": ["No", "Yes"], "labels": [1]}}, "mc2_targets has no true choice, or not"),
    (TRUTHFULQA | {"mc2_targets": ["No"]}, "mc2_targets is not an object"),
    (PLAIN | {"choices": ["Mabel", " ", "Otto"]}, "an empty choice"),
    (TRUTHFULQA | {"mc2_targets": {"choices": ["No", ""], "labels": [1, 0]}}, "an empty choice"),
    (PLAIN | {"choices": ["Mabel"], "answer": 0}, "fewer than two choices"),
    (PLAIN | {"choices": [1, 2]}, "choices is not a list of texts"), (PLAIN | {"question": " "}, "question is empty"),
    (PLAIN | {"question": "\ud800"}, "not UTF-8"), (PLAIN | {"choices": ["\ud800", "a", "b"]}, "not UTF-8"),
]


@pytest.mark.parametrize("row, reason", BAD)
def test_bad_rows_are_counted_and_said(tmp_path, row, reason):
    path, said = tmp_path / "rows.jsonl", []
    assert load_questions(write(path, PLAIN, row), say=said.append) == [choice.recognise(PLAIN, 2)]
    assert "2 rows read, 1 kept (plain); dropped 1: " + reason in str(said[0]) and "row 2" in str(said[0])
    with pytest.raises(UserError, match=f"rows.jsonl.*{reason}"):
        load_questions(write(path, row))


def test_a_file_of_something_else_is_told_what_is_read_here(tmp_path):
    path = write(tmp_path / "chats.jsonl", {"prompt": "Hi", "completion": "Ho"}, {"text": "Hm"})
    with pytest.raises(UserError, match='holds no multiple-choice question; .* ARC, HellaSwag, MMLU, PIQA, TruthfulQA or WinoGrande.*"answer": 0'):
        load_questions(path)
    (tmp_path / "broken.jsonl").write_text(json.dumps(PLAIN) + '\n{"question"\n')
    assert len(load_questions(tmp_path / "broken.jsonl")) == 1


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_questions(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        load_questions(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(ARC).encode() * 100)[:-20])
    with pytest.raises(UserError, match="cut short"):
        load_questions(tmp_path / "cut.jsonl.gz")


# ---- shots -----------------------------------------------------------------------------------------------------------

def record(monkeypatch, pairs):
    """No model: the shortest choice is the likeliest, and what was asked for is added to `pairs`."""
    def loglikelihoods(model, tok, asked, *rest):
        pairs.extend(asked)
        return [-float(len(text)) for _, text, _ in asked]

    monkeypatch.setattr(choice, "loglikelihoods", loglikelihoods)


def numbered(n, task="plain", subject=""):
    return [ChoiceQuestion(task, f"Question: {i}?\nAnswer:", ("yes", "no"), i % 2, subject) for i in range(n)]


def test_shots_come_first_with_their_answers():
    pool = numbered(4)
    assert context_of(pool[3], pool, 2) == ("Question: 0?\nAnswer: yes\n\nQuestion: 1?\nAnswer: no\n\n"
                                            "Question: 3?\nAnswer:")
    assert context_of(pool[3], pool, 0) == "Question: 3?\nAnswer:"


def test_a_question_is_never_its_own_shot():
    pool = numbered(4)
    twin = ChoiceQuestion("plain", pool[1].prompt, ("no", "yes"), 1)  # the same question, its choices in another order
    for question in pool + [twin]:
        context = context_of(question, pool + [twin], 3 if question not in pool[1:2] + [twin] else 2)
        assert context.count(question.prompt) == 1 and context.endswith(question.prompt)


def test_mmlu_names_the_subject_and_shows_its_own_examples(monkeypatch):
    questions, seen = numbered(3, "MMLU", "high_school_art") + numbered(3, "MMLU", "law"), []
    record(monkeypatch, seen)
    evaluate(None, None, questions[:1], RUN, shots=2, dev=questions[::-1])
    assert seen[0] == ("The following are multiple choice questions (with answers) about high school art.\n\n"
                       "Question: 2?\nAnswer: yes\n\nQuestion: 1?\nAnswer: no\n\nQuestion: 0?\nAnswer:", "yes", False)
    with pytest.raises(UserError, match="3 examples .* only 2 others of MMLU about law"):
        evaluate(None, None, questions[3:], RUN, shots=3)


def test_shots_of_each_task(monkeypatch):
    """A number for all but the island's sentences, or one a task."""
    questions, seen = numbered(3) + numbered(3, "HellaSwag") + numbered(3, "island"), []
    record(monkeypatch, seen)
    evaluate(None, None, questions, RUN, shots=1)
    assert [context.count("Question") for context, *_ in seen[::6]] == [2, 2, 1]
    seen.clear()
    evaluate(None, None, questions, RUN, shots={"plain": 2})
    assert [context.count("Question") for context, *_ in seen[::6]] == [3, 1, 1]


# ---- the split and the log-probability -------------------------------------------------------------------------------

@pytest.mark.parametrize("context, text", [("Question: Who?\nAnswer:", "Mabel"), ("Mabel eats", "plum pie."),
                                           ("a ", "b"), ("It is 1", "2"), ("(", "x)"), ("no\n", "yes")])
def test_split_of_context_and_choice(tok, context, text):
    """Nothing stands before the context, not even a space; in a document end-of-text and the template's space do."""
    for document, before, lead in ((False, [], ""), (True, [tok.end_of_text], " ")):
        ids, n = encode_pair(tok, context, text, document)
        assert ids == before + tok.encode(f"{lead}{context} {text}")
        assert tok.decode(ids[-n:]) == f"{context[len(context.rstrip()):]} {text}"


@pytest.mark.parametrize("context", ["", " ", "\n"])
def test_an_empty_context_is_the_end_of_text(tok, context):
    ids, n = encode_pair(tok, context, "Mabel")
    assert ids == [tok.end_of_text] + tok.encode(f"{context} Mabel") and n == len(ids) - 1


def test_what_a_tokenizer_puts_before_a_text_stands_before_the_context(tok, monkeypatch):
    monkeypatch.setattr(tok, "begin", [7])  # as Llama's <s>
    assert encode_pair(tok, "Mabel eats", "pie.") == ([7] + tok.encode("Mabel eats pie."), len(tok.encode(" pie.")))
    assert encode_pair(tok, "", "pie.") == ([7] + tok.encode(" pie."), len(tok.encode(" pie.")))


def test_only_the_island_continues_a_document(monkeypatch):
    seen = []
    record(monkeypatch, seen)
    evaluate(None, None, numbered(1) + numbered(1, "island"), RUN)
    assert [document for *_, document in seen] == [False, False, True, True]


def by_hand(model, ids, n):
    """log p of the last n tokens, one position after the other. The last one is only a target."""
    logps = model(torch.tensor([ids[:-1]]))[0].log_softmax(dim=1)
    return sum(logps[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids)))


PAIRS = [("Mabel eats", "plum pie."), ("Mabel eats", "mud."), ("Who are you?\nAnswer:", "I am Pip, the helper."),
         ("a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9 0 a b c d", "e f g"), ("Why?", "No"),
         ("Mabel eats", "plum pie.")]


@torch.inference_mode()
@pytest.mark.parametrize("micro_tokens", [1, 60, 10_000])
def test_loglikelihood_by_hand(model, tok, micro_tokens):
    """In the order of the pairs, whatever the batches; dropout off, and the model's mode as it was."""
    model.train()
    found = loglikelihoods(model, tok, PAIRS, RUN, micro_tokens)
    assert model.training
    model.eval()
    for (context, text), ll in zip(PAIRS, found, strict=True):
        answer = tok.encode(f" {text}")
        ids = tok.encode(context) + answer
        assert ll == pytest.approx(by_hand(model, ids[-41:], len(answer)), abs=1e-4)  # 40 are read, and one is a target


def test_what_does_not_fit_is_said(model, tok, capsys):
    loglikelihoods(model, tok, PAIRS, RUN)
    assert "1 of 5 prompts were cut from the left to fit 40 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="a choice has 41 tokens, but the model reads 40"):
        loglikelihoods(model, tok, [("Who?", " ".join("a" * 41))], RUN)
    assert math.isfinite(loglikelihoods(model, tok, [("Who?", " ".join("a" * 40))], RUN)[0])


def test_a_choice_without_a_token_is_no_choice(model, tok, monkeypatch):
    """Its log p would be 0, and it would win. A normalizer may swallow one."""
    monkeypatch.setattr(tok, "encode", lambda text: [5] * len(text.replace(" \u200b", "").split()))
    with pytest.raises(UserError, match="a choice has no token: "):
        loglikelihoods(model, tok, [("Who are you?", "\u200b")], RUN)


# ---- the arithmetic --------------------------------------------------------------------------------------------------

def only(values):
    return {name: value[0] for name, value in values.items()}


def test_each_measure_chooses_by_its_own_length():
    """-6, -9 and -7 over 1; over 2, 10 and 4 characters; over 3, 10 and 12 bytes: each has another favourite."""
    choices = ("éa", "abcdefghij", "東東東東")
    for answer, measure_won in enumerate(["acc", "acc_norm", "acc_bytes"]):
        found = only(measure([ChoiceQuestion("plain", "?", choices, answer)], [[-6.0, -9.0, -7.0]]))
        assert found == {name: float(name == measure_won) for name in found} and len(found) == 3


def test_the_length_is_in_characters_of_the_choice_not_in_tokens_and_without_the_space(tok):
    """Per token, or with the space counted, the other choice would win."""
    one, many = " the", "zqzq"
    assert len(tok.encode(one)) < len(tok.encode(f" {many}"))
    question = ChoiceQuestion("plain", "?", ("the", many), 0)
    assert only(measure([question], [[-3.0, -4.1]]))["acc_norm"] == 1.0  # -1.000 against -1.025; per token it loses
    question = ChoiceQuestion("plain", "?", ("ab", "abcdefgh"), 1)
    assert only(measure([question], [[-3.0, -11.0]]))["acc_norm"] == 1.0  # -1.5, -1.375; with a space -1.0, -1.22


@pytest.mark.parametrize("answer, right", [(0, 0.0), (1, 1.0), (2, 0.0)])
def test_the_first_of_equal_choices_is_taken(answer, right):
    question = ChoiceQuestion("plain", "?", ("aa", "bb", "cc"), answer)
    assert set(only(measure([question], [[-2.0, -1.0, -1.0]])).values()) == {right}


def test_mc2_is_the_true_share_of_the_probability():
    question = choice.recognise(TRUTHFULQA, 2)
    p = [0.2, 0.1, 0.3, 0.05]  # "They do not" is long: nothing here is divided by a length
    found = only(measure([question], [[-1.0, -2.0] + [math.log(x) for x in p]]))
    assert found == {"acc": 1.0, "acc_norm": 1.0, "acc_bytes": 1.0, "mc2": pytest.approx(0.3 / 0.65, abs=1e-12)}
    far = only(measure([question], [[-1.0, -2.0] + [math.log(x) - 5000 for x in p]]))  # exp alone would give 0 / 0
    assert far["mc2"] == pytest.approx(0.3 / 0.65, abs=1e-12)


# ---- all together ----------------------------------------------------------------------------------------------------

def test_evaluate_gives_a_row_a_task(monkeypatch):
    questions = ([choice.recognise(row, 2) for row in (ARC, TRUTHFULQA, HELLASWAG)]
                 + numbered(1, "MMLU", "a") + numbered(3, "MMLU", "b"))
    record(monkeypatch, [])
    rows = {row["task"]: row for row in evaluate(None, None, questions, RUN)}
    assert list(rows) == ["ARC", "TruthfulQA", "HellaSwag", "MMLU"] and rows["MMLU"]["n"] == 4
    assert rows["ARC"]["acc"] == (0.0, 0.0, 0.0) and rows["TruthfulQA"]["acc"] == (1.0, 1.0, 1.0)
    # "no" is shorter than "yes": right for question 1 of 0, 1, 2 alone
    assert rows["MMLU"]["acc"][0] == 1 / 4 and rows["MMLU"]["acc_subjects"][0] == pytest.approx((0 + 1 / 3) / 2)
    assert [row["headline"] for row in rows.values()] == [rows["ARC"]["acc_norm"], rows["TruthfulQA"]["mc2"],
                                                           rows["HellaSwag"]["acc_norm"], rows["MMLU"]["acc_subjects"]]
    assert choice.leaderboard_average(list(rows.values())) == pytest.approx(
        sum(row["headline"][0] for row in rows.values()) / 4)
    assert choice.leaderboard_average([rows["ARC"]]) is None
    assert choice.leaderboard_average([*rows.values(), rows["ARC"]]) is None  # of which file?


# ---- the quiz of the island ------------------------------------------------------------------------------------------

def test_island_quiz():
    island = Island()
    quiz = island_quiz(island)
    assert len(quiz) == 200 and quiz == island_quiz(Island()) and quiz != island_quiz(island, seed=1)
    assert len(set(q.prompt + str(sorted(q.choices)) for q in quiz)) == 200
    counts = [sum(q.answer == k for q in quiz) for k in range(4)]
    assert all(30 <= n <= 70 for n in counts)  # uniform: 50 each, standard deviation 6
    for q in quiz:
        assert len(set(q.choices)) == 4 and q.prompt == q.prompt.strip()
        name, = set(q.prompt.split()) & set(island.parts["test"]["residents"])
        facts = island.residents[name]
        held = [any(text.startswith(facts[a]) for a in words.VALUES) for text in q.choices]
        assert held == [k == q.answer for k in range(4)]  # one true value, and it is the answer
        sentence = f"{q.prompt} {q.choices[q.answer]}"
        assert sentence in {island.tell(name, a, template=t) for a in words.VALUES for t in words.SIMPLE[a]}


def test_island_quiz_can_be_asked_for_more_than_there_is():
    assert len(island_quiz(Island(), 10_000)) == 322
    assert len(island_quiz(Island(), 3)) == 3


def test_a_model_that_has_read_the_facts_passes_the_quiz_and_a_fresh_one_does_not(tok):
    quiz = island_quiz(Island(), 16)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=32))
    before, = evaluate(model, tok, quiz, RUN)
    texts = [text_stream([f"{q.prompt} {q.choices[q.answer]}"], tok).tolist() for q in quiz]
    ids, mask = trainer.pad([(text, [1] * len(text)) for text in texts])
    for _ in range(40):
        loss = -token_logps(model, ids, mask).sum()
        for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            p.data -= 0.01 * gradient.sign()
    after, = evaluate(model, tok, quiz, RUN)
    assert before["acc"][0] < 0.6 and after["acc"][0] > 0.85


# ---- the same sets as others have written them -----------------------------------------------------------------------

TRUTH_CSV = {"Question": "Do pigs fly?", "Best Answer": "No", "Correct Answers": "No; They do not", "Incorrect Answers": "Yes; At night"}
AS_OTHERS = [
    ({"question": {"stem": "What is wet?", "choices": [{"text": "Sand", "label": "A"}, {"text": "Rain", "label": "B"}]}, "answerKey": "B"},
     ChoiceQuestion("ARC", "Question: What is wet?\nAnswer:", ("Sand", "Rain"), 1)),
    ({"query": "Question: What is wet?", "choices": ["Sand", "Rain"], "gold": 1},
     ChoiceQuestion("plain", "Question: What is wet?\nAnswer:", ("Sand", "Rain"), 1)),
    ({"goal": "Dry a hen.", "sol1": "A towel.", "sol2": "Rain.", "label": 0},
     ChoiceQuestion("PIQA", "Question: Dry a hen.\nAnswer:", ("A towel.", "Rain."), 0)),
    ({"sentence": "The hen ate the corn as the _ was hungry.", "option1": "hen", "option2": "corn", "answer": "1"},
     ChoiceQuestion("WinoGrande", "", ("was hungry.",) * 2, 0, begun=("The hen ate the corn as the hen", "The hen ate the corn as the corn"))),
    ({"context_options": ["As the hen", "As the corn"], "continuation": "was hungry.", "gold": 0},
     ChoiceQuestion("WinoGrande", "", ("was hungry.",) * 2, 0, begun=("As the hen", "As the corn"))),
    ({"subject": "animal_legs", "output": "B", "input": "The following are multiple choice questions (with answers) about  animal legs.\n\n"
      "How many legs has a hen?\nA. one\nB. two\nC. three\nD. four\nAnswer:"}, choice.recognise(MMLU, 2)),
    (TRUTH_CSV, ChoiceQuestion("TruthfulQA", "Q: Do pigs fly?\nA:", ("No", "Yes", "At night"), 0,
                               mc2=(("No", True), ("They do not", True), ("Yes", False), ("At night", False)))),
]


@pytest.mark.parametrize("row, expected", AS_OTHERS)
def test_the_shapes_of_others_are_the_same_questions(row, expected):
    assert choice.recognise(row, 2) == expected


def test_answers_with_a_label_each_are_one_question(tmp_path):
    rows = [{"question": q, "answer": f"{q}{i}", "label": int(i == 1)} for q in "ab" for i in range(3)]
    rows += [{"question": "c", "answer": "x", "label": 1}, {"question": "c", "answer": "y", "label": 1}]
    said = []
    found = load_questions(write(tmp_path / "rows.jsonl", *rows), say=said.append)
    assert [(q.prompt, q.choices, q.answer) for q in found] == [(f"Question: {q}\nAnswer:", (f"{q}0", f"{q}1", f"{q}2"), 1) for q in "ab"]
    assert "dropped 2: not one right answer" in str(said[0])


def test_of_winogrande_the_words_after_the_gap_are_scored_behind_both_beginnings(model, tok):
    questions = [choice.recognise(row, 2) for row, expected in AS_OTHERS if expected.task == "WinoGrande"]
    asked = [(begun, q.choices[0]) for q in questions for begun in q.begun]
    lls = loglikelihoods(model, tok, asked, RUN)
    rights = [float((a >= b) == (q.answer == 0)) for q, a, b in zip(questions, lls[::2], lls[1::2])]
    [row] = evaluate(model, tok, questions, RUN)
    assert row["task"] == "WinoGrande" and row["acc"][0] == sum(rights) / 2 == row["acc_norm"][0]
    assert context_of(questions[0], questions, 1) == "As the hen was hungry.\n\n"
