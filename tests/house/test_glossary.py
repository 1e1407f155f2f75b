"""Commands and recipes say what docs/glossary.md says: one notion, one name."""

import importlib
import re
from dataclasses import dataclass, fields
from fnmatch import fnmatch

import pytest
import yaml
from transformers import Seq2SeqTrainingArguments

from modeling_nrccr.cli.main import COMMANDS
from modeling_nrccr.recipes.settings import RECIPES, recipe_names
from modeling_nrccr.training.arguments import NrccrTrainingArguments
from tests.support import ROOT


PARTS = {"data": [("check",), ("push",)]}  # commands that have commands of their own
TRAINING = {
    "train": NrccrTrainingArguments,
    "add-language": NrccrTrainingArguments,
    "train-translator": Seq2SeqTrainingArguments,
}
FLAG = re.compile(r"^\s+(?:-\w, )?--(\w+)", re.M)


@dataclass
class Nothing:
    """Has no fields."""


def table() -> list[tuple[str, str, set[str], list[str]]]:
    """Return the rows of the first table: notion, name, commands, what it was called before."""
    text = (ROOT / "docs/glossary.md").read_text().partition("\n## Terms")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    ticked = [[re.findall(r"`([^`]+)`", cell) for cell in row[1:]] for row in rows[2:]]
    return [(row[0], name, set(where), before) for row, ([name], where, before) in zip(rows[2:], ticked, strict=True)]


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Return the flags of each command; of those that train, `--help_all` has the fields of training."""
    found = {}
    for name, (module, _) in COMMANDS.items():
        main = importlib.import_module(f"modeling_nrccr.cli.{module}").main
        shown = "".join(shown_by(main, *words) for words in PARTS.get(name, [()]))
        found[name] = set(FLAG.findall(shown)) | {field.name for field in fields(TRAINING.get(name, Nothing))}
    return found


def shown_by(main, *words: str) -> str:
    """Return what `--help` prints."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("argparse.ArgumentParser._print_message", lambda self, text, file=None: lines.append(text))
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    return "".join(lines)


def test_each_name_means_one_notion():
    notions, names = [row[0] for row in table()], [row[1] for row in table()]
    assert len(set(names)) == len(names) > 30 and len(set(notions)) == len(notions)


@pytest.mark.parametrize("name, where", [(name, where) for _, name, where, _ in table()])
def test_each_name_is_a_flag_where_it_is_said_to_be(name, where, flags):
    assert {command for command, known in flags.items() if name in known} == where


def test_no_old_word_is_used(flags):
    old = [(word, name) for _, name, _, before in table() for word in before]
    assert len(old) > 10
    named = {(command, name) for _, name, where, _ in table() for command in where}
    used = [
        f"{command} --{flag} is --{new}"
        for command, known in flags.items()
        for flag in known
        for word, new in old
        if fnmatch(flag, word) and (command, flag) not in named
    ]
    assert not used


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_recipe_has_an_old_field(recipe):
    old = [word for _, _, _, before in table() for word in before]
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    assert not [field for field in settings for word in old if fnmatch(field, word)]


@pytest.mark.parametrize("command", ["add-language", "train"])
def test_an_old_field_says_its_new_name(command, capsys):
    """Of all that a recipe had before; a pattern stands for the adapter's kind and a loss."""
    main = importlib.import_module(f"modeling_nrccr.cli.{COMMANDS[command][0]}").main
    examples = {"target_language": "language", "dataset": "data", "config": "recipe"}
    examples |= (
        {"adapter_kind": "adapter"} if command == "train" else {"captions": "data", "eval": "test", "kind": "adapter"}
    )
    for old, new in (examples | {"contrastive_loss_weight": "losses"}).items():
        with pytest.raises(SystemExit):
            main([f"--{old}", "x"])
        assert re.fullmatch(rf"error: --{old} is now (--)?{new}\b.*\n", capsys.readouterr().err)
