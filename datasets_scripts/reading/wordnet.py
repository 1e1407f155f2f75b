"""
The commonest words and set phrases of English, from WordNet (https://wordnet.princeton.edu, `wordnet-base`), by how
often they occur in the texts whose senses people have marked. Text to translate and to train on, without pictures.

    from datasets_scripts.wordnet import common_words
    words = common_words(5000)
"""

from collections import Counter
from pathlib import Path

from .debian import find_data


PACKAGE = {"wordnet-base": "usr/share/wordnet"}
PARTS = {"1": "noun", "3": "adjective", "5": "adjective satellite"}  # of a sense key; what captions are made of


def common_words(count: int, data_dir: str | Path | None = None) -> list[str]:
    """Return `count` nouns and adjectives, the commonest first. Raises as [`find_data`] does, and ValueError where
    there are not so many."""
    if data_dir is not None and not Path(data_dir, PACKAGE["wordnet-base"]).exists():
        data_dir = None  # it holds pictures alone
    path = find_data(PACKAGE, data_dir)[0] / "cntlist.rev"
    times = Counter()
    for line in path.read_text(encoding="ascii").splitlines():
        sense, _, number = line.split()  # nut%1:13:00:: 1 5
        word, _, rest = sense.partition("%")
        if rest[:1] in PARTS and word[0].isalpha():
            times[word.replace("_", " ")] += int(number)
    if count > len(times):
        raise ValueError(f"{path} has {len(times):,} nouns and adjectives, fewer than {count:,}: ask for fewer")
    return [word for word, _ in times.most_common(count)]
