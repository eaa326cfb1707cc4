"""Direct preference optimization: the policy learns from pairs of answers, without a reward model and without sampling.

    L = -log sigmoid( beta [ log pi(w|x)/pi_ref(w|x)  -  log pi(l|x)/pi_ref(l|x) ] ),        w was preferred to l

(Rafailov et al. 2023, equation 7.) The policy that maximises reward - beta KL(pi || pi_ref) is pi_ref exp(reward/beta),
normalised. Read backwards: every policy is the best one for the reward beta log pi/pi_ref. Put that into Bradley and
Terry's model of a vote, and the loss of reward.py becomes a loss on the policy itself.

    python dpo.py                                  the island's votes (trains the community SFT model first if missing)
    python dpo.py --flattery 0 --out out/dpo-fair  the same, voted for by people who do not fall for praise
    python dpo.py --data my.jsonl --init out/sft   your pairs: `python -m data.files my.jsonl --want ranked` checks them

The island, three seeds (docs/results.md): the gold judge's mean rises from 6.4 ... 6.7 to 7.3 ... 7.9, and 5 to 7 % of
unsafe requests find help, 28 ... 43 % before; the implicit reward beta log pi/pi_ref ranks 83 % of held-out pairs as
the voters did (seed 0). But the voters like "Great question!": praise goes from 9 ... 10 to 34 ... 40 %, and answers
get longer by a third. Further from the reference is not better: with --beta 0.1 (measured on an earlier island)
sentences repeat and gold stays a point lower.

Both log-probabilities fall, of chosen answers by 1.6 nats, of rejected ones by 5.4 (seed 0, last batches): the loss
asks for a difference only, and two answers to one question share words, so what pushes one down takes the other along.
The probability goes to answers that nobody has voted on, here longer ones: watch samples, not just the margin.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass

from common.errors import UserError

import torch
import torch.nn.functional as F

import lora
import sft
import trainer
from checkpoints import load_init, save_checkpoint
from common.flags import Amount, Count, Positive, parse
from common.waits import bar
from data.pairs import NOTHING_HELD, RankedConfig, answered, choose_pairs, load_ranked
from generate import sample_text
from island import exam
from island.world import Island
from model import token_logps
from pretrain import load_mix, mix_step

# ---- the loss --------------------------------------------------------------------------------------------------------

LOSSES = ("sigmoid", "ipo", "hinge", "robust")


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1,
             label_smoothing=0.0, loss="sigmoid"):
    """Log-probabilities of whole answers, four times (B,) -> loss (scalar), chosen_rewards (B,), rejected_rewards (B,).

    With h = log pi/pi_ref of the chosen minus that of the rejected answer, e = label_smoothing, the mean over pairs of

        sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)       e > 0: conservative DPO, Mitchell 2023
        robust    the same with + e, divided by 1 - 2e                        Chowdhury et al. 2024, "robust DPO"
        hinge     max(0, 1 - beta h)                                          Zhao et al. 2023, SLiC-HF
        ipo       (h - 1 / (2 beta))^2                                        Azar et al. 2023, equation 17

    e is the share of pairs whose label is believed to be wrong. Log-probabilities are sums over the answer's tokens,
    its end token included. For ipo pass averages, as its authors do: it asks for a fixed h, and a sum over many tokens
    is there sooner. Reference-free: pass zeros as ref_*. The reference gets no gradient.
    Rewards are beta log pi/pi_ref, detached. Raises UserError for settings that no loss here has.
    """
    check_loss(beta, label_smoothing, loss)
    chosen = policy_chosen_logps - ref_chosen_logps.detach()  # (B,): log pi/pi_ref
    rejected = policy_rejected_logps - ref_rejected_logps.detach()  # (B,)
    h, e = chosen - rejected, label_smoothing
    if loss == "sigmoid":
        losses = -(1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h)
    elif loss == "robust":
        losses = (-(1 - e) * F.logsigmoid(beta * h) + e * F.logsigmoid(-beta * h)) / (1 - 2 * e)
    elif loss == "hinge":
        losses = F.relu(1 - beta * h)
    elif loss == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    return losses.mean(), beta * chosen.detach(), beta * rejected.detach()


def check_loss(beta, label_smoothing, loss):
    if loss not in LOSSES:
        raise UserError(f"--loss {loss}: it must be one of {', '.join(LOSSES)}")
    if beta <= 0:
        raise UserError(f"--beta {beta:g}: it must be above 0; the smaller, the further the policy may go")
    if not 0 <= label_smoothing <= 0.5 or loss == "robust" and label_smoothing == 0.5:
        raise UserError(f"--label-smoothing {label_smoothing:g}: a share of wrong labels is from 0 to 0.5, "
                        "for robust below 0.5")
    if label_smoothing and loss in ("ipo", "hinge"):
        raise UserError(f"--label-smoothing {label_smoothing:g}: --loss {loss} has none; choose sigmoid or robust")


def answer_logps(model, ids, mask, average=False):
    """log p(answer | question): ids (B, T), mask (B, T) -> (B,), the sum over mask == 1, or the average."""
    logps = token_logps(model, ids, mask).sum(1)  # (B, T-1) -> (B,)
    return logps / mask[:, 1:].sum(1).clamp(min=1) if average else logps


# ---- from ranked answers to pairs ------------------------------------------------------------------------------------

@dataclass(eq=False)
class Answer:
    """A question with one of its answers. The answer may be in several pairs; its reference is computed once."""

    ids: list
    mask: list  # 1 on the answer and its end token
    ref_logp: float = 0.0  # log pi_ref(answer | question)


def make_examples(rows, tok, longest, config, say=print, needed=True):
    """Ranked rows -> [(chosen, rejected), ...], two Answers each; what is said and raised: pairs.choose_pairs."""
    examples = []
    for prompt, answers, pairs in choose_pairs(rows, tok, longest, config, say, needed):
        made = {k: make_answer(prompt, answers[k]["text"], tok) for pair in pairs for k in pair}
        examples += [(made[chosen], made[rejected]) for chosen, rejected in pairs]
    return examples


def make_answer(prompt, text, tok):
    """Earlier answers in the prompt are context: only the last one was preferred, so only that one is masked in."""
    return Answer(*tok.render(answered([message | {"loss_weight": 0} for message in prompt], text)))


def pair_width(pair):
    """The tokens that a pair takes when both sides are padded to the longer one."""
    return 2 * max(len(answer.ids) for answer in pair)


def pair_batch(pairs, device):
    """Pairs -> ids (2B, T), mask (2B, T), ref_logps (2B,): first all chosen answers, then all rejected ones."""
    answers = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    ids, mask = trainer.pad([(answer.ids, answer.mask) for answer in answers], device)
    return ids, mask, torch.tensor([answer.ref_logp for answer in answers], device=device)


@torch.inference_mode()
def logps_of(model, pairs, run, config):
    """{answer: its log p, a number} for all answers in the pairs, each computed once however many pairs it is in."""
    answers, found = list(dict.fromkeys(answer for pair in pairs for answer in pair)), {}
    model.eval()  # with dropout a log-probability would be a random number
    for part in bar(trainer.split(answers, lambda answer: len(answer.ids), config.micro_tokens), "log-probabilities"):
        ids, mask = trainer.pad([(answer.ids, answer.mask) for answer in part], run.device)
        with run.autocast():
            found |= zip(part, answer_logps(model, ids, mask, config.loss == "ipo").tolist())
    model.train()
    return found


def add_reference(model, pairs, run, config):
    """Stores log pi_ref in every answer. Called before training, when the model still is the reference; where it has
    adapters, the reference is what lies under them, at any time."""
    with lora.lora_off(model) if config.lora_r else nullcontext():
        for answer, logp in logps_of(model, pairs, run, config).items():
            answer.ref_logp = logp


TOTALS = ("loss", "chosen_rewards", "rejected_rewards", "margin", "accuracy", "length")


def forward(model, pairs, run, config):
    """Pairs -> their mean loss, and the sums over them of TOTALS (6,). Chosen and rejected share one forward pass."""
    ids, mask, ref_logps = pair_batch(pairs, run.device)
    with run.autocast():
        logps = answer_logps(model, ids, mask, config.loss == "ipo")
    four = *logps.chunk(2), *ref_logps.chunk(2)  # (B,) each
    loss, chosen, rejected = dpo_loss(*four, config.beta, config.label_smoothing, config.loss)
    sums = [loss.detach() * len(pairs), chosen.sum(), rejected.sum(), (chosen - rejected).sum(),
            (chosen > rejected).sum(), mask.sum() / 2]  # half of both lengths: that of one answer
    return loss, torch.stack([total.float() for total in sums])


# ---- evaluation ------------------------------------------------------------------------------------------------------

def evaluate(model, pairs, run, config):
    """Means over held-out pairs -> {"loss", "chosen_rewards", "rejected_rewards", "margin", "accuracy"}.

    accuracy: the share of pairs that the implicit reward beta log pi/pi_ref ranks as people did; a tie is not right.
    """
    logps = logps_of(model, pairs, run, config)
    policy = [torch.tensor([logps[answer] for answer in side]) for side in zip(*pairs)]  # (N,), chosen and rejected
    ref = [torch.tensor([answer.ref_logp for answer in side]) for side in zip(*pairs)]  # the same
    loss, chosen, rejected = dpo_loss(*policy, *ref, config.beta, config.label_smoothing, config.loss)
    means = [loss, chosen.mean(), rejected.mean(), (chosen - rejected).mean(), (chosen > rejected).float().mean()]
    return dict(zip(TOTALS, [mean.item() for mean in means]))


# ---- training --------------------------------------------------------------------------------------------------------

# what must be there before; what a run costs (common/waits.py)
NEEDS, COSTS = {"init": (sft, {"answers": "community"})}, (0.2, 150, 10)


@dataclass
class Config(RankedConfig):
    out: str = "out/dpo"  # folder for the checkpoint and log.jsonl
    loss: str = "sigmoid"  # sigmoid (DPO), ipo, hinge or robust
    beta: Amount = 0.3  # price of leaving the reference: the smaller, the further the policy goes
    label_smoothing: Amount = 0.0  # share of pairs believed to be labelled wrongly (sigmoid: conservative DPO; robust)
    reference_free: bool = False  # compare with the uniform distribution instead of the start
    lr: float = 0.0  # highest learning rate; 0: by the model's width (1e-4 at 128, 1.7e-5 at 768; adapters 4 times)
    steps: int = 0  # optimizer steps; 0: as many as --epochs makes; with neither 150 on the island, one epoch of --data
    batch_size: int = 32  # pairs per optimizer step, over all processes
    warmup: int = 10  # steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW: on matrices only
    mix: Amount = 0.0  # weight of the loss on plain text beside each batch: it keeps what the base model knows
    mix_data: str = ""  # plain text for --mix; empty: the island's, where --data is empty too
    mix_rows: Positive = 4  # contexts of plain text beside each batch
    sample_every: Count = 50  # steps between printed samples


def default_lr(config, n_embd):
    """1e-4 suits the tiny model (width 128); a wider one gets less in proportion, adapters get more."""
    return (4e-4 if config.lora_r else 1e-4) * 128 / n_embd


def dpo_step(model, pairs, config, run):
    """Adds the gradient of a step's pairs -> {name in TOTALS: mean over the pairs of all processes}."""
    totals = torch.zeros(len(TOTALS))
    for part in trainer.split(run.share(pairs), pair_width, config.micro_tokens):
        loss, sums = forward(model, part, run, config)
        (loss * len(part) / len(pairs)).backward()  # the parts add up to the mean over the pairs of the whole step
        totals += sums.cpu()
    return {name: run.sum(total) / len(pairs) for name, total in zip(TOTALS, totals.tolist())}


def main(config):
    check_loss(config.beta, config.label_smoothing, config.loss)
    run = trainer.start(config)
    trainer.prepare(config, run)
    train_rows, held_rows, island = load_ranked(config, Island, run.print)
    model, tok = load_init(config, run)
    longest = model.config.block_size + 1  # the last token is only a target
    train = make_examples(train_rows, tok, longest, config, run.print)
    held = make_examples(held_rows, tok, longest, config, run.print, needed=False)
    if not held:
        run.print(NOTHING_HELD)
    if not config.reference_free:
        add_reference(model, train + held, run, config)  # before --resume puts trained weights into the model
    before = exam.preferences(model, tok, island, run) if island else None
    text = load_mix(config, tok, run.print)
    batches = trainer.Batches([pair_width(pair) for pair in train], config.batch_size, config.seed)
    steps = config.steps or math.ceil(config.epochs * len(batches)) or (150 if island else len(batches))
    config.lr = config.lr or default_lr(config, model.config.n_embd)
    some = held[::max(1, len(held) // 500)]
    # of these only the question is shown
    shown = [{"messages": answered(row["prompt"], row["answers"][0]["text"])} for row in held_rows]

    optimizer = trainer.adamw(model, config)
    first = trainer.load_state(config, run, steps, model, optimizer)
    log = trainer.Log(config, run, first, steps, bar=("loss", "accuracy", "margin"))
    for step in log.steps():
        trainer.begin_step(step, steps, optimizer, config, run)
        means = dpo_step(model, [train[i] for i in batches[step]], config, run)
        if text is not None:
            mix_step(model, text, step, config, run)
        log.write(step, **means, **trainer.update(model, optimizer, config, run, step))
        if held and log.due(step, config.eval_every):
            means = evaluate(model, some, run, config)
            log.write(step, **{f"held_out_{name}": means[name] for name in ("loss", "accuracy")})
        if log.due(step, config.sample_every):
            log.print(f"step {step + 1}:\n{sample_text(model, tok, shown, run)}")
        if log.due(step, config.save_every):
            save_checkpoint(config, run, step + 1, steps, model, tok, optimizer)
    trainer.finish(config, run, log, lambda: save_checkpoint(config, run, log.next, steps, model, tok, optimizer))
    report(model, tok, held, before, island, config, run)


def report(model, tok, held, before, island, config, run):
    """What came out, and what to do next."""
    means = evaluate(model, held, run, config) if held else {}
    if held:
        run.print(f"\nheld-out pairs ranked right by the implicit reward: {means['accuracy']:.1%} of {len(held):,} "
                  "(chance 50%)")
    if held and not config.reference_free:
        chosen, rejected = (means[side] / config.beta for side in ("chosen_rewards", "rejected_rewards"))
        run.print(f"log p of the chosen answers has changed by {chosen:+.1f}, of the rejected ones by {rejected:+.1f}"
                  + (" per token" if config.loss == "ipo" else ""))
    if island:
        run.print("\nanswers to what no conversation has mentioned, at temperature 1\n"
                  f"{'before':>58}{'after':>9}")
        for name, after in exam.preferences(model, tok, island, run).items():
            run.print(exam.line(name, before[name], after))
        if config.flattery and config.aspect == "score":
            run.print("the voters like praise, whether the answer is right or not: so it comes too, and length with it")
    data = f" --data {config.data}" if config.data else ""
    run.print(f"\nthe model is in {config.out}. Next:\n"
              f"   python chat.py {config.init} {config.out}    the same question to both\n"
              f"   python evaluate.py {config.init} {config.out}{data}    what it gained and what it cost, with intervals\n"
              f"   python -m common.plots {config.out}    its log as a picture")
    if island:
        run.print("   python dpo.py --flattery 0 --out out/dpo-fair    voters who do not fall for praise\n"
                  "   python dpo.py --beta 0.1 --out out/dpo-far       further from the reference: what gives way first?\n"
                  "   python ppo.py                                    the same votes through a reward model")
    else:
        run.print(f"   python reward.py{data} --init {config.init}    the same votes as a reward model")


if __name__ == "__main__":
    main(parse(Config))
