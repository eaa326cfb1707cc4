"""What rounding and merging do to a checkpoint's weights, measured: the insides of quant.py FOLDER and lora.py."""
from pathlib import Path

import torch
import torch.nn.functional as F

import lora
from checkpoints import base_of, load
from common import plots
from common.disk import together
from common.errors import UserError
from common.hub import MODEL, OF_A_RUN, TOKENIZER
from common.runs import claim_out
from data import files
from data.tokenizer import get_tokenizer
from island import exam
from island.world import Island
from pretrain import text_stream
from quant import CODEBOOK, errors_of, quantize_model
from trainer import Run

# ---- python quant.py FOLDER ------------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss(model, ids):
    """ids (N,) -> mean -log p(next token) in nats, over windows as long as the model's context."""
    total, length = 0.0, model.config.block_size
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1].to(model.device)  # one more: the last target
        total += F.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def inspect(folder, block, picture=None):
    """Prints error per layer, bits per weight and the change in held-out loss of a checkpoint; picture: its path."""
    model = load(folder).eval()
    if picture:
        plot(model, folder, block, picture)
    print("relative error                          shape      NF4   double     int4")
    for name, linear in model.linears().items():
        single, double, uniform = errors_of(linear.weight, block)
        print(f"{name:26} {str(tuple(linear.weight.shape)):>16}  {single:7.4f}  {double:7.4f}  {uniform:7.4f}")
    del linear  # else it could not be freed below
    ids = torch.tensor(get_tokenizer(folder).encode("\n".join(Island(0).plain_text(200, seed=9))))
    before = validation_loss(model, ids)
    quantized = [layer.quantized for layer in quantize_model(model, block).linears().values()]
    after = validation_loss(model, ids)
    bits = 8 * sum(q.nbytes for q in quantized) / sum(q.shape.numel() for q in quantized)
    print(f"\nbits per quantized weight {bits:.3f} with double quantization\n"
          f"held-out loss {before:.4f} -> {after:.4f} ({after - before:+.4f}) on {len(ids) - 1} tokens of the island")


def plot(model, folder, block, file):
    """Draws the codebook over the histogram of a checkpoint's weights."""
    plots.needed("--plot")
    whole = [m.weight.detach().flatten()[: m.weight.numel() // block * block] for m in model.linears().values()]
    flat = torch.cat(whole).view(-1, block)  # (blocks, block)
    scaled = flat / flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)  # (blocks, block)
    figure, (axes,) = plots.figure(width=9, height=4)
    axes.hist(scaled.flatten().numpy(), bins=200, density=True, color="lightsteelblue", label="weights / absmax")
    for level in CODEBOOK.tolist():
        axes.axvline(level, color="firebrick", linewidth=1, label="NF4 levels" if level == -1.0 else None)
    axes.set(xlabel="weight / absmax of its block", ylabel="density", title=f"{folder}: NF4, block {block}")
    axes.legend()
    plots.save(figure, file)
    print(f"drew {file}")


# ---- python lora.py --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def logit_differences(model, other, windows):
    """windows (n, T) of ids -> largest and mean |logit difference|, share of positions with another likeliest token."""
    largest, total, changed = 0.0, 0.0, 0.0
    for ids in windows:
        a, b = model(ids[None]), other(ids[None])  # (1, T, V)
        gap = (a - b).abs()
        largest, total = max(largest, gap.max().item()), total + gap.mean().item()
        changed += (a.argmax(-1) != b.argmax(-1)).float().mean().item()
    return largest, total / len(windows), changed / len(windows)


def difference(model, other, tok, documents, windows=32):
    """logit_differences on the first contexts of these documents."""
    stream = text_stream(documents, tok).to(model.device)
    T = min(model.config.block_size, len(stream))
    return logit_differences(model, other, stream[:min(windows, len(stream) // T) * T].view(-1, T))  # (n, T)


def compare_merges(trained, merges, tok, documents, windows=32):
    """Prints what each merge changes against the unmerged model. merges: {name: GPT}; documents: list of texts."""
    print(f"against the unmerged model, on {windows} contexts of text:\n"
          f"{'':18}{'largest':>12}{'mean |logit difference|':>27}{'greedy tokens that differ':>29}")
    for name, merged in merges.items():
        largest, mean, changed = difference(trained, merged, tok, documents, windows)
        print(f"   {name + ' merge':<15}{largest:>12.1e}{mean:>27.1e}{changed:>29.2%}")


def merge(config):
    """What python lora.py does: merges an adapter into its base, or says what each merge would change."""
    if not config.adapter or not (config.out or config.compare):
        raise UserError("name an adapter and what to do with it, as in python lora.py --adapter out/sft-lora --compare "
                        "(or --out out/merged); python sft.py --lora-r 16 --out out/sft-lora makes one")
    if config.merge not in lora.MERGES:
        raise UserError(f"--merge {config.merge}: it must be careful or simple")
    if config.out:
        claim_out(config)
    base = config.base or base_of(config.adapter)
    own = (Path(config.adapter) / "tokenizer.json").is_file()  # an adapter from PEFT may come without a tokenizer
    tok = get_tokenizer(config.adapter if own else base)
    if config.compare:
        trained = load(config.adapter, merge=False, base=base).eval()
        merges = {how: load(config.adapter, base=base, how=how).eval() for how in lora.MERGES}
        rows = files.load(config.text, "text")[0] if config.text else []
        compare_merges(trained, merges, tok, [row["text"] for row in rows] or Island().plain_text(400, seed=9))
        if tok.ranks == get_tokenizer("tiny").ranks:  # the island's vocabulary
            exam.compare({"unmerged": trained} | merges, tok, Run(torch.device("cpu"), torch.float32))
    if config.out:
        merged = load(config.adapter, base=base, how=config.merge)
        with together(config.out, (*MODEL, *TOKENIZER, *OF_A_RUN)) as folder:
            merged.save_pretrained(folder)
            tok.save(folder)
        print(f"the {config.merge} merge of {config.adapter} and {base} is in {config.out} (transformers loads it too)")
