"""A gallery's embeddings in Milvus: `./gallery.db` is Milvus Lite in this process, `http://...` a server."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .made_by import check_made_by


try:
    from grpc import RpcError
    from pymilvus import DataType, MilvusClient, MilvusException
    from pymilvus.exceptions import ConnectionConfigException
except ImportError as error:
    raise ImportError("A gallery in Milvus needs pymilvus: pip install 'modeling_nrccr[milvus]'") from error


BLOCK = 1000  # rows a request; a server takes 64 MB and 16,384 ids
MAX_HITS = 16_384
NOT_LOADED, UNAVAILABLE = 101, (2,)  # error codes; those that the client makes are gRPC's and no integers
MODEL_KEY = "model"  # of the row that holds the fingerprint: Milvus Lite keeps neither description nor properties
FIELDS = {
    "key": DataType.VARCHAR,
    "item_id": DataType.VARCHAR,
    "embed": DataType.FLOAT_VECTOR,
    "metadata": DataType.JSON,
}
LOADING_SECONDS = 60  # a server that was started again builds what it had not finished


class MilvusIndex:
    """
    An index in Milvus, a server or a file. Rows of an id, an L2-normalised embedding and metadata; see
    [`GalleryIndex`] for the methods. What is added is stored at once.

    Args:
        uri: `FOLDER.db` (Milvus Lite; one process at a time), or the address of a server.
        dim: width of the embeddings.
        collection: name of the gallery within the database; made if there is none and `create`.
        index_params: of the vector field, such as `{"index_type": "HNSW", "params": {"M": 16, "efConstruction": 99}}`.
            "AUTOINDEX" leaves the choice to the server; "FLAT" is exact.
        search_params: such as `{"params": {"ef": 64}}`.
        timeout: seconds that one request may take.
        client_options: of `MilvusClient`: `token`, `db_name`, ...

    Raises:
        ConnectionError: if no server answers.
        ValueError: if the collection is not there, or is not a gallery of this width.
    """

    def __init__(
        self,
        uri: str,
        dim: int,
        collection: str = "gallery",
        create: bool = True,
        index_params: dict[str, Any] | None = None,
        search_params: dict[str, Any] | None = None,
        timeout: float = 60.0,
        **client_options,
    ):
        self.location, self.collection, self.timeout = uri, collection, timeout
        self._mark_read: dict[str, Any] | None = None
        self._changed = True
        self.index_params, self.search_params = index_params or {"index_type": "AUTOINDEX"}, search_params
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints the traceback of all that it raises
        try:
            self.client = MilvusClient(uri, timeout=timeout, **client_options)
        except ConnectionConfigException as error:
            hint = (
                "; another process may have it open, or it is not a folder of Milvus Lite"
                if uri.endswith(".db")
                else ""
            )
            raise ValueError(f"Cannot open the gallery {uri!r}: {error.message}{hint}.") from error
        except (MilvusException, RpcError) as error:
            raise self._gone(error) from error
        if not self._call("has_collection"):
            if not create:
                raise ValueError(f"{uri} has no gallery {collection!r}: make it by add(), or name another collection.")
            self._create(dim)
        fields = {field["name"]: field for field in self._call("describe_collection")["fields"]}
        if {name: field["type"] for name, field in fields.items()} != FIELDS:
            raise ValueError(f"The collection {collection!r} of {uri} is not a gallery of this package: name another.")
        self.dim = int(fields["embed"]["params"]["dim"])
        self._load()

    def __len__(self) -> int:
        count = self._call("query", filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
        return count - (self.fingerprint is not None)

    def _mark(self) -> dict[str, Any]:
        """Read the row of the model: `fingerprint` and `made_by`."""
        if self._mark_read is None:
            fields = ["embed", "metadata"]
            rows = self._call("query", ids=[MODEL_KEY], output_fields=fields, consistency_level="Strong")
            if not rows:
                return {"fingerprint": None, "made_by": None}
            self._mark_read = {
                "fingerprint": np.array(rows[0]["embed"], dtype=np.float32),
                "made_by": check_made_by(rows[0]["metadata"].get("made_by")),
            }
        return self._mark_read

    def _set_mark(self, **changes):
        mark = self._mark() | changes
        row = {"key": MODEL_KEY, "item_id": "", "embed": mark["fingerprint"], "metadata": {"made_by": mark["made_by"]}}
        self._call("upsert", data=[row])
        self._mark_read = mark

    @property
    def fingerprint(self) -> np.ndarray | None:
        return self._mark()["fingerprint"]

    @fingerprint.setter
    def fingerprint(self, value: np.ndarray):
        self._set_mark(fingerprint=value)

    @property
    def made_by(self) -> dict[str, Any] | None:
        return self._mark()["made_by"]

    @made_by.setter
    def made_by(self, value: dict[str, Any] | None):  # after the fingerprint
        self._set_mark(made_by=value)

    def existing(self, ids: Sequence[str | int]) -> set[str | int]:
        found = set()
        for start in range(0, len(ids), BLOCK):
            keys = [_key(id) for id in ids[start : start + BLOCK]]
            rows = self._call("query", ids=keys, output_fields=["item_id"], consistency_level="Strong")
            found.update(json.loads(row["item_id"]) for row in rows)
        return found

    def upsert(self, ids: Sequence[str | int], embeds: np.ndarray, metadata: Sequence[str]):
        for start in range(0, len(ids), BLOCK):
            rows = [
                {
                    "key": _key(ids[i]),
                    "item_id": json.dumps(ids[i]),
                    "embed": embeds[i],
                    "metadata": json.loads(metadata[i]),
                }
                for i in range(start, min(start + BLOCK, len(ids)))
            ]
            self._changed = True
            try:
                self._call("upsert", data=rows)
            except ConnectionError as error:
                raise ConnectionError(
                    f"{error} The first {start} of these {len(ids)} rows are stored; once it answers again, add the "
                    "same with skip_existing=True."
                ) from error

    def search(
        self, embed: np.ndarray, k: int, filter: dict[str, Any] | None = None
    ) -> list[tuple[str | int, float, Any]]:
        if k >= MAX_HITS:
            raise ValueError(f"Milvus gives at most {MAX_HITS - 1} hits, got k={k}.")
        found = self._call(
            "search",
            data=[embed],
            limit=k + 1,  # the model's row may be among them
            filter=expression(filter or {}),
            output_fields=["item_id", "metadata"],
            search_params=self.search_params,
            # "Session" does not see one's own deletions (tried, 2.3.5); the first search after a change waits for them
            consistency_level="Strong" if self._changed else "Session",
        )[0]
        self._changed = False
        rows = [(hit["entity"], hit["distance"]) for hit in found if hit["entity"]["item_id"]]
        return [(json.loads(row["item_id"]), float(score), row["metadata"]) for row, score in rows[:k]]

    def remove(self, ids: Sequence[str | int]) -> int:
        found = list(self.existing(ids))  # what delete() returns differs between servers
        for start in range(0, len(found), BLOCK):
            self._changed = True
            self._call("delete", ids=[_key(id) for id in found[start : start + BLOCK]])
        return len(found)

    def rows(self, embeds: bool = False) -> Iterator[tuple[list[str | int], list[str], np.ndarray | None]]:
        fields = ["item_id", "metadata"] + ["embed"] * embeds
        seen: set[str] = set()
        # an iterator reads a state of some seconds ago, whatever it is asked: what was just written comes later
        for wait in (0, 1, 2, 4, 8):
            time.sleep(wait)
            pages = self._call("query_iterator", batch_size=BLOCK, output_fields=fields, consistency_level="Strong")
            try:
                while page := self._guard(pages.next):
                    page = [row for row in page if row["item_id"] and row["item_id"] not in seen]
                    if not page:  # the mark of the model alone
                        continue
                    seen.update(row["item_id"] for row in page)
                    vectors = np.array([row["embed"] for row in page], dtype=np.float32) if embeds else None
                    yield (
                        [json.loads(row["item_id"]) for row in page],
                        [json.dumps(row["metadata"]) for row in page],
                        vectors,
                    )
            finally:
                pages.close()
            if len(seen) >= len(self):
                return
        raise ConnectionError(
            f"{self.location} shows {len(seen)} of its {len(self)} rows: try again when it is less busy"
        )

    def save(self):
        """Write all out of the server's memory; it is stored already."""
        self._call("flush")

    def _create(self, dim: int):
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", FIELDS["key"], is_primary=True, max_length=32)
        schema.add_field("item_id", FIELDS["item_id"], max_length=65_535)
        schema.add_field("embed", FIELDS["embed"], dim=dim)
        schema.add_field("metadata", FIELDS["metadata"])
        index_params = MilvusClient.prepare_index_params()
        index_params.add_index("embed", metric_type="IP", **self.index_params)
        self._call("create_collection", schema=schema, index_params=index_params)

    def _call(self, method: str, **options):
        call = getattr(self.client, method)
        return self._guard(lambda: call(self.collection, timeout=self.timeout, **options))

    def _guard(self, call: Callable):
        for attempt in (1, 2):
            try:
                return call()
            except (MilvusException, RpcError) as error:
                if isinstance(error, RpcError) or error.code in UNAVAILABLE or not isinstance(error.code, int):
                    raise self._gone(error) from error
                if error.code != NOT_LOADED or attempt == 2:
                    raise OSError(f"The Milvus server at {self.location} reports: {error.message}") from error
                # a server that was started again has not loaded it yet
                self._load()

    def _load(self):
        timeout = max(self.timeout, LOADING_SECONDS)
        self._guard(lambda: self.client.load_collection(self.collection, timeout=timeout))

    def _gone(self, error: Exception) -> ConnectionError:
        reason = getattr(error, "message", None) or str(error)
        return ConnectionError(f"The Milvus server at {self.location} does not answer ({reason}).")


def expression(filter: dict[str, str | int | float | bool]) -> str:
    """Return Milvus's filter for metadata of these values; JSON's quotes and backslashes are those of its string
    literals."""
    quoted = {json.dumps(key, ensure_ascii=False): json.dumps(filter[key], ensure_ascii=False) for key in filter}
    return " and ".join(f"metadata[{key}] == {value}" for key, value in quoted.items())


def _key(id: str | int) -> str:
    """Return a primary key of fixed length that needs no escaping, made of an id."""
    return hashlib.blake2b(json.dumps(id).encode(), digest_size=16).hexdigest()
