"""Neural engines for translation by CTranslate2: the same models, several times faster on a CPU."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from ..files import replacing_folder
from .base import TranslationError
from .seq2seq import Seq2SeqTranslator


def _ctranslate2():
    try:
        import ctranslate2
    except ImportError as error:
        raise ImportError('this engine needs CTranslate2: pip install "modeling_nrccr[ctranslate2]"') from error
    return ctranslate2


def _converter(model: str):
    class Converter(_ctranslate2().converters.TransformersConverter):
        def load_tokenizer(self, *args, **kwargs):
            # CTranslate2 4.8 looks for M2M100's language tokens where Transformers 5 no longer keeps them.
            tokenizer = super().load_tokenizer(*args, **kwargs)
            if hasattr(tokenizer, "lang_token_to_id"):
                vocabulary = tokenizer.get_vocab() | tokenizer.lang_token_to_id
                tokenizer.get_vocab = lambda: vocabulary
            return tokenizer

    return Converter(model)


def convert_to_ctranslate2(model: str | Path, folder: str | Path, quantization: str | None = "int8") -> Path:
    """
    Convert a Transformers encoder-decoder for [`CTranslate2Translator`], tokenizer included.

    Args:
        model (`str` or `Path`): hub id or folder.
        folder (`str` or `Path`): to write; it appears when all is done.
        quantization (`str`, *optional*): as in CTranslate2: `int8`, `int8_float32`, `float16`, ...; None keeps the
            model's own type.

    Raises:
        ValueError: the folder is there already.
        TranslationError: CTranslate2 does not know the architecture, or there is no such model.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already: remove it or name another")
    converter = _converter(str(model))
    try:
        with replacing_folder(folder, lambda path: False, "a converted model") as part:
            converter.convert(str(part), quantization=quantization, force=True)
            tokenizer = AutoTokenizer.from_pretrained(model)
            positions = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
            # the converted folder does not say how long a text may be
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
            tokenizer.save_pretrained(part)
    except (OSError, ValueError, NotImplementedError) as error:
        raise TranslationError(f"{model} cannot be converted: {error}") from error
    return folder


class CTranslate2Translator(Seq2SeqTranslator):
    """
    Translation by [CTranslate2](https://opennmt.net/CTranslate2): the models, pairs and batches of
    [`Seq2SeqTranslator`], on CPU and GPU.

    Args:
        model (`str` or `Path`): a folder that [`convert_to_ctranslate2`] wrote.
        dtype (`str`, defaults to "default"): CTranslate2's `compute_type`; "default" is that of the folder.
        kwargs: as [`Seq2SeqTranslator`]'s, without `revision`.

    Raises:
        TranslationError: the folder is no model of CTranslate2.
    """

    def __init__(self, model: str | Path, dtype: str = "default", **kwargs):
        _ctranslate2()
        if not Path(model, "model.bin").is_file():
            raise TranslationError(
                f"{model} is no folder of CTranslate2 (it has no model.bin): "
                "`modeling_nrccr.translation_ctranslate2.convert_to_ctranslate2(model, folder)` writes one"
            )
        super().__init__(model, dtype=dtype, **kwargs)

    def _load(self, model: str | Path, revision: str | None) -> None:
        self._positions = self.tokenizer.model_max_length
        threads = {} if self.device.type == "cuda" else {"intra_threads": torch.get_num_threads()}
        try:
            self.model = _ctranslate2().Translator(
                str(model),
                device=self.device.type,
                device_index=self.device.index or 0,
                compute_type=self.dtype,
                **threads,
            )
        except (RuntimeError, ValueError) as error:
            raise TranslationError(f"{model} cannot be loaded by CTranslate2: {error}") from error

    def _generate(
        self, ids: list[list[int]], forced_token: int | None, max_new_tokens: int, target: str
    ) -> list[list[int]]:
        results = self.model.translate_batch(
            [self.tokenizer.convert_ids_to_tokens(row) for row in ids],
            target_prefix=None if forced_token is None else [[self._target_token(target)]] * len(ids),
            beam_size=self.num_beams,
            max_decoding_length=max_new_tokens,
            max_input_length=0,
        )
        return [self.tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
