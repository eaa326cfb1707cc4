"""Lessons 2 and 3: what is learned of a conversation, the loss on it, and a step of the optimizer."""
import math

import torch

import trainer
from common.errors import UserError
from course.exercise import Exercise
from data.tokenizer import Tokenizer, get_tokenizer
from model import token_logps
from sft import masked_loss as ours
from sft import sft_step

TOK = get_tokenizer("tiny", "chat")
START, END = TOK.end_of_text, TOK.end
HEADERS = {role: TOK.special[TOK.template.headers[role]] for role in ("system", "user", "assistant")}

# ---- the mask --------------------------------------------------------------------------------------------------------

def rendered(messages, headers, start, end):
    lead = len(TOK.template.lead)
    return TOK.render([{"role": role, "content": TOK.decode(ids)[lead:]} for role, ids in messages])


def conversations(draw):
    def text(words):
        return TOK.encode(f" {words}")

    asked, told = ["user", text("Who is Mabel?")], ["assistant", text("Mabel is a fox.")]
    more = [["user", text("What does she like to eat?")], ["assistant", text("She eats corn soup.")]]
    rules = ["system", text("Answer in one or two words.")]
    number = ["user", text(f"Is it {int(draw.ints(900, 1))}?")]
    return [[messages, HEADERS, START, END]
            for messages in ([asked, told], [rules, asked, told, *more], [number, told, asked, told], [asked, told, number])]


def mask_by(messages, headers, start, end, role="assistant", header=False, closing=True, only_last=False, text=True):
    """What a renderer gives that learns these parts of the messages."""
    ids, mask = [start], [0]
    last = max(i for i, (who, _) in enumerate(messages) if who == "assistant")
    for i, (who, words) in enumerate(messages):
        learned = int((role is None or who == role) and not (only_last and i != last))
        ids += [headers[who], *words, end]
        mask += [learned * header, *[learned * text] * len(words), learned * closing]
    return ids, [int(m) for m in mask]


def put_conversation_mask(f):
    def render(self, messages):
        if self.template_name not in ("chat", "search") or any(m["role"] in ("search", "result") for m in messages):
            raise UserError("conversation_mask as you wrote it knows the template chat and no searches: leave out "
                            "--template and --with search")
        if any("loss_weight" in m for m in messages):
            raise UserError("conversation_mask as you wrote it has no loss_weight: use rows without it")
        headers = {role: self.special[self.template.headers[role]] for role in ("system", "user", "assistant")}
        known = [[m["role"], self.encode(self.template.lead + m["content"])] for m in messages]
        ids, mask = f(known, headers, self.end_of_text, self.special["<|end|>"])
        return list(map(int, ids)), list(map(int, mask))

    return {"data.tokenizer.Tokenizer.render": render}


conversation_mask = Exercise(
    '''
def conversation_mask(messages, headers, start, end):
    """A conversation as ids, and which of them the model must learn to produce.

    messages: [[role, ids of its text], ...]; headers: {role: id}; start, end: ids.
    -> (ids, mask), two lists of the same length. ids: start, then for every message its header, its text and end.

        mask[i] = 1 where the assistant must produce ids[i], else 0      (Touvron et al. 2023, Llama 2, section 3.1)

    Hint: who writes the header, and who writes the end token of an answer? A model that never learns to end never ends.
    """
''',
    reference=rendered, cases=conversations, doubles=False, shows=(Tokenizer.render,),
    wrongs={
        "the end token of an answer is not learned: such a model never stops": lambda *x: mask_by(*x, closing=False),
        "the header before an answer is learned too: the program writes it, not the model":
            lambda *x: mask_by(*x, header=True),
        "everybody's words are learned: the model imitates the user": lambda *x: mask_by(*x, role=None),
        "the user's words are learned and the assistant's are not": lambda *x: mask_by(*x, role="user"),
        "only the last answer is learned: the earlier ones are as good": lambda *x: mask_by(*x, only_last=True),
        "only the end token is learned": lambda *x: mask_by(*x, text=False),
        "the mask is shifted by one already: that is for the loss to do, once":
            lambda *x: (mask_by(*x)[0], mask_by(*x)[1][1:] + [0]),
        "every token is learned: that is pretraining": lambda *x: (mask_by(*x)[0], [1] * len(mask_by(*x)[0])),
    },
    put=put_conversation_mask, scripts=("sft.py",), tests="tests/test_tokenizer.py")


# ---- the loss --------------------------------------------------------------------------------------------------------

def masked_loss_cases(draw):
    def case(B, T, V, mask):
        return [draw(B, T, V), draw.ints(V, B, T), mask]

    return [case(1, 2, 2, torch.tensor([[0.0, 1.0]])), case(2, 4, 3, torch.tensor([[0.0, 1, 1, 1], [0, 1, 0, 0]])),
            case(3, 6, 5, draw.response(3, 6)), case(1, 3, 4, torch.zeros(1, 3))]


def nll_of(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)  # (B, T)


def rowwise(logits, targets, mask):
    return ((nll_of(logits, targets) * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def put_masked_loss(f):
    def full(logits, targets, mask=None, n=None):
        mask = torch.ones_like(targets) if mask is None else mask
        if logits.dim() == 2:
            logits, targets, mask = logits[None], targets[None], mask[None]
        return f(logits.float(), targets, mask) * (1 if n is None else mask.sum().clamp(min=1) / n)

    def model_loss(model, ids, mask, n=None):
        return full(model(ids[:, :-1]), ids[:, 1:], mask[:, 1:], n)

    return {"sft.masked_loss": full, "sft.sft_loss": model_loss}


masked_loss = Exercise(
    '''
def masked_loss(logits, targets, mask):
    """The loss of supervised fine-tuning: cross-entropy where the assistant speaks (Ouyang et al. 2022, section 3.5).

    logits (B, T, V), targets (B, T) ids, mask (B, T) of 0 and 1 -> scalar. targets[b, t] is what logits[b, t] predicts:
    the shift by one is done already. Where the mask is all 0 the loss is 0, not 0 / 0.

        L = - sum_t m_t log p(target_t) / sum_t m_t,      both sums over the whole batch

    Hint: F.cross_entropy(..., reduction="none") takes (N, V) and (N,).
    """
''',
    reference=ours, cases=masked_loss_cases, grads=(0,), doubles=False,
    wrongs={
        "the mask is left out: prompt and padding are learned": lambda x, t, m: nll_of(x, t).mean(),
        "the sum is divided by all positions, the masked ones included":
            lambda x, t, m: (nll_of(x, t) * m).sum() / m.numel(),
        "the means of the rows are averaged: a token of a short answer counts more": rowwise,
        "the losses are added up and not averaged": lambda x, t, m: (nll_of(x, t) * m).sum(),
        "a batch without a supervised token is 0 / 0": lambda x, t, m: (nll_of(x, t) * m).sum() / m.sum(),
        "the targets are shifted once more": lambda x, t, m: ours(x[:, :-1], t[:, 1:], m[:, 1:]),
        "the mask is turned around: the prompt is learned": lambda x, t, m: ours(x, t, 1 - m),
    },
    put=put_masked_loss, scripts=("sft.py",), tests="tests/test_sft.py")


# ---- accumulation ----------------------------------------------------------------------------------------------------

def accumulate_shown(micro_batches):
    n = max(1, sum(mask.sum() for _, mask in micro_batches))  # of the whole step, before the first backward pass
    return [(nll * mask).sum() / n for nll, mask in micro_batches]


def accumulate_cases(draw):
    def case(*shapes):
        return [[[draw(B, T).abs(), draw.response(B, T)] for B, T in shapes]]

    empty = case((1, 3), (2, 4))
    empty[0].append([draw(1, 2).abs(), torch.zeros(1, 2)])
    return [case((1, 3)), case((1, 3), (1, 6)), case((2, 5), (3, 4), (1, 9)), empty]


def each(micro_batches, divisor):
    """divisor: nll, mask, all micro-batches -> what the masked sum of one is divided by."""
    return [(nll * mask).sum() / divisor(nll, mask, micro_batches) for nll, mask in micro_batches]


def put_accumulate(f):
    def step(model, examples, config, run):
        batches = trainer.micro_batches(run.share(examples), config.micro_tokens, run.device)
        with run.autocast():
            losses = f([[-token_logps(model, ids, mask), mask[:, 1:].float()] for ids, mask in batches])
        learned, all = (sum(sum(mask[1:]) for _, mask in rows) for rows in (run.share(examples), examples))
        loss = sum(losses) * learned / max(1, all)  # of several processes each knows its own rows only
        loss.backward()
        return loss.item()

    return {"sft.sft_step": step}


accumulate = Exercise(
    '''
def accumulate(micro_batches):
    """A batch that is too large for memory goes through in parts, whose gradients add up to that of the whole.

    micro_batches: [[nll, mask], ...], nll (B, T) the loss of every token, mask (B, T) of 0 and 1, of other shapes in
    every part -> a list of scalars, one for each part. Their sum is the mean over all supervised tokens of all parts:

        L = sum_parts sum_t m_t nll_t / n,      n = sum_parts sum_t m_t

    A part without a supervised token gives 0.

    Hint: what does each part have to be divided by, so that nothing depends on how the batch was cut?
    """
''',
    reference=accumulate_shown, cases=accumulate_cases, grads=(0,), shows=(sft_step, ours),
    wrongs={
        "every part is averaged by itself and the means are averaged: tokens of a small part count more":
            lambda parts: each(parts, lambda nll, m, all: m.sum().clamp(min=1) * len(all)),
        "the means of the parts are added up: the gradient grows with the number of parts":
            lambda parts: each(parts, lambda nll, m, all: m.sum().clamp(min=1)),
        "every part is averaged by itself, and one without a supervised token is 0 / 0: a single one spoils the step":
            lambda parts: each(parts, lambda nll, m, all: m.sum() * len(all)),
        "the divisor counts all positions, the masked ones included":
            lambda parts: each(parts, lambda nll, m, all: sum(mask.numel() for _, mask in all)),
        "nothing is divided: the gradient grows with the number of tokens":
            lambda parts: each(parts, lambda nll, m, all: 1),
        "every part is divided by the supervised tokens of all, and then by the number of parts too":
            lambda parts: each(parts, lambda nll, m, all: sum(mask.sum() for _, mask in all) * len(all)),
    },
    put=put_accumulate, scripts=("sft.py",), tests="tests/test_sft.py")


# ---- the learning rate -----------------------------------------------------------------------------------------------

def of_config(step, steps, warmup, lr, min_lr):
    config = trainer.TrainConfig(warmup=warmup, lr=lr, min_lr=min_lr, schedule="cosine")
    return trainer.learning_rate(step, steps, config)


def schedule(step, steps, warmup, lr, min_lr, rise=None, progress=None, floor=None, shape=None):
    if step < warmup:
        return lr * ((step + 1) / (warmup + 1) if rise is None else rise(step, warmup))
    x = (step - warmup) / max(1, steps - 1 - warmup) if progress is None else progress(step, steps, warmup)
    shape = 0.5 * (1 + math.cos(math.pi * x)) if shape is None else shape(x)
    return lr * (min_lr + (1 - min_lr) * shape) if floor is None else floor(lr, min_lr, shape)


ours_rate = trainer.learning_rate


def put_lr_schedule(f):
    def full(step, steps, config):
        if config.schedule != "cosine":
            return ours_rate(step, steps, config)
        return f(step, steps, config.warmup, config.lr, config.min_lr)

    return {"trainer.learning_rate": full}


lr_schedule = Exercise(
    '''
def lr_schedule(step, steps, warmup, lr, min_lr):
    """The learning rate of a step: a linear rise, then a half cosine down (Loshchilov and Hutter 2017, equation 5).

    step from 0 to steps - 1; warmup: steps of the rise; lr: the highest rate; min_lr: the last rate as a share of lr.
    -> a number.

        step < warmup:  lr (step + 1) / (warmup + 1)
        later:          lr ( min_lr + (1 - min_lr) (1 + cos(pi x)) / 2 ),   x = 0 at step warmup, 1 at the last step

    Hint: the last step is steps - 1. Where it is warmup itself, x is 0, not 0 / 0.
    """
''',
    reference=of_config, doubles=False, shows=(trainer.learning_rate,),
    cases=lambda draw: [[step, steps, warmup, 0.01, 0.1] for step, steps, warmup in (
        (0, 10, 4), (3, 10, 4), (4, 10, 4), (7, 10, 4), (9, 10, 4), (0, 5, 0), (2, 3, 2), (10 + int(draw.ints(80, 1)), 100, 10))],
    wrongs={
        "the first step has the rate 0 and is lost: step / warmup": lambda *x: schedule(*x, rise=lambda s, w: s / w),
        "there is no rise: the first steps have the highest rate": lambda *x: schedule(*x, rise=lambda s, w: 1.0),
        "the fall is counted from step 0 and not from the end of the rise":
            lambda *x: schedule(*x, progress=lambda s, n, w: s / max(1, n - 1)),
        "the last step has not arrived: steps in place of steps - 1":
            lambda *x: schedule(*x, progress=lambda s, n, w: (s - w) / max(1, n - w)),
        "it falls to 0 and not to min_lr * lr": lambda *x: schedule(*x, floor=lambda lr, least, shape: lr * shape),
        "min_lr is taken as a rate and not as a share of lr":
            lambda *x: schedule(*x, floor=lambda lr, least, shape: least + (lr - least) * shape),
        "the fall is a straight line and no cosine": lambda *x: schedule(*x, shape=lambda x: 1 - x),
        "the cosine goes down and up again: a whole period": lambda *x: schedule(
            *x, shape=lambda x: 0.5 * (1 + math.cos(2 * math.pi * x))),
    },
    put=put_lr_schedule, needs={"schedule": "cosine"}, scripts=("sft.py", "reward.py", "dpo.py", "ppo.py", "pretrain.py"),
    tests="tests/test_trainer.py")


# ---- AdamW -----------------------------------------------------------------------------------------------------------

def adamw_shown(p, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad ** 2
    m_hat, v_hat = m / (1 - beta1 ** t), v / (1 - beta2 ** t)  # both began at 0
    return p - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p), m, v


def of_torch(p, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    optimizer.state[p] = {"step": torch.tensor(t - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    p.grad = grad
    optimizer.step()
    return p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]


def adamw_cases(draw):
    def case(t, *shape, scale=1.0, eps=1e-8):
        p, grad, m, v = (scale * x for x in draw.several(4, *shape))
        return [p, grad, m * (t > 1), scale * v.abs() * scale * (t > 1), t, 0.02, 0.9, 0.95, eps, 0.5]

    return [case(1, 1), case(1, 2, 3), case(4, 3, 2), case(2, 5, scale=1e-2, eps=1e-3)]


def adam_by(p, grad, m, v, t, lr, beta1, beta2, eps, decay, l2=False, bias=True, under=False, late=False, plain=False):
    grad = grad + decay * p if l2 else grad
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * (grad.abs() if plain else grad ** 2)
    c1, c2 = (1 - beta1 ** (t + late), 1 - beta2 ** (t + late)) if bias else (1, 1)
    root = (v / c2 + eps).sqrt() if under else (v / c2).sqrt() + eps
    return p - lr * (m / c1 / root + (0 if l2 else decay * p)), m, v


class StepBy(torch.optim.AdamW):
    """torch's optimizer with another step."""

    def __init__(self, groups, function, **settings):
        super().__init__(groups, **settings)
        self.function = function

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                new = self.function(p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], int(state["step"]),
                                    group["lr"], *group["betas"], group["eps"], group["weight_decay"])
                for old, now in zip((p, state["exp_avg"], state["exp_avg_sq"]), new, strict=True):
                    old.copy_(now)


def put_adamw(f):
    def made(model, config):
        groups = ours_adamw(model, config).param_groups
        return StepBy(groups, f, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)

    return {"trainer.adamw": made}


ours_adamw = trainer.adamw
adamw_step = Exercise(
    '''
def adamw_step(p, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """One step of AdamW (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2).

    p, grad, m, v: the weights, their gradient, its running mean and that of its square, all of one shape; t: the number
    of this step, 1 is the first; the rest are numbers -> the new p, m, v, as new tensors.

        m <- beta1 m + (1 - beta1) grad             m^ = m / (1 - beta1^t)
        v <- beta2 v + (1 - beta2) grad^2           v^ = v / (1 - beta2^t)
        p <- p - lr ( m^ / (sqrt(v^) + eps) + weight_decay p )

    Hint: m^ and v^ are only used, m and v are what is kept. weight_decay never touches grad.
    """
''',
    reference=of_torch, cases=adamw_cases, shows=(adamw_shown,),
    wrongs={
        "weight decay is added to the gradient: that is Adam with L2, which decays weights of large gradients less":
            lambda *x: adam_by(*x, l2=True),
        "the bias correction is missing: the first steps have the wrong size": lambda *x: adam_by(*x, bias=False),
        "eps stands under the root": lambda *x: adam_by(*x, under=True),
        "steps are counted from 2: t is 1 at the first": lambda *x: adam_by(*x, late=True),
        "there is no weight decay": lambda *x: adam_by(*x[:9], 0.0),
        "weight decay is not multiplied by the learning rate": lambda *x: (
            adam_by(*x[:9], 0.0)[0] - x[9] * x[0], *adam_by(*x)[1:]),
        "v is the mean of the gradient's size and not of its square": lambda *x: adam_by(*x, plain=True),
        "beta1 and beta2 are exchanged": lambda p, g, m, v, t, lr, b1, b2, *x: adam_by(p, g, m, v, t, lr, b2, b1, *x),
        "the corrected m and v are kept: the next step corrects them again": lambda *x: (
            adam_by(*x)[0], adam_by(*x)[1] / (1 - x[6] ** x[4]), adam_by(*x)[2] / (1 - x[7] ** x[4])),
    },
    put=put_adamw, scripts=("sft.py", "reward.py", "dpo.py", "ppo.py"), tests="tests/test_trainer.py")

EXERCISES = [conversation_mask, masked_loss, accumulate, lr_schedule, adamw_step]
