"""Runs a study: rows x languages x split seeds x training seeds, one line a run, then means, intervals, comparisons.

    python -m benchmarks.study benchmarks/studies/real.yaml --workers 2
    python -m benchmarks.study benchmarks/studies/real.yaml --rows human,demo --split_seeds 0 --results outputs/again

Goes on where it was stopped. Runs are lines of benchmarks/results/STUDY.jsonl; the ranks of every query and the heads
of teachers are in outputs/study/STUDY. `python -m benchmarks.study.report` writes docs/study.md from the lines alone.

The second command runs some rows again, and the teachers that they need, into a folder of their own, and prints what
they find beside what is committed. Their point of the grid is the committed one.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.study.runner import work
from benchmarks.study.spec import Study, runs_of
from benchmarks.study.statistics import compare


def beside_committed(study: Study) -> str:
    """Return a line a run: SumR of human target queries, and what is committed."""
    committed, lines = runs_of(study.committed), []
    for run in study.runs():
        found, before = (
            f"{record['test']['target']['all']['sum_recall']:.1f}" if record else "none"
            for record in (study.find(run), committed.get(run))
        )
        lines.append(f"{run.name}: SumR {found}, committed {before}")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    description, usage = __doc__.split("\n\n", 1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=usage, formatter_class=raw)
    parser.add_argument("study", type=Path, help="a YAML file of benchmarks/studies")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs, and the cores")
    parser.add_argument("--rows", help="only these, joined by commas; needs --results")
    parser.add_argument("--split_seeds", help="only these, joined by commas; needs --results")
    parser.add_argument("--results", type=Path, help="folder for the results and all else, beside what is committed")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    rows, seeds = (given.split(",") if given else None for given in (args.rows, args.split_seeds))
    if (rows or seeds) and args.results is None:
        parser.error("--rows and --split_seeds leave out what is committed: name another folder by --results FOLDER")
    try:
        study = Study(args.study, args.results, rows, seeds and [int(seed) for seed in seeds])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.workers > 1:
        environ = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.workers))}
        command = [sys.executable, "-m", "benchmarks.study", *argv, "--workers=1"]
        workers = [subprocess.Popen(command, env=environ | {"NRCCR_STUDY_WORKER": "1"}) for _ in range(args.workers)]
        try:
            if any([worker.wait() for worker in workers]):
                sys.exit("a worker failed: see above; what was run stays")
        finally:
            for worker in workers:
                worker.terminate()
    else:
        work(study)
    if "NRCCR_STUDY_WORKER" not in os.environ:
        compare(study)
        if args.results:
            print(beside_committed(study))
        print(f"{study.file} has every run, and their summary")


if __name__ == "__main__":
    main()
