"""Lesson 7: preferences without a reward model."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dpo
from common.errors import UserError
from course.exercise import Exercise

# ---- the log-probability of an answer --------------------------------------------------------------------------------

def of_logits(logits, ids, mask):
    """dpo.answer_logps of a model that has these logits."""
    model = SimpleNamespace(hidden=lambda ids: logits[:, :-1], head=lambda hidden: hidden,
                            config=SimpleNamespace(vocab_size=logits.size(2)))
    return dpo_answer_logps(model, ids, mask)


def logps_at(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def answer_logps_cases(draw):
    def case(B, T, V):
        return [draw(B, T, V), draw.ints(V, B, T), draw.response(B, T).long()]

    return [case(1, 3, 2), case(2, 5, 3), case(3, 8, 6)]


def put_answer_logps(f):
    def full(model, ids, mask, average=False):
        if average:
            raise UserError("answer_logps as you wrote it is the sum, but --loss ipo takes the average: leave it out")
        logits = model.head(model.hidden(ids[:, :-1]))
        return f(F.pad(logits, (0, 0, 0, 1)), ids, mask)

    return {"dpo.answer_logps": full}


dpo_answer_logps = dpo.answer_logps
answer_logps = Exercise(
    '''
def answer_logps(logits, ids, mask):
    """The log-probability of each answer: the sum over its tokens (Rafailov et al. 2023, section 4).

    logits (B, T, V) of a model that has read ids (B, T); mask (B, T): 1 where a token is part of the answer -> (B,).

        log p(answer | question) = sum_t mask_t log softmax(logits_{t-1})[ids_t]

    Hint: position t predicts token t + 1, so the last logits and the first token are of no use.
    """
''',
    reference=of_logits, cases=answer_logps_cases, grads=(0,), shows=(dpo.answer_logps,),
    wrongs={
        "nothing is shifted: the logits of a token that was read already are asked for that token":
            lambda x, ids, m: (logps_at(x, ids) * m).sum(1),
        "the mask is not shifted along with the tokens":
            lambda x, ids, m: (logps_at(x[:, :-1], ids[:, 1:]) * m[:, :-1]).sum(1),
        "the mask is left out: question and padding count": lambda x, ids, m: logps_at(x[:, :-1], ids[:, 1:]).sum(1),
        "the average is taken and not the sum: that is for IPO":
            lambda x, ids, m: (logps_at(x[:, :-1], ids[:, 1:]) * m[:, 1:]).sum(1) / m[:, 1:].sum(1),
        "the logits are added up without softmax":
            lambda x, ids, m: (x[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1) * m[:, 1:]).sum(1),
        "probabilities are added up and not their logarithms":
            lambda x, ids, m: (logps_at(x[:, :-1], ids[:, 1:]).exp() * m[:, 1:]).sum(1),
        "the sign is that of a loss": lambda x, ids, m: -(logps_at(x[:, :-1], ids[:, 1:]) * m[:, 1:]).sum(1),
    },
    put=put_answer_logps, needs={"loss": ("sigmoid", "hinge", "robust")}, scripts=("dpo.py",), tests="tests/test_dpo.py")


# ---- DPO -------------------------------------------------------------------------------------------------------------

def four(draw):
    # of answers: a nat or two from the reference; the last pair is far on the wrong side
    extreme = [torch.tensor([-900.0, -5.0]), torch.tensor([-5.0, -6.0]), torch.tensor([-5.0, -7.0]), torch.tensor([-900.0, -5.0])]
    return [[*draw.several(4, 1), 0.5], [*draw.several(4, 3), 0.3], [*(3 * draw(8) - 9 for _ in range(4)), 0.1],
            [*extreme, 0.5]]


def h_of(pw, pl, rw, rl):
    return (pw - rw.detach()) - (pl - rl.detach())


SETTINGS = {"loss": "sigmoid", "label_smoothing": 0.0}


def put_preference(f, name, loss="sigmoid"):
    """f of the four log-probabilities and beta -> what takes the place of dpo_loss, rewards included."""
    def full(pw, pl, rw, rl, beta=0.1, label_smoothing=0.0, loss="sigmoid"):
        if loss != wanted or label_smoothing:
            raise UserError(f"{name} as you wrote it is --loss {wanted} without --label-smoothing")
        rw, rl = rw.detach(), rl.detach()
        return f(pw, pl, rw, rl, beta), beta * (pw - rw).detach(), beta * (pl - rl).detach()

    wanted = loss
    return {"dpo.dpo_loss": full}


ours = dpo.dpo_loss
dpo_loss = Exercise(
    '''
def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Direct preference optimization (Rafailov et al. 2023, equation 7).

    Log-probabilities of whole answers, four times (B,); beta a number -> scalar, the mean over the pairs.

        L = -mean log sigmoid( beta [ (log pi(w) - log pi_ref(w)) - (log pi(l) - log pi_ref(l)) ] )

    w is the chosen answer, l the rejected one. The reference is frozen.

    Hint: F.logsigmoid stays finite where log(sigmoid(x)) is log 0. Where policy and reference are equal, L = log 2.
    """
''',
    reference=lambda *x: ours(*x)[0], cases=four, grads=(0, 1), shows=(ours,),
    wrongs={
        "the reference is forgotten: the second half of Rafailov's equation 7":
            lambda pw, pl, rw, rl, beta: -F.logsigmoid(beta * (pw - pl)).mean(),
        "chosen and rejected are exchanged: it learns what was voted down":
            lambda *x: -F.logsigmoid(-x[4] * h_of(*x[:4])).mean(),
        "beta is forgotten": lambda *x: -F.logsigmoid(h_of(*x[:4])).mean(),
        "beta stands outside of the sigmoid": lambda *x: -x[4] * F.logsigmoid(h_of(*x[:4])).mean(),
        "it divides by beta": lambda *x: -F.logsigmoid(h_of(*x[:4]) / x[4]).mean(),
        "the reference's log-ratio is added and not subtracted":
            lambda pw, pl, rw, rl, beta: -F.logsigmoid(beta * ((pw - pl) + (rw - rl))).mean(),
        "the losses are added up and not averaged": lambda *x: -F.logsigmoid(x[4] * h_of(*x[:4])).sum(),
        "the minus is missing": lambda *x: F.logsigmoid(x[4] * h_of(*x[:4])).mean(),
        "the logarithm is taken of a sigmoid that was rounded to 0: use F.logsigmoid":
            lambda *x: -torch.sigmoid(x[4] * h_of(*x[:4])).log().mean(),
        "the mean is taken before the sigmoid: pairs cancel each other":
            lambda *x: -F.logsigmoid(x[4] * h_of(*x[:4]).mean()),
    },
    put=lambda f: put_preference(f, "dpo_loss"), needs=SETTINGS, scripts=("dpo.py",), tests="tests/test_dpo.py")


@torch.enable_grad()  # within ByHand.forward it is off
def by_autograd(pw, pl, rw, rl, beta):
    pw, pl = pw.clone().requires_grad_(), pl.clone().requires_grad_()
    return torch.autograd.grad(ours(pw, pl, rw, rl, beta)[0], (pw, pl))


def gradient_shown(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    weight = beta * torch.sigmoid(-beta * h) / len(h)  # large where the implicit rewards rank the pair wrongly
    return -weight, weight


def both(weight):
    return -weight, weight


class ByHand(torch.autograd.Function):
    """dpo_loss whose gradient is what a function says."""

    @staticmethod
    def forward(ctx, f, pw, pl, rw, rl, beta):
        ctx.made = f(pw.detach(), pl.detach(), rw.detach(), rl.detach(), beta)
        return ours(pw, pl, rw, rl, beta)[0]

    @staticmethod
    def backward(ctx, upstream):
        return None, *(upstream * made for made in ctx.made), None, None, None


dpo_gradient = Exercise(
    '''
def dpo_gradient(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """The gradient of dpo_loss by hand, without autograd (Rafailov et al. 2023, the equation after 7).

    Four times (B,), beta a number -> dL/d policy_chosen_logps (B,), dL/d policy_rejected_logps (B,), L the mean over B.

        h = (log pi(w) - log pi_ref(w)) - (log pi(l) - log pi_ref(l)),      L = -mean log sigmoid(beta h)

    Hint: the derivative of log sigmoid(x) is sigmoid(-x). At the start, where h = 0, one pair has -beta/2 and beta/2.
    """
''',
    reference=by_autograd, cases=four, shows=(gradient_shown,),
    wrongs={
        "the weight is sigmoid(beta h) and not sigmoid(-beta h): pairs that are right already weigh most":
            lambda *x: both(x[4] * torch.sigmoid(x[4] * h_of(*x[:4])) / len(x[0])),
        "the mean is forgotten: the gradient is not divided by B":
            lambda *x: both(x[4] * torch.sigmoid(-x[4] * h_of(*x[:4]))),
        "beta before the sigmoid is forgotten: the inner derivative":
            lambda *x: both(torch.sigmoid(-x[4] * h_of(*x[:4])) / len(x[0])),
        "the signs are exchanged: a step would go uphill": lambda *x: gradient_shown(*x)[::-1],
        "both answers are pushed the same way": lambda *x: (gradient_shown(*x)[0], gradient_shown(*x)[0]),
        "the reference is forgotten": lambda pw, pl, rw, rl, beta: gradient_shown(pw, pl, 0 * rw, 0 * rl, beta),
        "the weight is 1: every pair pushes alike, however well it is ranked":
            lambda *x: both(torch.full_like(x[0], x[4] / len(x[0]))),
    },
    put=lambda f: put_preference(lambda *x: ByHand.apply(f, *x), "dpo_gradient"), needs=SETTINGS, scripts=("dpo.py",),
    tests="tests/test_dpo.py")


ipo_loss = Exercise(
    '''
def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """IPO asks for a fixed distance and no more, so that certain votes cannot drive it to infinity (Azar et al. 2023,
    equation 17, with beta for its tau).

    Log-probabilities of answers, averaged over their tokens, four times (B,); beta a number -> scalar, the mean over B.

        L = mean ( h - 1 / (2 beta) )^2,      h = (log pi(w) - log pi_ref(w)) - (log pi(l) - log pi_ref(l))

    Hint: beta does not multiply h here.
    """
''',
    reference=lambda pw, pl, rw, rl, beta: ours(pw, pl, rw, rl, beta, loss="ipo")[0],
    cases=lambda draw: four(draw)[:3], grads=(0, 1), shows=(ours,),
    wrongs={
        "the target is 1/beta and not half of it": lambda *x: ((h_of(*x[:4]) - 1 / x[4]) ** 2).mean(),
        "the target is beta/2": lambda *x: ((h_of(*x[:4]) - x[4] / 2) ** 2).mean(),
        "h is multiplied by beta, as in DPO": lambda *x: ((x[4] * h_of(*x[:4]) - 1 / (2 * x[4])) ** 2).mean(),
        "chosen and rejected are exchanged": lambda *x: ((-h_of(*x[:4]) - 1 / (2 * x[4])) ** 2).mean(),
        "the reference is forgotten": lambda pw, pl, rw, rl, beta: ((pw - pl - 1 / (2 * beta)) ** 2).mean(),
        "the losses are added up and not averaged": lambda *x: ((h_of(*x[:4]) - 1 / (2 * x[4])) ** 2).sum(),
        "a distance beyond the target costs nothing: that is a hinge":
            lambda *x: (F.relu(1 / (2 * x[4]) - h_of(*x[:4])) ** 2).mean(),
    },
    put=lambda f: put_preference(f, "ipo_loss", "ipo"), needs={"loss": "ipo", "label_smoothing": 0.0}, scripts=("dpo.py",),
    tests="tests/test_dpo.py")


# ---- the optimal policy ----------------------------------------------------------------------------------------------

def optimal_shown(ref_logps, rewards, beta):
    tilted = ref_logps + rewards / beta
    return tilted - tilted.logsumexp(dim=0)  # logsumexp is log Z


optimal_policy = Exercise(
    '''
def optimal_policy(ref_logps, rewards, beta):
    """The policy that maximises E[r] - beta KL(pi || pi_ref), where all answers can be listed (Rafailov et al. 2023,
    equation 4).

    ref_logps (A,): log pi_ref of all A answers to a question, whose probabilities add up to 1; rewards (A,); beta a
    number -> (A,): log pi* of each.

        pi*(y) = pi_ref(y) exp(r(y) / beta) / Z,      Z = sum_y pi_ref(y) exp(r(y) / beta)

    Hint: in logarithms, or exp(r / beta) overflows. The same reward for all answers changes nothing.
    """
''',
    reference=lambda ref, r, beta: torch.log_softmax(ref + r / beta, dim=0), grads=(0, 1), shows=(optimal_shown,),
    cases=lambda draw: [[draw(2).log_softmax(0), draw(2), 0.5], [draw(5).log_softmax(0), draw(5), 0.3],
                        [draw(4).log_softmax(0), torch.tensor([100.0, 99.0, 98.0, 100.0]), 0.1]],
    wrongs={
        "nothing is divided by Z: the probabilities do not add up to 1": lambda ref, r, beta: ref + r / beta,
        "the reward is multiplied by beta: a high price of leaving pi_ref would drive away from it":
            lambda ref, r, beta: torch.log_softmax(ref + r * beta, 0),
        "the reference is forgotten: a softmax of the rewards": lambda ref, r, beta: torch.log_softmax(r / beta, 0),
        "exp(r / beta) overflows: stay in logarithms": lambda ref, r, beta: (
            ref.exp() * (r / beta).exp() / (ref.exp() * (r / beta).exp()).sum()).log(),
        "probabilities are returned and not their logarithms": lambda ref, r, beta: torch.softmax(ref + r / beta, 0),
        "ref_logps are taken for probabilities": lambda ref, r, beta: torch.log_softmax(ref.abs().log() + r / beta, 0),
        "the sign of the reward is turned around": lambda ref, r, beta: torch.log_softmax(ref - r / beta, 0),
    })

EXERCISES = [answer_logps, dpo_loss, dpo_gradient, ipo_loss, optimal_policy]
