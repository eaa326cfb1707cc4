"""The masked loss, through the loader and the loop: what is learned is exactly what the mask says, however it is batched."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate as generating
import lora
from checkpoints import load
import pretrain
import sft
from pretrain import next_token_loss
import trainer
from island.world import Island
from data import files
from data.tokenizer import get_tokenizer
from common.errors import UserError
from common.flags import check, parse
from kernels import head
from model import GPT, GPTConfig, TokenMatrix, slices, summed_logps, supervised, token_logps

ROOT = Path(__file__).resolve().parents[1]
TOK = get_tokenizer("tiny")
RUN = trainer.Run(torch.device("cpu"), torch.float32)


def rows_of(n, longest=9):
    """Conversations of many lengths; every fifth has two turns."""
    def row(i):
        return [{"role": "user", "content": "word " * (1 + i * 7 % longest)},
                {"role": "assistant", "content": "yes " * (1 + i * 3 % longest)}]
    return [{"messages": row(i) + (row(i + 1) if i % 5 == 0 else [])} for i in range(n)]


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"block_size": 96, "vocab_size": TOK.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32} | settings))


# ---- masked_loss -----------------------------------------------------------------------------------------------------

def test_masked_loss_is_the_mean_over_the_mask():
    probs = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]]])
    targets, mask = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 1]])
    expected = -(math.log(0.25) + math.log(0.2)) / 2
    assert sft.masked_loss(probs.log(), targets, mask).item() == pytest.approx(expected, rel=1e-6), \
        "the mean is over all positions"
    assert sft.masked_loss(probs.log() + 5, targets, mask).item() == pytest.approx(expected, rel=1e-5), \
        "logits are no log-probs"
    assert sft.masked_loss(probs.log(), targets, mask, n=8).item() == pytest.approx(expected * 2 / 8, rel=1e-6)
    low = probs.log().bfloat16()
    assert sft.masked_loss(low, targets, mask).item() == sft.masked_loss(low.float(), targets, mask).item(), "rounded to bfloat16"


def test_a_token_of_next_to_no_probability_costs_its_logit_and_not_infinity():
    assert sft.masked_loss(torch.tensor([[200.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(200.0)


def test_masked_loss_gradient_is_softmax_minus_one_hot_and_exactly_zero_elsewhere():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, requires_grad=True)
    targets, mask = torch.randint(5, (2, 4)), torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]])
    sft.masked_loss(logits, targets, mask).backward()
    expected = (logits.softmax(-1) - torch.nn.functional.one_hot(targets, 5)) * mask[..., None] / 3
    assert torch.allclose(logits.grad, expected, atol=1e-6)
    assert not logits.grad[mask == 0].any(), "what the mask hides is learned"


def test_masked_loss_survives_infinities_outside_the_mask():
    logits = torch.full((1, 2, 3), float("nan"))
    logits[0, 1] = 0
    assert sft.masked_loss(logits, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 1]])).item() == pytest.approx(math.log(3))


def test_the_first_token_is_never_predicted_so_it_never_counts():
    """A mask that begins with 1, as that of pretraining does."""
    ids = [5, 6, 7, 8]
    expected = next_token_loss(tiny(), torch.tensor([ids])).item()
    rows, mask = [(ids, [1] * 4)], torch.ones(1, 4)
    losses = [sft.sft_loss(tiny(), torch.tensor([ids]), mask).item(), sft.evaluate(tiny(), rows, RUN, 99),
              sft.sft_step(tiny(), rows, sft.Config(), RUN)]
    assert losses == pytest.approx([expected] * 3), "divided by all four tokens: three are predicted"


@pytest.mark.parametrize("logits", [1, 3000, 10**9])  # a slice for every position, some slices, one
def test_slices_of_the_head_change_nothing(monkeypatch, logits):
    ids, mask = trainer.pad(sft.make_examples(rows_of(6), TOK, 97))
    model = tiny().double()
    learned = mask[:, 1:].bool()
    expected = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) * learned  # (B, T-1)
    (-expected.sum() / learned.sum()).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    monkeypatch.setattr("model.SLICE", logits)
    assert torch.allclose(token_logps(model, ids, mask).double(), expected, atol=1e-5), \
        "not shifted by one, or slices out of order"
    longest = max(len(targets) for _, targets in slices(model, *supervised(model, ids, mask)))
    assert longest * TOK.vocab_size <= max(logits, TOK.vocab_size), "a slice has more logits than are good for the head"
    model.zero_grad()
    sft.sft_loss(model, ids, mask).backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(grads, model.parameters()))
    whole = -model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).mean()
    assert next_token_loss(model, ids).item() == pytest.approx(whole.item(), abs=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_fast_sum_is_the_sum_of_the_readable_log_probabilities(frozen, monkeypatch):
    ids, mask = trainer.pad(sft.make_examples(rows_of(6), TOK, 97))
    monkeypatch.setattr("model.SLICE", 3000)
    found = []
    for logps in (lambda model: token_logps(model, ids, mask).sum(), lambda model: summed_logps(model, ids, mask)):
        model = tiny().double()
        model.embedding.weight.requires_grad_(not frozen)  # as beside adapters
        total = logps(model)
        (total * 0.3).backward()
        found.append((total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-12), \
        "d/dlogits is onehot - softmax, times what comes from above"


def test_hidden_states_in_bfloat16_have_float32_logits():
    hidden, weight, targets = torch.randn(5, 8).bfloat16(), torch.randn(11, 8), torch.randint(11, (5,))
    expected = (hidden.float() @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).sum()
    found = head.summed_logps(hidden, weight, targets, rows=2)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)


def shifted():
    """A model whose logits all lie around -100, as GPT-2's do, and (ids, mask) for it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 400, 2, 2, 32))
    with torch.no_grad():
        model.norm.weight[0], model.norm.bias[0], model.embedding.weight[:, 0] = 0, 40.0, -100 / 40
    ids = torch.randint(400, (3, 40))
    return model, ids, torch.ones_like(ids)


@pytest.mark.parametrize("total", [lambda *a: token_logps(*a).sum(), lambda *a: -sft.sft_loss(*a, n=1),
                                   lambda model, ids, mask: -next_token_loss(model, ids) * ids[:, 1:].numel(),
                                   lambda model, ids, mask: model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum()])
def test_logits_far_from_zero_cost_no_digits_in_bfloat16(total):
    """A head that rounds its logits to bfloat16 is off by 0.1 a token here: their common part takes all the digits."""
    model, ids, mask = shifted()
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(model.hidden(ids[:, :-1]).double(), model.embedding.weight.double())
        found = total(model, ids, mask)
    expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None])
    assert logits.mean().item() == pytest.approx(-100, abs=1) and found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.sum().item(), abs=1e-3 * ids[:, 1:].numel())


def test_adapted_token_rows_have_float32_logits_too():
    model, ids, _ = shifted()
    lora.add_lora(model, 2, 4, tokens=[5, 6])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.float32


def test_empty_mask_is_zero_with_a_zero_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = sft.masked_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any(), \
        "0 / 0: nothing to learn from is no NaN"
    model = tiny()
    loss = sft.sft_loss(model, torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 6))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("micro_tokens", [10, 40, 10**6])  # a window at a time, two of five, all
def test_plain_text_beside_another_loss_is_the_weighted_mean_over_its_windows(micro_tokens, monkeypatch):
    text, drawn, draw = torch.arange(200) * 37 % TOK.vocab_size, [], pretrain.text_windows
    monkeypatch.setattr(pretrain, "text_windows", lambda *args, **settings: drawn.append(draw(*args, **settings)) or drawn[-1])
    config = sft.Config(mix=0.3, mix_rows=5, micro_tokens=micro_tokens, seed=2)
    model, whole = tiny(block_size=16), tiny(block_size=16)
    loss = pretrain.mix_step(model, text, 7, config, RUN)
    assert drawn[0].shape == (5, 17)  # one more than the context: the last is only a target
    expected = -0.3 * whole(drawn[0][:, :-1]).log_softmax(-1).gather(2, drawn[0][:, 1:, None]).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5), "--mix is lost, or the parts are not divided by all rows"
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(model.parameters(), whole.parameters()))
    halves = [pretrain.mix_step(model, text, 7, config, trainer.Run(RUN.device, RUN.dtype, rank, 2)) for rank in (0, 1)]
    assert sum(halves) == pytest.approx(loss, rel=1e-5), "two processes learn other windows than one"
    assert pretrain.pretrain_step(model, text, 5, 7, config, RUN) == pytest.approx(loss / 0.3, rel=1e-5)  # by itself
    assert pretrain.pretrain_step(model, text, 1, 7, config, trainer.Run(RUN.device, RUN.dtype, 1, 2)) == 0  # no row


def test_windows_of_plain_text_depend_on_seed_and_step():
    text, model = torch.arange(900), tiny(block_size=16)
    losses = [pretrain.mix_step(model, text, step, sft.Config(mix_rows=3, seed=seed), RUN) for seed, step in
              [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]
    assert losses[0] == losses[1] and len(set(losses)) == 5, "the seed or the step does not choose the windows"
    windows = pretrain.text_windows(torch.arange(20), 500, 18, seed=0)
    assert (windows.diff(dim=1) == 1).all() and sorted(set(windows[:, 0].tolist())) == [0, 1, 2]  # the last one too


def test_the_loss_on_held_out_text_is_the_mean_over_all_its_windows():
    model, stream = tiny(block_size=16, dropout=0.5), torch.randint(TOK.vocab_size, (5 * 17 + 3,))
    windows = stream[:85].view(5, 17)
    model.eval()
    expected = -model(windows[:, :-1]).log_softmax(-1).gather(2, windows[:, 1:, None]).mean().item()
    model.train()
    for rows in (1, 2, 32):  # parts of unequal size
        found = pretrain.text_loss(model, stream, RUN, rows)
        assert found == pytest.approx(expected, rel=1e-5), "a mean of means, or dropout is on"
    assert model.training


# ---- through the loader ----------------------------------------------------------------------------------------------

def logit_gradients(model, ids, mask):
    """The gradient of sft_loss to the logits of every position, by a head applied everywhere: (B, T-1, V)."""
    class Watched(TokenMatrix):  # another head than a plain matrix: its logits are made where they can be seen
        def logits(self, hidden):
            logits.append(super().logits(hidden))
            logits[-1].retain_grad()
            return logits[-1]

    logits, model.embedding.__class__ = [], Watched
    sft.sft_loss(model, ids, mask).backward()
    full = torch.zeros(*ids[:, 1:].shape, logits[0].size(-1))
    full[mask[:, 1:].bool()] = logits[0].grad
    return full


def test_only_the_assistants_tokens_are_learned_through_the_loader():
    examples = sft.make_examples(rows_of(11), TOK, 96)
    (ids, mask), = trainer.micro_batches(examples, 10**6, "cpu")
    grad = logit_gradients(tiny(), ids, mask)
    assistant, user = TOK.special["<|assistant|>"], TOK.special["<|user|>"]
    for row in range(len(ids)):
        speaking, expected = False, []
        for token in ids[row].tolist():  # an independent reading of who speaks
            expected.append(speaking)
            speaking = token == assistant or speaking and token != TOK.end
        assert grad[row].abs().sum(-1).gt(0).tolist() == expected[1:], \
            "the user is imitated, or the end token is masked out"
        assert expected[-1] or ids[row, -1] in (0, TOK.end)
    ends = (ids[:, 1:] == TOK.end) & mask[:, 1:].bool()
    assert ends.sum() == sum(len([m for m in r["messages"] if m["role"] == "assistant"]) for r in rows_of(11))
    assert (grad[ends].gather(1, torch.full((int(ends.sum()), 1), TOK.end)) < 0).all(), "it never learns to stop"
    assert user in ids


def test_head_on_supervised_positions_equals_the_loss_on_all_logits():
    examples = sft.make_examples(rows_of(7), TOK, 96)
    (ids, mask), = trainer.micro_batches(examples, 10**6, "cpu")
    model = tiny()
    short = sft.sft_loss(model, ids, mask)
    full = sft.masked_loss(model(ids)[:, :-1], ids[:, 1:], mask[:, 1:])
    assert torch.allclose(short, full, atol=1e-6)


def test_padding_changes_nothing_whatever_its_id():
    (ids, mask), = trainer.micro_batches(sft.make_examples(rows_of(5), TOK, 96), 10**6, "cpu")
    model, losses = tiny(), []
    for pad_id in (0, TOK.end, TOK.end_of_text):  # pad = eos is harmless: the mask says what counts, not the id
        more = torch.cat([ids, torch.full((5, 4), pad_id)], dim=1)
        padded = torch.where(torch.cat([ids == 0, torch.ones(5, 4, dtype=torch.bool)], 1), pad_id, more)
        losses.append(sft.sft_loss(model, padded, torch.cat([mask, torch.zeros(5, 4, dtype=torch.long)], 1)).item())
    assert losses == pytest.approx([sft.sft_loss(model, ids, mask).item()] * 3, rel=1e-6), \
        "padding is told from text by its id"


@pytest.mark.parametrize("micro_tokens", [1, 40, 150, 10**6])
def test_accumulation_equals_one_large_batch(micro_tokens):
    rows, config = sft.make_examples(rows_of(13), TOK, 96), sft.Config(micro_tokens=micro_tokens)
    model, whole = tiny(), tiny()
    (ids, mask), = trainer.micro_batches(rows, 10**6, "cpu")
    expected = sft.sft_loss(whole, ids, mask)
    expected.backward()
    assert len(trainer.micro_batches(rows, micro_tokens, "cpu")) >= {1: 13, 40: 4, 150: 2, 10**6: 1}[micro_tokens]
    halves = [sft.sft_step(model, rows, config, trainer.Run(RUN.device, RUN.dtype, rank, 2)) for rank in (0, 1)]  # two processes
    assert sum(halves) == pytest.approx(expected.item(), rel=1e-5), "a mean of means in what is logged"
    for a, b in zip(model.parameters(), whole.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), "a mean of means: the parts have different numbers of tokens"


def test_long_conversations_lose_their_oldest_turns_never_their_answer():
    def turn(word):
        return [{"role": "user", "content": f"{word} ask"}, {"role": "assistant", "content": f"{word} answer"}]
    messages = [{"role": "system", "content": "Be kind."}, *turn("first"), *turn("second"), *turn("third")]
    said = []
    whole = len(TOK.render(messages)[0])
    (ids, mask), = sft.make_examples([{"messages": messages}], TOK, whole - 1, said.append)
    text = TOK.encoding.decode(ids)
    assert "first" not in text and "Be kind." in text and "second answer" in text and text.endswith("third answer<|end|>")
    assert "1 of 1 conversations lost their oldest turns" in said[0]
    short = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    kept = sft.make_examples([{"messages": messages[-2:]}, {"messages": short}], TOK, len(TOK.render(short)[0]), said.append)
    assert len(kept) == 1 and "1 of 2 conversations dropped" in said[-1]
    with pytest.raises(UserError, match="no conversation fits 3 tokens"):
        sft.make_examples([{"messages": short}], TOK, 3, said.append)


def test_a_file_of_which_under_a_tenth_fits_stops_with_the_flag_that_helps(tmp_path):
    rows = [{"prompt": f"{i} " + "long " * (40 if i else 1), "completion": "yes"} for i in range(21)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = sft.Config(data=str(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="only 1 of 21 conversations fit 30 tokens: --init with a model that reads more"):
        sft.load_data(config, TOK, 30, lambda text: None)
    config.max_tokens = 30
    with pytest.raises(UserError, match="30 tokens: raise --max-tokens"):
        sft.load_data(config, TOK, 30, lambda text: None)


def test_a_conversation_whose_turns_with_weight_went_away_teaches_nothing():
    old = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "learned " * 9}]
    new = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "context", "loss_weight": 0.0}]
    rows, said = [{"messages": old + new}, *rows_of(1)], []
    assert len(sft.make_examples(rows, TOK, 97, said.append)) == 2 and not said
    (_, mask), = sft.make_examples(rows, TOK, len(TOK.render(old + new)[0]) - 1, said.append)
    assert any(mask) and "1 of 2 conversations dropped: no answer to learn from" in said[-1]
    with pytest.raises(UserError, match="no conversation fits 97 tokens and has an answer to learn from"):
        sft.make_examples([{"messages": new}], TOK, 97, said.append)


def test_evaluate_is_the_mean_over_tokens_not_over_batches():
    examples, model = sft.make_examples(rows_of(9), TOK, 96), tiny(dropout=0.5)
    expected = sum(sft.masked_loss(model.eval()(torch.tensor([ids]))[:, :-1], torch.tensor([ids[1:]]), torch.tensor([mask[1:]]), 1)
                   for ids, mask in examples) / sum(sum(mask[1:]) for _, mask in examples)
    model.train()
    assert sft.evaluate(model, examples, RUN, 50) == pytest.approx(expected.item(), rel=1e-5) and model.training


# ---- whole runs ------------------------------------------------------------------------------------------------------

SMALL = dict(steps=12, batch_size=6, n_sft=60, eval_every=0, sample_every=0, save_every=4, warmup=2, device="cpu",
             dtype="float32", dropout="0.1", mix_rows=2)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny(n_embd=32).save_pretrained(folder)
    TOK.save(folder)
    (folder / "text.txt").write_text("\n\n".join(Island().plain_text(100)))
    return folder


def small(base_folder, out, **settings):
    return SMALL | dict(init=str(base_folder), mix_data=str(base_folder / "text.txt"), out=str(out)) | settings


def command(script, config):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in config.items() if not isinstance(v, bool)]
    return [sys.executable, *script, *flags, *[f"--{k}" for k, v in config.items() if v is True]]


def weights(folder):
    model = load(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def train(config):
    """sft.py in this process, with as many threads as the processes that it is compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sft.main(check(sft.Config(**config)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("settings", [{}, {"lora_r": 2, "nf4": True, "lora_dropout": 0.1}], ids=["all weights", "QLoRA"])
def test_resume_after_kill_9_equals_the_uninterrupted_run_bit_for_bit(base_folder, tmp_path, settings, capfd):
    config = small(base_folder, tmp_path / "whole", **settings)
    train(config)
    killed, log = config | dict(out=str(tmp_path / "killed")), tmp_path / "killed" / "log.jsonl"
    process = subprocess.Popen(command([str(ROOT / "sft.py")], killed), env=ONE_THREAD, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 6):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed" / trainer.STATE).exists()  # it was killed between a checkpoint and the end
    train(killed | dict(resume=True))
    assert "resumed" in capfd.readouterr().out
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert (tmp_path / "whole" / "log.jsonl").read_text() == log.read_text()


@pytest.mark.parametrize("batch_size", [6, 1])  # with one row the second process has nothing to do
def test_two_processes_equal_one_at_the_same_global_batch(base_folder, tmp_path, batch_size):
    config = small(base_folder, tmp_path / "one", dropout="0", steps=6, lr=1e-3, batch_size=batch_size, mix_rows=1,
                   eval_every=3)
    train(config)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "sft.py")]
    two = subprocess.run(command(torchrun, config | dict(out=str(tmp_path / "two"))), capture_output=True, text=True,
                         env=ONE_THREAD, timeout=120)
    assert two.returncode == 0, two.stderr
    a, b, start = weights(tmp_path / "one"), weights(tmp_path / "two"), weights(base_folder)
    assert (a - b).abs().max() < 1e-5 < 1e-3 < (a - start).abs().max()
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 8 and all(x == pytest.approx(y, rel=1e-3) for x, y in zip(*logs))


def test_what_does_not_fit_is_never_the_held_out_row(base_folder, tmp_path, capfd):
    """Of ten rows any could be drawn, also the only one that is too long."""
    rows = rows_of(10)
    _, (held,) = files.hold_out(rows, say=lambda line: None)
    held["messages"][-2]["content"] = "word " * 300
    (tmp_path / "ten.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(small(base_folder, tmp_path / "out", data=str(tmp_path / "ten.jsonl"), n_sft=3000, mix=0.0, steps=2, eval_every=1))
    said = capfd.readouterr().out
    assert said.count("1 of 10 conversations dropped") == 1 and "8 conversations, 2 steps" in said
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["held_out"]) and line["held_out"] > 0 for line in log[1::2])


def test_a_broken_step_stops_with_one_sentence_and_keeps_the_checkpoint(base_folder, tmp_path, monkeypatch):
    loss, steps = sft.sft_loss, []
    monkeypatch.setattr(sft, "sft_loss", lambda *args: loss(*args) * (math.nan if len(steps) > 5 else 1))
    monkeypatch.setattr(trainer, "begin_step", lambda step, *_: steps.append(step))
    with pytest.raises(UserError, match="step 5: .*not finite.*checkpoint of step 5 .*kept"):
        train(small(base_folder, tmp_path, lr=1e-3, warmup=0, save_every=1))
    assert torch.isfinite(weights(tmp_path)).all()


def test_adapters_are_saved_alone_and_load_as_a_model(base_folder, tmp_path):
    train(small(base_folder, tmp_path, lora_r=4, dropout="0"))
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "adapter_model.safetensors").stat().st_size < 80_000
    assert not torch.equal(weights(tmp_path), weights(base_folder))


@pytest.mark.runs
def test_recipes_are_defaults_that_flags_override():
    config = parse(sft.Config, sft.RECIPES, ["--recipe", "lima", "--batch-size", "8"])
    assert (config.epochs, config.lr, config.batch_size, config.dropout, config.max_tokens) == (15, 1e-5, 8, "0.0,0.3", 2048)
    assert trainer.learning_rate(0, 100, config) == 1e-5 and trainer.learning_rate(99, 100, config) == pytest.approx(1e-6)


# ---- questions that have to fit --------------------------------------------------------------------------------------

@pytest.mark.parametrize("max_new_tokens, room", [(10, 30), (20, 20), (100, 20)])  # never more than half of 40 for the answer
def test_of_a_question_that_is_too_long_the_end_is_kept(max_new_tokens, room):
    tok = get_tokenizer("tiny")
    question = {"role": "user", "content": "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2 + "?"}
    for messages in ([question], [{"role": "system", "content": "s"}, question]):
        kept, ids = generating.fit_question(messages, tok, 40, max_new_tokens)
        assert kept == [question] and ids == tok.render_prompt([question])[-room:]


def test_an_answer_stops_at_the_end_token(monkeypatch):
    tok, seen = get_tokenizer("tiny"), []
    monkeypatch.setattr(generating, "generate", lambda model, prompts, n, stop, **sampling: seen.append((n, stop)) or [[tok.end]])
    model = type("Model", (), {"config": type("Config", (), {"block_size": 96})})
    run = trainer.Run(torch.device("cpu"), torch.float32)
    assert generating.ask(model, tok, [[{"role": "user", "content": "hi"}]], run, 7) == [""] and seen == [(7, tok.stops)]


def test_a_search_is_looked_up_and_answered(monkeypatch):
    """Two of three search; one of them searches again after its result, and then its query is its answer."""
    tok, asked = get_tokenizer("tiny"), []
    says = lambda role, text: {"role": role, "content": text}
    query = lambda text: [tok.special["<|search|>"], *tok.encode(f" {text}"), tok.ends[1]]
    answers = iter([[query("Mabel"), tok.encode(" Hello.") + [tok.end], query("Zorro")], [tok.encode(" A fox.") + [tok.end], query("Zorro")]])

    def generate(model, prompts, n, stop, **sampling):
        asked.append([tok.encoding.decode(prompt) for prompt in prompts])
        return next(answers)

    monkeypatch.setattr(generating, "generate", generate)
    model = type("Model", (), {"config": type("Config", (), {"block_size": 96})})
    found = generating.ask(model, tok, [[says("user", word)] for word in ("one", "two", "three")], RUN, 7,
                           look_up=lambda name: {"Mabel": "Mabel is a fox."}.get(name, "Nothing."))
    assert found == ["A fox.", "Hello.", "Zorro"]
    assert [text.partition("<|assistant|>")[2] for text in asked[1]] == [
        "<|search|> Mabel<|result|> Mabel is a fox.<|end|><|assistant|>", "<|search|> Zorro<|result|> Nothing.<|end|><|assistant|>"]


def test_generation_stops_at_any_of_several_tokens():
    torch.manual_seed(0)
    model = tiny().eval()
    whole, = generating.generate(model, [[1, 2, 3]], 12, 1.0, seed=1)
    cut, = generating.generate(model, [[1, 2, 3]], 12, 1.0, seed=1, stop=(whole[9], whole[4]))
    assert cut == whole[:1 + min(whole.index(whole[9]), whole.index(whole[4]))]


def test_kinds_of_questions_come_in_and_stay_out():
    kinds = lambda **flags: {row["kind"] for row in sft.load_data(check(sft.Config(n_sft=500, **flags)), TOK, 129, print)[0]}
    assert kinds(with_="reading,search", without="unknown") == kinds() - {"unknown"} | {"reading", "search"}
    held = [row["kind"] for row in sft.load_data(sft.Config(n_sft=9, with_="sums"), TOK, 129, print)[1]]
    assert len(held) == 700 and held.count("sums") == 100 and "unknown" in held
    with pytest.raises(UserError, match="--with tigers"):
        kinds(with_="tigers")


def test_a_checkpoint_without_the_search_tokens_gets_them_when_it_is_to_search(tmp_path):
    tok = get_tokenizer("tiny", "chat")
    GPT(GPTConfig(128, tok.vocab_size, 1, 2, 16)).save_pretrained(tmp_path / "old")
    tok.save(tmp_path / "old")
    settings = SMALL | dict(init=str(tmp_path / "old"), steps=1, mix=0.0, dropout="0")
    for out, more, size in (("plain", "", 1029), ("searching", "search", 1031)):
        train(settings | dict(out=str(tmp_path / out), with_=more))
        assert load(tmp_path / out).config.vocab_size == size == get_tokenizer(str(tmp_path / out)).vocab_size
    with pytest.raises(UserError, match="--template human"):
        train(settings | dict(out=str(tmp_path / "no"), with_="search", template="human"))
