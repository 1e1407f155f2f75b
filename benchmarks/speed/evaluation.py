"""Our metrics beside the bare similarity product, and beside `torchmetrics` and `ranx` where these can be run:

    pip install -c constraints.txt -e ".[benchmarks]"
    python -m benchmarks.speed.evaluation --output benchmarks/results/speed.jsonl

5,000 pictures x 25,000 captions (COCO's test), both directions, all metrics, fused queries too; CPU time, and memory
above what the embeddings take. torchmetrics gets 1,000 captions of them, ranx 100: they take minutes and gigabytes for
all. `--large` adds 50,000 x 250,000. Embeddings are drawn: speed does not depend on what they mean.
"""

import argparse
import json
import time
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks.machine import clock, device, in_turns, machine, peak_gigabytes, save_report


DIM = 512
SIZES = {"": (5_000, 25_000), "large ": (50_000, 250_000)}
FEW = {name: count for name, count in (("torchmetrics", 1_000), ("ranx", 100)) if find_spec(name)}


def draw(pictures: int, captions: int) -> tuple[torch.Tensor, ...]:
    """Return pictures, captions near them, their translations, and the picture of each caption."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(pictures, DIM, generator=generator), dim=-1)
    owner = torch.arange(captions) % pictures
    noise = torch.randn(2, captions, DIM, generator=generator) / DIM**0.5
    texts, sources = (F.normalize(images[owner] + 8 * part, dim=-1) for part in noise)
    return texts, sources, images, owner


def cpu_seconds(call) -> tuple[float, object]:
    """Return the seconds of all cores, or of the accelerator that the embeddings are on, and the result."""
    now = time.process_time if device().type == "cpu" else clock
    start = now()
    result = call()
    return now() - start, result


def side(name: str) -> dict:
    from modeling_nrccr.retrieval.metrics import compute_retrieval_metrics, fuse_query_embeds

    size, _, what = name.rpartition(" ")
    drawn = draw(*SIZES[f"{size} " if size == "large" else ""])
    texts, sources, images, owner = (part.to(device()) for part in drawn)
    if what.startswith(("torchmetrics", "ranx")) or size in FEW:
        count = FEW[size or what]
        texts, owner = texts[:count], owner[:count]
    before = peak_gigabytes()
    if device().type != "cpu":
        texts @ images.T  # starts the library
    if what == "product":
        rows = 2**21 // len(images)  # in the chunks of our metrics: all of it would be half a gigabyte, or fifty
        seconds, _ = cpu_seconds(lambda: [None for part in texts.split(rows) if part @ images.T is None])
        found = {}
    elif what == "metrics":
        seconds, found = cpu_seconds(lambda: compute_retrieval_metrics(texts, images, owner))
    elif what == "fused":
        seconds, found = cpu_seconds(
            lambda: compute_retrieval_metrics(fuse_query_embeds(texts, sources, 0.3), images, owner)
        )
    elif what == "torchmetrics":
        seconds, found = cpu_seconds(lambda: by_torchmetrics(texts, images, owner))
    else:
        by_ranx(texts[:2], images[:9], owner[:2] % 9)  # numba compiles once
        seconds, found = cpu_seconds(lambda: by_ranx(texts, images, owner))
    return {"seconds": seconds, "peak_gb": peak_gigabytes(), "more_gb": peak_gigabytes() - before, "found": found}


def by_torchmetrics(texts, images, owner) -> dict[str, float]:
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR

    scores = texts @ images.T
    relevant = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, owner[:, None], True)
    indexes = torch.arange(len(texts), device=texts.device)[:, None].expand_as(scores)
    found = {}
    metrics = {f"t2v_recall@{k}": RetrievalHitRate(top_k=k) for k in (1, 5, 10)} | {"t2v_map": RetrievalMRR()}
    for name, metric in metrics.items():
        value = metric(scores.flatten(), relevant.flatten(), indexes=indexes.flatten()).item()
        found[name] = value if name == "t2v_map" else 100 * value
    return found


def by_ranx(texts, images, owner) -> dict[str, float]:
    from ranx import Qrels, Run, evaluate

    scores = (texts @ images.T).cpu().numpy()
    names = [str(number) for number in range(len(images))]
    run = Run({str(q): dict(zip(names, map(float, row))) for q, row in enumerate(scores)})
    qrels = Qrels({str(q): {str(int(image)): 1} for q, image in enumerate(owner)})
    measures = {
        "t2v_recall@1": "hit_rate@1",
        "t2v_recall@5": "hit_rate@5",
        "t2v_recall@10": "hit_rate@10",
        "t2v_map": "mrr",
    }
    found = evaluate(qrels, run, list(measures.values()))
    return {name: found[measure] * (1 if name == "t2v_map" else 100) for name, measure in measures.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--output", help="file of JSON lines that gets the report")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args.side)))
        return
    report = machine()
    report["versions"] |= {name: version(name) for name in FEW}
    sides = ["product", "metrics", "fused", *(f"{peer} metrics" for peer in FEW), *FEW]
    found = in_turns(__spec__.name, sides, args.rounds)
    report["evaluation"] = {
        "over_product": round(found["metrics"]["seconds"] / found["product"]["seconds"], 2),
        "fused_over_product": round(found["fused"]["seconds"] / found["product"]["seconds"], 2),
        "more_gb": round(found["fused"]["more_gb"], 2),
    }
    for peer, count in FEW.items():
        ours, theirs = found[f"{peer} metrics"], found[peer]
        differences = [abs(ours["found"][name] - value) for name, value in theirs["found"].items()]
        report["evaluation"][peer] = {
            "captions": count,
            "ratio": round(ours["seconds"] / theirs["seconds"], 4),
            "memory_ratio": round(ours["peak_gb"] / theirs["peak_gb"], 3),
            "largest_difference": max(differences),
        }
    if args.large:
        large = in_turns(__spec__.name, ["large product", "large metrics"], 1)
        report["evaluation"]["large"] = {
            "over_product": round(large["large metrics"]["seconds"] / large["large product"]["seconds"], 2),
            "more_gb": round(large["large metrics"]["more_gb"], 2),
        }
        found |= large
    report["evaluation"]["sides"] = found
    print(json.dumps(report["evaluation"], indent=1))
    if args.output:
        save_report(args.output, "evaluation", report)


if __name__ == "__main__":
    main()
