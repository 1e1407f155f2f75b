"""How tokenizers read the languages of tuxpaint+cldr_emoji: the table of docs/languages.md, where the limits of
`modeling_nrccr/training/tokenizer_coverage.py` come from. No picture is drawn.

    python -m benchmarks.translation.tokenizer_coverage --tokenizer all-MiniLM-L6-v2 --tokenizer multilingual-e5-small
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from datasets_scripts.cldr_emoji import CldrEmoji, find_name, read_names, reason_to_leave_out
from datasets_scripts.reading.debian import find_data
from datasets_scripts.tuxpaint import Tuxpaint, read_captions
from modeling_nrccr.loading.encoders import find_encoder
from modeling_nrccr.publishing.tables import markdown_table
from modeling_nrccr.training.tokenizer_coverage import tokenizer_coverage, why_unread


SHOWN = "gl,ca,es,cs,fr,eo,vi,zu,el,ru,ar,hi,th,ko,ja,zh"


def read_pairs(language: str) -> list[tuple[str, str]]:
    """Read English captions and those of a language, of all emoji and stamps that have both."""
    names, stamps = "unicode-cldr-core", "tuxpaint-stamps-default"
    annotations, folder = find_data({names: CldrEmoji.PACKAGES[names], stamps: Tuxpaint.PACKAGES[stamps]}, None)
    english, target = (read_names(annotations, code) for code in ("en", language))
    emoji = [sequence for sequence in sorted(english) if not reason_to_leave_out(sequence)]
    pairs = [(find_name(english, sequence), find_name(target, sequence)) for sequence in emoji]
    for file in sorted(folder.rglob("*.png")):
        if file.with_suffix(".txt").exists():
            caption, others = read_captions(file.with_suffix(".txt"))
            pairs.append((caption, others.get(language)))
    return [(source, caption) for source, caption in pairs if source and caption]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", action="append", help="folders, hub ids, or encoders that are built here")
    parser.add_argument("--languages", default=SHOWN, help="joined by commas; or all")
    args = parser.parse_args()
    names = args.tokenizer or ["all-MiniLM-L6-v2", "multilingual-e5-small"]
    tokenizers = {Path(name).name: AutoTokenizer.from_pretrained(find_encoder(name)) for name in names}
    known = sorted({config.name for builder in (CldrEmoji, Tuxpaint) for config in builder.BUILDER_CONFIGS})
    head = ["", *(f"{name}: {what}" for name in tokenizers for what in ("tokens a word", "a caption", "unread", ""))]
    lines = []
    for language in known if args.languages == "all" else args.languages.split(","):
        line, pairs = [language], read_pairs(language)
        for tokenizer in tokenizers.values():
            source, found = (tokenizer_coverage(tokenizer, side) for side in zip(*pairs))
            longer = found["tokens_per_text"] / source["tokens_per_text"]
            verdict = "no" if why_unread(found, source) else "yes"
            line += [f"{found['tokens_per_word']:.2f}", f"{longer:.2f}", f"{found['unread']:.2f}", verdict]
        lines.append(line)
    print(markdown_table(head, lines))


if __name__ == "__main__":
    main()
