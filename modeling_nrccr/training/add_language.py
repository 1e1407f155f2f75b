"""
Adds a language to a dual encoder that is used already, from captions and machine translation alone; no picture is
encoded again.

Writes into `output_dir` the language file, a few megabytes (`model.load_language("gl", "outputs/gl")`), `report.json`
and `README.md`. With human captions to test on (`test`) the report says how well the language is searched, beside the
base, the translated query and what else a team would try (`rivals`), and "do not use" where it is worse than the
base. Run again, it goes on where it was stopped. Several languages (`language="gl,ca,es"`) are taught to one adapter,
each as often as the others; `load_language` takes the file under any name, so under each of them.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from datasets_scripts.reading.debian import FetchError

from ..data.collator import DataCollatorForCrossLingualRetrieval
from ..data.lexicon import check_lexicon
from ..data.trained_split import write_trained_split
from ..files import write_file, writing
from ..loading.encoders import encoder_label, find_encoder
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from ..publishing.card import describe_reading, language_card
from ..recipes.fields import RIVALS, LanguageArguments
from ..recipes.settings import parse_fields
from ..translation.base import TranslationError
from ..two_text_sides import join_text_sides
from .arguments import NrccrTrainingArguments
from .baselines import distillation_arguments, embed_distillation, frozen_cache, m2m, trunk_calibration
from .checkpoints import last_complete_checkpoint
from .examination import TRANSLATED, Examination, merge_reports
from .feature_cache import FeatureCache, fingerprint
from .language_data import (
    anchor_rows,
    check_anchor,
    data_name,
    give_pictures,
    join_languages,
    read_data,
    seen_before,
    training_rows,
    translate_queries,
    translators,
)
from .losses import NrccrLoss
from .teacher import add_teacher_embeds as teach
from .tokenizer_coverage import tokenizer_coverage, why_unread
from .trainer import NrccrTrainer


logger = logging.get_logger(__name__)
DEFAULT_OUTPUT = "trainer_output"  # of the Trainer: nobody has named one
TEXT_SIDE_EPOCHS = 60
SEVERAL = "mul"  # ISO 639: multiple languages
NOT_TESTED = "not tested"
READ = 2000  # captions that the tokenizer is tried on, where there are no human ones


def run_fingerprint(script: LanguageArguments, args: NrccrTrainingArguments, rows: dict[str, list[dict]]) -> str:
    """Return the fingerprint of what is trained on what: another recipe or other captions are no continuation."""
    names = (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "seed",
        "text_only",
        "min_steps",
        "warmup_steps",
    )
    recipe = [getattr(args, name) for name in names] + [NrccrLoss.from_arguments(args).settings]
    texts = [(row["source_caption"], row["target_caption"]) for part in rows.values() for row in part]
    return fingerprint(script.base, script.text_encoder, script.adapter, recipe, texts)


def train(model: NrccrModel, cache: FeatureCache, rows: dict, args: NrccrTrainingArguments) -> NrccrTrainer:
    """Train, from the last whole checkpoint in `args.output_dir` on."""
    collator = DataCollatorForCrossLingualRetrieval(cache)
    trainer = NrccrTrainer(model, args, rows["train"], rows["validation"], data_collator=collator)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    return trainer


def parse_arguments(
    arguments: Sequence[str] = (), recipe: str | None = None, **given
) -> tuple[LanguageArguments, NrccrTrainingArguments]:
    """Return the recipe's fields, then those `given`, then the flags, as [`parse_fields`] does."""
    classes = (LanguageArguments, NrccrTrainingArguments)
    script, args = parse_fields(classes, arguments, recipe, "nrccr add-language", **given)
    if args.output_dir in (None, DEFAULT_OUTPUT):
        args.output_dir = f"outputs/{script.language.replace(',', '-')}"
    return script, args


def add_language(base: str, data: str, language: str = "gl", recipe: str = "linear", **fields) -> dict:
    """
    Add a language to a dual encoder, as `nrccr add-language` does.

    Args:
        base: folder or hub id of the dual encoder: CLIP, SigLIP 2, ..., `open_clip:NAME`, or a model of ours.
        data: files of captions, or data sets.
        language: its code; several, joined by ",", in one adapter.
        recipe: its name, or a YAML file.
        fields: of the recipe, which win: `test="human.csv"`, `output_dir="outputs/gl"`, `num_train_epochs=10`.

    Returns:
        `dict`: what stands in `report.json`, with "verdict", "reasons", and "found": of each way to search the test,
        its metrics.

    Raises:
        ValueError: for what can be put right: a field, a file, a folder that holds another run.
        TranslationError: where the engine is not to be had.
    """
    return run(*parse_arguments([], recipe, base=base, data=data, language=language, **fields))


def run(script: LanguageArguments, args: NrccrTrainingArguments) -> dict:
    """Add the language, test it, and write `output_dir`: the language file, `report.json`, `README.md`. Returns what
    stands in `report.json`."""
    with writing(f"{args.output_dir}-checkpoints"):
        return train_and_test(script, args)


def train_and_test(script: LanguageArguments, args: NrccrTrainingArguments) -> dict:
    """Do what `run` does, which holds the folder meanwhile."""
    if script.data is None:
        raise ValueError("give --data: a file of captions, or a data set of `nrccr list data`")
    rivals = RIVALS if script.rivals == "all" else tuple(filter(None, script.rivals.replace("none", "").split(",")))
    if unknown := set(rivals) - set(RIVALS):
        raise ValueError(f"no rivals {', '.join(sorted(unknown))}: all, none, or some of {', '.join(RIVALS)}")
    check_lexicon(script.lexicon, args.text_only)
    output, languages = Path(args.output_dir), [code.strip() for code in script.language.split(",")]
    for model_name in filter(None, (script.base, script.text_encoder)):  # before anything is translated
        find_encoder(model_name)
    work = Path(f"{output}-checkpoints")
    name = languages[0] if len(languages) == 1 else SEVERAL
    args.train_language = name
    if script.text_encoder:
        script.text_encoder = find_encoder(script.text_encoder)
    base, base_processor = NrccrModel.from_dual_encoder(script.base), NrccrProcessor.from_dual_encoder(script.base)
    base.to(args.device)
    if script.text_encoder:
        for language in [code for code in base.language_adapters if base.has_lora(code)]:
            logger.info(f"{language} is inside the base's own text side: the new model goes without it")
            base.remove_language(language)

    captions, test_rows, load_row = read_data(script, languages, not args.text_only)
    check_anchor(script, captions)
    # whatever can fail in the test does so now: pictures, the queries' translations
    exams = {}
    for language, rows in test_rows.items():
        engines = [] if captions[language].translations else translators(script, language)
        exams[language] = Examination(
            rows,
            partial(load_row[language], rows),
            base,
            base_processor,
            partial(translate_queries, script, engines[0], language) if engines else None,
            (ValueError, OSError, ImportError, FetchError, TranslationError),
        )
        say_left_out(language, exams[language])
    readings = {
        language: measure_reading(script, language, base_processor, exam.asked, exam.english)
        for language, exam in exams.items()
        if all(exam.english)
    }
    back_wanted = "back_translation" in args.needed_views()
    parts = {language: training_rows(captions[language], script, language, back_wanted) for language in languages}
    pairs = [of_language for of_language, _ in parts.values()]
    anchors = anchor_rows(script.source_anchor, pairs)
    rows = join_languages(pairs, args.seed, anchors)
    engines = ", ".join(dict.fromkeys(names for _, names in parts.values()))
    texts = {text for of_language in captions.values() for text in of_language.texts}
    logger.info(f"{len(texts):,} captions, translated by {engines}: {len(rows['train']):,} pairs to train on")
    for language in languages:
        if language not in readings:
            some = parts[language][0]["train"][:READ]
            made, sources = ([row[f"{side}_caption"] for row in some] for side in ("target", "source"))
            readings[language] = measure_reading(script, language, base_processor, made, sources)

    if not args.text_only:
        give_pictures(captions, rows, base, base_processor, work)
    model, processor = base, base_processor
    if script.text_encoder:
        model, processor = new_text_side(script, base, base_processor, rows, args, work, output)
    elif (script.adapter["kind"] == "lora" and args.text_only) or (anchors and base.source_text_side is not None):
        # else every step reads the source captions, through all layers; or by the side that is trained
        teach(rows["train"], base, base_processor)
    side, side_processor = model.language_side(), processor.language_side()
    set_seed(args.seed)
    side.add_language(name, **script.adapter)
    cache = frozen_cache(side.train_language(name), side_processor, rows["train"] + rows["validation"], work)
    args.output_dir = str(work / f"language-{run_fingerprint(script, args, rows)}")
    trainer = train(side, cache, rows, args)
    side.eval().save_language(name, output)

    report = {
        "verdict": NOT_TESTED,
        "reasons": ["no human captions were given (--test): nobody knows how good it is"],
        "found": {},
        "queries": 0,
        "language": script.language,
        "source_language": script.source_language,
        "base": base.made_for(),
        "text_encoder": script.text_encoder and encoder_label(script.text_encoder),
        "translator": engines,
        "data": data_name(script.data, languages),
        "split_seed": script.split_seed,
        "adapter": script.adapter,
        "source_anchor": script.source_anchor,
        "captions": len(texts),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "truncated_captions": side_processor.num_truncated,
        "tokenizer": readings,
    }
    loaded = str(output / "model") if script.text_encoder else None
    write_trained_split(output, report["data"], script.split_seed or 0, texts, [script.base])
    if script.text_encoder:
        write_trained_split(output / "model", report["data"], script.split_seed or 0, texts, [script.base])
    try:
        if exams:
            # they train on the translations alone
            plain = join_languages(pairs, args.seed) if rivals else {}
            others = {other: rival(other, base, base_processor, name, plain, args, work) for other in rivals}
            ours = (model, name, processor)
            tested = {language: exam.report(ours, others, bool(anchors)) for language, exam in exams.items()}
            for language, exam in exams.items():
                tested[language]["reasons"] += seen_before(script, exam, texts)
            report |= merge_reports(tested)
    except BaseException as error:  # the language is trained: its report is written whatever happens to the test
        report["reasons"] = [f"the test ended early: {type(error).__name__}: {error}"]
        raise
    finally:
        write_file(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_file(output / "README.md", language_card(report, str(output), loaded))
    return report


def say_left_out(language: str, exam: Examination):
    """Say which pictures a test goes without, and which of its rows."""
    if exam.broken:
        reasons = "".join(f"\n  {reason}" for reason in exam.broken.values())
        logger.info(f"{language}: left out, {len(exam.broken):,} test pictures that cannot be read:{reasons}")
    if exam.untranslated:
        logger.info(f"{language}: the row '{TRANSLATED}' is left out: {exam.untranslated}")


def measure_reading(
    script: LanguageArguments, language: str, processor, texts: list[str], sources: list[str]
) -> dict[str, dict]:
    """Return how the base's tokenizer reads a language, and the new text encoder's where there is one; said, with the
    recipe that follows from it."""
    found = read_by(processor, texts, sources)
    logger.info(f"{language}, read by the base: {describe_reading(found)}")
    found["recipe"] = "LoRA in the base: --recipe recommended"
    if found["reasons"]:
        found["recipe"] = (
            "another text encoder that knows it, such as --text_encoder multilingual-e5-small --text_prefix 'query: '"
        )
    if script.text_encoder:
        tokenizer = AutoTokenizer.from_pretrained(script.text_encoder)
        found["text_encoder"] = read_by(tokenizer, texts, sources)
        logger.info(
            f"{language}, read by {encoder_label(script.text_encoder)}: {describe_reading(found['text_encoder'])}"
        )
    else:
        logger.info(f"{language}, recipe: {found['recipe']}")
    return found


def read_by(processor, texts: list[str], sources: list[str]) -> dict:
    tokenizer = getattr(processor, "tokenizer", processor)
    sides = [
        [text.lower() for text in side] if getattr(processor, "lower_case", False) else side
        for side in (texts, sources)
    ]
    target, source = (tokenizer_coverage(tokenizer, side) for side in sides)
    return {"language": target, "source": source, "reasons": why_unread(target, source)}


def new_text_side(script, base, base_processor, rows, args, work: Path, output: Path):
    """Return a model, and its processor, in which another text encoder reads languages and the base's own text side
    its language, as it always did; saved in `output/model`. The base's English embeddings teach the new side's
    projection here, and are then the rows' teacher."""
    for part in rows.values():
        teach(part, base, base_processor)
    set_seed(args.seed)
    model = NrccrModel.from_dual_encoder(script.base, text_encoder=script.text_encoder)
    processor = base_processor.language_side().with_tokenizer(script.text_encoder, script.text_prefix)
    english = {}
    for split, part in rows.items():  # each caption once, in whatever languages and by whatever engines it comes
        unique = {row["source_caption"]: row | {"target_caption": row["source_caption"]} for row in part}
        english[split] = list(unique.values())
    model.set_trained_layers(0, False, visual_head=False)
    cache = frozen_cache(model, processor, english["train"] + english["validation"], work)
    own = distillation_arguments(args, {"feature_distillation": 1.0}, train_visual_head=False)
    own.output_dir = str(work / "text_side")
    own.num_train_epochs = max(own.num_train_epochs, TEXT_SIDE_EPOCHS)  # on cached states; a recipe for LoRA has few
    train(model, cache, english, own)
    if base.source_text_side is not None:  # of a base that has two sides the new one takes the place of the second
        model.source_text_side, model.config.source_text_side = base.source_text_side, base.config.source_text_side
        processor = join_text_sides(processor, base_processor.source_side)
    else:
        model.with_source_text_side(base)
        processor = join_text_sides(processor, base_processor)
    model.to(args.device)
    model.config.dual_encoder = {"name": str(output / "model"), "revision": None}
    model.eval().save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    return model, processor


def rival(name: str, base: NrccrModel, processor, language: str, rows: dict, args, work: Path):
    """Return the rival's model and the language to ask it in."""
    model = NrccrModel.from_dual_encoder(base.made_for()["name"])
    if name == "trunk_calibration":
        return trunk_calibration(model, processor, rows["train"], args), None
    cache = frozen_cache(model.set_trained_layers(0, False), processor, rows["train"], work)
    if name == "m2m":
        return m2m(model, cache, rows["train"], args), None
    return embed_distillation(model, language, cache, rows["train"], args), language
