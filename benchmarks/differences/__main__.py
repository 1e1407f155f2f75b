"""Measures what each repair of the released behaviour changes, and writes it into docs/differences.md:

    python -m benchmarks.differences                  # prints the cheap effects, seconds
    python -m benchmarks.differences --all --write    # trains and times too, a minute; rewrites the last column

Seeded, on random weights; "published -> here" in each line. Models are small: the effects show that a difference is
there, not how large it is in a trained model.
"""

import argparse
import re
import sys
import time

from benchmarks import ROOT
from benchmarks.differences import architecture, evaluation, losses, training  # noqa: F401  (they register)
from benchmarks.differences.effects import COSTLY, EFFECTS


PAGE = ROOT / "docs/differences.md"


def write(page: str, results: dict[str, str]) -> str:
    """Return the page with the last cell of each row replaced."""
    for row, result in results.items():
        pattern = re.compile(rf"(?m)^(\| {re.escape(row)} \|.*\| )[^|\n]*\|$")
        page, count = pattern.subn(lambda match, result=result: f"{match[1]}{result} |", page)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} rows that begin with {row!r}, not one")
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="train and time too")
    parser.add_argument("--write", action="store_true", help="write the results into docs/differences.md")
    options = parser.parse_args()
    results = {}
    for row, measure in EFFECTS.items():
        if row in COSTLY and not options.all:
            continue
        start = time.perf_counter()
        result = measure()
        if result is None:
            print(f"{row}: not measured, its data is not there", file=sys.stderr)
            continue
        results[row] = result
        print(f"{row}: {result} ({time.perf_counter() - start:.1f} s)")
    if options.write:
        PAGE.write_text(write(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
