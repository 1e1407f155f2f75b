"""Translates the captions of a data set both ways, once, for every training that reads them:

    accelerate launch examples/translate.py --dataset tuxpaint+cldr_emoji --target cs --translator dictionary \\
        --output_dir outputs/pictures-cs
    accelerate launch examples/train.py --dataset parquet --data_dir outputs/pictures-cs --target_language cs \\
        --output_dir outputs/demo-cs

Training gets `target_caption` and `back_translation`, validation and test `source_caption`. Of several engines
(`--translator apertium,file:mine.tsv`) these are the first one's, and each engine's are in columns of its own:
`target_caption_apertium`, `back_translation_apertium`, `source_caption_apertium`. Every finished batch goes to a cache
on disk: run again after it was ended in whatever way, it goes on from there.

`datasets.load_dataset("parquet", data_dir="outputs/pictures-cs")` reads the result too (features: after
`import datasets_scripts.features`). Pictures, videos and features that a data set has as files stay where they are.
"""

import argparse
import json
import time
from datetime import timedelta
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from datasets_scripts.reading.columns import CAPTION_FEATURES

from ..cli.common import command
from ..files import replacing_folder
from ..recipes.limits import number
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
    [`add_translations`] by the first engine; if there are several, `target_caption_<engine>`,
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
    That no sentence was lost, doubled or shifted: the rows are those that came in, and each translation is what the
    cache has for the text beside it.

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
    """One Parquet file a split and the record: the folder appears whole or not at all. Empty splits have no file."""
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
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not (output / TRANSLATION_RECORD).is_file():
        raise ValueError(f"{output} is there and was not written by this script: name another --output_dir")
    if not overwrite:
        raise ValueError(f"{output} holds translations already: name another --output_dir, or --overwrite it")


def neural_options(spec: str, state: PartialState, num_beams: int) -> dict:
    """Of several processes each has a GPU of its own."""
    is_neural = any(step.startswith(("seq2seq:", "ctranslate2:")) for step in split_spec(spec)[0])
    return {"device": str(state.device), "num_beams": num_beams} if is_neural else {}


@command("what was translated is kept: the same command goes on")
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="tuxpaint+cldr_emoji", help="builders of datasets_scripts, joined by '+'")
    parser.add_argument("--data_dir", help="folder of the data; Debian packages are fetched where it is not given")
    parser.add_argument("--visual_feature", help="features: a folder, a name in data_dir/FeatureData, or none")
    parser.add_argument("--media_dir", help="folder of pictures or videos; default: images or videos in data_dir")
    parser.add_argument("--source", default="en", help="language of the captions that exist")
    parser.add_argument("--target", required=True, help="language of the searches")
    parser.add_argument(
        "--translator", default="apertium", help="engines, joined by ',': the first one's are trained on"
    )
    parser.add_argument("--num_beams", type=number(1), default=1, help="of neural engines; 1 is greedy")
    parser.add_argument("--split_seed", type=int, default=0, help="of data that is split here, by groups of captions")
    parser.add_argument("--output_dir", required=True, help="folder of the Parquet files, one a split")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output in output_dir")
    parser.add_argument("--cache", default=str(translation_cache_path()), help="file of what was translated before")
    args = parser.parse_args(argv)
    # without cpu=True accelerate makes no group of processes on a machine without a GPU, and each works alone
    use_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=use_cpu, timeout=PATIENCE)
    output, pair, started = Path(args.output_dir), (args.source, args.target), time.perf_counter()
    check_output(output, args.overwrite)
    with state.main_process_first():  # it may fetch and build them
        dataset = load_caption_dataset(
            args.dataset,
            args.target,
            args.split_seed,
            data_dir=args.data_dir,
            source_language=args.source,
            visual_feature=args.visual_feature,
            media_dir=args.media_dir,
        )
        if engine := translated_by(dataset, ""):
            raise ValueError(f"{args.dataset} came with translations by {engine.name}: nothing is wanting")
        pairs = [pair, pair[::-1]] if len(dataset.get("train", ())) else [pair[::-1]]
        engines = [
            load_engine(spec, pairs, args.data_dir, args.cache, state, **neural_options(spec, state, args.num_beams))
            for spec in split_engines(args.translator)
        ]
    names = [engine.name for engine in engines]
    if len(set(names)) < len(names):
        raise ValueError(f"engines of one name have no columns of their own: {', '.join(names)}; leave one out")
    result = translate(dataset, engines, *pair)
    if state.is_main_process:
        check(dataset, result, engines, pair)
        rows = {split: len(part) for split, part in result.items()}
        record = {
            "dataset": args.dataset,
            "source_language": args.source,
            "target_language": args.target,
            "split_seed": args.split_seed,
            "rows": rows,
            "engines": [{"name": engine.name, "version": engine.version} for engine in engines],
        }
        write(result, output, record)
    for engine in engines:
        process = f"process {state.process_index}: " if state.num_processes > 1 else ""
        print(
            f"{process}{engine.name}: {engine.num_translated:,} distinct texts translated, {engine.num_found:,} found"
        )
    if state.is_main_process:
        counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
        print(f"{counts} ({time.perf_counter() - started:.0f} s): {output}", flush=True)


if __name__ == "__main__":
    main()
