"""Beside TRL: DPOTrainer's losses, rewards and gradients, on our folder read by transformers, on its own batches."""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

import dpo
import trainer
from model import GPT, GPTConfig

PAD = 99
RUN = trainer.Run(torch.device("cpu"), torch.float32)


def both(folder):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=24)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.save_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return ours, theirs


def pairs_of(n):
    """Ragged questions and answers as TRL's rows, with some reference log-probabilities, and as our pairs."""
    random = torch.Generator().manual_seed(1)
    def ids():
        return torch.randint(PAD, (int(torch.randint(1, 12, (1,), generator=random)),), generator=random).tolist()
    rows = [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids(),
             "ref_chosen_logps": -30 * torch.rand(1, generator=random).item(),
             "ref_rejected_logps": -30 * torch.rand(1, generator=random).item()} for _ in range(n)]

    def answer(row, side):
        prompt, response = row["prompt_ids"], row[f"{side}_ids"]
        return dpo.Answer(prompt + response, [0] * len(prompt) + [1] * len(response), row[f"ref_{side}_logps"])

    return rows, [(answer(row, "chosen"), answer(row, "rejected")) for row in rows]


def trl_loss(model, rows, loss, beta, label_smoothing):
    """DPOTrainer's loss with what it needs of a trainer around it -> the loss, its metrics."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics = {"eval": defaultdict(list)}
    around = SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, use_weighting=False,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss], loss_weights=[1.0], beta=beta,
        label_smoothing=label_smoothing, _metrics=metrics, _total_train_tokens=0, _tp_size=1)
    value = DPOTrainer._compute_loss(around, model, DataCollatorForPreference(PAD)(rows), return_outputs=False)
    return value, {name: numbers[0] for name, numbers in metrics["eval"].items()}


def our_loss(model, pairs, **settings):
    config = dpo.Config(**settings)
    if config.loss == "ipo":  # TRL divides log pi/pi_ref by the number of tokens, we expect averages
        pairs = [tuple(dpo.Answer(a.ids, a.mask, a.ref_logp / sum(a.mask)) for a in pair) for pair in pairs]
    loss, sums = dpo.forward(model, pairs, RUN, config)
    return loss, dict(zip(dpo.TOTALS, (sums / len(pairs)).tolist()))


def check_gradients(ours, theirs):
    theirs = dict(theirs.named_parameters())
    names = ours.hf_names()
    for name, p in ours.named_parameters():
        grad = theirs[names[name][0]].grad
        grad = grad.t() if names[name][1] else grad  # Conv1D keeps its weight as (in, out)
        assert torch.allclose(p.grad, grad, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("loss, beta, label_smoothing", [
    ("sigmoid", 0.1, 0.0), ("sigmoid", 0.7, 0.0), ("ipo", 0.1, 0.0), ("ipo", 0.5, 0.0), ("hinge", 0.1, 0.0),
    ("robust", 0.3, 0.2)])
def test_loss_rewards_and_gradients(tmp_path, loss, beta, label_smoothing):
    (ours, theirs), (rows, pairs) = both(tmp_path), pairs_of(6)
    our, means = our_loss(ours, pairs, loss=loss, beta=beta, label_smoothing=label_smoothing)
    their, metrics = trl_loss(theirs, rows, loss, beta, label_smoothing)
    assert our.item() == pytest.approx(their.item(), rel=1e-4)
    if loss != "ipo":  # TRL logs sums there as well, we what the loss compares
        assert [means[name] for name in ("chosen_rewards", "rejected_rewards", "margin", "accuracy")] == pytest.approx(
            [metrics[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")], rel=1e-4)
    our.backward(), their.backward()
    check_gradients(ours, theirs)


def test_conservative_dpo_is_trls_loss_on_both_labels(tmp_path):
    """TRL's sigmoid loss has no label smoothing, but that is by definition a mixture of the two labels."""
    (ours, theirs), (rows, pairs) = both(tmp_path), pairs_of(6)
    other = {"chosen": "rejected", "rejected": "chosen"}
    def swap(name):
        return "_".join(other.get(word, word) for word in name.split("_"))  # also in ref_chosen_logps
    swapped = [{swap(name): value for name, value in row.items()} for row in rows]
    our = our_loss(ours, pairs, beta=0.1, label_smoothing=0.2)[0]
    plain, other_way = (trl_loss(theirs, part, "sigmoid", 0.1, 0.0)[0] for part in (rows, swapped))
    their = 0.8 * plain + 0.2 * other_way
    assert our.item() == pytest.approx(their.item(), rel=1e-4)
    our.backward(), their.backward()
    check_gradients(ours, theirs)
