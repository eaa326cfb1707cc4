"""The shared parts of training: batches, schedule, optimizer step, checkpoints, resume, log."""
import json

import pytest
import torch

import trainer
from common.disk import replacing
from common.errors import UserError
from common.flags import TrainConfig

RUN = trainer.Run(torch.device("cpu"), torch.float32)

# ---- batches ---------------------------------------------------------------------------------------------------------

def test_every_epoch_visits_every_row_once_in_another_order():
    lengths = [3 + (7 * i) % 50 for i in range(103)]
    batches = trainer.Batches(lengths, 10, seed=1)
    first, second = ([i for step in range(e * 11, (e + 1) * 11) for i in batches[step]] for e in (0, 1))
    assert len(batches) == 11 and first != second and sorted(first) == sorted(second) == list(range(103))


def test_a_batch_is_a_function_of_seed_and_step():
    lengths = list(range(5, 300))
    a, b = trainer.Batches(lengths, 8, seed=1), trainer.Batches(lengths, 8, seed=1)
    a[0], a[90]
    assert a[41] == b[41] != trainer.Batches(lengths, 8, seed=2)[41]


def test_lengths_in_a_batch_are_similar():
    lengths = [(37 * i) % 200 + 1 for i in range(1600)]
    batches = trainer.Batches(lengths, 16, seed=0)
    padded = sum(max(lengths[i] for i in batches[s]) * len(batches[s]) for s in range(len(batches)))
    assert padded < 1.1 * sum(lengths)  # random batches of 16 would pad to nearly twice


def test_parts_are_as_long_as_the_budget_allows_and_a_wider_row_is_alone():
    assert trainer.split([-5, -40, -1, -5, -2, -30, -2], abs, 10) == [[-1, -2, -2], [-5, -5], [-30], [-40]]


def test_processes_share_the_rows_of_a_batch():
    rows = list(range(7))
    shares = [trainer.Run(torch.device("cpu"), torch.float32, rank, 3).share(rows) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]], "a row is learned twice, or never"


def test_micro_batches_hold_every_row_within_the_budget():
    examples = [(list(range(1, n + 1)), [0] + [1] * (n - 1)) for n in (3, 30, 8, 8, 2, 17, 5)]
    parts = trainer.micro_batches(examples, 24, "cpu")
    assert sorted(len(ids[0]) for ids, _ in parts) and len(parts) > 2
    assert all(ids.numel() <= 24 or len(ids) == 1 for ids, _ in parts)
    rows = sorted(row[row > 0].tolist() for ids, _ in parts for row in ids)
    assert rows == sorted(ids for ids, _ in examples)
    assert sum(int(mask.sum()) for _, mask in parts) == sum(sum(mask) for _, mask in examples)
    assert trainer.micro_batches([], 24, "cpu") == []


# ---- optimizer and schedule ------------------------------------------------------------------------------------------

def test_decay_on_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    matrices, vectors = trainer.adamw(model, TrainConfig(weight_decay=0.3)).param_groups
    assert [p.dim() for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.3, \
        "biases and gains are decayed"
    assert [p.dim() for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0


def matrix(*values):
    """A matrix (4, 6) with these singular values, and the U V^T of it."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(4, 4))[0], torch.linalg.qr(torch.randn(6, 4))[0]
    return U @ torch.diag(torch.tensor(values)) @ V.T, U @ V.T


@pytest.mark.parametrize("shape", [lambda G: G, lambda G: G.T, lambda G: 1e4 * G, lambda G: torch.stack([G, 3 * G])])
def test_orthogonalize_sends_singular_values_near_one_and_keeps_the_directions(shape):
    G, UV = matrix(5.0, 2.0, 1.0, 0.4)
    made = trainer.orthogonalize(shape(G))
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.25
    back = made if made.dim() == 3 else (made.T if made.shape == (6, 4) else made)[None]
    assert all((U * UV).sum() / 4 > 0.9 for U in back)  # <made, U V^T> = the mean singular value


class Blocks(torch.nn.Module):
    """What muon looks for in a network: a layer of q, k and v, an MLP's, a matrix of token vectors, a gain."""

    stacked = {"qkv": 3}

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4)
        self.qkv, self.mlp = torch.nn.Linear(4, 12), torch.nn.Linear(4, 12)

    def linears(self):
        return {"qkv": self.qkv, "mlp": self.mlp}


def test_a_step_of_muon_by_hand_and_adamw_for_the_rest():
    torch.manual_seed(0)
    model, config = Blocks(), TrainConfig(lr=0.1, weight_decay=0.5)
    start, other = {name: p.detach().clone() for name, p in model.named_parameters()}, Blocks()
    other.load_state_dict(model.state_dict())
    muon, adamw = trainer.muon(model, config), trainer.adamw(other, config)
    grads = [{name: torch.randn_like(p) for name, p in start.items()} for _ in range(2)]
    expected, mean = {name: start[name] for name in ("qkv.weight", "mlp.weight")}, {}
    for step in grads:
        for net, optimizer in ((model, muon), (other, adamw)):
            for name, p in net.named_parameters():
                p.grad = step[name].clone()
            optimizer.step()
        for name, W in expected.items():
            mean[name] = 0.95 * mean.get(name, 0) + step[name]
            ahead = step[name] + 0.95 * mean[name]
            parts = ahead.split(4) if name == "qkv.weight" else [ahead]  # q, k and v each by itself
            O = torch.cat([trainer.orthogonalize(part) for part in parts])
            size = 4 if name == "qkv.weight" else 12
            expected[name] = W - 0.1 * (0.2 * size ** 0.5 * O + 0.5 * W)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(p, expected.get(name, q), atol=1e-5), name
        assert (name in expected) != torch.allclose(p, q, atol=1e-3)


def test_muon_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    config, model = TrainConfig(out=str(tmp_path), lr=0.1), Blocks()
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(6)]

    def go(net, optimizer, steps):
        for step in steps:
            for p, grad in zip(net.parameters(), grads[step]):
                p.grad = grad.clone()
            optimizer.step()

    optimizer = trainer.muon(model, config)
    go(model, optimizer, range(3))
    trainer.save_state(config, RUN, 3, 6, model, optimizer)
    go(model, optimizer, range(3, 6))
    other = Blocks()
    fresh = trainer.muon(other, config)
    config.resume = True
    assert trainer.load_state(config, RUN, 6, other, fresh) == 3
    go(other, fresh, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_two_steps_of_adamw_by_hand():
    model = torch.nn.Linear(2, 1, bias=False)
    p, m, v = model.weight.detach().clone(), 0.0, 0.0
    optimizer = trainer.adamw(model, TrainConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=0.05, weight_decay=0.3))
    for t, grad in enumerate((torch.tensor([[0.2, -0.1]]), torch.tensor([[0.1, 0.3]])), 1):
        model.weight.grad = grad
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad ** 2
        p = p - 0.1 * (m / (1 - 0.8 ** t) / ((v / (1 - 0.9 ** t)).sqrt() + 0.05) + 0.3 * p)
        assert torch.allclose(model.weight, p, atol=1e-6)


def test_learning_rate_at_hand_worked_steps():
    config = TrainConfig(lr=3.0, min_lr=0.1, warmup=3)

    def rates(c):
        return [round(trainer.learning_rate(step, 8, c) / 3, 6) for step in range(8)]  # as shares of the highest

    assert rates(config)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(config)[4] == pytest.approx(0.1 + 0.9 * 0.8535534, abs=1e-6)  # (1 + cos 45 degrees) / 2, not 3 / 4
    assert rates(config)[5] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-6) and rates(config)[7] == 0.1
    config.schedule = "linear"
    assert rates(config)[3:] == [1.0, 0.775, 0.55, 0.325, 0.1]
    config.schedule = "constant"
    assert rates(config)[3:] == [1.0] * 5
    assert trainer.learning_rate(0, 1, TrainConfig(warmup=0, lr=1.0)) == 1.0  # a run of one step


def test_update_clips_checks_and_steps():
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert trainer.update(layer, optimizer, TrainConfig(clip=1.0), RUN, 0)["grad_norm"] == pytest.approx(5.0)
    assert torch.allclose(before - layer.weight, torch.tensor([[0.6, 0.8]]), atol=1e-5) and layer.weight.grad is None
    layer.weight.grad, before = torch.tensor([[float("nan"), 1.0]]), layer.weight.detach().clone()
    with pytest.raises(UserError, match="step 7: .* not finite"):
        trainer.update(layer, optimizer, TrainConfig(), RUN, 7)
    assert torch.equal(before, layer.weight)


# ---- files -----------------------------------------------------------------------------------------------------------

def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="could not be written"), replacing(path) as temporary:
        raise OSError(28, "No space left on device")


def state_of(tmp_path, steps=10, **settings):
    config = TrainConfig(out=str(tmp_path), **settings)
    model = torch.nn.Linear(3, 2)
    return config, model, torch.optim.AdamW(model.parameters()), steps


def test_state_round_trip_and_its_refusals(tmp_path):
    run = trainer.Run(torch.device("cpu"), torch.float32)  # of its own: a run knows what it has begun
    config, model, optimizer, steps = state_of(tmp_path)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    trainer.save_state(config, run, 4, steps, model, optimizer)
    config, other, fresh, steps = state_of(tmp_path, resume=True)
    assert trainer.load_state(config, run, steps, other, fresh) == 4
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    with pytest.raises(UserError, match="--steps 10 .now --steps 11"):
        trainer.load_state(config, run, 11, other, fresh)
    with pytest.raises(UserError, match="other weights"):
        trainer.load_state(config, run, 10, torch.nn.Linear(3, 2, bias=False), fresh)
    (tmp_path / trainer.STATE).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="damaged"):
        trainer.load_state(config, run, 10, other, fresh)
    (tmp_path / trainer.STATE).unlink()
    with pytest.raises(UserError, match="no unfinished run"):
        trainer.load_state(config, run, 10, other, fresh)


def test_a_state_says_that_a_run_is_unfinished(tmp_path):
    config, model, optimizer, steps = state_of(tmp_path)
    trainer.save_state(config, RUN, 4, steps, model, optimizer)
    (tmp_path / "config.json").write_text("{}")
    assert not trainer.is_finished(tmp_path)
    trainer.finish(config, RUN, trainer.Log(config, RUN, 10, 10), save=lambda: None)
    assert trainer.is_finished(tmp_path)


# ---- log -------------------------------------------------------------------------------------------------------------

def test_log_drops_the_lines_of_steps_that_are_done_again(tmp_path):
    config = TrainConfig(out=str(tmp_path))
    log = trainer.Log(config, RUN, 0, 6)
    for step in log.steps():
        log.write(step, loss=float(step))
    log = trainer.Log(config, RUN, 4, 6)
    for step in log.steps():
        log.write(step, loss=-1.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6)) and lines[3]["loss"] == 3.0 and lines[4]["loss"] == -1.0


def test_ctrl_c_ends_the_loop_after_the_step_and_finish_saves(tmp_path):
    import os
    import signal
    config, saved = TrainConfig(out=str(tmp_path)), []
    log = trainer.Log(config, RUN, 0, 6)
    for step in log.steps():
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        saved = [step]
    assert saved == [2] and log.next == 3
    with pytest.raises(UserError, match="before step 3 of 6.*--resume"):
        trainer.finish(config, RUN, log, save=lambda: saved.append("saved"))
    assert saved == [2, "saved"]


def test_due_every_so_many_steps_and_at_the_end(tmp_path):
    log = trainer.Log(TrainConfig(out=str(tmp_path)), RUN, 0, 7)
    assert [step for step in range(7) if log.due(step, 3)] == [2, 5, 6] and not log.due(6, 0)
