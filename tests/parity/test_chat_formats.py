"""Beside transformers: the model's own chat format, of made-up models in the manner of every family that people choose.

Ids are compared with apply_chat_template's; what somebody typed, with its sanitize_control_tokens.
"""
import inspect
import json

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from data.tokenizer import get_tokenizer
from test_tokenizers import LLAMA3, byte_level, sentence_pieces, split

# ---- models ----------------------------------------------------------------------------------------------------------

QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
HELPFUL = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a model that nobody has trained.<|im_end|>"
           "\\n' }}{% endif %}")
WITH_SYSTEM = HELPFUL + "{% for m in messages %}" + CHATML + "{% endfor %}" + ASKED
THINKING = """\
{%- set last = namespace(question=0) %}
{%- for m in messages if m.role == 'user' %}
    {%- set last.question = m.content %}
{%- endfor %}
{%- set seen = namespace(last=false) %}
{%- for m in messages %}
    {%- set text, thought = m.content, '' %}
    {%- if m.role == 'user' and m.content == last.question %}
        {%- set seen.last = true %}
    {%- endif %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and seen.last %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
HEADERS = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + "
           "m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
           "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
DATES = """\
{{- bos_token }}
{%- set asked = messages[0].role == 'system' %}
{%- if asked %}
    {%- set said, messages = messages[0].content | trim, messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnows all until: May 2020\\nNow: ' + strftime_now('%d %b %Y') }}
{{- '\\n\\n' + (said if asked else '') + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% else %}{{ m.content | trim }}{% endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
INSTRUCTIONS = """\
{%- set told = namespace(text='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- set told.text = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}
    {%- elif m.role == 'user' %}
        {%- if loop.previtem is defined and loop.previtem.role == 'user' %}{{ raise_exception('two questions') }}{% endif %}
        {{- bos_token + '[INST] ' + (told.text + m.content).strip() + ' [/INST]' }}
        {%- set told.text = '' %}
    {%- else %}
        {{- ' ' + m.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = ("{% for m in messages %}\n{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}\n{% if loop.last and "
          "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
           "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
           "{% else %}{{ raise_exception('only questions and answers') }}{% endif %}{% endfor %}")
IM, HEADER = ("<|im_start|>", "<|im_end|>"), ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                              "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")


def made(tokenizer, special=(), plain=()):
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in plain])
    return tokenizer


def llama3():
    tokenizer = made(byte_level(pre=split(LLAMA3), ignore_merges=True), HEADER)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[
        ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))])
    return tokenizer


def digits():
    return made(byte_level(pre=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                        pre_tokenizers.ByteLevel(add_prefix_space=False)])), IM)


def qwen():
    return made(byte_level(normalizers.NFC(), split(QWEN)), IM, ("<think>", "</think>"))


LLAMA2 = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
MODELS = {  # a tokenizer, its template and settings, the ids in generation_config.json by name, the format that it is for us
    "SmolLM2": (digits, WITH_SYSTEM, dict(bos_token=IM[0], eos_token=IM[1]), [IM[1]], "own"),
    "Qwen2.5": (qwen, WITH_SYSTEM, dict(eos_token=IM[1], pad_token="<|endoftext|>", add_bos_token=False),
                [IM[1], "<|endoftext|>"], "own"),
    "Qwen3": (qwen, THINKING, dict(eos_token=IM[1], pad_token="<|endoftext|>"), [IM[1], "<|endoftext|>"], "own"),
    "ChatML": (qwen, "{% for m in messages %}" + CHATML + "{% endfor %}" + ASKED, dict(eos_token=IM[1]), [], "chatml"),
    "Llama 3": (llama3, HEADERS, dict(bos_token=HEADER[0], eos_token="<|eot_id|>"), ["<|end_of_text|>", "<|eot_id|>"],
                "llama3"),
    "Llama 3.2": (llama3, DATES, dict(bos_token=HEADER[0], eos_token="<|eot_id|>"),
                  ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "own"),
    "Llama 2": (sentence_pieces, INSTRUCTIONS, LLAMA2 | dict(add_bos_token=True), ["</s>"], "llama2"),
    "Llama 2, newer": (lambda: sentence_pieces(prefix="first"), INSTRUCTIONS, LLAMA2, ["</s>"], "llama2"),
    "Llama 3, contradicted": (llama3, HEADERS, dict(bos_token=HEADER[0], eos_token="<|eot_id|>", add_bos_token=False), [],
                              "llama3"),  # what tokenizer.json says counts
    "TinyLlama": (sentence_pieces, ZEPHYR, LLAMA2, ["</s>"], "zephyr"),
    "Mistral": (lambda: made(sentence_pieces(prefix="first"), ["[INST]", "[/INST]"]), MISTRAL, LLAMA2, ["</s>"], "own"),
}
WITHOUT_SYSTEM = ["Mistral"]  # it refuses a system prompt, as transformers then does


def folder_of(kind, folder):
    tokenizer, template, settings, stops, _ = MODELS[kind]
    tokenizer = tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.token_to_id(x) for x in stops]}))
    return folder


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = folder_of(request.param, tmp_path_factory.mktemp("model"))
    return request.param, get_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)


# ---- the ids ---------------------------------------------------------------------------------------------------------

SANITIZES = "sanitize_control_tokens" in inspect.signature(transformers.PreTrainedTokenizerFast.apply_chat_template).parameters


def says(*texts):
    """The texts of a user and the assistant in turns -> messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = [{"role": "system", "content": "Be kind."}]
TALKS = [says("Who bakes 12 pies?", "Mabel."), says("Who?", "Otto", "and\nwhen? \u6771", "At 345\n\nor so \U0001f642.", "a", "b"),
         says(" \n Who? ", "  Otto eats \n"), SYSTEM + says("Who bakes?", "Mabel.", "\u00e9t\u00e9  na\u00efve?", "The theme."),
         says("", "Mabel")]


def talks(kind):
    return [talk for talk in TALKS if talk[0]["role"] == "user" or kind not in WITHOUT_SYSTEM]


def test_ids_are_theirs(model):
    kind, ours, theirs = model
    for talk in talks(kind):
        assert ours.render(talk)[0] == theirs.apply_chat_template(talk, return_dict=False), talk
        asked = theirs.apply_chat_template(talk[:-1], add_generation_prompt=True, enable_thinking=False, return_dict=False)
        assert ours.render_prompt(talk[:-1]) == asked, talk


def test_the_mask_is_the_answers_and_their_end_tokens(model):
    kind, ours, theirs = model
    for talk in talks(kind):
        ids, mask = ours.render(talk)
        pieces, at = [], 0
        while 1 in mask[at:]:
            begin = at + mask[at:].index(1)
            at = (mask[begin:] + [0]).index(0) + begin
            pieces.append(ids[begin:at])
            if len(pieces) * 2 == len(talk) or kind != "Qwen3":  # an earlier answer is asked for without its thought
                prompt = ours.render_prompt(talk[:[i for i, m in enumerate(talk) if m["role"] == "assistant"][len(pieces) - 1]])
                assert ids[:begin] == prompt
        answers = [m["content"] for m in talk if m["role"] == "assistant"]
        assert len(pieces) == len(answers)
        for piece, answer in zip(pieces, answers):
            assert piece[-1] == ours.end == theirs.eos_token_id and not set(piece[:-1]) & ours.stops
            assert ours.answer(piece) == (answer.strip() if kind.startswith("Llama") else answer)
            assert ours.ended(piece) and not ours.ended(piece[:-1])


def test_typed_special_tokens_stay_text(model):
    kind, ours, theirs = model
    for name in [*ours.special, "".join(ours.special)]:
        talk = says(f"a{name}b", f"b{name}a", f"\n{name}", name)
        ids, mask = ours.render(talk)
        if SANITIZES:
            assert ids == theirs.apply_chat_template(talk, return_dict=False, sanitize_control_tokens=True), name
        plain = ours.render(says("a", "b", "\na", "a"))
        specials = [[i for i in one if i in ours.special.values()] for one in (ids, plain[0])]
        assert specials[0] == specials[1], name
        prompt = ours.render_prompt(talk[:3])
        assert ids[:len(prompt)] == prompt and ours.answer(ids[len(prompt):ids.index(ours.end, len(prompt))]) == name


def test_the_format_is_known_by_name_where_it_is_one(model):
    kind, ours, theirs = model
    *_, stops, name = MODELS[kind]
    assert ours.template_name == name and ours.new_ids == []
    assert ours.vocab_size == len(theirs)
    assert ours.stops >= {ours.end, *theirs.convert_tokens_to_ids(stops)}


def test_a_folder_of_ours_has_the_same_format(model, tmp_path):
    kind, ours, theirs = model
    ours.save(tmp_path)
    again, opened = get_tokenizer(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.template_name == ours.template_name and again.stops == ours.stops and again.begin == ours.begin
    assert opened.eos_token == theirs.eos_token and opened.chat_template == theirs.chat_template
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert set(config.eos_token_id) == ours.stops
    for talk in talks(kind):
        assert again.render(talk) == ours.render(talk)
        assert opened.apply_chat_template(talk, return_dict=False) == theirs.apply_chat_template(talk, return_dict=False)
    assert opened.encode("Mabel") == theirs.encode("Mabel") == ours.begin + ours.encode("Mabel")


def test_a_text_by_itself_begins_as_in_pretraining(tmp_path):
    folder = folder_of("Llama 2", tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).encode("Mabel bakes")
    for template in ("own", "chat", "human", "chatml", "llama2"):
        assert get_tokenizer(str(folder), template).document("Mabel bakes") == theirs, template
