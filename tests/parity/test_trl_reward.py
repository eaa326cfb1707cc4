"""Beside TRL: scores, loss and gradients of its RewardTrainer, on our folder as transformers reads it."""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from model import GPT, GPTConfig
import reward
from trainer import Run
from reward import Ranking, RewardModel, bradley_terry_loss, ranking_loss

PAD = 199


def pairs_of(seed, n):
    random = torch.Generator().manual_seed(seed)
    def row():
        return torch.randint(PAD, (int(torch.randint(2, 30, (1,), generator=random)),), generator=random).tolist()
    return [{"chosen_ids": row(), "rejected_ids": row()} for _ in range(n)]


def both(seed, folder):
    torch.manual_seed(seed)
    ours = RewardModel(GPT(GPTConfig(block_size=32, vocab_size=200, n_layer=2, n_head=2, n_embd=24))).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.nn.init.zeros_(ours.head.bias)  # transformers' head has none; no difference sees it
    ours.save_pretrained(folder)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=PAD).eval()
    return ours, theirs


def trl_loss(model, pairs):
    """RewardTrainer.compute_loss on its own batches, with what it needs of a trainer around it."""
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(center_rewards_coefficient=None),
                              accelerator=accelerator, _total_train_tokens=0, _metrics={"eval": defaultdict(list)})
    batch = DataCollatorForPreference(PAD)(pairs)
    loss, outputs = RewardTrainer.compute_loss(trainer, model, batch, return_outputs=True)
    return loss, outputs.logits.squeeze(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_loss_and_gradients(tmp_path, seed):
    ours, theirs = both(seed, tmp_path)
    pairs = pairs_of(seed, 5)
    their_loss, their_scores = trl_loss(theirs, pairs)

    # a pair is a question with two answers, of which the first wins
    first = torch.tensor([[False, True], [False, False]])
    rankings = [Ranking([p["chosen_ids"], p["rejected_ids"]], torch.tensor([0, 1]), first) for p in pairs]
    loss = reward.reward_step(ours, rankings, reward.Config(), Run(torch.device("cpu"), torch.float32))
    chosen, rejected = their_scores.chunk(2)
    assert loss == pytest.approx(their_loss.item(), abs=1e-5)
    assert torch.allclose(bradley_terry_loss(chosen, rejected), their_loss, atol=1e-6)
    each = [ranking_loss(torch.stack(pair), torch.tensor([0, 1])) for pair in zip(chosen, rejected)]
    assert torch.allclose(torch.stack(each).mean(), their_loss, atol=1e-6)

    their_loss.backward()
    assert theirs.score.weight.grad.abs().max() > 1e-2
    assert torch.allclose(ours.head.weight.grad, theirs.score.weight.grad, atol=1e-4)
    assert torch.allclose(ours.network.embedding.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-4)
    assert torch.allclose(ours.network.blocks[0].mlp.c_fc.weight.grad.T, theirs.transformer.h[0].mlp.c_fc.weight.grad, atol=1e-4)
