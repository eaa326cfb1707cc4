"""docs/metrics.md: every number that a script logs is explained, and nothing that no script logs."""
import json
import re
from pathlib import Path

import pytest
import torch

import dpo
import ppo
import pretrain
import reward
import sft
from common.flags import check
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
SHARED = "several scripts"


def entries():
    """{heading of a section: the keys that it explains} of the page."""
    sections = re.split(r"^## `?(.+?)`?\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    heads = {heading: "".join(re.findall(r"^((?:\*\*`\w+`\*\* )+)", text, re.MULTILINE))
             for heading, text in zip(sections[1::2], sections[2::2])}
    return {heading: re.findall(r"`(\w+)`", keys) for heading, keys in heads.items() if keys or ".py" in heading}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """{script: the keys of its log.jsonl}, of two steps each."""
    folder, tok = tmp_path_factory.mktemp("metrics"), get_tokenizer("tiny")
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=64, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=16)).save_pretrained(folder)
    tok.save(folder)
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{i} hens sat in a tree. " * 30}) for i in range(20)))
    data, found = {"data": str(folder / "pairs.jsonl")}, {}
    for script, settings in {pretrain: {"data": str(folder / "text.jsonl"), "eval_every": 1}, sft: data | {"eval_every": 1},
                             reward: data | {"eval_every": 1}, dpo: data | {"eval_every": 1, "sample_every": 0},
                             ppo: {"reward": "gold", "max_new_tokens": 4, "n_prompts": 20}}.items():
        out = folder / script.__name__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo, "report", lambda *_: None)  # it answers hundreds of questions, and logs nothing
            script.main(check(script.Config(init=str(folder), out=str(out), steps=2, batch_size=4, device="cpu",
                                            dtype="float32", save_every=0, **settings)))
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found[f"{script.__name__}.py"] = {key for line in lines for key in line}
    return found


def test_every_key_is_explained_once(logged):
    found = entries()
    assert set(found) == {SHARED, *logged}
    for script, keys in logged.items():
        assert keys <= {*found[SHARED], *found[script]}, f"docs/metrics.md lacks {sorted(keys - {*found[SHARED], *found[script]})}"
        assert not set(found[SHARED]) & set(found[script])
    assert all(len(keys) == len(set(keys)) for keys in found.values())


def test_nothing_is_explained_that_no_script_writes(logged):
    found = entries()
    for script, keys in logged.items():
        assert set(found[script]) <= keys, f"{script} never writes {sorted(set(found[script]) - keys)}"
    for key in found[SHARED]:
        assert sum(key in keys for keys in logged.values()) > 1, f"{key} is not of {SHARED}"
