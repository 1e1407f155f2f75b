"""What a language is learned from and tested on, from files or from data sets, with its translations."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers.utils import logging

from datasets_scripts.reading.splits import group_key, split_of

from ..data.captions import OF_LANGUAGE, Captions, by_language, read_captions, read_eval
from ..data.lexicon import WORD, lexicon_rows
from ..data.load import BUILDERS, balance, load_caption_dataset
from ..data.trained_split import check_unseen, split_seed
from ..media import load_image
from ..modeling_nrccr import NrccrModel
from ..publishing.card import PARALLEL
from ..recipes.fields import ANCHORS, LanguageArguments
from ..translation.cache import load_engine
from ..translation.engines import split_engines
from .examination import Examination, embed_pictures


logger = logging.get_logger(__name__)
HELD_OUT, HELD_OUT_SEED = {"validation": 0.1}, 2208  # not a split seed: those captions are all of one side
HUMAN = ["image_id", "target_caption", "reference_source_caption"]


def is_data_set(data: str) -> bool:
    """Tell whether `data` names data sets, or the folder of one, and no file of captions."""
    if data.partition("+")[0].partition(":")[0] in (*BUILDERS, "parquet") or Path(data).is_dir():
        return True
    return not (OF_LANGUAGE.match(data) or Path(data).exists() or Path(data).suffix)


def read_data(
    script: LanguageArguments, languages: list[str], with_pictures: bool
) -> tuple[dict[str, Captions], dict[str, list[dict]], dict[str, Callable]]:
    """Return of each language the captions, the human test captions (where there are some), and what loads the picture
    of one of these by its number. The split seed becomes the base's own."""
    captions, test_rows, load_row = {}, {}, {}
    if is_data_set(script.data):
        script.split_seed = split_seed(script.base, script.split_seed, script.data)
        for language in languages:
            dataset = load_caption_dataset(
                script.data,
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
                check_unseen(script.base, english, f"the test of {script.data}, split seed {script.split_seed}")
    else:
        for language, file in by_language(script.data, languages, "--data").items():
            captions[language] = read_captions(Path(file), language, with_pictures)
        several = [of_language.translations for of_language in captions.values() if of_language.translations]
        if any(first == second for first, second in itertools.combinations(several, 2)):
            raise ValueError(
                f"{script.data} does not say which of {script.language} it translates into: name a file of "
                "each, gl=FILE;ca=FILE, or the languages in its first line, en<TAB>gl<TAB>ca"
            )
    if script.test:
        if len(languages) > 1 and not OF_LANGUAGE.match(script.test):
            raise ValueError(
                f"--test {script.test} has captions of one language, but {script.language} are added: name a "
                f'file of each, --test "{";".join(f"{language}=FILE" for language in languages)}"'
            )
        for language, file in by_language(script.test, languages, "--test").items():
            test_rows[language] = read_eval(Path(file))
            load_row[language] = lambda rows, number: load_image(rows[number]["image"])
    return captions, test_rows, load_row


def translate_queries(script: LanguageArguments, spec: str, language: str, queries: list[str]) -> list[str]:
    """Return the queries in the language of the captions, by one engine."""
    pair = (language, script.source_language)
    return load_engine(spec, [pair], script.data_dir).translate(queries, *pair)


def training_rows(
    captions: Captions, script: LanguageArguments, language: str, back_wanted: bool
) -> tuple[dict[str, list[dict]], str]:
    """Return captions and their translations by each engine, split by group into train and validation; and who made
    them. Translated back only where `back_wanted`."""
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
            logger.info(f"{language}: the lexicon is left out, parallel sentences ask no engine")
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


def translators(script: LanguageArguments, language: str) -> list[str]:
    """Return the engines of a language: all of `translator`, or of "gl=A,B;ca=C" its own. Raises ValueError where it
    has none."""
    languages = [code.strip() for code in script.language.split(",")]
    return split_engines(by_language(script.translator, languages, "--translator")[language])


def check_anchor(script: LanguageArguments, captions: dict[str, Captions]):
    """Raise ValueError for words that are to anchor the source language where there is no lexicon."""
    if "words" not in ANCHORS[script.source_anchor]:
        return
    parallel = all(of_language.translations is not None for of_language in captions.values())
    if parallel or script.lexicon == "none":
        why = "parallel sentences go without a lexicon" if parallel else "there is no lexicon (--lexicon wordnet:5000)"
        raise ValueError(f"source_anchor={script.source_anchor!r} needs words, but {why}: choose captions")


def anchor_rows(anchor: str, parts: list[dict[str, list[dict]]]) -> list[dict]:
    """Return rows whose target caption is the source caption: each source that is trained on once, in whatever
    languages and by whatever engines it comes. A word that is held out as a caption is none of them. `anchor`: which
    sources, of `ANCHORS`."""
    held_out = {group_key(row["source_caption"]) for rows in parts for row in rows["validation"]}
    unique = {}
    for row in itertools.chain(*(rows["train"] for rows in parts)):
        wanted = ("words" if row["image_id"].startswith(WORD) else "captions") in ANCHORS[anchor]
        if wanted and group_key(row["source_caption"]) not in held_out:
            unique.setdefault(row["source_caption"], row)
    return [
        row
        | {
            "caption_id": f"{row['caption_id']}#source",
            "target_caption": source,
            "back_translation": row["back_translation"] and source,
        }
        for source, row in unique.items()
    ]


def join_languages(parts: list[dict[str, list[dict]]], seed: int, anchors: Sequence[dict] = ()) -> dict[str, list]:
    """Return the rows of every language, in training as many of each; `anchors` are those of one more."""
    return {
        "train": balance([*(rows["train"] for rows in parts), *([list(anchors)] if anchors else [])], seed),
        "validation": sum((rows["validation"] for rows in parts), []),
    }


def data_name(spec: str, languages: list[str]) -> str:
    """Return the names of data sets, or of caption files without their folders."""
    if is_data_set(spec):
        return Path(spec).name
    return "+".join(dict.fromkeys(Path(file).stem for file in by_language(spec, languages, "--data").values()))


def give_pictures(captions: dict[str, Captions], rows: dict, base: NrccrModel, processor, work: Path):
    """Give each row the base's embedding of its caption's picture. Raises ValueError for a caption without one."""
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
    """Return what makes the numbers of a test too good."""
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
