"""What a model was trained on, so that nobody tests it on that: `split.json` beside its weights."""

import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers.utils import cached_file

from datasets_scripts.reading.splits import group_key

from ..files import write_file


SPLIT_FILE = "split.json"
KEPT = 100_000  # groups: those with the lowest hashes, of which a test has its share
SEEN = 0.1  # of a test's groups; official splits share a few captions, another seed's two thirds


def group_hash(caption: str) -> str:
    return hashlib.sha256(group_key(caption).encode()).hexdigest()[:12]


def write_trained_split(
    folder: str | Path, dataset: str, split_seed: int, captions: Iterable[str], bases: Sequence[str] = ()
):
    """
    Writes `split.json` into a model's or a language's folder.

    Args:
        dataset, split_seed: of `load_caption_dataset`, or the name of a caption file.
        captions: source captions that were trained on.
        bases: models that it was made of: what they were trained on counts too, and it is tested on their split.
    """
    known = {group_hash(caption) for caption in captions}
    for base in filter(None, map(read_trained_split, bases)):
        known |= set(base.get("trained_groups", ()))
        if base["split_seed"] is not None:
            split_seed = base["split_seed"]
        dataset = "+".join(dict.fromkeys([*base.get("dataset", dataset).split("+"), *dataset.split("+")]))
    record = {"dataset": dataset, "split_seed": split_seed, "trained_groups": sorted(known)[:KEPT]}
    write_file(Path(folder, SPLIT_FILE), json.dumps(record) + "\n")


def read_trained_split(model: str) -> dict | None:
    """Read `dataset`, `split_seed` and, of newer models, `trained_groups` of a folder or hub id; None where it does
    not say."""
    for name in (SPLIT_FILE, "metrics.json"):
        path = Path(model, name)
        if not path.is_file() and not Path(model).is_dir():
            missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
            try:
                path = Path(cached_file(model, name, _raise_exceptions_for_gated_repo=False, **missing) or path)
            except (OSError, ValueError):  # no such model: whoever loads it says so
                continue
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            record = record.get("settings", record) if isinstance(record, dict) else None
            if not isinstance(record, dict):
                continue  # a file of others by this name
            return {"split_seed": record.get("seed")} | record
    return None


def split_seed(model: str, seed: int | None, dataset: str | None = None) -> int:
    """
    Return the seed of the split that the model was trained with, or `seed` of a model that does not say.

    Args:
        dataset: what is split; data of which the model has seen nothing may be split by any seed.

    Raises:
        ValueError: for another `seed`, which would put pictures of the training set into the test.
    """
    record = read_trained_split(model)
    trained = None if record is None else record["split_seed"]
    if trained is None:
        seed = seed or 0
        print(f"{model} does not say how it was trained; assuming split seed {seed}", file=sys.stderr)
        return seed
    shared = dataset is None or "dataset" not in record or set(parts(dataset)) & set(parts(record["dataset"]))
    if seed not in (None, trained) and shared:
        raise ValueError(
            f"{model} was trained with split seed {trained}: with seed {seed} the test would hold pictures of the "
            f"training set. Leave the seed out, or train with --split_seed {seed}."
        )
    return trained if seed is None else seed


def parts(dataset: str) -> list[str]:
    return [part.partition(":")[0] for part in dataset.split("+")]


def source_captions(rows) -> list[str | None]:
    """Return the source captions of a test's rows (a `Dataset`) that people wrote; none where it has no such
    column."""
    column = "reference_source_caption"
    return list(rows[column]) if column in rows.column_names else []


def check_unseen(model: str, captions: Iterable[str | None], what: str):
    """
    Raise ValueError where a model was trained on the groups of a test.

    Args:
        captions: source captions of the test's pictures; None is passed over.
        what: the test, for the message.
    """
    record = read_trained_split(model) or {}
    trained = record.get("trained_groups")
    if not trained:
        return
    asked = {group_hash(caption): caption for caption in captions if caption}
    if len(trained) == KEPT:  # of more the rest is not known
        asked = {name: caption for name, caption in asked.items() if name <= trained[-1]}
    seen = [caption for name, caption in asked.items() if trained[max(0, bisect_right(trained, name) - 1)] == name]
    if len(seen) > SEEN * len(asked):
        raise ValueError(
            f"{model} was trained on {len(seen):,} of the {len(asked):,} groups of {what}, such as {seen[0]!r}: they "
            f"are no test of it. It was trained on {record['dataset']} with split seed {record['split_seed']}: test "
            "on that split (--split_seed), or on other captions"
        )
