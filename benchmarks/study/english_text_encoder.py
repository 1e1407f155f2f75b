"""Adds four languages to a base that reads English alone, in each way that there is, and says what human queries find.

    python -m benchmarks.study.english_text_encoder           # trains and tests; goes on where it was stopped
    python -m benchmarks.study.english_text_encoder --page    # docs/english_text_encoders.md, from what was run here

What was run is a line of benchmarks/results/english_text_encoder.jsonl; the draws that intervals over splits are made
of lie beside the models, in outputs/english_text_encoder. A run that lacks them is run again.

The base is real: all-MiniLM-L6-v2 and the demo's picture tower, trained by the recipe `english` on the
English captions of real pictures. Each row is a run of `nrccr add-language`, all four languages in one adapter.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks import ROOT, records
from benchmarks.machine import machine
from benchmarks.pages import fill
from modeling_nrccr.files import write_file
from modeling_nrccr.retrieval.bootstrap import interval


DATASET, LANGUAGES, SPLITS = "tuxpaint+cldr_emoji", ("gl", "ca", "es", "cs"), (100, 101, 102)
NAMES = {"gl": "Galician", "ca": "Catalan", "es": "Spanish", "cs": "Czech"}
WORK = ROOT / "outputs/english_text_encoder"
RESULTS, PAGE = records.RESULTS / "english_text_encoder.jsonl", ROOT / "docs/english_text_encoders.md"
ENGINES = (
    "gl=apertium,apertium+es+apertium;ca=apertium,apertium+es+apertium;es=apertium,apertium+ca+apertium;cs=dictionary"
)
# four languages in one adapter: an epoch shows it as many pairs as three of one language
RECOMMENDED = ["--recipe=recommended", "--num_train_epochs=1"]
NEW_SIDE = ["--text_encoder=multilingual-e5-small", "--text_prefix=query: "]
ROWS = {
    "new_linear": ("another text encoder beside it (e5), linear adapter", [*NEW_SIDE, f"--translator={ENGINES}"]),
    "new_lora": (
        "another text encoder beside it (e5), recommended",
        [*RECOMMENDED, *NEW_SIDE, f"--translator={ENGINES}"],
    ),
    "new_lora_long": (
        "the same, three times as long",
        [*RECOMMENDED, *NEW_SIDE, f"--translator={ENGINES}", "--num_train_epochs=3"],
    ),
    "own_lora": ("LoRA in its own text encoder, recommended", [*RECOMMENDED, f"--translator={ENGINES}"]),
    "human": (
        "e5 beside it, LoRA from human captions (bound)",
        [*RECOMMENDED, *NEW_SIDE, "--lexicon=none", "--num_train_epochs=3"],
    ),
}


def train_base(split: int) -> Path:
    """Return the folder of the English-only base of a split, trained where it is not there."""
    from modeling_nrccr.training.run import train_recipe

    folder = WORK / f"base-{split}"
    if not (folder / "metrics.json").exists():
        train_recipe(
            "english",
            text_encoder="all-MiniLM-L6-v2",
            text_prefix="",
            split_seed=split,
            output_dir=folder,
            overwrite=True,
        )
    return folder


def human_translators(split: int) -> str:
    """Write the training captions in people's words, as files of ready translations; return the engines' specs."""
    from modeling_nrccr.data.load import load_caption_dataset

    specs = []
    for language in LANGUAGES:
        rows = load_caption_dataset(DATASET, language, split, "human")["train"]
        pairs = dict(zip(rows["source_caption"], rows["target_caption"]))
        lines = [f"en\t{language}", *(f"{source}\t{target}" for source, target in pairs.items())]
        file = WORK / f"human-{split}" / f"{language}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, "\n".join(lines) + "\n")
        specs.append(f"{language}=file:{file}")
    return ";".join(specs)


def run(row: str, split: int) -> dict:
    """Train a row on a split; return what it finds, language by language, with its interval and every draw's SumR."""
    from modeling_nrccr.training import add_language

    exams = []

    class Examination(add_language.Examination):
        def report(self, *args):
            exams.append(self)
            return super().report(*args)

    arguments = ROWS[row][1]
    if row == "human":
        arguments = [*arguments, f"--translator={human_translators(split)}"]
    folder, own = WORK / f"{row}-{split}", add_language.Examination
    add_language.Examination = Examination
    try:
        given = [f"--output_dir={folder}", f"--data={DATASET}", f"--language={','.join(LANGUAGES)}"]
        add_language.run(*add_language.parse_arguments([str(train_base(split)), *arguments, *given]))
    finally:
        add_language.Examination = own
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    np.savez(
        draws({"row": row, "split_seed": split}),
        **{f"{language}|{name}": sums for language, exam in zip(LANGUAGES, exams) for name, sums in exam.sums.items()},
    )
    found = {
        language: {
            name: {"sum_recall": round(float(sums[0]), 2), "interval": np.round(interval(sums), 2).tolist()}
            for name, sums in exam.sums.items()
        }
        for language, exam in zip(LANGUAGES, exams)
    }
    return {
        "row": row,
        "label": ROWS[row][0],
        "split_seed": split,
        "seed": report["seed"],
        "steps": report["steps"],
        "verdicts": report["verdicts"],
        "reasons": report["reasons"],
        "tokenizer": report["tokenizer"],
        "found": found,
        "machine": machine(),
    }


def draws(result: dict) -> Path:
    """Return the file of every draw's SumR of a run."""
    return WORK / f"{result['row']}-{result['split_seed']}.npz"


def means(results: list[dict], row: str, name: str, language: str, other: tuple | None = None) -> np.ndarray:
    """Return the mean SumR over splits, then of every draw, `(1 + DRAWS,)`; with `other`, a row and what it asked,
    the difference to that."""
    sums = []
    for result in results:
        if result["row"] != row:
            continue
        value = np.load(draws(result))[f"{language}|{name}"]
        if other:
            value = value - np.load(draws(result | {"row": other[0]}))[f"{language}|{other[1]}"]
        sums.append(value)
    return np.mean(sums, 0)


def shown(values: np.ndarray, sign: str = "") -> str:
    low, high = interval(values)
    return f"{values[0]:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def of_splits(count: int) -> str:
    return "" if count == len(SPLITS) else f" ({count} of {len(SPLITS)} splits)"


def write_page(results: list[dict]):
    """Write the tables of docs/english_text_encoders.md."""
    ours, fused = "this language", "this language, half its translation"
    lines = [
        ("the base, asked in the language", "new_lora", "base"),
        ("**the base, asked the query's machine translation**", "new_lora", "translated query"),
        ("LoRA in its own text encoder (recommended)", "own_lora", ours),
        ("the same, fused with the translation", "own_lora", fused),
        ("e5 beside it, linear adapter", "new_linear", ours),
        ("the same, fused with the translation", "new_linear", fused),
        ("**e5 beside it, LoRA (recommended)**", "new_lora", ours),
        ("**the same, fused with the translation**", "new_lora", fused),
        ("e5 beside it, LoRA, three times as long", "new_lora_long", ours),
        ("the same, fused with the translation", "new_lora_long", fused),
        ("e5 beside it, LoRA from human captions (bound)", "human", ours),
        ("English before", "new_lora", "English, before"),
        ("English after, LoRA in its own text encoder", "own_lora", "English, this language"),
        ("English after, e5 beside it", "new_lora", "English, this language"),
    ]
    splits = Counter(result["row"] for result in results)
    head = ["| SumR |", *(f" {NAMES[language]} |" for language in LANGUAGES)]
    table = ["".join(head), "| --- |" + " ---: |" * len(LANGUAGES)]
    table += [
        f"| {label}{of_splits(splits[row])} | "
        + " | ".join(shown(means(results, row, name, of)) for of in LANGUAGES)
        + " |"
        for label, row, name in lines
        if splits[row]
    ]
    differences = ["| difference, on the same draws |" + "".join(head[1:]), table[1]]
    asked, before = ("new_lora", "translated query"), ("new_lora", "English, before")
    for label, row, name, other in (
        ("e5 beside it, LoRA, less the translated query", "new_lora", ours, asked),
        ("the same fused, less the translated query", "new_lora", fused, asked),
        ("LoRA in its own encoder fused, less the translated query", "own_lora", fused, asked),
        ("English after, less before, e5 beside it", "new_lora", "English, this language", before),
    ):
        if splits[row]:
            cells = " | ".join(shown(means(results, row, name, of, other), "+") for of in LANGUAGES)
            differences.append(f"| {label}{of_splits(splits[row])} | {cells} |")
    fill(PAGE, {"found": "\n".join(table) + "\n", "differences": "\n".join(differences) + "\n"})


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the page, from what was run")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--splits", nargs="+", type=int, default=SPLITS)
    args = parser.parse_args(argv)
    found = records.read(RESULTS)
    done = {(result["row"], result["split_seed"]) for result in found if draws(result).exists()}
    for row in () if args.page else args.rows:
        for split in args.splits:
            if (row, split) not in done:
                records.put(RESULTS, run(row, split), ("row", "split_seed"))
    results = records.read(RESULTS)
    if missing := [draws(result).stem for result in results if not draws(result).exists()]:
        sys.exit(f"{PAGE} stays as it was, for want of draws in {WORK}: run again {', '.join(missing)}")
    write_page(results)


if __name__ == "__main__":
    main()
