"""The GPT: a decoder-only transformer, exactly GPT-2 (Radford et al. 2019), and how it speaks.

    p(x_1 ... x_T) = prod_t p(x_t | x_<t),     trained by minimising  -mean_t log p(x_t | x_<t)

    python model.py                     pretrains the tiny base model on the island's plain text (out/base)
    python model.py --data my.txt       the same on your own text
    model = GPT.from_pretrained("gpt2") the public weights; any folder of the GPT-2 family works

Reads and writes Hugging Face folders: transformers gives the same logits on both sides (tests/parity).
"""
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

import hub
import lora
import trainer
from data import files
from data.island import Island
from data.tokenizer import get_tokenizer
from errors import UserError
from flags import TrainConfig, dropout_of, parse


@dataclass
class GPTConfig:
    block_size: int = 1024  # the context length
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | tuple[float, float] = 0.0  # of both residual branches; (bottom, top) is a ramp over the layers
    attention_dropout: float = 0.0  # of the attention weights
    bias: bool = True  # in linear layers and layer norms, as GPT-2 has them
    checkpointing: bool = False  # recompute activations in the backward pass: a third slower, far less memory

    def layer_dropout(self, layer):
        if isinstance(self.dropout, (int, float)):
            return float(self.dropout)
        bottom, top = self.dropout
        return bottom + (top - bottom) * layer / max(1, self.n_layer - 1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.attention_dropout = layer, config.n_head, config.attention_dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head size)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head size)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head size)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        # F.scaled_dot_product_attention does not look at self.training, so "off" has to be said here
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again: (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.layer_dropout(layer))

    def forward(self, x, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class TiedEmbedding(nn.Embedding):
    """One matrix (V, C) used twice, as GPT-2 has it: a row for every token read, a score for every token to come."""

    def logits(self, hidden):
        return F.linear(hidden, self.weight)  # (..., C) -> (..., V)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = TiedEmbedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.layer_dropout(0))
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # each layer adds two branches to the residual stream: without the scale its variance grows with depth
                scale = 1 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, mean=0.0, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self):
        return self.wpe.weight.device

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the final norm's output (B, T, C). With a cache, ids continue what the cache holds."""
        if ids.size(1) > self.config.block_size:
            raise ValueError(f"{ids.size(1)} tokens do not fit a context of {self.config.block_size}")
        positions = torch.arange(ids.size(1), device=ids.device) if cache is None else cache.positions(ids.size(1))
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        return self.ln_f(x)

    def head(self, hidden):
        """(..., C) -> logits (..., V). Call it only on the positions that need logits: with GPT-2's vocabulary the
        head is a third of the compute of the small model and most of its memory."""
        return self.wte.logits(hidden)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V), at every position."""
        return self.head(self.hidden(ids))

    def resize_vocab(self, vocab_size):
        """Adds rows for new tokens, each the mean of the old ones: a new token starts as an average word, so the
        head gives it a moderate probability where random rows could give it any. Never shrinks."""
        old = self.wte.weight.data
        if vocab_size > old.size(0):
            new = old.mean(dim=0, keepdim=True).expand(vocab_size - old.size(0), -1)
            self.wte = TiedEmbedding.from_pretrained(torch.cat([old, new]), freeze=not self.wte.weight.requires_grad)
            self.config.vocab_size = vocab_size

    # ---- Hugging Face folders --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0, attention_dropout=0.0, checkpointing=False, linear=None):
        """A folder of the GPT-2 family (config.json, model.safetensors) or of an adapter, or gpt2, gpt2-medium, gpt2-large,
        gpt2-xl.

        Weights arrive one by one and as float32. linear: called with each linear layer of the blocks as soon as its
        weights are there; what it returns takes the layer's place (quant.py: at no time all weights are floats).
        Raises UserError where there is no such folder, or a model that is not GPT-2's architecture.
        """
        if lora.is_adapter(name_or_folder):  # an adapter names its base: together, merged, they are a model like any other
            settings = dict(dropout=dropout, attention_dropout=attention_dropout, checkpointing=checkpointing)
            model = lora.load_merged(name_or_folder, lambda base: cls.from_pretrained(base, **settings))
            return model if linear is None else model.replace_linear(linear)
        folder = hub.find(name_or_folder)
        config = GPTConfig(**hub.read_config(folder), dropout=dropout, attention_dropout=attention_dropout,
                           checkpointing=checkpointing)
        with torch.device("meta"):  # shapes only: no memory, no time spent on random numbers
            model = cls(config)
        read = hub.open_weights(folder)
        for path in [path for path, _ in model.named_modules()]:  # paths only: a list of modules would keep replaced ones alive
            module = model.get_submodule(path)
            for name, parameter in list(module.named_parameters(recurse=False)):
                tensor = read(f"{path}.{name}").float()
                # GPT-2 was written with a layer of its own (Conv1D) that keeps its weight as (in, out)
                tensor = tensor.t().contiguous() if isinstance(module, nn.Linear) and name == "weight" else tensor.clone()
                if tensor.shape != parameter.shape:
                    raise UserError(f"{folder}: {path}.{name} has shape {tuple(tensor.shape)}, but config.json says "
                                    f"{tuple(parameter.shape)}: the two files are not of one model")
                setattr(module, name, nn.Parameter(tensor))
            if linear is not None and isinstance(module, nn.Linear):
                model.replace_linear(linear, path)
        return model

    def replace_linear(self, linear, path=None):
        """Puts linear(layer) in the place of the linear layer at `path`, or of every linear layer of the blocks -> self."""
        paths = [path] if path else [path for path, module in self.named_modules() if isinstance(module, nn.Linear)]
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(self.get_submodule(parent), child, linear(self.get_submodule(path)))
        return self

    def save_pretrained(self, folder, extra=None):
        """Writes config.json and model.safetensors, float32, each replaced in one step, as transformers reads them.

        extra: tensors of a head that is not GPT-2's (a reward head), stored under their names in the same file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for path, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                tensor = parameter.detach().cpu().float()
                tensors[f"transformer.{path}.{name}"] = tensor.t() if isinstance(module, nn.Linear) and name == "weight" else tensor
            if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is None:  # transformers has no such option
                size = module.weight.size(0)
                tensors[f"transformer.{path}.bias"] = torch.zeros(size)
        tensors = {name: tensor.contiguous() for name, tensor in (tensors | (extra or {})).items()}
        with trainer.replacing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(self._hugging_face_config(), indent=2) + "\n")
        with trainer.replacing(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    def _hugging_face_config(self):
        c = self.config
        top = c.layer_dropout(c.n_layer - 1)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": c.block_size,
                "vocab_size": c.vocab_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": None,
                "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                "resid_pdrop": top, "embd_pdrop": c.layer_dropout(0), "attn_pdrop": c.attention_dropout,
                "bias": c.bias, "bos_token_id": None, "eos_token_id": None, "dtype": "float32"}


# ---- probabilities and generation ------------------------------------------------------------------------------------

def token_logps(model, ids, mask, temperature=1.0):
    """log p(ids[:, 1:]) where mask[:, 1:] is 1, and 0 elsewhere: (B, T) and (B, T) -> (B, T-1), float32.

    The head runs on the masked positions only. Divide by the temperature that the tokens were sampled with: those are
    the probabilities they had.
    """
    learned = mask[:, 1:].bool()
    hidden, targets = model.hidden(ids[:, :-1])[learned], ids[:, 1:][learned]  # (N, C) and (N,), N = learned.sum()
    logps = torch.cat([-F.cross_entropy(model.head(h).float() / temperature, t, reduction="none")  # log softmax at t
                       for h, t in slices(model, hidden, targets)])  # (N,)
    return torch.zeros(learned.shape, device=ids.device).masked_scatter(learned, logps)


SLICE = 2 ** 23  # logits made at a time: 32 MB


def slices(model, hidden, targets):
    """hidden (N, C), targets (N,) -> pairs of their slices, as long as is good for the head.

    The logits of all positions at once would be the largest tensor of a whole step. A slice of them stays in the processor's
    cache: with GPT-2's vocabulary twice as fast (two CPU cores, forward and backward). Without gradients it is gone when the
    next one is made. With them every slice leaves its probabilities to the backward pass: N * V floats, as without slices.
    """
    n = max(1, SLICE // model.config.vocab_size)
    return zip(hidden.split(n), targets.split(n))


class Cache:
    """Keys and values of every layer for rows of different lengths, and a cursor per row: how much of it is real.

    Prompts are padded on the right. Padding writes rubbish behind a row's cursor; the mask hides it and the row's own
    tokens overwrite it.
    """

    def __init__(self, model, lengths, room):
        c = model.config
        self.cursor, self.room = lengths - 1, room  # (B,): the column of each row's newest token
        self.shape = (c.n_layer, len(lengths), c.n_head, room, c.n_embd // c.n_head)
        self.keys = self.values = self.seen = None

    def positions(self, T):
        if self.keys is None:  # the prompts
            return torch.arange(T, device=self.cursor.device)
        # a row that has finished may still be in the cache: its cursor waits in the last column, harmlessly
        self.cursor = (self.cursor + 1).clamp(max=self.room - 1)
        self.longest = int(self.cursor.max()) + 1
        columns = torch.arange(self.longest, device=self.cursor.device)
        self.seen = (columns <= self.cursor[:, None])[:, None, None, :]  # (B, 1, 1, longest)
        return self.cursor[:, None]  # (B, 1)

    def extend(self, layer, k, v):
        """k, v (B, n_head, T, head size) of the newest tokens -> all keys and values so far, and which of them count."""
        if self.keys is None:
            self.keys, self.values = k.new_zeros(self.shape), v.new_zeros(self.shape)
        if self.seen is None:
            self.keys[layer, :, :, :k.size(2)], self.values[layer, :, :, :k.size(2)] = k, v
            return k, v, None
        rows = torch.arange(len(self.cursor), device=k.device)
        self.keys[layer][rows, :, self.cursor], self.values[layer][rows, :, self.cursor] = k[:, :, 0], v[:, :, 0]
        return self.keys[layer, :, :, :self.longest], self.values[layer, :, :, :self.longest], self.seen

    def keep(self, rows):
        """Forgets all but these rows."""
        self.keys, self.values, self.cursor = self.keys[:, rows], self.values[:, rows], self.cursor[rows]


def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop=None, seed=None):
    """Continues every prompt: list[list[int]] -> list[list[int]], the new tokens only, the stop token included.

    A row ends at its stop token, after max_new_tokens, or at the end of the context; the others go on. temperature 0 is
    greedy. Raises UserError for a prompt that is empty or leaves no room in the context.
    """
    new = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, temperature, top_p, top_k, stop, seed):
        for row, token in tokens:
            new[row].append(token)
    return new


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop=None, seed=None):
    """What `generate` collects, as it comes: yields [(row, token), ...] of the rows that still go on, once per token.

    One prefill of the right-padded prompts, then one forward pass of one position per token. The model is in evaluation
    mode until the last token, or until whoever asked wants no more and closes the generator.
    """
    block_size, device = model.config.block_size, model.device
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
                going_on[row] = n < limits[row] and token != stop
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
        ordered, order = probs.sort(dim=1, descending=True)
        beyond = ordered.cumsum(dim=1) - ordered >= top_p  # what comes before a token already reaches p
        probs = probs.masked_fill(beyond.gather(1, order.argsort(dim=1)), 0.0)
    # inverse of the cumulative distribution: one random number per row where torch.multinomial draws one per token;
    # float64, so that rounding cannot pick a token of probability 0 at the end
    cumulative = probs.double().cumsum(dim=1)
    u = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=torch.float64)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(1)


# ---- pretraining -----------------------------------------------------------------------------------------------------

def next_token_loss(model, ids):
    """-mean log p(ids[:, 1:]) over all positions: ids (B, T) -> scalar. What pretraining minimises."""
    hidden, targets = model.hidden(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()  # (B * (T-1), C) and (B * (T-1),)
    return sum(F.cross_entropy(model.head(h).float(), t, reduction="sum")
               for h, t in slices(model, hidden, targets)) / len(targets)


def text_stream(documents, tok):
    """Documents -> one long row of ids, each document after an end-of-text token (N,)."""
    return torch.tensor([i for text in documents for i in [tok.end_of_text] + tok.encode(tok.template.lead + text)])


def text_windows(stream, rows, length, seed):
    """Random windows of the stream: (rows, length). The same seed gives the same windows."""
    starts = torch.randint(len(stream) - length + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return stream[starts[:, None] + torch.arange(length)]


@torch.inference_mode()
def text_loss(model, stream, run, rows=32):
    """Mean loss per token over a held-out stream, cut into whole contexts."""
    length = min(model.config.block_size + 1, len(stream))
    windows = stream[:len(stream) // length * length].view(-1, length)  # (contexts, length)
    model.eval()
    with run.autocast():
        losses = [next_token_loss(model, part.to(run.device)).item() * len(part) for part in windows.split(rows)]
    model.train()
    return sum(losses) / len(windows)


def save_checkpoint(config, run, step, steps, model, tok, optimizer):
    """A folder that transformers (an adapter: PEFT) and every script here can read, and the state for --resume. The state
    comes first: a folder with a state beside it is known to be unfinished."""
    trainer.save_state(config, run, step, steps, model, optimizer)
    if run.rank == 0:
        save_model(config, model, tok)


def save_model(config, model, tok, extra=None):
    """The folder alone: of the whole model, or of its adapter with the name of its base. extra: tensors of another head."""
    if lora.is_adapted(model):
        lora.save_adapter(model, config.out, config.init, extra)
    else:
        model.save_pretrained(config.out, extra)
    tok.save(config.out)


@dataclass
class Config(TrainConfig):
    data: str = ""  # a text file, or .jsonl with {"text"} rows; empty: the island's plain text
    init: str = ""  # go on from this checkpoint; empty: start from random weights
    out: str = "out/base"  # folder for the checkpoint and log.jsonl
    tokenizer: str = "tiny"  # tiny, gpt2, a rank file or a folder
    steps: int = 600  # optimizer steps
    batch_size: int = 16  # windows of --block-size tokens per optimizer step
    lr: float = 6e-3  # highest learning rate
    warmup: int = 40  # steps in which the learning rate rises from 0
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    block_size: int = 128  # context length
    documents: int = 20000  # documents of the island's plain text


def load_text(config, tok):
    """-> training and held-out token streams."""
    if config.data:
        rows, report = files.load(config.data, "text")
        print(report)
        train, held = files.hold_out(rows, say=print)
        train, held = [row["text"] for row in train], [row["text"] for row in held]
    else:
        train, held = Island().plain_text(config.documents), Island().plain_text(400, seed=9)
    return text_stream(train, tok), text_stream(held, tok)


def main(config):
    run = trainer.start(config)
    tok = get_tokenizer(config.tokenizer or config.init, config.template or None)
    train, held = load_text(config, tok)
    torch.manual_seed(config.seed)
    if config.init:
        model = GPT.from_pretrained(config.init, dropout_of(config), checkpointing=config.checkpointing)
        model.resize_vocab(tok.vocab_size)
    else:
        model = GPT(GPTConfig(config.block_size, tok.vocab_size, config.n_layer, config.n_head, config.n_embd,
                              dropout_of(config), checkpointing=config.checkpointing))
    model.to(run.device).train()
    length = min(model.config.block_size + 1, len(train))
    steps = config.steps or math.ceil(config.epochs * len(train) / (config.batch_size * length))
    run.print(f"pretraining {sum(p.numel() for p in model.parameters()):,} parameters on {len(train):,} tokens")

    optimizer = trainer.adamw(model, config)
    first = trainer.load_state(config, run, steps, model, optimizer)
    log = trainer.Log(config, run, first, steps)
    for step in log.steps():
        trainer.begin_step(step, steps, optimizer, config, run)
        windows = run.share(text_windows(train, config.batch_size, length, seed=config.seed * 1_000_003 + step))
        loss = 0.0
        for ids in windows.split(max(1, config.micro_tokens // length)):
            with run.autocast():
                part = next_token_loss(model, ids.to(run.device)) * len(ids) / config.batch_size
            part.backward()
            loss += part.item()
        log.write(step, loss=run.sum(loss), **trainer.update(model, optimizer, config, run, step))
        if log.due(step, config.eval_every):
            log.write(step, held_out=text_loss(model, held, run))
        if log.due(step, config.save_every):
            save_checkpoint(config, run, step + 1, steps, model, tok, optimizer)
    trainer.finish(config, run, log, lambda: save_checkpoint(config, run, log.next, steps, model, tok, optimizer))
    run.print(f"held-out loss {text_loss(model, held, run):.3f}; the base model is in {config.out}\n"
              f"next: python sft.py --init {config.out}")


if __name__ == "__main__":
    main(parse(Config))
