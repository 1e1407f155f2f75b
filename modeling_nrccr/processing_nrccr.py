"""From captions, pictures and pre-extracted features to the tensors that `NrccrModel` takes."""

import copy
from collections.abc import Iterable, Sequence
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .dual_encoders import read_config, read_processors, text_rules
from .media import MAX_SIDE, load_image, to_rgb
from .processor_inputs import as_rows, check_texts, clean_text, is_rescaled, picture_of
from .weights import HUB_OPTIONS, split_options


logger = logging.get_logger(__name__)

# Of threads that prepare batches: a fast tokenizer's truncation is one for all.
TOKENIZING = Lock()


def to_square(image: Image.Image) -> Image.Image:
    """Pad a picture with white to a square."""
    return ImageOps.pad(image, (max(image.size), max(image.size)), color="white")


def frame_mask(counts: Sequence[int]) -> np.ndarray:
    """Return 1 for a frame, 0 for padding, of shape `(batch_size, max(counts))`."""
    return (np.arange(max(counts)) < np.array(counts)[:, None]).astype(np.int64)


# Of the tokenizer's options those that change what the model reads.
TRUNCATIONS = (True, "longest_first", "only_first", False, None, "do_not_truncate")
TEXT_OPTIONS = {
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "add_special_tokens",
    "return_attention_mask",
}
# Of the image processor's options those without effect here: pictures are RGB by then, and its other backend's.
WITHOUT_EFFECT = {"do_convert_rgb", "device", "disable_grouping", "image_seq_length"}


class NrccrTextProcessor(ProcessorMixin):
    r"""
    Processor of a model that takes pre-extracted visual features: tokenizer only, pictures are refused.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the text encoder.
        text_prefix (`str`): Put before each caption, such as "query: " for E5.
        max_text_length (`int`):
            Longer captions are truncated to this many tokens, and counted in `num_truncated`. It is also the
            tokenizer's `model_max_length`, where sentence-transformers' `max_seq_length` reads and sets it.
        text_padding (`str`):
            "max_length" pads every text to the `max_text_length` given here, whatever a call asks for, and attends to
            all of it: for text encoders that pool the last position (SigLIP). "longest" pads to the longest of the
            batch.
        lower_case (`bool`): Texts are lower-cased first, as the text encoder was trained (SigLIP 2).
        visual_feat_dim (`int`, *optional*): Expected width of `visual_feats`; by default that of the first row.
    """

    text_options = TEXT_OPTIONS

    def __init__(
        self,
        tokenizer,
        text_prefix: str = "",
        max_text_length: int = 64,
        text_padding: str = "longest",
        lower_case: bool = False,
        visual_feat_dim: int | None = None,
        **parts,
    ):
        super().__init__(copy.copy(tokenizer), **parts)  # a copy: another processor may have another length
        if text_padding not in ("longest", "max_length"):
            raise ValueError(f"text_padding={text_padding!r}: longest or max_length")
        self.text_padding, self.lower_case = text_padding, lower_case
        self.text_prefix = text_prefix
        self.max_text_length = self.text_length = max_text_length
        self.visual_feat_dim = visual_feat_dim
        self.num_truncated = 0

    @property
    def max_text_length(self) -> int:
        length = self.tokenizer.model_max_length
        return self.text_length if length is None else length

    @max_text_length.setter
    def max_text_length(self, length: int):
        self.tokenizer.model_max_length = length

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"max_text_length": self.max_text_length}

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        # by the tokenizers' name too, under which sentence-transformers gives it
        if "model_max_length" in kwargs:
            kwargs["max_text_length"] = kwargs.pop("model_max_length")
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def with_tokenizer(self, name: str, text_prefix: str = "", max_text_length: int = 64) -> "NrccrTextProcessor":
        """Return a processor that is the same for pictures, beside the tokenizer of another text encoder (a hub id or
        folder)."""
        parts = {"image_processor": self.image_processor} if hasattr(self, "image_processor") else {}
        settings = {"pad_to_square": self.pad_to_square} if parts else {}
        settings |= {"text_prefix": text_prefix, "max_text_length": max_text_length}
        return type(self)(AutoTokenizer.from_pretrained(name), **parts, **settings)

    def language_side(self) -> "NrccrTextProcessor":
        """Return what reads the texts that `NrccrModel.language_side` is trained on: this processor, unless there is
        another for the source language."""
        return self

    # Pipelines of transformers take a processor in the place of a tokenizer, so that texts get their prefix; these two
    # are what they ask of it to pad a batch.
    @property
    def pad_token_id(self) -> int | None:
        return self.tokenizer.pad_token_id

    @property
    def padding_side(self) -> str:
        return self.tokenizer.padding_side

    def __call__(
        self,
        text: str | Iterable[str] | None = None,
        images=None,
        visual_feats: Iterable | None = None,
        return_tensors: str | None = None,
        videos: Iterable[Iterable] | None = None,
        **options,
    ) -> BatchFeature:
        """
        Prepare captions, pictures, videos and features for the model.

        Args:
            text (`str` or `str`s): Captions, which are read as [`clean_text`] leaves them.
            images (picture or pictures):
                `PIL.Image`, path, or array of shape `(height, width, 3)` or `(3, height, width)`, of `uint8` or of
                floats of 0 to 1.
            visual_feats (arrays of shape `(num_frames, visual_feat_dim)`):
                Pre-extracted features of each picture or video; a vector is one frame.
            return_tensors (`str`, *optional*): "pt", "np" or None.
            videos (lists of pictures): The frames of each video, which may differ in number.
            options:
                Of the tokenizer, as in `CLIPProcessor`: `padding` (here "longest"), `truncation` (here True),
                `max_length` (here `max_text_length`), `pad_to_multiple_of`, `padding_side`, `add_special_tokens`,
                `return_attention_mask`. Of the image processor: `do_rescale`, `size`, ... Each as a keyword, or in
                `text_kwargs`, `images_kwargs` (`videos_kwargs` for frames) and, for all, `common_kwargs`.

        Returns:
            Of what was given: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`,
            `pixel_values` of shape `(batch_size, num_channels, height, width)`, of videos
            `(batch_size, num_frames, num_channels, height, width)`, and `visual_feats` of shape
            `(batch_size, num_frames, visual_feat_dim)`; the last two with `visual_attention_mask` of shape
            `(batch_size, num_frames)`.

        Raises:
            ValueError: An empty caption, an unreadable picture, or features that are not finite or of another width;
                the message names the row. An option that is given twice, or that the model cannot read by.
            TypeError: An option that has no effect here; the message names it.
        """
        options = self._sort_options(options | {"return_tensors": return_tensors} if return_tensors else options)
        # one for all kinds, whichever it was named for
        return_tensors = next(filter(None, [of.pop("return_tensors", None) for of in options.values()]), None)
        text, visual_feats, videos = as_rows(text, str), as_rows(visual_feats), as_rows(videos)
        images = [images] if getattr(images, "ndim", 4) < 4 else as_rows(images, str)
        given = [rows for rows in (text, images, visual_feats, videos) if rows is not None]
        if not given or not all(given):
            raise ValueError(f"{type(self).__name__} needs text, images, videos or visual_feats, of at least one row")
        if sum(rows is not None for rows in (images, visual_feats, videos)) > 1:
            raise ValueError(f"{type(self).__name__} takes one of images, videos and visual_feats at a time")
        data = {}
        if text is not None:
            data.update(self._process_text(text, **options["text_kwargs"]))
        if images is not None:
            data.update(self._process_pictures(images, return_tensors, options["images_kwargs"]))
        if visual_feats is not None:
            data.update(self._process_visual_feats(visual_feats))
        if videos is not None:
            data.update(self._process_videos([list(frames) for frames in videos], options["videos_kwargs"]))
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["languages"])

    def _sort_options(self, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what a call asks of each kind of input. Raises TypeError for an option that none takes."""
        of_pictures = set()
        if hasattr(self, "image_processor"):
            known = getattr(self.image_processor, "valid_kwargs", ImagesKwargs).__annotations__
            of_pictures = set(known) - WITHOUT_EFFECT
        takes = {
            "text_kwargs": self.text_options,
            "images_kwargs": of_pictures,
            "videos_kwargs": of_pictures,
            "audio_kwargs": {"padding"},  # which sentence-transformers gives with everything
        }
        takes = {kind: names | {"return_tensors"} for kind, names in takes.items()}
        options = dict(options)
        nested = {kind: options.pop(kind, None) or {} for kind in takes}
        everywhere = (options.pop("common_kwargs", None) or {}) | options
        for kind, names in takes.items():
            for name in nested[kind]:
                if name not in names:
                    raise TypeError(
                        f"{type(self).__name__} takes no {name!r} in {kind}, only {', '.join(sorted(names))}"
                    )
                if name in options and options[name] != nested[kind][name]:
                    raise ValueError(f"{name!r} is given twice, as a keyword and in {kind}")
        for name in everywhere:
            if not any(name in names for names in takes.values()):
                known = ", ".join(sorted(set().union(*takes.values())))
                raise TypeError(f"{type(self).__name__} takes no {name!r}, only {known}")
        return {
            kind: {name: value for name, value in (everywhere | nested[kind]).items() if name in names}
            for kind, names in takes.items()
        }

    def _process_text(
        self,
        text: list[str],
        padding: bool | str = "longest",
        truncation: bool | str = True,
        max_length: int | None = None,
        return_attention_mask: bool = True,
        **options,
    ) -> dict:
        check_texts(text)
        text = map(clean_text, text)
        text = [self.text_prefix + (caption.lower() if self.lower_case else caption) for caption in text]
        limit = self._check_limit(max_length, options.get("add_special_tokens", True))
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation={truncation!r}: one of {', '.join(map(repr, TRUNCATIONS))}")
        fixed = self.text_padding == "max_length"
        if fixed:  # the tokenizer pads to where it truncates
            padding = "max_length" if limit == self.text_length else False

        def encode(**length):
            return self.tokenizer(
                text, padding=padding, return_attention_mask=True, return_token_type_ids=False, **length, **options
            )

        # first without truncation, since truncating tokenizers do not tell; verbose=False: this says it better
        length = {"max_length": limit}
        with TOKENIZING:
            encoded = encode(truncation=False, verbose=False, **(length if padding == "max_length" else {}))
            num_truncated = sum(sum(mask) > limit for mask in encoded["attention_mask"])
            if num_truncated and truncation in TRUNCATIONS[:3]:
                encoded = encode(truncation=truncation, **length)
                if not self.num_truncated:
                    logger.warning(
                        f"captions longer than max_text_length={limit} tokens are truncated; "
                        "their number is kept in the processor's `num_truncated`"
                    )
                self.num_truncated += num_truncated
            if fixed and not padding:
                side = options.get("padding_side")
                encoded = self.tokenizer.pad(encoded, "max_length", self.text_length, padding_side=side, verbose=False)
        masks = encoded["attention_mask"]
        if fixed:
            masks = [[1] * len(mask) for mask in masks]
        return {"input_ids": encoded["input_ids"]} | ({"attention_mask": masks} if return_attention_mask else {})

    def _check_limit(self, max_length: int | None, add_special_tokens: bool) -> int:
        """Return after how many tokens a text is cut. Raises ValueError for a limit that cannot be."""
        limit = self.max_text_length if max_length is None else max_length
        special = self.tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
        if not isinstance(limit, (int, np.integer)) or isinstance(limit, bool) or limit <= special:
            raise ValueError(
                f"max_length={limit!r}: give a whole number above {special}, the number of special tokens"
            )
        if self.text_padding == "max_length" and limit > self.text_length:
            raise ValueError(
                f"max_length={limit}, but this model reads {self.text_length} tokens, no more: leave it out"
            )
        return int(limit)

    def _process_pictures(self, images: list, return_tensors: str | None, options: dict[str, Any]) -> dict:
        raise ValueError(
            f"{type(self).__name__} has no image processor, since its model takes pre-extracted features: "
            "pass them as visual_feats, or use a checkpoint that has a vision_config"
        )

    def _process_videos(self, videos: list[list], options: dict[str, Any]) -> dict:
        """Process frames as pictures, and put them back together, the shorter videos padded with zeros."""
        if empty := [row for row, frames in enumerate(videos) if not frames]:
            raise ValueError(f"video in row {empty[0]} has no frames: leave the row out")
        counts = [len(frames) for frames in videos]
        pictures = [picture for frames in videos for picture in frames]
        inputs = self._process_pictures(pictures, "pt", options)
        if set(inputs) != {"pixel_values"}:
            raise ValueError(
                f"{type(self.image_processor).__name__} gives {', '.join(inputs)}, and frames of several shapes make "
                "no video: use an image processor of one shape"
            )
        frames = inputs["pixel_values"].split(counts)
        return {
            "pixel_values": pad_sequence(frames, batch_first=True).numpy(force=True),
            "visual_attention_mask": frame_mask(counts),
        }

    def _process_visual_feats(self, visual_feats: list) -> dict:
        rows, dim = [], self.visual_feat_dim
        for row, feats in enumerate(visual_feats):
            try:
                feats = torch.atleast_2d(torch.as_tensor(feats, dtype=torch.float32))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"visual_feats row {row} is not an array of numbers: {error}") from error
            dim = dim or feats.shape[-1]
            if feats.ndim != 2 or not len(feats) or feats.shape[1] != dim:
                raise ValueError(f"visual_feats row {row} has shape {tuple(feats.shape)}, not (num_frames, {dim})")
            if not feats.isfinite().all():
                frame, column = (~feats.isfinite()).nonzero()[0].tolist()
                raise ValueError(
                    f"visual_feats row {row} is {feats[frame, column]} at frame {frame}, column {column}: "
                    "extract its features again, or leave the row out"
                )
            rows.append(feats)
        return {
            "visual_feats": pad_sequence(rows, batch_first=True).numpy(force=True),
            "visual_attention_mask": frame_mask([len(feats) for feats in rows]),
        }


class NrccrProcessor(NrccrTextProcessor):
    r"""
    Processor of a model with a vision tower: tokenizer and image processor.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the text encoder.
        image_processor (`BaseImageProcessor`): Of the vision tower.
        text_prefix (`str`): Put before each caption, such as "query: " for E5.
        max_text_length (`int`): Longer captions are truncated to this many tokens, and counted in `num_truncated`.
        pad_to_square (`bool`):
            Pad pictures with white to a square, so that resizing neither squashes nor crops them. False leaves the
            shape to the image processor, as a tower that was trained so (CLIP) expects.
        text_padding (`str`), lower_case (`bool`): As in [`NrccrTextProcessor`].
        visual_feat_dim (`int`, *optional*): Expected width of `visual_feats`; by default that of the first row.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        text_prefix: str = "",
        max_text_length: int = 64,
        pad_to_square: bool = True,
        text_padding: str = "longest",
        lower_case: bool = False,
        visual_feat_dim: int | None = None,
        **parts,
    ):
        super().__init__(
            tokenizer,
            text_prefix,
            max_text_length,
            text_padding,
            lower_case,
            visual_feat_dim,
            image_processor=image_processor,
            **parts,
        )
        self.pad_to_square = pad_to_square

    @classmethod
    def from_dual_encoder(cls, name: str, revision: str | None = None, **options) -> "NrccrTextProcessor":
        """Reads texts and pictures as a dual encoder of a hub id or folder was trained to (`open_clip:NAME` too); of
        one whose pictures stay with it a [`NrccrTextProcessor`].

        Args:
            options: Of loading (`token`, `cache_dir`, ...), and those of this class.
        """
        hub, settings = split_options(
            {"revision": revision} | options, signature(cls.__init__).parameters, "from_dual_encoder", HUB_OPTIONS
        )
        config = read_config(name, **hub)
        if config.model_type == "nrccr":
            return AutoProcessor.from_pretrained(name, **hub, **settings)  # of the class that was saved
        settings = text_rules(config) | settings
        tokenizer, image_processor = read_processors(name, config, **hub)
        if image_processor is None:
            return NrccrTextProcessor(tokenizer, **settings)
        return cls(tokenizer, image_processor, **({"pad_to_square": False} | settings))

    def _process_pictures(self, images: list, return_tensors: str | None, options: dict[str, Any]) -> dict:
        options = dict(options)
        channels = options.pop("input_data_format", None)
        if options.get("do_rescale") is False and (rescaled := [is_rescaled(image) for image in images]).count(True):
            if not all(rescaled):
                row = rescaled.index(False)
                raise ValueError(
                    f"do_rescale=False, but picture in row {row} is not of floats of 0 to 1 as others are"
                )
            options["do_rescale"] = True  # they are pictures of 0 to 255 by then
        prepared = [self._prepare_picture(image, row, channels) for row, image in enumerate(images)]
        return self.image_processor(prepared, return_tensors=return_tensors, **options)

    def _prepare_picture(self, image, row: int, channels: str | None = None) -> Image.Image:
        try:
            if isinstance(image, (str, Path)):
                rgb = load_image(image)
            else:
                rgb = to_rgb(image if isinstance(image, Image.Image) else picture_of(image, channels))
                rgb.thumbnail((MAX_SIDE, MAX_SIDE))  # before it is padded: a square of its longer side
        except Exception as error:  # decoders of broken files raise anything
            path = image if isinstance(image, (str, Path)) else getattr(image, "filename", None)
            raise ValueError(
                f"picture in row {row} ({path or type(image).__name__}) cannot be read: {error}; "
                "replace it, or leave the row out"
            ) from error
        return to_square(rgb) if self.pad_to_square else rgb


# Inherited by NrccrProcessor. Here, so that every process that saves a processor copies this file beside it.
NrccrTextProcessor.register_for_auto_class()

__all__ = ["NrccrProcessor", "NrccrTextProcessor"]
