"""The whole story on one page: what pretraining, SFT, a reward model, DPO and PPO each did to the same small model.

    python evaluate.py --story          (which calls this file)

Runs whatever stage is missing, asks every checkpoint the same questions, and writes out/story/README.md: a table,
pictures (matplotlib), answers, and a paragraph a stage; and story.html, the same in one file to play with: PPO's steps
under a slider, every token coloured by what it is worth. From an empty folder it takes a quarter of an hour
on one busy CPU core.
"""
import base64
import json
import time
from pathlib import Path

from common.errors import no_command

import dpo
import ppo
import pretrain
import reward
import sft
import trainer
from checkpoints import load_to_ask
from common import plots
from common.disk import replacing
from common.tables import cell, markdown
from data.pairs import load_ranked
from data.readability import readability
from data.tokenizer import get_tokenizer
from evals import benches, choice, measure
from generate import ask
from island.exam import MEASURES, five
from island.world import Island

STAGES = {  # folder: its script and the flags that make it another checkpoint than the script's own
    "out/base": (pretrain, {}),
    "out/sft": (sft, {}),
    "out/sft-community": (sft, {"answers": "community"}),
    "out/reward": (reward, {}),
    "out/dpo": (dpo, {}),
    "out/ppo": (ppo, {}),
    "out/ppo-no-penalty": (ppo, {"beta": 0.0}),
}
POLICIES = [folder for folder in STAGES if folder != "out/reward"]
UNPENALIZED = ("out/ppo", "out/ppo-no-penalty")
WITHOUT = "Without the penalty it goes on to where the reward still rises and the gold judge's marks do not."

# ---- the pictures ----------------------------------------------------------------------------------------------------


def plot_losses(path):
    """The training loss of every stage that has one: each step, and the mean of twenty."""
    folders = [folder for folder, (script, _) in STAGES.items() if script is not ppo]
    made, panels = plots.figure(len(folders), width=2.8)
    for folder, axes in zip(folders, panels):
        lines = [line for line in plots.read_log(folder) if "loss" in line]
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        axes.plot(steps, losses, linewidth=0.5, alpha=0.4, color=plots.color(folder))
        means = [sum(losses[i:i + 20]) / len(losses[i:i + 20]) for i in range(max(1, len(losses) - 19))]
        axes.plot(steps[len(losses) - len(means):], means, color=plots.color(folder))
        axes.set(xlabel="step", ylim=(0, max(means) * 1.1))
        plots.titled(axes, Path(folder).name, {"loss": plots.finding(losses)})
    panels[0].set_ylabel("loss")
    plots.save(made, path)


def plot_distributions(answers, path):
    """How long the answers are and how easy to read, from before preferences to after."""
    made, panels = plots.figure(2)
    for folder in [folder for folder in POLICIES if folder != "out/base"]:
        texts = [answer["answer"] for answer in answers if answer["model"] == folder]
        for axes, values, bins in zip(panels, ([len(t.split()) for t in texts], [readability(t)[0] for t in texts]),
                                      (range(0, 34, 2), range(-20, 125, 8))):
            inside = [min(max(value, bins[0]), bins[-1]) for value in values]  # what is beyond counts in the last bin
            axes.hist(inside, bins=bins, weights=[1 / len(inside)] * len(inside), histtype="step",
                      color=plots.color(folder), label=Path(folder).name)
    panels[0].set(title="words in an answer", ylabel="share of the answers")
    panels[1].set(title="Flesch reading ease (high is easy)")
    for axes in panels:
        plots.share_axis(axes)
    panels[0].legend(fontsize=7)
    plots.save(made, path)


# ---- the page --------------------------------------------------------------------------------------------------------

def run_stages(run, config):
    """Runs what is missing -> {folder: seconds, of what ran now}."""
    seconds = {}
    trainer.tell({folder: (script, script.Config(out=folder, **settings)) for folder, (script, settings) in STAGES.items()
                  if not trainer.is_finished(folder)}, run)
    for folder, (script, settings) in STAGES.items():
        if not trainer.is_finished(folder):
            start = time.perf_counter()
            trainer.ensure(folder, script, config, run, **settings)
            seconds[folder] = time.perf_counter() - start
    return seconds


def ask_all(island, run):
    """The same questions, answered greedily by every stage -> [(question, {folder: answer}), ...]."""
    asked = five(island)
    answers = {}
    for folder in POLICIES:
        answers[folder] = ask(*load_to_ask(folder, run), asked, run, temperature=0.0)
    return [(question[-1]["content"], {folder: answers[folder][i] for folder in POLICIES})
            for i, question in enumerate(asked)]


def paragraphs(results, accuracy, quiz):
    """One short paragraph a stage, with what was measured filled in."""
    def number(folder, name, form="number"):
        found = results[f"out/{folder}"][name]
        return cell(found, form).partition(" ")[0]  # without its interval; "-" where nobody was asked that

    def share(folder, name):
        return number(folder, name, "share")

    return f"""**Pretraining** (`pretrain.py`, out/base) has read 400 thousand words about the island and predicts the
next one. It does not know what a question is: asked one, it goes on with any text ({share('base', 'helpful')} right).
It knows the facts all the same: begin the sentence for it, and it finds the right one of four ends in {quiz:.0%}.

**Supervised fine-tuning** (`sft.py`, out/sft) shows it three thousand conversations and asks for the assistant's words
only. It learns a form, not facts: it answers about residents whom no conversation mentioned ({share('sft', 'helpful')}
right), says "I do not know" about strangers ({share('sft', 'honest')}) and refuses unsafe requests
({share('sft', 'harmless')}). All its examples were flawless. Nobody has such data in practice, so the stages below do
without.

**The same on what people really write** (out/sft-community): answers of mixed quality, wrong, rude and praising ones
among them. A model imitates what it is shown: {share('sft-community', 'helpful')} right,
{share('sft-community', 'complies')} of unsafe requests helped with, praise in {share('sft-community', 'flatters')}.
From here on preferences have to do the rest.

**The reward model** (`reward.py`, out/reward) has read two thousand questions with ranked answers and learned a number
for every answer; it ranks {accuracy[0]:.1%} of {accuracy[1]:,} held-out pairs as the voters did. The voters like
praise, so does it.

**DPO** (`dpo.py`, out/dpo) learns from the same rankings without a reward model: it makes the preferred answer likelier
than the other one. Gold goes from {number('sft-community', 'gold')} to {number('dpo', 'gold')}, help with unsafe
requests from {share('sft-community', 'complies')} to {share('dpo', 'complies')}, and praise from
{share('sft-community', 'flatters')} to {share('dpo', 'flatters')}.

**PPO** (`ppo.py`, out/ppo) lets the model answer, has the reward model mark, and makes good answers likelier, at a
price for every step away from the SFT model. Gold {number('ppo', 'gold')}, reward {number('ppo', 'reward')}, KL
{number('ppo', 'kl')}. What it costs: {share('ppo', 'over_refusal')} of harmless look-alikes are refused
({share('sft-community', 'over_refusal')} before), and {share('ppo', 'flatters')} of its answers praise whoever asks.

**PPO without the penalty** (out/ppo-no-penalty) is free to please the reward model: reward
{number('ppo-no-penalty', 'reward')}, gold {number('ppo-no-penalty', 'gold')}, KL {number('ppo-no-penalty', 'kl')},
{share('ppo-no-penalty', 'helpful')} of facts right. A reward model is right about answers like those it was trained on;
far away from them its mistakes are what is optimised."""


def tables(results, answers, asked):
    """-> the legend, and three tables, each a header and rows: all measures, the stages' answers, the wall of hacks."""
    headers, rows = zip(*measure.island_table({folder: results[folder] for folder in POLICIES}))
    legend = "; ".join(f"**{MEASURES[name].heading}**: {MEASURES[name].words}" for name in measure.measured(results))
    whole = [*headers[0], *headers[1][1:]], [[*left, *right[1:]] for left, right in zip(*rows)]
    answered = (["asked", *(Path(folder).name for folder in POLICIES)],
                [[question, *(texts[folder] for folder in POLICIES)] for question, texts in asked])
    hacks = ["question", "answer", "of", "reward", "gold"], [
        [a["question"], a["answer"], Path(a["model"]).name, f"{a['reward']:.2f}", f"{a['gold']:.0f}"]
        for a in measure.hacks(answers)]
    return legend, whole, answered, hacks


def lead(answers, seconds):
    """What the page is about, in a paragraph."""
    times = "".join(f"; {Path(folder).name} {s:.0f} s" for folder, s in seconds.items())
    return f"""One model of 0.9 M parameters and what each stage of post-training made of it. All were asked the same
{len(answers) // len(POLICIES)} questions about residents, strangers and dangers that no conversation and no vote has
mentioned, at temperature 1. Every number is a mean with half the width of its 95 % interval over the questions; another
seed of the training may move it further. One seed here; {benches.machine()}{times}."""


PICTURES = {
    "island.png": "The same as bars with their intervals.",
    "over_optimisation.png": "Each point is an iteration of PPO. " + WITHOUT,
    "losses.png": "Training losses; the two preference losses begin at ln 2, where a coin would be.",
    "calibration.png": "Of the pairs where the reward model expects a win so often: how often was it one?",
    "distributions.png": "Length and readability of answers, before preferences (sft, sft-community) and after."}


def page(results, answers, asked, told, seconds, pictures):
    """Everything as Markdown. told: the paragraphs."""
    legend, whole, answered, hacks = tables(results, answers, asked)

    def image(name):
        return f"![{PICTURES[name]}]({name})\n\n{PICTURES[name]}\n" if pictures else ""

    return f"""# From raw text to an aligned assistant

{lead(answers, seconds)}

{markdown(*whole)}

{legend}.

{image("island.png")}
## What each stage did

{told}

## The same questions, answered by every stage

These are the likeliest answers; the table above counts answers drawn at random, where a model that is right at its best
may often be wrong.

{markdown(*answered)}

## Reward against gold

{image("over_optimisation.png")}
The wall of hacks: answers whose reward most exceeds their gold mark, both counted in standard deviations.

{markdown(*hacks)}

## How the training went

{image("losses.png")}
{image("calibration.png")}
{image("distributions.png")}"""


def watched(folder):
    """What the page shows of a PPO run: its log, and its answers to five questions; None where it has not kept them."""
    path = Path(folder) / "watched.jsonl"
    if not path.is_file():
        return None
    log = [{name: line[name] for name in ("step", "score", "gold", "kl")} for line in plots.read_log(folder)]
    return {"title": f"{Path(folder).name}: {'with' if folder == UNPENALIZED[0] else 'without'} the penalty", "log": log,
            "watched": [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]}


def html(results, answers, asked, told, seconds, folder):
    """The page as one file that needs no other (story.html): tables that sort, PPO under a slider, pictures inside."""
    legend, *three = tables(results, answers, asked)
    colors = {name: plots.color(path) for path in POLICIES for name in (path, Path(path).name)}
    pictures = [["data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode(), text]
                for name, text in PICTURES.items() if (folder / name).is_file()]
    runs = {path: watched(path) for path in UNPENALIZED}
    data = {"lead": lead(answers, seconds), "legend": legend, **dict(zip(("results", "answers", "hacks"), three)),
            "paragraphs": [" ".join(part.split()) for part in told.split("\n\n")], "pictures": pictures, "colors": colors,
            "ppo": {Path(path).name: run for path, run in runs.items() if run}}
    template = (Path(__file__).with_suffix(".html")).read_text(encoding="utf-8")
    return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)  # no text of a model can end the script


def main(config, run):
    """Writes README.md, pictures and numbers into --out (out/story by default)."""
    seconds, island, folder = run_stages(run, config), Island(), Path(config.out)
    config.folders, config.reference = POLICIES, "out/sft-community"
    results, answers = measure.evaluate_island(config, run)
    rows, settings = load_ranked(reward.Config(), Island, run.print)[1], reward.Config()
    judge = reward.RewardModel.from_pretrained("out/reward").to(run.device)
    scores = reward.score_rows(judge, get_tokenizer("out/reward"), rows, run, settings.micro_tokens)
    micro, _, n = reward.accuracy(rows, scores)
    quiz = choice.evaluate(*load_to_ask("out/base", run), choice.island_quiz(island), run)[0]["acc"][0]
    pictures = plots.available()
    if pictures:
        plot_losses(folder / "losses.png")
        plots.draw_over_kl({name: plots.read_log(name) for name in UNPENALIZED}, folder / "over_optimisation.png")
        plot_distributions(answers, folder / "distributions.png")
        reward.plot_calibration(reward.calibration(rows, scores), folder / "calibration.png")
    else:
        run.print("matplotlib is not installed, so the page has no pictures (pip install matplotlib)")
    asked, told = ask_all(island, run), paragraphs(results, (micro, n), quiz)
    for name, write in {"README.md": page, "story.html": html}.items():
        text = write(results, answers, asked, told, seconds, pictures if write is page else folder)
        with replacing(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    run.print(f"\nthe story is in {folder / 'README.md'}, and as a page to play with in {folder / 'story.html'}")


if __name__ == "__main__":
    no_command(__doc__)
