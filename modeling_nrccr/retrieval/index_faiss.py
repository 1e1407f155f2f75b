"""A gallery's embeddings in memory: exact search, above `ivf_above` rows inverted lists; saved in a folder."""

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import is_leftover, replacing, write_file, writing
from .made_by import check_made_by


try:
    import faiss
except ImportError as error:
    raise ImportError("A gallery in memory needs faiss: pip install 'modeling_nrccr[retrieval]'") from error


INDEX_FILE = "index.json"
FORMAT_VERSION = 2
BLOCK = 4096  # rows that are copied at a time
SCHEMA = pa.schema({"number": pa.int64(), "id": pa.string(), "metadata": pa.string()})
OWN_FILES = re.compile(r"vectors-\w+\.faiss|metadata-\w+\.parquet|\..*\.tmp")
SECONDS_TO_WAIT = 60  # for another process that saves; `nrccr index` has the folder for its whole run
ATTEMPTS = 20  # to read an index that is saved again and again
READING = threading.Lock()  # faiss has one limit for all
# what broken JSON, Parquet and faiss raise
READING_ERRORS = (
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    MemoryError,
    pa.ArrowException,
)
POINTS_A_LIST = 64  # for k-means; faiss warns below 39, and its own limit of 256 takes four times as long


class FaissIndex:
    """
    An index in memory or in a folder, by faiss. Rows of an id, an L2-normalised embedding and metadata;
    see [`GalleryIndex`] for the methods.

    Args:
        dim: width of the embeddings.
        ivf_above: a gallery of more rows is searched in inverted lists, approximately; they are trained again each
            time it has grown fourfold.
        nprobe: lists that are looked through for a query. A filtered search looks through all of them and is exact.
    """

    takes_folder = True  # `save` may name another than its own

    def __init__(self, dim: int, ivf_above: int = 100_000, nprobe: int = 64):
        self.dim, self.ivf_above, self.nprobe = dim, ivf_above, nprobe
        self.location: Path | None = None
        self.fingerprint: np.ndarray | None = None
        self.made_by: dict[str, Any] | None = None
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
        """Yield numbers and vectors of all rows, as views into the index."""
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
        """
        Writes into `folder`, by default the one it was read from; a crash on the way leaves what was there. Of several
        processes the last one's index stays; what they hold is not merged.

        Raises:
            OSError: if the disk is full, or another run keeps writing the folder.
        """
        folder = Path(folder or self.location or "")
        if not (folder.name or self.location):
            raise ValueError("This gallery is in memory only: name the folder to save it in.")
        folder.mkdir(parents=True, exist_ok=True)
        # The JSON is replaced last and names the others, so the files of an index always belong together.
        token = secrets.token_hex(4)
        vectors, metadata = folder / f"vectors-{token}.faiss", folder / f"metadata-{token}.parquet"
        rows = [(number, json.dumps(id), self.records[number][1]) for id, number in self.numbers.items()]
        table = pa.table(list(zip(*rows)) or [[], [], []], schema=SCHEMA)
        index = {
            "version": FORMAT_VERSION,
            "dim": self.dim,
            "trained_rows": self.trained_rows,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.tolist(),
            "made_by": self.made_by,
        }
        try:
            with replacing(vectors) as file:
                faiss.write_index(self.vectors, faiss.PyCallbackIOWriter(file.write))
            with replacing(metadata) as file:
                pq.write_table(table, file)
            index["files"] = {path.name: _digest(path) for path in (vectors, metadata)}
            with writing(folder, SECONDS_TO_WAIT):
                replaced = _named_files(folder)
                write_file(folder / INDEX_FILE, json.dumps(index, indent=1))
                for path in folder.iterdir():
                    ours = OWN_FILES.fullmatch(path.name) and path.name not in index["files"]
                    if ours and (path.name in replaced or is_leftover(path)):
                        path.unlink(missing_ok=True)
        except BaseException:
            if vectors.name not in _named_files(folder):
                vectors.unlink(missing_ok=True)
                metadata.unlink(missing_ok=True)
            raise
        self.location = folder

    @classmethod
    def load(cls, folder: str | Path, **options) -> "FaissIndex":
        """
        Reads what [`save`] wrote, also while another process saves.

        Raises:
            ValueError: if a file is missing, is not the one that was written, or holds what `save` never writes.
        """
        path = Path(folder) / INDEX_FILE
        for attempt in range(ATTEMPTS):
            content = None
            try:
                content = path.read_bytes()
                loaded = cls._read(path.parent, json.loads(content), options)
                break
            except READING_ERRORS as error:
                if attempt + 1 < ATTEMPTS and content is not None and content != path.read_bytes():
                    continue  # the files that it named are gone, because another process has saved
                raise ValueError(
                    f"Cannot read the index {str(path)!r}: {error}. Build it again with `nrccr index`, or save()."
                ) from error
        loaded.location = Path(folder)
        return loaded

    @classmethod
    def _read(cls, folder: Path, index: dict[str, Any], options: dict[str, Any]) -> "FaissIndex":
        if index["version"] != FORMAT_VERSION:
            raise ValueError(f"it has format {index['version']}, this version reads {FORMAT_VERSION}")
        for name, least in (("dim", 1), ("trained_rows", 0)):
            if type(index[name]) is not int or index[name] < least:
                raise ValueError(f"its {name} is {index[name]!r}")
        files = {folder / Path(name).name: digest for name, digest in index["files"].items()}
        if len(files) != 2:
            raise ValueError(f"it names {len(files)} files, not one of vectors and one of metadata")
        for file, digest in files.items():
            if not file.is_file():
                raise FileNotFoundError(f"{file.name} is not there")
            if _digest(file) != digest:  # faiss would read most of what is broken
                raise ValueError(f"{file.name} is not the file that was written")
        vectors, metadata = files
        loaded = cls(index["dim"], **options)
        loaded.trained_rows = index["trained_rows"]
        loaded.vectors = _read_vectors(vectors, loaded.dim, in_lists=loaded.trained_rows > 0)
        if loaded.trained_rows:
            loaded.vectors.nprobe = loaded.nprobe
        loaded._set_records(_read_metadata(metadata, loaded.vectors.ntotal))
        if not all(np.isfinite(block).all() for _, block in loaded._blocks()):
            raise ValueError("an embedding is not finite")
        if index["fingerprint"] is not None:
            loaded.fingerprint = np.array(index["fingerprint"], dtype=np.float32)
            if loaded.fingerprint.shape != (loaded.dim,) or not np.isfinite(loaded.fingerprint).all():
                raise ValueError("its fingerprint is not that of a model")
        loaded.made_by = check_made_by(index.get("made_by"))
        return loaded

    def _set_records(self, table: pa.Table):
        """Takes ids and metadata of the vectors; rows are numbered anew where removals have left gaps."""
        numbers = table["number"].to_numpy()
        ordered = np.sort(numbers)
        if len(ordered) and (ordered[0] < 0 or (ordered[1:] == ordered[:-1]).any()):
            raise ValueError("two rows have one number, or one has a negative number")
        held = self._numbered(lambda held: held)
        if not np.array_equal(np.sort(held), ordered):
            raise ValueError("the numbers of the vectors are not those of the ids")
        if len(ordered) and ordered[-1] >= len(ordered):
            self._numbered(lambda held: np.searchsorted(ordered, held))
            numbers = np.searchsorted(ordered, numbers)
        self.records = [None] * len(numbers)
        for number, id, metadata in zip(numbers.tolist(), table["id"].to_pylist(), table["metadata"].to_pylist()):
            found = json.loads(f"[{id}, {metadata}]")
            if len(found) != 2 or type(found[0]) not in (str, int) or not isinstance(found[1], dict):
                raise ValueError(f"the row of the id {id} and the metadata {metadata} is none")
            self.records[number], self.numbers[found[0]] = (found[0], metadata), number
        if len(self.numbers) != len(numbers):
            raise ValueError("two rows have one id")

    def _numbered(self, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Gives the vectors the numbers that `change` makes of theirs, and returns them, of shape `(ntotal,)`."""
        if not self.trained_rows:
            numbers = change(faiss.vector_to_array(self.vectors.id_map))
            faiss.copy_array_to_vector(numbers, self.vectors.id_map)
            self.vectors.construct_rev_map()
            return numbers
        lists, parts = self.vectors.invlists, [np.empty(0, np.int64)]
        for i in range(self.vectors.nlist):
            if size := lists.list_size(i):
                parts.append(faiss.rev_swig_ptr(lists.get_ids(i), size))
                parts[-1][:] = change(parts[-1])
        return np.concatenate(parts)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _named_files(folder: Path) -> set[str]:
    """Return the files of the index that is in `folder`; none where it cannot be read."""
    try:
        return set(json.loads((folder / INDEX_FILE).read_bytes())["files"])
    except READING_ERRORS:
        return set()


def _read_vectors(path: Path, dim: int, in_lists: bool) -> faiss.Index:
    """Read what [`FaissIndex`] searches; anything else that faiss can read is refused."""
    with path.open("rb") as file, _sizes_below(path.stat().st_size):
        vectors = faiss.read_index(faiss.PyCallbackIOReader(file.read))
    if type(vectors) is not (faiss.IndexIVFFlat if in_lists else faiss.IndexIDMap2):
        raise ValueError(f"{path.name} holds a {type(vectors).__name__}")
    inner = faiss.downcast_index(vectors.quantizer if in_lists else vectors.index)
    lists = faiss.downcast_InvertedLists(vectors.invlists) if in_lists else None
    is_flat = type(inner) is faiss.IndexFlatIP and inner.codes.size() == inner.ntotal * 4 * dim
    is_flat = is_flat and inner.is_trained and vectors.is_trained
    if not is_flat or lists is not None and type(lists) is not faiss.ArrayInvertedLists:
        raise ValueError(f"{path.name} holds a {type(inner).__name__}, or half of one")
    if {vectors.d, inner.d} != {dim} or {vectors.metric_type, inner.metric_type} != {faiss.METRIC_INNER_PRODUCT}:
        raise ValueError(f"{path.name} does not hold embeddings of width {dim} that are ranked by inner products")
    if in_lists:
        counts = (inner.ntotal == vectors.nlist == lists.nlist, lists.compute_ntotal() == vectors.ntotal)
        counts += (lists.code_size == vectors.code_size == 4 * dim,)
    else:
        counts = (inner.ntotal == vectors.ntotal == vectors.id_map.size(),)
    if not all(counts):
        raise ValueError(f"the counts in {path.name} differ")
    return vectors


@contextmanager
def _sizes_below(size: int):
    """Lets faiss allocate no more for one array than the file has bytes; older versions believe what is written."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    with READING:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


def _read_metadata(path: Path, rows: int) -> pa.Table:
    with path.open("rb") as file, pq.ParquetFile(file) as parquet:
        if parquet.metadata.num_rows != rows:
            raise ValueError(f"{rows} embeddings, {parquet.metadata.num_rows} ids")
        if not parquet.schema_arrow.equals(SCHEMA):
            raise ValueError(f"{path.name} has other columns than {', '.join(SCHEMA.names)}")
        table = parquet.read()
    if any(column.null_count for column in table.columns):
        raise ValueError(f"{path.name} lacks a number, an id or metadata")
    return table
