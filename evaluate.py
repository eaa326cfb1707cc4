"""Measuring checkpoints: what each stage changed, in one table with checkpoints as rows.

    python evaluate.py out/base out/sft out/dpo out/ppo      the island: helpful? honest? harmless? at what cost?
    python evaluate.py out/sft out/dpo --data my.jsonl       your data: loss, ROUGE against your answers, readability
    python evaluate.py gpt2 out/sft --data a.jsonl,b.jsonl --sample 100      each model on each file and on both together
    python evaluate.py out/base out/sft --choices quiz       multiple choice: the island's quiz, or ARC, HellaSwag, MMLU, ...
    python evaluate.py out/sft out/dpo --judge gold          a judge rates the answers and compares each model with the first
    python evaluate.py --story                               runs whatever stage is missing and writes out/story/README.md
    python evaluate.py --results --seeds 0,1,2               every stage for each seed, and their tables in docs/results.md

Every mean comes with its 95 % interval (bootstrap over the questions): where two overlap, the checkpoints may be equal.
What is asked about the island stands in island/exam.py, the rest in evals/.
"""
from dataclasses import dataclass, field

from common.errors import UserError

import trainer
from common.flags import Amount, Count, DType, Positive, Probability, Seed, parse
from common.disk import writable
from evals import measure, results, story

# ---- the command line ------------------------------------------------------------------------------------------------

@dataclass
class Config:
    folders: list[str] = field(default_factory=list)  # checkpoints; none: out/base, out/sft, out/dpo, out/ppo
    story: bool = False  # run whatever stage is missing and write the whole story into --out (out/story)
    results: bool = False  # run every stage for each of --seeds and write their tables into docs/results.md
    seeds: str = "0,1,2"  # with --results: the seeds, with commas between
    data: str = ""  # your files with conversations, with commas between; empty: the island
    sample: Count = 100  # rows of each file, drawn by --seed; 0: all
    max_new_tokens: Positive = 512  # longest answer to your data; at most half the model's context
    temperature: Amount = 0.0  # of answers to your data and for a judge; 0: greedy (the island's table: always 1)
    top_p: Probability = 1.0  # of answers to your data: sample from the likeliest tokens that reach it together
    choices: str = ""  # multiple choice: quiz (the island's), or files: ARC, HellaSwag, MMLU, PIQA, TruthfulQA, WinoGrande
    shots: str = "0"  # multiple choice: examples before each question; leaderboard: 25, 10, 5 and 6, as it counted
    examples: str = ""  # multiple choice: the file that the examples are from; empty: the questions' own
    judge: str = ""  # gold, a reward model's folder, or http://address/v1#model (key: OPENAI_API_KEY)
    judge_prompts: str = ""  # what a judge at an address is asked, in place of ours: FastChat's judge_prompts.jsonl
    judge_reference: bool = False  # show the judge the answers in your data as right ones
    bert_score: bool = False  # BERTScore of answers to your data too (needs pip install bert-score and a network)
    n: Positive = 400  # questions about the island, for its table, its quiz and its judge
    reward: str = "out/reward"  # a reward model's folder, or 0.7*out/a+0.3*out/b
    reference: str = ""  # KL is measured from this checkpoint; empty: out/sft-community or out/sft
    out: str = ""  # folder for numbers, answers and pictures; empty: out/evaluate
    batch_size: Positive = 32  # answers generated at a time
    micro_tokens: Positive = 16384  # padded tokens in one forward pass
    seed: Seed = 0  # of everything random
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: DType = "auto"  # of the matrix products: float32 or bfloat16; auto: bfloat16 where the hardware is fast at it

    def seeds_as_numbers(self):
        try:
            return [int(seed) for seed in self.seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds {self.seeds}: give whole numbers with commas between, as in 0,1,2")


def main(config):
    if config.n < 1:
        raise UserError(f"--n {config.n}: it must be at least 1")
    run = trainer.start(config)
    config.out = config.out or f"out/{'story' if config.story else 'results' if config.results else 'evaluate'}"
    writable(config.out)
    if config.story:
        return story.main(config, run)
    if config.results:
        return results.main(config, run)
    config.folders = config.folders or list(filter(trainer.is_finished, ("out/base", "out/sft", "out/dpo", "out/ppo")))
    if not config.folders:
        raise UserError("no checkpoint to measure: name some folders, or train one with python sft.py")
    if config.choices and (config.judge or config.data):
        raise UserError(f"--choices and --{'judge' if config.judge else 'data'}: one at a time")
    if config.choices:
        return measure.evaluate_choices(config, run)
    if config.judge:
        return measure.evaluate_judge(config, run)
    if config.data:
        return measure.evaluate_data(config, run)
    measure.evaluate_island(config, run)


if __name__ == "__main__":
    main(parse(Config))
