"""Where a gallery's embeddings are kept and ranked: one small interface, and which engine an address means."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..registry import Registry


INDEXES = Registry("index", {"faiss": ".index_faiss:FaissIndex", "milvus": ".index_milvus:MilvusIndex"}, __package__)
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(:.*)?")


class GalleryIndex(Protocol):
    """
    What an index has. One of your own is asked for by the address `my_module:MyIndex:ADDRESS`; it is made as
    `MyIndex(ADDRESS, dim, create=True)`, or passed to [`NrccrRetriever`] as it is.

    Rows of an id, an L2-normalised embedding and metadata. Scores are inner products.

    Attributes:
        dim: width of the embeddings.
        location: folder or URI where it is kept; None in memory.
        fingerprint: of the model that made the embeddings ([`NrccrRetriever.fingerprint`]), of shape `(dim,)`; None
            while there is none.
        made_by: what [`remember`] gave, for `nrccr search`; None where nobody said. It holds paths of this machine.
    """

    dim: int
    location: str | Path | None
    fingerprint: np.ndarray | None
    made_by: dict[str, Any] | None

    def __len__(self) -> int: ...

    def existing(self, ids: Sequence[str | int]) -> set[str | int]:
        """Return those of `ids` that it holds."""

    def upsert(self, ids: Sequence[str | int], embeds: np.ndarray, metadata: Sequence[str]):
        """Adds rows; those of an id that it holds are replaced. `embeds`: float32 of shape `(len(ids), dim)`;
        `metadata`: a JSON object each."""

    def search(self, embed: np.ndarray, k: int, filter: dict[str, Any] | None) -> list[tuple[str | int, float, Any]]:
        """Return the best `k`, best first: id, score and metadata. `embed`: float32 of shape `(dim,)`; `filter`:
        metadata that a row must have."""

    def remove(self, ids: Sequence[str | int]) -> int:
        """Removes what it holds of `ids`, and returns how many."""

    def rows(self, embeds: bool = False) -> Iterator[tuple[list[str | int], list[str], np.ndarray | None]]:
        """Yield all rows, in blocks: ids, metadata as JSON and, if asked for, embeddings."""

    def save(self): ...


def is_milvus(address: str | Path) -> bool:
    """Tell whether `address` is a URI, or a database of Milvus Lite, rather than a folder of faiss."""
    return "://" in str(address) or str(address).endswith(".db")


def split_address(address: str | Path | None) -> tuple[str, str | Path | None]:
    """Return the kind of index that an address means, of `INDEXES` or one's own, and what it is the address of."""
    if address is not None and is_milvus(address):
        return "milvus", str(address)
    if isinstance(address, str) and OWN.fullmatch(address) and not Path(address).exists():
        return INDEXES.split(address)
    return "faiss", address


def open_index(address: str | Path | None, dim: int, create: bool = True, **options) -> GalleryIndex:
    """
    Open the index that `address` means: None is faiss in memory, a folder is faiss, `NAME.db` or a URI is Milvus,
    `my_module:MyIndex:ADDRESS` is your own.

    Args:
        create: begin a new one where there is none.
        options: of [`FaissIndex`] or [`MilvusIndex`].
    """
    kind, address = split_address(address)
    if kind != "faiss":
        return INDEXES[kind](address, dim, create=create, **options)
    from .index_faiss import INDEX_FILE, FaissIndex

    if address is None or create and not (Path(address) / INDEX_FILE).exists():
        index = FaissIndex(dim, **options)
        index.location = address
        return index
    return FaissIndex.load(address, **options)
