"""Measures the noise of the engines known here, and how far `translation_confidence` tells it:

    python -m benchmarks.translation.noise --multi30k ../shared/data/multi30k

Writes docs/translation.json and its tables into docs/translation.md. `--rows` measures some rows again and keeps the
others; `--tables` writes the tables alone. What is not to be had here (an engine, Multi30K) is left out, and said so.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version

import numpy as np

from benchmarks import ROOT
from benchmarks.pages import block, fill
from modeling_nrccr.files import write_file


PAGE, REPORT = ROOT / "docs/translation.md", ROOT / "docs/translation.json"
BLOCK = block("translation")

ENGINES = {  # engine and pair -> spec, target language; {cache}: the folder of what is fetched
    **{f"apertium en-{code}": ("apertium", code) for code in ("gl", "ca", "es", "eo")},
    "dictionary en-cs": ("dictionary", "cs"),
    "marian en-cs": ("seq2seq:{cache}/translators/marian-en-cs", "cs"),
}
SCENES_NOISE = (0.25, 0.5, 0.75)
MULTI30K_LANGUAGES = ("de", "fr", "cs")  # in which it has human captions
SEED, NUM_EXAMPLES, NUM_WORST = 0, 3, 50
ENCODER = "multilingual-e5-small"
TEXTS = ("source", "translation", "back_translation", "reference")
COLUMNS = {  # of the tables: name in a row's measures -> title, form
    "captions": ("captions", "{:,}"),
    "reference_chrf": ("chrF, reference", "{:.1f}"),
    "reference_bleu": ("BLEU, reference", "{:.1f}"),
    "round_trip_chrf": ("chrF, round trip", "{:.1f}"),
    "round_trip_bleu": ("BLEU, round trip", "{:.1f}"),
    "confidence": ("confidence", "{:.2f}"),
    "length_ratio": ("length ratio", "{:.2f}"),
    "copied_letters": ("copied letters %", "{:.1f}"),
    "copied": ("copied %", "{:.1f}"),
    "wrong_language": ("wrong language %", "{:.1f}"),
    "same_output": ("same output %", "{:.1f}"),
    "repeated_words": ("repeated words %", "{:.1f}"),
    "empty": ("empty %", "{:.1f}"),
    "odd_length": ("odd length %", "{:.1f}"),
}
SIGNALS = {  # what could tell a good translation from a bad one; the first is what the column holds
    "confidence": "`translation_confidence`",
    "round_trip": "chrF of the round trip alone",
    "kept": "what was not copied, alone",
    "product": "their product, without the square",
    "length": "nearness to the usual length ratio",
    "agreement": f"agreement of caption and translation by {ENCODER}",
    "confidence_agreement": "`translation_confidence` with that encoder (`embed`)",
}


@cache
def engine(row: str):
    """Load the engine of a row, behind the cache of translations."""
    from datasets_scripts.reading.debian import cache_folder
    from modeling_nrccr.translation.cache import load_engine

    spec, target = ENGINES[row]
    return load_engine(spec.format(cache=cache_folder()), [("en", target), (target, "en")])


def round_trip(row: str, sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return translations and back-translations."""
    target = ENGINES[row][1]
    made = engine(row).translate(sources, "en", target)
    return made, engine(row).translate(made, target, "en")


def pictures(row: str) -> dict:
    """Measure the training captions of the demo's pictures, translated and back, against those that people wrote."""
    from modeling_nrccr.data.load import load_caption_dataset
    from modeling_nrccr.translation.noise import Pair

    target = ENGINES[row][1]
    name = "tuxpaint" if target == "eo" else "tuxpaint+cldr_emoji"  # CLDR has no names in Esperanto
    rows = load_caption_dataset(name, target, SEED, "human")["train"]
    ids, sources, humans = (rows[column][:] for column in ("caption_id", "source_caption", "target_caption"))
    made, backs = round_trip(row, sources)
    pairs = [Pair(number, *texts) for number, texts in enumerate(zip(ids, sources, made, backs, humans))]
    entry = measure(pairs, target) | {"data": name, "correlations": correlations(pairs, with_encoder=True)}
    for part in sorted({caption_id.partition("/")[0] for caption_id in ids}):  # emoji and stamps apart
        of_part = [pair for pair in pairs if pair.caption_id.startswith(f"{part}/")]
        entry.setdefault("by_source", {})[part] = correlations(of_part)["confidence"] | {"captions": len(of_part)}
    people = [Pair(pair.row, pair.caption_id, pair.source, pair.reference) for pair in pairs]
    return entry | {"people": measure(people, target)}


def multi30k(row: str, split: str, data_dir: str) -> dict:
    """Measure Multi30K's captions of a split, against people's where it has them in that language."""
    from datasets_scripts.multi30k import Multi30k
    from modeling_nrccr.translation.noise import Pair

    target = ENGINES[row][1]
    has_human = target in MULTI30K_LANGUAGES
    builder = Multi30k(config_name=f"task1-{target if has_human else 'de'}", data_dir=data_dir, target="human")
    builder.download_and_prepare()
    rows = builder.as_dataset()[split]
    ids, sources, humans = (rows[column][:] for column in ("caption_id", "source_caption", "target_caption"))
    made, backs = round_trip(row, sources)
    references = humans if has_human else [None] * len(ids)
    pairs = [Pair(number, *texts) for number, texts in enumerate(zip(ids, sources, made, backs, references))]
    entry = measure(pairs, target) | {"data": f"Multi30K task 1, {split}"}
    return entry | ({"correlations": correlations(pairs, with_encoder=True)} if has_human else {})


def scenes(noise: float) -> dict:
    """Measure the synthetic scenes, whose translator errs at a known rate: confidence against the noise of each
    pair."""
    from datasets_scripts.scenes import Scenes
    from modeling_nrccr.translation.noise import dataset_pairs

    builder = Scenes(config_name="cs", noise=noise, seed=SEED)
    builder.download_and_prepare()
    rows = builder.as_dataset()["train"]
    (pairs,) = dataset_pairs(rows).values()
    true_noise = rows["translation_noise"][:]
    entry = {name: value for name, value in measure(pairs, "cs").items() if name != "examples"}
    entry["true_noise"] = sum(true_noise) / len(true_noise)
    return entry | {"correlations": correlations(pairs, quality=[1 - share for share in true_noise])}


def measure(pairs: Sequence, target: str) -> dict:
    """Return [`measure_noise`] without its 50 worst pairs; instead some drawn at random."""
    from modeling_nrccr.translation.noise import measure_noise

    entry = measure_noise(pairs, "en", target, NUM_WORST)
    for name in ("worst", "confidence_correlation"):
        entry.pop(name)
    entry["languages"] = dict(list(entry["languages"].items())[:5])
    drawn = random.Random(SEED).sample(range(len(pairs)), NUM_EXAMPLES)
    return entry | {"examples": [{text: getattr(pairs[row], text) for text in TEXTS} for row in drawn]}


def correlations(pairs: Sequence, quality: Sequence[float] | None = None, with_encoder: bool = False) -> dict:
    """Return the [`correlation`] of each of `SIGNALS` with the quality of the pairs, by default chrF against the
    references."""
    from modeling_nrccr.translation.noise import copied_share, correlation, encoder_agreement, sentence_chrf

    quality = quality or [sentence_chrf(pair.translation, pair.reference) for pair in pairs]
    kept = np.array([1 - copied_share(pair.source, pair.translation) for pair in pairs])
    trip = np.array([sentence_chrf(pair.back_translation, pair.source) / 100 for pair in pairs])
    ratio = np.log([max(len(pair.translation), 1) / len(pair.source) for pair in pairs])
    confidence = np.array([pair.confidence for pair in pairs])
    signals = {"confidence": confidence, "round_trip": trip, "kept": kept, "product": trip * kept}
    signals["length"] = -np.abs(ratio - np.median(ratio))
    if with_encoder:
        agreement = encoder_agreement([pair.source for pair in pairs], [pair.translation for pair in pairs], embed)
        signals |= {
            "agreement": agreement,
            "confidence_agreement": confidence * (1 + agreement) / 2,
        }
    return {name: correlation(values, quality) for name, values in signals.items()}


def embed(texts: list[str]):
    """Embed texts by a frozen encoder, of shape `(len(texts), hidden_size)`, L2-normalised."""
    from benchmarks.translation.multi30k_text import text_model
    from modeling_nrccr.loading.encoders import find_encoder
    from modeling_nrccr.retrieval.encoding import encode_texts

    model, processor = text_model(find_encoder(ENCODER))
    return encode_texts(model, texts, processor, show_progress=True)


# --------------------------------------------------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, the first column text, the others numbers; and the empty line after it."""
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)] + [""]


def measures_table(entries: Mapping[str, Mapping]) -> list[str]:
    """Return a table of a measure a line, an entry a column; measures that no entry has are left out."""
    rows = [
        [title, *("–" if entry[name] is None else form.format(entry[name]) for entry in entries.values())]
        for name, (title, form) in COLUMNS.items()
        if any(entry[name] is not None for entry in entries.values())
    ]
    return table(["", *entries], rows)


def both(scores: Mapping | None) -> str:
    if not scores or scores["spearman"] is None:
        return "–"
    return f"{scores['spearman']:.2f} / {scores['pearson']:.2f}"


def tables(report: Mapping) -> str:
    """Return the report as Markdown."""
    made, text, drawn = report["pictures"], report["multi30k"], report["scenes"]
    lines = [
        f"Training captions of the demo's pictures, split seed {SEED} (Esperanto: stamps alone). Reference: the "
        "translation against people's; round trip: what came back against the caption. Scores do not regard case.",
        "",
        *measures_table(made),
        "The same of the captions that people wrote, in the same languages: so much of it is no noise.",
        "",
        *measures_table({f"people {row.split()[-1]}": entry["people"] for row, entry in made.items()}),
        "Multi30K task 1: whole sentences. Of the languages here it has human captions in Czech alone.",
        "",
        *measures_table(text),
        "Drawn at random, not chosen:",
        "",
    ]
    for row, entry in made.items():
        for texts in entry["examples"]:
            caption, translation, back, human = (texts[name] for name in TEXTS)
            lines.append(f"- {row}: “{caption}” → “{translation}” → “{back}”; people: “{human}”")
    columns = {row: entry["correlations"] for row, entry in made.items()}
    columns |= {f"Multi30K, {row}": entry["correlations"] for row, entry in text.items() if "correlations" in entry}
    columns |= {f"scenes {noise}": entry["correlations"] for noise, entry in drawn.items()}
    lines += [
        "",
        "### How far the confidence can be trusted",
        "",
        "Correlation, Spearman / Pearson, with the true quality of each pair: chrF against people's caption, and on "
        "the synthetic scenes (Czech) the share of content words that the simulated translator got right, at three "
        "rates of mixed noise. Below it, what else was tried.",
        "",
        *table(
            ["", *columns],
            [[title, *(both(scores.get(name)) for scores in columns.values())] for name, title in SIGNALS.items()],
        ),
        "`translation_confidence` on emoji and stamps apart:",
        "",
    ]
    parts = sorted({part for entry in made.values() for part in entry["by_source"]})
    lines += table(
        ["", *made], [[part, *(both(entry["by_source"].get(part)) for entry in made.values())] for part in parts]
    )
    lines += ["Its mean on the scenes, beside the share of wrong words:", ""]
    means = (
        [name, *(f"{entry[key]:.2f}" for entry in drawn.values())]
        for name, key in (("wrong words", "true_noise"), ("mean confidence", "confidence"))
    )
    lines += table(["", *(f"scenes {noise}" for noise in drawn)], list(means))
    settings = report["settings"]
    missing = ", ".join(settings["left_out"])
    left_out = f" Not to be had when this was measured: {missing}." if missing else ""
    versions = ", ".join(f"{name} {settings[name]}" for name in ("sacrebleu", "py3langid"))
    return "\n".join([*lines, f"Measured with {versions}.{left_out}"]) + "\n"


# ------------------------------------------------------------------------------------------------------------ run


def jobs(data_dir: str | None) -> dict[tuple[str, str], Callable[[], dict]]:
    """Return what is measured, by section and row of the report."""
    result = {("pictures", row): partial(pictures, row) for row in ENGINES}
    result |= {("scenes", f"{noise}"): partial(scenes, noise) for noise in SCENES_NOISE}
    if data_dir:
        rows = [("apertium en-gl", "train"), *((row, "test") for row in ENGINES)]
        result |= {("multi30k", f"{row}, {split}"): partial(multi30k, row, split, data_dir) for row, split in rows}
    return result


def main():
    from datasets_scripts.reading.debian import FetchError
    from modeling_nrccr.translation.base import TranslationError

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].rstrip(":"))
    parser.add_argument("--multi30k", help="folder of Multi30K; without it, its rows stay as they are")
    parser.add_argument("--rows", nargs="*", help="words, such as marian or scenes: rows without any of them stay")
    parser.add_argument("--tables", action="store_true", help="write the tables of the JSON that is there")
    args = parser.parse_args()
    report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    for section in ("pictures", "multi30k", "scenes"):
        report.setdefault(section, {})
    left_out = set(report.get("settings", {}).get("left_out", []))
    work = {} if args.tables else jobs(args.multi30k)
    for (section, row), job in work.items():
        if args.rows and not any(word in f"{section} {row}" for word in args.rows):
            continue
        name = row.split(",")[0]
        try:
            if name in ENGINES:
                engine(name)
        except (TranslationError, FetchError, OSError, ImportError, ValueError) as error:
            left_out.add(f"{section} {row}")
            print(f"left out: {section}, {row}: {error}", file=sys.stderr)
            continue
        start = time.perf_counter()
        report[section][row] = job()
        left_out.discard(f"{section} {row}")
        print(f"{section}, {row}: {time.perf_counter() - start:.0f} s", flush=True)
    for section in ("pictures", "multi30k", "scenes"):  # in one order, however it came about
        known = [row for part, row in jobs("any") if part == section]
        report[section] = {row: report[section][row] for row in known if row in report[section]}
    packages = ("sacrebleu", "py3langid")
    report["settings"] = {package: version(package) for package in packages} | {
        "seed": SEED,
        "encoder": ENCODER,
        "left_out": sorted(left_out),
    }
    write_file(REPORT, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    fill(PAGE, {"translation": tables(report)})
    print(tables(report))


if __name__ == "__main__":
    main()
