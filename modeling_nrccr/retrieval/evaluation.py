"""Measure a trained model on the human captions of a data set, both directions, beside chance:

    python examples/evaluate_retrieval.py --model outputs/demo --dataset tuxpaint+cldr_emoji --target gl --split test \
        --output metrics.json

In several languages, with their mean and the worst one:

    python examples/evaluate_retrieval.py --model outputs/demo --dataset xm3600 --data_dir xm3600 --target all

With a language of add_language.py:

    python examples/evaluate_retrieval.py --model outputs/english --language gl=outputs/gl --target gl
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial

import torch
from datasets import Dataset
from transformers import BatchFeature

from datasets_scripts.reading.videos import read_frames

from ..cli.common import command
from ..data.collator import MEDIA_COLUMNS, DataCollatorForCrossLingualRetrieval
from ..data.load import dataset_languages, load_caption_dataset
from ..data.trained_split import check_unseen, source_captions, split_seed
from ..files import write_file
from ..loading.models import BASE, load_with_languages, read_by
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from ..publishing.tables import format_table
from ..recipes.limits import number
from .encoding import ACTIVE, Language, encode_images, encode_texts, picture_rows
from .metrics import chance_metrics, compute_retrieval_metrics, mean_rank_variance, retrieval_ranks
from .search import add_language_option


WAYS = ("t2v", "v2t")


def evaluate_dataset(
    model: NrccrModel,
    processor: NrccrProcessor,
    dataset: Dataset,
    caption_column: str = "target_caption",
    batch_size: int = 64,
    show_progress: bool = True,
    known_images: dict[str, torch.Tensor] | None = None,
    num_frames: int = 8,
    language: Language = ACTIVE,
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Metrics of one split, over all pictures and over each source apart, as [`metrics_by_source`] returns them.

    Args:
        dataset: rows with `image_id`, `caption_column`, and `image`, `video` or `visual_feats`; several captions may
            share an `image_id`.
        known_images: embeddings of pictures by `image_id`, of shape `(projection_dim,)`; those that lack are added, so
            that several languages of a data set can share them.
        num_frames: of each video.
        language: whose adapter reads the captions (None: no adapter's). By default that of the captions' language,
            where the model has one, else the active one.

    Raises:
        ValueError: if the split is empty or a caption or picture is missing; names the row.
    """
    captions, image_ids = list(dataset[caption_column]), list(dataset["image_id"])
    for row, caption in enumerate(captions):
        if not caption or not caption.strip():
            raise ValueError(
                f"Row {row} ({image_ids[row]}) has no {caption_column}: {caption!r}. Queries are captions that people "
                "wrote: add them, or leave the row out."
            )
    if not captions:
        raise ValueError("The split has no rows to evaluate.")
    first_rows, caption_to_image = picture_rows(image_ids)
    known_images = {} if known_images is None else known_images
    new = {image_id: row for image_id, row in first_rows.items() if image_id not in known_images}
    pictures = dataset.select(list(new.values()))
    column = next(column for column in MEDIA_COLUMNS if column in dataset.column_names)
    undecoded = pictures.select_columns(column).with_format("arrow")
    if missing := [image_id for image_id, row in zip(new, undecoded) if row[column].null_count]:
        raise ValueError(
            f"{len(missing)} of {len(new)} pictures are missing, the first is {missing[0]}: put them into the folder "
            "`images` of --data_dir (videos into `videos`, features into `FeatureData`)."
        )
    if language is ACTIVE and caption_column == "target_caption" and "target_language" in dataset.column_names:
        spoken = dataset["target_language"][0]
        language = spoken if spoken in getattr(model, "language_adapters", ()) else ACTIVE
    text_embeds = encode_texts(model, captions, processor, batch_size, show_progress, language)
    collator = DataCollatorForCrossLingualRetrieval(processor, load_video=partial(read_frames, num_frames=num_frames))

    def media(images: Sequence[int], **kwargs) -> BatchFeature:
        return BatchFeature(collator.media([pictures[i] for i in images]))

    known_images |= zip(new, encode_images(model, range(len(pictures)), media, batch_size, show_progress))
    image_embeds = torch.stack([known_images[image_id] for image_id in first_rows])
    results = metrics_by_source(list(first_rows), text_embeds, image_embeds, caption_to_image)
    t2v, v2t = retrieval_ranks(text_embeds, image_embeds, caption_to_image)
    results["all"]["ranks"] = {  # of each picture: of its first caption among the queries, and as a query itself
        name: (t2v[row].item(), v2t[number].item()) for number, (name, row) in enumerate(first_rows.items())
    }
    return results


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
    results = {}
    for name, (images, captions, owner) in galleries(image_ids, caption_to_image).items():
        counts = {"captions": int(captions.sum()), "images": int(images.sum())}
        results[name] = {
            "metrics": compute_retrieval_metrics(text_embeds[captions], image_embeds[images], owner),
            "chance": chance_metrics(*counts.values(), owner),
            "counts": counts,
        }
    return results


def galleries(
    image_ids: list[str], caption_to_image: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """All pictures, and those of each source if there are several, as in [`metrics_by_source`]: by name, which
    pictures and which captions belong to it (boolean), and the row of each such caption's picture among its own."""
    sources = [image_id.rpartition("/")[0].partition("/")[0] for image_id in image_ids]
    groups = {"all": [True] * len(sources)}
    if len(set(sources)) > 1:
        groups |= {name: [source == name for source in sources] for name in sorted(set(sources)) if name}
    result = {}
    for name, members in groups.items():
        images = torch.tensor(members)
        captions = images[caption_to_image]
        result[name] = images, captions, (images.cumsum(0) - 1)[caption_to_image[captions]]
    return result


def mean_and_worst(languages: dict[str, dict[str, float]]) -> tuple[dict[str, float], str]:
    """The mean of each metric over languages, and the language with the lowest sum of recalls."""
    names = next(iter(languages.values()))
    mean = {name: sum(metrics[name] for metrics in languages.values()) / len(languages) for name in names}
    return mean, min(languages, key=lambda language: languages[language]["sum_recall"])


def rank_variance(languages: dict[str, dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Mean rank variance in both directions, over the pictures that all languages have a caption of. `languages`: the
    two ranks of each picture. Empty where no picture has."""
    shared = set.intersection(*map(set, languages.values()))
    if not shared:
        return {}
    ranks = torch.tensor([[ranks[name] for name in sorted(shared)] for ranks in languages.values()])
    return {f"{way}_mean_rank_variance": mean_rank_variance(ranks[..., i]) for i, way in enumerate(WAYS)}


@command()
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="outputs/demo", help="folder or hub id of a trained model")
    parser.add_argument("--dataset", default="tuxpaint+cldr_emoji", help='builders, joined by "+"')
    parser.add_argument("--data_dir", help="folder of the data; fetched where not given")
    parser.add_argument("--visual_feature", help="folder of features, or a name in data_dir/FeatureData")
    parser.add_argument("--media_dir", help="folder of pictures or videos; default: images or videos in data_dir")
    parser.add_argument("--num_frames", type=number(1), default=8, help="of each video, as in training")
    parser.add_argument("--target", default="gl", help="language of the queries; several, joined by commas; or all")
    add_language_option(parser, "reads queries that have none of their own")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, help="of the split; default: the one that the model was trained with")
    parser.add_argument("--batch_size", type=number(1), default=64)
    parser.add_argument("--output", help="write the numbers to this JSON file")
    args = parser.parse_args(argv)
    evaluate(args)


def evaluate(args: argparse.Namespace):
    model, processor = load_with_languages(args.model, args.language)
    seed = split_seed(args.model, args.seed, args.dataset)
    languages = dataset_languages(args.dataset) if args.target == "all" else args.target.split(",")
    if not languages:
        raise ValueError(f"{args.dataset} does not say which languages it has: name them, --target de,fr.")
    readers = {language: read_by(model, language, args.language) for language in languages}
    by_language, known_images = {}, {}
    for language in languages:
        options = {name: getattr(args, name) for name in ("data_dir", "visual_feature", "media_dir")}
        options = {name: value for name, value in options.items() if value}
        splits = load_caption_dataset(args.dataset, language, seed, **options)
        if args.split not in splits:
            raise ValueError(f"No split {args.split!r}; there are {', '.join(splits)}.")
        if args.split != "train":
            english = source_captions(splits[args.split])
            check_unseen(args.model, english, f"the {args.split} split of {args.dataset}, seed {seed}")
        by_language[language] = evaluate_dataset(
            model,
            processor,
            splits[args.split],
            batch_size=args.batch_size,
            known_images=known_images,
            num_frames=args.num_frames,
            language=readers[language],
        )

    table, report = {}, {}
    if len(languages) == 1:
        results = by_language[languages[0]]
        for name, result in results.items():
            table["{}: {captions} captions, {images} pictures".format(name, **result["counts"])] = result["metrics"]
            table[f"{name}: chance"] = result["chance"]
            suffix = "" if name == "all" else f"_{name}"
            report |= {f"{args.split}{suffix}": result["metrics"], f"chance{suffix}": result["chance"]}
        report["counts"] = {name: result["counts"] for name, result in results.items()}
    else:
        table = {language: results["all"]["metrics"] for language, results in by_language.items()}
        mean, worst = mean_and_worst(table)
        report = {"languages": dict(table), "mean": mean, "worst": table[worst], "worst_language": worst}
        report["counts"] = {language: results["all"]["counts"] for language, results in by_language.items()}
        report |= rank_variance({language: results["all"]["ranks"] for language, results in by_language.items()})
        table |= {f"mean of {len(languages)}": mean, f"worst: {worst}": table[worst]}
    print(f"\n{args.model}: {args.split} split of {args.dataset}, human {args.target} queries, split seed {seed}\n")
    print(format_table(table))
    readers = {language: reader or BASE for language, reader in readers.items()}
    if set(readers.values()) != {BASE}:
        print("read by: " + ", ".join(f"{language} {reader}" for language, reader in readers.items()))
    if f"{WAYS[0]}_mean_rank_variance" in report:
        print("mean rank variance: " + ", ".join(f"{way} {report[f'{way}_mean_rank_variance']:.1f}" for way in WAYS))
    if args.output:
        settings = {key: getattr(args, key) for key in ("model", "language", "dataset", "target", "split")}
        settings |= {"split_seed": seed, "read_by": readers}
        report["settings"] = settings
        write_file(args.output, json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
