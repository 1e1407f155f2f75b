"""The experiment bench: what it computes, that it goes on where it stopped, and that its pages say what it found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from benchmarks import records
from benchmarks.study import __main__ as command
from benchmarks.study import runner, spec
from benchmarks.study.statistics import group_hits, summary
from modeling_nrccr.retrieval.bootstrap import sum_recall
from modeling_nrccr.retrieval.metrics import RECALL_AT, compute_retrieval_metrics, retrieval_ranks
from modeling_nrccr.training import experiment
from tests.support import ROOT
from tests.training.test_train_example import Engine, toy_dataset
from tests.training.test_train_example import encoders as encoders


def write_study(folder: Path, towers: Path) -> Path:
    settings = {
        "text_encoder": str(towers / "t"),
        "vision_encoder": str(towers / "v"),
        "text_prefix": "",
        "projection_dim": 8,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "eval_steps": 2,
        "losses": {"contrastive": 1.0, "target_contrastive": 1.0},
    }
    only_features = {
        "losses": {"feature_distillation": 1.0},
        "text_only": True,
        "train_visual_head": False,
    }
    loaded = {
        "config": "modeling_nrccr/recipes/joint.yaml",
        "conditions": {"": {}},
        "languages": ["gl"],
        "split_seeds": [0],
        "seeds": [0, 1],
        "settings": settings,
        "grid": [{"learning_rate": 1e-2}, {"learning_rate": 1e-9}],
        "rows": {
            "english_only": {
                "label": "E",
                "settings": {"losses": {"contrastive": 1.0}, "eval_query_column": "reference_source_caption"},
            },
            "mt": {"label": "M"},
            "student": {
                "label": "S",
                "teacher": "english_only",
                "start_from": "english_only",
                "settings": only_features | {"learning_rate": 1e-2},
            },
            "together": {
                "label": "T",
                "start_from": "english_only",
                "adapter": True,
                "trained_in": "gl",
                "one_to_k": True,
                "languages": ["gl", "ca"],
                "learns_from": {"gl": "apertium", "ca": "apertium"},
                "settings": only_features | {"per_device_train_batch_size": 4},
            },
        },
        "comparisons": [["mt:target", "english_only:target"], ["student:english", "english_only:english"]],
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(loaded))
    return path


def toy(*args, **kwargs):
    """Stand in for `load_translated_dataset`."""
    dataset = toy_dataset()
    for split in ("validation", "test"):
        rows = dataset[split].remove_columns("source_caption")
        dataset[split] = rows.add_column("source_caption", dataset[split]["reference_source_caption"])
    return dataset, Engine()


DRIVER = """
from pathlib import Path
from benchmarks import records
from benchmarks.study import __main__ as command
from benchmarks.study import runner, spec
from modeling_nrccr.training import experiment
from tests.benchmarks.test_study import toy
experiment.load_translated_dataset = toy
folder = Path({folder!r})
runner.FEATURES = folder / "features"
runner.work(spec.Study(Path({path!r}), folder / "results"))
"""


@pytest.fixture(scope="module")
def finished(encoders, tmp_path_factory):  # noqa: F811
    """A tiny study, killed after its second run and started again."""
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder, encoders)
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(folder=str(folder), path=str(path)))
    study = spec.Study(path, folder / "results")
    command, environ = [sys.executable, str(driver)], os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(records.read(study.file)) < 2:
        assert process.poll() is None, "the study ended early"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = study.file.read_text().splitlines()
    subprocess.run(command, env=environ, check=True, capture_output=True)
    return folder, study, before


@pytest.mark.slow
def test_a_killed_study_goes_on_and_repeats_nothing(finished):
    folder, study, before = finished
    lines = study.file.read_text().splitlines()
    assert 2 <= len(before) < 20 and lines[: len(before)] == before
    runs = [*study.grid_runs(), *study.runs()]
    assert len(lines) == len(runs) and spec.runs_of(study.file).keys() == set(runs)
    assert not list(folder.rglob("*.tmp"))
    # the rate that trains was chosen, and the runs have it
    assert {study.chosen(row) for row in ("english_only", "mt")} == {0}
    reports = {run.name: study.load(run) for run in study.runs()}
    assert all(report["settings"]["learning_rate"] == 1e-2 for report in reports.values() if report["row"] == "mt")
    # a student's English is its teacher's, and its pictures are too
    student, teacher = (reports[f"gl-split0-seed0-{row}"]["test"] for row in ("student", "english_only"))
    assert student["english"] == teacher["english"] and student["target"] != teacher["target"]
    # what learned two languages at once is trained in the first, and asked in the other; English is the base's
    first, other = (reports[f"{language}-split0-seed0-together"] for language in ("gl", "ca"))
    assert first["steps"] > 0 and other["steps"] == 0 and first["test"] == other["test"]  # one toy for all languages
    assert first["test"]["english"] == teacher["english"] and first["test"]["target"] != teacher["target"]
    assert set(first["fusion"]) == {f"{share / 10:g}" for share in range(11)}
    # statistics come from the ranks that the metrics come from
    from benchmarks.study.statistics import compare

    compare(study)
    report = study.summary()
    for row in report["rows"]:
        of_row = [r for r in reports.values() if r["row"] == row["row"]]
        mean = np.mean([r["test"][row["query"]][row["gallery"]]["sum_recall"] for r in of_row])
        assert row["mean"] == pytest.approx(mean, abs=0.01) and row["low"] <= row["high"] and row["runs"] == 2
    same = [pair for pair in report["comparisons"] if pair["first"] == "student:english"]
    assert same and all(pair["mean"] == pair["low"] == pair["high"] == 0 for pair in same)


@pytest.mark.slow
def test_committed_rows_are_run_again_beside_them(finished, monkeypatch, capsys):
    folder, study, _ = finished
    monkeypatch.setattr(spec, "RESULTS", folder / "results")
    monkeypatch.setattr(runner, "FEATURES", folder / "features")
    monkeypatch.setattr(experiment, "load_translated_dataset", toy)
    committed = study.file.read_bytes()
    arguments = [str(folder / "tiny.yaml"), "--rows=student", "--split_seeds=0", f"--results={folder / 'again'}"]
    command.main(arguments)
    again = spec.Study(folder / "tiny.yaml", folder / "again", ["student"], [0])
    found, before = spec.runs_of(again.file), spec.runs_of(study.file)
    # the teacher's too, whose weights are needed; no point of the grid
    assert {(run.row, run.seed, run.point) for run in found} == {
        (row, seed, None) for row in ("english_only", "student") for seed in (0, 1)
    }
    for run, record in found.items():
        assert record["test"] == before[run]["test"] and record["settings"] == before[run]["settings"]
    assert {row["row"] for row in again.summary()["rows"]} == {"student"}
    shown = f"{before[next(again.runs())]['test']['target']['all']['sum_recall']:.1f}"
    assert f"gl-split0-seed0-student: SumR {shown}, committed {shown}" in capsys.readouterr().out
    assert study.file.read_bytes() == committed
    # a result of other settings is not taken for this study's
    record = found[next(again.runs())]
    other = record | {"settings": record["settings"] | {"learning_rate": 5.0}}
    records.put(again.file, other, spec.KEY)
    assert len(spec.runs_of(again.file)) == len(found)
    with pytest.raises(ValueError, match="other settings.*delete the line"):
        runner.Runner(again).ensure(next(again.runs()))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows=mt"], "name another folder by --results"),
        (["--rows=nt", "--results=again"], "rows that there are not: nt"),
        (["--split_seeds=7", "--results=again"], "split seeds that there are not: 7"),
    ],
)
def test_rows_that_cannot_be_run_again_are_named(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(write_study(tmp_path, tmp_path)), *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def frame(text: torch.Tensor, images: torch.Tensor, owner: torch.Tensor, groups: list[str]) -> pd.DataFrame:
    t2v, v2t = retrieval_ranks(text, images, owner)
    parts = [
        pd.DataFrame({"direction": way, "group": groups, "rank": ranks}) for way, ranks in (("t2v", t2v), ("v2t", v2t))
    ]
    return pd.concat(parts, ignore_index=True)


def test_bootstrap_counts_groups_as_often_as_they_are_drawn():
    generator = torch.Generator().manual_seed(0)
    text, images = (torch.randn(40, 6, generator=generator) for _ in range(2))
    owner, names = torch.arange(40), sorted({f"g{i % 7}" for i in range(40)})
    groups = [f"g{i % 7}" for i in range(40)]
    ranks = frame(text, images, owner, groups)
    counts = group_hits(ranks, names)
    whole = sum_recall(counts, np.ones((1, 7)))[0]
    assert whole == pytest.approx(compute_retrieval_metrics(text, images, owner)["sum_recall"])
    draw = np.array([[2, 0, 1, 0, 0, 3, 1.0]])
    repeated = [i for i, group in enumerate(groups) for _ in range(int(draw[0, names.index(group)]))]
    expected = 0.0
    for way in ("t2v", "v2t"):
        values = ranks[ranks["direction"] == way]["rank"].to_numpy()[repeated]
        expected += sum(100 * np.mean(values <= k) for k in RECALL_AT)
    assert sum_recall(counts, draw)[0] == pytest.approx(expected)
    better = summary(np.stack([np.array([10.0, *np.linspace(5, 15, 1000)])] * 3))
    assert better["mean"] == 10 and (better["low"], better["high"]) == pytest.approx((5.25, 14.75), abs=0.01)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rowz": 1}, "rowz"),
        ({"rows": {"a": {"label": "A", "techer": "a"}}, "comparisons": []}, "row a: unknown keys techer"),
        ({"rows": {"a": {"label": "A", "teacher": "b"}}, "comparisons": []}, "rows that there are not: b"),
    ],
)
def test_a_wrong_study_is_an_error_that_names_it(tmp_path, change, message):
    loaded = yaml.safe_load(write_study(tmp_path, tmp_path).read_text()) | change
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(loaded))
    with pytest.raises(ValueError, match=message):
        spec.Study(path)


def test_pages_agree_with_the_committed_runs():
    from benchmarks.pages import block
    from benchmarks.study.report import blocks

    for path, content in blocks().items():
        text = path.read_text(encoding="utf-8")
        for name, generated in content.items():
            assert generated in block(name).search(text)[0], f"{path.name}: run python -m benchmarks.study.report"


def test_every_committed_line_is_a_run_of_its_study_or_its_summary():
    for path in sorted((ROOT / "benchmarks/studies").glob("*.yaml")):
        study = spec.Study(path)
        found = records.read(study.file)
        assert len(found) == len(spec.runs_of(study.file)) + 1 and study.summary()["rows"]  # no run twice
        # each is found again: a word that is renamed in the studies is renamed in the lines too
        for run in [*study.grid_runs(), *study.runs()]:
            assert study.load(run)["settings"] == json.loads(json.dumps(study.run_settings(run))), run.name
