"""A gallery's embeddings in memory: exact search, above `ivf_above` rows inverted lists; saved in a folder."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


try:
    import faiss
except ImportError as error:
    raise ImportError("A gallery in memory needs faiss: pip install 'modeling_nrccr[retrieval]'") from error


INDEX_FILE = "index.json"
FORMAT_VERSION = 2
BLOCK = 4096  # rows that are copied at a time
POINTS_A_LIST = 64  # for k-means; faiss warns below 39, and its own limit of 256 takes four times as long


class FaissIndex:
    """
    Rows of an id, an L2-normalised embedding and metadata; see [`GalleryIndex`] for the methods.

    Args:
        dim: width of the embeddings.
        ivf_above: a gallery of more rows is searched in inverted lists, approximately; they are trained again each
            time it has grown fourfold.
        nprobe: lists that are looked through for a query. A filtered search looks through all of them and is exact.
    """

    def __init__(self, dim: int, ivf_above: int = 100_000, nprobe: int = 64):
        self.dim, self.ivf_above, self.nprobe = dim, ivf_above, nprobe
        self.location: Path | None = None
        self.fingerprint: np.ndarray | None = None
        self.vectors = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
        self.trained_rows = 0
        self.numbers: dict[str | int, int] = {}  # faiss knows a row by its number, its place in `records`
        self.records: list[tuple[str | int, str] | None] = []  # id and metadata as JSON; None where removed
        self.postings: dict[str, dict[Any, list[int]]] = {}  # of metadata keys that were filtered by

    def __len__(self) -> int:
        return len(self.numbers)

    def existing(self, ids: Sequence[str | int]) -> set[str | int]:
        return {id for id in ids if id in self.numbers}

    def upsert(self, ids: Sequence[str | int], embeds: np.ndarray, metadata: Sequence[str]):
        self.remove(ids)
        first = len(self.records)
        numbers = np.arange(first, first + len(ids))
        self.vectors.add_with_ids(np.ascontiguousarray(embeds, dtype=np.float32), numbers)
        self.records.extend(zip(ids, metadata))
        self.numbers.update(zip(ids, numbers.tolist()))
        self.postings.clear()
        if len(self) > self.ivf_above and len(self) > 4 * self.trained_rows:
            self._train()

    def search(
        self, embed: np.ndarray, k: int, filter: dict[str, Any] | None = None
    ) -> list[tuple[str | int, float, Any]]:
        options = {}
        if filter:
            mask = np.zeros(-(-len(self.records) // 8) * 8, dtype=bool)
            mask[self._matching(filter)] = True
            selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
            if self.trained_rows:
                options["params"] = faiss.SearchParametersIVF(sel=selector, nprobe=self.vectors.nlist)
            else:
                options["params"] = faiss.SearchParameters(sel=selector)
        scores, numbers = self.vectors.search(embed[None], min(k, max(len(self), 1)), **options)
        hits = []
        for score, number in zip(scores[0].tolist(), numbers[0].tolist()):
            if number >= 0:  # faiss fills up with -1
                id, metadata = self.records[number]
                hits.append((id, score, json.loads(metadata)))
        return hits

    def remove(self, ids: Sequence[str | int]) -> int:
        numbers = [self.numbers.pop(id) for id in dict.fromkeys(ids) if id in self.numbers]
        if numbers:
            self.vectors.remove_ids(np.array(numbers))
            self.postings.clear()
            for number in numbers:
                self.records[number] = None
        return len(numbers)

    def rows(self, embeds: bool = False) -> Iterator[tuple[list[str | int], list[str], np.ndarray | None]]:
        for numbers, vectors in self._blocks():
            records = [self.records[number] for number in numbers.tolist()]
            yield [id for id, _ in records], [text for _, text in records], vectors.copy() if embeds else None

    def _matching(self, filter: dict[str, Any]) -> list[int]:
        found = None
        for key, value in filter.items():
            if key not in self.postings:
                self.postings[key] = posting = {}
                for number in self.numbers.values():
                    stored = json.loads(self.records[number][1]).get(key)
                    if isinstance(stored, (str, int, float)):
                        posting.setdefault(stored, []).append(number)
            numbers = self.postings[key].get(value, [])
            found = set(numbers) if found is None else found.intersection(numbers)
        return sorted(found)

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers and vectors of all rows, as views into the index."""
        if self.trained_rows:
            lists = self.vectors.invlists
            for i in range(self.vectors.nlist):
                if size := lists.list_size(i):
                    codes = faiss.rev_swig_ptr(lists.get_codes(i), size * self.dim * 4)
                    yield faiss.rev_swig_ptr(lists.get_ids(i), size), codes.view(np.float32).reshape(size, self.dim)
        elif len(self):
            flat = faiss.downcast_index(self.vectors.index)
            vectors = faiss.rev_swig_ptr(flat.get_xb(), len(self) * self.dim).reshape(len(self), self.dim)
            numbers = faiss.vector_to_array(self.vectors.id_map)
            for start in range(0, len(self), BLOCK):
                yield numbers[start : start + BLOCK], vectors[start : start + BLOCK]

    def _train(self):
        # IVF has add_with_ids of its own; inside IndexIDMap2 it gives wrong ids after remove_ids
        nlist = int(4 * len(self) ** 0.5)
        vectors = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, nlist, faiss.METRIC_INNER_PRODUCT)
        vectors.cp.max_points_per_centroid = POINTS_A_LIST
        vectors.nprobe = self.nprobe
        step = max(1, len(self) // (POINTS_A_LIST * nlist))
        vectors.train(np.concatenate([block[::step] for _, block in self._blocks()]))
        for numbers, block in self._blocks():
            vectors.add_with_ids(block, numbers)
        self.vectors, self.trained_rows = vectors, len(self)

    def save(self, folder: str | Path | None = None):
        """Writes into `folder`, by default the one it was read from; a crash on the way leaves what was there."""
        folder = Path(folder or self.location or "")
        if not (folder.name or self.location):
            raise ValueError("This gallery is in memory only: name the folder to save it in.")
        folder.mkdir(parents=True, exist_ok=True)
        # The JSON is replaced last and names the others, so the files of an index always belong together.
        token = secrets.token_hex(4)
        vectors, metadata = folder / f"vectors-{token}.faiss", folder / f"metadata-{token}.parquet"
        try:
            faiss.write_index(self.vectors, str(vectors))
        except RuntimeError as error:
            vectors.unlink(missing_ok=True)
            raise OSError(f"Cannot write {str(vectors)!r}: {error}") from error
        rows = [(number, json.dumps(id), self.records[number][1]) for id, number in self.numbers.items()]
        schema = pa.schema({"number": pa.int64(), "id": pa.string(), "metadata": pa.string()})
        pq.write_table(pa.table(list(zip(*rows)) or [[], [], []], schema=schema), metadata)
        index = {
            "version": FORMAT_VERSION,
            "dim": self.dim,
            "trained_rows": self.trained_rows,
            "files": {path.name: _digest(path) for path in (vectors, metadata)},
            "fingerprint": None if self.fingerprint is None else self.fingerprint.tolist(),
        }
        temporary = folder / f"{INDEX_FILE}.{token}"
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(temporary, folder / INDEX_FILE)
        for old in (
            *folder.glob("vectors-*.faiss"),
            *folder.glob("metadata-*.parquet"),
            *folder.glob(f"{INDEX_FILE}.*"),
        ):
            if token not in old.name:
                old.unlink()
        self.location = folder

    @classmethod
    def load(cls, folder: str | Path, **options) -> "FaissIndex":
        """
        Reads what [`save`] wrote.

        Raises:
            ValueError: if a file is missing, or is not the one that was written.
        """
        path = Path(folder) / INDEX_FILE
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["version"] != FORMAT_VERSION:
                raise ValueError(f"it has format {index['version']}, this version reads {FORMAT_VERSION}")
            files = [path.with_name(Path(name).name) for name in index["files"]]
            for file, digest in zip(files, index["files"].values()):
                if _digest(file) != digest:  # faiss would read most of what is broken
                    raise ValueError(f"{file.name} is not the file that was written")
            loaded = cls(index["dim"], **options)
            loaded.vectors, table = faiss.read_index(str(files[0])), pq.read_table(files[1])
            if not loaded.vectors.ntotal == len(table) or loaded.vectors.d != loaded.dim:
                raise ValueError(f"{loaded.vectors.ntotal} embeddings, {len(table)} ids")
            loaded.trained_rows = index["trained_rows"]
            if loaded.trained_rows:
                loaded.vectors.nprobe = loaded.nprobe
            numbers = table["number"].to_pylist()
            loaded.records = [None] * (max(numbers, default=-1) + 1)
            for number, id, metadata in zip(numbers, table["id"].to_pylist(), table["metadata"].to_pylist()):
                id = json.loads(id)
                loaded.records[number], loaded.numbers[id] = (id, metadata), number
            if index["fingerprint"] is not None:
                loaded.fingerprint = np.array(index["fingerprint"], dtype=np.float32)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, pa.ArrowException) as error:
            raise ValueError(f"Cannot read the index {str(path)!r}: {error}. Build it again with save().") from error
        loaded.location = Path(folder)
        return loaded


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
