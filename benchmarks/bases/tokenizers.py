"""The tokenizers of the bench of bases: each family's own kind, trained from a few English captions.

Each function takes the captions and the size of the vocabulary, and returns a tokenizer that `save_pretrained` writes
as a hub repository of that family has it.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    Siglip2Tokenizer,
    SiglipTokenizer,
    XLMRobertaTokenizer,
)


def clip_tokenizer(captions: Sequence[str], size: int, length: int = 77) -> CLIPTokenizer:
    """Makes CLIP's: byte-level BPE whose words end in </w>, lower case, padded with the token that ends a text."""
    own = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = own.normalizer, own.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    # every byte, alone and at the end of a word, so that no text has an unknown token; the end has the largest id
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, merges, model_max_length=length)


def xlm_roberta_tokenizer(captions: Sequence[str], size: int, length: int = 77) -> XLMRobertaTokenizer:
    """Makes XLM-R's and XLM-V's: unigram pieces between <s> and </s>; 1 is the padding, the last one the mask."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = XLMRobertaTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 1, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer([*pieces, ("<mask>", 0.0)], model_max_length=length)


def siglip_tokenizer(captions: Sequence[str], size: int, length: int = 64) -> SiglipTokenizer:
    """Makes SigLIP's: a sentencepiece model of unigram pieces, lower case without punctuation; </s> ends and pads."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([caption.lower() for caption in captions]),
            model_prefix=str(Path(folder, "spiece")),
            vocab_size=size,
            model_type="unigram",
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        return SiglipTokenizer(str(Path(folder, "spiece.model")), model_max_length=length)


def bpe_of_gemma(captions: Sequence[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of BPE over texts whose spaces are "▁", with a piece for each byte that no
    other reads."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size - len(of_bytes), special_tokens=special, show_progress=False)
    trained.train_from_iterator(captions, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"].keys() - special, key=model["vocab"].get)
    numbers = {piece: number for number, piece in enumerate([*special, *of_bytes, *pieces])}
    return numbers, [tuple(merge) for merge in model["merges"]]


def siglip2_tokenizer(captions: Sequence[str], size: int, length: int = 64) -> Siglip2Tokenizer:
    """Makes SigLIP 2's, which is Gemma's over lower-cased texts: <eos> ends a text, padding follows."""
    parts = bpe_of_gemma([caption.lower() for caption in captions], size)
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "model_max_length": length}
    return Siglip2Tokenizer(*parts, **settings)


def gemma_tokenizer(captions: Sequence[str], size: int, length: int = 512) -> GemmaTokenizer:
    """Makes Gemma's: <bos> and <eos> around a text, and padding to the left, which is the class's own way."""
    parts = bpe_of_gemma(captions, size)
    return GemmaTokenizer(*parts, add_bos_token=True, add_eos_token=True, model_max_length=length)


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the fields of a text configuration that a tokenizer decides."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if tokenizer.bos_token_id is not None:
        ids["bos_token_id"] = tokenizer.bos_token_id
    return {"vocab_size": len(tokenizer), **ids}
