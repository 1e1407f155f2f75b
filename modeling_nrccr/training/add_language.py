"""Adds a language to a dual encoder that you use already, from English captions and machine translation alone; no
picture is encoded again:

    python examples/add_language.py --base outputs/demo --captions captions.csv --target_language gl \
        --output_dir outputs/gl

`captions.csv` has a column `caption` (or is a .txt file, a caption a line; or name `--dataset` of datasets_scripts).
Writes into `output_dir` the language file, a few megabytes (`model.load_language("gl", "outputs/gl")`), `report.json`
and `README.md`. With `--eval human.csv` (columns `image` and `target_caption`, written by people; `caption`, their
English, if you have it) the report says how well the language is searched, beside the base, the translated query and
what else a team would try (`--rivals`), and "do not use" where it is worse than the base. Run it again: it goes on
where it was stopped. Every field of recipes/add_language.yaml is also a flag. Where captions have pictures
(column `image`), `--config recipes/add_language_pictures.yaml` learns more, from the base's view of them.

`--target_language gl,ca,es` teaches one adapter several languages, each as often as the others; `load_language` takes
the file under any name, so under each of them.
"""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, set_seed

from datasets_scripts.reading.debian import FetchError
from datasets_scripts.reading.splits import group_key, split_of

from ..adapter_settings import DEFAULTS as ADAPTER_DEFAULTS
from ..adapter_settings import check_adapter
from ..cli.common import command
from ..data.captions import OF_LANGUAGE, Captions, by_language, read_captions, read_eval
from ..data.collator import DataCollatorForCrossLingualRetrieval
from ..data.lexicon import check_lexicon, lexicon_rows
from ..data.load import balance, load_caption_dataset
from ..data.trained_split import check_unseen, split_seed, write_trained_split
from ..files import write_file, writing
from ..loading.encoders import encoder_label, find_encoder
from ..media import load_image
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from ..publishing.card import PARALLEL, describe_reading, language_card
from ..publishing.tables import format_table
from ..recipes.mappings import read_mapping
from ..recipes.settings import RECIPES, option, parse_fields
from ..translation.base import TranslationError
from ..translation.cache import load_engine
from ..translation.engines import split_engines
from ..two_text_sides import join_text_sides
from .arguments import NrccrTrainingArguments
from .baselines import distillation_arguments, embed_distillation, frozen_cache, m2m, trunk_calibration
from .checkpoints import last_complete_checkpoint
from .examination import TRANSLATED, Examination, embed_pictures, merge_reports
from .feature_cache import FeatureCache, fingerprint
from .losses import NrccrLoss
from .teacher import add_teacher_embeds as teach
from .tokenizer_coverage import tokenizer_coverage, why_unread
from .trainer import NrccrTrainer


CONFIG = RECIPES / "add_language.yaml"
HELD_OUT, HELD_OUT_SEED = {"validation": 0.1}, 2208  # not a split seed: those captions are all of one side
RIVALS = ("embed_distillation", "m2m", "trunk_calibration")
TEXT_SIDE_EPOCHS = 60
SEVERAL = "mul"  # ISO 639: multiple languages
HUMAN = ["image_id", "target_caption", "reference_source_caption"]
NOT_TESTED = "not tested"
READ = 2000  # captions that the tokenizer is tried on, where there are no human ones


@dataclass
class LanguageArguments:
    """What is added to what."""

    config: str = option(str(CONFIG), "YAML file with any of these fields.")
    base: str = option("outputs/demo", "Folder or hub id: CLIP, SigLIP 2, ..., open_clip:NAME, or a model of ours.")
    text_encoder: str | None = option(None, "Another text encoder in the place of the base's own, e.g. multilingual.")
    text_prefix: str = option("", "Of text_encoder, e.g. 'query: ' for e5.")
    captions: str | None = option(
        None,
        "English captions: .csv or .jsonl with a column caption, or .txt; or parallel sentences: .tsv, or columns "
        "source and target. Of each language: gl=FILE;ca=FILE.",
    )
    dataset: str | None = option(None, "Instead: builders of datasets_scripts; they bring a test of human captions.")
    data_dir: str | None = option(None, "Folder of the data set.")
    split_seed: int | None = option(None, "Seed of the splits by groups of captions; default: the base's own.")
    eval: str | None = option(
        None, "Human captions: .csv or .jsonl with image, target_caption and perhaps caption; or gl=FILE;ca=FILE."
    )
    source_language: str = option("en", "Language of the captions.")
    target_language: str = option("gl", "Language that is added; several, joined by ',', in one adapter.")
    translator: str = option(
        "apertium", "Machine translation engines, joined by ','; or of each language: gl=A,B;ca=C."
    )
    lexicon: str = option("none", "Words that are translated too: wordnet:5000, or a file, a word a line; or none.")
    rivals: str = option("none", f"Trained and tested beside it: none, all, or some of {', '.join(RIVALS)}.")
    adapter: dict | str | None = option(
        None, "kind=lora,rank=32; also center, noise, layers. `nrccr list adapters` has the kinds."
    )

    RENAMED = {name: f"adapter: {{{name}: ...}}" for name in ADAPTER_DEFAULTS}

    def __post_init__(self):
        self.adapter = check_adapter(read_mapping(self.adapter, "adapter"))


def training_rows(
    captions: Captions, script: LanguageArguments, language: str, back_wanted: bool
) -> tuple[dict[str, list[dict]], str]:
    """Captions and their translations by each engine, split by group into train and validation; and who made them.
    Translated back only where `back_wanted`."""
    pairs = [(script.source_language, language), (language, script.source_language)]
    splits, names = {"train": [], "validation": []}, []

    def add(number: int, source: str, target: str, again: str | None, first: bool):
        split = split_of(group_key(source), HELD_OUT_SEED, HELD_OUT)
        row = {
            "image_id": str(number),
            "caption_id": str(number),
            "source_caption": source,
            "target_caption": target,
            "back_translation": again,
        }
        if split == "train" or first:
            splits[split].append(row)

    if captions.translations is not None:
        for number, (source, target) in enumerate(zip(captions.texts, captions.translations)):
            add(number, source, target, None, True)
        if back_wanted:
            raise ValueError(
                "parallel sentences have no translation back, which the loss back_translation or "
                "--pair_weighting agreement reads: leave these out, or give captions and an engine"
            )
        if script.lexicon != "none":
            print(f"{language}: the lexicon is left out, parallel sentences ask no engine", flush=True)
        return splits, PARALLEL
    for spec in translators(script, language):
        engine = load_engine(spec, pairs, script.data_dir, needed=pairs if back_wanted else pairs[:1])
        made = engine.translate(captions.texts, *pairs[0])
        back = engine.translate(made, *pairs[1]) if back_wanted else [None] * len(made)
        for number, (source, target, again) in enumerate(zip(captions.texts, made, back)):
            add(number, source, target, again, not names)
        names.append(engine.name)
    if script.lexicon != "none":
        splits["train"] += lexicon_rows(
            script.lexicon, *pairs[0], ",".join(translators(script, language)), script.data_dir
        )
    return splits, ", ".join(names)


def run_fingerprint(script: LanguageArguments, args: NrccrTrainingArguments, rows: dict[str, list[dict]]) -> str:
    """Of what is trained on what: another recipe or other captions are no continuation."""
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
    """Goes on from the last whole checkpoint in `args.output_dir`."""
    collator = DataCollatorForCrossLingualRetrieval(cache)
    trainer = NrccrTrainer(model, args, rows["train"], rows["validation"], data_collator=collator)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    return trainer


def main(arguments: list[str] | None = None):
    classes = (LanguageArguments, NrccrTrainingArguments)
    script, args = parse_fields(classes, sys.argv[1:] if arguments is None else arguments, CONFIG)
    with writing(f"{args.output_dir}-checkpoints"):
        run(script, args)


def run(script: LanguageArguments, args: NrccrTrainingArguments):
    if (script.captions is None) == (script.dataset is None):
        raise ValueError("give --captions FILE or --dataset NAME, one of the two")
    rivals = RIVALS if script.rivals == "all" else tuple(filter(None, script.rivals.replace("none", "").split(",")))
    if unknown := set(rivals) - set(RIVALS):
        raise ValueError(f"no rivals {', '.join(sorted(unknown))}: all, none, or some of {', '.join(RIVALS)}")
    check_lexicon(script.lexicon, args.text_only)
    output, languages = Path(args.output_dir), [code.strip() for code in script.target_language.split(",")]
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
            print(f"{language} is inside the base's own text side: the new model goes without it", flush=True)
            base.remove_language(language)

    captions, test_rows, load_row = read_data(script, languages, not args.text_only)
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
        print_left_out(language, exams[language])
    readings = {
        language: measure_reading(script, language, base_processor, exam.asked, exam.english)
        for language, exam in exams.items()
        if all(exam.english)
    }
    back_wanted = "back_translation" in args.needed_views()
    parts = {language: training_rows(captions[language], script, language, back_wanted) for language in languages}
    rows = join_languages([of_language for of_language, _ in parts.values()], args.seed)
    engines = ", ".join(dict.fromkeys(names for _, names in parts.values()))
    texts = {text for of_language in captions.values() for text in of_language.texts}
    print(f"{len(texts):,} captions, translated by {engines}: {len(rows['train']):,} pairs to train on")
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
    elif (
        script.adapter["kind"] == "lora" and args.text_only
    ):  # else every step reads the source captions, through all layers
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
        "reasons": ["no human captions were given (--eval): nobody knows how good it is"],
        "found": {},
        "queries": 0,
        "language": script.target_language,
        "source_language": script.source_language,
        "base": base.made_for(),
        "text_encoder": script.text_encoder and encoder_label(script.text_encoder),
        "translator": engines,
        "data": script.dataset or data_name(script.captions, languages),
        "split_seed": script.split_seed,
        "adapter": script.adapter,
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
            others = {other: rival(other, base, base_processor, name, rows, args, work) for other in rivals}
            tested = {language: exam.report((model, name, processor), others) for language, exam in exams.items()}
            for language, exam in exams.items():
                tested[language]["reasons"] += seen_before(script, exam, texts)
            report |= merge_reports(tested)
    except BaseException as error:  # the language is trained: its report is written whatever happens to the test
        report["reasons"] = [f"the test ended early: {type(error).__name__}: {error}"]
        raise
    finally:
        write_file(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_file(output / "README.md", language_card(report, str(output), loaded))
    if report["found"]:
        print(format_table(report["found"]))
    print(f"{report['verdict']}{': ' if report['reasons'] else ''}{'; '.join(report['reasons'])}")
    print(f"wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def read_data(
    script: LanguageArguments, languages: list[str], with_pictures: bool
) -> tuple[dict[str, Captions], dict[str, list[dict]], dict[str, Callable]]:
    """Of each language the captions, the human test captions (where there are some), and what loads the picture of
    one of these by its number. The split seed becomes the base's own."""
    captions, test_rows, load_row = {}, {}, {}
    if script.dataset:
        script.split_seed = split_seed(script.base, script.split_seed, script.dataset)
        for language in languages:
            dataset = load_caption_dataset(
                script.dataset,
                language,
                script.split_seed,
                data_dir=script.data_dir,
                source_language=script.source_language,
            )
            train, test = dataset["train"], dataset["test"]
            # those of the first language for all: each learns from the same captions
            first = {}
            for number, caption in enumerate(train["source_caption"]):
                first.setdefault(caption, number)
            load = lambda number, rows=train: rows[number]["image"]  # noqa: E731
            captions[language] = next(iter(captions.values()), Captions(list(first), first, load))
            if len(test):
                test_rows[language] = test.select_columns(HUMAN).to_list()
                load_row[language] = lambda rows, number, test=test: test[number]["image"]
                english = test["reference_source_caption"]
                check_unseen(script.base, english, f"the test of {script.dataset}, split seed {script.split_seed}")
    else:
        for language, file in by_language(script.captions, languages, "--captions").items():
            captions[language] = read_captions(Path(file), language, with_pictures)
        several = [of_language.translations for of_language in captions.values() if of_language.translations]
        if any(first == second for first, second in itertools.combinations(several, 2)):
            raise ValueError(
                f"{script.captions} does not say which of {script.target_language} it translates into: name a file of "
                "each, gl=FILE;ca=FILE, or the languages in its first line, en<TAB>gl<TAB>ca"
            )
    if script.eval:
        if len(languages) > 1 and not OF_LANGUAGE.match(script.eval):
            raise ValueError(
                f"--eval {script.eval} has captions of one language, but {script.target_language} are added: name a "
                f'file of each, --eval "{";".join(f"{language}=FILE" for language in languages)}"'
            )
        for language, file in by_language(script.eval, languages, "--eval").items():
            test_rows[language] = read_eval(Path(file))
            load_row[language] = lambda rows, number: load_image(rows[number]["image"])
    return captions, test_rows, load_row


def translate_queries(script: LanguageArguments, spec: str, language: str, queries: list[str]) -> list[str]:
    pair = (language, script.source_language)
    return load_engine(spec, [pair], script.data_dir).translate(queries, *pair)


def print_left_out(language: str, exam: Examination):
    if exam.broken:
        print(f"{language}: left out, {len(exam.broken):,} test pictures that cannot be read:")
        print("".join(f"  {reason}\n" for reason in exam.broken.values()), end="", flush=True)
    if exam.untranslated:
        print(f"{language}: the row '{TRANSLATED}' is left out: {exam.untranslated}", flush=True)


def measure_reading(
    script: LanguageArguments, language: str, processor, texts: list[str], sources: list[str]
) -> dict[str, dict]:
    """How the base's tokenizer reads a language, and the new text encoder's where there is one; printed, with the
    recipe that follows from it."""
    found = read_by(processor, texts, sources)
    print(f"{language}, read by the base: {describe_reading(found)}", flush=True)
    found["recipe"] = "LoRA in the base: --config recipes/recommended.yaml"
    if found["reasons"]:
        found["recipe"] = (
            "another text encoder that knows it, such as --text_encoder multilingual-e5-small --text_prefix 'query: '"
        )
    if script.text_encoder:
        tokenizer = AutoTokenizer.from_pretrained(script.text_encoder)
        found["text_encoder"] = read_by(tokenizer, texts, sources)
        print(f"{language}, read by {encoder_label(script.text_encoder)}: {describe_reading(found['text_encoder'])}")
    else:
        print(f"{language}, recipe: {found['recipe']}", flush=True)
    return found


def read_by(processor, texts: list[str], sources: list[str]) -> dict:
    tokenizer = getattr(processor, "tokenizer", processor)
    sides = [
        [text.lower() for text in side] if getattr(processor, "lower_case", False) else side
        for side in (texts, sources)
    ]
    target, source = (tokenizer_coverage(tokenizer, side) for side in sides)
    return {"language": target, "source": source, "reasons": why_unread(target, source)}


def give_pictures(captions: dict[str, Captions], rows: dict, base: NrccrModel, processor, work: Path):
    """Gives each row the base's embedding of its caption's picture. Raises ValueError for a caption without one."""
    images, load = {}, {}
    for of_language in captions.values():
        if missing := [text for text in of_language.texts if text not in of_language.images]:
            raise ValueError(
                f"{missing[0]!r} and {len(missing) - 1:,} others have no picture: add a column image, or "
                "train with --text_only true"
            )
        images |= {text: str(image) for text, image in of_language.images.items()}
        load |= {str(image): partial(of_language.load, image) for image in of_language.images.values()}
    embeds, _ = embed_pictures(load, lambda name: load[name](), base, processor, work)
    for row in itertools.chain(*rows.values()):
        row["image_embeds"] = embeds[images[row["source_caption"]]]


def seen_before(script: LanguageArguments, exam: Examination, texts: set[str]) -> list[str]:
    """What makes the numbers of a test too good."""
    notes, english = [], [caption for caption in exam.english if caption]
    try:
        check_unseen(script.base, english, "the human test captions")
    except ValueError as error:
        notes.append(f"the numbers flatter: {error}")
    groups = {group_key(text) for text in texts}
    shared = sum(group_key(caption) in groups for caption in english)
    if shared:
        notes.append(f"{shared:,} of {len(english):,} test captions are among those that were trained on")
    return notes


def data_name(spec: str, languages: list[str]) -> str:
    """Of caption files, without their folders."""
    return "+".join(dict.fromkeys(Path(file).stem for file in by_language(spec, languages, "--captions").values()))


def join_languages(parts: list[dict[str, list[dict]]], seed: int) -> dict[str, list[dict]]:
    """The rows of every language, in training as many of each."""
    return {
        "train": balance([rows["train"] for rows in parts], seed),
        "validation": sum((rows["validation"] for rows in parts), []),
    }


def translators(script: LanguageArguments, language: str) -> list[str]:
    """The engines of a language: all of `translator`, or of "gl=A,B;ca=C" its own. Raises ValueError where it has
    none."""
    languages = [code.strip() for code in script.target_language.split(",")]
    return split_engines(by_language(script.translator, languages, "--translator")[language])


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
    """The rival's model and the language to ask it in."""
    model = NrccrModel.from_dual_encoder(base.made_for()["name"])
    if name == "trunk_calibration":
        return trunk_calibration(model, processor, rows["train"], args), None
    cache = frozen_cache(model.set_trained_layers(0, False), processor, rows["train"], work)
    if name == "m2m":
        return m2m(model, cache, rows["train"], args), None
    return embed_distillation(model, language, cache, rows["train"], args), language


if __name__ == "__main__":
    command("what was translated and trained is kept: the same command goes on")(main)()
