"""Trains a cross-lingual picture search by a recipe, and says how good it is, beside what a user would try first."""

import json
import random
import resource
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.utils import logging

from ..data.load import find_font, query_origin
from ..data.names import language_name
from ..data.trained_split import write_trained_split
from ..files import write_file, writing
from ..loading.encoders import encoder_label
from ..publishing.card import training_settings, write_model_card
from ..publishing.search_page import QueryRow, Result, write_search_page
from ..publishing.sentence_transformers_files import write_sentence_transformers_files
from ..recipes.fields import ExperimentArguments, ModelArguments
from ..recipes.settings import as_flags, find_recipe, given_flags, parse_fields
from ..retrieval.encoding import picture_rows
from ..retrieval.evaluation import metrics_by_source
from ..retrieval.metrics import chance_metrics, compute_retrieval_metrics, fuse_query_embeds
from .arguments import NrccrTrainingArguments
from .experiment import Experiment, best_fusion_weight
from .trainer import NrccrTrainer


logger = logging.get_logger(__name__)
# what a base that is trained first has of the run that it is for, beside all of ModelArguments
SHARED = (
    "data",
    "dataset_options",
    "data_dir",
    "visual_feature",
    "media_dir",
    "num_frames",
    "source_language",
    "language",
    "translator",
    "split_seed",
    "feature_cache_dir",
    "strict",
    "overwrite",
    "seed",
    "use_cpu",
    "bf16",
    "disable_tqdm",
)
ENGLISH_TERMS = ("triplet", "contrastive")  # all that the English-only model learns from


def parse_arguments(
    arguments: Sequence[str] = (), recipe: str | None = None, **given
) -> tuple[ExperimentArguments, ModelArguments, NrccrTrainingArguments]:
    """Return the recipe's fields, then those `given`, then the flags, as [`parse_fields`] does."""
    classes = (ExperimentArguments, ModelArguments, NrccrTrainingArguments)
    return parse_fields(classes, arguments, recipe, "nrccr train", **given)


def train_recipe(recipe: str = "joint", **fields) -> dict:
    """
    Train as `nrccr train --recipe` does.

    Args:
        recipe: its name, or a YAML file.
        fields: of the recipe, which win: `language="ca"`, `output_dir="outputs/joint-ca"`.

    Returns:
        `dict`: what stands in `metrics.json`; `report_rows` makes a table of it.

    Raises:
        ValueError: for what can be put right: a field, a file, a folder that holds another run.
    """
    return run(*parse_arguments([], recipe, **fields), as_flags(fields))


def run(
    script: ExperimentArguments,
    model_arguments: ModelArguments,
    args: NrccrTrainingArguments,
    flags: Sequence[str] = (),
) -> dict:
    """
    Train, test, and write `output_dir`: the model (safetensors), its processor and card, `metrics.json`,
    `search.html`, `search.png`. Checkpoints go to `<output_dir>-checkpoints`.

    Args:
        flags: those that were given, of which a base that is trained first has the Trainer's own.

    Returns:
        `dict`: what stands in `metrics.json`.
    """
    args.check_processes()  # before anything is fetched
    with writing(f"{args.output_dir}-checkpoints") if PartialState().is_main_process else nullcontext():
        return train_and_test(script, model_arguments, args, flags)


def train_and_test(
    script: ExperimentArguments, model_arguments: ModelArguments, args: NrccrTrainingArguments, flags: Sequence[str]
) -> dict:
    """Do what `run` does, which holds the folder meanwhile."""
    added = script.language if script.base else None
    if args.train_language not in (None, added):
        raise ValueError(
            f"train_language={args.train_language!r} with language={script.language!r} and "
            f"base={script.base!r}: the language is added to a base, and no other one"
        )
    args.train_language = added
    start = time.perf_counter()
    if script.base is not None and script.base.endswith(".yaml"):
        # what frozen encoders give is computed once for both
        script.feature_cache_dir = script.feature_cache_dir or f"{args.output_dir}-checkpoints/features"
        script.base = train_base(script, model_arguments, args, flags)
    experiment = Experiment(script, model_arguments, args)
    fetched = time.perf_counter() - start

    baselines = {}
    if script.baselines:
        # English captions alone; validation has human English captions, as a team with English data would
        english = (
            experiment.base()
            if script.base
            else experiment.train(
                "english_only",
                losses={name: weight for name, weight in args.losses.items() if name in ENGLISH_TERMS},
                pair_weighting="none",
                eval_query_column="reference_source_caption",
            )
        )
        queries, images, owner = experiment.test(english, "target_caption")
        asked = {"english_only": queries}
        for name, column in (("translated_query", "source_caption"), ("english_query", "reference_source_caption")):
            if experiment.has(column):
                asked[name] = experiment.queries(english, column)
        baselines = {name: compute_retrieval_metrics(queries, images, owner) for name, queries in asked.items()}
    trainer = experiment.train("nrccr")

    queries, images, owner = experiment.test(trainer, "target_caption")
    image_ids = list(dict.fromkeys(experiment.rows["test"]["image_id"]))
    subsets = metrics_by_source(image_ids, queries, images, owner)
    validation = experiment.test(trainer, "target_caption", "validation")
    weight, fused = 0.0, {}
    if experiment.has("source_caption"):
        translated = experiment.queries(trainer, "source_caption")
        weight = best_fusion_weight(
            validation[0], experiment.queries(trainer, "source_caption", "validation"), *validation[1:]
        )
        embeds = fuse_query_embeds(queries, translated, weight)
        fused = {"test_fused": compute_retrieval_metrics(embeds, images, owner)}
    report = {
        "validation": compute_retrieval_metrics(*validation),
        "test": compute_retrieval_metrics(queries, images, owner),
        **{f"test_{name}": part["metrics"] for name, part in subsets.items() if name != "all"},
        **fused,
        "chance": chance_metrics(len(queries), len(images), owner),
        "baselines": baselines,
        "settings": {
            "data": script.data,
            "source_language": script.source_language,
            "language": script.language,
            "translator": experiment.translator.name,
            "target_captions": script.target_captions,
            "train_captions": script.train_captions,
            "human_captions": script.human_captions,
            "lexicon": script.lexicon,
            "base": script.base and Path(script.base).name,
            "adapter": model_arguments.adapter if args.train_language else None,
            "note": script.note,
            "queries": query_origin(experiment.rows["test"]),
            "views": args.needed_views(),
            "seed": args.seed,
            "split_seed": script.split_seed,
            "media": experiment.media,
            "num_frames": script.num_frames if experiment.media == "video" else None,
            "visual_feat_dim": trainer.model.config.visual_feat_dim,
            "trained_text_layers": args.trained_text_layers,
            "train_vision_tower": args.train_vision_tower,
            "pictures": {split: len(set(rows["image_id"])) for split, rows in experiment.rows.items()},
            "text_encoder": encoder_label(model_arguments.text_encoder),
            "vision_encoder": encoder_label(model_arguments.vision_encoder),
            "translation_weight": weight,
            "truncated_captions": trainer.processing_class.num_truncated,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    }
    if PartialState().is_main_process:
        write_outputs(Path(args.output_dir), experiment, trainer, report, (queries, images, owner))
        minutes = (time.perf_counter() - start - fetched) / 60
        # ru_maxrss is in kilobytes on Linux
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        logger.info(f"data {fetched:.0f} s; training and evaluation {minutes:.1f} min; memory at most {memory:.1f} GB")
    return report


def train_base(
    script: ExperimentArguments, model: ModelArguments, args: NrccrTrainingArguments, flags: Sequence[str] = ()
) -> str:
    """Run the YAML file that `base` names, which stands beside the run's own; return the folder of what it trained.
    How it is trained says that file, and over it those of `flags` that are the Trainer's own, such as batch size and
    steps. A run that is resumed finds it there, or goes on with it."""
    folder = Path(f"{args.output_dir}-base")
    if not (args.resume_from_checkpoint and (folder / "metrics.json").exists()):
        own = vars(args) | vars(script)
        settings = given_flags([TrainingArguments], flags)
        settings |= {name: own[name] for name in SHARED} | vars(model) | {"output_dir": str(folder)}
        settings["resume_from_checkpoint"] = "true" if args.resume_from_checkpoint else None
        logger.info(f"{folder}: {script.base}")
        recipe = find_recipe(script.recipe).parent / script.base
        train_recipe(str(recipe), **{name: value for name, value in settings.items() if value is not None})
        PartialState().wait_for_everyone()  # the first process writes it, all read it
    return str(folder)


def write_outputs(output_dir: Path, experiment: Experiment, trainer: NrccrTrainer, report: dict, embeddings: tuple):
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer.model.save_pretrained(output_dir)
    trainer.processing_class.save_pretrained(output_dir)
    write_sentence_transformers_files(output_dir, trainer.model.visual_tower is not None)
    script = experiment.script
    bases = [script.base] if script.base else []
    captions = experiment.rows["train"]["source_caption"]
    write_trained_split(output_dir, script.data, script.split_seed, captions, bases)
    report["settings"]["training"] = training_settings(trainer.args)
    write_file(output_dir / "metrics.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    rows = report_rows(report)
    write_model_card(output_dir, report, rows, experiment.rows["test"]["target_caption"][0])
    if experiment.script.search_page != "none" and experiment.media != "visual_feats":
        title = f"Picture search in {language_name(report['settings']['language'])}"
        rows_drawn = search_rows(experiment, *embeddings)
        write_search_page(output_dir, title, rows_drawn, font=find_font(experiment.script.data_dir))


def report_rows(report: dict) -> dict[str, dict]:
    """Return the table that a run prints: what was asked, and how well it was answered."""
    language = report["settings"]["language"]
    english = report["settings"]["source_language"]
    model = "NRCCR" if "target" in report["settings"]["views"] else f"{english}-only model"
    asked = {
        "chance": report["chance"],
        f"{english}-only model, {language} query": report["baselines"].get("english_only"),
        f"{english}-only model, {language} query translated to {english}": report["baselines"].get("translated_query"),
        f"{model}, {language} query": report["test"],
        "- emoji alone": report.get("test_emoji"),
        "- stamps alone": report.get("test_stamps"),
        f"{model}, {language} query fused with its translation": report.get("test_fused"),
        f"(for comparison) {english}-only model, human {english} query": report["baselines"].get("english_query"),
    }
    return {name: metrics for name, metrics in asked.items() if metrics}


def search_rows(experiment: Experiment, queries, images, owner, count: int = 8, shown: int = 5) -> list[QueryRow]:
    """Draw queries at random (not chosen) by the run's seed, with the best pictures of each. Raises ValueError for a
    source that no picture is of."""
    rows = experiment.rows["test"]
    captions, references = rows["target_caption"], rows["reference_source_caption"]
    source = experiment.script.search_page
    kept = [i for i, image_id in enumerate(rows["image_id"]) if source in ("all", image_id.split("/")[0])]
    if not kept:
        raise ValueError(f"search_page={source!r}: all, none, or what stands before the '/' of an image_id")
    left_out = torch.ones(len(images), dtype=torch.bool).index_fill(0, owner[kept], False)
    first = list(picture_rows(rows["image_id"])[0].values())  # each picture's first caption

    def shown_picture(image: int):
        media = experiment.picture("test", first[image])
        return media[len(media) // 2] if experiment.media == "video" else media

    result = []
    for i in random.Random(experiment.args.seed).sample(kept, min(count, len(kept))):
        scores = (images @ queries[i]).masked_fill(left_out, -2)
        best = scores.topk(min(shown, len(kept))).indices.tolist()
        result.append(
            QueryRow(
                query=captions[i],
                gloss=references[i],
                machine_translation=rows["source_caption"][i],
                results=[
                    Result(shown_picture(j), captions[first[j]], scores[j].item(), j == owner[i].item()) for j in best
                ],
                rank_of_correct=int((scores > scores[owner[i]]).sum()) + 1,
            )
        )
    return result
