"""Texts and pictures to embeddings, in batches: for evaluation and for search alike."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import BatchFeature

from .length_groups import length_groups, pass_tokens, row_lengths
from .modeling_nrccr import NrccrModel


PASSES = 16  # of which the texts are sorted by their tokens at a time


def encode_texts(
    model: NrccrModel,
    texts: Sequence[str],
    processor: Callable,
    batch_size: int | None = None,
    show_progress: bool = False,
) -> torch.Tensor:
    """Embeddings of `texts`, in their order, float32 on the CPU, of shape `(len(texts), projection_dim)`.

    Equal texts are encoded once; a pass has at most `batch_size` texts (by default 64 on a CPU, 1,024 elsewhere), of
    like length. `processor`: a [`NrccrProcessor`], or a [`FeatureCache`] that stands in for it.
    """
    batch_size = batch_size or (64 if model.device.type == "cpu" else 1024)
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    # published: padding is pooled too, so that an embedding depends on the batch, and batches stay as they are
    as_they_are = getattr(getattr(model, "config", None), "pool_padding", False)
    # of a cache, which gives states in the place of ids, one batch at a time: they take a thousand times the memory
    passes = 1 if as_they_are or hasattr(processor, "boundary_states") else PASSES

    def embed(inputs: BatchFeature) -> torch.Tensor:
        if as_they_are:
            return model.get_text_features(**inputs.to(model.device)).pooler_output
        mask = inputs.get("attention_mask")
        lengths = row_lengths(torch.ones_like(inputs["input_ids"]) if mask is None else mask)
        groups, parts = length_groups(lengths, batch_size, pass_tokens(model.device)), []
        inputs = inputs.to(model.device)
        for rows in groups:
            length = max(1, int(lengths[rows].max()))
            part = {name: value[rows, :length] for name, value in inputs.items()}
            parts.append(model.get_text_features(**part).pooler_output)
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def prepare(chunk: Sequence[str]) -> BatchFeature:
        return processor(text=list(chunk), return_tensors="pt")

    embeds = encode(model, unique, prepare, embed, passes * batch_size, "texts" if show_progress else None)
    row = {text: i for i, text in enumerate(unique)}
    return embeds[[row[text] for text in texts]]


def encode_images(
    model: NrccrModel, images: Sequence, processor: Callable, batch_size: int = 32, show_progress: bool = False
) -> torch.Tensor:
    """Embeddings of pictures (whatever the processor takes as `images`), float32 on the CPU, of shape
    `(len(images), projection_dim)`. Pictures are decoded while others are encoded."""

    def prepare(chunk: Sequence) -> BatchFeature:
        return processor(images=list(chunk), return_tensors="pt")

    def embed(inputs: BatchFeature) -> torch.Tensor:
        return model.get_image_features(**inputs.to(model.device)).pooler_output

    return encode(model, images, prepare, embed, batch_size, "pictures" if show_progress else None)


def picture_rows(image_ids: Sequence[str]) -> tuple[dict[str, int], torch.Tensor]:
    """Each picture's first row, in the order of their occurrence, and for each row the number of its picture in that
    order, of shape `(len(image_ids),)`: several captions may share a picture."""
    first_rows = {}
    for row, image_id in enumerate(image_ids):
        first_rows.setdefault(image_id, row)
    numbers = {image_id: number for number, image_id in enumerate(first_rows)}
    return first_rows, torch.tensor([numbers[image_id] for image_id in image_ids])


def ahead(chunks: Iterable, prepare: Callable[[Any], Any], device: torch.device) -> Iterator:
    """What `prepare(chunk)` gives, in order; threads prepare the next chunks while the caller is busy with one on
    `device` (reading, decoding and tokenizing leave Python's lock): two of them on a CPU, which they take from the
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
    """`embed(prepare(chunk))` of all chunks of `items`, float32 on the CPU, `(len(items), projection_dim)`."""
    was_training = model.training
    model.eval()
    chunks = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    bar = tqdm(total=len(items), desc=progress or "", unit="item", disable=progress is None)
    parts = []
    with bar:
        for inputs in ahead(chunks, prepare, model.device):
            parts.append(embed(inputs).float().cpu())
            bar.update(len(parts[-1]))
    model.train(was_training)
    return torch.cat(parts) if parts else torch.empty(0, model.config.projection_dim)
