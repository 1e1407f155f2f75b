"""Brings an index up to date with a folder of pictures and videos, in as many processes as are launched.

What is encoded goes into shards before it goes into the index, so a run that was killed, or whose server went away,
encodes nothing twice; a file is known by its content. What is left out stands in `left_out.csv` with the reason, in
the folder of the index (of Milvus, in the cache folder here). A file that is broken is not tried again before it
changes.
"""

import csv
import hashlib
import io
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from datasets_scripts.reading.videos import VIDEO_SUFFIXES, read_frames

from ..files import is_utf8, printable, write_file, writing
from ..languages import SAME_MODEL
from ..loading.models import load_with_languages
from ..loading.wheels import cache_folder
from ..media import IMAGE_SUFFIXES, Found, describe_others, is_clip, list_images, walk
from .gallery_media import NOT_UTF8, Skipped
from .index import is_milvus, split_address
from .made_by import remember
from .retriever import NrccrRetriever


SUFFIXES = tuple(sorted({*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}))
BROKEN, PASSED, UNREAD = "broken", "passed over", "of a kind that is not read"


class LeftOut(NamedTuple):
    """A file that was not indexed (or `*.raw`, all of a kind), by its `printable` name. `content_hash`: empty where it
    is not known."""

    file: str
    kind: str
    reason: str
    content_hash: str = ""


def list_media(gallery: Path) -> Found:
    """Find pictures and videos under `gallery`, and what is passed over; see [`walk`]. Raises ValueError for a folder
    whose name is not UTF-8."""
    if not is_utf8(gallery):
        raise ValueError(f"{printable(gallery)}: {NOT_UTF8}")
    found = walk(gallery, SUFFIXES)
    if not found.files:
        list_images(gallery, SUFFIXES, "pictures or videos")  # says what is there instead
    return found


def content_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def local_folder(name: str, index: str, collection: str) -> Path:
    """Return where this machine keeps its part of the work on an index."""
    address = index if "://" in index else str(Path(index).resolve())
    return cache_folder() / name / hashlib.blake2b(f"{address} {collection}".encode(), digest_size=8).hexdigest()


def home_folder(index: str, collection: str) -> Path:
    """Return the folder of `left_out.csv` and of the lock."""
    return Path(index) if split_address(index)[0] == "faiss" else local_folder("indexes", index, collection)


def read_left_out(path: Path) -> dict[str, str]:
    """Read, by content, the reasons why files were broken; none where the list is not there, or was changed by
    hand."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [LeftOut(**row) for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return {}
    return {row.content_hash: row.reason for row in rows if row.kind == BROKEN and row.content_hash}


def write_left_out(path: Path, rows: Iterable[LeftOut]):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([LeftOut._fields, *sorted(rows)])
    write_file(path, text.getvalue())


@dataclass(frozen=True)
class Indexed:
    """
    What a run did.

    Attributes:
        size: of the index now, in pictures and videos.
        encoded: how many of them are new.
        skipped: what turned out to be broken.
        left_out: all that is not in the index, also of earlier runs.
        others: how many files of each suffix are not read.
        left_out_path: the file that lists `left_out`.
    """

    size: int
    encoded: int
    skipped: list[Skipped]
    left_out: list[LeftOut]
    others: Counter
    left_out_path: Path

    def summary(self) -> str:
        """Return in a line what was encoded, and what was left out."""
        kinds = Counter(row.kind for row in self.left_out if row.kind != UNREAD)
        parts = [f"{kinds[kind]:,} {kind}" for kind in (BROKEN, PASSED) if kinds[kind]]
        if self.others:
            parts.append(describe_others(self.others))
        rest = f"left out: {', '.join(parts)}; see {self.left_out_path}" if parts else "nothing left out"
        return f"{self.encoded:,} encoded; {rest}"


def index_folder(
    model: str,
    folder: str | Path,
    index: str | Path,
    *,
    languages: Sequence[str] = (),
    collection: str = "gallery",
    copy_from: str | Path | None = None,
    num_frames: int = 8,
    batch_size: int = 32,
    shard_size: int = 256,
    remove_missing: bool = False,
    strict: bool = False,
    retry: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> Indexed | None:
    """
    Index a folder of pictures and videos, with its sub-folders; called again, add what is new. In several processes
    (`torchrun`, `accelerate launch`) each makes the same call and encodes its share.

    Args:
        model: folder or hub id. The index remembers it, and `languages`, for the search.
        index: folder (faiss), `NAME.db` (Milvus Lite) or the address of a Milvus server.
        languages: as `--language` takes them: `CODE`, or `CODE=FOLDER` of what `nrccr add-language` wrote.
        collection: name of the gallery within Milvus.
        copy_from: another index, of the same model, to begin with.
        num_frames: of each video, sampled uniformly.
        batch_size: pictures or videos at a time.
        shard_size: files between two writes.
        remove_missing: remove from the index what has left the folder.
        strict: raise for a file that cannot be read, rather than leave it out.
        retry: try again what was broken and has not changed.
        device, dtype: of the model, as for [`load_model`].

    Returns:
        What was done; None in all processes but the main one.

    Raises:
        ValueError: the folder holds no pictures, or the index is of another model.
        TimeoutError: another run is writing the index.
    """
    no_group = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=no_group)  # else accelerate makes no group of CPU processes
    index, folder = str(index), Path(folder).resolve()
    found = list_media(folder) if state.is_main_process else None
    with writing(home_folder(index, collection)) if state.is_main_process else nullcontext():
        loaded, processor = load_with_languages(model, languages, device or str(state.device), dtype)
        address = index if state.is_main_process else None  # one process opens it: Milvus Lite takes no more
        if address and copy_from:
            other = NrccrRetriever.load(copy_from, loaded, processor, **index_options(copy_from, collection))
            other.save(address, **index_options(address, collection))
        retriever = NrccrRetriever(loaded, processor, address, **index_options(address, collection))
        if address:
            retriever.index.made_by = remember(model, languages)
        shards, path = local_folder("gallery", index, collection), home_folder(index, collection) / "left_out.csv"
        settings = (num_frames, batch_size, shard_size, remove_missing, strict)
        known_broken = {} if retry or strict else read_left_out(path)
        indexer = Indexer(retriever, folder, state, *settings, shards, path, known_broken)
        encoded, skipped, left_out = indexer.run(found)
    if not state.is_main_process:
        return None
    return Indexed(len(retriever), encoded, skipped, left_out, found.others, path)


def index_options(index: str | Path | None, collection: str) -> dict[str, str]:
    """Return the options of [`open_index`] for an address: a folder has no collections."""
    return {"collection": collection} if index and is_milvus(index) else {}


def read_shards(folder: Path, fingerprint: torch.Tensor) -> Iterator[tuple[list[tuple[str, dict]], torch.Tensor]]:
    """Yield the content hash and metadata of each row, and the embeddings; what another model made is removed."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                rows, made_by = json.loads(file.metadata()["rows"]), file.get_tensor("fingerprint")
                embeds = file.get_tensor("image_embeds")
        except SafetensorError:  # cut by a power failure
            made_by = torch.empty(0)
        if made_by.shape == fingerprint.shape and float(made_by @ fingerprint) > SAME_MODEL:
            yield rows, embeds
        else:
            path.unlink()


@dataclass
class Indexer:
    """Brings an index up to date with a folder; every process calls `run`. The arguments are those of
    [`index_folder`]; `retriever` has the index in the main process alone."""

    retriever: NrccrRetriever
    folder: Path
    state: PartialState
    num_frames: int
    batch_size: int
    shard_size: int
    remove_missing: bool
    strict: bool
    shards: Path
    left_out_path: Path
    known_broken: dict[str, str]

    def __post_init__(self):
        self.is_main = self.state.is_main_process
        self.fingerprint = self.retriever.fingerprint()

    def run(self, found: Found | None) -> tuple[int, list[Skipped], list[LeftOut]]:
        """Update the gallery. Return how many files were encoded, what turned out to be broken, and all that was left
        out. `found`: in the main process what the gallery holds."""
        self.shards.mkdir(parents=True, exist_ok=True)
        files = [path.relative_to(self.folder).as_posix() for path in found.files] if self.is_main else None
        files = broadcast_object_list([files])[0]
        own = tqdm(self.share(files), desc="reading", unit="file", disable=not self.is_main)
        hashes, unreadable = {}, []
        for file, content, reason in gather_object([self.read(file) for file in own]):
            if reason is None:
                hashes[file] = content
            else:
                unreadable.append(Skipped(file, reason))
        changed = self.compare(hashes, files, found) if self.is_main else {}
        todo = broadcast_object_list([self.missing(changed) if self.is_main else None])[0]
        broken = gather_object(self.encode(todo))  # waits for all
        left_out = []
        if self.is_main:
            left_out += self.store(changed, hashes, broken)
            left_out += [LeftOut(printable(file), BROKEN, printable(reason)) for file, reason in unreadable]
            left_out += [LeftOut(printable(name), PASSED, printable(reason)) for name, reason in found.left_out]
            left_out += [LeftOut(f"*{kind}", UNREAD, f"{count:,} files") for kind, count in found.others.items()]
            write_left_out(self.left_out_path, left_out)
        return len(todo) - len(broken), unreadable + broken, left_out

    def read(self, file: str) -> tuple[str, str | None, str | None]:
        """Return the file, the hash of its content, and why it has none. Raises OSError for an unreadable file if
        `strict`."""
        try:
            return file, content_hash(self.folder / file), None
        except OSError as error:
            if self.strict:
                raise
            return file, None, error.strerror or str(error)

    def share(self, items: list) -> list:
        return items[self.state.process_index :: self.state.num_processes]

    def compare(self, hashes: dict[str, str], files: list[str], found: Found) -> dict[str, list[str]]:
        """Return, by content hash, the files that are new, changed or moved. What the index has of them goes into a
        shard."""
        held = {}
        for ids, texts, _ in self.retriever.index.rows():
            held.update(zip(ids, map(json.loads, texts)))
        changed = {}
        for file, content in sorted(hashes.items()):
            if not self.metadata(file, content).items() <= held.get(file, {}).items():
                changed.setdefault(content, []).append(file)
        if changed.keys() & {metadata.get("content_hash") for metadata in held.values()}:
            for _, texts, embeds in self.retriever.index.rows(embeds=True):
                chosen = [(row, json.loads(text)) for row, text in enumerate(texts)]
                chosen = [(row, metadata) for row, metadata in chosen if metadata.get("content_hash") in changed]
                self.shelve(
                    [(metadata.pop("content_hash"), metadata) for _, metadata in chosen],
                    torch.from_numpy(embeds[[row for row, _ in chosen]]),
                )
        if self.remove_missing:
            hidden = tuple(f"{name}/" for name, _ in found.left_out)  # in a folder that cannot be read, say
            self.retriever.remove([id for id in held.keys() - set(files) if not f"{id}".startswith(hidden)])
        return changed

    def metadata(self, file: str, content: str) -> dict[str, str]:
        return {"path": str(self.folder / file), "content_hash": content}

    def missing(self, changed: dict[str, list[str]]) -> list[tuple[str, str]]:
        """Return the content hash and one file of each content that no shard has, and that is not known to be
        broken."""
        known = {content for rows, _ in read_shards(self.shards, self.fingerprint) for content, _ in rows}
        known.update(self.known_broken)
        return [(content, files[0]) for content, files in changed.items() if content not in known]

    def encode(self, todo: list[tuple[str, str]]) -> list[Skipped]:
        """Write a shard for every `shard_size` files; each process makes its own. Return the files that were
        skipped."""
        size, skipped = self.shard_size, []
        with tqdm(total=len(todo), desc="encoding", unit="file", disable=not self.is_main) as progress:
            for start in self.share(range(0, len(todo), size)):
                files, rows, embeds = todo[start : start + size], [], []
                names = [file for _, file in files]
                is_video = [self.is_video(name) for name in names]
                for kind, wanted in (("images", False), ("videos", True)):
                    encoded = self.retriever.encode_media(
                        kind,
                        [(row, self.folder / name) for row, name in enumerate(names) if is_video[row] == wanted],
                        names,
                        lambda path: read_frames(path, self.num_frames),
                        self.strict,
                        self.batch_size,
                        lambda count: progress.update(count * self.state.num_processes),
                    )
                    rows += [(files[row][0], extra) for row, extra in zip(encoded.rows, encoded.metadata)]
                    embeds.append(encoded.embeds)
                    skipped += encoded.skipped
                self.shelve(rows, torch.cat(embeds))
        return skipped

    def is_video(self, file: str) -> bool:
        try:
            return is_clip(self.folder / file)
        except (OSError, ValueError):  # who reads it as a picture says what is amiss
            return False

    def shelve(self, rows: list[tuple[str, dict]], embeds: torch.Tensor):
        if rows:
            tensors = {"image_embeds": embeds, "fingerprint": self.fingerprint}
            content = save(tensors, metadata={"rows": json.dumps(rows)})
            write_file(self.shards / f"{secrets.token_hex(8)}.safetensors", content)

    def store(self, changed: dict[str, list[str]], hashes: dict[str, str], broken: list[Skipped]) -> list[LeftOut]:
        """Fills the index. What is broken now may have been a picture before, so nothing of it stays."""
        for rows, embeds in read_shards(self.shards, self.fingerprint):
            chosen, files, metadata = [], [], []
            for row, (content, extra) in enumerate(rows):
                for file in changed.pop(content, ()):
                    chosen.append(row)
                    files.append(file)
                    metadata.append(extra | self.metadata(file, content))
            self.retriever.remove(files)
            self.retriever.add_embeds(embeds[chosen], files, metadata)
        reasons = self.known_broken | {hashes[file]: printable(reason) for file, reason in broken}
        left_out = [(file, content) for content, files in changed.items() for file in files]
        self.retriever.remove([file for file, _ in left_out])
        self.retriever.save()
        shutil.rmtree(self.shards)
        return [LeftOut(printable(file), BROKEN, reasons[content], content) for file, content in left_out]
