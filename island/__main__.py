"""The embedded world, shown, asked and written out.

    python -m island                                   a sample of everything
    python -m island --ask "What does Mabel eat?"      the truth
    python -m island --write out/island                every part as JSONL, in the formats of public data sets
    python -m island --dump dump                       a dirty dump, for the filters of data/eli5.py: see dirty.py
"""
from pathlib import Path

from common.errors import UserError, end_politely
from common.disk import writable, write_jsonl
from common.flags import Amount, Number, Parser, Positive, Seed, bounded
from data.readability import readability
from island import dirty
from island.kinds import ATTRIBUTES, KINDS
from island.world import CHATS, CONVERSATIONS, Island


def write_rows(path, rows):
    write_jsonl(path, rows)
    print(f"{len(rows):7,} rows  {path}")


def eli5(rows):
    """Ranked rows in the shape of the public ELI5 data set, a list for each field of the answers."""
    return [{"q_id": f"island{i}", "title": row["prompt"][-1]["content"], "selftext": "", "answers": {
        "a_id": [f"island{i}a{j}" for j in range(len(row["answers"]))],
        "text": [answer["text"] for answer in row["answers"]],
        "score": [answer["score"] for answer in row["answers"]]}} for i, row in enumerate(rows)]


def write(island, args):
    """Writes every part of the world as JSONL into the folder args.write."""
    folder, kinds = Path(args.write), island.kinds(args.more, args.without)
    if "search" in kinds["more"]:
        raise UserError("--with search: files of conversations know no searches; leave it out, or train with "
                        "python sft.py --with search")
    if folder.is_file():
        raise UserError(f"{folder} is a file: give --write the name of a folder")
    writable(folder)
    votes = {"flattery": args.flattery, "noise": args.noise} | kinds
    write_rows(folder / "pretrain.jsonl", [{"text": text} for text in island.plain_text()])
    for answers in ("clean", "community"):
        rows = island.conversations(args.n_sft, answers=answers, chats=CHATS, **kinds)
        write_rows(folder / f"sft_{answers}.jsonl", [{"messages": row["messages"]} for row in rows])
    rows = island.conversations(600, seed=7, split="test")
    write_rows(folder / "sft_test.jsonl", [{"messages": row["messages"]} for row in rows])
    write_rows(folder / "ranked.jsonl", eli5(island.ranked(args.n_ranked, **votes)))
    write_rows(folder / "ranked_test.jsonl", eli5(island.ranked(400, seed=8, split="test", **votes)))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"][-1]["content"]} for row in island.prompts(2000, **kinds)])
    print(f"next: python sft.py --data {folder / 'sft_clean.jsonl'}")


def show(island, args):
    """Prints a sample of everything."""
    print("residents        " + "".join(f"{a:13}" for a in ATTRIBUTES))
    for name in island.parts["train"]["residents"][:4] + island.parts["test"]["residents"][:2]:
        held_out = " (held out)" if name in island.parts["test"]["residents"] else ""
        print(f"  {name:15}" + "".join(f"{island.residents[name][a]:13}" for a in ATTRIBUTES) + held_out)
    print("\nplain text")
    for text in island.plain_text(4, seed=args.seed + 1):
        print(f"  {text}")
    print("\nconversations")
    kinds = island.kinds(args.more or ",".join(KINDS), args.without)
    rows = {row["kind"]: row for row in island.conversations(1000, **kinds)}
    for row in map(rows.get, filter(rows.get, CONVERSATIONS | KINDS)):
        print(f"  {row['kind']:9} " + " | ".join(m["content"] for m in row["messages"]))
    print("\nranked answers                                                              votes  gold    FRE   FKG")
    rows = island.ranked(200, flattery=args.flattery, noise=args.noise, k=(5, 6))
    for row in {row["kind"]: row for row in rows}.values():
        print(f"  {row['prompt'][-1]['content']}")
        for answer in sorted(row["answers"], key=lambda answer: -answer["score"]):
            fre, fkg = readability(answer["text"])
            print(f"    {answer['text'][:71]:71} {answer['score']:5} {answer['gold']:5.0f} {fre:6.0f} {fkg:5.1f}")
    print('\nnext: python -m island --ask "What does Mabel eat?", or --write out/island')


def main():
    parser = Parser(
        "python -m island", description="The embedded world. Without --ask, --write or --dump it shows a sample of everything.",
        epilog="Knobs to learn from: --without unknown (the model will invent), --flattery 0 (votes without bias), --noise 0 "
               "(votes that are the truth).")
    parser.add_argument("--ask", metavar="QUESTION", help='print the truth, for instance --ask "What does Mabel eat?"')
    parser.add_argument("--write", metavar="FOLDER", help="write every part as JSONL files")
    parser.add_argument("--dump", metavar="FOLDER", help="write posts and articles full of counted mistakes")
    parser.add_argument("--n-dump", type=bounded(Positive), default=600, help="posts in the dump (default 600)")
    parser.add_argument("--seed", type=bounded(Seed), default=0,
                        help="another seed is another world (default 0, the world of the scripts)")
    parser.add_argument("--n-sft", type=bounded(Positive), default=3000, help="conversations in each SFT file (default 3000)")
    parser.add_argument("--n-ranked", type=bounded(Positive), default=2000, help="questions with ranked answers (default 2000)")
    parser.add_argument("--with", dest="more", default="", metavar="KINDS",
                        help=f"kinds of questions more, with commas between: {', '.join(KINDS)}")
    parser.add_argument("--without", default="", metavar="KINDS",
                        help=f"kinds to leave out, of those and of {', '.join(CONVERSATIONS)}")
    parser.add_argument("--flattery", type=bounded(Number), default=2.5,
                        help='what "Great question!" is worth to voters, in gold points (default 2.5)')
    parser.add_argument("--noise", type=bounded(Amount), default=1.5,
                        help="standard deviation of the votes, in gold points (default 1.5)")
    args = parser.parse_args()
    island = Island(args.seed)
    if args.ask:
        print(island.truth(args.ask))
    elif args.write:
        write(island, args)
    elif args.dump:
        dirty.write(args.dump, island, args.n_dump, args.seed)
    else:
        show(island, args)


if __name__ == "__main__":
    end_politely()
    main()
