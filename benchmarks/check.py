"""Runs the speed benchmarks again and fails where a ratio is 20 % worse than the committed one: by hand, or nightly.

    python -m benchmarks.check --captions ../shared/data/multi30k

Ratios of two sides measured in turns, so that the machine's own speed cancels; on another kind of machine they differ
all the same, and are to be measured and committed there first.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import SPEED, load_report, on_device


RATIOS = ("ratio", "memory_ratio", "over_product", "over_floor")  # of each, less is better
TOLERANCE = 1.2


def ratios(report: dict, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every ratio of a report, by the names that lead to it."""
    for name, value in report.items():
        if isinstance(value, dict):
            yield from ratios(value, f"{path}{name}.")
        elif name in RATIOS:
            yield path + name, value


def worse(committed: dict, measured: dict) -> list[str]:
    """Return what is more than 20 % worse, or was not measured."""
    found, complaints = dict(ratios(measured)), []
    for name, before in ratios(committed):
        if name not in found:
            complaints.append(f"{name} was not measured")
        elif found[name] > TOLERANCE * before:
            complaints.append(f"{name} is {found[name]:.3f}, committed {before:.3f}")
    return complaints


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--captions", help="folder of Multi30K's text; downloaded where not given")
    parser.add_argument("--only", choices=("encode", "training", "evaluation"))
    args = parser.parse_args()
    complaints = []
    for name in ("encode", "training", "evaluation"):
        if args.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch, "report.jsonl")
            command = [sys.executable, "-m", f"benchmarks.speed.{name}", "--output", str(output)]
            if name == "encode" and args.captions:
                command += ["--captions", args.captions]
            subprocess.run(command, check=True)
            committed, measured = (load_report(path, on_device(name)) for path in (SPEED, output))
            committed.get("evaluation", {}).pop("large", None)  # takes too long for a check
            complaints += [f"{name}: {line}" for line in worse(committed, measured)]
    if complaints:
        sys.exit("slower than committed:\n" + "\n".join(complaints))
    print("no ratio is more than 20 % worse than the committed one")


if __name__ == "__main__":
    main()
