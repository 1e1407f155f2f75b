"""The benchmarks' own arithmetic; what they measure is measured by hand."""

import pytest
import torch

from benchmarks import check, machine


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
