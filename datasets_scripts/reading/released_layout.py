"""
The layout in which the method's data was released: caption files `<collection>{train,val,test}*.caption.txt` with
lines `<item>#<language>#<k> <caption>`. File names tell what they hold, here for Chinese:

    vatextrain.caption.txt (or _en)             English, `enc`
    vatextrain_google_enc2zh.caption.txt        its machine translation by Google
    vatextrain_google_enc2zh2enc.caption.txt    translated back
    vatexval_zh.caption.txt                     by people, `zh`
    vatexval_google_zh2enc.caption.txt          those, machine-translated into English
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .columns import clean_caption
from .text_files import read_text_lines


SPLITS = {"train": "train", "val": "validation", "test": "test"}
ENGLISH = ("enc", "en")
_NAME = re.compile(r"(?P<collection>.*?)(?P<split>train|val|test)(?P<parts>(?:_[A-Za-z0-9-]+)*)\.caption\.txt")
_IGNORED_PARTS = ("2016", "task1")  # the test set's year and task in Multi30K's names

Key = tuple[str, str]  # item, number of the caption


class Captions(dict[Key, str]):
    """
    Captions by item and number, in the order of the file at `path`. `engine`: what translated them, if a machine;
    `parts`: what they are taken from, which knows where each one is.
    """

    def __init__(
        self, path: Path, has_lines: bool = False, engine: str | None = None, parts: Sequence["Captions"] = ()
    ):
        super().__init__()
        self.path, self.has_lines, self.engine, self.parts = path, has_lines, engine, parts

    def where(self, key: Key) -> str:
        """Return the place of a caption, for messages."""
        for part in self.parts:
            if key in part:
                return part.where(key)
        return f"{self.path}, " + (
            f"line {list(self).index(key) + 1}" if self.has_lines else f"caption {'#'.join(key)}"
        )

    def add(self, key: Key, caption: str, place: str):
        if not isinstance(caption, str):
            raise ValueError(f"{place}: caption {'#'.join(key)} is {caption!r}, no text; remove it, or fill it")
        caption = clean_caption(caption)
        if not caption:
            raise ValueError(f"{place}: caption {'#'.join(key)} has no text; remove it, or fill it")
        if key in self:
            raise ValueError(f"{place}: caption {'#'.join(key)} is there already: {self.where(key)}; remove one")
        self[key] = caption

    def only(self, keep: Callable[[Key], bool]) -> "Captions":
        part = Captions(self.path, engine=self.engine, parts=[self])
        part.update((key, caption) for key, caption in self.items() if keep(key))
        return part


def merged(parts: Iterable[Captions | None]) -> Captions | None:
    """Merge the captions of several files into one; None where there are none."""
    parts = [part for part in parts if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    whole = Captions(parts[0].path, engine=parts[0].engine, parts=parts)
    for part in parts:
        if both := next(iter(part.keys() & whole.keys()), None):
            raise ValueError(f"{part.where(both)}: caption {'#'.join(both)} is there already: {whole.where(both)}")
        whole.update(part)
    return whole


@dataclass
class SplitCaptions:
    """
    What there is of one split: English `source`, `human` captions in the target language, and of machine translation
    `translated` and `back_translation` of the source, and `translated_query`, the human ones in English.
    """

    source: Captions | None = None
    human: Captions | None = None
    translated: Captions | None = None
    back_translation: Captions | None = None
    translated_query: Captions | None = None

    def only(self, keep: Callable[[Key], bool]) -> "SplitCaptions":
        return SplitCaptions(**{name: part and part.only(keep) for name, part in vars(self).items()})

    def of_items(self, items: Iterable[str]) -> "SplitCaptions":
        items = set(items)
        return self.only(lambda key: key[0] in items)


def read_caption_file(path: Path, tags: Iterable[str] = (), engine: str | None = None) -> Captions:
    """
    Read a caption file. `tags`: the languages that its lines may name (`enc2zh`, ...); `<item>#<k> <caption>` names
    none.

    Raises:
        ValueError: a line without a caption, with another tag, an id that occurs twice, or not UTF-8; names the line.
    """
    captions, tags = Captions(path, has_lines=True, engine=engine), list(tags)
    for number, line in read_text_lines(path):
        place = f"{path}, line {number}"
        identifier, caption = (*line.split(maxsplit=1), "", "")[:2]
        item, *tag, k = identifier.split("#") if "#" in identifier else (identifier, "", "", "")
        if not item or not k or len(tag) > 1:
            raise ValueError(f"{place}: {identifier!r} is no caption id such as video7#enc#0")
        if tags and tag and tag[0] not in tags:
            raise ValueError(f"{place}: {identifier} is of {tag[0]!r}, the file's name says {' or '.join(tags)}")
        captions.add((re.sub(r"\.(jpg|mp4)$", "", item), k), caption, place)
    if not captions:
        raise ValueError(f"{path} is empty")
    return captions


def find_caption_files(folder: Path, language: str) -> dict[tuple[str, str, str], dict[str, Path]]:
    """Find caption files by (collection, split, engine or ""), and by what they hold: a field of [`SplitCaptions`]."""
    fields = {
        (): "source",
        **{(name,): "source" for name in ENGLISH},
        (language,): "human",
        (f"enc2{language}",): "translated",
        (f"enc2{language}2enc",): "back_translation",
        (f"{language}2enc",): "translated_query",
    }
    files = {}
    for path in sorted(folder.glob("*.caption.txt")):
        if not (match := _NAME.fullmatch(path.name)):
            continue
        *engine, last = [part for part in match["parts"].split("_")[1:] if part not in _IGNORED_PARTS] or [""]
        field = fields.get((last,) if last else ())
        if field is None or len(engine) > 1 or bool(engine) == (field in ("source", "human")):
            continue
        key = (match["collection"], SPLITS[match["split"]], "".join(engine))
        if (other := files.setdefault(key, {}).setdefault(field, path)) != path:
            raise ValueError(f"{other} and {path.name} both hold the {field} captions of {key[1]}; remove one")
    return files


def read_released(
    folder: Path, language: str, collection: str | None = None, engine: str | None = None
) -> dict[str, SplitCaptions]:
    """
    Read the captions of a folder of caption files, by split (those that there are).

    Raises:
        ValueError: several collections or engines and none is chosen, or a broken file; names it.
    """
    files = find_caption_files(folder, language)
    for position, name, chosen in ((0, "collection", collection), (2, "engine", engine)):
        found = sorted({key[position] for key in files} - ({""} if name == "engine" else set()))
        if chosen is None and len(found) > 1:
            raise ValueError(f"{folder} holds several {name}s: {', '.join(found)}; choose one by {name}=")
        if chosen is not None and chosen not in found:
            raise ValueError(f"{folder} has no {name} {chosen!r}; it has: {', '.join(found) or 'none'}")
    tags = {
        "source": ENGLISH,
        "human": (language,),
        "translated": (f"enc2{language}",),
        "back_translation": (f"enc2{language}2enc",),
        "translated_query": (f"{language}2enc",),
    }
    splits = {}
    for (of_collection, split, of_engine), paths in files.items():
        if (collection or of_collection) != of_collection or (of_engine and (engine or of_engine) != of_engine):
            continue
        read = {field: read_caption_file(path, tags[field], of_engine or None) for field, path in paths.items()}
        splits[split] = replace(splits.get(split, SplitCaptions()), **read)
    return splits
