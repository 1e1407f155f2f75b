"""Adds a language to a dual encoder that you use already, from English captions and machine translation alone; no
picture is encoded again:

    python examples/add_language.py --base outputs/demo --captions captions.csv --target_language gl \
        --output_dir outputs/gl

`captions.csv` has a column `caption` (or is a .txt file, a caption a line; or name `--dataset` of datasets_scripts).
Writes into `output_dir` the language file, a few megabytes (`model.load_language("gl", "outputs/gl")`), `report.json`
and `README.md`. With `--eval human.csv` (columns `image` and `target_caption`, written by people; `caption`, their
English, if you have it) the report says how well the language is searched, beside the base, the translated query and
what else a team would try (`--rivals`), and "do not use" where it is worse than the base. Run it again: it goes on
where it was stopped. Every field of examples/configs/add_language.yaml is also a flag. Where captions have pictures
(column `image`), `--config examples/configs/add_language_pictures.yaml` learns more, from the base's view of them.

`--target_language gl,ca,es` teaches one adapter several languages, each as often as the others; `load_language` takes
the file under any name, so under each of them.
"""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from arguments import option, parse_fields
from data import balance, check_lexicon, lexicon_rows, load_caption_dataset, load_engine, teach
from rivals import distillation_arguments, embed_distillation, frozen_cache, m2m, trunk_calibration
from table import format_markdown, format_table
from transformers import set_seed

from datasets_scripts.caption_files import read_records
from datasets_scripts.debian import FetchError
from datasets_scripts.splits import group_key, split_of
from modeling_nrccr import (
    FeatureCache,
    NrccrLoss,
    NrccrModel,
    NrccrProcessor,
    NrccrTrainer,
    NrccrTrainingArguments,
)
from modeling_nrccr.checkpoints import last_complete_checkpoint
from modeling_nrccr.data_collator import DataCollatorForCrossLingualRetrieval
from modeling_nrccr.encoding import encode_images, encode_texts, picture_rows
from modeling_nrccr.feature_cache import fingerprint
from modeling_nrccr.files import write_file
from modeling_nrccr.language_adapters import NrccrLanguageAdapter
from modeling_nrccr.metrics import compute_retrieval_metrics, fuse_query_embeds
from modeling_nrccr.processing_nrccr import load_image
from modeling_nrccr.translation import TranslationError


CONFIG = Path(__file__).parent / "configs" / "add_language.yaml"
HELD_OUT, HELD_OUT_SEED = {"validation": 0.1}, 2208  # not a split seed: those captions are all of one side
RIVALS = ("embed_distillation", "m2m", "trunk_calibration")
TEXT_SIDE_EPOCHS = 60
SEVERAL = "mul"  # ISO 639: multiple languages
FEWEST = 200  # captions, below which a language is not worth a file


@dataclass
class LanguageArguments:
    """What is added to what."""

    config: str = option(str(CONFIG), "YAML file with any of these fields.")
    base: str = option("outputs/demo", "Folder or hub id of a dual encoder: CLIP, SigLIP 2, ..., or a model of ours.")
    text_encoder: str | None = option(None, "Another text encoder in the place of the base's own, e.g. multilingual.")
    text_prefix: str = option("", "Of text_encoder, e.g. 'query: ' for e5.")
    captions: str | None = option(None, "English captions: .csv or .jsonl with a column caption, or .txt.")
    dataset: str | None = option(None, "Instead: builders of datasets_scripts; they bring a test of human captions.")
    data_dir: str | None = option(None, "Folder of the data set.")
    split_seed: int = option(0, "Seed of the splits by groups of captions.")
    eval: str | None = option(None, "Human captions: .csv or .jsonl with image, target_caption and perhaps caption.")
    source_language: str = option("en", "Language of the captions.")
    target_language: str = option("gl", "Language that is added; several, joined by ',', in one adapter.")
    translator: str = option(
        "apertium", "Machine translation engines, joined by ','; or of each language: gl=A,B;ca=C."
    )
    lexicon: str = option("none", "Words that are translated too: wordnet:5000, or a file, a word a line; or none.")
    rivals: str = option("none", f"Trained and tested beside it: none, all, or some of {', '.join(RIVALS)}.")
    kind: str = option("linear", "Of the adapter: linear, bottleneck, dynamic, or lora.")
    center: bool = option(True, "Moves the language's mean state to that of the captions.")
    noise: float = option(0.0, "Gaussian noise on its states in training, in their standard deviations.")
    rank: int = option(64, "Of bottleneck, dynamic and lora.")
    layers: int = option(2, "Top layers that lora is in; -1: all.")

    def adapter_settings(self) -> dict:
        return {name: getattr(self, name) for name in NrccrLanguageAdapter.SETTINGS}


def read_captions(path: Path) -> dict[str, Path | None]:
    """One text a line, or the column `caption`; each once, with the file of its (first) picture where the column
    `image` names one. Raises ValueError where there are too few."""
    captions = {}
    if path.suffix == ".txt":
        captions = {" ".join(line.split()): None for line in path.read_text(encoding="utf-8").splitlines()}
        captions.pop("", None)
    else:
        for record in read_records(path, needed=("caption",)):
            image = record.get("image")
            captions.setdefault(record["caption"], path.parent / image if image else None)
    if len(captions) < FEWEST:
        raise ValueError(f"{path} has {len(captions)} different captions: a language needs {FEWEST}, better thousands")
    return captions


def read_eval(path: Path) -> list[dict]:
    """Rows with `image_id`, `image` (a path), `target_caption` and `reference_source_caption` (or None)."""
    rows = []
    for record in read_records(path, needed=("image", "target_caption")):
        image = path.parent / record["image"]
        if not image.is_file():
            raise ValueError(f"{path}, line {record['line']}: there is no picture {image}")
        rows.append({"image_id": record["image"], "image": str(image), "target_caption": record["target_caption"],
                     "reference_source_caption": record.get("caption")})  # fmt: skip
    return rows


def embed_pictures(captions: dict, load: Callable, base: NrccrModel, processor, work: Path) -> dict[str, torch.Tensor]:
    """The base's embedding of each caption's picture. Raises ValueError for a caption without one."""
    if missing := [caption for caption, image in captions.items() if image is None]:
        raise ValueError(f"{missing[0]!r} and {len(missing) - 1:,} others have no picture: add a column image, or "
                         "train with --text_only true")  # fmt: skip
    cache = FeatureCache(base.set_trained_layers(0, False), processor, work)
    images = {str(image): image for image in captions.values()}
    cache.add_images(images, lambda name: load(images[name]))
    names = list(images)
    with torch.no_grad():
        embeds = base.get_image_features(**cache(images=names)).pooler_output
    row = {name: i for i, name in enumerate(names)}
    return {caption: embeds[row[str(image)]] for caption, image in captions.items()}


def training_rows(
    captions: Sequence[str], script: LanguageArguments, language: str
) -> tuple[dict[str, list[dict]], str]:
    """Captions and their translations by each engine, split by group into train and validation; and who made them."""
    pairs = [(script.source_language, language), (language, script.source_language)]
    splits, names = {"train": [], "validation": []}, []
    for spec in translators(script, language):
        engine = load_engine(spec, pairs, script.data_dir)
        names.append(engine.name)
        made = engine.translate(captions, *pairs[0])
        back = engine.translate(made, *pairs[1])
        for number, (source, target, again) in enumerate(zip(captions, made, back)):
            split = split_of(group_key(source), HELD_OUT_SEED, HELD_OUT)
            row = {"image_id": str(number), "caption_id": str(number), "source_caption": source,
                   "target_caption": target, "back_translation": again}  # fmt: skip
            if split == "train" or len(names) == 1:
                splits[split].append(row)
    if script.lexicon != "none":
        splits["train"] += lexicon_rows(
            script.lexicon, *pairs[0], ",".join(translators(script, language)), script.data_dir
        )
    return splits, ", ".join(names)


def run_fingerprint(script: LanguageArguments, args: NrccrTrainingArguments, rows: dict[str, list[dict]]) -> str:
    """Of what is trained on what: another recipe or other captions are no continuation."""
    names = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed", "text_only")
    recipe = [getattr(args, name) for name in names] + [NrccrLoss.from_arguments(args).settings]
    texts = [(row["source_caption"], row["target_caption"]) for part in rows.values() for row in part]
    return fingerprint(script.base, script.text_encoder, script.adapter_settings(), recipe, texts)


def train(model: NrccrModel, cache: FeatureCache, rows: dict, args: NrccrTrainingArguments) -> NrccrTrainer:
    """Goes on from the last whole checkpoint in `args.output_dir`."""
    collator = DataCollatorForCrossLingualRetrieval(cache)
    trainer = NrccrTrainer(model, args, rows["train"], rows["validation"], data_collator=collator)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    return trainer


class Examination:
    """Human captions of the language, the pictures that they describe, and what the base finds for them."""

    def __init__(self, rows: list[dict], base: NrccrModel, processor, script: LanguageArguments, language: str):
        self.base, self.processor = base, processor
        first, self.owner = picture_rows([row["image_id"] for row in rows])
        pictures = [rows[row]["image"] for row in first.values()]
        self.images = encode_images(base, pictures, processor, show_progress=True)
        pair = (language, script.source_language)
        engine = load_engine(translators(script, language)[0], [pair], script.data_dir)
        self.asked = [row["target_caption"] for row in rows]
        translated = engine.translate(self.asked, *pair)
        self.english = [row["reference_source_caption"] for row in rows]
        self.with_english = all(self.english)
        with base.using_language(None):
            self.translated = encode_texts(base, translated, processor)

    def find(self, queries: torch.Tensor) -> dict[str, float]:
        return compute_retrieval_metrics(queries, self.images, self.owner)

    def of_base(self) -> dict[str, dict]:
        with self.base.using_language(None):
            found = {"base": self.find(encode_texts(self.base, self.asked, self.processor))}
        return found | {"translated query": self.find(self.translated)} | self.of_english("English, before", self.base)

    def of_english(self, name: str, model: NrccrModel, processor=None) -> dict[str, dict]:
        if not self.with_english:
            return {}
        with model.using_language(None):
            return {name: self.find(encode_texts(model, self.english, processor or self.processor))}

    def of_model(self, name: str, model: NrccrModel, language: str | None, processor=None) -> dict[str, dict]:
        with model.using_language(language):
            queries = encode_texts(model, self.asked, processor or self.processor)
        fused = self.find(fuse_query_embeds(queries, self.translated, 0.5))
        found = {name: self.find(queries), f"{name}, half its translation": fused}
        return found | self.of_english(f"English, {name}", model, processor)


def verdict(found: dict[str, dict], name: str) -> tuple[str, list[str]]:
    """ "use", or "do not use", and why: of human queries, or of English, more than 1 SumR worse than the base."""
    base, ours, translated = (found[key]["sum_recall"] for key in ("base", name, "translated query"))
    reasons = []
    if ours < base:
        reasons.append(f"human queries find less than by the base: SumR {ours:.1f}, not {base:.1f}")
    if "English, before" in found:
        before, after = (found[key]["sum_recall"] for key in ("English, before", f"English, {name}"))
        if after < before - 1:
            reasons.append(f"English finds less than before: SumR {after:.1f}, not {before:.1f}")
    word = "do not use" if reasons else "use"
    if not reasons and ours < translated:
        reasons.append(
            f"the base asked the translated query finds more, SumR {translated:.1f} against {ours:.1f}: where a "
            "translation of each query is at hand, ask that, or both"
        )
    return word, reasons


def main(arguments: list[str] | None = None):
    classes = (LanguageArguments, NrccrTrainingArguments)
    script, args = parse_fields(classes, sys.argv[1:] if arguments is None else arguments, CONFIG)
    if (script.captions is None) == (script.dataset is None):
        raise ValueError("give --captions FILE or --dataset NAME, one of the two")
    rivals = RIVALS if script.rivals == "all" else tuple(filter(None, script.rivals.replace("none", "").split(",")))
    if unknown := set(rivals) - set(RIVALS):
        raise ValueError(f"no rivals {', '.join(sorted(unknown))}: all, none, or some of {', '.join(RIVALS)}")
    output, languages = Path(args.output_dir), [code.strip() for code in script.target_language.split(",")]
    if script.eval and len(languages) > 1:
        raise ValueError(f"--eval {script.eval} has captions of one language, but {script.target_language} are added")
    work = Path(f"{output}-checkpoints")
    name = languages[0] if len(languages) == 1 else SEVERAL
    args.train_language = name

    examined = {}
    if script.dataset:
        datasets = {
            language: load_caption_dataset(
                script.dataset, language, script.split_seed, data_dir=script.data_dir,
                source_language=script.source_language,
            )
            for language in languages
        }  # fmt: skip
        train_rows, captions = datasets[languages[0]]["train"], {}
        for number, caption in enumerate(train_rows["source_caption"]):
            captions.setdefault(caption, number)
        load = lambda number: train_rows[number]["image"]  # noqa: E731
        examined = {language: dataset["test"] for language, dataset in datasets.items()}
    else:
        captions, load = read_captions(Path(script.captions)), load_image
    if script.eval:
        examined = {name: read_eval(Path(script.eval))}
    check_lexicon(script.lexicon, args.text_only)
    rows, engines = rows_of_languages(list(captions), script, languages, args.seed)
    print(f"{len(captions):,} captions, translated by {engines}: {len(rows['train']):,} pairs to train on")

    base, base_processor = NrccrModel.from_dual_encoder(script.base), NrccrProcessor.from_dual_encoder(script.base)
    base.to(args.device)
    if not args.text_only:
        embeds = embed_pictures(captions, load, base, base_processor, work)
        for row in itertools.chain(*rows.values()):
            row["image_embeds"] = embeds[row["source_caption"]]
    model, processor = base, base_processor
    if script.text_encoder:
        model, processor = new_text_side(script, base, base_processor, rows, args, work, output)
    elif script.kind == "lora" and args.text_only:  # else every step reads the source captions, through all layers
        teach(rows["train"], base, base_processor)
    set_seed(args.seed)
    model.add_language(name, **script.adapter_settings())
    cache = frozen_cache(model.train_language(name), processor, rows["train"] + rows["validation"], work)
    args.output_dir = str(work / f"language-{run_fingerprint(script, args, rows)}")
    trainer = train(model, cache, rows, args)
    model.eval().save_language(name, output)

    rows_of_test = {language: list(examined[language]) for language in languages if len(examined.get(language, ()))}
    others = {}
    if rows_of_test:
        others = {rival_name: rival(rival_name, base, base_processor, name, rows, args, work) for rival_name in rivals}
    tested = {}
    for language, asked in rows_of_test.items():
        exam = Examination(asked, base, base_processor, script, language)
        tested[language] = examine(exam, (model, name, processor), others) | {"queries": len(asked)}
    report = {
        "verdict": "not tested", "reasons": ["no human captions were given (--eval): nobody knows how good it is"],
        "found": {}, "queries": 0, "language": script.target_language,
        "base": base.made_for(), "text_encoder": script.text_encoder, "translator": engines,
        "adapter": script.adapter_settings(), "captions": len(captions), "seed": args.seed,
        "steps": trainer.state.global_step, "truncated_captions": processor.num_truncated,
    }  # fmt: skip
    report |= merge_reports(tested) if len(languages) > 1 else tested.get(name, {})
    write_file(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_file(output / "README.md", read_me(report, script, output, languages))
    if report["found"]:
        print(format_table(report["found"]))
    print(f"{report['verdict']}{': ' if report['reasons'] else ''}{'; '.join(report['reasons'])}")
    print(f"wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def rows_of_languages(
    captions: list[str], script: LanguageArguments, languages: list[str], seed: int
) -> tuple[dict[str, list[dict]], str]:
    """The same of every language, in training as many of each."""
    parts = {language: training_rows(captions, script, language) for language in languages}
    rows = {
        "train": balance([rows["train"] for rows, _ in parts.values()], seed),
        "validation": sum((rows["validation"] for rows, _ in parts.values()), []),
    }
    return rows, ", ".join(dict.fromkeys(engines for _, engines in parts.values()))


def translators(script: LanguageArguments, language: str) -> list[str]:
    """The engines of a language: all of `translator`, or of "gl=A,B;ca=C" its own. Raises ValueError where it has
    none."""
    if "=" not in script.translator.split(":")[0]:
        return script.translator.split(",")
    own = dict(part.strip().split("=", 1) for part in script.translator.split(";") if "=" in part)
    if language not in own:
        raise ValueError(
            f"--translator {script.translator!r} names no engine for {language}: add ';{language}=ENGINE'"
        )
    return own[language].split(",")


def examine(exam: Examination, ours: tuple, rivals: dict[str, tuple]) -> dict:
    """What human captions of a language find, and whether to use it. `ours`, and each of `rivals`: as of
    `Examination.of_model`."""
    found = exam.of_base() | exam.of_model("this language", *ours)
    word, reasons = verdict(found, "this language")
    for name, model in rivals.items():
        found |= exam.of_model(name, *model)
    return {"verdict": word, "reasons": reasons, "found": found}


def merge_reports(tested: dict[str, dict]) -> dict:
    """All of several languages, each line and reason with its language, and the sterner verdict."""
    if not tested:
        return {}
    return {
        "verdict": min((part["verdict"] for part in tested.values()), key=["do not use", "use"].index),
        "reasons": [f"{language}: {reason}" for language, part in tested.items() for reason in part["reasons"]],
        "found": {
            f"{language}: {name}": found for language, part in tested.items() for name, found in part["found"].items()
        },
        "queries": sum(part["queries"] for part in tested.values()),
    }  # fmt: skip


def new_text_side(script, base, base_processor, rows, args, work: Path, output: Path):
    """Another text encoder whose projection is taught by the base's English embeddings, then the rows' teacher."""
    for part in rows.values():
        teach(part, base, base_processor)
    set_seed(args.seed)
    model = NrccrModel.from_dual_encoder(script.base, text_encoder=script.text_encoder)
    processor = base_processor.with_tokenizer(script.text_encoder, script.text_prefix)
    english = {
        split: [row | {"target_caption": row["source_caption"]} for row in part] for split, part in rows.items()
    }
    model.set_trained_layers(0, False, visual_head=False)
    cache = frozen_cache(model, processor, english["train"] + english["validation"], work)
    own = distillation_arguments(args, feature_distillation_loss_weight=1.0, train_visual_head=False)
    own.output_dir = str(work / "text_side")
    own.num_train_epochs = max(own.num_train_epochs, TEXT_SIDE_EPOCHS)  # on cached states; a recipe for LoRA has few
    train(model, cache, english, own)
    model.to(args.device)
    model.config.dual_encoder = {"name": str(output / "model"), "revision": None}
    model.eval().save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    return model, processor


def rival(name: str, base: NrccrModel, processor, language: str, rows: dict, args, work: Path):
    """The rival's model and the language to ask it in."""
    model = NrccrModel.from_dual_encoder(base.made_for()["name"])
    if name == "trunk_calibration":
        return trunk_calibration(model, processor, rows["train"], args), None
    cache = frozen_cache(model.set_trained_layers(0, False), processor, rows["train"], work)
    if name == "m2m":
        return m2m(model, cache, rows["train"], args), None
    return embed_distillation(model, language, cache, rows["train"], args), language


def read_me(report: dict, script: LanguageArguments, output: Path, languages: list[str]) -> str:
    table = format_markdown(report["found"]) if report["found"] else ""
    loaded = output / "model" if script.text_encoder else report["base"]["name"]
    loading = "\n".join(f'model.load_language("{language}", "{output}")' for language in languages)
    return f"""# {report["language"]} for {report["base"]["name"]}

Learned from {report["captions"]:,} captions ({script.source_language}) and machine translation by
{report["translator"]}; the picture side is as it was, and so is every index.

```python
model = NrccrModel.from_dual_encoder("{loaded}").eval()
{loading}
model.set_language("{languages[0]}")
```

**{report["verdict"]}**{": " + "; ".join(report["reasons"]) if report["reasons"] else ""}

{table}
"""


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, FetchError, TranslationError) as error:  # what a user can put right
        sys.exit(f"error: {error}")
