"""Splits by group, never by row: whatever could give an answer away stays on one side, in every builder alike."""

import hashlib
import re
from collections.abc import Mapping, Sequence

import pyarrow.compute as pc

from .picture_files import equal_pictures


DEFAULT_FRACTIONS = {"validation": 0.10, "test": 0.25}

# Words that tell variants of one picture apart. Plain gender words all become "person", which is dropped at the start,
# so that "singer", "man singer" and "woman singer" meet; roles whose name itself is gendered are listed.
_GENDER = re.compile(r"\b(?:m[ae]n|wom[ae]n|persons?|people|boys?|girls?|child(?:ren)?)\b")
_ROLES = {
    "person with crown": "prince",  # the neutral one of prince and princess in Unicode
    "princess": "prince",
    "queen": "king",
    "merman": "merperson",
    "mermaid": "merperson",
    "mx claus": "claus",
    "mrs claus": "claus",
    "mother claus": "claus",
    "santa claus": "claus",
    "fireman": "firefighter",
    "firewoman": "firefighter",
    "policeman": "police officer",
    "policewoman": "police officer",
    "older person": "old person",
}
_ROLE = re.compile(r"\b(?:" + "|".join(map(re.escape, _ROLES)) + r")\b")


def group_key(caption: str) -> str:
    """
    Return the group that an English caption belongs to: without case, punctuation, a leading article, words of gender
    and age, and what follows a colon (`"man: red hair"`, `"family: man, woman, boy"`: variants of one emoji).
    """
    text = caption.casefold()
    text = text.split(":")[0] or text
    text = re.sub(r"['’]s\b", "", text)  # man's shoe, woman's boot
    text = " ".join(re.sub(r"[^\w\s]|_", " ", text).split())
    text = re.sub(r"^(?:an?|the) (?=.)", "", text)
    text = _GENDER.sub("person", text)
    text = text.replace("person and person", "person")  # woman and man holding hands, women holding hands
    text = _ROLE.sub(lambda match: _ROLES[match[0]], text)
    text = re.sub(r"^person (?=.)|(?<=.) facing right$", "", text)
    return text or caption.strip()


def split_of(group_key: str, seed: int = 0, fractions: Mapping[str, float] = DEFAULT_FRACTIONS) -> str:
    """
    Return the split of a group. It is a function of `(seed, group_key)` alone, by a hash that is the same in every
    process, so that builders which know nothing of each other agree. `fractions` are those of the groups; the rest is
    `"train"`.
    """
    if min(fractions.values(), default=0) < 0 or sum(fractions.values()) >= 1:
        raise ValueError(f"fractions must be at least 0 and leave something for train, got {dict(fractions)}")
    digest = hashlib.sha256(f"{seed}\n{group_key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, fraction in fractions.items():
        if position < fraction:
            return split
        position -= fraction
    return "train"


def check_ids(dataset: Mapping[str, Mapping[str, Sequence[str]]]):
    """
    Raise ValueError where a `caption_id` occurs twice in a split, or a picture is on two sides of `train`,
    `validation` and `test`: it would be tested on what it was trained on. The message names the rows. `dataset`:
    columns by split. Of pictures of several names that are equal byte for byte it is told: in a published split they
    stay.
    """
    sides, pictures = {}, {}
    for split in ("train", "validation", "test"):
        rows, captions = dataset.get(split), {}
        if rows is None:
            continue
        for row, (image_id, caption_id) in enumerate(zip(rows["image_id"][:], rows["caption_id"][:])):
            if (first := captions.setdefault(caption_id, row)) != row:
                raise ValueError(
                    f"{split}, row {row}: the caption_id {caption_id} is that of row {first} already; give each "
                    "caption its own, or name each data set once"
                )
            side, first = sides.setdefault(image_id, (split, row))
            if side != split:
                raise ValueError(
                    f"{split}, row {row}: the picture {image_id} is in row {first} of {side} too; all captions of a "
                    "picture belong on one side"
                )
        if "image" in getattr(rows, "column_names", ()):
            stored = rows.with_format("arrow")["image"]
            is_file = pc.is_null(pc.struct_field(stored, "bytes"))  # the others came in one piece from a builder
            paths = pc.if_else(is_file, pc.struct_field(stored, "path"), None).to_pylist()
            pictures |= {(split, id): path for id, path in zip(rows["image_id"][:], paths) if path is not None}
    by_content = {}
    for (split, image_id), content in equal_pictures(pictures).items():
        by_content.setdefault(content, {}).setdefault(split, image_id)
    if shared := [of_split for of_split in by_content.values() if len(of_split) > 1]:
        (one, first), (other, second), *_ = shared[0].items()
        example = f"{first} of {one} and {second} of {other}"
        print(f"{len(shared)} pictures of one split equal one of another, such as {example}", flush=True)
