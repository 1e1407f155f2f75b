import json
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
