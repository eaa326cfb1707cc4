"""bench.py without peers, at a toy size: that every command runs, counts what it says, and trains what it times."""
import json

import pytest
import torch

import bench
import dpo
import ppo
import sft
from common.errors import UserError
from evals import benches
from llama import Llama, LlamaConfig


@pytest.fixture
def toy(monkeypatch):
    """A shape of its own, no peers, and the size of everything cut down."""
    monkeypatch.setattr(benches, "SHAPES", {"toy": dict(n_layer=1, n_head=2, n_embd=16)})
    monkeypatch.setattr(benches, "VOCABULARY", 1100)
    monkeypatch.setattr(benches, "CONTEXT", 64)
    monkeypatch.setattr(benches, "installed", lambda package, candidates: {})
    monkeypatch.setattr(benches, "peak_memory", lambda *_, **__: (1.0, 2.0))
    monkeypatch.setattr(bench, "machine", lambda: "here")


@pytest.fixture
def folder(toy, tmp_path):
    """What a candidate reads: 6 rows, two batches of 3, and their prompts."""
    args = type("Args", (), {"data": "", "tokenizer": "", "device": "cpu", "dtype": "float32"})
    tok, examples = benches.read_rows(args, 6)
    benches.write_folder(tmp_path, "toy", tok, args, examples=examples, batch_size=3, new_tokens=5,
                       prompts=[ids[:mask.index(1)] for ids, mask in examples])
    return str(tmp_path)


@pytest.mark.parametrize("command", ["sft", "dpo", "generate"])
def test_a_command_prints_its_table(toy, capsys, command):
    bench.main([command, "--rounds", "1", "--batch-size", "2", "--steps", "1", "--new-tokens", "3", "--device", "cpu"])
    header, row = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert header.startswith("toy, ") and "tokens/s" in header
    name, speed, *memory = row.rsplit(maxsplit=3)
    assert name == "this project" and float(speed.replace(",", "")) > 0 and memory == ["1", "2"]


def test_tokens_per_second_are_the_real_tokens(toy, capsys, monkeypatch):
    counted = {}
    monkeypatch.setattr(benches, "race", lambda args, tok, title, tokens, candidates, **inputs: counted.update(
        inputs, tokens=tokens))
    bench.main(["sft", "--batch-size", "2", "--steps", "2"])
    assert len(counted["examples"]) == 4
    assert counted["tokens"] == sum(len(ids) for ids, _ in counted["examples"])  # not 4 times the longest
    bench.main(["generate", "--batch-size", "2", "--new-tokens", "7"])
    assert counted["tokens"] == 2 * 7
    for (ids, mask), prompt in zip(benches.read_rows(bench_args(), 2)[1], counted["prompts"]):
        assert prompt == ids[:len(prompt)] and mask[len(prompt)] == 1 and not any(mask[:len(prompt)])


def bench_args():
    return type("Args", (), {"data": "", "tokenizer": ""})


def test_a_call_of_sft_is_one_epoch_that_changes_the_weights(folder, monkeypatch):
    seen, models = [], []
    real = sft.sft_loss

    def spy(model, ids, mask, n):
        models.append(model)
        assert n == mask[:, 1:].sum()  # the mean over the step's supervised tokens, as sft.py has it
        seen.extend(tuple(row[:int(m.nonzero().max()) + 1].tolist()) for row, m in zip(ids, mask))
        return real(model, ids, mask, n)

    monkeypatch.setattr(sft, "sft_loss", spy)
    epoch = benches.our_sft(folder)
    epoch()
    first = models[0].blocks[0].mlp.c_fc.weight.clone()
    epoch()
    rows = [tuple(ids) for ids, _ in json.loads(open(folder + "/bench.json").read())["examples"]]
    assert sorted(seen) == sorted(rows * 2)  # every row once an epoch, so every candidate has the same tokens
    assert not torch.equal(first, models[0].blocks[0].mlp.c_fc.weight)


def test_generate_writes_as_many_tokens_as_are_counted(folder):
    assert [len(row) for row in benches.our_generate(folder)()] == [5] * 6
    assert json.loads(open(folder + "/config.json").read())["vocab_size"] == 1100  # GPT-2's, however few tokens the tokenizer has


def test_a_function_may_measure_itself():
    calls = []
    candidates = {"own": lambda: calls.append("own") or 7.0, "timed": lambda: calls.append("timed")}
    seconds = benches.interleaved(candidates, rounds=2)
    assert seconds["own"] == [7.0, 7.0] and max(seconds["timed"]) < 1
    assert calls == ["own", "timed"] * 3  # in turn, the first time to warm up


def test_ratio_is_formed_within_the_round():
    assert benches.ratio([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == "2.00 (1.00-3.00)"


def test_the_table_says_how_many_times_as_fast_as_the_peer_this_project_is(toy, capsys, monkeypatch):
    monkeypatch.setattr(benches, "interleaved", lambda candidates, rounds: {"this project": [1.0, 2.0], "peer": [3.0, 6.0]})
    args = type("Args", (), {"shape": "toy", "rounds": 2, "device": "cpu", "dtype": "float32"})
    candidates = {name: lambda folder: lambda: None for name in ("this project", "peer")}
    benches.race(args, benches.get_tokenizer("tiny"), "nothing", 300, candidates)
    ours, peer = capsys.readouterr().out.splitlines()[1:3]
    assert ours.split() == ["this", "project", "200", "1", "2"] and peer.split() == ["peer", "67", "3.00", "(3.00-3.00)", "1", "2"]


def test_peak_memory_is_of_the_work_not_of_this_process():
    ballast = torch.ones(64 * 2 ** 20)  # 256 MB here must not count there
    peaks = benches.peak_memory("import torch", "x = torch.ones(25 * 2 ** 20)")  # 100 MB
    if peaks is None:
        pytest.skip("this system does not tell a process its peak")
    assert 80 < peaks[1] - peaks[0] < 150
    assert peaks[1] < 200 + 256 + 100 and len(ballast)


def test_nf4_prints_its_tables(toy, capsys, monkeypatch):
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: real(*(min(n, 64) for n in shape), **options))
    monkeypatch.setattr(benches, "try_compile", lambda *_: {})
    bench.main(["nf4", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "quantize_nf4, double" in out
    stacks = out.split("peak MB\n")[1].strip().splitlines()
    assert len(stacks) == 3 and all(line.split()[-1] == "2" for line in stacks)  # after the work, not before it


@pytest.mark.parametrize("flags, words", [(["--rounds", "0"], "--rounds: 0"), (["--steps", "-1"], "--steps: -1"),
                                          (["--batch-size", "9000"], "smaller --batch-size")])
def test_impossible_values_are_one_sentence(toy, tmp_path, flags, words):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(UserError, match=words):
        bench.main(["sft", "--data", str(data), "--tokenizer", "tiny", *flags])


def test_dpo_counts_both_sides_of_a_pair(toy, monkeypatch):
    counted = {}
    monkeypatch.setattr(benches, "race", lambda args, tok, title, tokens, candidates, **inputs: counted.update(
        inputs, tokens=tokens))
    bench.main(["dpo", "--batch-size", "2", "--steps", "2"])
    assert len(counted["pairs"]) == 4
    assert counted["tokens"] == sum(len(ids) for pair in counted["pairs"] for ids, _ in pair)
    for (chosen, mask), (rejected, rejected_mask) in counted["pairs"]:
        prompt = chosen[:mask.index(1)]
        assert chosen != rejected and rejected[:rejected_mask.index(1)] == prompt  # the same question, another answer


def test_a_call_of_dpo_asks_the_reference_and_trains_on_every_pair(toy, tmp_path, monkeypatch):
    args = type("Args", (), {"data": "", "tokenizer": "", "device": "cpu", "dtype": "float32"})
    tok, pairs = benches.read_pairs(args, 4)
    benches.write_folder(tmp_path, "toy", tok, args, batch_size=2,
                       pairs=[[(answer.ids, answer.mask) for answer in pair] for pair in pairs])
    seen, refs, models = [], [], []
    real = dpo.forward

    def spy(model, part, run, config):
        models.append(model)
        seen.extend(tuple(map(tuple, (chosen.ids, rejected.ids))) for chosen, rejected in part)
        refs.extend(answer.ref_logp for pair in part for answer in pair)
        return real(model, part, run, config)

    monkeypatch.setattr(dpo, "forward", spy)
    epoch = benches.our_dpo(str(tmp_path))
    epoch()
    first = models[0].blocks[0].mlp.c_fc.weight.clone()
    epoch()
    assert sorted(seen) == sorted([(tuple(chosen.ids), tuple(rejected.ids)) for chosen, rejected in pairs] * 2)
    assert all(logp < 0 for logp in refs)  # 0 would mean that nobody asked the reference
    assert not torch.equal(first, models[0].blocks[0].mlp.c_fc.weight)


def test_an_iteration_of_ppo_rolls_out_every_prompt_and_updates_both_models(toy, tmp_path, monkeypatch):
    args = type("Args", (), {"device": "cpu", "dtype": "float32"})
    tok = benches.get_tokenizer("tiny")
    prompts = [tok.render_prompt([{"role": "user", "content": text}]) for text in ("Who are you?", "Hello")] * 2
    benches.write_folder(tmp_path, "toy", tok, args, prompts=prompts, minibatch=2, new_tokens=5)
    calls = []
    real = ppo.ppo_update

    def spy(rollout, policy, value, optimizers, *others):
        before = [model.state_dict()[name].clone() for model, name in ((policy, "embedding.weight"), (value, "head.weight"))]
        logs = real(rollout, policy, value, optimizers, *others)
        after = [policy.embedding.weight, value.head.weight]
        calls.append((len(rollout.ids), rollout.mask.sum(1).tolist(), [not torch.equal(a, b) for a, b in zip(before, after)]))
        return logs

    monkeypatch.setattr(ppo, "ppo_update", spy)
    iteration = benches.our_ppo(str(tmp_path))
    iteration()
    iteration()
    for n, lengths, changed in calls:
        assert n == 4 and max(lengths) == 5 and changed == [True, True]
    assert len(calls) == 2


def test_ppo_shows_seconds_and_answers_every_question_twice(toy, capsys, monkeypatch):
    bench.main(["ppo", "--rounds", "1", "--batch-size", "4", "--new-tokens", "3", "--device", "cpu"])
    header, row = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert header.startswith("toy, ") and "s/iteration" in header and "4 rollouts of 3 tokens" in header
    assert row.startswith("this project (PPO)") and 0 < float(row.split()[3]) < 60
    inputs = {}
    monkeypatch.setattr(benches, "race", lambda args, tok, title, tokens, candidates, **given: inputs.update(given))
    bench.main(["ppo", "--batch-size", "4"])
    assert inputs["new_tokens"] == 28 and inputs["minibatch"] == 2
    assert inputs["prompts"][0::2] == inputs["prompts"][1::2] and len(inputs["questions"]) == 2
    with pytest.raises(UserError, match="even"):
        bench.main(["ppo", "--batch-size", "3"])


def test_memory_prints_what_each_part_takes(toy, capsys, monkeypatch):
    small = LlamaConfig(1024, 1100, 1, 4, 2, 32, 48, 8, tie=True)
    monkeypatch.setattr(benches, "LARGE", {"large": small})
    seen = []

    def measured(*stages, cuda):
        exec(stages[1], names := {})
        before = [p.detach().clone() for p in trained(names["call"])]
        names["call"]()
        seen.append([torch.equal(a, b) for a, b in zip(before, trained(names["call"]))])
        return [1.0, 2.0, 3.0]

    def trained(call):
        cells = [cell.cell_contents for cell in call.__closure__ or ()]
        return [p for model in cells if isinstance(model, Llama) for p in model.parameters() if p.requires_grad]

    monkeypatch.setattr(benches, "peak_memory", measured)
    bench.main(["memory", "--device", "cpu", "--new-tokens", "3"])
    out = capsys.readouterr().out
    header, *rows = out[out.index("large, "):].split("\n\n")[0].splitlines()
    assert header.startswith("large, 3 new tokens") and [row.split()[-3:] for row in rows] == [["1", "2", "3"]] * 2
    assert rows[1].startswith("QLoRA step") and len(seen[1]) == 14 and not any(seen[1][1::2]), "no B of an adapter moved"


def test_a_shape_belongs_to_its_commands(toy):
    for flags in (["sft", "--shape", "llama-3.2-1b"], ["nf4", "--shape", "small"], ["memory", "--shape", "tiny"]):
        with pytest.raises(UserError, match=f"--shape {flags[2]} is no shape of {flags[0]}"):
            bench.main(flags)
