"""Processors of a model whose source language is read by a text side, and so a tokenizer, of its own."""

from collections.abc import Sequence

from .configuration_nrccr import NrccrConfig
from .processing_nrccr import TEXT_OPTIONS, NrccrProcessor, NrccrTextProcessor


HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
RULES = ("text_prefix", "max_text_length", "text_padding", "lower_case")


class TwoTextSides:
    """Of a [`NrccrTextProcessor`] with a second one, `source_side`, for texts that are in no added language."""

    text_options = TEXT_OPTIONS | {"languages"}
    reads_languages = True  # a call is told which text is in which language

    @classmethod
    def from_pretrained(cls, name: str, **options):
        """Load as its class does; a text whose language no call names is in the active one of the model beside it."""
        processor = super().from_pretrained(name, **options)
        if processor.language is None:
            hub = {option: options[option] for option in HUB_OPTIONS if option in options}
            processor.language = NrccrConfig.get_config_dict(name, **hub)[0].get("language")
        return processor

    def language_side(self) -> NrccrTextProcessor:
        """Return the processor without `source_side`."""
        parts = settings_of(self)
        if hasattr(self, "image_processor"):
            return NrccrProcessor(self.tokenizer, self.image_processor, **parts)
        return NrccrTextProcessor(self.tokenizer, **parts)

    def _process_text(self, text: list[str], languages: str | Sequence[str | None] | None = None, **options) -> dict:
        """Tokenize each text by the side that reads it. `languages`: as of `NrccrModel.get_text_features`, where they
        go with the ids; by default those of `language`."""
        languages = self.language if languages is None else languages
        languages = [languages] * len(text) if languages is None or isinstance(languages, str) else list(languages)
        if len(languages) != len(text):
            raise ValueError(f"{len(languages)} languages for {len(text)} texts: give one for each, or one for all")
        ids, masks = [[]] * len(text), [[]] * len(text)
        pads = [side.tokenizer.pad_token_id or 0 for side in (self, self.source_side)]
        for process, is_own in ((super()._process_text, True), (self.source_side._process_text, False)):
            rows = [row for row, language in enumerate(languages) if (language is not None) == is_own]
            if rows:
                inputs = process([text[row] for row in rows], **options | {"return_attention_mask": True})
                for row, *parts in zip(rows, inputs["input_ids"], inputs["attention_mask"]):
                    ids[row], masks[row] = map(list, parts)
        longest = max(map(len, ids))
        for row, language in enumerate(languages):
            missing = longest - len(ids[row])
            ids[row] += [pads[language is None]] * missing
            masks[row] += [0] * missing
        self.num_truncated += self.source_side.num_truncated
        self.source_side.num_truncated = 0
        return {"input_ids": ids, "attention_mask": masks, "languages": languages}


class NrccrTwoSidedTextProcessor(TwoTextSides, NrccrTextProcessor):
    r"""
    [`NrccrTextProcessor`] with two text sides.

    Args:
        source_tokenizer (`PreTrainedTokenizerBase`): Of the text side that reads the source language.
        source_text (`dict`): Its `text_prefix`, `max_text_length`, `text_padding` and `lower_case`.
        language (`str`, *optional*): That of texts whose language a call does not name; None: the source language.
            Loaded without one, it is the active language of the model beside it.
    """

    def __init__(
        self,
        tokenizer,
        source_tokenizer,
        source_text: dict,
        language: str | None = None,
        text_prefix: str = "",
        max_text_length: int = 64,
        text_padding: str = "longest",
        lower_case: bool = False,
        visual_feat_dim: int | None = None,
    ):
        super().__init__(
            tokenizer,
            text_prefix,
            max_text_length,
            text_padding,
            lower_case,
            visual_feat_dim,
            source_tokenizer=source_tokenizer,
        )
        self.source_side, self.source_text = NrccrTextProcessor(source_tokenizer, **source_text), source_text
        self.language = language


class NrccrTwoSidedProcessor(TwoTextSides, NrccrProcessor):
    r"""
    [`NrccrProcessor`] with two text sides.

    Args:
        source_tokenizer, source_text, language: As in [`NrccrTwoSidedTextProcessor`].
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        source_tokenizer,
        source_text: dict,
        language: str | None = None,
        text_prefix: str = "",
        max_text_length: int = 64,
        pad_to_square: bool = True,
        text_padding: str = "longest",
        lower_case: bool = False,
        visual_feat_dim: int | None = None,
    ):
        super().__init__(
            tokenizer,
            image_processor,
            text_prefix,
            max_text_length,
            pad_to_square,
            text_padding,
            lower_case,
            visual_feat_dim,
            source_tokenizer=source_tokenizer,
        )
        self.source_side, self.source_text = NrccrTextProcessor(source_tokenizer, **source_text), source_text
        self.language = language


def settings_of(processor: NrccrTextProcessor) -> dict:
    """Return what builds it again, beside its parts."""
    names = (*RULES, "visual_feat_dim") + (("pad_to_square",) if hasattr(processor, "pad_to_square") else ())
    return {name: getattr(processor, name) for name in names}


def join_text_sides(processor: NrccrTextProcessor, source: NrccrTextProcessor) -> NrccrTextProcessor:
    """Return a processor that reads languages and pictures as `processor` does, and the source language as `source`,
    that of the model given to `NrccrModel.with_source_text_side`."""
    parts = settings_of(processor) | {
        "source_tokenizer": source.tokenizer,
        "source_text": {name: getattr(source, name) for name in RULES},
    }
    if hasattr(processor, "image_processor"):
        return NrccrTwoSidedProcessor(processor.tokenizer, processor.image_processor, **parts)
    return NrccrTwoSidedTextProcessor(processor.tokenizer, **parts)


NrccrTwoSidedTextProcessor.register_for_auto_class()
NrccrTwoSidedProcessor.register_for_auto_class()
