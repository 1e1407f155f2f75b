"""Measure a trained model on the human captions of a data set, both directions, beside chance:

    python examples/evaluate_retrieval.py --model outputs/demo --dataset tuxpaint+cldr_emoji --target gl --split test \
        --output metrics.json
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from data import load_caption_dataset
from datasets import Dataset
from search import load_model
from table import format_table

from datasets_scripts.debian import FetchError
from modeling_nrccr import NrccrModel, NrccrProcessor, encode_images, encode_texts
from modeling_nrccr.metrics import chance_metrics, compute_retrieval_metrics


def evaluate_dataset(
    model: NrccrModel,
    processor: NrccrProcessor,
    dataset: Dataset,
    caption_column: str = "target_caption",
    batch_size: int = 64,
    show_progress: bool = True,
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Metrics of one split, over all pictures and over each source apart, as [`metrics_by_source`] returns them.

    Args:
        dataset: rows with `image_id`, `image` and `caption_column`; several captions may share an `image_id`.

    Raises:
        ValueError: if the split is empty or a caption is missing; names the row.
    """
    captions, image_ids = list(dataset[caption_column]), list(dataset["image_id"])
    for row, caption in enumerate(captions):
        if not caption or not caption.strip():
            raise ValueError(f"Row {row} ({image_ids[row]}) has no {caption_column}: {caption!r}.")
    if not captions:
        raise ValueError("The split has no rows to evaluate.")
    first_rows = {}
    for row, image_id in enumerate(image_ids):
        first_rows.setdefault(image_id, row)
    numbers = {image_id: number for number, image_id in enumerate(first_rows)}
    text_embeds = encode_texts(model, captions, processor, batch_size, show_progress)
    pictures = dataset.select(list(first_rows.values()))["image"]  # a column decodes what is sliced from it
    image_embeds = encode_images(model, pictures, processor, batch_size, show_progress)
    caption_to_image = torch.tensor([numbers[image_id] for image_id in image_ids])
    return metrics_by_source(list(first_rows), text_embeds, image_embeds, caption_to_image)


def metrics_by_source(
    image_ids: list[str], text_embeds: torch.Tensor, image_embeds: torch.Tensor, caption_to_image: torch.Tensor
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Metrics over all pictures, and over the captions and pictures of each source alone.

    Args:
        image_ids: one for each row of `image_embeds`; what stands before the first "/" names the source.
        text_embeds, image_embeds, caption_to_image: as for [`compute_retrieval_metrics`].

    Returns:
        `{"all": {"metrics": ..., "chance": ..., "counts": {"captions": ..., "images": ...}}}`, and the same under the
        name of each source if there are several; names of [`compute_retrieval_metrics`].
    """
    sources = [image_id.rpartition("/")[0].partition("/")[0] for image_id in image_ids]
    groups = {"all": [True] * len(sources)}
    if len(set(sources)) > 1:
        groups |= {name: [source == name for source in sources] for name in sorted(set(sources)) if name}
    results = {}
    for name, members in groups.items():
        images = torch.tensor(members)
        captions = images[caption_to_image]
        owner = (images.cumsum(0) - 1)[caption_to_image[captions]]  # row numbers among the members
        counts = {"captions": int(captions.sum()), "images": int(images.sum())}
        results[name] = {
            "metrics": compute_retrieval_metrics(text_embeds[captions], image_embeds[images], owner),
            "chance": chance_metrics(*counts.values(), owner),
            "counts": counts,
        }
    return results


def split_seed(model: str, seed: int | None) -> int:
    """
    The seed of the split that the model was trained with, as the `metrics.json` beside it tells.

    Raises:
        ValueError: for another `seed`, which would put pictures of the training set into the test.
    """
    record = Path(model) / "metrics.json"
    if not record.is_file():
        seed = seed or 0
        print(f"{record} is not there; assuming that the model was trained with split seed {seed}", file=sys.stderr)
        return seed
    settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    trained = settings["split_seed"] if "split_seed" in settings else settings["seed"]
    if seed not in (None, trained):
        raise ValueError(
            f"{model} was trained with split seed {trained}: with --seed {seed} the test would hold pictures of the "
            f"training set. Leave --seed out, or train with --split_seed {seed}."
        )
    return trained


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="outputs/demo", help="folder or hub id of a trained model")
    parser.add_argument("--dataset", default="tuxpaint+cldr_emoji", help='builders, joined by "+"')
    parser.add_argument("--target", default="gl", help="language of the queries")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, help="of the split; default: the one that the model was trained with")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", help="write the numbers to this JSON file")
    args = parser.parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError, FetchError) as error:  # what a user can put right: a line without a traceback
        sys.exit(f"error: {error}")


def evaluate(args: argparse.Namespace):
    model, processor = load_model(args.model)
    seed = split_seed(args.model, args.seed)
    splits = load_caption_dataset(args.dataset, args.target, seed)
    if args.split not in splits:
        raise ValueError(f"No split {args.split!r}; there are {', '.join(splits)}.")
    results = evaluate_dataset(model, processor, splits[args.split], batch_size=args.batch_size)

    table = {}
    for name, result in results.items():
        table["{}: {captions} captions, {images} pictures".format(name, **result["counts"])] = result["metrics"]
        table[f"{name}: chance"] = result["chance"]
    print(f"\n{args.model}: {args.split} split of {args.dataset}, human {args.target} queries, split seed {seed}\n")
    print(format_table(table))
    if args.output:
        settings = {key: getattr(args, key) for key in ("model", "dataset", "target", "split")} | {"split_seed": seed}
        report = {}
        for name, result in results.items():
            suffix = "" if name == "all" else f"_{name}"
            report |= {f"{args.split}{suffix}": result["metrics"], f"chance{suffix}": result["chance"]}
        report |= {"counts": {name: result["counts"] for name, result in results.items()}, "settings": settings}
        temporary = Path(f"{args.output}.{os.getpid()}")
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, args.output)
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
