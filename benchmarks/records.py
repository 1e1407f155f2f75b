"""Results as JSON lines: a file a study, a line a run."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from modeling_nrccr.files import write_file, writing


RESULTS = ROOT / "benchmarks/results"
PATIENCE = 60  # seconds for another process to write its line


def read(path: Path) -> list[dict]:
    """Return the records of a file, in its order; none where it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def put(path: Path, record: dict, key: Sequence[str]):
    """
    Write a record into a file, in the place of the one that has the same values of `key`, else at its end. The other
    lines stay as they are, and whole, whatever fails.

    Raises:
        TimeoutError: another process writes in the folder, and does not end.
    """
    with writing(path.parent, PATIENCE):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        mine = [record.get(name) for name in key]
        found = (number for number, line in enumerate(lines) if [json.loads(line).get(name) for name in key] == mine)
        at = next(found, len(lines))
        lines[at : at + 1] = [json.dumps(record, ensure_ascii=False)]
        write_file(path, "\n".join(lines) + "\n")
