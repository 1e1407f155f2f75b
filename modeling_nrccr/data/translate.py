"""Translates the captions of a data set both ways, once, for every training that reads them."""

import json
from datetime import timedelta
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from datasets_scripts.reading.columns import CAPTION_FEATURES

from ..files import replacing_folder
from ..translation.base import TranslationError, one_line
from ..translation.cache import CachedTranslator, load_engine, translation_cache_path
from ..translation.columns import add_translations
from ..translation.engines import split_engines, split_spec
from .load import TRANSLATION_RECORD, load_caption_dataset, translated_by


PATIENCE = timedelta(days=7)  # of a process for the others


def translate(
    dataset: datasets.DatasetDict, engines: list[CachedTranslator], source: str, target: str
) -> datasets.DatasetDict:
    """
    Return [`add_translations`] by the first engine; if there are several, `target_caption_<engine>`,
    `back_translation_<engine>` and `source_caption_<engine>` too, by each: None where the engine was not asked, as
    where a human caption is.
    """
    result = add_translations(dataset, engines[0], source, target)
    if len(engines) == 1:
        return result
    captions = dataset.select_columns(list(CAPTION_FEATURES))
    for engine in engines:
        made = result if engine is engines[0] else add_translations(captions, engine, source, target)
        for split, rows in made.items():
            by_engine = [origin == engine.name for origin in rows["target_origin"]]
            columns = {
                "target_caption": [
                    text if is_its else None for text, is_its in zip(rows["target_caption"], by_engine)
                ],
                "back_translation": rows["back_translation"][:],
                "source_caption": [None] * len(rows) if split == "train" else rows["source_caption"][:],
            }
            for name, texts in columns.items():
                feature = datasets.Value("string")
                result[split] = result[split].add_column(f"{name}_{engine.name}", texts, feature=feature)
    return result


def check(before: datasets.DatasetDict, after: datasets.DatasetDict, engines: list[CachedTranslator], pair: tuple):
    """
    Check that no sentence was lost, doubled or shifted: the rows are those that came in, and each translation is what
    the cache has for the text beside it.

    Raises:
        TranslationError: names split, row and column.
    """
    columns = {"": engines[0]} | {f"_{engine.name}": engine for engine in engines if len(engines) > 1}
    for split, rows in after.items():
        ids = rows["caption_id"][:]
        if ids != before[split]["caption_id"][:]:
            raise TranslationError(f"{split}: {len(before[split])} captions came in, {len(ids)} others came out")
        english = rows["source_caption" if split == "train" else "reference_source_caption"][:]
        for suffix, engine in columns.items():
            target = f"target_caption{suffix}"
            back = ("back_translation" if split == "train" else "source_caption") + suffix
            if suffix:  # None where it was not asked
                made = [row for row, text in enumerate(rows[target]) if text is not None]
            else:
                made = [row for row, origin in enumerate(rows["target_origin"]) if origin == engine.name]
            asked = [own or human for own, human in zip(rows[target], rows["target_caption"])]
            for name, texts, answers, languages, needed in (
                (target, english, rows[target][:], pair, made),
                (back, asked, rows[back][:], pair[::-1], range(len(ids))),
            ):
                lines = {row: one_line(texts[row] or "") for row in needed}
                known = engine.cache.lookup(engine, *engine.check_pair(*languages), set(lines.values()))
                # one that was not answered ("") stays as it was
                made_of = {row: known.get(line) if known.get(line) != "" else line for row, line in lines.items()}
                wrong = [row for row in needed if answers[row] is None or made_of[row] != answers[row]]
                if wrong:
                    row = wrong[0]
                    raise TranslationError(
                        f"{split}, row {row} ({ids[row]}), and {len(wrong) - 1:,} others: {name} is "
                        f"{answers[row]!r}, but {engine.name} translated {lines[row]!r} as {known.get(lines[row])!r}"
                    )


def write(dataset: datasets.DatasetDict, output: Path, record: dict):
    """Write a Parquet file a split and the record; the folder appears whole or not at all. Empty splits have none."""
    with replacing_folder(output, lambda path: path.name in ("data", TRANSLATION_RECORD), "translations") as partial:
        (partial / "data").mkdir()
        for split, rows in dataset.items():
            if len(rows):
                # named so that load_dataset knows any split's name
                file = partial / "data" / f"{split}-00000-of-00001.parquet"
                rows.to_parquet(file)
                if (written := pq.read_metadata(file).num_rows) != len(rows):
                    raise OSError(f"{file} has {written} rows of {len(rows)}: is the disk full?")
        (partial / TRANSLATION_RECORD).write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def check_output(output: Path, overwrite: bool):
    """Raise ValueError for a folder that holds something else, or translations that are not to be replaced."""
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not (output / TRANSLATION_RECORD).is_file():
        raise ValueError(f"{output} is there and was not written by `nrccr translate`: name another --output_dir")
    if not overwrite:
        raise ValueError(f"{output} holds translations already: name another --output_dir, or --overwrite it")


def neural_options(spec: str, state: PartialState, num_beams: int) -> dict:
    """Return what a neural engine takes; of several processes each has a GPU of its own."""
    is_neural = any(step.startswith(("seq2seq:", "ctranslate2:")) for step in split_spec(spec)[0])
    return {"device": str(state.device), "num_beams": num_beams} if is_neural else {}


def translate_captions(
    data: str,
    language: str,
    output_dir: str | Path,
    *,
    translator: str = "apertium",
    source_language: str = "en",
    data_dir: str | None = None,
    visual_feature: str | None = None,
    media_dir: str | None = None,
    num_beams: int = 1,
    split_seed: int = 0,
    overwrite: bool = False,
    cache: str | Path | None = None,
) -> tuple[dict, dict[str, tuple[int, int]]]:
    """
    Translate a data set, and write it as one Parquet file a split, with `translation.json`.

    In several processes, started together, each translates its share and the first one writes.

    Args:
        data: data sets, joined by "+", a file or a folder, as for [`load_caption_dataset`].
        language: that captions are translated into.
        translator: engines, joined by ",": the first one's are trained on.
        num_beams: of neural engines; 1 is greedy.
        split_seed: of data that is split here, by groups of captions.
        overwrite: replaces an earlier output.
        cache: file of what was translated before; default: that of all commands.

    Returns:
        what stands in `translation.json`; and of each engine how many distinct texts this process translated, and how
        many it found translated.

    Raises:
        ValueError: `output_dir` holds something else, or the data came with translations.
        TranslationError: where an engine failed; what it has finished is kept.
    """
    # without cpu=True accelerate makes no group of processes on a machine without a GPU, and each works alone
    use_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=use_cpu, timeout=PATIENCE)
    output, pair = Path(output_dir), (source_language, language)
    check_output(output, overwrite)
    with state.main_process_first():  # it may fetch and build them
        dataset = load_caption_dataset(
            data,
            language,
            split_seed,
            data_dir=data_dir,
            source_language=source_language,
            visual_feature=visual_feature,
            media_dir=media_dir,
        )
        if engine := translated_by(dataset, ""):
            raise ValueError(f"{data} came with translations by {engine.name}: nothing is wanting")
        pairs = [pair, pair[::-1]] if len(dataset.get("train", ())) else [pair[::-1]]
        file = cache or translation_cache_path()
        engines = [
            load_engine(spec, pairs, data_dir, file, state, **neural_options(spec, state, num_beams))
            for spec in split_engines(translator)
        ]
    names = [engine.name for engine in engines]
    if len(set(names)) < len(names):
        raise ValueError(f"engines of one name have no columns of their own: {', '.join(names)}; leave one out")
    result = translate(dataset, engines, *pair)
    record = {
        "data": data,
        "source_language": source_language,
        "language": language,
        "split_seed": split_seed,
        "rows": {split: len(part) for split, part in result.items()},
        "engines": [{"name": engine.name, "version": engine.version} for engine in engines],
    }
    if state.is_main_process:
        check(dataset, result, engines, pair)
        write(result, output, record)
    return record, {engine.name: (engine.num_translated, engine.num_found) for engine in engines}
