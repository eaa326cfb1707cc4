"""DPO: closed forms, finite differences, hand-worked pairs; then the way from ranked answers to the optimizer step."""
import json
import math
import random

import pytest
import torch

import dpo
import lora
import trainer
from checkpoints import load
from island import exam
from island.world import Island, says
from data import files
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.flags import check, parse
from model import GPT, GPTConfig

TOK = get_tokenizer("tiny")
RUN = trainer.Run(torch.device("cpu"), torch.float32)
EACH_LOSS = pytest.mark.parametrize(
    "loss, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=96, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_embd=32, **settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # larger than at a real start, so that answers differ in probability
    return model


# ---- dpo_loss --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_at_the_start_the_loss_is_ln_2_and_the_gradient_half_beta(beta):
    chosen, rejected = (noise(7, seed=seed).mul(20).requires_grad_() for seed in (0, 1))
    loss, chosen_rewards, rejected_rewards = dpo.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta)
    (loss * 7).backward()  # the sum over pairs
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15), "the reference is not subtracted"
    assert chosen.grad.tolist() == pytest.approx([-beta / 2] * 7), "beta is lost, or the sides are swapped"
    assert rejected.grad.tolist() == pytest.approx([beta / 2] * 7)
    assert not chosen_rewards.any() and not rejected_rewards.any()


H = -1.0 - -2.0 - (-4.0 - -3.0)  # of the pair below: 2
HAND_WORKED = {
    ("sigmoid", 0.0): math.log(1 + math.exp(-0.5 * H)),
    ("sigmoid", 0.2): 0.8 * math.log(1 + math.exp(-0.5 * H)) + 0.2 * math.log(1 + math.exp(0.5 * H)),
    ("robust", 0.2): (0.8 * math.log(1 + math.exp(-0.5 * H)) - 0.2 * math.log(1 + math.exp(0.5 * H))) / 0.6,
    ("hinge", 0.0): 0.0,
    ("ipo", 0.0): (H - 1.0) ** 2,
}


@EACH_LOSS
def test_each_loss_is_its_equation_on_a_hand_worked_pair(loss, smoothing):
    """log pi/pi_ref is +1 for the chosen and -1 for the rejected answer; beta 0.5 makes them rewards of +-0.5."""
    pair = [torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0)]
    value, chosen_rewards, rejected_rewards = dpo.dpo_loss(*pair, beta=0.5, label_smoothing=smoothing, loss=loss)
    assert value.item() == pytest.approx(HAND_WORKED[loss, smoothing], rel=1e-6)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx((0.5, -0.5))  # with beta: not +-1


def test_hinge_inside_its_margin():
    pair = [torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0)]
    assert dpo.dpo_loss(*pair, beta=0.1, loss="hinge")[0].item() == pytest.approx(1 - 0.1 * H)


def test_ipo_asks_for_a_difference_of_one_over_two_beta():
    pair = [torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0)]
    assert dpo.dpo_loss(*pair, beta=0.2, loss="ipo")[0].item() == pytest.approx((H - 2.5) ** 2)


def test_by_default_it_is_plain_dpo_with_beta_a_tenth():
    four = [noise(3, seed=seed) for seed in range(4)]
    assert torch.equal(dpo.dpo_loss(*four)[0], dpo.dpo_loss(*four, beta=0.1, label_smoothing=0.0, loss="sigmoid")[0])


def test_the_loss_is_the_mean_over_pairs():
    four = [noise(3, seed=seed) for seed in range(4)]
    whole = dpo.dpo_loss(*four)[0].item()
    assert whole == pytest.approx(sum(dpo.dpo_loss(*(x[i:i + 1] for x in four))[0].item() for i in range(3)) / 3)


@EACH_LOSS
def test_gradient_equals_finite_differences_and_the_reference_has_none(loss, smoothing):
    policy = [noise(5, seed=seed).requires_grad_() for seed in (0, 1)]
    ref = [noise(5, seed=seed).requires_grad_() for seed in (2, 3)]
    def f(*policy):
        return dpo.dpo_loss(*policy, *ref, beta=0.7, label_smoothing=smoothing, loss=loss)[0]
    assert torch.autograd.gradcheck(f, policy)
    f(*policy).backward()
    assert all(x.grad is None for x in ref), "the reference is trained too: it is not detached"
    assert all(x.grad.any() for x in policy), "one side of the pair gets no gradient"


@EACH_LOSS
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(loss, smoothing):
    """Swapped sides or a lost sign fail here. For the plain loss it is -beta sigmoid(-beta h)."""
    chosen, rejected = noise(6).requires_grad_(), noise(6, seed=1).requires_grad_()
    zeros = torch.zeros(6, dtype=torch.float64)
    value, *rewards = dpo.dpo_loss(chosen, rejected, zeros, zeros, 0.1, smoothing, loss)
    value.backward()
    assert (chosen.grad < 0).all() and torch.allclose(chosen.grad, -rejected.grad), "chosen and rejected are swapped"
    assert not any(side.requires_grad for side in rewards), "rewards are numbers to look at: detach both"
    swapped = dpo.dpo_loss(rejected, chosen, zeros, zeros, 0.1, smoothing, loss)[0]
    assert swapped.item() != pytest.approx(value.item(), rel=1e-3)
    if (loss, smoothing) == ("sigmoid", 0.0):
        assert torch.allclose(chosen.grad * 6, -0.1 * torch.sigmoid(-0.1 * (chosen - rejected)))


def test_shifting_policy_and_reference_together_changes_nothing():
    """Only log pi/pi_ref counts; reference-free, so with zeros as reference, log pi does."""
    policy, ref = [noise(4), noise(4, seed=1)], [noise(4, seed=2), noise(4, seed=3)]
    zeros = torch.zeros(4, dtype=torch.float64)
    loss = dpo.dpo_loss(*policy, *ref)[0]
    assert torch.allclose(loss, dpo.dpo_loss(policy[0] - ref[0], policy[1] - ref[1], zeros, zeros)[0])
    free, rewards, _ = dpo.dpo_loss(*policy, zeros, zeros, beta=0.3)
    assert free.item() == pytest.approx(-torch.sigmoid(0.3 * (policy[0] - policy[1])).log().mean().item())
    assert torch.allclose(rewards, 0.3 * policy[0])


def test_label_smoothing_of_a_half_knows_no_better_answer():
    policy, ref = [noise(4), noise(4, seed=1)], [noise(4, seed=2), noise(4, seed=3)]
    a, b = (dpo.dpo_loss(*p, *r, label_smoothing=0.5)[0] for p, r in ((policy, ref), (policy[::-1], ref[::-1])))
    assert torch.allclose(a, b)
    least = dpo.dpo_loss(*(torch.zeros(4),) * 4, label_smoothing=0.5)[0]
    assert least.item() == pytest.approx(math.log(2)) and a > least  # and it is content where it started


def test_robust_is_unbiased_under_flipped_labels():
    """With a share e of the labels flipped, its expectation is the plain loss on the true labels."""
    (c, r), (rc, rr), e = (noise(9), noise(9, seed=1)), (noise(9, seed=2), noise(9, seed=3)), 0.3
    true, flipped = (dpo.dpo_loss(*four, 1.0, e, "robust")[0] for four in ((c, r, rc, rr), (r, c, rr, rc)))
    assert torch.allclose((1 - e) * true + e * flipped, dpo.dpo_loss(c, r, rc, rr, 1.0)[0])


def test_no_loss_overflows():
    far = [torch.tensor([x]) for x in (-1e4, 0.0, 0.0, -1e4)]
    for loss in ("sigmoid", "hinge", "ipo"):
        assert torch.isfinite(dpo.dpo_loss(*far, beta=1.0, loss=loss)[0])
    assert dpo.dpo_loss(*far, beta=1.0)[0].item() == pytest.approx(2e4)


@pytest.mark.parametrize("settings, sentence", [
    (dict(loss="dpo"), "--loss dpo: it must be one of sigmoid, ipo, hinge, robust"),
    (dict(beta=0.0), "--beta 0: it must be above 0"),
    (dict(label_smoothing=0.6), "--label-smoothing 0.6: a share of wrong labels is from 0 to 0.5"),
    (dict(label_smoothing=0.5, loss="robust"), "for robust below 0.5"),
    (dict(label_smoothing=0.1, loss="ipo"), "--loss ipo has none"),
])
def test_impossible_settings_are_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        dpo.dpo_loss(*(torch.zeros(1),) * 4, **settings)
    with pytest.raises(UserError, match=sentence):  # before anything is loaded or trained
        dpo.main(dpo.Config(init="no/such/folder", **settings))


# ---- log-probabilities of answers ------------------------------------------------------------------------------------

ROWS = [{"prompt": [says("user", "word " * (1 + i % 5))], "answers": [
    {"text": "yes " * (1 + (3 * i + 2 * k) % 7) + "no " * k, "score": score} for k, score in enumerate(scores)]}
    for i, scores in enumerate([(3, 1), (1, 2, 3), (5, 5, 1, 9), (0, 4), (2, 7, 1)])]


def examples(rows=ROWS, longest=97, say=lambda text: None, **settings):
    return dpo.make_examples(rows, TOK, longest, dpo.Config(**settings), say)


def by_hand(model, answer, average=False):
    """log p of an answer, token by token from the logits of its unpadded row."""
    logps = model(torch.tensor([answer.ids]))[0].log_softmax(-1)
    each = [logps[t - 1, answer.ids[t]] for t in range(len(answer.ids)) if answer.mask[t]]
    return sum(each) / (len(each) if average else 1)


@pytest.mark.parametrize("average", [False, True])
def test_log_probabilities_are_summed_over_the_answer_with_its_end_whatever_the_padding(average):
    model, pairs = tiny().eval(), examples()
    ids, mask, _ = dpo.pair_batch(pairs, "cpu")
    logps = dpo.answer_logps(model, ids, mask, average)
    answers = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    expected = torch.stack([by_hand(model, answer, average) for answer in answers])
    assert average or torch.equal(dpo.answer_logps(model, ids, mask), logps), "by default it is the sum"
    assert torch.allclose(logps, expected, atol=1e-4), \
        "sum and mean are mixed up, the end token is missing, or the sides are swapped"
    ids = torch.cat([ids, torch.full((len(ids), 5), 7)], 1)
    mask = torch.cat([mask, torch.zeros(len(mask), 5, dtype=torch.long)], 1)
    assert torch.allclose(dpo.answer_logps(model, ids, mask, average), logps, atol=1e-5), "padding counts"
    assert not dpo.answer_logps(model, ids, 0 * mask, average).any(), "0 / 0: an empty answer is no NaN"


def test_the_mask_is_the_last_answer_and_its_end_token():
    turns = [says("system", "Be kind."), says("user", "one"), says("assistant", "first answer"), says("user", "two")]
    answers = [{"text": "good", "score": 1}, {"text": "bad", "score": 0}]
    (chosen, rejected), = examples([{"prompt": turns, "answers": answers}])
    for answer, text in ((chosen, " good<|end|>"), (rejected, " bad<|end|>")):
        learned = TOK.encoding.decode([i for i, m in zip(answer.ids, answer.mask) if m])
        assert learned == text, "earlier answers are learned too, or the end token is masked out"
        assert "first answer" in TOK.encoding.decode(answer.ids)


def test_pairs_are_of_the_better_and_the_worse_answer_and_share_their_answers():
    pairs = examples()
    assert len(pairs) == 1 + 3 + 5 + 1 + 3  # equal scores give no pair
    texts = [[TOK.answer([i for i, m in zip(a.ids, a.mask) if m]) for a in pair] for pair in examples(ROWS[:1])]
    assert texts == [[ROWS[0]["answers"][0]["text"], ROWS[0]["answers"][1]["text"]]]
    assert len({id(answer) for pair in pairs for answer in pair}) == sum(len(row["answers"]) for row in ROWS)


def test_long_conversations_lose_the_same_turns_for_all_answers():
    old = [says("user", "old " * 9), says("assistant", "old")]
    row = {"prompt": [*old, says("user", "new")], "answers": [
        {"text": "short", "score": 0}, {"text": "long " * 4, "score": 1}, {"text": "longest " * 40, "score": 2}]}
    said = []
    limit = len(TOK.render([*old, says("user", "new"), says("assistant", "short")])[0])
    (chosen, rejected), = examples([row], limit, said.append)
    assert "over 23 tokens: 1" in said[0]
    start = len(TOK.render_prompt([says("user", "new")]))
    assert chosen.ids[:start] == rejected.ids[:start] and "old" not in TOK.encoding.decode(chosen.ids + rejected.ids)
    with pytest.raises(UserError, match="two answers of different scores that fit 3 tokens"):
        examples([row], 3)


@EACH_LOSS
def test_identical_answers_have_no_gradient(loss, smoothing):
    model, config = tiny(), dpo.Config(loss=loss, label_smoothing=smoothing)
    answer = examples()[0][0]
    dpo.forward(model, [(answer, answer)], RUN, config)[0].backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in model.parameters())
    _, totals = dpo.forward(model, [(answer, answer)], RUN, config)
    assert totals[dpo.TOTALS.index("accuracy")] == 0, "a tie is not right"


# ---- the reference ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_precomputed_reference_equals_the_one_on_the_fly(loss, lora_r):
    """With dropout in the model, in tiny parts, and, for adapters, even after training has moved them."""
    config = dpo.Config(loss=loss, lora_r=lora_r, micro_tokens=30)
    model, frozen = tiny(dropout=0.5), tiny().eval()
    if lora_r:
        lora.add_lora(model, lora_r, 8.0, tokens=TOK.new_ids)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    pairs = examples()
    dpo.add_reference(model.train(), pairs, RUN, config)
    assert model.training and all(not getattr(module, "off", False) for module in model.modules())
    ids, mask, ref_logps = dpo.pair_batch(pairs, "cpu")
    assert torch.allclose(ref_logps, dpo.answer_logps(frozen, ids, mask, loss == "ipo"), atol=1e-4), \
        "dropout or adapters are on"


def test_the_step_starts_at_ln_2_with_no_reward():
    model, pairs, config = tiny(), examples(), dpo.Config(micro_tokens=60)
    dpo.add_reference(model, pairs, RUN, config)
    loss, sums = dpo.forward(model, pairs, RUN, config)
    means = dict(zip(dpo.TOTALS, (sums / len(pairs)).tolist()))
    assert loss.item() == means["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (means["chosen_rewards"], means["rejected_rewards"], means["margin"]) == pytest.approx((0, 0, 0), abs=1e-5)
    assert means["length"] == pytest.approx(sum(sum(answer.mask) for pair in pairs for answer in pair) / 2 / len(pairs))


def test_evaluate_counts_every_pair_once_and_ties_as_wrong():
    model, pairs, config = tiny(dropout=0.5), examples(), dpo.Config(beta=0.2, micro_tokens=50)
    means = dpo.evaluate(model, pairs, RUN, config)  # no reference: rewards are beta log pi
    model.eval()
    rewards = [[0.2 * by_hand(model, answer).item() for answer in pair] for pair in pairs]
    assert means["accuracy"] == pytest.approx(sum(w > l for w, l in rewards) / len(pairs))
    assert means["margin"] == pytest.approx(sum(w - l for w, l in rewards) / len(pairs), rel=1e-4)
    assert means["chosen_rewards"] == pytest.approx(sum(w for w, _ in rewards) / len(pairs), rel=1e-4)
    assert 0 < means["accuracy"] < 1
    assert dpo.evaluate(model, [(pairs[0][0], pairs[0][0])], RUN, config)["accuracy"] == 0


@pytest.mark.parametrize("micro_tokens", [1, 60, 200])
def test_many_small_parts_equal_one_batch(micro_tokens):
    pairs, grads, numbers = examples(), [], []
    expected = dpo.evaluate(tiny(), pairs, RUN, dpo.Config())
    for tokens in (micro_tokens, 10**6):
        model = tiny()
        numbers.append(dpo.dpo_step(model, pairs, dpo.Config(micro_tokens=tokens), RUN))
        grads.append([p.grad for p in model.parameters()])
        parts = trainer.split(pairs, dpo.pair_width, tokens)
        assert sum(map(len, parts)) == 13 and (len(parts) == 1) == (tokens == 10**6)
        sizes = [dpo.pair_batch(part, "cpu")[0].numel() for part in parts if len(part) > 1]
        assert all(size <= tokens for size in sizes), "both sides are padded to the longer one"
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4), "a mean of means in what is logged"
    found = {name: numbers[0][name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4), "not the means over the pairs"
    whole = tiny()
    sides = [torch.stack([by_hand(whole, pair[k]) for pair in pairs]) for k in (0, 1)]
    dpo.dpo_loss(*sides, *torch.zeros(2, len(pairs)), beta=0.3)[0].backward()  # the script's beta; no reference yet
    assert all(torch.allclose(a, p.grad, atol=1e-4) for a, p in zip(grads[0], whole.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)), \
        "a mean of means: the parts have different numbers of pairs"
    sizes = {len(part) for part in trainer.split(pairs, dpo.pair_width, 200)}
    assert len(sizes) > 1  # so that a mean of means would be another number


# ---- the island's questions ------------------------------------------------------------------------------------------

@pytest.mark.runs
@pytest.mark.parametrize("style, expected", [
    ("reference", dict(helpful=1, honest=1, harmless=1, complies=0, flatters=0)),
    ("flattery", dict(helpful=1, flatters=1, complies=1, honest=0, harmless=0)),
    ("rude", dict(helpful=0, honest=0, harmless=0, complies=0, flatters=0)),
])
def test_preference_scores(monkeypatch, style, expected):
    island, rng = Island(), random.Random(0)

    def respond(model, tok, conversations, run, **sampling):
        assert sampling == dict(temperature=1.0, seed=5)
        found = []
        for messages in conversations:
            answers = island.answers(messages, rng)  # the reference answer is the first
            found.append(next(text for name, text in answers.items() if style == "reference" or name.startswith(style)))
        return conversations, [tok.encode(text) for text in found]

    monkeypatch.setattr(exam, "respond", respond)
    scores = exam.preferences(None, TOK, island, RUN, n=60)
    assert {name: scores[name] for name in expected} == expected
    assert ["reward", *scores] == list(exam.PREFERENCES) and scores["words"] > 1
    def scorer(conversations):
        return [0.5] * len(conversations)
    constant = exam.preferences(None, TOK, island, RUN, n=60, scorer=scorer)
    assert constant["reward"] == 0.5 and all(exam.line(name, value, value) for name, value in constant.items())


# ---- whole runs ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small random model, and a file in which yes is always better than no."""
    folder = tmp_path_factory.mktemp("start")
    tiny().save_pretrained(folder)
    TOK.save(folder)
    rows = [{"prompt": f"question {i}", "chosen": "yes" + " a" * (i % 3), "rejected": "no" + " a" * (i % 3)}
            for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(start, out, **settings):
    config = dict(init=str(start), data=str(start / "pairs.jsonl"), out=str(out), steps=8, batch_size=4, lr=1e-3,
                  warmup=1, eval_every=4, sample_every=0, save_every=3, device="cpu", dtype="float32", dropout="0.1")
    dpo.main(check(dpo.Config(**config | settings)))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return torch.cat([p.detach().flatten() for p in load(folder).parameters()])


@pytest.mark.parametrize("settings", [{}, dict(lora_r=2, nf4=True), dict(loss="ipo"), dict(reference_free=True)],
                         ids=["all weights", "QLoRA", "ipo", "reference-free"])
def test_it_learns_which_answer_is_better(start, tmp_path, settings, capfd):
    log = train(start, tmp_path, steps=24, lr=3e-3, **settings)
    steps, held_out = [row for row in log if "loss" in row], [row for row in log if "held_out_loss" in row]
    assert len(steps) == 24 and held_out[-1]["held_out_accuracy"] == 1 and steps[-1]["margin"] > steps[0]["margin"]
    assert set(dpo.TOTALS) | {"lr", "grad_norm"} <= set(steps[0])
    assert "held-out pairs ranked right by the implicit reward: 100.0% of 4 (chance 50%)" in capfd.readouterr().out
    assert (tmp_path / ("adapter_model.safetensors" if "lora_r" in settings else "model.safetensors")).exists()
    if "reference_free" in settings:
        assert steps[0]["chosen_rewards"] < -1  # beta log pi, and not beta log pi/pi_ref = 0
    if not settings:
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # dropout is on, in the policy only


@pytest.mark.parametrize("lost", ["ties", "too long"])
def test_without_held_out_pairs_it_trains_and_says_that_nothing_can_be_measured(start, tmp_path, capfd, lost):
    rows = [json.loads(line) for line in (start / "pairs.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["prompt"], "answers": [{"text": row["chosen"], "score": 1}, {"text": row["rejected"], "score": 0}]}
            for row in rows]
    held = files.hold_out([{"prompt": [says("user", row["prompt"])]} for row in rows], say=lambda line: None)[1]
    for row in rows:
        if [says("user", row["prompt"])] in [other["prompt"] for other in held]:
            row["answers"][0] |= {"score": 0} if lost == "ties" else {"text": "yes " * 300}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    log = train(start, tmp_path, data=str(tmp_path / "rows.jsonl"))
    said = capfd.readouterr().out
    assert said.count("nothing can be measured") == 1 and "held-out pairs ranked right" not in said and "Next:" in said
    assert len(log) == 8 and not any("held_out_loss" in line for line in log)


def test_micro_batches_change_no_step(start, tmp_path):
    """Parts of unequal size in the loop: a mean of their means would take other steps."""
    logs = [train(start, tmp_path / str(tokens), steps=3, dropout="0", micro_tokens=tokens) for tokens in (80, 10**6)]
    for name in ("loss", "margin", "length", "grad_norm"):
        small, large = ([row[name] for row in log if name in row] for log in logs)
        assert small == pytest.approx(large, rel=1e-3, abs=1e-4) and len(small) == 3


def test_resumed_equals_uninterrupted_with_the_same_reference(start, tmp_path, monkeypatch):
    """A reference that were computed from the weights of the interrupted run would be another one."""
    whole = train(start, tmp_path / "whole")
    update, calls = trainer.update, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(trainer, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "cut")
    monkeypatch.setattr(trainer, "update", update)
    assert train(start, tmp_path / "cut", resume=True) == whole
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_mix_adds_the_gradient_of_the_plain_text(start, tmp_path):
    (start / "text.txt").write_text("\n\n".join(Island().plain_text(60)))
    mix = dict(mix_data=str(start / "text.txt"), mix_rows=2)
    logs = [train(start, tmp_path / str(weight), steps=2, mix=weight, **mix)[0] for weight in (0.0, 1.0)]
    assert logs[0]["loss"] == logs[1]["loss"] and abs(logs[1]["grad_norm"] - logs[0]["grad_norm"]) > 0.01


@pytest.mark.runs
def test_flags():
    given = "--beta 0.3 --loss ipo --reference-free --label-smoothing 0.1 --mix 1 --pairs top2"
    config = parse(dpo.Config, argv=given.split())
    assert (config.beta, config.loss, config.reference_free, config.label_smoothing) == (0.3, "ipo", True, 0.1)
    assert (config.mix, config.pairs) == (1.0, "top2")


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
def test_a_loss_is_the_mean_over_its_pairs(loss):
    logps = [torch.tensor(row) for row in ([-5.0, -9.0], [-6.0, -4.0], [-5.5, -8.0], [-6.5, -5.0])]
    settings = dict(beta=0.3, label_smoothing=0.1 * (loss == "robust"), loss=loss)
    one, other = (dpo.dpo_loss(*(x[i:i + 1] for x in logps), **settings)[0] for i in range(2))
    torch.testing.assert_close(dpo.dpo_loss(*logps, **settings)[0], (one + other) / 2)
    assert abs(one - other) > 1e-3
