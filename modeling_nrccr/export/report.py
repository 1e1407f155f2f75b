"""What an export costs and finds: size, latency, and the same test by each engine."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from ..data.load import load_caption_dataset
from ..data.trained_split import check_unseen, source_captions, split_seed
from ..processing_nrccr import NrccrProcessor
from ..publishing.tables import markdown_table
from ..retrieval.evaluation import evaluate_dataset
from .sides import Side


SUFFIXES = {"onnx": "", "onnx int8": ".int8"}  # of files, by engine
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int = 40) -> dict[str, float]:
    """Return the median of each; they take turns, so that what else the machine does slows down all alike."""
    times = {name: [] for name in calls}
    for _ in range(repeats + 3):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(each[3:]) for name, each in times.items()}


@torch.no_grad()
def measure(sides: list[Side], folder: Path, engines: dict[str, nn.Module]) -> list[dict]:
    """Return size, and latency of one input and of 32 (texts of 12 tokens), of each side in torch and each engine,
    which has `embed(side, inputs)` and the `suffix` of its files."""
    rows = []
    for side in sides:
        sizes, ways = {"torch": sum(p.nbytes for p in side.module.parameters())}, {"torch": side.embed}
        for engine, onnx in engines.items():
            sizes[engine] = sum(path.stat().st_size for path in folder.glob(f"{side.name}{onnx.suffix}.onnx*"))
            ways[engine] = partial(onnx.embed, side.name)
        one, many = (side.draw(size, 12, torch.Generator().manual_seed(0)) for size in (1, 32))
        ms_1, ms_32 = (milliseconds({k: partial(embed, x) for k, embed in ways.items()}) for x in (one, many))
        for engine, size in sizes.items():
            times = {"ms_1": ms_1[engine], "ms_32": ms_32[engine]}
            rows.append({"side": side.name, "engine": engine, "megabytes": size / 1e6} | times)
    return rows


def count_found(
    name: str,
    models: dict[str, nn.Module],
    processor: NrccrProcessor,
    data: str,
    language: str,
    data_dir: str | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Return the SumR of the human test captions of `data` in `language`, by model; `name`: folder of the trained
    one. Raises ValueError where it was trained on these captions."""
    options = {"data_dir": data_dir} if data_dir else {}
    test = load_caption_dataset(data, language, split_seed(name, None, data), **options)["test"]
    check_unseen(name, source_captions(test), f"the test of {data}")
    found = {}
    for engine, model in models.items():
        result = evaluate_dataset(model, processor, test, batch_size=batch_size, show_progress=False)
        found[engine] = result["all"]["metrics"]["sum_recall"]
    return found


def machine() -> dict:
    """Return the CPU, its load, and the versions of what took part."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": (names or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in PACKAGES},
    }


def format_report(report: dict) -> str:
    """Return a report of `export_onnx` as Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    head = ["", "MB", "one, ms", "32, ms", "largest difference", "lowest cosine"]
    lines = []
    for row in report["rows"]:
        found = report["compared"].get(f"{row['side']}{SUFFIXES.get(row['engine'])}.onnx")
        found = [f"{found['max_difference']:.0e}", f"{found['min_cosine']:.4f}"] if found else ["", ""]
        numbers = [f"{row['megabytes']:.0f}", f"{row['ms_1']:.1f}", f"{row['ms_32']:.0f}"]
        lines.append([f"{row['side']}, {row['engine']}", *numbers, *found])
    parts = [markdown_table(head, lines)]
    parts.append(
        f"\n{machine['cpu']}, {machine['cores']} cores (load average {machine['load_average']}), "
        f"{machine['threads']} thread(s); {versions}."
    )
    if report["sum_recall"]:
        values = ", ".join(f"{engine} {value:.1f}" for engine, value in report["sum_recall"].items())
        parts.append(f"SumR of {report['data']}, human {report['query_language']} queries: {values}.")
    return "\n".join(parts)
