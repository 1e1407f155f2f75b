"""Asks an index, or a folder of pictures, sentences in any language."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..loading.models import load_with_languages
from ..media import load_image
from ..processor_inputs import text_problem
from .gallery_media import Skipped
from .index import is_milvus, open_index
from .retriever import Hit, NrccrRetriever


class Answer(NamedTuple):
    """One query, its translation (or None), and its hits, best first."""

    query: str
    translation: str | None
    hits: list[Hit]


class Found(NamedTuple):
    """What a search found: the pictures that were searched, those that cannot be read, and an answer a query."""

    size: int
    skipped: list[Skipped]
    answers: list[Answer]


def search(
    queries: Sequence[str],
    index: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    model: str | None = None,
    languages: Sequence[str] = (),
    translations: Sequence[str] | None = None,
    translation_weight: float = 0.5,
    k: int = 5,
    collection: str = "gallery",
    strict: bool = False,
    batch_size: int = 32,
    device: str | None = None,
    dtype: str | None = None,
) -> Found:
    """
    Search an index, or a folder whose pictures are encoded first.

    Args:
        index: what `nrccr index` or [`NrccrRetriever.save`] wrote.
        folder: of pictures, with its sub-folders, in the place of an index.
        model: folder or hub id; default: the one that the index remembers.
        languages: as `--language` takes them, the first asks; default: those that the index remembers, where it
            names the model too.
        translations: of each query, in English: both are asked.
        translation_weight: of the translation, from 0 to 1.
        k: pictures for each query.
        collection: name of the gallery within Milvus.
        strict: raise for a picture that cannot be read, rather than skip it.
        batch_size: pictures of a folder at once.
        device, dtype: of the model, as for [`load_model`].

    Raises:
        ValueError: a query is blank, there is no index or folder, or no model, or it is not the index's.
    """
    texts = translations or [None] * len(queries)
    if len(texts) != len(queries):
        raise ValueError(f"Got {len(queries)} queries and {len(texts)} translations: give each query one.")
    for what, some in (("The query", queries), ("--translation", translations or ())):
        for text in some:  # before a folder is encoded
            if problem := text_problem(text):
                raise ValueError(f"{what} {problem}")
    if (index is None) == (folder is None):
        raise ValueError("Name either an index or a folder of pictures.")
    skipped: list[Skipped] = []
    if folder is None:
        retriever = open_gallery(index, model, languages, collection, device, dtype)
    else:
        if model is None:
            raise ValueError("A folder of pictures needs a model: --model NAME, a folder or hub id")
        retriever = NrccrRetriever(*load_with_languages(model, languages, device, dtype))
        skipped = retriever.add(folder, strict=strict, batch_size=batch_size, show_progress=True)
    answers = [
        Answer(query, text, retriever.search(query, k, None, text, translation_weight))
        for query, text in zip(queries, texts)
    ]
    return Found(len(retriever), skipped, answers)


def open_gallery(
    index: str | Path,
    model: str | None = None,
    languages: Sequence[str] = (),
    collection: str = "gallery",
    device: str | None = None,
    dtype: str | None = None,
) -> NrccrRetriever:
    """
    Open an index with the model that made it; the arguments are those of [`search`].

    Raises:
        ValueError: there is no readable index, it remembers no model, that model is gone, or another one is given.
    """
    opened = open_index(index, 0, create=False, **({"collection": collection} if is_milvus(index) else {}))
    remedy = "--model NAME, a folder or hub id"
    if model is not None:
        return NrccrRetriever(*load_with_languages(model, languages, device, dtype), opened)
    made_by: dict[str, Any] | None = opened.made_by
    if made_by is None:
        raise ValueError(f"The index {str(index)!r} does not say which model made it: name it, {remedy}")
    name = made_by["model"]
    try:
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ValueError("there is no such folder")
        parts = load_with_languages(name, languages or made_by["languages"], device, dtype)
    except ValueError as error:
        raise ValueError(
            f"The index {str(index)!r} was made by {name!r}, which cannot be loaded ({error}): say where it is now, "
            f"{remedy}"
        ) from error
    return NrccrRetriever(*parts, opened)


def read_hit(hit: Hit) -> tuple[Image.Image, str | None]:
    """Return the picture of a hit, or the frame of a video that is most like the whole, and None; a grey field and the
    reason where the file is gone, or cannot be read any more. Raises ValueError where the index names no file."""
    if "path" not in hit.metadata:
        raise ValueError(f"The gallery does not say which file {hit.id!r} is: leave out --output.")
    path, num_frames = hit.metadata["path"], hit.metadata.get("num_frames")
    try:
        if num_frames is None:
            return load_image(path), None
        from datasets_scripts.reading.videos import read_frames

        return read_frames(path, num_frames)[hit.metadata["frame"]], None
    except Exception as error:  # decoders of broken files raise anything
        return Image.new("RGB", (64, 64), "lightgrey"), f"cannot show {path}: {error}"
