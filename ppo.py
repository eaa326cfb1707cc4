"""Proximal policy optimization with a KL penalty: the model answers, a reward model marks, good answers get likelier.

    maximise over pi   E_{x ~ prompts, y ~ pi} [ r(x, y) ]  -  beta KL( pi(y | x) || pi_ref(y | x) )

(Ziegler et al. 2019; Ouyang et al. 2022, InstructGPT; PPO: Schulman et al. 2017, equation 7; advantages: Schulman et
al. 2016, equation 16.) Four models: the policy, its frozen reference (the SFT model), the reward model, and the value
model, which starts from the reward model and predicts the reward still to come. Every iteration has four parts, in this
order below: roll out, score, estimate advantages, update.

    python ppo.py                          the island (whatever earlier stages are missing run first)
    python ppo.py --beta 0 --out out/ppo-no-penalty      without the penalty: it learns to please the reward model
    python ppo.py --data prompts.jsonl --init gpt2 --reward readability      your prompts, another reward

What to see on the island, three seeds (docs/results.md): with the penalty gold rises from 6.4 ... 6.7 to 8.6 ... 8.7,
no unsafe request finds help (28 ... 43 % before) and the reward goes from 0 to 2.1 ... 2.7, at a KL of 2.1 ... 3.5.
Without it the reward is 5.4 ... 6.4, gold 3.1 ... 3.8 and the KL 45 ... 78; no fact is right.

Without the penalty the policy leaves the texts that the reward model was trained on, finds what it overrates ("Great
question!", many words), and says little else. The penalty keeps it near texts for which the reward still means
something.
"""
import importlib
import json
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from common.errors import UserError

import torch
import torch.nn as nn

import lora
import reward as reward_model
import sft
import trainer
from checkpoints import frozen_as, load, load_init, save_model
from common import plots
from common.disk import write_jsonl
from common.flags import Amount, Count, Number, Positive, Share, TrainConfig, parse
from data import files
from data.readability import readability
from data.shapes import says
from data.tokenizer import get_tokenizer
from generate import generate
from island import exam
from island.world import Island
from model import resize_vocab, token_logps
from pretrain import load_mix, mix_step
from quant import freeze
from reward import RewardModel

# ---- the equations ---------------------------------------------------------------------------------------------------

def masked_mean(x, mask):
    """Mean of x over mask == 1; 0 where the mask is empty."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def kl_rewards(scores, logps, ref_logps, mask, beta):
    """A reward for every token: scores (B,), the rest (B, T) -> (B, T).

    -beta (log pi - log pi_ref) on every response token: its mean over samples is -beta KL. The score is added on the
    last.
    """
    last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)  # (B, T): 1 on each row's last response token
    return -beta * (logps - ref_logps) * mask + scores[:, None] * last


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2016, equation 16).

    (B, T) each -> advantages, returns; both 0 outside the mask:

        delta_t = r_t + gamma V_{t+1} - V_t,      A_t = sum_k (gamma lam)^k delta_{t+k},      returns = A + V

    values[:, t] is of the state before token t; after the last response token there is nothing more to come: V = 0.
    """
    values, advantages = values * mask, torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(x, mask):
    """Masked mean 0 and masked variance 1, 0 outside the mask. Padding takes no part in either statistic."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logps, old_logps, advantages, mask, clip=0.2):
    """Clipped surrogate (Schulman et al. 2017, equation 7): (B, T) each -> (loss, clipfrac), masked means.

        -mean min( ratio A, clip(ratio, 1 - clip, 1 + clip) A ),     ratio = pi / pi_old

    The smaller of the two: once the ratio has moved far enough in the direction that A asks for, the gradient is 0.
    clipfrac: the share of tokens where that has happened.
    """
    ratio = torch.exp((logps - old_logps) * mask)  # 1 outside the mask, whatever stands there
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.minimum(plain, clipped), mask)
    return loss, masked_mean((clipped < plain).float(), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """0.5 * masked mean of the larger of two squared errors: of values, and of values within clip of old_values."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def kl_k1(logps, ref_logps, mask):
    """The KL of each whole response from one sample: sum_t log pi - log pi_ref -> (B,). Unbiased; may be negative."""
    return ((logps - ref_logps) * mask).sum(1)


def kl_k3(logps, ref_logps, mask):
    """Mean KL per token by k3 = exp(-k1) - 1 + k1 (Schulman 2020): unbiased too, and never negative."""
    k1 = (logps - ref_logps) * mask
    return masked_mean(torch.exp(-k1) - 1 + k1, mask)


def adapted_beta(beta, kl, target, n, horizon):
    """Ziegler et al. 2019, section 2.2: beta (1 + clip(KL / target - 1, +-0.2) n / horizon), n responses later."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


# ---- 1. roll out -----------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """The responses of one iteration, and what each part of it finds out about them.

    ids is (B, T + 1). Every (B, T) has a column for each token but the first: column t belongs to token t + 1 of ids,
    and mask is 1 where that token is part of the response, its end token included.
    """

    conversations: list  # B conversations, each with the response as its last message
    ids: torch.Tensor  # (B, T + 1), padded on the right
    mask: torch.Tensor  # (B, T)
    ended: torch.Tensor  # (B,) bool: is there an end token?
    scores: torch.Tensor = None  # (B,), a mark for each response
    old_logps: torch.Tensor = None  # (B, T) of the policy that sampled
    ref_logps: torch.Tensor = None  # (B, T) of the reference
    old_values: torch.Tensor = None  # (B, T) of the value model, of the state before each token
    advantages: torch.Tensor = None  # (B, T), whitened
    returns: torch.Tensor = None  # (B, T)

    def rows(self, which):
        """Some of the responses, without the columns that only longer ones need -> Rollout."""
        part = {name: x[which] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        width = int(part["mask"].sum(0).nonzero().max()) + 1  # columns of the mask in use
        part = {name: x[:, :width + (name == "ids")] if x.dim() == 2 else x for name, x in part.items()}
        return replace(self, conversations=[self.conversations[i] for i in which.tolist()], **part)

    def parts(self, micro_tokens):
        """Yields (rows, Rollout of these rows) of at most micro_tokens padded tokens each, shorter ones together."""
        lengths = self.mask.size(1) + 1 - self.mask.flip(1).cumsum(1).eq(0).sum(1)  # (B,) of prompt and response
        for rows in trainer.split(range(len(lengths)), lengths.tolist().__getitem__, micro_tokens):
            rows = torch.tensor(rows, device=self.ids.device)
            yield rows, self.rows(rows)


def response_logps(model, rollout, temperature):
    """log p of every response token -> (B, T), 0 elsewhere."""
    full = torch.cat([torch.zeros_like(rollout.mask[:, :1]), rollout.mask], dim=1)  # (B, T + 1), as token_logps has it
    return token_logps(model, rollout.ids, full, temperature)


@torch.no_grad()
def roll_out(policy, tok, questions, prompts, config, run, seed):
    """The policy answers questions (conversations), whose ids are prompts -> Rollout.

    Sampled at config.temperature without top-k or top-p: these are the probabilities of the sampled distribution.
    """
    with run.autocast():
        responses = generate(policy, prompts, config.max_new_tokens, config.temperature, stop=tok.stops, seed=seed)
    ids, mask = trainer.pad([(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(prompts, responses)], run.device)
    ended = torch.tensor([tok.ended(r) for r in responses], device=run.device)
    conversations = [question + [says("assistant", tok.answer(r))] for question, r in zip(questions, responses)]
    return Rollout(conversations, ids, mask[:, 1:].float(), ended)


# ---- 2. score --------------------------------------------------------------------------------------------------------

def load_scorer(config, run, island):
    """--reward -> a function from conversations, each ending with the answer, to a list of scores.

    A reward-model folder or a weighted sum of several; readability; gold; or module:function of prompt and response.
    """
    spec = config.reward
    if spec == "readability":
        return lambda conversations: [reading_ease(c[-1]["content"]) for c in conversations]
    if spec == "gold":
        if island is None:
            raise UserError("--reward gold is the island's judge: it cannot mark the answers to your own --data")
        return lambda conversations: [island.gold(c[:-1], c[-1]["content"]) for c in conversations]
    if ":" in spec:
        return own_reward(spec)
    return reward_model.load_rewards(spec, run)


def reading_ease(text):
    """Flesch reading ease / 100, within -1 and 1.2: a wordless answer gets -1, no trick of punctuation over 1.2."""
    return min(max(readability(text)[0] / 100, -1.0), 1.2) if any(c.isalpha() for c in text) else -1.0


def own_reward(spec):
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--reward {spec}: {error}; give module:function, with the module in this folder or installed")

    def scores(conversations):
        marks = [function(c[-2]["content"], c[-1]["content"]) for c in conversations]
        for mark in marks:
            if not isinstance(mark, (int, float)) or not math.isfinite(mark):
                raise UserError(f"--reward {spec} gave {mark!r}, but a score is a finite number")
        return marks

    return scores


def score(rollout, scorer, config, run):
    """Fills in the scores. A response without an end token gets --missing-eos-score: the policy must learn to stop."""
    scores = torch.tensor(scorer(rollout.conversations), dtype=torch.float32, device=run.device)  # (B,)
    rollout.scores = torch.where(rollout.ended, scores, config.missing_eos_score)


# ---- 3. estimate -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def estimate(rollout, policy, reference, value, beta, config, run):
    """Fills in what the updates need, before the first of them: log-probabilities, values, advantages, returns."""
    r, mask = rollout, rollout.mask
    r.old_logps, r.ref_logps, r.old_values = (torch.zeros_like(mask) for _ in range(3))
    for rows, part in rollout.parts(config.micro_tokens):
        T = part.mask.size(1)
        with run.autocast():
            r.old_logps[rows, :T] = response_logps(policy, part, config.temperature)
            with reference() as frozen:
                r.ref_logps[rows, :T] = response_logps(frozen, part, config.temperature)
            r.old_values[rows, :T] = value.values(part.ids)[:, :-1] * part.mask
    rewards = kl_rewards(r.scores, r.old_logps, r.ref_logps, mask, beta)
    advantages, r.returns = gae(rewards, r.old_values, mask, config.gamma, config.lam)
    r.advantages = whiten(advantages, mask)


# ---- 4. update -------------------------------------------------------------------------------------------------------

def ppo_update(rollout, policy, value, optimizers, text, step, config, run):
    """config.ppo_epochs passes over the rollout in minibatches -> {what is logged: its mean over the minibatches}."""
    order, logs = random.Random(f"{config.seed} {step}"), []
    for _ in range(config.ppo_epochs):
        rows = order.sample(range(len(rollout.ids)), len(rollout.ids))
        for start in range(0, len(rows), config.minibatch):
            batch = rollout.rows(torch.tensor(rows[start:start + config.minibatch], device=run.device))
            sums = {}
            for _, part in batch.parts(config.micro_tokens):
                for name, x in accumulate(part, policy, value, batch.mask.sum(), not logs, step, config, run).items():
                    sums[name] = sums.get(name, 0.0) + x
            if text is not None:
                mix_step(policy, text, step, config, run)
            norms = [trainer.update(model, optimizer, config, run, step)["grad_norm"]
                     for model, optimizer in zip((policy, value), optimizers)]
            logs.append(sums | {"grad_norm": norms[0], "value_grad_norm": norms[1]})
    return {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}


def accumulate(part, policy, value, n, first, step, config, run):
    """Adds the gradient of a part of a minibatch whose responses have n tokens -> its share of what is logged."""
    with run.autocast():
        logps = response_logps(policy, part, config.temperature)
        values = value.values(part.ids)[:, :-1]
    loss, clipfrac = policy_loss(logps, part.old_logps, part.advantages, part.mask, config.clip_ratio)
    v_loss = value_loss(values, part.old_values, part.returns, part.mask, config.clip_value)
    if first:
        check_ratio(logps, part.old_logps, part.mask, step, run)
    share = part.mask.sum() / n  # means over the tokens of the parts add up to that over the minibatch's tokens
    ((loss + v_loss) * share).backward()  # two models, two optimizers: neither gradient touches the other's weights
    approx_kl = kl_k3(part.old_logps, logps.detach(), part.mask)  # KL(old || new), on samples of old
    found = {"policy_loss": loss, "value_loss": v_loss, "clipfrac": clipfrac, "approx_kl": approx_kl}
    return {name: (x * share).item() for name, x in found.items()}


def check_ratio(logps, old_logps, mask, step, run):
    """Before the first update of a rollout policy and old policy are the same, so every ratio must be 1. If one is not,
    the two forward passes differ (dropout left on, another temperature, another padding) and every later number is
    wrong."""
    off = ((logps.detach() - old_logps) * mask).exp().sub(1).abs().max().item()
    if off > (1e-5 if run.dtype == torch.float32 else 2e-2):  # bfloat16 rounds differently in batches of other sizes
        run.print(f"step {step}: before the first update a ratio is {1 + off:.5f} and not 1: "
                  "old and new log-probabilities differ")


# ---- from start to end -----------------------------------------------------------------------------------------------

# what must be there before; what a run costs (common/waits.py)
NEEDS, COSTS = {"init": (sft, {"answers": "community"}), "reward": (reward_model, {})}, (1.4, 50, 12)


@dataclass
class Config(TrainConfig):
    epochs: ClassVar[float] = 0.0  # --steps says how long
    eval_every: ClassVar[int] = 0  # every iteration measures its own responses
    dropout: ClassVar[str] = "0"  # off, or the ratio would not start at 1
    lora_dropout: ClassVar[float] = 0.0  # the same
    data: str = ""  # a file with questions (python -m data.files FILE --want prompts reads it); empty: the island
    init: str = "out/sft-community"  # start from this checkpoint, which is the reference too
    out: str = "out/ppo"  # folder for the checkpoint and log.jsonl
    reward: str = "out/reward"  # a reward model's folder, 0.7*out/a+0.3*out/b, readability, gold, or module:function
    beta: Amount = 0.4  # weight of the KL penalty
    target_kl: Amount = 0.0  # adapts --beta to keep the KL of a response near this; 0: --beta stays
    horizon: Positive = 3200  # responses over which --target-kl adapts
    stop_kl: Amount = 0.0  # ends the run where the KL of a response is beyond this; 0: never
    steps: int = 50  # iterations: roll out, score, update
    batch_size: int = 64  # responses in an iteration
    minibatch: Positive = 32  # responses in an update
    ppo_epochs: Positive = 2  # passes over an iteration's responses
    n_prompts: Positive = 2000  # the island: questions that are drawn from
    with_: str = ""  # the island: kinds of questions more, such as reading,hops: `python -m island` shows them all
    without: str = ""  # the island: kinds of questions to leave out, such as safe
    merge_system: bool = False  # fold a system prompt into the first user turn
    max_new_tokens: Positive = 32  # longest response
    temperature: Amount = 1.0  # of the sampling, and of the log-probabilities
    missing_eos_score: Number = -1.0  # the score of a response without an end token, in place of the model's
    gamma: Share = 1.0  # discount
    lam: Share = 0.95  # lambda of the advantages: 1 trusts the rewards, 0 the value model
    clip_ratio: Amount = 0.2  # how far the policy may move for one token within an iteration
    clip_value: Amount = 0.2  # the same for a value
    lr: float = 2e-4  # highest learning rate, of policy and value model
    warmup: int = 0  # steps in which the learning rate rises from 0
    schedule: str = "constant"  # cosine, linear or constant
    eps: float = 1e-5  # AdamW: added to the root of the square; PPO's gradients are noisy where they are small
    weight_decay: float = 0.0  # AdamW: on matrices only
    mix: Amount = 0.0  # PPO-ptx: weight of the loss on plain text in each update
    mix_data: str = ""  # plain text for --mix; empty: the island's, where --data is empty too
    mix_rows: Positive = 4  # contexts of plain text in each update
    sample_every: Count = 10  # steps between printed responses
    watch_every: Count = 5  # the island: steps between answers to five questions, kept in watched.jsonl; 0: never


def load_prompts(config, tok, block_size, say):
    """-> conversations that end with a question and leave room for an answer, their ids, the island if it made them."""
    if config.data:
        rows, report = files.load(config.data, "prompts", merge_system=config.merge_system)
        say(report)
        island = None
    else:
        island = Island()
        rows = island.prompts(config.n_prompts, **island.kinds(config.with_, config.without, ranked=True))
    questions = [row["prompt"] for row in rows]
    ids = [tok.render_prompt(question) for question in questions]
    kept = [i for i, row in enumerate(ids) if len(row) + config.max_new_tokens <= block_size]
    if len(kept) < len(ids):
        say(f"{len(ids) - len(kept):,} of {len(ids):,} questions dropped: with {config.max_new_tokens} new tokens they "
            f"are longer than the context of {block_size}")
    if config.data and kept:
        files.enough(len(kept), len(ids), block_size - config.max_new_tokens,
                     "lower --max-new-tokens, or --init with a model that reads more")
    if not kept:
        raise UserError(f"no question leaves room for --max-new-tokens {config.max_new_tokens} in a context of "
                        f"{block_size}: lower it")
    return [questions[i] for i in kept], [ids[i] for i in kept], island


def load_models(config, run):
    """-> tokenizer, policy, reference (called, gives the frozen model within `with`), and value model."""
    policy, tok = load_init(config, run)
    if config.lora_r:  # one set of base weights is both: without its adapters the policy is the SFT model
        def reference():
            return lora.lora_off(policy)
    else:
        frozen = load(config.init, linear=freeze)
        resize_vocab(frozen, tok.vocab_size)
        frozen.to(run.device).eval().requires_grad_(False)

        def reference():
            return nullcontext(frozen)
    value = start_value_model(policy, tok, config, run)
    return tok, policy.eval(), reference, value.eval()  # eval: dropout off, or the ratio would not start at 1


def start_value_model(policy, tok, config, run):
    """The reward model again, to be trained: it already knows good answers from bad. Where the reward is not one
    model's folder, or reads other tokens, the SFT model with a fresh head."""
    if trainer.is_finished(config.reward) and get_tokenizer(config.reward).special == tok.special:
        value = RewardModel.from_pretrained(config.reward, frozen_as(config))
    else:
        value = RewardModel(load(config.init, linear=frozen_as(config)))
        nn.init.zeros_(value.head.weight)  # it expects nothing until it has seen rewards
    resize_vocab(value.network, tok.vocab_size)
    if config.lora_r:
        lora.add_lora(value.network, config.lora_r, config.lora_alpha, 0.0, config.lora_targets)
    return value.to(run.device)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value model, 0 one that knows only the mean."""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return (1 - variance(returns - values) / variance(returns).clamp(min=1e-8)).item()


def main(config):
    run = trainer.start(config)
    if run.world > 1:
        raise UserError("ppo.py runs in one process: start it without torchrun")
    if config.temperature <= 0:
        raise UserError(f"--temperature {config.temperature:g}: PPO learns from samples, so it must be above 0")
    trainer.prepare(config, run)
    tok, policy, reference, value = load_models(config, run)
    questions, prompts, island = load_prompts(config, tok, policy.config.block_size, run.print)
    scorer = load_scorer(config, run, island)
    text = load_mix(config, tok, run.print) if config.mix else None
    # window=1: any questions together. Those of one length are of one kind here, and whitening compares within a batch
    batches = trainer.Batches([len(p) for p in prompts], config.batch_size, config.seed, window=1)
    adaptive = {"beta": config.beta}
    run.print(f"{len(prompts):,} questions, {config.steps} iterations of {config.batch_size} responses, "
              f"beta {config.beta:g}")

    optimizers = [trainer.adamw(model, config) for model in (policy, value)]
    both = nn.ModuleDict({"policy": policy, "value": value})
    first = trainer.load_state(config, run, config.steps, both, *optimizers, extra=adaptive)
    log = trainer.Log(config, run, first, config.steps, bar=("score", "gold", "kl", "length"))

    def save(step):
        trainer.save_state(config, run, step, config.steps, both, *optimizers, extra=adaptive)
        save_model(config, policy, tok)

    watch, models = Watch(island, tok, config, first), (policy, reference, value)
    for step in log.steps():
        watch.look(step, models, scorer, adaptive["beta"], run)
        for optimizer in optimizers:
            trainer.begin_step(step, config.steps, optimizer, config, run)
        clock, rows, seed = trainer.Clock(run), batches[step], config.seed * 1_000_003 + step
        rollout = roll_out(policy, tok, [questions[i] for i in rows], [prompts[i] for i in rows], config, run, seed)
        clock.lap("rollout")
        score(rollout, scorer, config, run)
        estimate(rollout, policy, reference, value, adaptive["beta"], config, run)
        clock.lap("scoring")
        updates = ppo_update(rollout, policy, value, optimizers, text, step, config, run)
        clock.lap("update")
        kl = measure(log, step, rollout, updates, adaptive, island, clock)
        if config.target_kl:
            adaptive["beta"] = adapted_beta(adaptive["beta"], kl, config.target_kl, len(rows), config.horizon)
        if log.due(step, config.sample_every):
            log.print(sample_lines(rollout))
        if log.due(step, config.save_every):
            save(step + 1)
        if config.stop_kl and kl > config.stop_kl:
            log.print(f"step {step}: the KL of a response is {kl:.1f}, beyond --stop-kl {config.stop_kl:g}: "
                      "the run ends here")
            break
    watch.look(log.next, models, scorer, adaptive["beta"], run)
    trainer.finish(config, run, log, lambda: save(log.next))
    report(policy, tok, scorer, island, config, run)


def sample_lines(rollout, n=4):
    """A few responses with their scores, to read while it trains."""
    return "\n".join(f"   {c[-2]['content']!r} -> {c[-1]['content']!r}  score {s:.2f}"
                     for c, s in zip(rollout.conversations[:n], rollout.scores))


class Watch:
    """Five held-out questions, answered every few iterations with the same random numbers, token by token: watched.jsonl
    beside the log, of which evaluate.py --story makes a page."""

    def __init__(self, island, tok, config, first):
        self.questions = exam.five(island) if island and config.watch_every else []
        self.prompts = [tok.render_prompt(question) for question in self.questions]
        self.island, self.tok, self.config, self.path = island, tok, config, Path(config.out) / "watched.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if first and self.path.is_file() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] < first]  # later ones will be done again

    def look(self, step, models, scorer, beta, run):
        """models: policy, reference, value. Before iteration `step`, or after the last."""
        if not self.questions or step % self.config.watch_every and step != self.config.steps:
            return
        r = roll_out(models[0], self.tok, self.questions, self.prompts, self.config, run, self.config.seed)
        score(r, scorer, self.config, run)
        estimate(r, *models, beta, self.config, run)
        rewards, answers = kl_rewards(r.scores, r.old_logps, r.ref_logps, r.mask, beta), []
        for i, conversation in enumerate(r.conversations):
            columns = r.mask[i].nonzero().flatten().tolist()
            tokens = [[self.tok.piece(int(r.ids[i, t + 1])),
                       *(round(x[i, t].item(), 4) for x in (r.old_logps, r.ref_logps, r.advantages, rewards))] for t in columns]
            answers.append({"question": conversation[-2]["content"], "score": r.scores[i].item(), "tokens": tokens,
                            "gold": self.island.gold(conversation[:-1], conversation[-1]["content"])})
        self.rows.append({"step": step, "answers": answers})
        write_jsonl(self.path, self.rows)


def measure(log, step, rollout, updates, adaptive, island, clock):
    """Writes the iteration's numbers to the log -> the mean KL of a response (k1)."""
    r, mask = rollout, rollout.mask
    kl = kl_k1(r.old_logps, r.ref_logps, mask).mean().item()
    gold = [island.gold(c[:-1], c[-1]["content"]) for c in r.conversations] if island else []
    log.write(step, score=r.scores.mean().item(), **({"gold": sum(gold) / len(gold)} if gold else {}), kl=kl,
              k3=kl_k3(r.old_logps, r.ref_logps, mask).item(), entropy=-masked_mean(r.old_logps, mask).item(),
              length=mask.sum(1).mean().item(), ended=r.ended.float().mean().item(),
              explained_variance=explained_variance(r.old_values, r.returns, mask), beta=adaptive["beta"],
              **updates, **clock.laps)
    return kl


def report(policy, tok, scorer, island, config, run):
    """What came out, beside the SFT model, and what to do next."""
    if plots.available():
        picture = Path(config.out) / "score_and_kl.png"
        plots.draw_over_kl({config.out: plots.read_log(config.out)}, picture)
        run.print(f"score against KL, as a picture: {picture}")
    if island:
        start = load(config.init, linear=freeze).to(run.device)
        before, after = (exam.preferences(model, tok, island, run, scorer=scorer) for model in (start, policy))
        run.print("\nanswers to what no conversation has mentioned, at temperature 1\n"
                  f"{'before':>58}{'after':>9}")
        for name in before:
            run.print(exam.line(name, before[name], after[name]))
    run.print(f"\nthe policy is in {config.out} (transformers loads it too). Next:\n"
              f"   python chat.py {config.init} {config.out}    the same question to both\n"
              f"   python -m common.plots {config.out}    its log as a picture")
    if island:
        run.print(f"   python evaluate.py {config.init} {config.out}    what it gained and what it cost, with intervals\n"
                  f"   python ppo.py --beta 0 --out out/ppo-no-penalty    a higher score, worse answers\n"
                  f"   python ppo.py --reward gold --out out/ppo-gold     what a perfect reward would give")
    else:
        run.print(f"   python chat.py {config.init} {config.out} --file {config.data} --out answers.jsonl    both, on "
                  "every question")


if __name__ == "__main__":
    main(parse(Config))
