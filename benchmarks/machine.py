"""What this machine can do, and how the sides of a benchmark are measured on it: in own processes, in turns."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import records


SPEED = records.RESULTS / "speed.jsonl"


def device() -> torch.device:
    """Return the accelerator, where there is one; else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def clock() -> float:
    """Return the seconds of a clock, when all that was asked of the device is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def best_time(call: Callable, repeats: int = 3) -> float:
    """Return the seconds of the fastest of some calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def matmul_rate(width: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the operations a second of the matrix products that a Transformer of that width is made of, of shape
    `(rows, width)` by `(width, 4 * width)`, as many rows as fill the device. The floor of everything that computes."""
    rows = 1024 if device().type == "cpu" else 65_536
    a, b = (torch.randn(size, width, dtype=dtype, device=device()) for size in (rows, 4 * width))
    return 2 * rows * width * 4 * width / best_time(lambda: a @ b.t(), 20)


def peak_rate(dtype: torch.dtype = torch.float32) -> float:
    """Return the operations a second of a product large enough for any device: what model FLOPs utilisation is
    measured against (a datasheet promises more)."""
    size = 2048 if device().type == "cpu" else 8192
    a, b = torch.randn(2, size, size, dtype=dtype, device=device())
    return 2 * size**3 / best_time(lambda: a @ b, 10)


def bandwidth() -> float:
    """Return the bytes a second of a copy that no cache holds, read and written. The floor of everything that
    moves."""
    a, b = torch.randn(2, 64_000_000, device=device())
    return 2 * a.nbytes / best_time(lambda: b.copy_(a))


def encoder_operations(lengths: torch.Tensor, width: int, layers: int) -> float:
    """Count the operations of the matrix products of a forward pass of a BERT over texts of such lengths in tokens,
    without padding."""
    tokens = lengths.double()
    return float((2 * 12 * width**2 * layers * tokens + 4 * width * layers * tokens**2).sum())


def rates(seconds: float, lengths: torch.Tensor, operations: float, width: int, dtype: torch.dtype) -> dict:
    """Return how fast texts of such lengths in tokens went through an encoder of that width, and what the device
    allows."""
    return {
        "floor_seconds": operations / matmul_rate(width, dtype),
        "tokens_per_second": round(int(lengths.sum()) / seconds),
        "utilisation": round(operations / seconds / peak_rate(dtype), 4),
    }


def machine() -> dict:
    flags = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    try:
        with open("/proc/cpuinfo") as file:
            has = set(file.read().split())
    except OSError:
        has = set()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {', '.join(flag for flag in flags if flag in has)}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else str(device()),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


def save_report(path: str | Path, name: str, report: dict):
    """Write a report as a line of a file; what an accelerator gave stays apart from what a CPU did."""
    records.put(Path(path), {"report": on_device(name)} | report, ("report",))


def load_report(path: Path, name: str) -> dict:
    """Return the report of that name. Raises LookupError where there is none."""
    for record in records.read(path):
        if record["report"] == name:
            return {key: value for key, value in record.items() if key != "report"}
    raise LookupError(f"{path} has no report {name!r}")


def on_device(name: str) -> str:
    return name if device().type == "cpu" else f"gpu {name}"


def peak_gigabytes() -> float:
    """Return the peak memory in GB of this process since it began, on the accelerator where there is one. (`ru_maxrss`
    would count what the process that started it held.)"""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def in_turns(module: str, sides: list[str], rounds: int = 2, arguments: tuple[str, ...] = ()) -> dict[str, dict]:
    """Run `python -m MODULE --side SIDE` for each side, round after round, so that what slows the machine slows all;
    each prints JSON with `seconds` as its last line. Return of each side its fastest run, with the largest
    `peak_gb`."""
    results = {}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, "-m", module, "--side", side, *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            result = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{side}: {result['seconds']:.2f} s, peak {result['peak_gb']:.2f} GB", flush=True)
            before = results.get(side, result)
            faster = min(before, result, key=lambda found: found["seconds"])
            results[side] = faster | {"peak_gb": max(before["peak_gb"], result["peak_gb"])}
    return results
