"""
Translate with an engine of your own: here a glossary, word by word, both ways.

    python examples/own_engine.py words.tsv "a red boat" --source en --target gl

The first line of `words.tsv` names the languages, `en<TAB>gl`; each other line is a word and its translation.
Whatever translates takes the engine by its name, where Python finds this file:

    PYTHONPATH=examples nrccr add-language BASE --data captions.txt --translator own_engine:Glossary:words.tsv
"""

import argparse
from pathlib import Path

from modeling_nrccr import Translator, load_translator
from modeling_nrccr.translation.base import file_fingerprint


class Glossary(Translator):
    """Puts the word of a file for each word that is in it, and leaves the others."""

    name = "glossary"  # becomes the captions' target_origin

    def __init__(self, file: str):
        self.version = file_fingerprint([file])  # other words are other answers: what caches hold is asked again
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        (source, target), *words = (line.split("\t") for line in lines)
        forth = dict(words)
        self.words = {(source, target): forth, (target, source): {word: other for other, word in forth.items()}}

    def supported_pairs(self) -> list[tuple[str, str]]:
        return list(self.words)

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        """Get texts that are distinct and not blank; give one answer each, in their order."""
        words = self.words[source, target]
        return [" ".join(words.get(word, word) for word in text.split()) for text in texts]


def translate(file: str, texts: list[str], source: str, target: str) -> list[str]:
    """Return the translations of some texts, by the engine's name."""
    return load_translator(f"own_engine:Glossary:{file}").translate(texts, source, target)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file", help="of words")
    options.add_argument("texts", nargs="+")
    options.add_argument("--source", default="en", help="language of the texts")
    options.add_argument("--target", default="gl", help="language of the answers")
    print(*translate(**vars(options.parse_args())), sep="\n")


if __name__ == "__main__":
    main()
