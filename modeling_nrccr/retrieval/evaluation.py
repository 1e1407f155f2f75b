"""Measures a model on the human captions of a data set, both directions, beside chance and the translated query."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BatchFeature

from datasets_scripts.reading.splits import group_key
from datasets_scripts.reading.videos import read_frames

from ..data.collator import MEDIA_COLUMNS, DataCollatorForCrossLingualRetrieval
from ..data.load import dataset_languages, load_caption_dataset
from ..data.trained_split import check_unseen, source_captions
from ..data.trained_split import split_seed as seed_of
from ..loading.models import BASE, language_code, load_with_languages, read_by
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from ..translation.cache import load_engine
from .bootstrap import draw_groups, hits, intervals
from .encoding import ACTIVE, Language, encode_images, encode_texts, picture_rows
from .metrics import (
    chance_metrics,
    compute_retrieval_metrics,
    fuse_query_embeds,
    mean_rank_variance,
    retrieval_ranks,
)


if TYPE_CHECKING:
    from datasets import Dataset

Metrics = dict[str, float]
WAYS = ("t2v", "v2t")


def evaluate_dataset(
    model: NrccrModel,
    processor: NrccrProcessor,
    dataset: "Dataset",
    caption_column: str = "target_caption",
    batch_size: int = 64,
    show_progress: bool = True,
    known_images: dict[str, torch.Tensor] | None = None,
    num_frames: int = 8,
    language: Language = ACTIVE,
    translate: Callable[[list[str]], list[str]] | None = None,
    translation_weight: float = 0.5,
) -> dict[str, dict[str, Any]]:
    """
    Measure one split, over all pictures and over each source apart, as [`metrics_by_source`] returns it, with
    `intervals`. With `translate`, the translated query alone and both fused stand beside it, under `translated` and
    `fused`, each `{"metrics": ..., "intervals": ...}`. Under `all` are also each picture's `ranks`, by `image_id`.

    Args:
        dataset: rows with `image_id`, `caption_column`, and `image`, `video` or `visual_feats`; several captions may
            share an `image_id`.
        known_images: embeddings of pictures by `image_id`, of shape `(projection_dim,)`; those that lack are added, so
            that several languages of a data set can share them.
        num_frames: of each video.
        language: whose adapter reads the captions (None: no adapter's). By default that of the captions' language,
            where the model has one, else the active one.
        translate: gives the captions in the source language, which the model's own text side reads.
        translation_weight: of the translated query in `fused`, from 0 to 1.

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
    translated = None if translate is None else translate(captions)  # which may fail, so first
    queries = {"": encode_texts(model, captions, processor, batch_size, show_progress, language)}
    if translated is not None:
        queries["translated"] = encode_texts(model, translated, processor, batch_size, show_progress, None)
        queries["fused"] = fuse_query_embeds(queries[""], queries["translated"], translation_weight)
    collator = DataCollatorForCrossLingualRetrieval(processor, load_video=partial(read_frames, num_frames=num_frames))

    def media(images: Sequence[int], **kwargs) -> BatchFeature:
        return BatchFeature(collator.media([pictures[i] for i in images]))

    known_images |= zip(new, encode_images(model, range(len(pictures)), media, batch_size, show_progress))
    image_embeds = torch.stack([known_images[image_id] for image_id in first_rows])
    english = source_captions(dataset) or [None] * len(captions)
    groups = [group_key(english[row] or "") or image_id for image_id, row in first_rows.items()]
    found = {
        name: metrics_by_source(list(first_rows), embeds, image_embeds, caption_to_image, groups)
        for name, embeds in queries.items()
    }
    results = found.pop("")
    for name, by_source in found.items():
        for source, result in by_source.items():
            results[source][name] = {key: result[key] for key in ("metrics", "intervals")}
    t2v, v2t = retrieval_ranks(queries[""], image_embeds, caption_to_image)
    results["all"]["ranks"] = {  # of each picture: of its first caption among the queries, and as a query itself
        name: (t2v[row].item(), v2t[number].item()) for number, (name, row) in enumerate(first_rows.items())
    }
    return results


def metrics_by_source(
    image_ids: list[str],
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    caption_to_image: torch.Tensor,
    groups: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Measure over all pictures, and over the captions and pictures of each source alone.

    Args:
        image_ids: one for each row of `image_embeds`; what stands before the first "/" names the source.
        text_embeds, image_embeds, caption_to_image: as for [`compute_retrieval_metrics`].
        groups: of each picture, what it is drawn together with; with them come intervals.

    Returns:
        `{"all": {"metrics": ..., "chance": ..., "counts": {"captions": ..., "images": ...}}}`, and the same under the
        name of each source if there are several; names of [`compute_retrieval_metrics`]. With `groups` also
        `intervals`, of each recall and of SumR, as of [`bootstrap.intervals`], and `groups` among the counts.
    """
    results = {}
    for name, (images, captions, owner) in galleries(image_ids, caption_to_image).items():
        counts = {"captions": int(captions.sum()), "images": int(images.sum())}
        part = text_embeds[captions], image_embeds[images], owner
        results[name] = {
            "metrics": compute_retrieval_metrics(*part),
            "chance": chance_metrics(*counts.values(), owner),
            "counts": counts,
        }
        if groups is not None:
            names, group = np.unique(np.asarray(groups)[images.numpy()], return_inverse=True)
            found = hits([ranks.numpy() for ranks in retrieval_ranks(*part)], [group[owner], group], len(names))
            results[name]["intervals"] = intervals(found, draw_groups(len(names)))
            counts["groups"] = len(names)
    return results


def galleries(
    image_ids: list[str], caption_to_image: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return all pictures, and those of each source if there are several, as in [`metrics_by_source`]: by name, which
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
    """Return the mean of each metric over languages, and the language with the lowest sum of recalls."""
    names = next(iter(languages.values()))
    mean = {name: sum(metrics[name] for metrics in languages.values()) / len(languages) for name in names}
    return mean, min(languages, key=lambda language: languages[language]["sum_recall"])


def rank_variance(languages: dict[str, dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Return the mean rank variance in both directions, over the pictures that all languages have a caption of;
    nothing where no picture has. `languages`: the two ranks of each picture."""
    shared = set.intersection(*map(set, languages.values()))
    if not shared:
        return {}
    ranks = torch.tensor([[ranks[name] for name in sorted(shared)] for ranks in languages.values()])
    return {f"{way}_mean_rank_variance": mean_rank_variance(ranks[..., i]) for i, way in enumerate(WAYS)}


@dataclass
class Evaluation:
    """
    What [`evaluate`] measured.

    Attributes:
        title: what was asked of which model.
        rows: of the table, by name: metrics, and `intervals` where they are known.
        notes: in a line each, what else is to be known of the rows.
        report: all numbers and settings, for a JSON file.
    """

    title: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, result: dict[str, Any], kind: str = ""):
        """Add a row of `result["metrics"]` with its intervals, and those of the translated and the fused query."""
        for part, words in (("", kind), ("translated", "translated query"), ("fused", "fused query")):
            if found := result.get(part) if part else result:
                label = f"{name}: {words}" if words else name
                self.rows[label] = found["metrics"] | {"intervals": found["intervals"]}


def evaluate(
    model: str,
    data: str = "tuxpaint+cldr_emoji",
    *,
    query_languages: Sequence[str] = (),
    languages: Sequence[str] = (),
    split: str | None = None,
    split_seed: int | None = None,
    translator: str | None = None,
    translation_weight: float = 0.5,
    source_language: str = "en",
    data_dir: str | None = None,
    visual_feature: str | None = None,
    media_dir: str | None = None,
    num_frames: int = 8,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> Evaluation:
    """
    Measure a model on the human captions of a data set, in one or several languages.

    Args:
        model: folder or hub id of a trained model, or of a dual encoder such as CLIP.
        data: data sets, joined by "+", as for [`load_caption_dataset`].
        query_languages: of the captions; `["all"]` is all that the data has; default: those of `languages`, else those
            that were added to the model.
        languages: as `--language` takes them; which reads a caption is what [`read_by`] says.
        split: default: the test, or the only one that there is.
        split_seed: default: the one that the model was trained with.
        translator: engine; the translated query and both fused are measured too.
        translation_weight: of the translated query in the fused one, from 0 to 1.
        source_language: that is translated into, which the model's own text side reads.
        data_dir, visual_feature, media_dir: folders, as for [`load_caption_dataset`].
        num_frames: of each video, as in training.
        batch_size: texts or pictures at once.
        device, dtype: of the model, as for [`load_model`].

    Raises:
        ValueError: no language is named, there is no such split, or the model was trained on it.
        TranslationError: the engine failed.
    """
    loaded, processor = load_with_languages(model, languages, device, dtype)
    seed = seed_of(model, split_seed, data)
    asked = languages_to_ask(data, query_languages, languages, loaded)
    readers = {language: read_by(loaded, language, languages) for language in asked}
    folders = {"data_dir": data_dir, "visual_feature": visual_feature, "media_dir": media_dir}
    folders = {name: folder for name, folder in folders.items() if folder}
    by_language, known_images, engines = {}, {}, []
    for language in asked:
        splits = load_caption_dataset(data, language, seed, **folders)
        split, rows = choose_split(splits, split)
        if split != "train":
            check_unseen(model, source_captions(rows), f"the {split} split of {data}, seed {seed}")
        translate = None
        if translator is not None:
            pairs = [(source_language, language), (language, source_language)]
            engine = load_engine(translator, pairs, data_dir, needed=pairs[1:])
            translate = partial(engine.translate, source=language, target=source_language)
            engines.append(engine.name)
        by_language[language] = evaluate_dataset(
            loaded,
            processor,
            rows,
            batch_size=batch_size,
            known_images=known_images,
            num_frames=num_frames,
            language=readers[language],
            translate=translate,
            translation_weight=translation_weight,
        )
    named = {language: reader or BASE for language, reader in readers.items()}
    title = f"{model}: {split} split of {data}, human {', '.join(asked)} queries, split seed {seed}"
    settings = {"model": model, "language": list(languages), "data": data, "query_languages": asked, "split": split}
    settings |= {"split_seed": seed, "read_by": named}
    if translator is not None:
        settings |= {"translator": ", ".join(dict.fromkeys(engines)), "translation_weight": translation_weight}
    evaluation = summarize(title, by_language, split)
    evaluation.report["settings"] = settings
    if set(named.values()) != {BASE}:
        evaluation.notes.append("read by: " + ", ".join(f"{language} {reader}" for language, reader in named.items()))
    if translator is not None:
        share = f"its share of a fused query: {translation_weight:g}"
        evaluation.notes.append(f"translated by {settings['translator']}; {share}")
    return evaluation


def languages_to_ask(
    data: str, query_languages: Sequence[str], languages: Sequence[str], model: NrccrModel
) -> list[str]:
    """Return the languages of the queries, as for [`evaluate`]. Raises ValueError where nothing says which."""
    if list(query_languages) == ["all"]:
        if found := dataset_languages(data):
            return found
        raise ValueError(f"{data} does not say which languages it has: name them, --query_language de")
    found = list(query_languages) or [code for code in map(language_code, languages) if code is not None]
    if found := list(dict.fromkeys(found or model.language_adapters)):
        return found
    raise ValueError("the language of the queries is not known: name it, --query_language gl")


def choose_split(splits: dict[str, "Dataset"], split: str | None) -> tuple[str, "Dataset"]:
    """Return a split and its rows: the one that is named, else the test, else the only one. Raises ValueError where
    that one is not there, or empty."""
    held = [name for name, rows in splits.items() if len(rows)]
    name = split or ("test" if "test" in held or len(held) != 1 else held[0])
    if name not in held:
        raise ValueError(f"No split {name!r}; there are {', '.join(held) or 'none with rows'}.")
    return name, splits[name]


def summarize(title: str, by_language: dict[str, dict[str, Any]], split: str) -> Evaluation:
    """Put the results of [`evaluate_dataset`], by language, into a table and a report."""
    evaluation = Evaluation(title)
    report, rows = evaluation.report, evaluation.rows
    extra = ("intervals", "translated", "fused")
    if len(by_language) == 1:
        ((_, results),) = by_language.items()
        for name, result in results.items():
            evaluation.add("{}: {captions} captions, {images} pictures".format(name, **result["counts"]), result)
            rows[f"{name}: chance"] = result["chance"]
            suffix = "" if name == "all" else f"_{name}"
            report |= {f"{split}{suffix}": result["metrics"], f"chance{suffix}": result["chance"]}
            report |= {f"{key}{suffix}": result[key] for key in extra if key in result}
        report["counts"] = {name: result["counts"] for name, result in results.items()}
        evaluation.notes.append(worth_of_one(results["all"]["counts"]))
        return evaluation
    found = {language: results["all"]["metrics"] for language, results in by_language.items()}
    for language, results in by_language.items():
        evaluation.add(language, results["all"])
    mean, worst = mean_and_worst(found)
    report |= {"languages": found, "mean": mean, "worst": found[worst], "worst_language": worst}
    report |= {
        key: {language: results["all"][key] for language, results in by_language.items()}
        for key in extra
        if key in by_language[worst]["all"]
    }
    report["counts"] = {language: results["all"]["counts"] for language, results in by_language.items()}
    report |= rank_variance({language: results["all"]["ranks"] for language, results in by_language.items()})
    rows |= {f"mean of {len(found)}": mean, f"worst: {worst}": rows[worst]}
    evaluation.notes += [f"{language}: {worth_of_one(counts)}" for language, counts in report["counts"].items()]
    if f"{WAYS[0]}_mean_rank_variance" in report:
        parts = (f"{way} {report[f'{way}_mean_rank_variance']:.1f}" for way in WAYS)
        evaluation.notes.append(f"mean rank variance: {', '.join(parts)}")
    return evaluation


def worth_of_one(counts: dict[str, int]) -> str:
    """Say how coarse the numbers of a test are."""
    captions = counts["captions"]
    return (
        f"{captions:,} captions: one is {100 / captions:.{1 if captions <= 1000 else 2}f} points; intervals are of "
        f"draws of {counts['groups']:,} groups of pictures"
    )
