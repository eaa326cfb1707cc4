"""Speed and memory of this project, beside its peers where they are installed, in one table from one run.

    python bench.py sft        fine-tuning: whole optimizer steps, collation included (beside TRL's SFTTrainer)
    python bench.py dpo        preference pairs: whole optimizer steps, reference included (beside TRL's DPOTrainer)
    python bench.py ppo        an iteration: roll out, score, estimate, one epoch of updates (beside TRL's RLOOTrainer)
    python bench.py generate   greedy answers to ragged prompts (beside transformers' generate)
    python bench.py nf4        4-bit weights: quantize, dequantize, what a frozen layer keeps (beside bitsandbytes)
    python bench.py memory     peaks of generating and of QLoRA at public shapes (beside transformers, PEFT, bitsandbytes)

    python bench.py sft --shape tiny --data my.jsonl --tokenizer gpt2     your rows, GPT-2's tokens, the tiny shape only

Timings on a shared machine drift. So the candidates take turns in each round, a ratio is formed within its round, and
what is printed is the median ratio with the smallest and the largest. Memory is the peak of a process of its own.
"""
import argparse
import functools

from common.errors import UserError, end_politely
from common.flags import Count, Parser, Positive, bounded
from evals.benches import (LARGE, SHAPES, bench_dpo, bench_generate, bench_memory, bench_nf4, bench_ppo, bench_sft,
                           machine)

COMMANDS = {"sft": bench_sft, "dpo": bench_dpo, "ppo": bench_ppo, "generate": bench_generate, "nf4": bench_nf4,
            "memory": bench_memory}


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, help="what to measure")
    number = functools.partial(parser.add_argument, type=bounded(Count))
    parser.add_argument("--rounds", type=bounded(Positive), default=5, help="times that each candidate runs (default 5)")
    number("--batch-size", default=0, help="rows at a time; 0: 8 for sft and dpo, 64 for ppo, 16 for generate")
    parser.add_argument("--steps", type=bounded(Positive), default=8, help="optimizer steps in one round of sft or dpo (default 8)")
    number("--new-tokens", default=0, help="tokens added to each prompt; 0: 64 for generate, 28 for ppo")
    parser.add_argument("--shape", choices=[*SHAPES, *LARGE],
                        help="small: GPT-2 small; tiny: 4 layers of width 128; empty: both, for ppo tiny; the others are "
                        "for memory, empty: both")
    parser.add_argument("--data", default="", help="your rows, as for sft.py, dpo.py and ppo.py; empty: the island's")
    parser.add_argument("--tokenizer", default="", help="as for sft.py; empty: gpt2 with --data, else tiny")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto: the first there is")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto: bfloat16 where the hardware is fast at it")
    args = parser.parse_args(argv)
    if args.shape and (args.shape in LARGE) != (args.command == "memory") or args.shape and args.command == "nf4":
        raise UserError(f"--shape {args.shape} is no shape of {args.command}: memory takes {' or '.join(LARGE)}, the "
                        f"others {' or '.join(SHAPES)}, nf4 none")
    print(machine() + "\n")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    end_politely()
    main()
