"""The head and its loss in one: sums of log-probabilities whose logits are gone as soon as they were made.

    sum_i log softmax(hidden_i W^T)_{target_i},    d/dlogits = onehot - softmax,   so
    dL/dhidden_i = W_{target_i} - softmax_i W,     dL/dW = sum_i (onehot_i - softmax_i) hidden_i^T

The gradient of a sum is known as soon as the logits are, but for a factor that all positions share. So both are made
while a slice of logits is in the processor's cache, and nothing of the size positions x vocabulary is ever kept. Logits
are float32; the two products of the gradient, whose factors lie between -1 and 1, are made in the dtype that autocast
asks for. A weight of fewer bits than float32, which is a frozen one, is widened a piece of the vocabulary at a time, so
that no copy of it is ever kept.
"""
import torch

PIECE = 2 ** 21  # numbers of a weight that are widened at a time; 8 MB as float32


def pieces(weight, dtype):
    """Yields (a slice of the vocabulary, those rows of weight (V, C) in dtype): of a weight in that dtype all at once."""
    step = len(weight) if weight.dtype == dtype else max(1, PIECE // weight.size(1))
    for start in range(0, len(weight), step):
        yield slice(start, start + step), weight[start:start + step].to(dtype)


def logits_of(hidden, weight):
    """hidden (n, C) float32, weight (V, C) -> (n, V) float32."""
    out = hidden.new_empty(len(hidden), len(weight))
    for rows, W in pieces(weight, hidden.dtype):
        torch.mm(hidden, W.t(), out=out[:, rows])
    return out


def back(grad, weight, dtype, out):
    """grad (n, V), weight (V, C) -> grad weight (n, C), its products in dtype, in out."""
    total = 0
    for rows, W in pieces(weight, dtype):
        total = total + grad[:, rows].to(dtype) @ W
    return out.copy_(total)


class Logits(torch.autograd.Function):
    """hidden (n, C) float32, a frozen weight (V, C) of fewer bits -> (n, V) float32."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.weight = weight
        return logits_of(hidden, weight)

    @staticmethod
    def backward(ctx, grad):
        return back(grad, ctx.weight, grad.dtype, grad.new_empty(len(grad), ctx.weight.size(1))), None


class SummedLogps(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N,), rows: positions at a time, dtype of the products -> scalar."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, dtype):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        for start in range(0, len(hidden), rows):
            h, t = hidden[start:start + rows], targets[start:start + rows, None]  # (n, C) and (n, 1)
            logits = logits_of(h.to(total.dtype), weight)  # (n, V)
            logits -= logits.logsumexp(dim=1, keepdim=True)  # log softmax
            total += logits.gather(1, t).sum()
            if need_hidden or need_weight:
                gradient = logits.exp_().neg_()
                gradient.scatter_add_(1, t, torch.ones_like(t, dtype=gradient.dtype))  # onehot - softmax
                gradient = gradient.to(dtype)
            if need_hidden:
                back(gradient, weight, dtype, grad_hidden[start:start + rows])
            if need_weight:
                grad_weight += gradient.t() @ h.to(dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return *(None if grad is None else grad * upstream for grad in ctx.saved_tensors), None, None, None


def summed_logps(hidden, weight, targets, rows):
    """-> scalar float32, sum of log softmax(hidden weight^T) at the targets. rows: positions at a time."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        return SummedLogps.apply(hidden, weight, targets, rows, dtype)
