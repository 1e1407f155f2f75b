import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def test_results_agree_with_the_committed_run():
    from benchmarks.readme_table import BLOCK, results

    report = json.loads((ROOT / "docs/demo.json").read_text())
    block = BLOCK.search((ROOT / "modeling_nrccr/recipes/README.md").read_text())[0]
    assert results(report) in block
    assert f"{report['baselines']['translated_query']['sum_recall']:.1f}" in block


def test_every_file_and_flag_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:examples|docs|modeling_nrccr|benchmarks|\.ci)/[\w./-]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    for script in {
        "train",
        "search",
        "evaluate_retrieval",
        "translate",
        "noise_report",
        "mteb_eval",
        "push_to_hub",
        "serve",
        "export_onnx",
    }:
        flags = {flag for line in re.findall(rf"{script}\.py[^\n#]*", text) for flag in re.findall(r"--[a-z_]+", line)}
        source = "".join((ROOT / f"examples/{name}.py").read_text() for name in {script, "train"})
        source += (ROOT / "modeling_nrccr/training_args.py").read_text() + "--help"
        assert all(f"{flag[2:]}" in source for flag in flags), (script, flags)


@pytest.mark.slow
def test_the_package_imports_without_any_extra():
    extras = {
        "faiss",
        "pymilvus",
        "gradio",
        "peft",
        "sentence_transformers",
        "av",
        "pillow_heif",
        "sacrebleu",
        "mteb",
        "fastapi",
        "onnxruntime",
        "py3langid",
        "ctranslate2",
    }  # transformers imports sentencepiece
    # as if they were not installed: the Trainer of transformers imports peft where it is
    code = f"import sys; sys.modules |= dict.fromkeys({extras}); import modeling_nrccr"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
