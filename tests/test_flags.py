"""The command line: fields are flags, mistakes are one line, help is the comments."""
from dataclasses import dataclass, field

import pytest

from common import flags
from common.errors import UserError


@dataclass
class Config(flags.TrainConfig):
    lr: float = 0.5  # another default
    extra: int = 3  # a flag of this script; with 100 % of its comment
    flag: bool = True  # on or off


RECIPES = {"hot": dict(lr=9.0, extra=7)}


def test_flags_are_the_fields():
    config = flags.parse(Config, argv=["--batch-size", "5", "--extra=8", "--no-flag"])
    assert (config.batch_size, config.extra, config.flag, config.lr) == (5, 8, False, 0.5)


@dataclass
class Without:
    with_: str = ""  # what Python has no name for
    without: str = ""  # what it has one for


def test_a_flag_may_have_a_name_that_python_keeps():
    assert flags.parse(Without, argv=["--with", "a,b", "--without", "c"]) == Without("a,b", "c")


@dataclass
class Words:
    folders: list[str] = field(default_factory=list)  # checkpoints to look at
    n: int = 3  # how often


def test_a_list_takes_the_words_beside_the_flags(capsys):
    assert flags.parse(Words, argv=["out/a", "--n", "5", "out/b"]) == Words(["out/a", "out/b"], 5)
    assert flags.parse(Words, argv=[]) == Words([], 3)
    with pytest.raises(SystemExit):
        flags.parse(Words, argv=["--help"])
    assert "checkpoints to look at" in capsys.readouterr().out


def test_a_recipe_is_a_set_of_defaults_that_flags_override():
    config = flags.parse(Config, RECIPES, ["--recipe", "hot", "--extra", "1"])
    assert (config.lr, config.extra) == (9.0, 1)


@pytest.mark.parametrize("argv, words", [
    (["--batchsize", "5"], "--batch-size"),  # suggests the near one
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--batch-size", "0"], "--batch-size 0: it must be at least 1"),
    (["--lr", "nan"], "finite"), (["--lr", "-1"], "at least 0"), (["--beta1", "1"], "below 1"),
    (["--schedule", "exponential"], "cosine, linear, constant"), (["--dtype", "int8"], "float32, bfloat16"),
    (["--dropout", "a"], "--dropout a"), (["--dropout", "0,1"], "--dropout 0,1"), (["--recipe", "cold"], "invalid choice"),
])
def test_impossible_values_stop_with_one_line(argv, words):
    with pytest.raises(UserError, match=words) as stopped:
        flags.parse(Config, RECIPES, argv)
    assert "\n" not in str(stopped.value)


def test_help_comes_from_the_comments(capsys):
    with pytest.raises(SystemExit):
        flags.parse(Config, argv=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "with 100 % of its comment (default 3)" in text and "highest norm" not in text
    assert all("--" + name.replace("_", "-") in text for name in Config.__dataclass_fields__)


def test_every_field_has_a_comment():
    assert all(flags._comments(Config).values())


@pytest.mark.parametrize("text, value", [("0", 0.0), ("0.2", 0.2), ("0.0,0.3", (0.0, 0.3))])
def test_dropout_is_a_number_or_a_ramp(text, value):
    assert flags.dropout_of(Config(dropout=text)) == value


def sections(Config, capsys):
    """--help -> {heading: [flags below it]}."""
    with pytest.raises(SystemExit):
        flags.parse(Config, argv=["--help"])
    found, heading = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
        if line.startswith("  --"):
            found.setdefault(heading, []).append(line.split()[0].rstrip(","))
    return found


def test_help_begins_with_six_flags_and_the_rest_stands_in_groups(capsys):
    found = sections(Config, capsys)
    first, *others = found.items()
    assert first == ("the first flags to know", ["--data", "--init", "--out", "--steps", "--lr", "--resume"])
    assert [heading for heading, _ in others] == ["data", "model", "training", "adapters", "machine"]
    assert "--extra" in found["training"] and "--nf4" in found["adapters"] and "--device" in found["machine"]
    every = [flag for some in found.values() for flag in some]
    assert len(every) == len(set(every)) == len(Config.__dataclass_fields__)
