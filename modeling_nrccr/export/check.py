"""Texts and pictures that an exported folder is asked, beside the model that it was made from, before it takes its
place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor, NrccrTextProcessor
from ..retrieval.encoding import encode_images, encode_texts


TOLERANCE = 1e-5  # the largest difference between two numbers of an embedding of length 1
SAME_PICTURE = 0.95  # cosine of pictures that two libraries cut to size, where the weights are the same
SUBJECTS = ("a cat", "Two red DOGS", "the old harbour", "an apple tree", "No people", "seven children in the rain")
PLACES = ("on the beach", "at night, 1998", "isn't here", "under a blue sky.", "in Oslo (Norway)", "- close-up!")
FRAMES = ("{} {}", "A photo of {} {}", "  {}\t{}  ")
LANGUAGES = (
    "un can corre pola praia",
    "Unha cidade á noite",
    "zakur beltz bat etxe aurrean",
    "el niño come una manzana",
    "dues barques al port",
    "uma menina lê um livro à sombra",
    "un garçon à vélo, l'été",
    "ein großer Hund läuft über die Straße",
    "twee fietsen naast een gracht",
    "en liten flicka på ängen",
    "tyttö ja pöytä",
    "dziewczyna idzie łąką",
    "žlutý kůň na louce",
    "két ember ül a fűben",
    "o pisică neagră pe acoperiș",
    "İstanbul'da bir köprü",
    "ένας σκύλος στην παραλία",
    "чёрная кошка на крыше",
    "червоний автобус їде містом",
    "куче тича по плажа",
    "כלב רץ על החוף",
    "كلب يجري على الشاطئ",
    "سگی در ساحل می‌دود",
    "एक कुत्ता समुद्र तट पर दौड़ता है",
    "একটি কালো বিড়াল",
    "ஒரு நாய் ஓடுகிறது",
    "หมาวิ่งบนชายหาด",
    "một con chó chạy trên bãi biển",
    "seekor anjing berlari di pantai",
    "mbwa anakimbia ufukweni",
    "一只狗在海滩上奔跑",
    "一隻貓坐在屋頂上",
    "犬が浜辺を走る",
    "개가 해변을 달린다",
    "ძაღლი სანაპიროზე",
    "շունը վազում է",
    "ውሻ በባህር ዳርቻ",
    "madra ag rith ar an trá",
    "ci yn rhedeg ar y traeth",
    "hundur hleypur á ströndinni",
)
EMOJI = ("🐶", "🐱🐟", "👩🏽‍🚀", "🇵🇹", "❤️", "👨‍👩‍👧‍👦 at home", "a 🚗 in ☔", "🙂🙃", "✈️🏝️", "☃")
NEARLY_EMPTY = (".", "a", "?", "7", " x ", "-", "…", "\u00a0é", "I", "0 0", "#", "ß", "ñ", "()", "を", "no")
SPELLED_APART = ("a\u0301rbore", "cafe\u0301 da man\u0303a", "한국어", "Tie\u0302\u0301ng Vie\u0323\u0302t")
LONG = ("word ", "unha palabra máis, ", "1 2 3 4 5 ", "犬と猫と", "🐶 ", "antidisestablishmentarianism ")
NUMBERS = tuple(f"{n} of {n * n:,} things, {n / 7:.3f} %" for n in range(1, 17))


def list_texts() -> list[str]:
    """Return 200 texts: English, forty other languages, emoji, nearly nothing, letters in two parts, too long."""
    english = [frame.format(*parts) for frame, *parts in product(FRAMES, SUBJECTS, PLACES)]
    long = [text * 120 for text in LONG]
    return [*english, *LANGUAGES, *EMOJI, *NEARLY_EMPTY, *SPELLED_APART, *long, *NUMBERS]


def list_pictures() -> list[Image.Image]:
    """Return 20 smooth pictures of all shapes, the same every time."""
    made = []
    for number in range(20):
        width, height = 24 + 37 * number % 300, 24 + 53 * number % 260
        row, column, channel = np.ogrid[:height, :width, :3]
        waves = np.sin(
            (row / height) * (1 + number % 5) + (column / width) * (channel + 1) * (1 + number % 3) + number
        )
        made.append(Image.fromarray((127 + 120 * waves).astype(np.uint8)))
    return made


@contextmanager
def uncounted(processor: NrccrTextProcessor) -> Iterator:
    """Let the processor cut texts that are nobody's captions, without counting them and without a word."""
    before, processor.num_truncated = processor.num_truncated, processor.num_truncated or 1
    try:
        yield
    finally:
        processor.num_truncated = before


@torch.no_grad()
def compare_embeddings(
    what: str,
    model: NrccrModel,
    processor: NrccrProcessor,
    embed_texts: Callable[[list[str]], torch.Tensor],
    embed_pictures: Callable[[list[Image.Image]], torch.Tensor] | None = None,
    batch_size: int = 32,
) -> dict[str, dict[str, float]]:
    """
    Compare what an artefact makes of texts and pictures with what the model in its active language makes of them.

    Args:
        what: the artefact is called, for the message.
        embed_texts, embed_pictures: by the artefact's own library, of at most `batch_size` rows, to `(rows, width)` of
            any length.

    Returns:
        `{"texts": {"count": ..., "max_difference": ..., "min_cosine": ...}, "pictures": ...}`, of embeddings of
        length 1.

    Raises:
        ValueError: where a text is further than `TOLERANCE` away, or a picture is seen as another.
    """
    texts, pictures = list_texts(), list_pictures()
    with uncounted(processor):
        sides = {"texts": (texts, encode_texts(model, texts, processor, batch_size), embed_texts)}
    if embed_pictures is not None:
        sides["pictures"] = pictures, encode_images(model, pictures, processor, batch_size), embed_pictures
    found = {}
    for side, (rows, expected, embed) in sides.items():
        parts = [embed(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        given = F.normalize(torch.cat(parts).float().cpu(), dim=-1)
        if given.shape != expected.shape:
            raise ValueError(f"{what} gives embeddings of shape {tuple(given.shape)}, not {tuple(expected.shape)}")
        differences, cosines = (given - expected).abs().amax(1), (given * expected).sum(1)
        worst = int(differences.nan_to_num(torch.inf).argmax())
        found[side] = {
            "count": len(rows),
            "max_difference": float(differences[worst]),
            "min_cosine": float(cosines.min()),
        }
        if side == "texts" and not differences[worst] <= TOLERANCE:  # also where it is no number
            raise ValueError(
                f"{what} reads {rows[worst][:40]!r} with a difference of {differences[worst]:.1e} to the model, more "
                f"than {TOLERANCE}: nothing was written"
            )
        if side == "pictures" and not cosines.min() >= SAME_PICTURE:
            raise ValueError(
                f"{what} sees a picture with a cosine of {cosines.min():.3f} to what the model sees: its image "
                "processor prepares pictures otherwise, so nothing was written"
            )
    return found


def summarize(found: dict[str, dict[str, float]]) -> str:
    """Return what `compare_embeddings` found, a line for each side."""
    lines = (
        f"{numbers['count']} {side}, read from this folder and by the model that it was made from: the largest "
        f"difference is {numbers['max_difference']:.0e}, the lowest cosine {numbers['min_cosine']:.4f}"
        for side, numbers in found.items()
    )
    return "\n".join(lines)
