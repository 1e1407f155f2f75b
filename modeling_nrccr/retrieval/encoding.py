"""Texts and pictures to embeddings, in batches: for evaluation and for search alike."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import BatchFeature

from ..languages import in_eval_mode
from ..length_groups import length_groups, pass_tokens, row_lengths
from ..modeling_nrccr import NrccrModel
from ..processor_inputs import check_texts


PASSES = 16  # of which the texts are sorted by their tokens at a time


class Active(Enum):
    """In the place of a language: the one that is the model's active one when a call begins."""

    LANGUAGE = "the model's active language"


ACTIVE = Active.LANGUAGE
Language = str | None | Active  # None: no adapter's, the model's own text side


def encode_texts(
    model: NrccrModel,
    texts: Iterable[str],
    processor: Callable,
    batch_size: int | None = None,
    show_progress: bool = False,
    languages: Language | Sequence[str | None] = ACTIVE,
) -> torch.Tensor:
    """
    Embed `texts`, in their order, float32 on the CPU, of shape `(len(texts), projection_dim)`.

    Equal texts of one language are encoded once; a pass has at most `batch_size` texts (by default 64 on a CPU, 1,024
    elsewhere), of like length. Nothing of the model is switched, so threads may ask in different languages.

    Args:
        processor: a [`NrccrProcessor`], or a [`FeatureCache`] that stands in for it.
        languages: whose adapter reads the texts: a code, or a list with one for each text. None is the model's own
            text side; by default it is the active one.

    Raises:
        ValueError: names the row of what is no text, and a language that the model has not.
    """
    if isinstance(texts, str):
        raise ValueError(f"encode_texts() takes a list of texts, got {texts[:40]!r}: put it into one")
    texts = list(texts)
    check_texts(texts)
    spoken = languages_of(model, len(texts), languages)
    rows = list(zip(texts, spoken))
    batch_size = batch_size or (64 if model.device.type == "cpu" else 1024)
    unique = sorted(set(rows), key=lambda row: (len(row[0]), row[0], row[1] or ""))
    # published: padding is pooled too, so that an embedding depends on the batch, and batches stay as they are
    as_they_are = getattr(getattr(model, "config", None), "pool_padding", False)
    # of a cache, which gives states in the place of ids, one batch at a time: they take a thousand times the memory
    passes = 1 if as_they_are or hasattr(processor, "boundary_states") else PASSES

    def prepare(chunk: Sequence[tuple[str, str | None]]) -> tuple[BatchFeature, list[str | None]]:
        of_chunk, read_by = map(list, zip(*chunk))
        return tokenize(processor, of_chunk, read_by), read_by

    def embed(prepared: tuple[BatchFeature, list[str | None]]) -> torch.Tensor:
        inputs, read_by = prepared
        if as_they_are:
            return features(inputs.to(model.device), read_by)
        mask = inputs.get("attention_mask")
        lengths = row_lengths(torch.ones_like(inputs["input_ids"]) if mask is None else mask)
        groups, parts = length_groups(lengths, batch_size, pass_tokens(model.device)), []
        inputs = inputs.to(model.device)
        for rows in groups:
            length = max(1, int(lengths[rows].max()))
            part = {name: value[rows, :length] for name, value in inputs.items()}
            parts.append(features(part, [read_by[row] for row in rows.tolist()]))
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def features(inputs: dict[str, torch.Tensor], read_by: list[str | None]) -> torch.Tensor:
        spoken = {"languages": read_by} if hasattr(model, "languages_of") else {}
        return model.get_text_features(**inputs, **spoken).pooler_output

    embeds = encode(model, unique, prepare, embed, passes * batch_size, "texts" if show_progress else None)
    place = {row: i for i, row in enumerate(unique)}
    return embeds[[place[row] for row in rows]]


def tokenize(processor: Callable, texts: list[str], languages: list[str | None]) -> BatchFeature:
    """Return the inputs of texts, each tokenized by the text side that reads its language; the languages themselves
    are the caller's to hand on."""
    if not getattr(processor, "reads_languages", False):
        return processor(text=texts, return_tensors="pt")
    inputs = processor(text=texts, languages=languages, return_tensors="pt")
    inputs.pop("languages")
    return inputs


def languages_of(model: NrccrModel, size: int, languages: Language | Sequence[str | None]) -> list[str | None]:
    """Return one language for each of `size` texts. Raises ValueError for one that the model has not."""
    one_for_all = languages is None or isinstance(languages, str)
    listed = None if languages is ACTIVE else [languages] * size if one_for_all else list(languages)
    if hasattr(model, "languages_of"):
        return model.languages_of(size, listed)
    if any(listed or ()):
        raise ValueError(f"{type(model).__name__} has no languages to choose from, got {languages!r}")
    return [None] * size


def encode_images(
    model: NrccrModel, images: Sequence, processor: Callable, batch_size: int = 32, show_progress: bool = False
) -> torch.Tensor:
    """Embed pictures (whatever the processor takes as `images`), float32 on the CPU, of shape `(len(images),
    projection_dim)`. Pictures are decoded while others are encoded."""

    def prepare(chunk: Sequence) -> BatchFeature:
        return processor(images=list(chunk), return_tensors="pt")

    def embed(inputs: BatchFeature) -> torch.Tensor:
        return model.get_image_features(**inputs.to(model.device)).pooler_output

    return encode(model, images, prepare, embed, batch_size, "pictures" if show_progress else None)


def picture_rows(image_ids: Sequence[str]) -> tuple[dict[str, int], torch.Tensor]:
    """Return each picture's first row, in the order of their occurrence, and for each row the number of its picture in
    that order, of shape `(len(image_ids),)`: several captions may share a picture."""
    first_rows = {}
    for row, image_id in enumerate(image_ids):
        first_rows.setdefault(image_id, row)
    numbers = {image_id: number for number, image_id in enumerate(first_rows)}
    return first_rows, torch.tensor([numbers[image_id] for image_id in image_ids])


def ahead(chunks: Iterable, prepare: Callable[[Any], Any], device: torch.device) -> Iterator:
    """Yield what `prepare(chunk)` gives, in order; threads prepare the next chunks while the caller is busy with one
    on `device` (reading, decoding and tokenizing leave Python's lock): two of them on a CPU, which they take from the
    caller, else one for each core, up to eight. A single chunk is prepared here."""
    workers = 2 if device.type == "cpu" else min(8, os.cpu_count() or 2)
    chunks = iter(chunks)
    waiting = list(itertools.islice(chunks, workers))
    if len(waiting) < 2:
        yield from map(prepare, waiting)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        pending = deque(pool.submit(prepare, chunk) for chunk in waiting)
        for chunk in chunks:
            pending.append(pool.submit(prepare, chunk))
            yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def encode(
    model: NrccrModel, items: Sequence, prepare: Callable, embed: Callable, batch_size: int, progress: str | None
) -> torch.Tensor:
    """Return `embed(prepare(chunk))` of all chunks of `items`, float32 on the CPU, `(len(items), projection_dim)`."""
    chunks = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    bar = tqdm(total=len(items), desc=progress or "", unit="item", disable=progress is None)
    parts = []
    with bar, in_eval_mode(model):
        for inputs in ahead(chunks, prepare, model.device):
            parts.append(embed(inputs).float().cpu())
            bar.update(len(parts[-1]))
    return torch.cat(parts) if parts else torch.empty(0, model.config.projection_dim)
