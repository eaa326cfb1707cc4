"""What other devices than the CPU ask for, as far as a CPU can tell: no float64 and no float8 where they do not exist,
and no tensor of the CPU among those of another device (here: meta)."""
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpo
import ppo
import quant
import reward
import trainer
from common.flags import TrainConfig
from generate import sample
from llama import Llama, like_gpt
from model import GPT, GPTConfig

CPU, MPS = torch.device("cpu"), torch.device("mps")


class Without(TorchDispatchMode):
    """Raises where an operation makes or reads a tensor of one of these dtypes."""

    def __init__(self, *dtypes):
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in (*args, *(found if isinstance(found, (tuple, list)) else (found,))):
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype in self.dtypes), f"{function} meets {tensor.dtype}"
        return found


def test_sampling_needs_no_float64_where_there_is_none(monkeypatch):
    assert trainer.widest(MPS) == torch.float32 and trainer.widest(CPU) == torch.float64
    logits = torch.randn(1, 9).repeat(20000, 1)
    logits[:, 3] = -torch.inf
    with pytest.raises(AssertionError, match="float64"), Without(torch.float64):  # the mode does notice
        sample(logits, 1.0, 1.0, 0, torch.Generator().manual_seed(0))
    monkeypatch.setattr(trainer, "widest", lambda device: torch.float32)
    with Without(torch.float64):
        drawn = sample(logits, 1.0, 1.0, 0, torch.Generator().manual_seed(0))
        sample(logits, 0.7, 0.9, 4, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=9) / len(drawn)
    assert (shares - logits[0].softmax(0)).abs().max() < 0.02 and shares[3] == 0


def test_the_largest_random_number_draws_no_token_of_probability_0(monkeypatch):
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    for dtype in (torch.float32, torch.float64):
        largest = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
        monkeypatch.setattr(torch, "rand", lambda *size, largest=largest, **_: largest.expand(size))
        monkeypatch.setattr(trainer, "widest", lambda device, dtype=dtype: dtype)
        assert sample(logits, 1.0, 1.0, 0, None).tolist() == [1]


def test_4_bit_weights_move_to_a_device_without_8_bit_floats(monkeypatch):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    layer, same = quant.NF4Linear(linear), quant.NF4Linear(linear)
    assert layer.to(CPU).absmax.dtype == torch.float8_e4m3fn
    monkeypatch.setattr(quant, "NO_FLOAT8", {"cpu"})
    layer.to(CPU)
    assert not any(buffer.dtype == torch.float8_e4m3fn for buffer in layer.buffers()) and layer.double  # what is saved of it
    x = torch.randn(3, 64)
    with Without(torch.float8_e4m3fn):
        found = layer(x)
    assert torch.equal(found, same(x))


@pytest.mark.parametrize("dtype, allowed", [("float32", False), ("bfloat16", True)])
def test_float32_does_not_mean_tf32(dtype, allowed, tmp_path):
    trainer.start(TrainConfig(out=str(tmp_path / "x"), dtype=dtype, device="cpu"))
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


def test_a_gpu_without_bfloat16_takes_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert trainer._dtype("auto", torch.device("cuda")) == torch.float32 and trainer._dtype("auto", MPS) == torch.float32
    assert trainer._dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


NETWORKS = {"gpt2": lambda: GPT(GPTConfig(32, 50, n_layer=2, n_head=2, n_embd=16)),
            "llama": lambda: Llama(like_gpt(32, 50, 2, 2, 16))}


@pytest.mark.parametrize("family", NETWORKS)
def test_a_network_mixes_no_tensor_of_the_cpu_in(family, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    with torch.device("meta"):
        network, ids = NETWORKS[family](), torch.zeros(3, 9, dtype=torch.long)
        lengths = torch.zeros(3, dtype=torch.long)
    assert network(ids).device.type == network.hidden(ids).device.type == "meta"
    scored = reward.RewardModel(NETWORKS[family]().to("meta"))
    assert scored.values(ids).device.type == scored.to("meta")(ids, lengths + 3).device.type == "meta"


def test_the_losses_mix_no_tensor_of_the_cpu_in():
    x, mask = torch.zeros(4, 7, device="meta"), torch.ones(4, 7, device="meta")
    for loss in ("sigmoid", "hinge", "robust", "ipo"):
        assert dpo.dpo_loss(*[x[:, 0]] * 4, 0.1, 0.0, loss)[0].device.type == "meta"
    rewards = ppo.kl_rewards(x[:, 0], x, x, mask, 0.1)
    advantages, returns = ppo.gae(rewards, x, mask)
    found = [ppo.whiten(advantages, mask), ppo.policy_loss(x, x, advantages, mask)[0], ppo.value_loss(x, x, returns, mask),
             ppo.kl_k3(x, x, mask), reward.bradley_terry_loss(x[:, 0], x[:, 1]), reward.ranking_loss(x[0], x[1])]
    assert {tensor.device.type for tensor in found} == {"meta"}
