"""From captions, pictures and pre-extracted features to the tensors that `NrccrModel` takes."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import logging

from .dual_encoders import family_of, text_rules
from .media import MAX_SIDE, load_image, to_rgb


logger = logging.get_logger(__name__)

# Of threads that prepare batches: a fast tokenizer's truncation is one for all.
TOKENIZING = Lock()


def to_square(image: Image.Image) -> Image.Image:
    """Padded with white to a square."""
    return ImageOps.pad(image, (max(image.size), max(image.size)), color="white")


def frame_mask(counts: Sequence[int]) -> np.ndarray:
    """1 for a frame, 0 for padding, of shape `(batch_size, max(counts))`."""
    return (np.arange(max(counts)) < np.array(counts)[:, None]).astype(np.int64)


class NrccrTextProcessor(ProcessorMixin):
    r"""
    Processor of a model that takes pre-extracted visual features: tokenizer only, pictures are refused.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the text encoder.
        text_prefix (`str`): Put before each caption, such as "query: " for E5.
        max_text_length (`int`): Longer captions are truncated to this many tokens, and counted in `num_truncated`.
        text_padding (`str`):
            "max_length" pads every text to `max_text_length`, whatever a call asks for, and attends to all of it: for
            text encoders that pool the last position (SigLIP). "longest" pads to the longest of the batch.
        lower_case (`bool`): Texts are lower-cased first, as the text encoder was trained (SigLIP 2).
        visual_feat_dim (`int`, *optional*): Expected width of `visual_feats`; by default that of the first row.
    """

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
        super().__init__(tokenizer, **parts)
        if text_padding not in ("longest", "max_length"):
            raise ValueError(f"text_padding={text_padding!r}: longest or max_length")
        self.text_padding, self.lower_case = text_padding, lower_case
        self.text_prefix = text_prefix
        self.max_text_length = max_text_length
        self.visual_feat_dim = visual_feat_dim
        self.num_truncated = 0

    def with_tokenizer(self, name: str, text_prefix: str = "", max_text_length: int = 64) -> "NrccrTextProcessor":
        """The same for pictures, beside the tokenizer of another text encoder (a hub id or folder)."""
        parts = {"image_processor": self.image_processor} if hasattr(self, "image_processor") else {}
        settings = {"pad_to_square": self.pad_to_square} if parts else {}
        settings |= {"text_prefix": text_prefix, "max_text_length": max_text_length}
        return type(self)(AutoTokenizer.from_pretrained(name), **parts, **settings)

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
        text: str | Sequence[str] | None = None,
        images=None,
        visual_feats: Sequence | None = None,
        padding: bool | str = "longest",
        return_tensors: str | None = None,
        videos: Sequence[Sequence] | None = None,
        text_kwargs: dict | None = None,
        common_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        audio_kwargs: dict | None = None,
        videos_kwargs: dict | None = None,
    ) -> BatchFeature:
        """
        Args:
            text (`str` or list of `str`): Captions.
            images (picture or list of pictures): `PIL.Image`, path, or `uint8` array of shape `(height, width, 3)`.
            visual_feats (list of arrays of shape `(num_frames, visual_feat_dim)`):
                Pre-extracted features of each picture or video; a vector is one frame.
            padding: As the tokenizer's.
            return_tensors (`str`, *optional*): "pt", "np" or None.
            videos (list of lists of pictures): The frames of each video, which may differ in number.
            text_kwargs, common_kwargs: As sentence-transformers gives them; `padding` and `return_tensors` are read.

        Returns:
            Of what was given: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`,
            `pixel_values` of shape `(batch_size, num_channels, height, width)`, of videos
            `(batch_size, num_frames, num_channels, height, width)`, and `visual_feats` of shape
            `(batch_size, num_frames, visual_feat_dim)`; the last two with `visual_attention_mask` of shape
            `(batch_size, num_frames)`.

        Raises:
            ValueError: An empty caption, an unreadable picture, or features that are not finite or of another width;
                the message names the row.
        """
        padding = (text_kwargs or {}).get("padding", padding)
        return_tensors = (common_kwargs or {}).get("return_tensors", return_tensors)
        text = [text] if isinstance(text, str) else text
        images = images if images is None or isinstance(images, (list, tuple)) else [images]
        given = [rows for rows in (text, images, visual_feats, videos) if rows is not None]
        if not given or not all(len(rows) for rows in given):
            raise ValueError(f"{type(self).__name__} needs text, images, videos or visual_feats, of at least one row")
        if sum(rows is not None for rows in (images, visual_feats, videos)) > 1:
            raise ValueError(f"{type(self).__name__} takes one of images, videos and visual_feats at a time")
        data = {}
        if text is not None:
            data.update(self._process_text(list(text), padding))
        if images is not None:
            data.update(self._process_pictures(list(images), return_tensors))
        if visual_feats is not None:
            data.update(self._process_visual_feats(visual_feats))
        if videos is not None:
            data.update(self._process_videos([list(frames) for frames in videos]))
        return BatchFeature(data, tensor_type=return_tensors)

    def _process_text(self, text: list[str], padding: bool | str) -> dict:
        for row, caption in enumerate(text):
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"text row {row} is {caption!r}: give every row a caption, or leave the row out")

        if self.text_padding == "max_length":
            padding = "max_length"
        if self.lower_case:
            text = [caption.lower() for caption in text]

        def encode(**options):
            text_with_prefix = [self.text_prefix + caption for caption in text]
            return self.tokenizer(
                text_with_prefix, padding=padding, return_attention_mask=True, return_token_type_ids=False, **options
            )

        # first without truncation, since truncating tokenizers do not tell; verbose=False: this says it better
        length = {"max_length": self.max_text_length}
        with TOKENIZING:
            encoded = encode(truncation=False, verbose=False, **(length if padding == "max_length" else {}))
            num_truncated = sum(sum(mask) > self.max_text_length for mask in encoded["attention_mask"])
            if num_truncated:
                encoded = encode(truncation=True, **length)
                if not self.num_truncated:
                    logger.warning(
                        f"captions longer than max_text_length={self.max_text_length} tokens are truncated; "
                        "their number is kept in the processor's `num_truncated`"
                    )
                self.num_truncated += num_truncated
        masks = encoded["attention_mask"]
        if self.text_padding == "max_length":
            masks = [[1] * len(mask) for mask in masks]
        return {"input_ids": encoded["input_ids"], "attention_mask": masks}

    def _process_pictures(self, images: list, return_tensors: str | None) -> dict:
        raise ValueError(
            f"{type(self).__name__} has no image processor, since its model takes pre-extracted features: "
            "pass them as visual_feats, or use a checkpoint that has a vision_config"
        )

    def _process_videos(self, videos: list[list]) -> dict:
        """Frames as pictures, put back together, the shorter videos padded with zeros."""
        if empty := [row for row, frames in enumerate(videos) if not frames]:
            raise ValueError(f"video in row {empty[0]} has no frames: leave the row out")
        counts = [len(frames) for frames in videos]
        pictures = [picture for frames in videos for picture in frames]
        inputs = self._process_pictures(pictures, "pt")
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

    def _process_visual_feats(self, visual_feats: Sequence) -> dict:
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
    ):
        super().__init__(
            tokenizer, text_prefix, max_text_length, text_padding, lower_case, visual_feat_dim,
            image_processor=image_processor,
        )  # fmt: skip
        self.pad_to_square = pad_to_square

    @classmethod
    def from_dual_encoder(cls, name: str, revision: str | None = None, **settings) -> "NrccrTextProcessor":
        """What reads texts and pictures as a dual encoder of a hub id or folder was trained to; of one whose pictures
        stay with it a [`NrccrTextProcessor`]. `settings` as of this class."""
        config = AutoConfig.from_pretrained(name, revision=revision)
        if config.model_type == "nrccr":
            processor = cls if config.vision_config is not None else NrccrTextProcessor
            return processor.from_pretrained(name, revision=revision, **settings)
        settings = text_rules(config) | settings
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        if family_of(config).vision_model is None:
            return NrccrTextProcessor(tokenizer, **settings)
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        return cls(tokenizer, image_processor, pad_to_square=False, **settings)

    def _process_pictures(self, images: list, return_tensors: str | None) -> dict:
        prepared = [self._prepare_picture(image, row) for row, image in enumerate(images)]
        return self.image_processor(prepared, return_tensors=return_tensors)

    def _prepare_picture(self, image, row: int) -> Image.Image:
        try:
            if isinstance(image, (str, Path)):
                rgb = load_image(image)
            else:
                rgb = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
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
