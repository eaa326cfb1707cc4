"""Against PEFT: the same forward, the same gradients, the same merge, and the files of either read by the other."""
from types import SimpleNamespace

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import checkpoints
import lora
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, resize_vocab

IDS = torch.tensor([[3, 47, 9, 49, 1, 30, 2, 47], [5, 6, 7, 8, 9, 10, 11, 49]])
NEW = [49, 47]
TARGETS = {"all": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"], "attention": ["c_attn", "attn.c_proj"]}
CASES = pytest.mark.parametrize("targets, tokens, rslora",
                                [("all", NEW, False), ("attention", None, True), ("all", None, False)])


@pytest.fixture
def base(tmp_path):
    """A folder that our GPT wrote, and both readers of it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=50, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def ours_on(base, targets, tokens, rslora):
    model = GPT.from_pretrained(base).eval()
    lora.add_lora(model, 4, 8.0, targets=targets, rslora=rslora, tokens=tokens or ())
    return model


def theirs_on(base, targets, tokens, rslora):
    model = transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[targets], task_type="CAUSAL_LM",
                             fan_in_fan_out=True, use_rslora=rslora,
                             trainable_token_indices={"wte": tokens} if tokens else None)
    return peft.get_peft_model(model, config).eval()


def stir(model):
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3, generator=generator)
    return model


def in_pefts_names(model):
    return {checkpoints.PREFIX + name: p for name, p in checkpoints.peft_parameters(model).items()}


def trained_by_peft(model):
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


@CASES
def test_forward_and_gradients(base, tmp_path, targets, tokens, rslora):
    theirs = stir(theirs_on(base, targets, tokens, rslora))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(base).eval()
    count = checkpoints.load_adapter(ours, tmp_path / "theirs")
    assert count == theirs.get_nb_trainable_parameters()[0]
    logits = theirs(IDS).logits
    assert torch.allclose(ours(IDS), logits, atol=1e-5)
    plain = GPT.from_pretrained(base).eval()(IDS)
    assert (logits - plain).abs().mean() > 0.05  # the adapter does something
    with lora.lora_off(ours), theirs.disable_adapter():
        assert torch.allclose(ours(IDS), theirs(IDS).logits, atol=1e-5) and torch.equal(ours(IDS), plain)

    for output in (logits, ours(IDS)):
        (output.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])).sum().backward()
    wanted, found = trained_by_peft(theirs), in_pefts_names(ours)
    assert set(wanted) == set(found)
    for name in wanted:
        assert wanted[name].grad.abs().max() > 1e-3
        assert torch.allclose(found[name].grad, wanted[name].grad, rtol=1e-3, atol=1e-4), name


@CASES
def test_peft_reads_our_files(base, tmp_path, targets, tokens, rslora):
    ours = stir(ours_on(base, targets, tokens, rslora))
    head = {"score.weight": torch.ones(1, 16)}  # PEFT skips what it does not know
    checkpoints.save_adapter(ours, tmp_path / "ours", base, extra=head)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert torch.allclose(theirs(IDS).logits, ours(IDS), atol=1e-5)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours").eval()  # by the base named in our config
    assert torch.allclose(found(IDS).logits, ours(IDS), atol=1e-5)


@CASES
def test_merged_weights_are_equal(base, tmp_path, targets, tokens, rslora):
    ours = stir(ours_on(base, targets, tokens, rslora))
    checkpoints.save_adapter(ours, tmp_path / "ours", base)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").merge_and_unload()
    lora.merge_lora(ours).save_pretrained(tmp_path / "merged")
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    for (name, a), (_, b) in zip(merged.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    assert torch.allclose(merged.eval()(IDS).logits, theirs.eval()(IDS).logits, atol=1e-5)


def test_layers_that_peft_chose_by_a_regular_expression(base, tmp_path):
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*\.1\.(attn|mlp)\.c_proj", task_type="CAUSAL_LM",
                             fan_in_fan_out=True, trainable_token_indices=NEW)
    theirs = stir(peft.get_peft_model(model, config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(base).eval()
    checkpoints.load_adapter(ours, tmp_path / "theirs")
    assert torch.allclose(ours(IDS), theirs(IDS).logits, atol=1e-5)
    checkpoints.save_adapter(ours, tmp_path / "back", base)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    back = peft.PeftModel.from_pretrained(model, tmp_path / "back").eval()
    assert torch.allclose(back(IDS).logits, theirs(IDS).logits, atol=1e-5)


def test_an_adapter_of_the_model_without_a_head(base, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = stir(peft.get_peft_model(transformers.GPT2Model.from_pretrained(base), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(base).eval()
    checkpoints.load_adapter(ours, tmp_path / "theirs")
    assert torch.allclose(ours.hidden(IDS), theirs(IDS).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("settings, message", [
    ({"use_dora": True}, "use_dora"), ({"rank_pattern": {"c_attn": 2}}, "rank"), ({"bias": "lora_only"}, "bias"),
    ({"modules_to_save": ["ln_f"]}, "modules_to_save"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"target_modules": ["c_attn", "wte"]}, "lora_embedding"),
])
def test_what_we_cannot_read_is_refused(base, tmp_path, settings, message):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM",
                                "fan_in_fan_out": True} | settings)
    peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(SystemExit, match=message):
        checkpoints.load_adapter(GPT.from_pretrained(base), tmp_path / "theirs")


def test_an_adapter_that_added_chat_tokens_wants_a_base_with_room_for_them(tmp_path):
    """The call in docs/your_data.md. PeftModel alone does not resize the base; AutoPeftModelForCausalLM does."""
    tok = get_tokenizer("tiny", "chat")
    GPT(GPTConfig(block_size=32, vocab_size=tok.vocab_size - len(tok.new_ids), n_layer=1, n_head=2, n_embd=16)).save_pretrained(tmp_path / "base")
    ours = GPT.from_pretrained(tmp_path / "base")
    resize_vocab(ours, tok.vocab_size)
    lora.add_lora(ours, 2, 4, tokens=tok.new_ids)
    stir(ours)
    checkpoints.save_model(SimpleNamespace(out=str(tmp_path / "ours"), init=str(tmp_path / "base")), ours, tok)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(IndexError):
        peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")))
    ids = torch.tensor([[1, 2, tok.end, 3]])
    for theirs in (peft.PeftModel.from_pretrained(base, tmp_path / "ours"),
                   peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")):
        assert torch.allclose(theirs.eval()(ids).logits, ours.eval()(ids), atol=1e-5)
