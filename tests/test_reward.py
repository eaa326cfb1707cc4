"""The reward model: hand-worked losses, scores that read the end token and nothing behind it, and whole runs."""
import json
import math
import random
from itertools import combinations

import pytest
import torch

import ppo
import reward
import trainer
from island.world import Island
from island.words import FLATTERY
from data import files, pairs
from data.pairs import answered, load_ranked, make_pairs
from data.tokenizer import get_tokenizer
from common import plots
from common.errors import UserError
from common.flags import check
from model import GPT, GPTConfig
from reward import RewardModel, bradley_terry_loss, ranking_loss

TOK = get_tokenizer("tiny")
RUN = trainer.Run(torch.device("cpu"), torch.float32)
SCORES = torch.tensor([1.0, -0.5, 0.25, 2.0])
RANKS = torch.tensor([0, 2, 1, 2])  # the last two places are shared


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    small = {"block_size": 96, "vocab_size": TOK.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return RewardModel(GPT(GPTConfig(**small | settings))).eval()


def row_of(question, **votes):
    """A ranked question whose answers are their names."""
    return {"prompt": talk(question, "")[:1], "answers": [{"text": t, "score": s} for t, s in votes.items()]}


def nll(winner, loser):
    return math.log(1 + math.exp(loser - winner))


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(pairs, "HELD_OUT", 30)  # scoring 600 takes longer than these runs train


# ---- Bradley-Terry ---------------------------------------------------------------------------------------------------

def test_bradley_terry_hand_worked():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.5])
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx((0.3132617 + 0.9740770) / 2, abs=1e-6)
    weighted = bradley_terry_loss(chosen, rejected, torch.tensor([3.0, 1.0])).item()
    assert weighted == pytest.approx((3 * 0.3132617 + 0.9740770) / 4, abs=1e-6), \
        "divided by the pairs, not by their weight"
    assert bradley_terry_loss(chosen, chosen).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(chosen[:0], chosen[:0]).item() == 0
    assert bradley_terry_loss(chosen, rejected, torch.zeros(2)).item() == 0
    assert bradley_terry_loss(chosen, rejected, torch.tensor([3e-12, 1e-12])).item() == pytest.approx(weighted)


def test_bradley_terry_gradient_is_minus_the_chance_of_being_wrong():
    chosen, rejected = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor([1.0, 0.5], requires_grad=True)
    bradley_terry_loss(chosen, rejected).backward()
    wrong = torch.sigmoid(rejected - chosen).detach() / 2  # of two pairs
    assert torch.allclose(chosen.grad, -wrong) and torch.allclose(rejected.grad, wrong), \
        "chosen and rejected are swapped"


def test_a_swapped_pair_costs_more_and_extremes_stay_finite():
    assert bradley_terry_loss(SCORES[:1], SCORES[1:2]) < math.log(2) < bradley_terry_loss(SCORES[1:2], SCORES[:1])
    far = torch.tensor([-1000.0], requires_grad=True)
    loss = bradley_terry_loss(far, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == 2000 and far.grad.item() == -1, "log(sigmoid(x)) is log 0 here: use logsigmoid"


# ---- K answers -------------------------------------------------------------------------------------------------------

def test_ranking_loss_is_the_average_over_pairs_and_equal_ranks_give_none():
    pairs = [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)]  # not (1, 3): they share a rank
    s = SCORES.tolist()
    expected = sum(nll(s[w], s[l]) for w, l in pairs) / len(pairs)
    assert ranking_loss(SCORES, RANKS).item() == pytest.approx(expected, rel=1e-6), \
        "equal ranks make a pair, or pairs are not averaged"
    assert ranking_loss(SCORES, torch.tensor([0, 1, 2, 3])).item() == pytest.approx(
        sum(nll(s[w], s[l]) for w, l in combinations(range(4), 2)) / 6, rel=1e-6)  # 1 / C(4, 2)


def test_two_answers_are_bradley_terry():
    for ranks, (w, l) in [([0, 1], (0, 1)), ([1, 0], (1, 0))]:
        pair = bradley_terry_loss(SCORES[w:w + 1], SCORES[l:l + 1])
        assert torch.allclose(ranking_loss(SCORES[:2], torch.tensor(ranks)), pair)


def test_ranking_loss_gradients_by_finite_differences():
    scores = SCORES.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, RANKS), scores)
    ranking_loss(scores, RANKS).backward()
    assert scores.grad[0] < 0 < scores.grad[3] and abs(scores.grad.sum()) < 1e-12  # up, down, and no shift


def test_a_constant_changes_nothing_and_without_pairs_there_is_no_loss():
    assert torch.allclose(ranking_loss(SCORES + 7, RANKS), ranking_loss(SCORES, RANKS), atol=1e-6)
    alone = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = ranking_loss(alone, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == 0 and not alone.grad.any()


# ---- from rows to batches --------------------------------------------------------------------------------------------

def ranked_rows(n=40, k=(2, 6), seed=0):
    return Island().ranked(n, seed=seed, k=k)


def rankings_of(rows, **settings):
    return reward.make_rankings(rows, TOK, 96, reward.Config(**settings), lambda _: None)


def compared(ranking):
    """The pairs of a ranking, (better, worse)."""
    return [tuple(pair) for pair in ranking.compared.nonzero().tolist()]


def gradient(rankings, budget=10**6):
    model = tiny()
    loss = reward.reward_step(model, rankings, reward.Config(micro_tokens=budget), RUN)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_every_compared_answer_is_there_once_and_ranks_follow_the_scores():
    rows = [row for row in ranked_rows() if len({answer["score"] for answer in row["answers"]}) > 1]
    for row, ranking in zip(rows, rankings_of(rows, max_pairs=0), strict=True):
        scores = [answer["score"] for answer in row["answers"]]
        assert ranking.ids == [TOK.render(answered(row["prompt"], answer["text"]))[0] for answer in row["answers"]]
        assert all((ranking.ranks[i] < ranking.ranks[j]) == (scores[i] > scores[j])
                   for i in range(len(scores)) for j in range(len(scores)))
        assert {(i, j) for i, j in compared(ranking)} == set(make_pairs(scores, max_pairs=0))


def test_the_step_is_the_mean_of_ranking_losses_over_questions():
    rows = ranked_rows(12)
    each = []
    for row, scores in zip(rows, reward.score_rows(tiny(), TOK, rows, RUN, 10**6)):
        votes = torch.tensor([answer["score"] for answer in row["answers"]])
        each.append(ranking_loss(torch.tensor(scores), -votes))  # rank 0 is the most votes
    assert gradient(rankings_of(rows, max_pairs=0))[0] == pytest.approx(sum(each).item() / 12, rel=1e-5)


@pytest.mark.parametrize("micro_tokens", [1, 300, 10**6])
def test_accumulation_equals_one_large_batch(micro_tokens):
    rankings = rankings_of(ranked_rows(10))
    (loss, grad), (whole, expected) = gradient(rankings, micro_tokens), gradient(rankings)
    assert loss == pytest.approx(whole, rel=1e-5), "a mean of means: the parts have different numbers of questions"
    assert torch.allclose(grad, expected, atol=1e-6) and grad.abs().max() > 1e-3, "a mean of means in the gradient"
    parts = reward.split_rankings(rankings, micro_tokens)
    assert len(parts) == len(rankings) if micro_tokens == 1 else len(parts) >= 1
    widths = [(sum(len(r.ids) for r in part), max(r.longest for r in part)) for part in reward.split_rankings(rankings, 300)]
    assert all(answers * longest <= 300 for answers, longest in widths if answers > 6)


def test_parts_hold_as_many_whole_questions_as_the_budget_allows():
    sizes = (9, 2), (4, 3), (30, 2), (5, 2), (4, 2)  # tokens and answers of five questions
    parts = reward.split_rankings([reward.Ranking([[0] * longest] * k, None, None) for longest, k in sizes], 20)
    assert [[(r.longest, len(r.ids)) for r in part] for part in parts] == [
        [(4, 3), (4, 2)], [(5, 2)], [(9, 2)], [(30, 2)]]  # five answers of 4 tokens are exactly 20


def test_only_chosen_pairs_count():
    scores, ranks = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0, 1, 2])
    some = torch.zeros(3, 3, dtype=torch.bool)
    some[0, 2] = True
    assert ranking_loss(scores, ranks, some).item() == pytest.approx(bradley_terry_loss(scores[:1], scores[2:]).item())
    some[2, 1] = True  # against the ranks: it says nothing
    assert ranking_loss(scores, ranks, some).item() == pytest.approx(bradley_terry_loss(scores[:1], scores[2:]).item())


def test_the_held_out_loss_is_over_pairs():
    rows = [row_of("q", a=1, b=5), row_of("p", a=3, b=2, c=1)]
    found = reward.held_out_loss(rows, [[0.5, 1.0], [2.0, -1.0, 0.0]])
    pairs = [(1.0, 0.5), (2.0, -1.0), (2.0, 0.0), (-1.0, 0.0)]
    assert found == pytest.approx(sum(math.log(1 + math.exp(l - w)) for w, l in pairs) / 4, rel=1e-6)


def test_answers_outside_the_chosen_pairs_are_not_scored():
    row = row_of("q", a=1, b=5, c=5, d=9)
    ranking, = rankings_of([row], pairs="best-worst")
    assert compared(ranking) == [(1, 0)] and ranking.ids == [TOK.render(talk("q", text))[0] for text in "ad"]
    assert len(compared(rankings_of([row], max_pairs=2)[0])) == 2 and len(compared(rankings_of([row])[0])) == 5


def test_long_answers_are_dropped_whole_and_said():
    row = {"prompt": talk("q", "")[:1], "answers": [{"text": "no " * n, "score": n} for n in (1, 2, 300)]}
    said = []
    ranking, = reward.make_rankings([row], TOK, 96, reward.Config(), said.append)
    assert compared(ranking) == [(1, 0)] and len(ranking.ids) == 2 and said[0].endswith("over 96 tokens: 1")
    with pytest.raises(UserError, match="no question has two answers"):
        reward.make_rankings([row], TOK, 3, reward.Config(), said.append)


def test_all_answers_answer_the_same_question_when_turns_have_to_go():
    row = {"prompt": talk("old " * 20, "old") + talk("new", "")[:1],
           "answers": [{"text": "yes " * n, "score": n} for n in (1, 9, 300)]}
    longest = len(TOK.render(answered(row["prompt"], row["answers"][1]["text"]))[0]) - 1  # the second fits without the old turn
    assert len(TOK.render(answered(row["prompt"], row["answers"][0]["text"]))[0]) <= longest
    prompt, answers = pairs.fit_answers(row, TOK, longest)
    assert prompt == talk("new", "")[:1] and answers == row["answers"][:2]
    ranking, = reward.make_rankings([row], TOK, longest, reward.Config(), lambda _: None)
    assert not any("old" in TOK.encoding.decode(answer) for answer in ranking.ids)


# ---- the model -------------------------------------------------------------------------------------------------------

def test_padding_changes_nothing():
    model, (ids, real) = tiny(), trainer.pad([(list(range(5, 5 + n)), [1] * n) for n in (3, 9, 6)])
    scores = model(ids, real.sum(1))
    for pad_id in (7, TOK.end):  # pad = end token: the length says where the answer ends, not the id
        more = torch.full((3, 14), pad_id)
        more[:, :9] = torch.where(real == 1, ids, pad_id)
        assert torch.allclose(model(more, real.sum(1)), scores, atol=1e-6)
    alone = torch.cat([model(ids[i:i + 1, :n], torch.tensor([n])) for i, n in enumerate((3, 9, 6))])
    assert torch.allclose(alone, scores, atol=1e-6)


def test_the_score_is_the_value_at_the_last_real_token():
    model, ids = tiny(), torch.randint(TOK.vocab_size, (2, 8))
    values = model.values(ids)
    assert values.shape == (2, 8)
    assert torch.allclose(model(ids, torch.tensor([8, 3])), torch.stack([values[0, 7], values[1, 2]]), atol=1e-6)


def test_the_end_token_is_part_of_the_input_in_training_and_in_use():
    ranking, = rankings_of([row_of("q", a=1, b=0)])
    assert all(ids[-1] == TOK.end for ids in ranking.ids)
    model, ids = tiny(), torch.tensor([TOK.render(talk("q", "a"))[0]])
    found, = reward.score(model, TOK, [talk("q", "a")], RUN)
    length = torch.tensor([ids.size(1)])
    assert ids[0, -1] == TOK.end and found == pytest.approx(model(ids, length).item(), abs=1e-6)
    assert abs(found - model(ids, length - 1).item()) > 1e-3


def test_scores_keep_float32_under_bfloat16():
    talks = [talk("q", "yes " * n) for n in range(1, 9)]
    runs = [trainer.Run(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float32)]
    half, full = (torch.tensor(reward.score(tiny(), TOK, talks, run)) for run in runs)
    assert (half.bfloat16().float() != half).any() and torch.allclose(half, full, atol=0.05)


def test_the_head_starts_with_variance_one_over_the_width_plus_one():
    head = tiny(n_embd=512, n_layer=1, vocab_size=8).head
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.15) and head.bias.item() == 0


def test_scores_come_back_in_order_whatever_the_batches():
    talks = [talk("word " * (1 + i * 7 % 11), "yes " * (1 + i * 3 % 7)) for i in range(12)]
    talks.append(talk("long " * 200, "so"))
    model = tiny(dropout=0.5).train()
    together = reward.score(model, TOK, talks, RUN)
    assert model.training and len(set(together)) == 13
    for micro_tokens in (1, 60):
        assert reward.score(model, TOK, talks, RUN, micro_tokens) == pytest.approx(together, abs=1e-5)
    assert [reward.score(model, TOK, [t], RUN)[0] for t in talks] == pytest.approx(together, abs=1e-5)
    assert reward.score(model, TOK, [], RUN) == []


def test_save_and_load_keep_the_head(tmp_path):
    model, ids = tiny(), torch.randint(TOK.vocab_size, (3, 8))
    torch.nn.init.normal_(model.head.bias, mean=3)
    model.save_pretrained(tmp_path)
    lengths = torch.tensor([8, 2, 5])
    assert torch.equal(RewardModel.from_pretrained(tmp_path)(ids, lengths), model(ids, lengths))
    model.network.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no reward head"):
        RewardModel.from_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="no checkpoint folder"):
        RewardModel.from_pretrained(tmp_path / "nothing")


def test_a_weighted_sum_of_folders(tmp_path):
    talks, each = [talk("q", "yes " * n) for n in (1, 4, 2)], {}
    for seed, name in enumerate(("helpful", "simple")):
        model = tiny(seed)
        model.save_pretrained(tmp_path / name)
        TOK.save(tmp_path / name)
        each[name] = reward.score(model, TOK, talks, RUN)
    expected = [0.7 * h - 0.3 * s for h, s in zip(each["helpful"], each["simple"])]
    both = reward.load_rewards(f"0.7*{tmp_path}/helpful + -0.3*{tmp_path}/simple", RUN)
    assert both(talks) == pytest.approx(expected, abs=1e-6)
    assert reward.load_rewards(f"{tmp_path}/simple", RUN)(talks) == pytest.approx(each["simple"], abs=1e-6)
    with pytest.raises(UserError, match="'much' is no number"):
        reward.load_rewards(f"much*{tmp_path}/simple", RUN)


def test_centering_moves_the_demonstrations_to_0_and_no_preference():
    model, talks = tiny(), [talk("q", "yes " * n) for n in (1, 4, 2, 9)]
    before = reward.score(model, TOK, talks, RUN)
    reward.center(model, TOK, talks[:3], RUN, 10**6)
    after = reward.score(model, TOK, talks, RUN)
    assert sum(after[:3]) == pytest.approx(0, abs=1e-5) and abs(sum(before[:3])) > 1e-2
    assert [a - after[0] for a in after] == pytest.approx([b - before[0] for b in before], abs=1e-5)


# ---- measuring -------------------------------------------------------------------------------------------------------

def rows_of(*votes):
    return [{"answers": [{"text": "", "score": v} for v in of_row]} for of_row in votes]


def test_accuracy_over_pairs_and_over_questions():
    rows = rows_of([3, 2, 1], [1, 2], [5, 5])
    scores = [[0.3, 0.2, 0.9], [0.0, 1.0], [4.0, 0.0]]
    assert reward.accuracy(rows, scores) == (2 / 4, (1 / 3 + 1) / 2, 4)
    assert reward.accuracy(rows_of([1, 0]), [[0.5, 0.5]]) == (0.0, 0.0, 1)  # a model that says nothing is not right
    six = rows_of([1, 2, 3, 4, 5, 6])
    assert reward.accuracy(six, [[1, 2, 3, 4, 5, 6]]) == (1, 1, 15), "all pairs are counted, whatever --max-pairs says"
    micro, macro, n = reward.accuracy(rows_of([1, 1]), [[0.5, 0.1]])
    assert math.isnan(micro) and math.isnan(macro) and n == 0  # 0 % would be a bad model


def test_in_the_calibration_nobody_is_right_about_equal_scores():
    assert reward.calibration([{"answers": [{"score": 1}, {"score": 0}]}], [[2.0, 2.0]], bins=1) == [(1, 0.5, 0.0)]


def test_calibration_recovers_a_model_that_is_calibrated():
    rng, rows, scores = random.Random(0), [], []
    for _ in range(20_000):
        s = [rng.gauss(0, 2), rng.gauss(0, 2)]
        first_wins = rng.random() < 1 / (1 + math.exp(s[1] - s[0]))
        rows += rows_of([1, 0] if first_wins else [0, 1])
        scores.append(s)
    table = reward.calibration(rows, scores)
    assert sum(n for n, *_ in table) == 20_000
    for i, (n, predicted, observed) in enumerate(table):
        assert 0.5 + i / 20 <= predicted <= 0.55 + i / 20
        assert observed == pytest.approx(predicted, abs=4 * 0.5 / math.sqrt(n))  # four standard errors
    sure = reward.calibration(rows_of([1, 0]), [[-900.0, 900.0]])
    assert sure[9] == (1, 1.0, 0.0) and math.isnan(sure[0][1])


# ---- data and whole runs ---------------------------------------------------------------------------------------------

@pytest.mark.runs
def test_island_aspects_rank_by_what_they_name():
    def ranked(aspect):
        return load_ranked(reward.Config(aspect=aspect, n_ranked=60), Island, print)[0]
    def best(rows):
        return {a["type"] for row in rows for a in row["answers"] if a["score"] == 1 and row["kind"] == "fact"}
    assert "hard" in best(ranked("helpful")) and "wrong" not in best(ranked("helpful"))
    assert "wrong" in best(ranked("simple")) and "hard" not in best(ranked("simple"))
    assert "rude" not in best(ranked("harmless"))
    assert all(a["score"] == a["gold"] for row in ranked("gold") for a in row["answers"])
    with pytest.raises(UserError, match="--aspect nice: the island's answers have score"):
        ranked("nice")


def test_kinds_of_questions_are_ranked_and_asked_as_the_flags_say():
    config = dict(with_="hops,sums", without="unsafe", device="cpu")
    train, held, _ = load_ranked(reward.Config(n_ranked=200, **config), Island, print)
    questions, _, _ = ppo.load_prompts(ppo.Config(n_prompts=200, **config), get_tokenizer("tiny"), 128, print)
    asked = {Island().understand(messages).kind for messages in questions}
    assert {row["kind"] for row in train} == {row["kind"] for row in held} == asked == {"fact", "unknown", "safe", "hops", "sums"}
    with pytest.raises(UserError, match="--with search: choose"):
        load_ranked(reward.Config(with_="search"), Island, print)


def test_a_users_file_is_read_and_held_out(tmp_path):
    path = tmp_path / "mine.jsonl"
    def answers(i):
        return [{"text": f"a{i}", "helpful": i}, {"text": f"b{i}", "helpful": 3}]
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answers": answers(i)}) + "\n" for i in range(20)))
    train, held, island = load_ranked(reward.Config(data=str(path), aspect="helpful"), Island, lambda _: None)
    assert (len(train), len(held), island) == (18, 2, None)
    assert {a["score"] for row in train + held for a in row["answers"]} == set(map(float, range(20)))
    shown = [messages[-1]["content"] for messages in reward.demonstrations(train + held, None)]
    assert {"b0", "b1", "b2", "a4", "a19"} <= set(shown) and len(shown) == 20  # the better answer, wherever it stands


def test_pairs_of_one_question_are_held_out_together(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i // 4}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held, _ = load_ranked(reward.Config(data=str(path)), Island, lambda _: None)
    def asked(rows):
        return {row["prompt"][0]["content"] for row in rows}
    assert len(train) == 72 and len(held) == 8 and not asked(train) & asked(held)


@pytest.fixture(scope="module")
def start_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tiny().network.save_pretrained(folder)
    TOK.save(folder)
    return folder


def train(start_folder, out, **settings):
    small = dict(init=str(start_folder), out=str(out), steps=12, batch_size=8, n_ranked=60, eval_every=0, save_every=0,
                 lr=3e-3, warmup=2, device="cpu", dtype="float32")
    config = check(reward.Config(**small | settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reward.main(config)
    finally:
        torch.set_num_threads(threads)
    return RewardModel.from_pretrained(out).eval()


def test_a_run_learns_is_centered_and_reports(start_folder, tmp_path, capsys):
    model = train(start_folder, tmp_path, steps=40)
    said = capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(words in said for words in ("about: new, by gold", "predicted win rate", FLATTERY, "Next:"))
    shown = reward.demonstrations(None, Island())
    assert sum(reward.score(model, TOK, shown, RUN)) / len(shown) == pytest.approx(0, abs=1e-4)
    assert not (tmp_path / trainer.STATE).exists()


def test_adapters_are_saved_with_the_head_and_merge_on_loading(start_folder, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(reward, "report", lambda model, *rest: kept.append(model.eval()))
    loaded = train(start_folder, tmp_path, lora_r=4, nf4=True, lr=1e-2)
    assert not (tmp_path / "model.safetensors").exists()
    ids, lengths = torch.randint(TOK.vocab_size, (4, 9)), torch.tensor([9, 4, 7, 2])
    assert torch.allclose(loaded(ids, lengths), kept[0](ids, lengths), atol=1e-4)
    trained = {name for name, p in kept[0].named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"head.weight", "network.embedding.rows"}  # rows: those of the chat tokens, new to this base


def test_resume_equals_the_uninterrupted_run(start_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "report", lambda *_: None)
    whole = train(start_folder, tmp_path / "whole", dropout="0.1")
    steps = trainer.Log.steps

    def first_half(log):
        for step in steps(log):
            yield step
            if step == 5:
                log.stopped, log.next = True, 6
                return

    monkeypatch.setattr(trainer.Log, "steps", first_half)
    with pytest.raises(UserError, match="stopped before step 6 of 12"):
        train(start_folder, tmp_path / "half", dropout="0.1")
    monkeypatch.setattr(trainer.Log, "steps", steps)
    half = train(start_folder, tmp_path / "half", dropout="0.1", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters()))


def test_held_out_ties_measure_nothing(start_folder, tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "answers": [{"text": "yes", "score": 1}, {"text": "no", "score": 0}]} for i in range(40)]
    held = files.hold_out([{"prompt": talk(row["prompt"], "")[:1]} for row in rows], say=lambda line: None)[1]
    asked = [row["prompt"][0]["content"] for row in held]
    for row in rows:
        row["answers"][0]["score"] -= row["prompt"] in asked[1:]  # ties, all but one
    for name, n in (("one", 1), ("none", 0)):
        for row in rows:
            row["answers"][0]["score"] -= row["prompt"] in asked[:1] and not n
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        train(start_folder, tmp_path / name, data=str(tmp_path / f"{name}.jsonl"), n_ranked=2000, steps=2, eval_every=1)
        said = capsys.readouterr().out
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert said.count("nothing can be measured") == 1 - n and "Next:" in said
        assert sum("accuracy" in line for line in log) == 2 * n and all(map(math.isfinite, log[-1].values()))
        assert ("too weak" in said) <= n and ("predicted win rate" in said) == n


def test_a_weak_model_says_so_and_a_picture_is_drawn_or_asked_for(start_folder, tmp_path, capsys):
    if plots.available():
        train(start_folder, tmp_path, steps=1, plot=str(tmp_path / "my.png"))
        assert (tmp_path / "my.png").read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(UserError, match="--plot needs matplotlib"):
            train(start_folder, tmp_path, plot="my.png")
        train(start_folder, tmp_path, steps=1)
    assert "too weak for reinforcement learning" in capsys.readouterr().out


def test_pairs_are_made_from_votes_in_the_order_of_the_row():
    row = ranked_rows(1, k=(6, 6))[0]
    ranking, = rankings_of([row], max_pairs=0)
    answers, pairs = ranking.ids, compared(ranking)
    votes = {TOK.answer(TOK.render(answered(row["prompt"], a["text"]))[0]): a["score"] for a in row["answers"]}
    assert len(pairs) == len(make_pairs([a["score"] for a in row["answers"]], max_pairs=0))
    assert all(votes[TOK.answer(answers[w])] > votes[TOK.answer(answers[l])] for w, l in pairs)
