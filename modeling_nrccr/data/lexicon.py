"""Words of a language, to train on beside captions."""

from datasets_scripts.reading.columns import clean_caption
from datasets_scripts.reading.text_files import read_text_lines
from datasets_scripts.reading.wordnet import common_words

from ..translation.cache import load_engine
from ..translation.engines import split_engines


WORD = "lexicon/"  # begins the image_id of a row that has no picture


def check_lexicon(lexicon: str, text_only: bool):
    """Raise ValueError for a lexicon where training reads pictures."""
    if lexicon != "none" and not text_only:
        raise ValueError(f"lexicon={lexicon!r} has no pictures: set text_only, or the lexicon to none")


def lexicon_rows(
    lexicon: str, source_language: str, target_language: str, translator: str, data_dir: str | None = None
) -> list[dict]:
    """
    Load words and phrases with their translations, as rows without pictures, to train on beside captions.

    Args:
        lexicon: "wordnet:5000", that many common English words; or a file, a word or phrase a line.
        translator: As of `load_translated_dataset`; each engine gives its own pairs.

    Returns:
        The pairs that can be trusted: translated (not left as they were), and translated back to themselves. That
        filter is for words, of which a translator knows one sense or none; few captions would pass it.

    Raises:
        ValueError: nothing is left, or WordNet is asked for another language than English.
    """
    if lexicon.startswith("wordnet:"):
        if source_language != "en":
            raise ValueError(f"lexicon={lexicon!r} is English, not {source_language!r}: name a file, a word a line")
        words = common_words(int(lexicon.partition(":")[2]), data_dir)
    else:
        words = list(dict.fromkeys(filter(None, (clean_caption(line) for _, line in read_text_lines(lexicon)))))
    pairs = [(source_language, target_language), (target_language, source_language)]
    found = {}
    for spec in split_engines(translator):
        engine = load_engine(spec, pairs, data_dir)
        made, again = words, []
        for pair in pairs:  # with a full stop, because a translator may have no answer at all to a word such as "will"
            made = [plain(text) for text in engine.translate([f"{text}." for text in made], *pair)]
            again.append(made)
        for word, target, back in zip(words, *again):
            if target and target != plain(word) and back == plain(word):
                found.setdefault((word, target), back)
    if not found:
        raise ValueError(f"{translator} translates no word of {lexicon} there and back: leave the lexicon out")
    return [
        {
            "image_id": f"{WORD}{word}",
            "caption_id": f"{WORD}{word}#{target}",
            "source_caption": word,
            "target_caption": target,
            "back_translation": back,
        }
        for (word, target), back in found.items()
    ]


def plain(text: str) -> str:
    return text.lower().strip(" .")
