"""Sampling: how a model that predicts one token continues a text, or answers a conversation.

    x_{t+1} ~ softmax(logits(x_1 ... x_t) / temperature),    cut to the likeliest: top_k of them, or top_p of the probability

The keys and values of what was read are kept (model.Cache), so a new token costs one position and not the whole text.
Rows of different lengths are generated together: padding stands on the right, and each row has a cursor of its own.

    python generate.py out/base "Mabel likes to"       continues a text; a chat checkpoint is asked with chat.py
    python generate.py out/base "Mabel" --n 5 --temperature 1
"""
import itertools
import math
from dataclasses import dataclass, field

from common.errors import UserError, visible

import torch

import trainer
from checkpoints import load, load_to_ask
from common.flags import Amount, Count, DType, Positive, Probability, Seed, parse
from common.waits import bar
from data.shapes import says
from data.tokenizer import fit, get_tokenizer
from model import Cache
from quant import freeze

# ---- from logits to tokens -------------------------------------------------------------------------------------------

def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop=None, seed=None):
    """Continues every prompt: list[list[int]] -> list[list[int]], the new tokens only, the stop token included.

    stop: an id or several. A row ends there, after max_new_tokens, or at the end of the context; the others go on.
    temperature 0 is greedy. Raises UserError for a prompt that is empty or leaves no room in the context.
    """
    new, longest = [[] for _ in prompts], min(max_new_tokens, model.config.block_size)
    tokens = stream(model, prompts, max_new_tokens, temperature, top_p, top_k, stop, seed)
    for some in bar(tokens, f"{len(prompts):,} answer{'s' * (len(prompts) != 1)}", longest):
        for row, token in some:
            new[row].append(token)
    return new


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop=None, seed=None):
    """What `generate` collects, as it comes: yields [(row, token), ...] of the rows that still go on, once per token.

    One prefill of the right-padded prompts, then one forward pass of one position per token. The model is in evaluation
    mode until the last token, or until whoever asked wants no more and closes the generator.
    """
    block_size, device = model.config.block_size, model.device
    stops = stop if isinstance(stop, (tuple, list, set)) else (stop,)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < block_size:
            raise UserError(f"prompt {row} has {len(prompt)} tokens; it must have at least 1 and leave room in the model's "
                            f"context of {block_size}: shorten it to {block_size - 1} or fewer")
    if not prompts or max_new_tokens < 1:
        return
    limits = [min(max_new_tokens, block_size - len(prompt)) for prompt in prompts]  # of new tokens
    generator = torch.Generator(device)  # of its own: a sample while training does not change the training
    generator.seed() if seed is None else generator.manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        hidden, cache = prefill(model, prompts, max_new_tokens)
        rows = list(range(len(prompts)))  # the prompt that each row of the cache belongs to
        going_on = [True] * len(prompts)
        for n in itertools.count(1):
            tokens = sample(model.head(hidden), temperature, top_p, top_k, generator)  # (B,)
            new = [(row, token) for row, token in zip(rows, tokens.tolist()) if going_on[row]]
            for row, token in new:
                going_on[row] = n < limits[row] and token not in stops
            yield new
            alive = [i for i, row in enumerate(rows) if going_on[row]]
            if not alive:
                break
            if len(alive) <= 0.75 * len(rows):  # copying the cache has a price too: only when it pays
                keep = torch.tensor(alive, device=device)
                cache.keep(keep)
                tokens, rows = tokens[keep], [rows[i] for i in alive]
            hidden = model.hidden(tokens[:, None], cache)[:, 0]  # (B, C)
    finally:
        model.train(was_training)


def prefill(model, prompts, max_new_tokens):
    """Reads the prompts in one pass -> hidden (B, C) of each prompt's last token, a cache with room for the answers."""
    device = model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long, device=device)  # (B, T)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt, device=device)
    cache = Cache(model, lengths, room=min(model.config.block_size, ids.size(1) + max_new_tokens))
    return model.hidden(ids, cache)[torch.arange(len(prompts), device=device), lengths - 1], cache


def sample(logits, temperature, top_p, top_k, generator):
    """logits (B, V) -> token ids (B,). top_k keeps the k likeliest; top_p the fewest whose probability reaches p
    (Holtzman et al. 2020), after the temperature."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = logits / temperature
    if 0 < top_k < logits.size(1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
    # inverse of the cumulative distribution: one random number per row where torch.multinomial draws one per token; a
    # token of probability 0 adds nothing and is never the first beyond u
    widest = trainer.widest(probs.device)
    cumulative = probs.to(widest).cumsum(dim=1)
    u = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=widest)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(1)


def nucleus(probs, top_p):
    """(B, V) -> (B, V): 0 but for the fewest tokens that reach the probability top_p together (Holtzman et al. 2020)."""
    ordered, order = probs.sort(dim=1, descending=True)
    beyond = ordered.cumsum(dim=1) - ordered >= top_p  # what comes before a token already reaches p
    return probs.masked_fill(beyond.gather(1, order.argsort(dim=1)), 0.0)


# ---- conversations ---------------------------------------------------------------------------------------------------

def fit_question(messages, tok, block_size, max_new_tokens):
    """A conversation that ends with a question -> the messages of it that are kept, and their ids, up to where the
    assistant begins. They leave room for max_new_tokens, but for no more than half the context.

    The oldest turns go first; of a question that is too long by itself the end is kept.
    """
    room = block_size - min(max_new_tokens, block_size // 2)
    kept = fit(messages, tok.render_prompt, room) or messages[-1:]
    return kept, tok.render_prompt(kept)[-room:]


def respond(model, tok, conversations, run, max_new_tokens=48, **sampling):
    """Conversations that end with a question, list[messages] -> prompts and responses, two lists of ids. Where the
    model ended its answer, the end token is part of it."""
    prompts = [fit_question(messages, tok, model.config.block_size, max_new_tokens)[1] for messages in conversations]
    with run.autocast():
        return prompts, generate(model, prompts, max_new_tokens, stop=tok.stops, **sampling)


def ask(model, tok, conversations, run, max_new_tokens=48, look_up=None, **sampling):
    """The model's answers to conversations that end with a question: list[messages] -> list[str].

    look_up: a function, query -> text. Where the model writes a search instead of an answer, it is told what was
    found and answers then; without look_up, or where it searches again, its query is its answer.
    """
    responses = respond(model, tok, conversations, run, max_new_tokens, **sampling)[1]
    answers = [tok.answer(ids) for ids in responses]
    searches = [i for i, ids in enumerate(responses) if look_up and ids and ids[-1] in tok.ends[1:]]
    if searches:
        told = [[*conversations[i], says("search", answers[i]), says("result", look_up(answers[i]))] for i in searches]
        for i, answer in zip(searches, ask(model, tok, told, run, max_new_tokens, **sampling)):
            answers[i] = answer
    return answers


def question_of(messages):
    """A conversation up to its last question."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[:last + 1]


def sample_text(model, tok, rows, run, n=4):
    """A few held-out questions with the model's answers, to read while it trains."""
    rows = rows[::max(1, len(rows) // n)][:n]
    asked = [question_of(row["messages"]) for row in rows]
    answers = ask(model, tok, asked, run, temperature=0.0)
    return "\n".join(f"   {messages[-1]['content'][:100]!r} -> {answer[:160]!r}" for messages, answer in zip(asked, answers))


def asker(folder, max_new_tokens):
    """A checkpoint that was trained to answer -> a function: texts -> its greedy answers. Of a text that is too long
    for the model, the beginning is asked."""
    run = trainer.start(Config())
    model, tok = load_to_ask(folder, run)

    def fitting(text):
        words, room = text.split(" "), model.config.block_size - max_new_tokens
        while len(tok.render_prompt([says("user", " ".join(words))])) > room and len(words) > 1:
            words = words[:len(words) * 9 // 10]
        return [says("user", " ".join(words))]

    return lambda texts: ask(model, tok, list(map(fitting, texts)), run, max_new_tokens, temperature=0.0)


# ---- python generate.py ----------------------------------------------------------------------------------------------

@dataclass
class Config:
    words: list[str] = field(default_factory=list)  # the checkpoint's folder, or gpt2 ..., then the text that it continues
    n: Positive = 1  # continuations
    max_new_tokens: Positive = 64  # longest continuation
    temperature: Amount = 0.8  # below 1 likely words become likelier; 0: always the likeliest
    top_p: Probability = 1.0  # sample from the fewest tokens that reach this probability together; 1: from all
    top_k: Count = 0  # sample from this many of the likeliest tokens; 0: from all
    seed: Seed = 0  # of the sampling
    device: str = "auto"  # cuda, mps or cpu; auto: the first there is
    dtype: DType = "auto"  # of the matrix products: float32 or bfloat16; auto: bfloat16 where the hardware is fast at it


def main(config):
    if len(config.words) < 2 or config.n < 1:
        raise UserError('name a checkpoint and the text that it continues, as in python generate.py out/base "Mabel likes to"')
    folder, text, run = config.words[0], " ".join(config.words[1:]), trainer.start(config)
    model, tok = load(folder, linear=freeze).to(run.device), get_tokenizer(folder)
    prompt = tok.document(text)[-(model.config.block_size - 1):]
    with run.autocast():
        for ids in generate(model, [prompt] * config.n, config.max_new_tokens, config.temperature, config.top_p, config.top_k,
                            tok.stops, config.seed):
            print(visible(f"{text}{tok.decode(ids)}"))
    run.print(f'next: python chat.py {folder}, or another --seed')


if __name__ == "__main__":
    main(parse(Config))
