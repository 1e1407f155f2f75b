"""`nrccr list` reads files, and imports nothing that is slow; what it says is what there is."""

import importlib
import subprocess
import sys

import pytest

from modeling_nrccr.cli import list as command
from tests.support import ROOT


@pytest.mark.parametrize("heading", command.REGISTRIES)
def test_each_name_is_there_with_a_line_on_what_it_is(heading):
    module, name, _ = command.REGISTRIES[heading]
    registry = getattr(importlib.import_module(f"modeling_nrccr.{module}"), name)
    found = command.entries(heading)
    assert list(found) == list(registry) and all(registry.values())
    for line in found.values():
        assert 10 < len(line) and line[-1] in ".:" and "](" not in line


def test_recipes_and_languages():
    recipes, languages = command.entries("recipes"), command.entries("languages")
    assert {"joint", "recommended", "paper/vatex", "neighbours/dasd"} <= set(recipes) and all(recipes.values())
    assert languages["gl"] == "Galician; apertium with en, es, pt" and languages["cs"] == "Czech; dictionary with en"
    assert all(line.split(";")[0] != code for code, line in languages.items())  # each has a name


def test_nothing_slow_is_imported():
    code = """
import sys
sys.argv[0] = "nrccr"
from modeling_nrccr.cli.main import main
main(["list"])
main(["list", "losses"])
slow = {"torch", "transformers", "datasets"} & set(sys.modules)
assert not slow, slow
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "losses: triplet, contrastive" in result.stdout and "Written as losses: {NAME: WEIGHT}" in result.stdout
