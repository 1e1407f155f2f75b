"""docs/python.md: its blocks run, and its tables are true."""

import re
import shutil

import evaluate

from modeling_nrccr.cli.main import COMMANDS
from modeling_nrccr.data.load import BUILDERS
from tests.support import ROOT
from tests.support.small_base import write_small_base


TEXT = (ROOT / "docs/python.md").read_text()


def test_the_blocks_run_one_after_the_other(tmp_path, monkeypatch, no_bars):
    write_small_base(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "base").rename(tmp_path / "outputs/english")
    (tmp_path / "pictures").mkdir()
    for picture in tmp_path.glob("*.png"):
        shutil.copy(picture, tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        block = block.replace('"examples/metrics', f'"{ROOT}/examples/metrics')  # the only path of the repository
        block = re.sub(r"num_train_epochs=\d+", "num_train_epochs=2, min_steps=0", block)
        exec(compile(block, block.strip().splitlines()[0], "exec"), names)
    assert names["report"]["found"] and len(names["hits"]) == 3
    assert names["trainer"].state.global_step == 2 * (250 // 64)
    assert (tmp_path / "outputs/gl-by-hand").is_dir() and (tmp_path / "outputs/pictures/config.json").is_file()
    assert names["terms"].keys() == {"loss", "contrastive_loss", "feature_distillation_loss"}
    assert names["same"] == names["metrics"] and names["same"]["sum_recall"] > 0


def test_the_tables_are_true():
    builders = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", TEXT, re.M))
    assert builders == {name: entry.partition(":")[2] for name, entry in BUILDERS.entries.items()}
    assert all(entry == f"datasets_scripts.{name}:{builders[name]}" for name, entry in BUILDERS.entries.items())
    calls = dict(re.findall(r"^\| `nrccr ([\w-]+)` \| `([\w.:]+)` \|$", TEXT, re.M))
    assert calls.keys() == COMMANDS.keys() - {"data", "list"}  # of datasets_scripts; names of registries

    for module, function in (call.split(":") for call in calls.values()):  # mteb and fastapi need not be there
        source = (ROOT / "modeling_nrccr" / f"{module.replace('.', '/')}.py").read_text()
        assert f"\ndef {function}(" in source, module
