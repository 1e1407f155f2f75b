"""How noisy a translated data set is, as a table, JSON and a page to read."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path

import datasets

from ..data.load import load_caption_dataset, translated_by
from ..data.names import language_name
from ..files import write_file
from ..translation.cache import load_engine
from ..translation.columns import add_translations
from ..translation.noise import noise_report
from .search_page import STYLE


# name in the report -> title, form, what it is
MEASURES = {
    "captions": ("captions", "{:,}", ""),
    "confidence": ("confidence", "{:.2f}", "mean of what the three texts alone say of a translation, 0 to 1"),
    "round_trip_chrf": ("round-trip chrF", "{:.1f}", "the translation back against the caption, 0 to 100"),
    "round_trip_bleu": ("round-trip BLEU", "{:.1f}", "the same, by words"),
    "reference_chrf": ("chrF to reference", "{:.1f}", "the translation against a caption that people wrote, 0 to 100"),
    "reference_bleu": ("BLEU to reference", "{:.1f}", "the same, by words"),
    "length_ratio": ("length ratio", "{:.2f}", "characters of the translation over those of the caption, median"),
    "copied_letters": ("copied letters %", "{:.1f}", "letters in words that stand in the caption too"),
    "copied": ("copied %", "{:.1f}", "translations that are the caption, word for word"),
    "empty": ("empty %", "{:.1f}", "translations without a letter or digit"),
    "repeated_words": ("repeated words %", "{:.1f}", "a phrase three times in a row"),
    "same_output": ("same output %", "{:.1f}", "several captions have this translation"),
    "odd_length": ("odd length %", "{:.1f}", "less than half or more than twice the usual length ratio"),
    "wrong_language": ("wrong language %", "{:.1f}", "clearly in another language, as far as an identifier can tell"),
}


def cell(entry: Mapping, name: str) -> str:
    value = entry[name]
    return "–" if value is None else MEASURES[name][1].format(value)


def entry_title(entry: Mapping, languages: bool = True) -> str:
    """Return a title such as `train: English to Galician, apertium`."""
    codes = (entry["source_language"], entry["target_language"])
    pair = " to ".join(map(language_name, codes)) if languages else "-".join(codes)
    return f"{entry['split']}: {pair}" + (f", {entry['engine']}" if entry["engine"] else "")


def format_entries(entries: Sequence[Mapping]) -> str:
    """Return the report as lines of text: a measure a line, an entry a column. What no entry has is left out."""
    names = [name for name in MEASURES if any(entry[name] is not None for entry in entries)]
    columns = [["", "", *(MEASURES[name][0] for name in names)]]
    for entry in entries:
        title, _, engine = entry_title(entry, languages=False).partition(", ")
        columns.append([title, engine, *(cell(entry, name) for name in names)])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for label, *cells in zip(*columns):
        aligned = (text.rjust(width) for text, width in zip(cells, widths[1:]))
        lines.append("  ".join([label.ljust(widths[0]), *aligned]))
    return "\n".join(line for line in lines if line.strip())


# ----------------------------------------------------------------------------------------------------------- HTML

NOISE_STYLE = """
main { max-width: 76rem; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .75rem .45rem 0;
  border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .8rem; }
tbody th { font-weight: 600; min-width: 9rem; }
h3 { font-size: 1rem; margin-top: 1.5rem; }
tbody th small { display: block; font-weight: 400; color: var(--soft); max-width: 24rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 0;
  padding-left: 1.25rem; }
thead .number { white-space: normal; min-width: 5.5rem; }
.bars { display: grid; grid-template-columns: repeat(10, 1fr); gap: 4px; align-items: end; height: 8rem;
  margin-top: 1.25rem; max-width: 34rem; }
.bars div { display: flex; flex-direction: column; justify-content: end; height: 100%; font-size: .7rem;
  color: var(--soft); text-align: center; font-variant-numeric: tabular-nums; }
.bars i { display: block; background: var(--good); border-radius: 4px 4px 0 0; min-height: 1px; }
.scale { display: flex; justify-content: space-between; max-width: 34rem; color: var(--soft); font-size: .75rem;
  border-top: 1px solid var(--line); padding-top: .25rem; }
.worst td { overflow-wrap: anywhere; min-width: 9rem; }
.worst td.number { min-width: 0; }
.worst small { display: block; color: var(--soft); font-size: .72rem; margin-top: .15rem; }
.flag { display: inline-block; color: var(--miss); background: var(--miss-page); border-radius: 6px; padding: 0 .4em;
  margin: .1rem .25rem .1rem 0; font-size: .75rem; white-space: nowrap; }
.note { color: var(--soft); font-size: .85rem; margin-top: .5rem; max-width: 52rem; }
"""


def render_page(title: str, entries: Sequence[Mapping]) -> str:
    """Return the page as text: no script, no file and no address beside it; all texts of the data are escaped."""
    intro = (
        "Confidence is what a caption, its translation and the translation back say of the translation, without a "
        "human one: how much of the caption came back, less what was left untranslated on the way."
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{NOISE_STYLE}</style>\n</head>\n<body>\n<main>\n<header><h1>{escape(title)}</h1>"
        f"<p>{intro}</p></header>\n{_overview(entries)}{''.join(map(_section, entries))}</main>\n</body>\n</html>\n"
    )


def _overview(entries: Sequence[Mapping]) -> str:
    head = "".join(f"<th class=number>{escape(entry_title(entry))}</th>" for entry in entries)
    lines = ""
    for name, (title, _, meaning) in MEASURES.items():
        if any(entry[name] is not None for entry in entries):
            cells = "".join(f"<td class=number>{cell(entry, name)}</td>" for entry in entries)
            lines += f"<tr><th scope=row>{title}<small>{meaning}</small></th>{cells}</tr>\n"
    return (
        f"<section><h2>All measures</h2><div class=scroll><table><thead><tr><th></th>{head}</tr></thead>\n"
        f"<tbody>{lines}</tbody></table></div></section>\n"
    )


def _section(entry: Mapping) -> str:
    notes = []
    if entry["languages"]:
        found = ", ".join(f"{escape(code)} {count}" for code, count in list(entry["languages"].items())[:8])
        notes.append(f"Wrong languages, by captions: {found}{' …' if len(entry['languages']) > 8 else '.'}")
    scores = entry["confidence_correlation"]
    if scores and scores["spearman"] is not None:
        notes.append(
            f"Correlation of confidence with chrF to the references: Spearman {scores['spearman']:.2f}, "
            f"Pearson {scores['pearson']:.2f}."
        )
    lines = "".join(f"<p class=note>{note}</p>" for note in notes)
    return f"<section><h2>{escape(entry_title(entry))}</h2>{_histogram(entry)}{lines}{_worst(entry)}</section>\n"


def _histogram(entry: Mapping) -> str:
    counts = entry["confidence_histogram"]
    if counts is None:
        return ""
    bars = "".join(
        f'<div title="confidence {low / 10:.1f} to {(low + 1) / 10:.1f}">{count:,}'
        f'<i style="height:{70 * count / max(*counts, 1):.1f}%"></i></div>'
        for low, count in enumerate(counts)
    )
    return (
        f'<div class=bars role="img" aria-label="captions by confidence, in ten bins">{bars}</div>'
        "<div class=scale><span>0</span><span>captions by confidence</span><span>1</span></div>"
    )


def _worst(entry: Mapping) -> str:
    rows = entry["worst"]
    if not rows:
        return ""
    rated, judged, returned = (
        any(row[name] is not None for row in rows) for name in ("confidence", "quality", "back_translation")
    )
    source, target = (language_name(entry[side]) for side in ("source_language", "target_language"))
    titles = [source, target, *([f"back in {source}"] if returned else []), *(["reference"] if judged else [])]
    head = "".join(f"<th>{escape(name)}</th>" for name in titles)
    head += "".join(["<th class=number>confidence</th>"] * rated + ["<th class=number>chrF</th>"] * judged)
    lines = ""
    for row in rows:
        flags = "".join(f"<span class=flag>{name.replace('_', ' ')}</span>" for name in row["flags"])
        texts = (
            [row["source"], row["translation"]] + [row["back_translation"]] * returned + [row["reference"]] * judged
        )
        cells = [f"<bdi>{escape(text or '')}</bdi>" for text in texts]
        cells[0] += f"<small>{escape(row['caption_id'])}</small>"
        cells[1] += f"<div>{flags}</div>" if flags else ""
        numbers = [row["confidence"], "{:.2f}"] * rated, [row["quality"], "{:.0f}"] * judged
        lines += "<tr>" + "".join(f"<td>{text}</td>" for text in cells)
        for value, form in filter(None, numbers):
            lines += f"<td class=number>{'–' if value is None else form.format(value)}</td>"
        lines += "</tr>\n"
    return (
        f"<h3>The {len(rows)} worst, by {'chrF to the reference' if judged else 'confidence'}</h3>"
        f"<div class=scroll><table class=worst><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>"
    )


# ------------------------------------------------------------------------------------------------------------ run


def load_translated(
    data: str, language: str, translator: str, source_language: str, data_dir: str | None, split_seed: int, splits
) -> datasets.DatasetDict:
    """Return the data set with its translations: those that it brought, else made here. Pictures may be missing."""
    dataset = load_caption_dataset(data, language, split_seed, "translated", data_dir, source_language)
    if splits:
        if unknown := [split for split in splits if split not in dataset]:
            raise ValueError(f"{data} has no split {', '.join(unknown)}; it has {', '.join(dataset)}")
        dataset = datasets.DatasetDict({split: dataset[split] for split in splits})
    if translated_by(dataset, translator):
        return dataset
    pair = (source_language, language)
    engine = load_engine(translator, [pair, pair[::-1]], data_dir)
    return add_translations(dataset, engine, *pair)


def report_noise(
    data: str = "tuxpaint+cldr_emoji",
    language: str = "gl",
    output_dir: str | Path = "outputs/noise",
    *,
    translator: str = "apertium",
    source_language: str = "en",
    data_dir: str | None = None,
    split_seed: int = 0,
    splits: Sequence[str] = (),
    against_human: bool = False,
    num_worst: int = 50,
) -> list[dict]:
    """
    Measure the translations of a data set, and write `noise.json` and `noise.html`.

    Args:
        data: data sets, joined by "+", a file or a folder, as for [`load_caption_dataset`].
        translator: engine, where the data has no translations yet.
        splits: which; default: all.
        against_human: compares with human captions of training too.
        num_worst: pairs to show of each split.

    Returns:
        an entry of measures for each split and engine, as `noise.json` has them; `format_entries` makes lines of them.

    Raises:
        ValueError: there is no such split, or nothing is translated.
        TranslationError: where the engine failed.
    """
    dataset = load_translated(data, language, translator, source_language, data_dir, split_seed, splits)
    human = None
    if against_human:  # target captions, by split and caption_id
        parts = load_caption_dataset(data, language, split_seed, "human", data_dir, source_language)
        human = {split: dict(zip(rows["caption_id"], rows["target_caption"])) for split, rows in parts.items()}
    entries = noise_report(dataset, human, num_worst)
    if not entries:
        raise ValueError(f"{data} has no machine translations: name an engine (--translator)")
    settings = {"data": data, "source_language": source_language, "language": language, "split_seed": split_seed}
    settings |= {package: version(package) for package in ("sacrebleu", "py3langid")}
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    title = f"Translation noise: {data}, {language_name(source_language)} and {language_name(language)}"
    report = json.dumps({"settings": settings, "entries": entries}, indent=1, ensure_ascii=False, allow_nan=False)
    for name, text in {"noise.json": report + "\n", "noise.html": render_page(title, entries)}.items():
        write_file(output / name, text)
    return entries
