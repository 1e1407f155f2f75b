"""
Your own data: a CSV, TSV or JSONL file of `image,caption` beside a folder of pictures.

    from datasets_scripts.caption_files import CaptionFiles
    builder = CaptionFiles(data_dir="my-pictures", source_language="en", target_language="gl")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .reading.columns import caption_columns, clean_caption
from .reading.picture_files import equal_pictures, find_pictures
from .reading.splits import group_key, split_of
from .reading.text_files import TextFilesBuilder, TextFilesConfig, read_text_lines


SUFFIXES = (".csv", ".tsv", ".jsonl")  # each also packed, as .csv.gz
NAMES = {"image", "caption_id"}  # are as they are: a blank or an accent more names another file
COLUMNS = {*NAMES, "caption", "target_caption", "split", "group"}
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass
class CaptionFilesConfig(TextFilesConfig):
    """
    BuilderConfig of CaptionFiles.

    Args:
        source_language, target_language (`str`): of the columns `caption` and `target_caption`.
        seed (`int`, defaults to 0): of the group-wise split where the file has no column `split`, see [`split_of`].
        caption_file (`str`, *optional*): its name in `data_dir`; the only CSV, TSV or JSONL file there.
    """

    source_language: str = "en"
    target_language: str = "gl"
    seed: int = 0
    caption_file: str | None = None


class CaptionFiles(TextFilesBuilder):
    """
    Pictures and captions of the user's own. Columns of the file in `data_dir` (CSV or TSV with a head line, or JSONL):
    `image` (a path below `image_dir`, `data_dir` or its `images`; or `file_name`, as in an image folder of `datasets`)
    and `caption`; if there are any, `target_caption` (by people: for an honest test), `split` (train, validation,
    test), `caption_id`, and `group` (pictures that must stay on one side). A picture is one, however rows call it.
    """

    BUILDER_CONFIG_CLASS = CaptionFilesConfig
    BUILDER_CONFIGS = [CaptionFilesConfig(name="default", version="1.0.0")]
    LICENSE = "that of the pictures and captions in the folder"

    @staticmethod
    def _state_files(data_dir: Path, options: dict) -> Iterable[str]:
        find_caption_file(data_dir, options.get("caption_file"))
        return [""]  # the pictures may lie anywhere in it

    def _read(self, dl_manager) -> dict[str, list[dict]]:
        config = self.config
        if config.data_dir is None:
            raise ValueError(
                "caption_files needs data_dir: the folder that holds a CSV, TSV or JSONL file of image,caption"
            )
        path = find_caption_file(Path(config.data_dir), config.caption_file)
        records = read_records(path)
        columns = {name for record in records for name in record}
        self._places = {record["image"]: f"{path}, line {record['line']}: " for record in reversed(records)}
        contents = self._identify(records)
        if "split" in columns:
            splits = split_by_column(path, records, contents)
        else:
            splits = split_by_group(records, config.seed, contents)
        rows, count, lines = {name: [] for name in self.SPLITS}, {}, {}
        for record, split in zip(records, splits):
            # One source name for all ("pictures"), and the whole path: a.png and a.jpg are two pictures.
            image_id = f"pictures/{record['image']}"
            k = count[image_id] = count.get(image_id, -1) + 1
            caption_id = record.get("caption_id") or f"{image_id}#{k}"
            if caption_id in lines:
                raise ValueError(f"{path}, line {record['line']}: {caption_id} is in line {lines[caption_id]} already")
            lines[caption_id] = record["line"]
            human = record.get("target_caption")
            if split == "train" and config.target == "human" and human is None:
                raise ValueError(
                    f"{path}, line {record['line']}: no target_caption, which target='human' trains on; add it, leave "
                    "the row out, or train with target='translated'"
                )
            languages = {"target_language": config.target_language, "source_language": config.source_language}
            options = {"split": split, "target": config.target, "caption_id": caption_id}
            row = caption_columns(image_id, record["caption"], human, **languages, **options)
            rows[split].append({**row, "picture": record["image"]})
        return rows

    def _identify(self, records: list[dict]) -> dict[str, str]:
        """
        Give each picture one name, whatever rows call it: its file's, below the folder that has it. Returns a digest,
        by name, of each that equals another picture byte for byte.
        """
        folders = self._picture_folders() if self.config.visual_feature is None else []
        roots = [os.path.realpath(folder) for folder in folders]
        found = find_pictures(folders, self._places, self._place)
        names, self._files = {}, {}  # a name by file, and a file by name
        for name, place in list(self._places.items()):
            file = os.path.realpath(found[name]) if name in found else os.path.normpath(name)
            if file not in names:
                names[file] = file
                if name in found:
                    below = [os.path.relpath(file, root) for root in roots]
                    inside = next(path for path in below if not path.startswith(os.pardir))
                    names[file] = inside if inside not in self._files else below[0]
                    self._files[names[file]] = file
            names[name] = names[file]
            self._places.setdefault(names[name], place)
        for record in records:
            record["image"] = names[record["image"]]
        return equal_pictures(self._files)

    def _find_pictures(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self._files[name] for name in names if name in self._files}

    def _picture_folders(self) -> list[str]:
        return [folder for folder in (self.config.image_dir, self.config.data_dir) if folder is not None]

    def _place(self, name: str) -> str:
        return self._places[name]


def find_caption_file(data_dir: Path, name: str | None = None) -> Path:
    """Return `name` in the folder, or the only CSV, TSV or JSONL file there."""
    files = [data_dir / name] if name else sorted(filter(is_caption_file, data_dir.glob("*")))
    if len(files) > 1:
        raise ValueError(
            f"{data_dir} has {len(files)} files of captions, {', '.join(file.name for file in files)}: name one "
            f"(caption_file), as in --data caption_files:{files[0].name}"
        )
    if not files or not is_caption_file(files[0]):
        raise FileNotFoundError(
            f"{data_dir} has no {name or 'CSV, TSV or JSONL file'}: write image,caption in the first line of a .csv "
            "file there, then a line for each caption"
        )
    return files[0]


def is_caption_file(path: Path) -> bool:
    return kind_of(path) in SUFFIXES and path.is_file() and not path.name.startswith(".")


def kind_of(path: Path) -> str:
    """Return the suffix of a file, or of what is packed in it."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def read_records(path: Path, needed: Sequence[str] = ("image", "caption")) -> list[dict]:
    """
    Read the rows of a CSV, TSV or JSONL file as `{"line": number, "image": ..., "caption": ..., ...}`: the known
    columns that it has, captions with single spaces, names as they are, None where a cell is empty. Raises ValueError
    for what is amiss, such as a column of `needed` that is wanting or empty; names the line.
    """
    records, ignored = [], set()
    for line, row in (read_jsonl if kind_of(path) == ".jsonl" else read_csv)(path):
        if "image" not in row and "file_name" in row:
            row["image"] = row.pop("file_name")
        for name in needed:
            if name not in row:
                raise ValueError(
                    f"{path}, line {line}: no column {name!r}; it has {', '.join(map(repr, row)) or 'none'}"
                )
        ignored |= row.keys() - COLUMNS
        record = {"line": line}
        for name in COLUMNS & row.keys():
            if not isinstance(text := row[name] or "", str):
                raise ValueError(f"{path}, line {line}: {name} must be text, not {row[name]!r}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{path}, line {line}: {name} holds {ascii(text[error.start])}, half a character; write it anew"
                ) from error
            record[name] = (text if name in NAMES and text.strip() else clean_caption(text)) or None
        for name in needed:
            if record[name] is None:
                raise ValueError(f"{path}, line {line}: {name} is empty; fill it or leave the line out")
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no rows; each is a picture's path and a caption")
    if ignored:
        print(f"{path.name}: columns that are not read: {', '.join(sorted(map(str, ignored)))}", flush=True)
    return records


def read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a CSV or TSV file, each with the line in which it begins."""
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    reader = csv.reader((f"{line}\n" for _, line in read_text_lines(path)), strict=True, delimiter=delimiter)
    names, line = None, 1
    try:
        for row in reader:
            if names is None and row:
                names = row
                if twice := next((name for name in row if row.count(name) > 1), None):
                    raise ValueError(f"{path}, line {line}: the column {twice!r} is there twice; remove one")
            elif row and len(row) != len(names):
                raise ValueError(
                    f"{path}, line {line}: {'more' if len(row) > len(names) else 'fewer'} fields than the first line "
                    f"has, {','.join(names)}; put captions with commas in quotes"
                )
            elif row:
                yield line, dict(zip(names, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: not readable as CSV ({error}); in the row that begins there a quote opens and "
            "does not close at the end of its field: close it, or write it twice"
        ) from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in read_text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not readable as JSON ({error}); each line is one object"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be an object with image and caption, not {line[:40]!r}")
        yield number, row


def split_by_column(path: Path, records: list[dict], contents: Mapping[str, str]) -> list[str]:
    """Return each record's split by the column `split`. Raises ValueError for a picture on two sides, and for equal
    pictures there (`contents`: digests by name)."""
    splits, first = [], {}
    for record in records:
        name, line = record.get("split"), record["line"]
        if name not in SPLIT_NAMES:
            raise ValueError(f"{path}, line {line}: split is {name!r}, not train, validation or test")
        splits.append(SPLIT_NAMES[name])
        image = record["image"]
        other, split, other_line = first.setdefault(contents.get(image, image), (image, splits[-1], line))
        if split != splits[-1]:
            raise ValueError(
                f"{path}, line {line}: {image} is in {splits[-1]}, and in line {other_line} "
                f"{'' if other == image else f'the equal picture {other} '}in {split}; the captions of one picture "
                "belong on one side"
            )
    return splits


def split_by_group(records: list[dict], seed: int, contents: Mapping[str, str]) -> list[str]:
    """
    Return each record's split by a hash of its group: pictures that share a caption (see [`group_key`]), a `group` or
    their content (`contents`: digests by name) stay together, directly or by way of others. A picture whose captions
    are its own falls where the other builders put such captions.
    """
    parent = {}

    def root(key: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for record in records:
        captions, group = ("caption", group_key(record["caption"])), ("group", record.get("group"))
        for other in (captions, group, ("equal", contents.get(record["image"]))):
            if other[1]:
                first, second = sorted((root(("image", record["image"])), root(other)))
                parent[second] = first  # the least key, a caption, stands for all
    roots = [root(("image", record["image"])) for record in records]
    pictures = len({record["image"] for record in records})
    print(f"{pictures} pictures in {len(set(roots))} groups, seed {seed}", flush=True)
    return [split_of(key, seed) for _, key in roots]
