"""Twenty rounds each of what may happen to a run; see `torture.py`, which can be run by itself."""

import re
import subprocess
import sys

import pytest


ROUNDS = 20


@pytest.mark.slow
def test_every_round_is_survived():
    command = [sys.executable, "-m", "tests.torture.torture", "--rounds", str(ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = re.findall(rf"^(.+): survived {ROUNDS} of {ROUNDS} ", done.stdout, re.MULTILINE)
    assert len(lines) == 2 + 2 * 4, done.stdout
