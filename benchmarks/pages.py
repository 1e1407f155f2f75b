"""The blocks of a Markdown page that a script writes, from `<!-- NAME: ... -->` to `<!-- end of NAME -->`."""

import re
from pathlib import Path

from modeling_nrccr.files import write_file


def block(name: str) -> re.Pattern:
    """Return the pattern of a marked block of a page; its groups are the two marks."""
    return re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.S)


def fill(path: Path, blocks: dict[str, str]):
    """Writes the blocks of a page. Raises ValueError where the page has not exactly one of a name."""
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        text, count = block(name).subn(lambda match, content=content: match[1] + content + match[2], text)
        if count != 1:
            raise ValueError(f"{path} has {count} blocks {name!r}, not one")
    write_file(path, text)
