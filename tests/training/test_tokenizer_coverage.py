"""How tokenizers of each kind read languages that they were made for, and others."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_nrccr.training.tokenizer_coverage import tokenizer_coverage, why_unread


ENGLISH = ["A red dog is running.", "two cats, one house"] * 3
WORDS = "a red dog is running two cats one house".split()
GREEK, GALICIAN = "ένας σκύλος", ["Un can vermello está correndo", "dous gatos, unha casa"] * 3


def wordpiece(letters: str) -> PreTrainedTokenizerFast:
    """Words of English, and of all else single letters; without case and accents, as BERT's."""
    vocabulary = ["[UNK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(vocabulary))}
    backend = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def byte_level() -> PreTrainedTokenizerFast:
    """CLIP's kind: every byte is a piece, English words are merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers, merges = {piece: number for number, piece in enumerate(alphabet)}, []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in numbers:
                numbers[word[:end]] = len(numbers)
                merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(numbers, merges))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_language_that_it_was_made_for():
    for tokenizer in (wordpiece("abc"), byte_level()):
        found = tokenizer_coverage(tokenizer, ENGLISH)
        assert found["tokens_per_word"] == 1 and found["words"] == 27 and found["tokens_per_text"] == 4.5
        assert found["unknown"] == found["spelled_out"] == found["altered"] == found["unread"] == 0
        assert found["scripts"] == {"Latin": 1} and not found["unread_scripts"] and not why_unread(found, found)


@pytest.mark.parametrize(
    "text, script", [(GREEK, "Greek"), ("рыжая собака", "Cyrillic"), ("สุนัข สีแดง", "Thai"), ("红色的狗", "CJK")]
)
def test_letters_that_it_cannot_read(text, script):
    unknown = tokenizer_coverage(wordpiece("abc"), [text])
    assert unknown["unknown"] == unknown["unread"] == 1 and unknown["spelled_out"] == 0
    spelled = tokenizer_coverage(byte_level(), [text])
    assert spelled["spelled_out"] == spelled["unread"] == 1 and spelled["unknown"] == spelled["altered"] == 0
    for found, tokenizer in ((unknown, wordpiece("abc")), (spelled, byte_level())):
        (first, *_) = why_unread(found, tokenizer_coverage(tokenizer, ENGLISH))
        assert found["unread_scripts"] == [script] and first == f"it cannot read {script} letters"


def test_a_language_of_the_same_letters_that_it_has_not_met():
    tokenizer = wordpiece("abcdefghijklmnopqrstuvwxyz")
    found, english = (tokenizer_coverage(tokenizer, texts) for texts in (GALICIAN, ENGLISH))
    assert found["unknown"] == 0 and found["spelled_out"] > 0.7 and not english["spelled_out"]
    assert found["altered"] == pytest.approx(3 / 27)  # "está" loses its accent
    assert why_unread(found, english)
    # longer words, none of them spelled out: what tells is the tokens of a caption
    met = found | {"unread": 0.0, "unread_scripts": []}
    assert (
        "times the tokens of its source" in why_unread(met | {"tokens_per_text": 1.7}, met | {"tokens_per_text": 1})[0]
    )
    assert not why_unread(met | {"tokens_per_text": 1.5}, met | {"tokens_per_text": 1})
    with pytest.raises(ValueError, match="2 texts without a word"):
        tokenizer_coverage(tokenizer, ["1", "!"])
