"""SigLIP's tokenizer, which transformers keeps in Python, as a `tokenizer.json`."""

import string

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import SiglipTokenizer


# Python lower-cases a Greek sigma that ends a word to another letter than one inside it; tokenizers do not
FINAL_SIGMA = Regex(r"(?<=\p{L})Σ(?!\p{L})")
LOWER_CASE = (normalizers.Replace(FINAL_SIGMA, "ς"), normalizers.Lowercase())


def convert_siglip(tokenizer: SiglipTokenizer) -> Tokenizer:
    """Return what reads a text as `tokenizer` does: small letters, no ASCII punctuation, then SentencePiece. Raises
    ValueError for a SentencePiece model of another kind than SigLIP's."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    if trained.model_type != trained.UNIGRAM or not rules.remove_extra_whitespaces:
        raise ValueError(f"{tokenizer.vocab_file} is not of SigLIP's kind (unigram, extra blanks removed)")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    made = Tokenizer(models.Unigram(pieces, trained.unk_id, trained.byte_fallback))
    blanks = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    made.normalizer = normalizers.Sequence(
        [
            *(LOWER_CASE if tokenizer.do_lower_case else ()),
            normalizers.Replace(Regex("[" + "".join(f"\\{sign}" for sign in string.punctuation) + "]"), ""),
            *blanks,
            *([normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []),
            *blanks,  # that the rules before made
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    end = tokenizer.eos_token
    made.add_special_tokens([end, tokenizer.unk_token])
    made.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return made
