"""What a language is learned from and tested on: files of captions, of parallel sentences, of human captions."""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets_scripts.caption_files import kind_of, read_csv, read_jsonl, read_records
from datasets_scripts.reading.columns import clean_caption
from datasets_scripts.reading.picture_files import find_pictures
from datasets_scripts.reading.text_files import read_text_lines

from ..media import load_image
from ..translation.base import one_line


FEWEST = 200  # captions, below which a language is not worth a file
OF_LANGUAGE = re.compile(r"\s*([A-Za-z]{2,3}(?:-\w+)*)=")
PAIR = ("source", "target")


@dataclass
class Captions:
    """
    Args:
        texts: source captions, each once; of parallel sentences as often as they are translated.
        images: of each caption that has a picture, what `load` takes.
        load: gives the picture.
        translations: of parallel sentences, one for each text.
    """

    texts: list[str]
    images: dict = field(default_factory=dict)
    load: Callable = load_image
    translations: list[str] | None = None


def by_language(spec: str, languages: Sequence[str], flag: str) -> dict[str, str]:
    """Read what a flag says of each language: "gl=A;ca=B", or one value for all. Raises ValueError for a language that
    it leaves out, or that is not added."""
    if not OF_LANGUAGE.match(spec) or Path(spec).exists():
        return dict.fromkeys(languages, spec)
    pieces = re.split(rf";(?={OF_LANGUAGE.pattern})", spec)
    own = {OF_LANGUAGE.match(piece)[1]: piece.split("=", 1)[1].strip().rstrip(";") for piece in pieces[::2]}
    if missing := [language for language in languages if language not in own]:
        raise ValueError(f"{flag} {spec!r} names nothing for {missing[0]}: add ';{missing[0]}=...'")
    if unknown := sorted(own.keys() - set(languages)):
        raise ValueError(f"{flag} {spec!r} names {unknown[0]}, which is not added: only {', '.join(languages)}")
    return own


def read_captions(path: Path, language: str, with_pictures: bool = False) -> Captions:
    """
    Read captions (a .txt file, a caption a line; .csv, .tsv or .jsonl with a column `caption`, and `image` where they
    have pictures) or parallel sentences (.tsv; .csv or .jsonl with the columns `source` and `target`).

    Args:
        language: of the translations, where the first line of a .tsv names languages.
        with_pictures: finds the pictures too.

    Raises:
        ValueError: there are too few, or what [`read_pairs`] and `read_records` find amiss.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of captions")
    if is_parallel(path):
        pairs = list(dict.fromkeys(read_pairs(path, language)))
        captions = Captions([source for source, _ in pairs], translations=[target for _, target in pairs])
    elif kind_of(path) == ".txt":
        lines = (clean_caption(line) for _, line in read_text_lines(path))
        captions = Captions(list(dict.fromkeys(filter(None, lines))))
    else:
        named = {}
        for record in read_records(path, needed=("caption",)):
            named.setdefault(record["caption"], record.get("image"))
        images = find_all(path, named.values()) if with_pictures else {}
        captions = Captions(list(named), {text: images[name] for text, name in named.items() if name in images})
    if len(set(captions.texts)) < FEWEST:
        raise ValueError(
            f"{path} has {len(set(captions.texts))} different captions: a language needs {FEWEST}, better thousands"
        )
    return captions


def is_parallel(path: Path) -> bool:
    """Tell whether a file has sentences and their translations: every .tsv whose first line names no column
    `caption`."""
    if kind_of(path) == ".tsv":
        return "caption" not in next(read_text_lines(path), (1, ""))[1].split("\t")
    reader = {".csv": read_csv, ".jsonl": read_jsonl}.get(kind_of(path))
    first = next(reader(path), (0, {}))[1] if reader else {}
    return set(PAIR) <= first.keys()


def read_pairs(path: Path, language: str) -> list[tuple[str, str]]:
    """
    Read pairs of a sentence and its translation, each as one line. The first line of a .tsv may name the columns:
    `source` and `target`, or languages, of which the first is the source's (`en<TAB>gl<TAB>ca`).

    Raises ValueError for a line without two texts, or columns without the language; names the line.
    """
    if kind_of(path) in (".csv", ".jsonl"):
        reader = read_csv if kind_of(path) == ".csv" else read_jsonl
        rows = [(number, row.get("source"), row.get("target")) for number, row in reader(path)]
    else:
        lines = ((number, line.split("\t")) for number, line in read_text_lines(path) if line.strip())
        number, first = next(lines, (1, []))
        column = 1
        names = [name.strip() for name in first]
        if len(names) > 1 and all(re.fullmatch(r"[a-z]{2,3}(-\w+)*", name) for name in names):
            if language not in names[1:]:
                raise ValueError(f"{path}, line {number}: no column {language!r}, but {', '.join(names)}")
            column = names.index(language)
        elif names[:2] != list(PAIR):
            lines = itertools.chain([(number, first)], lines)
        rows = [(number, cells[0], cells[column] if column < len(cells) else "") for number, cells in lines]
    pairs = []
    for number, source, target in rows:
        if not all(isinstance(text, str) and one_line(text) for text in (source, target)):
            raise ValueError(
                f"{path}, line {number}: a sentence and its translation are needed, not {source!r} and {target!r}; "
                "fill it or leave the line out"
            )
        pairs.append((one_line(source), one_line(target)))
    return pairs


def find_all(path: Path, names: Sequence[str | None]) -> dict[str, str]:
    """Find the path of each picture that a caption file names: in `images` beside the file, or in its own folder, as
    `CaptionFiles` looks for them. Raises ValueError for those that are nowhere."""
    folders = [folder for folder in (path.parent / "images", path.parent) if folder.is_dir()]
    names = list(dict.fromkeys(filter(None, names)))
    found = find_pictures(folders, names)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{path}: there is no picture {missing[0]}, nor {len(missing) - 1:,} others of {len(names):,}, in "
            f"{' or '.join(map(str, folders))}: add them, or leave their lines out"
        )
    return found


def read_eval(path: Path) -> list[dict]:
    """Read rows with `image_id`, `image` (a path), `target_caption` and `reference_source_caption` (or None). Raises
    ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of human captions")
    records = read_records(path, needed=("image", "target_caption"))
    images = find_all(path, [record["image"] for record in records])
    return [
        {
            "image_id": os.path.realpath(images[record["image"]]),
            "image": images[record["image"]],  # one, however named
            "target_caption": record["target_caption"],
            "reference_source_caption": record.get("caption"),
        }
        for record in records
    ]
