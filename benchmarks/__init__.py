"""Speed and quality, measured. Each is a command, run from a checkout: `python -m benchmarks.study STUDY`."""

from pathlib import Path


ROOT = Path(__file__).parent.parent
