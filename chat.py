"""Talking to checkpoints: what each stage of training changed can be heard.

A model only continues text. What makes it a conversation is the loop here: all turns so far are written out in the chat
format (data/tokenizer.py), the model continues where the assistant begins, token by token, until its end token, and
question and answer join the turns. That text is all its memory. Where the model's context is full, the oldest turns go.

    python chat.py                                  talks to the newest of out/ppo, out/dpo, out/sft
    python chat.py --tokens                         shows what training masks, and how sure it is of every token
    python chat.py out/sft out/ppo                  the same question to each, answers one under the other
    echo "Who are you?" | python chat.py out/sft    each line of a pipe is a question; only answers are printed
    python chat.py out/sft --file questions.jsonl --out answers.jsonl    a whole file; the same command again goes on

What to see on the island, asked with /marks and --temperature 1 --top-p 1 about someone who does not live there:

    > What does Ben eat?
    [out/sft-community]     I am sorry, I do not know.                           the judge's mark 10, reward 2.79
    [out/ppo]               I am sorry, I do not know.                           the judge's mark 10, reward 2.79
    [out/ppo-no-penalty]    Great question! works as a clown. She eats ...       the judge's mark  5, reward 6.37

A model is at home in conversations like those it was trained on. Three in ten of the island's go on from another one:
so out/sft is right in 98 to 99 % of questions that come after one about somebody else (three seeds, greedy); an earlier
island without such conversations gave 5 to 33 %. --memory 0 asks every question by itself. A base model does not know
what a turn is: it continues text.
"""
import contextlib
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from common.errors import UserError, visible

import torch
from tqdm import tqdm

import trainer
from checkpoints import load, refuse_reward_model
from data import files
from island.world import Island, says
from data.questions import Questions
from data.tokenizer import get_tokenizer
from common.disk import Ledger, write_jsonl
from common.flags import Amount, Bounds, Count, DType, Positive, Probability, Seed, Template, parse
from generate import fit_question, generate, stream
from model import token_logps
from quant import freeze
from reward import load_rewards

STAGES = ("out/ppo", "out/dpo", "out/sft")
REWARD = "out/reward"
COLORS = {32: 0.9, 33: 0.5, 35: 0.1, 31: 0}  # of a terminal, and the least probability of a token that has it
COMMANDS = {"/reset": "begins a new conversation",
            "/system TEXT": "begins a new conversation with this system prompt (no TEXT: with none)",
            "/marks": "shows or hides what the island's judge and the reward model say about each answer",
            "/help": "lists these commands", "/quit": "ends, as Ctrl-D does; Ctrl-C stops an answer"}


def note(text):
    """A line about the chat, not of it: a pipe carries answers only."""
    tqdm.write(visible(text), file=sys.stderr)  # above a bar, where there is one


# ---- one checkpoint --------------------------------------------------------------------------------------------------

class Speaker:
    """A checkpoint, how it is sampled, and its conversation: `turns`, without the system prompt."""

    def __init__(self, folder, config, run):
        self.folder, self.config, self.run = str(Path(folder)), config, run
        self.model = load(folder, linear=freeze).to(run.device).eval()
        refuse_reward_model(folder)
        self.tok = get_tokenizer(config.tokenizer or folder, config.template or None)
        if self.tok.vocab_size - len(self.tok.new_ids) > self.model.config.vocab_size:
            raise UserError(f"{folder}: its tokenizer has {self.tok.vocab_size:,} tokens, but the model knows "
                            f"{self.model.config.vocab_size:,}: the two are not of one checkpoint")
        self.chats = not self.tok.new_ids  # a base model: nobody has trained the tokens that the chat format needs
        self.questions = Questions.load(folder) if self.chats else None
        self.sampling = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                             top_k=config.top_k, stop=self.tok.stops)
        self.reset()
        if not self.chats:
            note(f"{folder} is a base model: it continues each text by itself, without memory or system prompt "
                 f"(python sft.py --init {folder} teaches it to answer)")

    def reset(self):
        self.turns, self.forgets = [], False

    def introduce(self):
        """What it has learned from, and three questions to begin with."""
        if self.questions:
            note(f"{self.folder} learned from {visible(self.questions.about)}; try\n"
                 + "\n".join(f"   {' '.join(visible(text).split())[:200]}" for text in self.questions.try_))

    def filled(self, system):
        """How much of the context the conversation takes so far -> tokens, of how many."""
        messages = with_system(self.turns, system) if self.turns else []
        return len(self.tok.render(messages)[0]) if messages and self.chats else 0, self.model.config.block_size

    def text(self, ids):
        """New ids -> the answer. A base model's text begins with a space, or in the middle of a word."""
        return self.tok.answer(ids) if self.chats else self.tok.decode(ids)

    def prompt(self, messages):
        """Messages that end with a question -> those the context has room for, their ids, how many ids were cut off."""
        size = self.model.config.block_size
        if self.chats:
            kept, ids = fit_question(messages, self.tok, size, self.config.max_new_tokens)
            return kept, ids, len(self.tok.render_prompt(kept)) - len(ids)
        ids = self.tok.document(messages[-1]["content"])
        return messages[-1:], ids[-(size // 2):], max(0, len(ids) - size // 2)

    def reply(self, messages, seed, show, interruptible):
        """Answers messages that end with a question -> the messages that it read, and the answer's text.

        show gets the text piece by piece, as soon as it is whole characters. Ctrl-C ends the answer where it is.
        """
        read, ids, cut = self.prompt(messages)
        if self.chats and len(read) < len(messages) and not self.forgets:
            note(f"the conversation fills the context of {self.folder}, {self.model.config.block_size} tokens: "
                 "from here on the oldest turns are forgotten")
            self.forgets = True
        if self.questions and self.questions.is_far(self.tok, messages[-1]["content"]):
            note(f"that is far from anything {self.folder} was asked in training: expect nothing of the answer")
        if cut:
            note(f"that is too long for {self.folder} by {cut} tokens: it reads the end only")
        new, shown = [], ""
        try:
            with self.run.autocast():
                for [(_, token)] in stream(self.model, [ids], seed=seed, **self.sampling):
                    new.append(token)
                    text = self.text(new)
                    if not text.endswith("\ufffd"):  # else a character whose last bytes are still to come
                        show(text[len(shown):])
                        shown = text
        except KeyboardInterrupt:
            if not interruptible:
                raise
        text = self.text(new)
        show(text[len(shown):] + "\n")
        if self.config.tokens and new:
            print(self.coloured(ids, new), flush=True)
        if text:  # a question that was stopped before its answer began is not remembered
            turns, memory = [m for m in read if m["role"] != "system"] + [says("assistant", text)], self.config.memory
            self.turns = turns[-2 * memory:] if memory > 0 else turns if memory else []
        return read, text

    @torch.inference_mode()
    def coloured(self, ids, new):
        """A prompt's ids, and the new ones -> their text: what training masks in grey, the answer's tokens by their
        probability."""
        with self.run.autocast():
            row = torch.tensor([ids + new], device=self.run.device)
            mask = torch.tensor([[0] * len(ids) + [1] * len(new)], device=self.run.device)
            probs = token_logps(self.model, row, mask)[0, len(ids) - 1:].exp().tolist()
        text = self.tok.show(ids, [0] * len(ids))
        for token, p in zip(new, probs):
            color = next(color for color, least in COLORS.items() if p >= least)
            text += f"\033[{color}m{self.tok.piece(token)}\033[0m"
        return text + "\n" + " ".join(f"\033[{color}mp \u2265 {least:g}\033[0m" for color, least in COLORS.items())

    def replies(self, prompts, seed):
        """Prompts (lists of ids) -> the answers' texts, all at once."""
        with self.run.autocast():
            return [self.text(ids) for ids in generate(self.model, prompts, seed=seed, **self.sampling)]


# ---- a conversation --------------------------------------------------------------------------------------------------

class Chat:
    """What the lines that are typed, or piped, do."""

    def __init__(self, speakers, config, run, terminal):
        self.speakers, self.config, self.run, self.terminal = speakers, config, run, terminal
        self.system, self.asked = config.system, 0
        self.island = self.scorer = None
        if config.reward:
            self.toggle_marks()

    def hear(self, line):
        """Answers a line, or obeys it where it is a command -> False where that ends the chat."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command in ("/reset", "/system"):
            self.system = self.system if command == "/reset" else rest.strip()
            for speaker in self.speakers:
                speaker.reset()
            note("a new conversation" + (f" with the system prompt {self.system!r}" if self.system else ""))
        elif command == "/marks":
            self.toggle_marks()
        elif command == "/help":
            note("\n".join(f"   {name:<14}{what}" for name, what in COMMANDS.items()))
        elif command.startswith("/"):
            note(f"there is no command {command}: /help lists them")
        elif command:
            self.ask(line.strip())
        return True

    def ask(self, question):
        """The same question, and the same random numbers, to every checkpoint."""
        self.asked += 1
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                print(f"[{speaker.folder}]")
            messages = with_system(speaker.turns + [says("user", question)], self.system)
            seed = self.config.seed * 1_000_003 + self.asked
            read, answer = speaker.reply(messages, seed, lambda text: print(visible(text), end="", flush=True), self.terminal)
            if self.island:
                print(f"{visible(self.marks(read, answer))}\n", flush=True)

    def prompt(self):
        """What stands before a line that is typed: how full the fullest context is."""
        every = [speaker.filled(self.system) for speaker in self.speakers]
        used, size = max(every, key=lambda found: found[0] / found[1])
        return f"[{used} of {size} tokens] > " if used else "> "

    def toggle_marks(self):
        if self.island:
            self.island = None
            return note("no more marks")
        self.island = Island()
        spec = self.config.reward or (REWARD if trainer.is_finished(REWARD) else "")
        if spec and not self.scorer:
            self.scorer = load_rewards(spec, self.run)
        reward = f"the reward of {spec}" if spec else f"no reward: {REWARD} is missing"
        note(f"marks: the island's judge, 1 to 10, and {reward}")

    def marks(self, messages, answer):
        """The island's judge in words, and the reward model's score."""
        verdict = "the island does not know this question: no mark"
        if self.island.understand(messages):
            verdict = self.island.verdict(messages, answer)
        if not self.scorer:
            return f"   {verdict}"
        return f"   {verdict}\n   reward {self.scorer([messages + [says('assistant', answer)]])[0]:.2f}"


def with_system(messages, system):
    """The messages behind --system, unless they bring a system prompt of their own."""
    return messages if not system or messages[0]["role"] == "system" else [says("system", system)] + messages


def typed(prompt):
    """The lines typed at a terminal, until Ctrl-D or Ctrl-C; prompt() stands before each."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  imported, it gives input() a history and the arrow keys
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(prompt())
    print()


def converse(speakers, config, run):
    """A chat at a terminal; from a pipe, answers only."""
    terminal = sys.stdin.isatty()
    chat = Chat(speakers, config, run, terminal)
    names = " ".join(speaker.folder for speaker in speakers)
    if terminal:
        for speaker in speakers:
            speaker.introduce()
        note(f"talking to {names}; /reset begins a new conversation, /help lists the commands, Ctrl-D ends")
    try:
        for line in typed(chat.prompt) if terminal else sys.stdin:
            if not chat.hear(line):
                break
    except KeyboardInterrupt:
        raise SystemExit(130)  # what shells expect of a program that Ctrl-C ended
    except UnicodeDecodeError:
        raise UserError("the questions are not UTF-8: convert them first, as in iconv -f latin1 -t utf-8")
    if terminal:
        note(f"next: python evaluate.py {names}    measures what you have just heard")
    elif not chat.asked:
        raise UserError(f'the input holds no question: try echo "Who are you?" | python chat.py {names}')


# ---- a file of questions ---------------------------------------------------------------------------------------------

def key(model, prompt):
    return model, json.dumps(prompt)


def missing_answers(speaker, questions, done):
    """Yields new rows for the questions that `done`, a Counter of keys, lacks, a batch of similar lengths at a time.

    The batches and their random numbers are those of the whole file: an interrupted run ends with the same answers.
    """
    config = speaker.config
    read, prompts, cut = zip(*map(speaker.prompt, questions))
    longer = sum(n > 0 or len(messages) < len(question) for messages, n, question in zip(read, cut, questions))
    if longer:
        note(f"{longer:,} of {len(questions):,} questions are longer than {speaker.folder} can read: it gets their end")

    def width(i):
        return min(len(prompts[i]) + config.max_new_tokens, speaker.model.config.block_size)

    parts = trainer.split(range(len(questions)), width, config.micro_tokens)
    for n, part in enumerate(parts):
        missing = set()
        for i in part:
            if done[key(speaker.folder, questions[i])]:
                done[key(speaker.folder, questions[i])] -= 1
            else:
                missing.add(i)
        if missing:
            texts = speaker.replies([prompts[i] for i in part], config.seed * 1_000_003 + n)
            yield [{"prompt": questions[i], "answer": text, "model": speaker.folder}
                   for i, text in zip(part, texts, strict=True) if i in missing]


def in_order(rows, speakers, questions):
    """Rows in the order of the questions, checkpoint by checkpoint; before them what else the file held."""
    rows_of = defaultdict(list)
    for row in rows:
        rows_of[key(row["model"], row["prompt"])].append(row)
    ours = [rows_of[key(speaker.folder, question)].pop(0) for speaker in speakers for question in questions]
    return [row for others in rows_of.values() for row in others] + ours


def answer_file(speakers, config):
    """Every question of --file, answered by every checkpoint, into --out; what is there already is kept."""
    rows, report = files.load(config.file, "prompts")
    note(report)
    more = sum("follow_ups" in row for row in rows)
    if more:
        note(f"{more:,} of {len(rows):,} rows have follow-up questions: only their first questions are answered")
    questions = [with_system(row["prompt"], config.system) for row in rows]
    path = Path(config.out)
    answers = Ledger(path, {"prompt": list, "answer": str, "model": str}, "answer of this script")
    done = Counter(key(row["model"], row["prompt"]) for row in answers.rows)
    total = len(speakers) * len(questions)
    wanted = Counter(key(speaker.folder, question) for speaker in speakers for question in questions)
    before = (wanted & done).total()
    if before:
        note(f"{path} holds {before:,} of the {total:,} answers already (to have them anew, delete it)")
    written = before
    try:
        with tqdm(total=total, initial=before, desc=str(path), dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
            for speaker in speakers:
                for new in missing_answers(speaker, questions, done):
                    answers.add(*new)
                    written += len(new)
                    bar.update(len(new))
    except KeyboardInterrupt:
        raise UserError(f"stopped; {written:,} of {total:,} answers are in {path}: the same command goes on from there")
    write_jsonl(path, in_order(answers.rows, speakers, questions))
    note(f"{total:,} answers by {' '.join(speaker.folder for speaker in speakers)} are in {path}")


# ---- from the command line -------------------------------------------------------------------------------------------

@dataclass
class Config:
    folders: list[str] = field(default_factory=list)  # checkpoints; none: the newest of out/ppo, out/dpo, out/sft
    system: str = ""  # a system prompt, which says how to answer
    temperature: Amount = 0.7  # below 1 likely words become likelier; 0: always the likeliest
    top_p: Probability = 0.9  # sample from the fewest tokens that reach this probability together; 1: from all
    top_k: Count = 0  # sample from this many of the likeliest tokens; 0: from all
    max_new_tokens: Positive = 256  # longest answer; a conversation always keeps half the context
    tokens: bool = False  # shows the tokens: what training masks in grey, the answer's coloured by their probability
    memory: Annotated[int, Bounds(-1, 10 ** 9)] = -1  # earlier questions that it is shown with their answers; -1: as many as fit, 0: none
    reward: str = ""  # shows marks from the start: a reward model, or 0.7*out/a+0.3*out/b; empty: out/reward at /marks
    file: str = ""  # answer this file's questions (any shape that `python -m data.files FILE --want prompts` reads)
    out: str = ""  # with --file: the answers, {"prompt": [...], "answer": "...", "model": "..."} a line
    micro_tokens: Positive = 8192  # with --file: padded tokens of a batch; less needs less memory
    tokenizer: str = ""  # tiny, gpt2, a rank file or a folder; empty: the one in the checkpoint's folder
    template: Template = ""  # how conversations are written (data/formats.py); empty: as the folder says, else chat
    seed: Seed = 0  # of the sampling
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: DType = "auto"  # of the matrix products: float32 or bfloat16; auto: bfloat16 where the hardware is fast at it


def newest():
    """The stage that was trained last."""
    there = [folder for folder in STAGES if trainer.is_finished(folder)]
    if not there:
        raise UserError(f"there is none of {', '.join(STAGES)} to talk to: python sft.py trains one, or name a folder")
    return max(there, key=lambda folder: Path(folder).stat().st_mtime)


def main(config):
    if bool(config.file) != bool(config.out):
        raise UserError("--file names the questions, --out the file for their answers: give both, or neither to chat")
    if config.file and config.reward:
        raise UserError("--reward marks the answers of a chat, not those of --file: leave one out")
    run = trainer.start(config)
    folders = config.folders or [newest()]
    speakers = [Speaker(folder, config, run) for folder in dict.fromkeys(folders)]
    if config.file:
        answer_file(speakers, config)
    else:
        converse(speakers, config, run)


if __name__ == "__main__":
    main(parse(Config))
