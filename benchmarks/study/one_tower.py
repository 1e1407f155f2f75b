"""Adds Galician to the demo's English-only base, with and without its English captions and words taught beside it, and
says what human Galician and human English find through the one text side.

    python -m benchmarks.study.one_tower                  # trains and tests; goes on where it was stopped
    python -m benchmarks.study.one_tower --rows switched  # one of them

Needs outputs/demo-base (`make demo`). What was run is a line of benchmarks/results/one_tower.jsonl. One split and one
seed: what is seen here is a hint, and no reason for a default.
"""

import argparse
import time
from pathlib import Path

from benchmarks import ROOT, records
from benchmarks.machine import machine


WORK, RESULTS = ROOT / "outputs/one_tower", records.RESULTS / "one_tower.jsonl"
BASE, SPLIT, SEED = ROOT / "outputs/demo-base", 0, 0
SAME = {
    "recipe": "recommended",
    "data": "tuxpaint+cldr_emoji",
    "language": "gl",
    "translator": "apertium,apertium+es+apertium",
    "lexicon": "wordnet:5000",
    "split_seed": SPLIT,
    "seed": SEED,
    "num_train_epochs": 2,
}
ROWS = {
    "switched": ("recommended.yaml, the language is switched on", {"source_anchor": "none"}),
    "anchor": ("the same, English captions and words beside it", {"source_anchor": "both"}),
}


def run(row: str, base: Path) -> dict:
    """Train a row; return what it finds, each with its interval."""
    from modeling_nrccr.training.add_language import add_language

    label, own = ROWS[row]
    start = time.perf_counter()
    report = add_language(str(base), **SAME, **own, output_dir=str(WORK / f"{row}-{SPLIT}"))
    found = {
        name: {
            "sum_recall": round(metrics["sum_recall"], 2),
            "interval": [round(bound, 2) for bound in metrics["intervals"]["sum_recall"]],
        }
        for name, metrics in report["found"].items()
    }
    return {
        "row": row,
        "label": label,
        "settings": SAME | own,
        "split_seed": SPLIT,
        "seed": SEED,
        "steps": report["steps"],
        "seconds": round(time.perf_counter() - start),
        "queries": report["queries"],
        "groups": report["groups"],
        "verdict": report["verdict"],
        "reasons": report["reasons"],
        "found": found,
        "machine": machine(),
    }


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", nargs="?", type=Path, default=BASE, help="the demo's English-only base")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    args = parser.parse_args(argv)
    done = {result["row"] for result in records.read(RESULTS)}
    for row in args.rows:
        if row not in done:
            records.put(RESULTS, run(row, args.base), ("row", "split_seed", "seed"))


if __name__ == "__main__":
    main()
