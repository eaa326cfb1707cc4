"""The course's pictures, and the numbers of one run that its lessons quote, from the folders of a chain of stages.

    python evaluate.py --story                            the chain: every stage that is missing, in out/
    python -m course.figures --out out                    draws docs/figures/*.png and writes docs/course/one_run.md
    python -m course.lessons                              puts the numbers into the lessons

Lesson 3 needs one stage more, fine-tuning without plain text beside it: that one is trained here. What needs a folder
that is not there is said and left as it is; all else is made anew.
"""
import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import dpo
import model as network
import ppo
import pretrain
import quant
import reward
import sft
import trainer
from common import plots
from common.disk import replacing
from common.errors import UserError
from common.flags import TrainConfig, parse
from common.tables import markdown
from course import by_hand
from course.by_hand import checkpoint, first_conversation, held_out_votes, two
from data.tokenizer import get_tokenizer
from evals import benches, measure
from generate import ask
from island import exam
from island.world import Island
from reward import RewardModel

POLICIES = ("base", "sft", "sft-community", "dpo", "ppo", "ppo-no-penalty")
GREY, BLUE, RED, GREEN = "0.55", "#1f77b4", "#c23b22", "#2a8c4a"
RUNS = {"ppo": ("with the penalty", BLUE), "ppo-no-penalty": ("without", RED)}


def read_log(folder, *names):
    """log.jsonl -> a list for every name, of the lines that have all of them."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [[line[name] for line in lines if all(n in line for n in names)] for name in names]


def smooth(values, n=10):
    """The mean of the last n, at every place."""
    return [sum(values[max(0, i - n + 1):i + 1]) / len(values[max(0, i - n + 1):i + 1]) for i in range(len(values))]


# ---- diagrams --------------------------------------------------------------------------------------------------------

def box(axes, x, y, text, color="white", width=1.6, height=0.8, size=8):
    """A box with its middle at (x, y)."""
    from matplotlib.patches import FancyBboxPatch
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02",
                                  facecolor=color, edgecolor="0.3", linewidth=1))
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color="black")


def arrow(axes, start, end, text="", color="0.3", dx=0.0, dy=0.08):
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1})
    if text:
        axes.text((start[0] + end[0]) / 2 + dx, (start[1] + end[1]) / 2 + dy, text, ha="center", fontsize=7, color="0.3")


def canvas(width, height, across, up):
    """-> a figure and an empty panel with coordinates from 0 to `across` and 0 to `up`."""
    made, (axes,) = plots.figure(width=width, height=height)
    axes.set(xlim=(0, across), ylim=(0, up))
    axes.axis("off")
    return made, axes


def pipeline(folder, run, made):
    """The stages, and this run's gold marks."""
    gold = {name: sum(found["gold"]) / len(found["gold"]) for name, (found, _) in made["examined"].items()}
    figure, axes = canvas(9, 3.2, 10.4, 3.6)

    def stage(x, y, name, script, color="white"):
        mark = f"\ngold {gold[name]:.1f}" if name in gold else ""
        box(axes, x, y, f"{name}\n{script}{mark}", color, width=1.75, height=0.95)

    stage(1.1, 1.8, "base", "pretrain.py", "#eeeeee")
    stage(3.8, 3.0, "sft", "sft.py", "#d8ead8")
    stage(3.8, 1.8, "sft-community", "sft.py", "#f6e7c8")
    stage(6.5, 3.0, "dpo", "dpo.py", "#d6e4f2")
    stage(6.5, 0.6, "reward", "reward.py", "#ecdcf0")
    stage(9.3, 1.8, "ppo", "ppo.py", "#d6e4f2")
    stage(9.3, 0.6, "ppo-no-penalty", "ppo.py --beta 0", "#f4d4ce")
    arrow(axes, (2.0, 2.0), (2.9, 2.9), "flawless answers", dx=-0.35, dy=0.2)
    arrow(axes, (2.0, 1.8), (2.9, 1.8), "what people\nwrite", dy=0.08)
    arrow(axes, (4.7, 2.0), (5.6, 2.8), "votes", dx=-0.2)
    arrow(axes, (4.7, 1.6), (5.6, 0.8), "votes", dx=0.25)
    arrow(axes, (4.7, 1.8), (8.4, 1.8), "its own answers", dy=0.1)
    arrow(axes, (7.4, 0.8), (8.4, 1.5), "marks", dx=-0.2)
    arrow(axes, (7.4, 0.6), (8.4, 0.6), "marks")
    return figure


def four_models(folder, run, made):
    """PPO's four models and what each hands to which."""
    figure, axes = canvas(8.6, 3.2, 10, 3.7)
    box(axes, 1.2, 1.9, "questions", "#eeeeee")
    box(axes, 3.6, 1.9, "policy\n(trained)", "#d6e4f2")
    box(axes, 6.1, 3.15, "reference\n(frozen SFT model)", "#eeeeee", width=2.0)
    box(axes, 6.1, 1.9, "reward model\n(frozen)", "#ecdcf0", width=2.0)
    box(axes, 6.1, 0.6, "value model\n(trained)", "#d6e4f2", width=2.0)
    box(axes, 8.9, 2.5, "a reward\nfor every token", "#f6e7c8", width=1.8)
    box(axes, 8.9, 0.9, "advantages,\nreturns (GAE)", "#f6e7c8", width=1.8)
    arrow(axes, (2.0, 1.9), (2.8, 1.9))
    for y in (3.1, 1.9, 0.7):
        arrow(axes, (4.4, 1.9), (5.05, y), "response" if y == 1.9 else "", dy=0.1)
    arrow(axes, (7.1, 3.1), (8.0, 2.75), r"$\log\pi_{ref}$", dy=0.12)
    arrow(axes, (7.1, 1.95), (8.0, 2.3), r"$r(x,y)$", dy=-0.22)
    arrow(axes, (8.9, 2.1), (8.9, 1.3))
    arrow(axes, (7.1, 0.6), (8.0, 0.8), r"$V$")
    axes.plot([8.9, 8.9, 3.6, 3.6], [0.48, 0.06, 0.06, 0.4], color=BLUE, linewidth=1)
    arrow(axes, (3.6, 0.3), (3.6, 1.48), color=BLUE)
    axes.text(3.5, 0.75, "update", fontsize=7, color=BLUE, ha="right")
    return figure


def architecture(folder, run, made):
    """The network with the shapes of its tensors."""
    c = network.GPTConfig(**network.TINY)
    B, T, V, C, h = "B", "T", c.vocab_size, c.n_embd, c.n_head
    figure, axes = canvas(8.6, 3.9, 10, 5)
    for y, text, color in ((0.5, f"ids  ({B}, {T})", "#eeeeee"), (1.5, "token vectors\n+ positions", "#d8ead8"),
                           (2.75, f"{c.n_layer} blocks", "#d6e4f2"), (3.9, "final norm", "#eeeeee")):
        box(axes, 1.5, y, text, color, width=2.2, height=0.7)
    box(axes, 1.5, 4.75, f"head: logits  ({B}, {T}, {V})", "#f6e7c8", width=2.4, height=0.45)
    for low, high, text in ((0.87, 1.13, ""), (1.87, 2.38, f"({B}, {T}, {C})"), (3.12, 3.53, f"({B}, {T}, {C})"),
                            (4.27, 4.51, "")):
        arrow(axes, (1.5, low), (1.5, high), text, dx=0.75, dy=-0.05)
    axes.plot([2.65, 3.6], [2.95, 4.85], color="0.7", linewidth=0.8)
    axes.plot([2.65, 3.6], [2.55, 0.2], color="0.7", linewidth=0.8)
    for x, rows in ((5.0, [("norm", f"({B}, {T}, {C})"), ("q, k, v: a linear layer", f"3 x ({B}, {h}, {T}, {C // h})"),
                           ("scores q k^T / sqrt(d), causal, softmax", f"({B}, {h}, {T}, {T})"),
                           ("weighted sum of v, heads side by side", f"({B}, {T}, {C})"), ("a linear layer", "added to x")]),
                    (8.5, [("norm", f"({B}, {T}, {C})"), ("a linear layer", f"({B}, {T}, {4 * C})"),
                           ("GELU", f"({B}, {T}, {4 * C})"), ("a linear layer", "added to x")])):
        for i, (text, shape) in enumerate(rows):
            y = 0.6 + i * 0.95
            box(axes, x, y, f"{text}\n{shape}", "white", width=2.9, height=0.68, size=7)
            if i:
                arrow(axes, (x, y - 0.6), (x, y - 0.36))
    axes.text(5.0, 4.92, "attention", ha="center", fontsize=8, weight="bold")
    axes.text(8.5, 4.1, "MLP", ha="center", fontsize=8, weight="bold")
    return figure


# ---- pictures of data and weights ------------------------------------------------------------------------------------

def mask(folder, run, made):
    """A conversation of two turns: what is learned is green."""
    tok = get_tokenizer("tiny", "chat")
    rows = exam.questions(Island())
    messages = next(row["messages"] for row in rows if row["kind"] == "multi")
    ids, learned = tok.render(messages)
    figure, axes = canvas(9, 1.5, 100, 3)
    x, y = 0.5, 2.3
    for piece, m in zip(by_hand.pieces(tok, ids), learned):
        text = piece.strip("`").replace("␣", " ").strip()
        if x + 0.9 * len(text) + 2 > 99:
            x, y = 0.5, y - 0.95
        axes.text(x, y, text, fontsize=8, family="monospace", va="center",
                  bbox={"facecolor": "#bfe3c4" if m else "#e8e8e8", "edgecolor": "none", "pad": 1.5})
        x += 0.92 * len(text) + 1.5
    return figure


@torch.inference_mode()
def attention(folder, run, made):
    """For each layer the head that looks most from the place that predicts the value to the name in the question."""
    model, tok = checkpoint(folder, "sft", run)
    ids, learned = tok.render(first_conversation())
    answer = learned.index(1)
    name = ids.index(ids[answer])  # the answer begins with the name that the question holds
    fused = [path for path in model.attention_paths if model.linears()[path].out_features == 3 * model.config.n_embd]
    seen, weights = [], []
    hooks = [model.get_submodule(path).register_forward_hook(lambda layer, x, y: seen.append(y[0])) for path in fused]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for qkv in seen:  # (T, 3C) of each layer
        q, k, _ = (t.view(len(ids), model.config.n_head, -1).transpose(0, 1) for t in qkv.chunk(3, dim=1))  # (heads, T, d)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))  # (heads, T, T)
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(future, -math.inf).softmax(-1))
    figure, panels = plots.figure(len(weights), width=2.6, height=2.8)
    labels = [piece.strip("`").replace("␣", "").replace("\\", "") for piece in by_hand.pieces(tok, ids)]
    for layer, (axes, w) in enumerate(zip(panels, weights)):
        head = int(w[:, answer + 1, name].argmax())
        axes.imshow(w[head], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        axes.set_xticks(range(len(ids)), labels, rotation=90, fontsize=5)
        axes.set_yticks(range(len(ids)), labels if layer == 0 else [], fontsize=5)
    return figure


def forgetting(folder, run, made):
    """The loss of SFT, and the loss on plain text before and after, with plain text beside the conversations and
    without."""
    figure, panels = plots.figure(2, width=3.8, height=2.7)
    for name, label, color in (("sft", "with plain text", BLUE), ("sft-no-mix", "without", RED)):
        steps, losses = read_log(Path(folder) / name, "step", "loss")
        panels[0].plot(steps, smooth(losses), color=color, label=label)
    panels[0].set(title="loss on the assistant's tokens", xlabel="step", yscale="log")
    panels[0].legend(fontsize=7)
    rows = made["forgetting"]
    panels[1].bar(range(len(rows)), [float(row[1]) for row in rows], color=[GREY, BLUE, RED])
    panels[1].set_xticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    panels[1].set_title("loss on held-out plain text")
    for i, row in enumerate(rows):
        panels[1].text(i, float(row[1]), f"{row[2]} of the facts", ha="center", va="bottom", fontsize=7)
    panels[1].margins(y=0.15)
    return figure


def nf4(folder, run, made):
    """The sixteen levels over the weights of a trained model, and what equal distances would be."""
    model, _ = checkpoint(folder, "base", run)
    flat = torch.cat([layer.weight.detach().flatten() for layer in model.linears().values()])
    scaled = flat[:len(flat) // 64 * 64].view(-1, 64)
    scaled = (scaled / scaled.abs().amax(1, keepdim=True)).flatten()
    figure, (axes,) = plots.figure(width=7.6, height=2.6)
    axes.hist(scaled.numpy(), bins=120, density=True, color="#c9d9ea", label="weights / absmax of their block")
    for i, level in enumerate(quant.CODEBOOK.tolist()):
        axes.axvline(level, color=RED, linewidth=1, label="" if i else "NF4")
        if i < 15:
            axes.plot([(i - 7) / 7], [-0.04], "|", color="0.2", markersize=8, label="" if i else "int4: equal steps")
    axes.set(ylabel="density", xlabel="w / absmax")
    axes.legend(fontsize=7)
    return figure


def calibration(folder, run, made):
    """Predicted and observed win rates of the reward model."""
    table = reward.calibration(*made["scored"])
    figure, (axes,) = plots.figure(width=3.4, height=3)
    axes.plot([0.5, 1], [0.5, 1], "--", color=GREY, label="perfect")
    axes.plot([p for n, p, _ in table if n], [o for n, _, o in table if n], "o-", color=BLUE, label="reward model")
    axes.set(xlabel="predicted win rate", ylabel="observed")
    axes.legend(fontsize=7)
    return figure


# ---- pictures of losses ----------------------------------------------------------------------------------------------

def dpo_pictures(folder, run, made):
    """Left: both log-probabilities in training. Right: the loss over h for several beta."""
    figure, panels = plots.figure(2, width=3.6, height=2.6)
    steps, chosen, rejected = read_log(Path(folder) / "dpo", "step", "chosen_rewards", "rejected_rewards")
    for values, label, color in ((chosen, "chosen", GREEN), (rejected, "rejected", RED)):
        panels[0].plot(steps, smooth([v / by_hand.BETA_DPO for v in values], 15), color=color, label=label)
    panels[0].axhline(0, color=GREY, linewidth=0.8)
    panels[0].set(title=r"$\log\pi - \log\pi_{ref}$ of an answer, nats", xlabel="step")
    panels[0].legend(fontsize=7)
    h = torch.linspace(-20, 20, 200)
    for beta, color in ((0.05, "#9ecae1"), (0.1, "#4a98c9"), (0.3, "#1764ab"), (1.0, "#08306b")):
        losses = [dpo.dpo_loss(x, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta)[0].item() for x in h[:, None]]
        panels[1].plot(h, losses, color=color, label=f"beta {beta:g}")
    panels[1].plot([0], [math.log(2)], "o", color="black", markersize=4)
    panels[1].annotate("start: ln 2", (0, math.log(2)), (2, 1.6), fontsize=7)
    panels[1].set(title="DPO's loss", xlabel="h, nats", ylim=(0, 4))
    panels[1].legend(fontsize=7)
    return figure


def clip(folder, run, made):
    """The clipped surrogate over the ratio, for an advantage above 0 and one below."""
    figure, panels = plots.figure(2, width=3.6, height=2.5)
    ratio, one = torch.linspace(0.4, 1.6, 121), torch.ones(1, 1)
    for axes, advantage in zip(panels, (1.0, -1.0)):
        values = [-ppo.policy_loss(x.log().view(1, 1), 0 * one, advantage * one, one)[0].item() for x in ratio]
        axes.plot(ratio, advantage * ratio, "--", color=GREY, label="ratio x A")
        axes.plot(ratio, values, color=BLUE, label="clipped")
        axes.plot([1], [advantage], "o", color="black", markersize=4)
        axes.set(title=f"A = {advantage:+.0f}", xlabel="ratio")
        axes.axvspan(0.8, 1.2, color="0.93")
    panels[0].legend(fontsize=7)
    return figure


def reward_and_gold(folder, run, made):
    """The reward model's score and the gold judge's mark over the root of the KL, a point an iteration."""
    figure, panels = plots.figure(2, width=3.9, height=2.9)
    for axes, name, label in zip(panels, ("score", "gold"), ("reward model's score", "gold judge")):
        for stage, (words, color) in RUNS.items():
            kl, values = read_log(Path(folder) / stage, "kl", name)
            axes.plot([max(0.0, k) ** 0.5 for k in kl], values, "o-", markersize=2.5, linewidth=0.5, color=color, label=words)
        axes.set(xlabel=r"$\sqrt{KL}$ of a response from the SFT model", title=label)
    panels[0].legend(fontsize=7)
    return figure


PICTURES = {  # file: what draws it, and the stages that it needs
    "pipeline": (pipeline, POLICIES), "four_models": (four_models, ()), "network": (architecture, ()),
    "mask": (mask, ()), "attention": (attention, ("sft",)), "forgetting": (forgetting, ("base", "sft", "sft-no-mix")),
    "nf4": (nf4, ("base",)), "calibration": (calibration, ("reward",)), "dpo": (dpo_pictures, ("dpo",)),
    "clip": (clip, ()), "reward_and_gold": (reward_and_gold, ("ppo", "ppo-no-penalty")),
}


# ---- the numbers of this run -----------------------------------------------------------------------------------------

def examine(folder, run):
    """{stage: what exam.examine gives} of every policy."""
    reference, found = checkpoint(folder, "sft-community", run), {}
    scorer = reward.load_rewards(str(Path(folder) / "reward"), run)
    for name in POLICIES:
        print(f"examining {name}")
        found[name] = exam.examine(*checkpoint(folder, name, run), Island(), run, scorer=scorer, reference=reference)
    return found


def forgetting_table(folder, run):
    """What base, sft and sft without plain text know of plain text and of held-out residents -> rows."""
    island = Island()
    rows = [row for row in exam.questions(island) if row["kind"] == "fact"]
    found = []
    for name in ("base", "sft", "sft-no-mix"):
        model, tok = checkpoint(folder, name, run)
        loss = pretrain.text_loss(model, pretrain.text_stream(island.plain_text(400, seed=9), tok), run)
        facts = exam.skills(model.eval(), tok, rows, island, run)["helpful"][0]
        found.append([name, f"{loss:.2f}", f"{facts:.0%}"])
    return found


def dpo_table(folder, run):
    """What DPO did to the log-probabilities of held-out answers -> Markdown."""
    settings = dpo.Config()
    (ref, tok), (policy, _) = checkpoint(folder, "sft-community", run), checkpoint(folder, "dpo", run)
    pairs = dpo.make_examples(held_out_votes(), tok, 129, settings, lambda said: None)
    dpo.add_reference(ref, pairs, run, settings)
    means = dpo.evaluate(policy, pairs, run, settings)
    answers = {answer for pair in pairs for answer in pair}
    rows = [["log p of held-out chosen answers, change in nats", two(means["chosen_rewards"] / settings.beta)],
            ["log p of held-out rejected answers, change in nats", two(means["rejected_rewards"] / settings.beta)],
            ["held-out loss of DPO", f"{means['loss']:.3f}"],
            ["held-out pairs that the implicit reward ranks right", f"{means['accuracy']:.0%}"],
            ["tokens of an answer", two(sum(sum(answer.mask) for answer in answers) / len(answers))]]
    return markdown(["DPO", "one run"], rows)


def ppo_table(folder):
    """The log of PPO with the penalty and without, its first iteration and the mean of its last five -> Markdown."""
    names = {"score": "reward model's score, mean", "gold": "gold mark, mean", "kl": "KL of a response, nats",
             "entropy": "entropy, nats per token", "length": "tokens of a response", "clipfrac": "share of clipped tokens",
             "explained_variance": "explained variance of the value model"}
    rows = []
    for name, words in names.items():
        rows.append([words])
        for stage in RUNS:
            values, = read_log(Path(folder) / stage, name)
            rows[-1] += [two(values[0]), two(sum(values[-5:]) / 5)]
    return markdown(["PPO", "first iteration", "last five", "first, no penalty", "last five, no penalty"], rows)


def asked_of_all(folder, run):
    """One question of each kind, answered greedily by every stage -> Markdown."""
    rows = exam.questions(Island())
    asked = [exam.question_of(next(row["messages"] for row in rows if row["kind"] == kind))
             for kind in ("fact", "unknown", "unsafe", "why")]
    answers = {name: ask(*checkpoint(folder, name, run), asked, run, temperature=0.0, max_new_tokens=24)
               for name in POLICIES}
    return markdown(["", *(question[-1]["content"] for question in asked)],
                    [[name, *answers[name]] for name in POLICIES])


def quantized(folder, run):
    """The cost of four bits on the base model -> Markdown."""
    model, tok = checkpoint(folder, "base", run)
    text = pretrain.text_stream(Island().plain_text(400, seed=9), tok)
    before = pretrain.text_loss(model, text, run)
    errors = [sum(column) / len(column) for column in zip(*(quant.errors_of(layer.weight)
                                                            for layer in model.linears().values()))]
    layers = quant.quantize_model(model).linears().values()
    bits = 8 * sum(layer.quantized.nbytes for layer in layers) / sum(layer.quantized.shape.numel() for layer in layers)
    rows = [["relative error of the weights, NF4", f"{errors[0]:.4f}"],
            ["relative error, NF4 with double quantization", f"{errors[1]:.4f}"],
            ["relative error, sixteen equal steps", f"{errors[2]:.4f}"], ["bits per weight, all layers", f"{bits:.3f}"],
            ["held-out loss, float32", f"{before:.4f}"],
            ["held-out loss, four bits", f"{pretrain.text_loss(model, text, run):.4f}"]]
    return markdown(["NF4 on the base model", "one run"], rows)


def hacks(examined):
    """The answers of PPO without the penalty whose reward most exceeds their gold mark -> Markdown."""
    found = measure.hacks(examined["ppo-no-penalty"][1], n=5)
    return markdown(["asked", "answered", "reward", "gold"], [
        [a["question"], a["answer"], two(a["reward"]), f"{a['gold']:.0f}"] for a in found])


def stages_table(examined):
    rows = [[name, *(two(sum(found[key]) / len(found[key])) for key in ("gold", "reward", "kl", "words"))]
            for name, (found, _) in examined.items()]
    return markdown(["stage", "gold mark", "reward", "KL from sft-community", "words"], rows)


def page(folder, run, made):
    """docs/course/one_run.md."""
    parts = network.describe(network.GPT(network.GPTConfig(**network.TINY)))
    sections = {"The stages": stages_table(made["examined"]),
                "The same questions": asked_of_all(folder, run),
                "What the parts weigh": f"```\n{parts}\n```",
                "A conversation": by_hand.conversation(folder, run), "A vote": by_hand.vote(folder, run),
                "A pair": by_hand.pair(folder, run), "A response": by_hand.response(folder, run),
                "Forgetting": markdown(["after", "loss on plain text", "held-out facts, greedy"], made["forgetting"]),
                "Four bits": quantized(folder, run), "What DPO did": dpo_table(folder, run),
                "What PPO did": ppo_table(folder), "The wall of hacks": hacks(made["examined"])}
    body = "\n\n".join(f"## {heading}\n\n{text.strip()}" for heading, text in sections.items())
    return ("# One run, by hand\n\nThe numbers of one chain of stages that the lessons quote, seed 0, written by `python -m "
            f"course.figures` on {datetime.date.today()} ({benches.machine()}). Ranges over seeds stand in "
            f"docs/results.md.\n\n{body}\n")


@dataclass
class Config:
    out: str = "out"  # folder of the chain: base, sft, sft-no-mix, sft-community, reward, dpo, ppo, ppo-no-penalty
    figures: str = "docs/figures"  # folder for the pictures
    page: str = "docs/course/one_run.md"  # the numbers, as Markdown


def main(config):
    plots.needed("python -m course.figures")
    run = by_hand.RUN
    if trainer.is_finished(Path(config.out) / "base"):
        trainer.ensure(f"{config.out}/sft-no-mix", sft, TrainConfig(), run, mix=0.0, init=f"{config.out}/base")
    there = {name for name in (*POLICIES, "reward", "sft-no-mix") if trainer.is_finished(Path(config.out) / name)}
    absent = sorted({*POLICIES, "reward"} - there)
    made = {}
    if "reward" in there:
        judge, rows = RewardModel.from_pretrained(Path(config.out) / "reward").to(run.device), held_out_votes()
        made["scored"] = rows, reward.score_rows(judge, get_tokenizer(Path(config.out) / "reward"), rows, run, 16384)
    if {"reward", *POLICIES} <= there:
        made["examined"] = examine(config.out, run)
    if {"base", "sft", "sft-no-mix"} <= there:
        made["forgetting"] = forgetting_table(config.out, run)
    Path(config.figures).mkdir(parents=True, exist_ok=True)
    for name, (draw, needs) in PICTURES.items():
        if set(needs) <= there and (name != "pipeline" or "reward" in there):
            path = Path(config.figures) / f"{name}.png"
            plots.save(draw(config.out, run, made), path)
            print(f"drew {path}, {path.stat().st_size / 1000:.0f} kB")
    if not absent:
        with replacing(config.page) as temporary:
            temporary.write_text(page(config.out, run, made), encoding="utf-8")
        print(f"wrote {config.page}; next: python -m course.lessons")
    else:
        raise UserError(f"not all was drawn, for {config.out} lacks {', '.join(absent)}: python evaluate.py --story trains "
                        "what is missing")


if __name__ == "__main__":
    main(parse(Config))
