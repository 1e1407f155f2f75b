"""Indexes a folder of pictures and videos, in as many processes as are launched; run again, it adds what is new:

    accelerate launch examples/index_gallery.py --model outputs/demo --gallery PICTURES --index outputs/gallery

`--index` is a folder (faiss), `gallery.db` (Milvus Lite) or `http://localhost:19530` (a Milvus server). What is
encoded goes into shards before it goes into the index, so a run that was killed, or whose server went away, encodes
nothing twice; a file is known by its content. `--copy_from outputs/gallery` moves what another index has.

What is left out stands in `left_out.csv` with the reason, in the folder of the index (of Milvus, in the cache folder
here). A file that is broken is not tried again before it changes; `--retry` tries all of them.
"""

import argparse
import csv
import hashlib
import io
import json
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from datasets_scripts.reading.videos import VIDEO_SUFFIXES, read_frames

from ..cli.common import command
from ..files import is_utf8, printable, write_file, writing
from ..languages import SAME_MODEL
from ..loading.models import load_model
from ..loading.wheels import cache_folder
from ..media import IMAGE_SUFFIXES, Found, describe_others, is_clip, list_images, walk
from ..recipes.limits import number
from .index import is_milvus
from .retriever import NOT_UTF8, NrccrRetriever, Skipped


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
    """Pictures and videos under `gallery`, and what is passed over; see [`walk`]."""
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
    """Where this machine keeps its part of the work on an index."""
    address = index if "://" in index else str(Path(index).resolve())
    return cache_folder() / name / hashlib.blake2b(f"{address} {collection}".encode(), digest_size=8).hexdigest()


def home_folder(index: str, collection: str) -> Path:
    """The folder of `left_out.csv` and of the lock."""
    return local_folder("indexes", index, collection) if is_milvus(index) else Path(index)


def read_left_out(path: Path) -> dict[str, str]:
    """By content the reasons why files were broken; none where the list is not there, or was changed by hand."""
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


def describe(encoded: int, left_out: list[LeftOut], others: Counter, path: Path) -> str:
    """The last line of a run. `others`: how many files of each suffix are not read."""
    kinds = Counter(row.kind for row in left_out if row.kind != UNREAD)
    parts = [f"{kinds[kind]:,} {kind}" for kind in (BROKEN, PASSED) if kinds[kind]]
    if others:
        parts.append(describe_others(others))
    return f"{encoded:,} encoded; " + (f"left out: {', '.join(parts)}; see {path}" if parts else "nothing left out")


def read_shards(folder: Path, fingerprint: torch.Tensor) -> Iterator[tuple[list[tuple[str, dict]], torch.Tensor]]:
    """Content hash and metadata of each row, and the embeddings; what another model made is removed."""
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


class Indexer:
    """Brings an index up to date with a folder; every process calls `run`."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.state, self.gallery = args, PartialState(), Path(args.gallery).resolve()
        self.is_main = self.state.is_main_process
        # one process opens the index: Milvus Lite takes no more
        index = args.index if self.is_main else None
        model, processor = load_model(args.model)
        model = model.to(self.state.device)
        if index and args.copy_from:
            other = NrccrRetriever.load(args.copy_from, model, processor, **self.options(args.copy_from))
            other.save(index, **self.options(index))
        self.retriever = NrccrRetriever(model, processor, index, **self.options(index))
        self.fingerprint = self.retriever.fingerprint()
        self.shards = local_folder("gallery", args.index, args.collection)
        self.left_out_path = home_folder(args.index, args.collection) / "left_out.csv"
        self.known_broken = {} if args.retry or args.strict else read_left_out(self.left_out_path)

    def options(self, index: str | None) -> dict[str, str]:
        return {"collection": self.args.collection} if index and is_milvus(index) else {}

    def run(self, found: Found | None) -> tuple[int, list[Skipped], list[LeftOut]]:
        """How many files were encoded, what turned out to be broken, and all that was left out. `found`: in the main
        process what the gallery holds."""
        self.shards.mkdir(parents=True, exist_ok=True)
        files = [path.relative_to(self.gallery).as_posix() for path in found.files] if self.is_main else None
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
        """The file, the hash of its content, and why it has none."""
        try:
            return file, content_hash(self.gallery / file), None
        except OSError as error:
            if self.args.strict:
                raise
            return file, None, error.strerror or str(error)

    def share(self, items: list) -> list:
        return items[self.state.process_index :: self.state.num_processes]

    def compare(self, hashes: dict[str, str], files: list[str], found: Found) -> dict[str, list[str]]:
        """By content hash the files that are new, changed or moved. What the index has of them goes into a shard."""
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
        if self.args.remove_missing:
            hidden = tuple(f"{name}/" for name, _ in found.left_out)  # in a folder that cannot be read, say
            self.retriever.remove([id for id in held.keys() - set(files) if not f"{id}".startswith(hidden)])
        return changed

    def metadata(self, file: str, content: str) -> dict[str, str]:
        return {"path": str(self.gallery / file), "content_hash": content}

    def missing(self, changed: dict[str, list[str]]) -> list[tuple[str, str]]:
        """Content hash and one file of each content that no shard has, and that is not known to be broken."""
        known = {content for rows, _ in read_shards(self.shards, self.fingerprint) for content, _ in rows}
        known.update(self.known_broken)
        return [(content, files[0]) for content, files in changed.items() if content not in known]

    def encode(self, todo: list[tuple[str, str]]) -> list[Skipped]:
        """A shard for every `shard_size` files; each process makes its own."""
        size, skipped = self.args.shard_size, []
        with tqdm(total=len(todo), desc="encoding", unit="file", disable=not self.is_main) as progress:
            for start in self.share(range(0, len(todo), size)):
                files, rows, embeds = todo[start : start + size], [], []
                names = [file for _, file in files]
                is_video = [self.is_video(name) for name in names]
                for kind, wanted in (("images", False), ("videos", True)):
                    encoded = self.retriever.encode_media(
                        kind,
                        [(row, self.gallery / name) for row, name in enumerate(names) if is_video[row] == wanted],
                        names,
                        lambda path: read_frames(path, self.args.num_frames),
                        self.args.strict,
                        self.args.batch_size,
                        lambda count: progress.update(count * self.state.num_processes),
                    )
                    rows += [(files[row][0], extra) for row, extra in zip(encoded.rows, encoded.metadata)]
                    embeds.append(encoded.embeds)
                    skipped += encoded.skipped
                self.shelve(rows, torch.cat(embeds))
        return skipped

    def is_video(self, file: str) -> bool:
        try:
            return is_clip(self.gallery / file)
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


@command("what was encoded is kept: the same command goes on")
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="outputs/demo", help="folder or hub id of a trained model")
    parser.add_argument("--gallery", required=True, help="folder of pictures and videos, with its sub-folders")
    parser.add_argument("--index", required=True, help="folder, NAME.db, or the URI of a Milvus server")
    parser.add_argument("--collection", default="gallery", help="name of the gallery within Milvus")
    parser.add_argument("--copy_from", help="another index of this gallery, to begin with")
    parser.add_argument("--num_frames", type=number(1), default=8, help="of each video, sampled uniformly")
    parser.add_argument("--batch_size", type=number(1), default=32, help="pictures or videos at a time")
    parser.add_argument("--shard_size", type=number(1), default=256, help="files between two writes")
    parser.add_argument("--remove_missing", action="store_true", help="remove from the index what left the folder")
    parser.add_argument("--strict", action="store_true", help="stop at a corrupt file rather than skip it")
    parser.add_argument("--retry", action="store_true", help="try again what was broken and has not changed")
    args = parser.parse_args(argv)
    PartialState(cpu=not torch.accelerator.is_available())  # else accelerate makes no group of CPU processes
    started = time.perf_counter()
    is_main = PartialState().is_main_process
    found = list_media(Path(args.gallery).resolve()) if is_main else None
    with writing(home_folder(args.index, args.collection)) if is_main else nullcontext():
        indexer = Indexer(args)
        encoded, skipped, left_out = indexer.run(found)
    if is_main:
        for file, reason in skipped:
            print(f"skipped {printable(file)}: {printable(reason)}")
        print(f"{args.index} has {len(indexer.retriever):,} ({time.perf_counter() - started:.0f} s)")
        print(describe(encoded, left_out, found.others, indexer.left_out_path))


if __name__ == "__main__":
    main()
