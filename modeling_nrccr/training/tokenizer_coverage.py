"""How a tokenizer reads a language, measured on captions before anything is trained."""

import unicodedata
from collections import Counter
from collections.abc import Sequence


SPACES = {"▁", "Ġ", "</w>"}  # pieces of nothing but a word's beginning or end
RARE = 0.01  # share of letters below which a script is a stray sign
# Measured on captions of tuxpaint+cldr_emoji in 82 languages (docs/languages.md). Unread words: of scripts that an
# English tokenizer (MiniLM's WordPiece, CLIP's bytes) does not know 41 % or more; by that of multilingual-e5-small at
# most 19 %.
UNREAD = 0.25
# Tokens of a caption, to those of its English: 1.18 to 1.35 where LoRA in the base is known to be good (e5: Galician,
# Catalan, Spanish, Czech), 1.87 to 2.17 for the same four by MiniLM, where it is known to be bad. Between them.
LONGER = 1.6


def words_of(text: str) -> list[str]:
    """Return the runs of letters and their marks, composed: digits, signs and apostrophes part them."""
    text = unicodedata.normalize("NFC", text)
    return "".join(sign if unicodedata.category(sign)[0] in "LM" else " " for sign in text).split()


def script_of(word: str) -> str:
    """Return the script of most of a word's letters, by the first word of their Unicode names: "Greek", "Cyrillic",
    "Thai"."""
    names = Counter(unicodedata.name(sign, "UNKNOWN").split()[0].split("-")[0] for sign in word)
    name = names.most_common(1)[0][0]
    return name if name == "CJK" else name.capitalize()


def signs_of(word: str) -> int:
    """Return a word's length in signs; a wide one (Chinese, Japanese, Korean) is a syllable or a word, and counts
    two."""
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in word)


def tokenizer_coverage(tokenizer, texts: Sequence[str]) -> dict:
    """
    Counts what a tokenizer makes of the words of `texts`.

    Args:
        tokenizer: of transformers.
        texts: captions of one language.

    Returns:
        Shares are from 0 to 1, of words as often as they occur:
        `texts`, `words`; `tokens_per_word`, `tokens_per_text`;
        `unknown`, of tokens: the tokenizer's unknown token;
        `spelled_out`, of words of several signs: those that come out in as many pieces as they have signs, or more
        (single letters, or bytes);
        `unread`, of words: unknown in part, or spelled out;
        `altered`, of words: those that do not come back, whatever their case (accents that are stripped, signs that
        are dropped);
        `scripts`, by script the share of its words; `unread_scripts`: those of which most words are unread.

    Raises:
        ValueError: there is no word.
    """
    counts = Counter(word for text in texts for word in words_of(text))
    if not counts:
        raise ValueError(f"{len(texts)} texts without a word: nothing can be said of how they are read")
    words = list(counts)
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"]
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    total, signs = Counter(), Counter()  # of words, and of signs by script
    of_script, unread_of_script = Counter(), Counter()
    for word, ids in zip(words, encoded):
        count = counts[word]
        pieces = [piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece not in SPACES]
        length = signs_of(word)
        unknown = sum(number == unknown_id for number in ids)
        spelled_out = not unknown and length > 1 and len(pieces) >= length
        back = "".join(tokenizer.decode(ids).split())
        unread = not ids or unknown > 0 or spelled_out
        total.update(
            {
                "words": count,
                "tokens": count * len(ids),
                "unknown": count * unknown,
                "spelled_out": count * spelled_out,
                "longer": count * (length > 1),
                "unread": count * unread,
                "altered": count * (unicodedata.normalize("NFC", back).casefold() != word.casefold()),
            }
        )
        script = script_of(word)
        signs[script] += count * len(word)
        of_script[script] += count
        unread_of_script[script] += count * unread
    written = {
        script: of_script[script] / total["words"]
        for script, number in signs.most_common()
        if number > RARE * signs.total()
    }
    shares = {
        "texts": len(texts),
        "words": total["words"],
        "tokens_per_word": total["tokens"] / total["words"],
        "tokens_per_text": total["tokens"] / len(texts),
        "unknown": total["unknown"] / max(1, total["tokens"]),
        "spelled_out": total["spelled_out"] / max(1, total["longer"]),
        "unread": total["unread"] / total["words"],
        "altered": total["altered"] / total["words"],
        "scripts": written,
    }
    unread = [script for script in written if unread_of_script[script] > of_script[script] / 2]
    return shares | {"unread_scripts": unread}


def why_unread(coverage: dict, source: dict) -> list[str]:
    """
    Says why a text encoder with this tokenizer should not be taught a language; nothing where it may.

    Args:
        coverage: [`tokenizer_coverage`] of captions in the language.
        source: the same of the captions that they translate. Where both are written in one script, the tokens that a
            caption takes tell whether the encoder has met the language: there every letter is known.
    """
    reasons = []
    if coverage["unread_scripts"]:
        reasons.append(f"it cannot read {' and '.join(coverage['unread_scripts'])} letters")
    if coverage["unread"] > UNREAD:
        reasons.append(
            f"{coverage['unread']:.0%} of the words are unknown to it, or come out as single letters or bytes "
            f"({source['unread']:.0%} of the source captions')"
        )
    longer = coverage["tokens_per_text"] / source["tokens_per_text"]
    if not reasons and next(iter(coverage["scripts"])) == next(iter(source["scripts"])) and longer > LONGER:
        reasons.append(
            f"a caption takes {longer:.1f} times the tokens of its source ({coverage['tokens_per_word']:.1f} a word, "
            f"not {source['tokens_per_word']:.1f}): it cuts the words of a language that it was not made for"
        )
    return reasons
