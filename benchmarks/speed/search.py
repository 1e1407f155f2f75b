"""Search in faiss galleries of up to a million embeddings: recall, time, memory, and what our search adds to faiss's:

    python -m benchmarks.speed.search

The embeddings are drawn, not encoded: 512 numbers, a cluster for every 100 rows, each row a cluster's centre plus
noise that is `--noise` times as long (1: a cosine of 0.5 within a cluster; 2: 0.2, hardly above the best of others);
queries are drawn likewise. A process for each size, so memory is its own.
"""

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import psutil
import torch

from benchmarks.machine import SPEED, save_report
from modeling_nrccr import NrccrRetriever


DIM, ROWS_A_CLUSTER, K = 512, 100, 10


def draw(rows: int, clusters: int, noise: float, seed: int) -> np.ndarray:
    """Draw L2-normalised rows of shape `(rows, DIM)`, of clusters that depend on their number alone."""
    centers = np.random.default_rng(0).standard_normal((clusters, DIM), dtype=np.float32)
    generator = np.random.default_rng(seed)
    found = np.empty((rows, DIM), dtype=np.float32)
    for start in range(0, rows, 10_000):
        block = found[start : start + 10_000]
        block[:] = centers[generator.integers(0, clusters, len(block))]
        block += noise * generator.standard_normal(block.shape, dtype=np.float32)
        faiss.normalize_L2(block)
    return found


def recall(found: list[list[int]], exact: np.ndarray) -> float:
    return round(sum(len(set(ours) & set(right.tolist())) for ours, right in zip(found, exact)) / exact.size, 4)


def milliseconds(samples: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(samples, [50, 99]) * 1000
    return {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}


def measure(rows: int, num_queries: int, nprobe: int, noise: float, threads: int) -> dict:
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    clusters = rows // ROWS_A_CLUSTER
    embeds, queries = draw(rows, clusters, noise, seed=1), draw(num_queries, clusters, noise, seed=2)
    _, exact = faiss.knn(queries, embeds, K, metric=faiss.METRIC_INNER_PRODUCT)
    memory = psutil.Process().memory_info
    before, started = memory().rss, time.perf_counter()
    retriever = NrccrRetriever(SimpleNamespace(config=SimpleNamespace(projection_dim=DIM)), None, nprobe=nprobe)
    retriever.add_embeds(
        torch.from_numpy(embeds), range(rows), [{"path": f"gallery/{row:07d}.jpg"} for row in range(rows)]
    )
    index, build = retriever.index, time.perf_counter() - started
    result = {
        "rows": rows,
        "noise": noise,
        "index": type(faiss.downcast_index(index.vectors)).__name__,
        "build_s": round(build, 1),
        "memory_mb": round((memory().rss - before) / 1e6),
        "embeddings_mb": round(embeds.nbytes / 1e6),
    }
    if index.trained_rows:
        result |= {"nlist": index.vectors.nlist, "nprobe": nprobe}
    del embeds
    for query in queries[:20]:
        retriever.search(torch.from_numpy(query), K)
    times, found = {"search": [], "faiss": []}, []
    for number, query in enumerate(queries):
        tensor = torch.from_numpy(query)

        def ours(tensor=tensor):
            found.append([hit.id for hit in retriever.search(tensor, K)])

        def raw(query=query):
            index.vectors.search(query[None], K)

        # in turns, so that neither finds the cache warm by the other more often
        for name, call in [("search", ours), ("faiss", raw)][:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    hits = recall(found, exact)
    if index.trained_rows:
        result["by_nprobe"] = {}
        for lists in (16, 64, 256):
            index.vectors.nprobe, samples, rough = lists, [], []
            for query in queries:
                started = time.perf_counter()
                rough.append(index.vectors.search(query[None], K)[1][0].tolist())
                samples.append(time.perf_counter() - started)
            result["by_nprobe"][lists] = {"recall@10": recall(rough, exact), **milliseconds(samples)}
    started = time.perf_counter()
    filtered = retriever.search(torch.from_numpy(queries[0]), K, {"path": "gallery/0000007.jpg"})
    first_filter = time.perf_counter() - started
    assert [hit.id for hit in filtered] == [7]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        index.save(folder)
        saved = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        started = time.perf_counter()
        type(index).load(folder)
        loaded = time.perf_counter() - started
    return result | {
        "recall@10": hits,
        "search": milliseconds(times["search"]),
        "faiss": milliseconds(times["faiss"]),
        "ratio_p50": round(np.median(times["search"]) / np.median(times["faiss"]), 3),
        "first_filtered_search_s": round(first_filter, 2),
        "save_s": round(saved, 1),
        "load_s": round(loaded, 1),
        "disk_mb": round(size / 1e6),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--nprobe", type=int, default=64, help="lists looked through, above 100,000 rows")
    parser.add_argument("--noise", type=float, nargs="+", default=[1.0, 2.0], help="of a centre's length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=str(SPEED), help='"-" prints one size')
    args = parser.parse_args(argv)
    if args.output == "-":
        print(json.dumps(measure(args.rows[0], args.queries, args.nprobe, args.noise[0], args.threads)))
        return
    results = []
    for rows, noise in itertools.product(args.rows, args.noise):
        settings = {name: getattr(args, name) for name in ("queries", "nprobe", "threads")}
        settings |= {"rows": rows, "noise": noise, "output": "-"}
        command = [sys.executable, "-m", __spec__.name, *(f"--{name}={value}" for name, value in settings.items())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    report = {
        "machine": {"processor": processor(), "cores": psutil.cpu_count(), "load_average": psutil.getloadavg()[0]},
        "versions": {"faiss": faiss.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "settings": {
            "dim": DIM,
            "k": K,
            "rows_a_cluster": ROWS_A_CLUSTER,
            "queries": args.queries,
            "threads": args.threads,
        },
        "results": results,
    }
    save_report(args.output, "search", report)
    print(table(report))


def table(report: dict) -> str:
    """Return the results as Markdown, for docs/retriever.md."""
    lines = [
        "| rows | noise | recall@10 | p50 / p99, ms | raw faiss p50 / p99, ms | ratio of p50 | build, s | memory, MB "
        "| load, s |",
        "| ---: " * 9 + "|",
    ]
    for row in report["results"]:
        times = (f"{row[name]['p50_ms']:.2f} / {row[name]['p99_ms']:.1f}" for name in ("search", "faiss"))
        cells = (f"{row['rows']:,}", f"{row['noise']:g}", f"{row['recall@10']:.3f}", *times, f"{row['ratio_p50']:.2f}")
        cells += (f"{row['build_s']:.0f}", f"{row['memory_mb']:,}", f"{row['load_s']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
