"""Rows of captions and pictures to a batch with three views under separate keys, each padded to its own length."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling_nrccr import VIEWS


COLUMNS = {"source": "source_caption", "target": "target_caption", "back_translation": "back_translation"}
MEDIA_COLUMNS = ("image", "video", "visual_feats")
KEY_PREFIX = {"source": "", "target": "target_", "back_translation": "back_translation_"}


@dataclass
class DataCollatorForCrossLingualRetrieval:
    r"""
    Collates rows with the columns `image_id`, `source_caption`, `target_caption`, `back_translation` and `image`,
    `video` or `visual_feats` (none where `processor` is a [`FeatureCache`], which knows pictures by their `image_id`).
    Rows may bring what another model has embedded: `image_embeds` in the place of a picture, `teacher_text_embeds` of
    the source caption, each `(projection_dim,)`. A list of rows in the place of one is a group that stays together,
    such as a picture's captions in K languages (1-to-K contrast of CCRK, arXiv 2406.18254: no negatives of each other,
    as their `image_id` is one).

    Args:
        processor: A [`NrccrProcessor`], or a [`FeatureCache`] in its place.
        views: Which views of a caption are collated; [`NrccrTrainer`] asks only for those that a loss reads.
        taught_views: The same of rows that bring `teacher_text_embeds`; default: `views`.
        with_media: False leaves pictures out, for training on text alone.
        load_video: Gives the frames (list of pictures) of what the column `video` holds; by default it holds them.

    Example, with a processor that gives ids:

        >>> collator = DataCollatorForCrossLingualRetrieval(processor, views=("source", "target"))
        >>> row = {"image_id": "a", "source_caption": "a cat", "target_caption": "un gato", "image": cat}
        >>> batch = collator([row, ...])
        >>> sorted(batch)
        ['attention_mask', 'image_ids', 'input_ids', 'pixel_values', 'target_attention_mask', 'target_input_ids']
    """

    processor: Callable
    views: tuple[str, ...] = VIEWS
    taught_views: tuple[str, ...] | None = None
    with_media: bool = True
    load_video: Callable[[Any], list] = list

    def __call__(self, rows: list[dict] | list[list[dict]]) -> dict[str, torch.Tensor]:
        rows = list(single_rows(rows))
        batch, taught = {}, rows[0].get("teacher_text_embeds") is not None
        for view in self.taught_views if taught and self.taught_views else self.views:
            captions = [self.caption(row, view) for row in rows]
            for key, value in self.processor(text=captions, return_tensors="pt").items():
                batch[KEY_PREFIX[view] + key] = value
        if self.with_media:
            batch |= self.media(rows)
        if taught:
            batch["teacher_text_embeds"] = stack(rows, "teacher_text_embeds")
        batch["image_ids"] = torch.tensor([stable_id(row["image_id"]) for row in rows])
        return batch

    @staticmethod
    def caption(row: dict, view: str) -> str:
        caption = row.get(COLUMNS[view])
        if caption is None or not caption.strip():
            raise ValueError(
                f"{COLUMNS[view]} of {row.get('caption_id', row.get('image_id'))!r} is {caption!r}: "
                "translate the data set first (modeling_nrccr.translation), or give the losses that read it weight 0"
            )
        return caption

    def media(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` of the rows' pictures or videos, or `visual_feats`, with the mask of their frames;
        where the rows bring them, `image_embeds`."""
        if rows[0].get("image_embeds") is not None:
            return {"image_embeds": stack(rows, "image_embeds")}
        if rows[0].get("visual_feats") is not None:
            return dict(self.processor(visual_feats=[row["visual_feats"] for row in rows], return_tensors="pt"))
        if rows[0].get("video") is not None:
            return dict(self.processor(videos=[self.load_video(row["video"]) for row in rows], return_tensors="pt"))
        images = [row["image"] if row.get("image") is not None else row["image_id"] for row in rows]
        return dict(self.processor(images=images, return_tensors="pt"))


def single_rows(rows: Iterable[dict | list[dict]]) -> Iterator[dict]:
    """Yield the single rows of rows and groups of rows."""
    for row in rows:
        yield from row if isinstance(row, list) else (row,)


def without_images(dataset):
    """Return rows without their pictures, which would be decoded for nothing."""
    media = [name for name in MEDIA_COLUMNS if name in (getattr(dataset, "column_names", None) or ())]
    return dataset.remove_columns(media) if media else dataset


def stack(rows: list[dict], column: str) -> torch.Tensor:
    return torch.stack([torch.as_tensor(row[column], dtype=torch.float32) for row in rows])


def stable_id(image_id: str | int) -> int:
    """Return the same 63-bit number for an id in every process and run (Python's `hash` is not)."""
    return int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=8).digest(), "big") >> 1
