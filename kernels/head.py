"""The head and its loss in one: sums of log-probabilities whose logits are gone as soon as they were made.

    sum_i log softmax(hidden_i W^T)_{target_i},    d/dlogits = onehot - softmax,   so
    dL/dhidden_i = W_{target_i} - softmax_i W,     dL/dW = sum_i (onehot_i - softmax_i) hidden_i^T

The gradient of a sum is known as soon as the logits are, but for a factor that all positions share. So both are made
while a slice of logits is in the processor's cache, and nothing of the size positions x vocabulary is ever kept. Logits
are float32; the two products of the gradient, whose factors lie between -1 and 1, are made in the dtype that autocast
asks for.
"""
import torch


class SummedLogps(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N,), rows: positions at a time, dtype of the products -> scalar."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, dtype):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = weight.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        cheap = weight.to(dtype) if need_hidden else None  # (V, C)
        for start in range(0, len(hidden), rows):
            h, t = hidden[start:start + rows], targets[start:start + rows, None]  # (n, C) and (n, 1)
            logits = h.to(weight.dtype) @ weight.t()  # (n, V)
            logits -= logits.logsumexp(dim=1, keepdim=True)  # log softmax
            total += logits.gather(1, t).sum()
            if need_hidden or need_weight:
                gradient = logits.exp_().neg_()
                gradient.scatter_add_(1, t, torch.ones_like(t, dtype=gradient.dtype))  # onehot - softmax
                gradient = gradient.to(dtype)
            if need_hidden:
                grad_hidden[start:start + rows] = gradient @ cheap
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
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        return SummedLogps.apply(hidden, weight, targets, rows, dtype)
