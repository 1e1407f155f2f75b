"""Writes the results of `docs/demo.json` (a run's metrics.json) into modeling_nrccr/recipes/README.md:

cp outputs/demo/metrics.json docs/demo.json && python -m benchmarks.readme_table
"""

import json

from benchmarks import ROOT
from benchmarks.pages import block, fill


BLOCK = block("results")


def results(report: dict) -> str:
    """Return the table and the sentence above it."""
    from modeling_nrccr.publishing.tables import format_markdown
    from modeling_nrccr.training.run import report_rows

    s, pictures = report["settings"], report["settings"]["pictures"]
    table = format_markdown(report_rows(report))
    return (
        f"{pictures['test']} test pictures that training never saw ({pictures['train']} for training, "
        f"{pictures['validation']} for validation), split by groups of captions; seed {s['seed']}, split seed "
        f"{s['split_seed']}, {s['source_language']} -> {s['language']} by {s['translator']}. t2v: a caption "
        f"finds its picture; v2t: a picture its caption; recalls in percent; SumR is the sum of the six. Fusion: "
        f"{s['translation_weight']:.0%} of the translated query, chosen on validation. Encoders, both frozen: "
        f"{s['text_encoder']} (4-bit weights, dequantised) and {s['vision_encoder']}.\n\n{table}\n"
    )


def main():
    report = json.loads((ROOT / "docs/demo.json").read_text(encoding="utf-8"))
    fill(ROOT / "modeling_nrccr/recipes/README.md", {"results": results(report)})


if __name__ == "__main__":
    main()
