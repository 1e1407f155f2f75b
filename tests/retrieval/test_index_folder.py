"""Folders of faiss: what is refused, what a save removes, and what two processes do to one."""

import errno
import hashlib
import json
import os
import threading

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_nrccr import files
from modeling_nrccr.files import writing
from modeling_nrccr.retrieval import index_faiss
from modeling_nrccr.retrieval.index_faiss import SCHEMA, FaissIndex


DIM = 5


def vectors(count: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def index_of(count: int, **options) -> FaissIndex:
    index = FaissIndex(DIM, **options)
    index.upsert([f"id {i}" for i in range(count)], vectors(count), ['{"a": 1}'] * count)
    return index


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tamper(folder, **changes):
    """Changes an index folder and makes its checksums right again. `vectors`, `table`: functions of what was there."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    vectors, metadata = (folder / name for name in index["files"])
    if "vectors" in changes:
        faiss.write_index(changes.pop("vectors")(faiss.read_index(str(vectors))), str(vectors))
    if "bytes" in changes:
        vectors.write_bytes(changes.pop("bytes")(vectors.read_bytes()))
    if "table" in changes:
        pq.write_table(changes.pop("table")(pq.read_table(metadata)), metadata)
    if "swapped" in changes:
        index["files"] = dict(reversed(index["files"].items()))
    index["files"] = {name: hashlib.blake2b((folder / name).read_bytes()).hexdigest() for name in index["files"]}
    path.write_text(json.dumps(index | changes))


def with_column(name: str, change):
    def changed(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        change(values)
        at = SCHEMA.get_field_index(name)
        return table.set_column(at, SCHEMA.field(at), pa.array(values, SCHEMA.field(at).type))

    return changed


def by_distance(index):
    other = faiss.IndexIDMap2(faiss.IndexFlatL2(DIM))
    other.add_with_ids(vectors(9), np.arange(9))
    return other


def with_nan(index):
    flat = faiss.downcast_index(index.index)
    faiss.rev_swig_ptr(flat.get_xb(), 9 * DIM)[17] = np.nan
    return index


def huge(content: bytes) -> bytes:
    at = content.index(b"IxFI") + 37  # the number of floats
    return content[:at] + (2**38).to_bytes(8, "little") + content[at + 8 :]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"files": {}}, "it names 0 files"),
        ({"files": {"../../etc/passwd": "0", "b": "0"}}, "passwd is not there"),
        ({"swapped": True}, ""),
        ({"dim": -1}, "its dim is -1"),
        ({"dim": 2**40}, ""),
        ({"dim": True}, "its dim is True"),
        ({"trained_rows": 9}, "holds a IndexIDMap2"),
        ({"fingerprint": [1.0]}, "fingerprint"),
        ({"fingerprint": [float("nan")] * DIM}, "fingerprint"),
        ({"table": with_column("number", lambda column: column.__setitem__(3, 2**62))}, "numbers of the vectors"),
        ({"table": with_column("number", lambda column: column.__setitem__(3, -1))}, "negative number"),
        ({"table": with_column("number", lambda column: column.__setitem__(3, 4))}, "two rows have one number"),
        ({"table": with_column("number", lambda column: column.__setitem__(3, None))}, "lacks a number"),
        ({"table": with_column("id", lambda column: column.__setitem__(3, column[4]))}, "two rows have one id"),
        ({"table": with_column("id", lambda column: column.__setitem__(3, "[1]"))}, "is none"),
        ({"table": with_column("metadata", lambda column: column.__setitem__(3, "7"))}, "is none"),
        ({"table": with_column("metadata", lambda column: column.__setitem__(3, "{}, 1"))}, "is none"),
        ({"table": lambda table: table.slice(1)}, "9 embeddings, 8 ids"),
        ({"table": lambda table: table.drop_columns("id")}, "other columns"),
        ({"vectors": by_distance}, "IndexFlatL2"),
        ({"vectors": lambda _: faiss.IndexFlatIP(DIM)}, "IndexFlatIP"),
        ({"vectors": with_nan}, "not finite"),
        ({"bytes": huge}, ""),
    ],
)
def test_a_tampered_folder_is_refused_in_a_sentence(tmp_path, changes, message):
    index_of(9).save(tmp_path)
    tamper(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"Cannot read the index .*{message}.*Build it again"):
        FaissIndex.load(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 10**5, b"[]", b"\xff", b"null", b'{"version": 2}'])
def test_an_index_file_of_nonsense_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match="Cannot read the index"):
        FaissIndex.load(tmp_path)


@pytest.mark.parametrize("options", [{}, {"ivf_above": 100, "nprobe": 10_000}])
def test_gaps_that_removals_left_are_closed(tmp_path, options):
    index, embeds = index_of(300, **options), vectors(300)
    index.remove([f"id {i}" for i in range(0, 300, 3)])
    index.save(tmp_path)
    index = FaissIndex.load(tmp_path, **options)
    assert len(index.records) == len(index) == 200
    for round in range(2):
        for row in (1, 2, 100, 299):
            assert index.search(embeds[row], 1, {"a": 1})[0][0] == index.search(embeds[row], 1)[0][0] == f"id {row}"
        index.upsert([f"new {round}"], vectors(1, seed=7), ["{}"])
        assert index.remove([f"new {round}", "id 5"]) == 2 - round


def test_only_what_the_replaced_index_named_is_removed(tmp_path):
    index = index_of(3)
    index.save(tmp_path)
    before = names(tmp_path)
    others = {"vectors-0123abcd.faiss", "metadata-0123abcd.parquet", "notes.txt", ".index.json.0123abcd.tmp"}
    for name in others:
        (tmp_path / name).write_text("of a run that is writing")
    tamper_names = json.loads((tmp_path / "index.json").read_text())
    tamper_names["files"]["notes.txt"] = ""
    (tmp_path / "index.json").write_text(json.dumps(tamper_names))
    index.save(tmp_path)
    assert others < names(tmp_path) and len(names(tmp_path) & before) == 2 and len(names(tmp_path)) == 8
    for name in others:  # of a run that was killed the day before yesterday
        os.utime(tmp_path / name, (0, 0))
    index.save(tmp_path)
    assert names(tmp_path) & others == {"notes.txt"} and len(names(tmp_path)) == 5


def test_a_folder_that_another_run_writes_is_refused(tmp_path, monkeypatch):
    index = index_of(3)
    monkeypatch.setattr(index_faiss, "SECONDS_TO_WAIT", 0.01)
    taken, done = threading.Event(), threading.Event()

    def hold():
        with writing(tmp_path):
            taken.set()
            done.wait()

    other = threading.Thread(target=hold)  # a lock is a thread's
    other.start()
    taken.wait()
    with pytest.raises(TimeoutError, match=f"another run is writing {tmp_path}: wait"):
        index.save(tmp_path)
    assert names(tmp_path) == {".lock"}
    done.set()
    other.join()
    with writing(tmp_path), writing(tmp_path):
        index.save(tmp_path)
    assert len(FaissIndex.load(tmp_path)) == 3


def test_a_reader_finds_what_was_saved_meanwhile(tmp_path, monkeypatch):
    """Another process saves between the look at index.json and at the files that it names."""
    index_of(3).save(tmp_path)
    digest, saves = index_faiss._digest, iter([4, 5])

    def digest_late(path):
        if (count := next(saves, None)) is not None:
            with monkeypatch.context() as patched:
                patched.setattr(index_faiss, "_digest", digest)
                index_of(count).save(tmp_path)
        return digest(path)

    monkeypatch.setattr(index_faiss, "_digest", digest_late)
    assert len(FaissIndex.load(tmp_path)) == 5


class Disk:
    """Stands in for `os` and `open` of a disk whose errors show late."""

    def __init__(self, fault: str):
        self.fault = fault

    def fsync(self, number):
        if self.fault == "sync":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        os.fsync(number)

    def __getattr__(self, name):
        return getattr(os, name)

    def open_file(self, path, mode):
        file = open(path, mode)
        if self.fault == "size":
            write = file.write
            return _Proxy(file, lambda data: write(bytes(data)[:-1]) + 1)
        return _Proxy(file, file.write, fails=self.fault == "close")


class _Proxy:
    def __init__(self, file, write, fails=False):
        self.file, self.write, self.fails, self.size = file, self._counted(write), fails, 0

    def _counted(self, write):
        def counted(data):
            self.size += memoryview(data).nbytes
            return write(data)

        return counted

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")

    def tell(self):
        return self.size

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("fault", ["sync", "close", "size"])
def test_an_error_that_a_disk_shows_late_leaves_the_index_that_was_there(tmp_path, monkeypatch, fault):
    index_of(3).save(tmp_path)
    before = names(tmp_path)
    disk = Disk(fault)
    with monkeypatch.context() as patched:
        patched.setattr(files, "os", disk)
        patched.setattr(files, "open", disk.open_file, raising=False)
        with pytest.raises(OSError, match=f"{tmp_path}/vectors-.* cannot be written .*make room"):
            index_of(4).save(tmp_path)
    assert names(tmp_path) == before and len(FaissIndex.load(tmp_path)) == 3
