"""What shorter and coarser embeddings cost: SumR of a trained model at each `truncate_dim` and precision of
sentence-transformers.

    python -m benchmarks.embedding_quantisation --model outputs/demo

Writes docs/embedding_quantisation.json and the table of docs/sentence_transformers.md. Human queries of the test
split, over all pictures; ranges of int8 come from the validation split.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import truncate_embeddings
from sentence_transformers.util.quantization import quantize_embeddings

from benchmarks import ROOT
from benchmarks.pages import block, fill
from modeling_nrccr.data.load import load_caption_dataset
from modeling_nrccr.data.trained_split import split_seed
from modeling_nrccr.files import write_file
from modeling_nrccr.loading.encoders import encoder_label
from modeling_nrccr.retrieval.encoding import picture_rows
from modeling_nrccr.retrieval.metrics import compute_retrieval_metrics


RESULTS, PAGE = ROOT / "docs/embedding_quantisation.json", ROOT / "docs/sentence_transformers.md"
BLOCK = block("quantisation")
DIMS = (1024, 512, 256, 128, 64)
PRECISIONS = ("int8", "binary")


def encode(model: SentenceTransformer, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings of the captions and pictures of a split, and the row of each caption's picture."""
    first_rows, owner = picture_rows(rows["image_id"])
    images = rows.select(list(first_rows.values()))["image"]
    texts = model.encode(rows["target_caption"][:], batch_size=64, convert_to_tensor=True)
    return texts.cpu(), model.encode(images[:], batch_size=64, convert_to_tensor=True).cpu(), owner


def as_numbers(codes: np.ndarray, precision: str, dim: int) -> torch.Tensor:
    """Return codes of [`quantize_embeddings`] as the float32 that they stand for in a search, `(num_rows, dim)`: the
    cosine of bits, as 1 and -1, falls with their Hamming distance."""
    if precision == "binary":
        bits = np.unpackbits((codes.astype(np.int16) + 128).astype(np.uint8), axis=-1)[:, :dim]
        codes = 2 * bits.astype(np.float32) - 1
    return torch.from_numpy(codes.astype(np.float32))


def sum_recall(texts: torch.Tensor, images: torch.Tensor, owner: torch.Tensor, way: str = "") -> float:
    """Return the SumR of both ways, or of one: "t2v" or "v2t"."""
    metrics = compute_retrieval_metrics(texts, images, owner)
    return metrics["sum_recall"] if not way else sum(metrics[f"{way}_recall@{k}"] for k in (1, 5, 10))


def measure(test: tuple, validation: tuple, dims: tuple[int, ...]) -> dict[str, dict]:
    """Return SumR and bytes of a vector by width and precision. "rescored": the query stays float32, what is searched
    is quantised, as in a search that ranks its best hits again. `test`, `validation`: of [`encode`]."""
    results = {}
    for dim in dims:
        texts, images, calibration = (
            truncate_embeddings(part, dim).float() for part in (test[0], test[1], torch.cat(validation[:2]))
        )
        owner = test[2]
        found = {"float32": {"sum_recall": sum_recall(texts, images, owner), "bytes": 4 * dim}}
        for precision in PRECISIONS:
            options = {"precision": precision, "calibration_embeddings": calibration.numpy()}
            codes = [quantize_embeddings(part.numpy(), **options) for part in (texts, images)]
            coarse = [as_numbers(part, precision, dim) for part in codes]
            rescored = sum_recall(texts, coarse[1], owner, "t2v") + sum_recall(coarse[0], images, owner, "v2t")
            size = codes[0].nbytes // len(codes[0])
            found[precision] = {"sum_recall": sum_recall(*coarse, owner), "bytes": size}
            found[f"{precision}, rescored"] = {"sum_recall": rescored, "bytes": size}
        results[str(dim)] = found
    return results


def table(report: dict) -> str:
    """Return the page's table: widths, and of each precision SumR and the bytes of a vector."""
    first = next(iter(report["results"].values()))
    full = first["float32"]["sum_recall"]
    lines = ["| `truncate_dim` | " + " | ".join(first) + " |", "| ---: |" + " ---: |" * len(first)]
    for dim, found in report["results"].items():
        cells = [f"{part['sum_recall']:.1f} ({part['bytes']:,} B)" for part in found.values()]
        lines.append(f"| {dim} | " + " | ".join(cells) + " |")
    worst = min(part["sum_recall"] for found in report["results"].values() for part in found.values())
    s = report["settings"]
    return (
        f"SumR and bytes of a vector; {s['pictures']} test pictures of {s['data']}, {s['captions']} human "
        f"{s['language']} queries, one model (seed {s['seed']}, split seed {s['split_seed']}). Nothing lost is "
        f"{full:.1f}, the worst here {worst:.1f}.\n\n" + "\n".join(lines) + "\n"
    )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="outputs/demo", help="folder that `nrccr train` wrote")
    args = parser.parse_args(argv)
    settings = json.loads(Path(args.model, "metrics.json").read_text(encoding="utf-8"))["settings"]
    torch.set_num_threads(1)  # sums in one order
    seed = split_seed(args.model, None)
    splits = load_caption_dataset(settings["data"], settings["language"], seed)
    model = SentenceTransformer(args.model, device="cpu", trust_remote_code=True)
    test, validation = encode(model, splits["test"]), encode(model, splits["validation"])
    dims = tuple(dim for dim in DIMS if dim <= test[0].shape[1])
    report = {
        "results": measure(test, validation, dims),
        "settings": {
            "model": encoder_label(args.model),
            "data": settings["data"],
            "split_seed": seed,
            "language": settings["language"],
            "seed": settings["seed"],
            "captions": len(test[0]),
            "pictures": len(test[1]),
            "sentence_transformers": sentence_transformers.__version__,
        },
    }
    write_file(RESULTS, json.dumps(report, indent=1) + "\n")
    fill(PAGE, {"quantisation": table(report)})
    print(table(report))


if __name__ == "__main__":
    main()
