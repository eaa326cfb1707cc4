"""docs/results.md: what every stage gives on the island, as ranges over seeds, with the machine, the date and the
commit.

    python evaluate.py --results --seeds 0,1,2

Stages that are there already (out/results/seed0/sft ...) are not run again, and a seed that has been measured is not
measured again (out/results/seed0/measured.json): after an interruption the same command goes on.
"""
import dataclasses
import datetime
import json
import subprocess
import time
from pathlib import Path

from common.errors import no_command

import dpo
import lora
import ppo
import pretrain
import reward
import sft
import trainer
from checkpoints import load, load_to_ask
from common.disk import replacing, write_json
from common.tables import markdown
from data.pairs import load_ranked
from data.tokenizer import get_tokenizer
from evals import benches, choice, weights
from island import exam
from island.exam import MEASURES
from island.world import Island
from pretrain import text_loss, text_stream

STAGES = {  # folder: its script, the folders that it starts from, and the flags that make it another than its default
    "base": (pretrain, {}, {}),
    "base-llama": (pretrain, {}, {"family": "llama"}),
    "sft": (sft, {"init": "base"}, {}),
    "sft-llama": (sft, {"init": "base-llama"}, {}),
    "sft-lora": (sft, {"init": "base"}, {"lora_r": 16}),
    "sft-qlora": (sft, {"init": "base"}, {"lora_r": 16, "nf4": True}),
    "sft-community": (sft, {"init": "base"}, {"answers": "community"}),
    "reward": (reward, {"init": "sft-community"}, {}),
    "dpo": (dpo, {"init": "sft-community"}, {}),
    "ppo": (ppo, {"init": "sft-community", "reward": "reward"}, {}),
    "ppo-no-penalty": (ppo, {"init": "sft-community", "reward": "reward"}, {"beta": 0.0}),
}
BASES, SFT = ("base", "base-llama"), ("sft", "sft-llama", "sft-lora", "sft-qlora")
POLICIES = ("sft-community", "dpo", "ppo", "ppo-no-penalty")


def run_stages(folder, config, run):
    """Runs what is missing of one seed's chain below the folder; the seconds of each stage are in seconds.json."""
    path = folder / "seconds.json"
    seconds = json.loads(path.read_text()) if path.is_file() else {}
    trainer.tell({str(folder / name): (script, script.Config(**settings)) for name, (script, _, settings) in STAGES.items()
                  if not trainer.is_finished(folder / name)}, run)
    for name, (script, starts, settings) in STAGES.items():
        began = time.perf_counter()
        if not trainer.is_finished(folder / name):
            starts = {flag: str(folder / start) for flag, start in starts.items()}
            trainer.ensure(str(folder / name), script, config, run, **starts, **settings)
            write_json(path, seconds := seconds | {name: time.perf_counter() - began})
    return seconds


def measure(folder, run):
    """One seed's chain -> {table: {row: {column: number}}}."""
    island, found = Island(), {}
    rows = exam.questions(island)  # the held-out ones of sft.py
    found["base"] = {}
    for name in BASES:
        model, tok = load_to_ask(folder / name, run)
        text = text_stream(island.plain_text(400, seed=9), tok)  # the held-out one of pretrain.py
        found["base"][name] = {"held-out loss": text_loss(model, text, run),
                               "quiz": choice.evaluate(model, tok, choice.island_quiz(island), run)[0]["acc"][0]}
    found["skills"] = {name: {key: share for key, (share, _) in exam.skills(*load_to_ask(folder / name, run), rows, island,
                                                                            run).items()} for name in SFT}
    scorer, reference = reward.load_rewards(str(folder / "reward"), run), load_to_ask(folder / "sft-community", run)
    found["preferences"] = {}
    for name in POLICIES:
        marks, _ = exam.examine(*load_to_ask(folder / name, run), island, run, scorer=scorer, reference=reference)
        found["preferences"][name] = {key: sum(values) / max(1, len(values)) for key, values in marks.items()}
    config = reward.Config()
    model, tok = reward.RewardModel.from_pretrained(folder / "reward").to(run.device), get_tokenizer(folder / "reward")
    held = load_ranked(config, Island, run.print)[1]
    scores = reward.score_rows(model, tok, held, run, config.micro_tokens)
    found["reward"] = {"held-out pairs right, by votes": reward.accuracy(held, scores)[0],
                       "by the gold judge": reward.accuracy(held, scores, "gold")[0],
                       "praise adds to a wrong answer": reward.flattery_premium(model, tok, held, run, config.micro_tokens)}
    trained, tok = load(folder / "sft-qlora", merge=False).to(run.device).eval(), get_tokenizer(folder / "sft-qlora")
    found["merges"] = {}
    for how in lora.MERGES:
        merged = load(folder / "sft-qlora", how=how).to(run.device).eval()
        largest, mean, changed = weights.difference(trained, merged, tok, island.plain_text(400, seed=9))
        facts = exam.skills(merged, tok, rows, island, run)["helpful"][0]
        found["merges"][how] = {"largest": largest, "mean": mean, "changed": changed, "facts": facts}
    return found


# ---- the page --------------------------------------------------------------------------------------------------------

def span(numbers, form="{:.2f}"):
    """One number a seed -> the smallest and the largest."""
    low, high = form.format(min(numbers)), form.format(max(numbers))
    return low if low == high else f"{low} ... {high}"


def columns(found, table, names):
    """[measured, one a seed] -> rows of a table: a measure in words, and its span for each of the checkpoints."""
    keys = [key for key in MEASURES if key in found[0][table][names[0]]]
    form = {key: "{:.0%}" if MEASURES[key].form == "share" else "{:.2f}" for key in keys}
    return [[MEASURES[key].words, *(span([one[table][name].get(key, 0.0) for one in found], form[key]) for name in names)]
            for key in keys]


def page(found, seconds, seeds, run):
    """Everything as Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                            text=True)
    dtype = str(run.dtype).removeprefix("torch.")
    times = ", ".join(f"{name} {span([one[name] for one in seconds if name in one], '{:.0f}')}" for name in STAGES
                      if any(name in one for one in seconds))
    base = [[key, *(span([one["base"][name][key] for one in found], form) for name in BASES)]
            for key, form in (("held-out loss", "{:.3f}"), ("quiz", "{:.0%}"))]
    judge = [[key, span([one["reward"][key] for one in found], form)]
             for key, form in zip(found[0]["reward"], ("{:.1%}", "{:.1%}", "{:.2f}"))]
    forms = {"largest": "{:.1e}", "mean": "{:.1e}", "changed": "{:.2%}", "facts": "{:.0%}"}
    merges = [[how, *(span([one["merges"][how][key] for one in found], form) for key, form in forms.items())]
              for how in lora.MERGES]
    return f"""# Results on the island

Written by `python evaluate.py --results --seeds {','.join(map(str, seeds))}` on {datetime.date.today()}, commit
{commit.stdout.strip() or 'unknown'}: {benches.machine()}; {dtype}. Each cell is the smallest and the largest of {len(seeds)}
seed{'s' * (len(seeds) > 1)}, each with its own pretraining. Seconds of wall time a stage, measured with its tables: {times}.

## The base model (pretrain.py), a GPT and a Llama of its size (llama.py): the same data, the same steps

{markdown(["", *BASES], base)}

## Supervised fine-tuning (sft.py), all weights of both and adapters of rank 16 beside the GPT's

Greedy answers to what no conversation has mentioned.

{markdown(["", *SFT], columns(found, "skills", SFT))}

## The reward model (reward.py)

{markdown(["", "range"], judge)}

## What preferences do, and what they cost (dpo.py, ppo.py)

Answers at temperature 1 to 400 held-out questions. All start from the first column.

{markdown(["", *POLICIES], columns(found, "preferences", POLICIES))}

## Merging an adapter that was trained beside 4-bit weights (lora.py)

Against the unmerged model, on the island's held-out text: largest and mean difference of a logit, likeliest tokens that change,
facts about held-out residents.

{markdown(["merge", "largest", "mean", "tokens that change", "facts right"], merges)}
"""


def main(config, run):
    """Runs and measures every seed's chain, and writes docs/results.md."""
    seeds = config.seeds_as_numbers()
    found, seconds = [], []
    for seed in seeds:
        folder = Path(config.out) / f"seed{seed}"
        run.print(f"seed {seed}: {folder}")
        seconds.append(run_stages(folder, dataclasses.replace(config, seed=seed), run))
        if not (folder / "measured.json").is_file():
            write_json(folder / "measured.json", measure(folder, run), indent=1)
        found.append(json.loads((folder / "measured.json").read_text()))
    with replacing("docs/results.md") as temporary:
        temporary.write_text(page(found, seconds, seeds, run), encoding="utf-8")
    run.print("the tables are in docs/results.md")


if __name__ == "__main__":
    no_command(__doc__)
