"""The README of an exported folder: what it is, of which base, how good its language is, and how to load it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from ..data.names import language_name
from ..files import write_file
from ..languages import LANGUAGE_FILE
from ..modeling_nrccr import NrccrModel
from ..publishing.card import hub_name
from .check import summarize


MARK = "nrccr-export"  # a tag, by which a folder is known to be one
PICTURES = "the picture side is the base's, bit for bit: an index that the base made stays as it is"
SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")


def is_exported_folder(folder: Path, path: Path) -> bool:
    """Return whether a file in `folder` may be replaced, since an earlier export wrote that."""
    card = folder / "README.md"
    ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    files = [path] if path.is_file() else list(path.rglob("*"))
    return ours and all(file.name == "README.md" or file.suffix in SUFFIXES for file in files)


def find_report(name: str, language: str | None, languages: Sequence[str]) -> dict:
    """Return what `nrccr add-language` says of a language, beside its file or the model; {} where nobody says it."""
    places = [spec.partition("=")[2] for spec in languages if spec.partition("=")[0] == language]
    for place in [*filter(None, places), name]:
        path = Path(place).parent if Path(place).name == LANGUAGE_FILE else Path(place)
        if language and (path / "report.json").is_file():
            report = json.loads((path / "report.json").read_text(encoding="utf-8"))
            if "verdict" in report:
                return report | {"verdict": report.get("verdicts", {}).get(language, report["verdict"])}
    return {}


def write_readme(
    folder: Path,
    library: str,
    model: NrccrModel,
    base: str,
    found: dict[str, dict[str, float]],
    report: dict,
    snippet: str,
    notes: list[str],
):
    """
    Write `README.md`, and let those read the weights whom the umask lets read that.

    Args:
        library: as the Hub calls it.
        base: name of the model that was exported, or that it was made from.
        found: of `compare_embeddings`.
        report: of `find_report`.
        snippet: the lines that load the folder, in which FOLDER stands for it.
        notes: what else is to be known.
    """
    language, base = model.language, hub_name(base.removeprefix("open_clip:"))
    data = ModelCardData(
        language=[code.strip() for code in report.get("language", language or "").split(",") if code] or None,
        license="other",
        license_name="that-of-the-base-model",
        library_name=library,
        pipeline_tag="feature-extraction",
        tags=["text-to-image-retrieval", MARK],
        base_model=base if "/" in base else None,
    )
    added = f", with {language_name(language)} ({language}) added" if language else ""
    lines = ["---", data.to_yaml(), "---", "", f"# {base}{added}", ""]
    lines += [f"For {library} as it is: no other package, no remote code, no language to be set.", ""]
    lines += ["```python", snippet.strip(), "```", ""]
    if language:
        verdict = report.get("verdict", "not tested: nobody knows how good it is")
        lines += ["## Whether to use it", "", f"**{language}: {verdict}**", ""]
        lines += [f"- {reason}" for reason in report.get("reasons", ())]
        lines += [""] if report.get("reasons") else []
        lines += ["Every text is read in this language, English too; how it reads English then was not measured.", ""]
    lines += ["## What was compared", ""]
    lines += [f"- {line}" for line in summarize(found).splitlines()]
    lines += [f"- {note}" for note in notes]
    lines += ["", "Made by `nrccr export` (NRCCR for Hugging Face)."]
    write_file(folder / "README.md", "\n".join(lines) + "\n")
    for path in folder.rglob("*.safetensors"):  # which is written for its owner alone
        shutil.copymode(folder / "README.md", path)
