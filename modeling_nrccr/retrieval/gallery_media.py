"""What a gallery is filled with: pictures, videos and features, how they are named, and how each is read."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import BatchFeature

from ..files import is_utf8, printable
from ..media import list_images, load_image, walk
from .encoding import picture_rows


NOUNS = {"images": "picture", "videos": "video", "visual_feats": "feature sequence"}  # by the processor's argument
DATASET_COLUMNS = {"image": "images", "video": "videos", "visual_feats": "visual_feats"}
NOT_UTF8 = "its name is not UTF-8: rename it"


class Skipped(NamedTuple):
    """A picture that could not be read, and why."""

    id: str | int
    reason: str


class Media(NamedTuple):
    """What is to be added: `kind` is an argument of the processor; `sources`, `ids` and `metadata` have one entry for
    each; `skipped` were found, but cannot be read."""

    kind: str
    sources: Sequence
    ids: Sequence[str | int]
    metadata: Sequence[dict[str, Any]]
    skipped: list[Skipped]


def find_media(
    images: Any,
    videos: Sequence | None,
    ids: Sequence[str | int] | None,
    metadata: Sequence[dict[str, Any]] | None,
    strict: bool = False,
    first: int = 0,
) -> Media:
    """
    Name what [`NrccrRetriever.add`] was given, whose arguments these are.

    Args:
        first: the running number of the first one without a name.

    Raises:
        ValueError: for a folder without pictures, lists of unequal length, and, if `strict`, names that are not UTF-8.
    """
    if (images is None) == (videos is None):
        raise ValueError("Give add() either images or videos.")
    kind, sources = ("images", images) if videos is None else ("videos", videos)
    is_named_by_file, skipped = ids is None or metadata is None, []
    if isinstance(images, (str, Path)):
        folder, (sources, _, left_out) = Path(images), walk(images)
        sources = sources or list_images(images)  # says what is there instead
        skipped = [Skipped(*entry) for entry in left_out]
        ids = [path.relative_to(folder).as_posix() for path in sources] if ids is None else ids
    elif hasattr(images, "column_names"):  # a `datasets.Dataset`, a library that a search does not wait for
        kind, sources, image_ids, columns = dataset_media(images)
        ids, metadata = image_ids if ids is None else ids, columns if metadata is None else metadata
    are_files = [isinstance(source, (str, Path)) for source in sources] if is_named_by_file else []
    if ids is None:
        first = 0 if all(are_files) else first
        ids = [str(source if is_file else first + i) for i, (source, is_file) in enumerate(zip(sources, are_files))]
    if metadata is None:
        metadata = [{"path": str(source)} if is_file else {} for source, is_file in zip(sources, are_files)]
    if not len(sources) == len(ids) == len(metadata):
        raise ValueError(
            f"Got {len(sources)} {NOUNS[kind]}s, {len(ids)} ids and {len(metadata)} metadata: one each is needed."
        )
    unnamed = {row for row, is_file in enumerate(are_files) if is_file and not is_utf8(sources[row])}
    if unnamed:
        skipped += [Skipped(printable(str(ids[row])), NOT_UTF8) for row in sorted(unnamed)]
        if strict:
            raise ValueError(f"{skipped[-1].id}: {NOT_UTF8}.")
        sources, ids, metadata = (
            [value for row, value in enumerate(values) if row not in unnamed] for values in (sources, ids, metadata)
        )
    return Media(kind, sources, ids, metadata, skipped)


def dataset_media(dataset: Any) -> tuple[str, Sequence, Sequence[str], list[dict[str, Any]]]:
    """Return what a `datasets.Dataset` holds (an argument of the processor), the media, their ids, and the texts and
    numbers beside them. Raises ValueError for one without `image_id`, or without media."""
    import datasets

    column = next((name for name in DATASET_COLUMNS if name in dataset.column_names), None)
    if column is None or "image_id" not in dataset.column_names:
        raise ValueError(
            f"The data set has the columns {', '.join(dataset.column_names)}: it needs image_id, and one of "
            f"{', '.join(DATASET_COLUMNS)}."
        )
    dataset = dataset.select(list(picture_rows(dataset["image_id"])[0].values()))
    feature = dataset.features[column]
    if isinstance(feature, (datasets.Image, datasets.Video)):
        dataset = dataset.cast_column(column, type(feature)(decode=False))  # decoded here, within bounds
    metadata = [
        {name: value for name, value in row.items() if name != "image_id" and isinstance(value, (str, int, float))}
        for row in dataset.remove_columns(column)
    ]
    return DATASET_COLUMNS[column], dataset[column], list(dataset["image_id"]), metadata


def load_media(kind: str, source: Any, read_frames: Callable | None) -> Any:
    """Return what the processor takes of a picture, a video or features. Raises whatever its decoder does."""
    if source is None:
        raise ValueError("it has no media")
    if kind == "videos":
        if not isinstance(source, (list, tuple)):
            if read_frames is None:
                raise ValueError("name what reads its frames: read_frames=datasets_scripts.reading.videos.read_frames")
            source = read_frames(source)
        if not len(source):
            raise ValueError("it has no frames")
        return list(source)
    if kind == "images" and not isinstance(source, Image.Image):
        if isinstance(source, dict):  # of a data set that is not decoded
            source = source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])
        return load_image(source)
    return source


class MediaReader:
    """
    Reads media into batches for the model. Whatever is raised for one of them leaves out that one.

    Args:
        kind: "images", "videos" or "visual_feats".
        ids: of all media, by row.
        processor: makes the batches.
        read_frames: the frames of a video.
        strict: raise for what cannot be read.
    """

    def __init__(
        self,
        kind: str,
        ids: Sequence[str | int],
        processor: Callable,
        read_frames: Callable | None = None,
        strict: bool = False,
    ):
        self.kind, self.ids, self.processor = kind, ids, processor
        self.read_frames, self.strict = read_frames, strict

    def refuse(self, row: int, error: Exception) -> Skipped:
        """Return why a row is left out; under `strict`, raise it as a ValueError."""
        if isinstance(error, ImportError):  # of a decoder: nothing can be read
            raise error
        if self.strict:
            raise ValueError(f"Row {row}: cannot read the {NOUNS[self.kind]} {self.ids[row]!r}: {error}") from error
        return Skipped(self.ids[row], str(error) or type(error).__name__)

    def prepare(
        self, chunk: Sequence[tuple[int, Any]]
    ) -> tuple[list[tuple[list[int], BatchFeature]], list[Skipped], int]:
        """Read rows and their media: batches, each with its rows, what was left out, and how many there were."""
        rows, batch, refused, parts = [], [], [], []
        for row, source in chunk:
            try:
                batch.append(load_media(self.kind, source, self.read_frames))
                rows.append(row)
            except Exception as error:  # decoders of corrupt files raise nearly anything
                refused.append(self.refuse(row, error))
        try:
            parts = [(rows, self.processor(**{self.kind: batch}, return_tensors="pt"))] if batch else []
        except Exception:  # because of one of them
            for row, loaded in zip(rows, batch):
                try:
                    parts.append(([row], self.processor(**{self.kind: [loaded]}, return_tensors="pt")))
                except Exception as error:
                    refused.append(self.refuse(row, error))
        return parts, refused, len(chunk)
