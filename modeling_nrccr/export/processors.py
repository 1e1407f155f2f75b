"""Processors of transformers' own classes that read texts and pictures as ours do."""

from copy import deepcopy

from tokenizers import Regex, normalizers
from transformers import (
    BaseImageProcessor,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipTokenizer,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from ..open_clip import OpenClipImageProcessor
from ..processing_nrccr import NrccrProcessor, NrccrTextProcessor
from .check import list_texts, uncounted
from .siglip_tokenizer import LOWER_CASE, convert_siglip


def tokenizer_options(processor: NrccrTextProcessor) -> dict[str, bool | str | int]:
    """Return the options by which a tokenizer cuts and pads as the processor does."""
    padding = "max_length" if processor.text_padding == "max_length" else True
    return {"padding": padding, "truncation": True, "max_length": processor.max_text_length}


def plain_tokenizer(processor: NrccrTextProcessor) -> PreTrainedTokenizerBase:
    """
    Return a tokenizer that gives the ids of the processor: where that composes letters, joins blanks or lower-cases
    and the tokenizer itself does not, its normaliser does so first. Only the prefix is left to whoever calls it.

    It keeps where texts are cut and padded, so that processors of transformers do it unasked.
    """
    tokenizer, texts, options = deepcopy(processor.tokenizer), list_texts(), tokenizer_options(processor)
    with uncounted(processor):
        expected = processor(text=texts)["input_ids"]
    texts = [processor.text_prefix + text for text in texts]
    if tokenizer(texts, **options)["input_ids"] != expected:
        lower = LOWER_CASE if processor.lower_case else ()
        backend = convert_siglip(tokenizer) if isinstance(tokenizer, SiglipTokenizer) else tokenizer.backend_tokenizer
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), *lower]
        backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
        sides = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side")}
        # of no model's own class, which would build its normaliser anew when it is loaded
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map, **sides)
    tokenizer.model_max_length = processor.max_text_length
    tokenizer.init_kwargs |= options  # processors of transformers take these before their own defaults
    tokenizer.init_kwargs.pop("processor_class", None)  # ours, if it was saved beside that
    tokenizer._processor_class = None
    if processor.text_padding == "max_length":  # padding is attended to
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    else:  # where `NrccrModel` moves it to
        tokenizer.padding_side = "right"
    return tokenizer


def plain_image_processor(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """
    Return what prepares pictures so in transformers; of open_clip's its nearest, which cuts odd margins elsewhere.

    Raises:
        ValueError: where there is none.
    """
    if not isinstance(image_processor, OpenClipImageProcessor):
        return image_processor
    side, cut = image_processor.size["height"], image_processor.resize_mode == "shortest"
    if not cut and image_processor.resize_mode != "squash":
        raise ValueError(
            f"pictures are prepared by open_clip's resize_mode {image_processor.resize_mode!r}, which no class of "
            "transformers has: take --to open_clip"
        )
    return CLIPImageProcessorPil(
        size={"shortest_edge": side} if cut else {"height": side, "width": side},
        do_center_crop=cut,
        crop_size={"height": side, "width": side},
        resample=image_processor.resample,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )


def plain_processor(config: PreTrainedConfig, processor: NrccrProcessor) -> ProcessorMixin:
    """
    Return the processor of the family of `config` that reads texts and pictures as `processor` does.

    Raises:
        ValueError: for a prefix, and for what the family's class would overrule.
    """
    if processor.text_prefix:
        raise ValueError(
            f"texts are read behind {processor.text_prefix!r}, for which this format has no place: take --to "
            "sentence-transformers, which has prompts"
        )
    image_processor = plain_image_processor(processor.image_processor)
    made = PROCESSOR_MAPPING[type(config)](image_processor=image_processor, tokenizer=plain_tokenizer(processor))
    for name, value in getattr(made, "images_kwargs", {}).items():
        if (ours := getattr(image_processor, name, value)) != value:
            raise ValueError(
                f"{type(made).__name__} of transformers takes {name} = {value}, whatever its files say, and this "
                f"model has {ours}: take --to onnx"
            )
    return made
