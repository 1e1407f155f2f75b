"""Runs a study: rows x languages x split seeds x training seeds, one JSON a run, then statistics, tables and figures.

    python -m benchmarks.study benchmarks/studies/real.yaml --workers 2

Goes on where it was stopped. Runs are in benchmarks/results/study/<study>/; the ranks of every query and the heads of
teachers are in outputs/study/<study>/. `benchmarks/study/report.py` writes docs/study.md from the JSON alone.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.study.runner import work
from benchmarks.study.spec import Study


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="a YAML file of benchmarks/studies")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs, and the cores")
    args = parser.parse_args()
    study = Study(args.study)
    if args.workers > 1:
        environ = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.workers))}
        command = [sys.executable, "-m", "benchmarks.study", str(args.study)]
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
        from benchmarks.study.statistics import compare

        compare(study)


if __name__ == "__main__":
    main()
