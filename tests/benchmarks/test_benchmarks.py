"""The benchmarks' own arithmetic; what they measure is measured by hand."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import check, machine, records
from benchmarks.study import english_text_encoder
from tests.support import ROOT


def test_check_finds_what_is_a_fifth_worse():
    committed = {"captions": {"ratio": 0.8, "sides": {"ours": {"seconds": 9}}}, "pictures": {"memory_ratio": 1.0}}
    assert dict(check.ratios(committed)) == {"captions.ratio": 0.8, "pictures.memory_ratio": 1.0}
    assert check.worse(committed, {"captions": {"ratio": 0.95}, "pictures": {"memory_ratio": 1.19}}) == []
    complaints = check.worse(committed, {"captions": {"ratio": 0.97}})
    assert complaints == ["captions.ratio is 0.970, committed 0.800", "pictures.memory_ratio was not measured"]


def test_operations_of_an_encoder_are_those_of_its_matrices():
    width, layers, length = 4, 2, 3
    projections = 4 * width * width + 2 * width * 4 * width  # query, key, value, output; up and down
    attention = 2 * length * width  # scores and their sum, a token
    expected = layers * 2 * length * (projections + attention)
    assert machine.encoder_operations(torch.tensor([length]), width, layers) == expected


def test_sides_run_in_turns_and_a_failure_is_told(tmp_path, monkeypatch):
    (tmp_path / "side.py").write_text(
        "import json, sys\n"
        "assert sys.argv[2] != 'broken', 'it is broken'\n"
        "print('noise')\n"
        "print(json.dumps({'seconds': 2.0, 'peak_gb': 1.0}))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert machine.in_turns("side", ["ours", "peer"]) == dict.fromkeys(
        ("ours", "peer"), {"seconds": 2.0, "peak_gb": 1.0}
    )
    with pytest.raises(RuntimeError, match="it is broken"):
        machine.in_turns("side", ["broken"])


@pytest.mark.slow
def test_two_processes_lose_no_line(tmp_path):
    file = tmp_path / "results/study.jsonl"
    program = (
        "import sys; from pathlib import Path; from benchmarks import records\n"
        "for n in range(20): records.put(Path(sys.argv[1]), {'who': sys.argv[2], 'n': n, 'é': 0.1}, ('who', 'n'))"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, str(file), who], cwd=ROOT) for who in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    found = records.read(file)
    assert sorted((record["who"], record["n"]) for record in found) == [(who, n) for who in "ab" for n in range(20)]
    # another result of the same run stands in its place, and the other lines stay to the byte
    before = file.read_text().splitlines()
    records.put(file, found[7] | {"é": 0.2}, ("who", "n"))
    after = file.read_text().splitlines()
    assert records.read(file)[7]["é"] == 0.2 and [*after[:7], *after[8:]] == [*before[:7], *before[8:]]
    assert records.read(tmp_path / "none.jsonl") == []


def test_reports_of_speed_stand_side_by_side(tmp_path):
    file = tmp_path / "speed.jsonl"
    for name, ratio in (("encode", 0.5), ("training", 0.7), ("encode", 0.6)):
        machine.save_report(file, name, {"ratio": ratio})
    assert len(records.read(file)) == 2
    assert machine.load_report(file, machine.on_device("encode")) == {"ratio": 0.6}
    with pytest.raises(LookupError, match="no report 'search'"):
        machine.load_report(file, "search")


def test_a_page_is_not_written_from_a_part_of_the_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(english_text_encoder, "WORK", tmp_path)
    monkeypatch.setattr(english_text_encoder, "PAGE", tmp_path / "page.md")
    with pytest.raises(SystemExit, match="stays as it was.*run again new_linear-100"):
        english_text_encoder.main(["--page"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_every_command_that_a_docstring_names_is_there(path):
    for name in re.findall(r"python -m (benchmarks[.\w]*)", path.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(name), f"{path}: {name}"
