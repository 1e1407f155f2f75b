"""Walks the whole path on each base of the bench, from captions to an answered query, and writes docs/bases.md.

    python -m benchmarks.bases.table                       # all of it; goes on where it was stopped
    python -m benchmarks.bases.table clip siglip           # these; the others' rows stay
    python -m benchmarks.bases.table clip siglip --steps linear lora --report bases.json
    python -m benchmarks.bases.table --page                # docs/bases.md alone, from docs/bases.json

Each step is a run of `nrccr add-language`; before the first one the base indexes the held-out pictures by `nrccr
index`. Then a process of its own (`benchmarks/bases/checks.py`) opens what was written and checks it.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.bases.build import DATASET, NAMES, base_folder, captioned, pictures_of_nrccr, read_record
from benchmarks.machine import machine
from benchmarks.pages import fill
from modeling_nrccr.files import write_file
from modeling_nrccr.publishing.tables import markdown_table


WORK, PAGE, REPORT = ROOT / "outputs/bases", ROOT / "docs/bases.md", ROOT / "docs/bases.json"
FOUND = "found.json"  # in the folder of a base
STEPS = {
    "linear": [],
    "lora": ["--recipe=recommended", "--lexicon=none"],
    "pictures": [
        "--recipe=pictures",
        "--adapter=kind=lora,rank=32",
        "--num_train_epochs=3",
    ],
    "several": ["--language=gl,ca"],
    "text_encoder": ["--text_encoder=multilingual-e5-small", "--text_prefix=query: "],
}
HEADS = {
    "linear": "linear",
    "lora": "LoRA, all layers",
    "pictures": "LoRA, with pictures",
    "several": "gl and ca, linear",
    "text_encoder": "another text encoder",
}
# `nrccr add-language` has no entrance for embeddings of pictures that stay with a base
LEFT_OUT = {("embedding_gemma2", "pictures")}
# each with what it may be at most
CHECKS = {
    "loaded": ("the report's SumR, in a fresh process", 0.05),
    "pictures": ("pictures, bit for bit", 0.0),
    "english": ("English, bit for bit", 0.0),
    "cached": ("cached against full pass", 1e-5),
    "alone": ("alone against in a batch", 1e-5),
    "merged": ("merged, saved, opened", 1e-5),
    "published": ("saved whole, opened by AutoModel", 1e-5),
    "sentence_transformers": ("sentence-transformers", 1e-5),
    "onnx": ("ONNX", 1e-4),
    "served": ("served over HTTP", 1e-5),
    "searched": ("the base's index", 1e-5),
    "bfloat16": ("1 - cosine of bfloat16 to float32", 0.05),  # EfficientNet's pictures have the most
}


def write_pictures(folder: Path):
    """Write the held-out pictures as files, the order of the rows in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(captioned("test")[1]):
        picture.save(folder / f"{number:04d}.png")


def write_captions(path: Path):
    """Write the training captions, one a line: what a base is given whose pictures stay with it."""
    write_file(path, "\n".join(dict.fromkeys(captioned("train")[0])) + "\n")


def index_pictures(name: str, pictures: Path, index: Path):
    from modeling_nrccr import NrccrModel, NrccrProcessor, NrccrRetriever
    from modeling_nrccr.retrieval.indexer import index_folder

    base = str(base_folder(name))
    if name != "embedding_gemma2":
        return index_folder(base, pictures, index)
    retriever = NrccrRetriever(NrccrModel.from_dual_encoder(base), NrccrProcessor.from_dual_encoder(base))
    names = sorted(path.name for path in pictures.iterdir())
    retriever.add_embeds(pictures_of_nrccr("test"), names)
    retriever.save(index)


def add(name: str, step: str, work: Path):
    """Run `nrccr add-language` once."""
    from modeling_nrccr.training import add_language

    data = [f"--data={DATASET}"]
    if name == "embedding_gemma2":
        data = [f"--data={work.parent / 'captions.txt'}"]
    given = [str(base_folder(name)), "--language=gl", f"--output_dir={work / step}"]
    flags = [*data, *given, "--disable_tqdm=true", *STEPS[step]]
    add_language.run(*add_language.parse_arguments(flags))


def attempt(call: Callable, log: Path) -> str | None:
    """Return the error's first line, if there was one; all that was printed goes into `log`."""
    with log.open("w", encoding="utf-8") as stream:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            try:
                call()
            except (Exception, SystemExit) as error:
                lines = str(error).strip().splitlines() or [""]
                return f"{type(error).__name__}: {lines[0][:300]}"


def walk(name: str, steps: Sequence[str]) -> dict:
    """Train and check all steps of a base. What an earlier run trained is kept, and what it found where all of it
    held."""
    work, errors = WORK / name, {}
    work.mkdir(parents=True, exist_ok=True)
    found = json.loads((work / FOUND).read_text(encoding="utf-8")) if (work / FOUND).exists() else {}
    found = {step: result for step, result in found.items() if not failures({name: {"steps": {step: result}}})}
    steps = [step for step in steps if step not in found and (name, step) not in LEFT_OUT]
    if not (WORK / "captions.txt").exists():
        write_pictures(WORK / "pictures")
        write_captions(WORK / "captions.txt")
    if not (work / "index").exists():
        if error := attempt(lambda: index_pictures(name, WORK / "pictures", work / "index"), work / "index.log"):
            raise RuntimeError(f"{name}: {error}, see {work / 'index.log'}")
    seconds = {}
    for step in steps:
        start = time.perf_counter()
        if not (work / step / "report.json").exists():
            errors[step] = attempt(lambda step=step: add(name, step, work), work / f"{step}.log")
            seconds[step] = {"seconds": round(time.perf_counter() - start)}
        print(f"{name}, {step}: {errors.get(step) or 'trained'}", flush=True)
    if whole := [step for step in steps if not errors.get(step)]:
        command = [sys.executable, "-m", "benchmarks.bases.checks", name, str(work), *whole]
        with (work / "checks.log").open("w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: the checks failed, see {work / 'checks.log'}")
        made = json.loads(done.stdout.strip().splitlines()[-1])
        found |= {step: result | seconds.get(step, {}) for step, result in made.items()}
        write_file(work / FOUND, json.dumps(found, indent=2) + "\n")
    failed = {step: {"error": reason} for step, reason in errors.items() if reason}
    return {"training": read_record(base_folder(name)), "steps": found | failed}


# --------------------------------------------------------------------------------------------------------- report


def holds(key: str, value: float | str) -> bool:
    return not isinstance(value, str) and value <= CHECKS[key][1]


def failures(report: dict[str, dict]) -> list[str]:
    """Return what did not hold, a line each."""
    lines = []
    for name, of_base in report.items():
        for step, found in of_base["steps"].items():
            if "error" in found:
                lines.append(f"{name}, {step}: {found['error']}")
            for key, value in found.get("checks", {}).items():
                if not holds(key, value):
                    lines.append(f"{name}, {step}, {CHECKS[key][0]}: {value}")
    return lines


def recalls_table(report: dict[str, dict]) -> str:
    rows = []
    for name, of_base in report.items():
        training, steps = of_base["training"], of_base["steps"]
        before = next((found["sum_recall"]["before"] for found in steps.values() if "sum_recall" in found), None)
        cells = [
            f"{steps[step]['sum_recall']['after']:.1f}" if "sum_recall" in steps.get(step, {}) else "-"
            for step in STEPS
        ]
        rows.append([name, f"{training['sum_recall']:.1f}", "-" if before is None else f"{before:.1f}", *cells])
    return markdown_table(["base", "English", "Galician, before", *(HEADS[step] for step in STEPS)], rows)


def checks_table(report: dict[str, dict]) -> str:
    """Return a table of each base's worst of all its steps."""
    rows = []
    for name, of_base in report.items():
        row = [name]
        for key in CHECKS:
            values = [found["checks"][key] for found in of_base["steps"].values() if key in found.get("checks", {})]
            wrong = [value for value in values if not holds(key, value)]
            row.append("fails" if wrong else f"{max(values):.0e}".replace("0e+00", "0") if values else "-")
        rows.append(row)
    return markdown_table(["base", *(head for head, _ in CHECKS.values())], rows)


def write_page(report: dict[str, dict]):
    wrong = failures(report)
    chance = next(iter(report.values()))["training"]["chance"]
    lines = "Every cell holds.\n" if not wrong else "Does not hold:\n\n" + "".join(f"- {line}\n" for line in wrong)
    fill(
        PAGE,
        {
            "recalls": f"\n{recalls_table(report)}\n\nChance: {chance:.1f}.\n\n",
            "checks": f"\n{checks_table(report)}\n\n{lines}\n",
        },
    )


def merged(before: dict[str, dict], report: dict[str, dict]) -> dict[str, dict]:
    """Return `before` with what was walked now in its place; other bases stay, and other steps of the same one."""
    found = dict(before)
    for name, of_base in report.items():
        old, recall = before.get(name), of_base["training"]["sum_recall"]
        kept = old["steps"] if old and old["training"]["sum_recall"] == recall else {}  # else it was trained anew
        steps = kept | of_base["steps"]
        found[name] = of_base | {"steps": {step: steps[step] for step in STEPS if step in steps}}
    return {name: found[name] for name in NAMES if name in found}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--again", action="store_true", help="remove what earlier runs of these bases made")
    parser.add_argument("--report", type=Path, help="JSON of this run, in the place of docs/bases.json and .md")
    parser.add_argument("--page", action="store_true", help="only write docs/bases.md, from docs/bases.json")
    args = parser.parse_args(argv)
    committed = json.loads(REPORT.read_text(encoding="utf-8"))["bases"] if REPORT.exists() else {}
    if args.page:
        return write_page(committed)
    torch.set_num_threads(1)
    report = {}
    for name in args.names:
        if args.again:
            for path in WORK.glob(f"{name}/*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        report[name] = walk(name, args.steps)
        for line in failures({name: report[name]}):
            print(line, flush=True)
    if args.report is None:
        report = merged(committed, report)
    write_file(args.report or REPORT, json.dumps({"machine": machine(), "bases": report}, indent=2) + "\n")
    if args.report is None:
        write_page(report)


if __name__ == "__main__":
    main()
