"""The Space's answers as HTML; every text is escaped here, and pictures travel inside the page."""

import base64
import io
from dataclasses import dataclass
from html import escape

from PIL import Image


THUMBNAIL = 320  # pixels


@dataclass
class Card:
    """One picture of an answer. `clip`: address of what plays when it is pointed at; `unseen`: not in training."""

    picture: str
    name: str
    english: str
    score: float | None = None
    unseen: bool = False
    clip: str | None = None


def data_uri(image: Image.Image) -> str:
    """Write a thumbnail as a data URI, transparent where the picture is."""
    image = image.convert("RGBA") if image.has_transparency_data else image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(card: Card) -> str:
    # the clip is fetched only when its picture is pointed at or chosen
    play = f"<span class=play style=\"--clip:url('{escape(card.clip)}')\"></span>" if card.clip else ""
    focus, kind = " tabindex=0" if card.clip else "", " unseen" if card.unseen else ""
    alt = escape(card.name or card.english)
    return f'<div class="frame{kind}"{focus}><img src="{card.picture}" alt="{alt}">{play}</div>'


def caption(card: Card) -> str:
    name = escape(card.name or card.english)
    english = f"<p class=small>{escape(card.english)}</p>" if card.english and card.english != card.name else ""
    score = "" if card.score is None else f"<span class=score>{card.score:.2f}</span>"
    return f"<div class=caption><p class=name>{name}</p>{score}{english}</div>"


def grid(cards: list[Card], small: bool = False) -> str:
    items = "".join(f"<li>{picture(card)}{caption(card)}</li>" for card in cards)
    return f'<ol class="cards{" few" if small else ""}">{items}</ol>'


def note(text: str, kind: str = "note") -> str:
    return f"<p class={kind}>{escape(text)}</p>"


def results(cards: list[Card], text: str, asked: str | None, of: str) -> str:
    """Show the answer to a query. `asked`: the picture that was asked with, if one was; `of`: what was searched."""
    shown = f'<img src="{asked}" alt="your picture">' if asked else ""
    marked = "<span class=unseen>never seen in training</span>" if any(card.unseen for card in cards) else ""
    head = f"<h2>{escape(text) or 'Like your picture'}</h2><p class=note>{escape(of)}{marked}</p>"
    head = f"<div class=asked>{shown}{head}</div>"
    return f"<section class=results>{head}{grid(cards) if cards else note('Nothing here yet.')}</section>"


def why(weights: list[tuple[str, list[float]]], cards: list[Card]) -> str:
    """Show the query once for each card, its words shaded by weight."""
    largest = max((abs(weight) for _, of_word in weights for weight in of_word), default=0) or 1
    rows = []
    for row, card in enumerate(cards):
        words = "".join(
            f'<span class="word {"for" if of_word[row] >= 0 else "against"}" '
            f'style="--weight:{abs(of_word[row]) / largest:.2f}">{escape(word)}<b>{of_word[row]:+.2f}</b></span>'
            for word, of_word in weights
        )
        rows.append(f"<li>{picture(card)}<div><p class=words>{words}</p>{caption(card)}</div></li>")
    text = (
        "A word's weight is how much the similarity falls when the word is left out. Green words speak for the "
        "picture, red ones against it."
    )
    if len(weights) == 1:
        text = (
            "A query of one word: its weight is the whole similarity. Ask with more words to see which of them counts."
        )
    return f"<section class=why>{note(text)}<ol class=rows>{''.join(rows)}</ol></section>"


def noise(columns: list[tuple[str, str, set[str], list[Card]]]) -> str:
    """Show queries side by side, each `(heading, text, kept, cards)`; the words in `kept` are marked as not
    translated."""
    parts = []
    for heading, text, kept, cards in columns:
        words = " ".join(
            f'<u title="not translated">{escape(word)}</u>' if plain(word) in kept else escape(word)
            for word in text.split()
        )
        parts.append(
            f"<article><p class=small>{escape(heading)}</p><h3>{words}</h3>{grid(cards, small=True)}</article>"
        )
    return f"<section class=noise>{''.join(parts)}</section>"


def plain(word: str) -> str:
    """Return a word without case and punctuation at its ends."""
    return word.casefold().strip(".,;:!?¿¡«»“”\"'()")
