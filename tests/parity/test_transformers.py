"""Beside transformers: the same logits from the same folder in both directions, the same ids, the same greedy text."""
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")

import sft
from data.tokenizer import get_tokenizer
from generate import generate
from model import GPT, GPTConfig

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who <|end|> are\n\n you?"},
        {"role": "assistant", "content": "I am Pip, 12 years old."}, {"role": "user", "content": "Old?"}]


def hugging_face(seed, **settings):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**{"n_positions": 32, "vocab_size": 300, "n_layer": 3, "n_head": 2, "n_embd": 24,
                                        "attn_implementation": "eager"} | settings)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("seed, settings", [(0, {}), (1, {"n_layer": 1, "n_head": 3}), (2, {"n_embd": 64, "n_head": 8, "n_positions": 70}),
                                            (3, {"n_inner": 96})])
def test_their_folder_gives_the_same_logits_here(tmp_path, seed, settings):
    theirs = hugging_face(seed, **settings)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(300, (3, 30))
    ours = GPT.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_base_model_class_without_a_prefix_is_read_too(tmp_path):
    theirs = hugging_face(5)
    theirs.transformer.save_pretrained(tmp_path)  # as the public gpt2 folders are
    ids = torch.randint(300, (2, 8))
    assert torch.allclose(GPT.from_pretrained(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_our_folder_gives_the_same_logits_there(tmp_path, bias, seed):
    torch.manual_seed(seed)
    ours = GPT(GPTConfig(block_size=40, vocab_size=131, n_layer=2, n_head=1 + seed, n_embd=24, bias=bias)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(131, (3, 40))
    with torch.inference_mode():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients_are_the_same(tmp_path):
    theirs = hugging_face(4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    theirs.save_pretrained(tmp_path)
    ours, ids = GPT.from_pretrained(tmp_path), torch.randint(300, (3, 20))
    mask = (torch.rand(3, 20) < 0.4).long()
    sft.sft_loss(ours, ids, mask).backward()
    theirs(ids, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert torch.allclose(ours.embedding.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-5)
    assert torch.allclose(ours.blocks[0].attn.c_attn.weight.grad, theirs.transformer.h[0].attn.c_attn.weight.grad.t(), atol=1e-5)


def test_greedy_generation_is_the_same(tmp_path):
    theirs = hugging_face(6, n_positions=64)
    theirs.save_pretrained(tmp_path)
    prompts = [torch.randint(300, (n,)).tolist() for n in (4, 9, 1)]
    new = generate(GPT.from_pretrained(tmp_path), prompts, 20, temperature=0.0)
    for prompt, row in zip(prompts, new):
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20,
                                   do_sample=False, pad_token_id=0, eos_token_id=None)[0, len(prompt):].tolist()
        assert row == expected


# ---- tokenizers ------------------------------------------------------------------------------------------------------

def texts(n=100):
    rng = random.Random(0)
    alphabet = [*"abcdefghij XYZ'st 0123 .,!?\n\t", " the", " Mabel", "'ll", "é", "漢", "🙂", "<|end|>"]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(n)]


@pytest.mark.parametrize("template", ["chat", "human", "alpaca"])
def test_auto_tokenizer_reads_our_folder(tmp_path, template):
    ours = get_tokenizer("tiny", template)
    GPT(GPTConfig(8, ours.vocab_size, 1, 1, 8)).save_pretrained(tmp_path)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        if "<|" not in text:  # theirs turns a special token's name in the text into the token; ours never does
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.end and len(theirs) == ours.vocab_size
    plain = [dict(m, content=m["content"].replace("<|end|>", "")) for m in CHAT]
    rendered = theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    assert rendered == ours.encoding.decode(ours.render_prompt(plain))


def test_a_tokenizer_that_they_trained_is_read(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator(texts(500), trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = get_tokenizer(str(tmp_path))
    for text in texts():
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text
    assert ours.end_of_text == 0 and ours.new_ids == [400, 401, 402, 403]
