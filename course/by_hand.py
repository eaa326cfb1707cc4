"""The course's sums, worked out in the open: every number of one example, and beside them what the code computes.

    python -m course.by_hand conversation     lesson 0: tokens, mask, log-probabilities, the loss
    python -m course.by_hand vote             lesson 6: scores of one question's answers, the pairs, the ranking loss
    python -m course.by_hand pair             lesson 7: four log-probabilities, two rewards, DPO's loss
    python -m course.by_hand response         lesson 8: a reward for every token, values, advantages, returns

Each reads checkpoints in --out: `python evaluate.py --story` trains whatever of them is missing.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import dpo
import ppo
import sft
import trainer
from checkpoints import load
from common.errors import UserError
from common.flags import parse
from common.tables import markdown
from data.pairs import answered, load_ranked
from data.tokenizer import get_tokenizer
from generate import generate
from island import exam
from island.world import Island
from model import token_logps
from reward import RewardModel, load_rewards, ranking_loss

BETA_DPO, BETA_PPO = dpo.Config.beta, ppo.Config.beta
RUN = trainer.Run(torch.device("cpu"), torch.float32)  # the same digits wherever it runs


def checkpoint(out, name, run):
    """-> network and tokenizer of one stage. Raises UserError where it has not been trained."""
    folder = Path(out) / name
    if not trainer.is_finished(folder):
        raise UserError(f"{folder} is not there: python evaluate.py --story trains every stage that is missing")
    return load(folder).to(run.device).eval(), get_tokenizer(folder)


def pieces(tok, ids):
    """The tokens of ids as they may stand in a table."""
    shown = [re.sub(r"\033\[\d+m", "", tok.show([i], [0])) for i in ids]
    return [f"`{piece.replace(' ', '␣')}`" for piece in shown]


def two(x):
    return f"{x:.2f}".replace("-0.00", "0.00")


def three(x):
    return f"{x:.3f}".replace("-0.000", "0.000")


@torch.inference_mode()
def logps_of(model, ids, mask=None):
    """One row of ids -> log p of every token but the first, 0 outside the mask: a list."""
    row = torch.tensor([ids])
    return token_logps(model, row, torch.ones_like(row) if mask is None else torch.tensor([mask]))[0].tolist()


# ---- lesson 0 --------------------------------------------------------------------------------------------------------

def first_conversation():
    """The first held-out conversation that is one question about a resident and its answer."""
    return next(row["messages"] for row in exam.questions(Island()) if row["kind"] == "fact")


def conversation(out, run):
    """Tokens, mask and log-probabilities of one conversation under two checkpoints, and the loss of each."""
    messages = first_conversation()
    (base, tok), (tuned, _) = checkpoint(out, "base", run), checkpoint(out, "sft", run)
    ids, mask = tok.render(messages)
    columns = [[0.0, *logps_of(model, ids)] for model in (base, tuned)]
    rows = [[str(t), piece, str(i), str(m), *("" if t == 0 else f"**{three(logps[t])}**" if m else three(logps[t])
                                              for logps in columns)]
            for t, (piece, i, m) in enumerate(zip(pieces(tok, ids), ids, mask))]
    lines = [markdown(["t", "token", "id", "mask", "log p, base", "log p, sft"], rows), ""]
    batch = torch.tensor([ids]), torch.tensor([mask])
    for name, model, logps in zip(("base", "sft"), (base, tuned), columns):
        terms = [logps[t] for t in range(1, len(ids)) if mask[t]]
        sums = " ".join(f"- {abs(x):.3f}" for x in terms).removeprefix("- ")
        with torch.inference_mode():
            loss = sft.sft_loss(model, *batch).item()
            logits, targets = model(batch[0][:, :-1]), batch[0][:, 1:]
            everything = sft.masked_loss(logits, targets, torch.ones_like(targets)).item()
        said = (f"{name}: n = {len(terms)}, sum = -{sums} = {sum(terms):.3f}, loss = {-sum(terms):.3f} / {len(terms)} "
                f"= **{-sum(terms) / len(terms):.4f}**; `sft_loss` says **{loss:.4f}** (over all {len(ids) - 1} tokens, "
                f"without the mask, it would be {everything:.4f})")
        lines += [said, ""]
    return "\n".join(lines)


# ---- lesson 6 --------------------------------------------------------------------------------------------------------

def held_out_votes():
    return load_ranked(dpo.Config(), Island, lambda said: None)[1]


@torch.inference_mode()
def vote(out, run):
    """One question with its votes: scores, pairs, and the ranking loss of Ouyang et al. 2022, equation 1."""
    row = next(row for row in held_out_votes() if row["kind"] == "fact" and row.get("about") == "new"
               and len(row["answers"]) == 4 and len({a["score"] for a in row["answers"]}) == 4
               and any(a["type"].startswith("flattery") for a in row["answers"]))
    answers = sorted(row["answers"], key=lambda answer: -answer["score"])
    checkpoint(out, "reward", run)
    scorer = load_rewards(str(Path(out) / "reward"), run)
    scores = torch.tensor(scorer([answered(row["prompt"], answer["text"]) for answer in answers]))
    table = [["ABCD"[i], answer["text"], str(answer["score"]), f"{answer['gold']:.0f}", two(s)]
             for i, (answer, s) in enumerate(zip(answers, scores.tolist()))]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    rows = [[f"{'ABCD'[i]} beats {'ABCD'[j]}", two(d := (scores[i] - scores[j]).item()),
             two(1 / (1 + torch.tensor(-d).exp().item())), three(-torch.nn.functional.logsigmoid(torch.tensor(d)).item())]
            for i, j in pairs]
    mean = sum(float(row[3]) for row in rows) / len(rows)
    loss = ranking_loss(scores, torch.arange(4)).item()
    return "\n".join([f"Asked: {row['prompt'][-1]['content']}", "",
                      markdown(["", "answer", "votes", "gold", "score r"], table), "",
                      markdown(["vote", "r_w - r_l", "P = sigmoid", "-log P"], rows), "",
                      f"mean of the six = **{mean:.3f}**; `ranking_loss` says **{loss:.3f}** (a coin: 0.693)", ""])


# ---- lesson 7 --------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def pair(out, run):
    """One held-out pair: the tokens of both answers under reference and policy, and DPO's loss from four sums."""
    (ref, tok), (policy, _) = checkpoint(out, "sft-community", run), checkpoint(out, "dpo", run)
    row = next(row for row in held_out_votes() if row["kind"] == "fact" and row.get("about") == "new"
               and {"simple", "wrong"} <= {a["type"] for a in row["answers"]})
    texts = {a["type"]: a["text"] for a in row["answers"]}
    lines, sums = [f"Asked: {row['prompt'][-1]['content']}", ""], []
    for name, text in (("chosen w", texts["simple"]), ("rejected l", texts["wrong"])):
        answer = dpo.make_answer(row["prompt"], text, tok)
        both = [logps_of(model, answer.ids, answer.mask) for model in (ref, policy)]
        shown = [(piece, a, b) for piece, m, a, b in zip(pieces(tok, answer.ids[1:]), answer.mask[1:], *both) if m]
        totals = [sum(column) for column in both]
        sums += [totals[1], totals[0]]
        lines += [markdown([name, *(piece for piece, *_ in shown), "sum"], [
            ["log pi_ref", *(two(a) for _, a, _ in shown), two(totals[0])],
            ["log pi", *(two(b) for *_, b in shown), two(totals[1])],
            ["difference", *(two(b - a) for _, a, b in shown), two(totals[1] - totals[0])]]), ""]
    w, l = sums[0] - sums[1], sums[2] - sums[3]
    four = [torch.tensor([sums[i]]) for i in (0, 2, 1, 3)]
    loss = dpo.dpo_loss(*four, beta=BETA_DPO)[0].item()
    p = torch.sigmoid(torch.tensor(BETA_DPO * (w - l))).item()
    said = (f"h = {two(w)} - ({two(l)}) = {two(w - l)}; beta h = {BETA_DPO:g} x {two(w - l)} = {two(BETA_DPO * (w - l))}; "
            f"sigmoid = {p:.3f}; loss = -log {p:.3f} = **{-torch.tensor(p).log().item():.3f}**; `dpo_loss` says "
            f"**{loss:.3f}** (at the start: ln 2 = 0.693)")
    return "\n".join([*lines, said, ""])


# ---- lesson 8 --------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def response(out, run):
    """One sampled response token by token. The value model is the one that PPO starts with: the reward model."""
    (ref, tok), (policy, _) = checkpoint(out, "sft-community", run), checkpoint(out, "ppo", run)
    asked = next(row["prompt"] for row in held_out_votes() if row["kind"] == "unknown" and row.get("about") == "new")
    prompt = tok.render_prompt(asked)
    reply = generate(policy, [prompt], 32, stop=tok.end, seed=1)[0]
    ids, start = prompt + reply, len(prompt) - 1  # column `start` of what follows belongs to the reply's first token
    judge = RewardModel.from_pretrained(Path(out) / "reward").eval()
    mask = torch.tensor([[0] * start + [1] * len(reply)]).float()
    logps, ref_logps = (token_logps(model, torch.tensor([ids]), torch.cat([torch.zeros(1, 1), mask], 1))
                        for model in (policy, ref))
    values = judge.values(torch.tensor([ids]))[:, :-1] * mask
    mark = load_rewards(str(Path(out) / "reward"), run)([answered(asked, tok.answer(reply))])[0]
    rewards = ppo.kl_rewards(torch.tensor([mark]), logps, ref_logps, mask, BETA_PPO)
    advantages, returns = ppo.gae(rewards, values, mask)
    deltas = ppo.gae(rewards, values, mask, lam=0.0)[0]  # lambda 0 leaves delta alone
    columns = [x[0, start:].tolist() for x in (logps, ref_logps, rewards, values, deltas, advantages, returns)]
    rows = [[piece, *map(two, numbers)] for piece, *numbers in zip(pieces(tok, reply), *columns)]
    kl, (_, _, r, v, delta, a, _) = ppo.kl_k1(logps, ref_logps, mask).item(), columns
    first = [two(x) for x in (r[0], (v + [0.0])[1], v[0], delta[0], (a + [0.0])[1], a[0])]
    table = markdown(["token", "log pi", "log pi_ref", "reward r", "value V", "delta", "A", "return"], rows)
    said = (f"score of the reward model {two(mark)}, beta {BETA_PPO:g}, KL of the response (k1) {two(kl)}: the rewards add up "
            f"to {two(mark)} - {BETA_PPO:g} x {two(kl)} = **{two(mark - BETA_PPO * kl)}**, and so says the column: "
            f"**{two(rewards.sum().item())}**. The first token: delta = r + V' - V = {first[0]} + {first[1]} - ({first[2]}) = "
            f"{first[3]}, and A = delta + 0.95 x the A below it = {first[3]} + 0.95 x {first[4]} = {first[5]}")
    return "\n".join([f"Asked: {asked[-1]['content']}", "", f"Answered: {tok.answer(reply)}", "", table, "", said, ""])


EXAMPLES = {"conversation": conversation, "vote": vote, "pair": pair, "response": response}


@dataclass
class Config:
    words: list[str] = field(default_factory=list)  # conversation, vote, pair or response; none: conversation
    out: str = "out"  # folder of the chain: base, sft, sft-community, reward, dpo, ppo


def main(config):
    for name in config.words or ["conversation"]:
        if name not in EXAMPLES:
            raise UserError(f"there is no example {name!r}: choose among {', '.join(EXAMPLES)}")
        print(EXAMPLES[name](config.out, RUN))


if __name__ == "__main__":
    main(parse(Config))
