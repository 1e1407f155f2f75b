"""Ready translations: what people or a service translated elsewhere, read from files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet

from .base import TranslationError, Translator, file_fingerprint, one_line
from .language_codes import standard_code


_SUFFIXES = (".tsv", ".jsonl", ".parquet")


class FileTranslator(Translator):
    """
    A file of ready translations, or a folder of such files (a pair each: one for the translation, one for the way
    back). TSV with a head line, JSONL or Parquet, of two columns that are named by their languages, the source first:

        en<TAB>gl
        a dog<TAB>un can

    Args:
        path (`str` or `Path`): the file or folder.
        name (`str`, *optional*): who translated, for `target_origin`; by default `file-` and the path's last part.

    Raises:
        ValueError: a file is missing, is not in UTF-8, lacks the head line, or has an empty or a second, different
            translation; file and line are named.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        path = Path(path)
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
        if not files or not files[0].is_file() or files[0].suffix not in _SUFFIXES:
            raise ValueError(
                f"{path} is no file of translations ({', '.join(_SUFFIXES)}) and no folder that holds one; a path "
                'with "," or "+es+" in it is put in double quotes, file:"PATH"'
            )
        self.name = name or f"file-{path.stem}"
        self.version = file_fingerprint(files)
        self._path = path
        self._tables: dict[tuple[str, str], dict[str, str]] = {}
        for file in files:
            self._read(file)

    def _read(self, file: Path) -> None:
        rows = _rows(file)
        _, head = next(rows, (0, ()))
        codes = [standard_code(code) if isinstance(code, str) else "" for code in head]
        if len(codes) != 2 or not all(re.fullmatch(r"[a-z]{2,3}(-\w+)*", code) for code in codes):
            raise ValueError(
                f"{file}: the two columns are named by language, source first, such as `en<TAB>gl`; found {list(head)}"
            )
        table = self._tables.setdefault((codes[0], codes[1]), {})
        for place, row in rows:
            if len(row) != 2 or not all(isinstance(text, str) and one_line(text) for text in row):
                raise ValueError(f"{file}, {place}: a text and its translation are needed, found {list(row)}")
            source, target = map(one_line, row)
            if table.setdefault(source, target) != target:
                raise ValueError(
                    f"{file}, {place}: {source!r} is {target!r} here and {table[source]!r} above; keep one of them"
                )

    def supported_pairs(self) -> list[tuple[str, str]]:
        return sorted(self._tables)

    def _how_to_add(self, source: str, target: str) -> str:
        return f"; a folder may hold a file for each pair, this one with the head line `{source}<TAB>{target}`"

    def _batches(self, texts: list[str], source: str, target: str) -> Iterator[list[str]]:
        missing = [text for text in texts if text not in self._tables[source, target]]
        if missing:  # all of them at once: somebody has to go and translate them
            shown = ", ".join(repr(text[:80]) for text in missing[:3])
            raise TranslationError(
                f"{self._path} has no {source}-{target} translation of {len(missing)} of {len(texts)} texts, such as "
                f"{shown}; add them"
            )
        return super()._batches(texts, source, target)

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        return [self._tables[source, target][text] for text in texts]


def _rows(file: Path) -> Iterator[tuple[str, tuple]]:
    """Yield the place and values of each row; the first are the names of the columns."""
    try:
        if file.suffix == ".parquet":
            table = pyarrow.parquet.read_table(file)
            yield "", tuple(table.column_names)
            columns = [column.to_pylist() for column in table.columns]
            yield from ((f"row {row}", values) for row, values in enumerate(zip(*columns)))
            return
        names: tuple = ()
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
            line = line.removesuffix("\r")
            if not line.strip():
                continue
            if file.suffix == ".tsv":
                yield f"line {number}", tuple(line.split("\t"))
                continue
            record = json.loads(line)
            if not isinstance(record, dict) or (names and tuple(record) != names):
                raise ValueError(f"line {number} has not the keys {list(names)} of the first line: {line[:80]}")
            if not names:
                names = tuple(record)
                yield "", names
            yield f"line {number}", tuple(record.values())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (OSError, ValueError) as error:  # pyarrow's and JSON's errors are such
        raise ValueError(f"{file} cannot be read: {error}") from error
