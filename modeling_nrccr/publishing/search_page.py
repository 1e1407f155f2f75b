"""Search results as a page that needs nothing else (`search.html`) and as one picture (`search.png`)."""

import base64
import io
import unicodedata
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import write_file
from ..media import to_rgb


@dataclass
class Result:
    """One picture of an answer; `correct` marks the one that was asked for."""

    image: Image.Image
    caption: str
    score: float
    correct: bool = False


@dataclass
class QueryRow:
    """
    One query and its answer, best picture first.

    `gloss` is the query's human translation into English and `machine_translation` that of an engine, for readers who
    do not know the language; `rank_of_correct` counts from 1 over the whole gallery. All three may be None.
    """

    query: str
    gloss: str | None
    results: list[Result]
    rank_of_correct: int | float | None = None
    machine_translation: str | None = None


def write_search_page(
    output_dir: str | Path, title: str, rows: list[QueryRow], font: str | Path | None = None
) -> tuple[Path, Path]:
    """
    Writes `search.html` and `search.png` with the same content.

    Args:
        output_dir: folder to write to; made if it is not there.
        title: heading of both.
        rows: the queries with their pictures.
        font: a TrueType file for the PNG (NAME-Bold beside it is used for headings). Default: the first system font
            that can write the text; a bare machine has none, and accents are then left out of the PNG.

    Returns:
        The paths of the page and of the picture.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    page, picture = output_dir / "search.html", output_dir / "search.png"
    write_file(page, render_html(title, rows))
    save_png(draw_sheet(title, rows, font), picture)
    return page, picture


def save_png(image: Image.Image, path: str | Path):
    """Writes a PNG file at once or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_file(path, buffer.getvalue())


def summary(rows: list[QueryRow]) -> str:
    """Say what the numbers are, and how often the right picture came first, and among those shown, where it is
    known."""
    known = [row for row in rows if row.rank_of_correct is not None or any(result.correct for result in row.results)]
    numbers = "Numbers are cosine similarities."
    if not known:
        return numbers
    first = sum(bool(row.results) and row.results[0].correct for row in known)
    shown = sum(any(result.correct for result in row.results) for row in known)
    depth = max(len(row.results) for row in known)
    return (
        f"The right picture (ticked) comes first for {first} of {len(known)} queries and is among the best {depth} "
        f"for {shown}. {numbers}"
    )


def notes(row: QueryRow) -> list[tuple[str, str]]:
    """Return the small print under a query: names and texts."""
    named = [("English", row.gloss), ("English by machine", row.machine_translation)]
    return [(name, text) for name, text in named if text]


def miss(row: QueryRow) -> str:
    """Return the line for a right picture that is not among those shown; empty if it is, or if none is known."""
    if row.rank_of_correct is None or any(result.correct for result in row.results):
        return ""
    return f"The right picture is not here: it is at rank {row.rank_of_correct:g}."


# ----------------------------------------------------------------------------------------------------------- HTML

STYLE = """
:root { color-scheme: light dark; --page: #f5f4f0; --card: #fff; --ink: #1d1c1a; --soft: #615d55; --line: #e3e0d8;
  --good: #13753a; --miss: #92400e; --miss-page: #fdf1e3; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1d1f22; --ink: #ecebe8; --soft: #aaa69d;
  --line: #34373c; --good: #52c878; --miss: #f3b27a; --miss-page: #33261a; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; padding: 2.5rem 1.25rem; }
main { max-width: 68rem; margin: 0 auto; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em; text-wrap: balance; }
header p { color: var(--soft); margin-top: .5rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 16px; padding: 1.25rem;
  margin-top: 1.25rem; }
h2 { font-size: 1.2rem; line-height: 1.3; overflow-wrap: anywhere; }
.gloss { color: var(--soft); font-size: .85rem; margin-top: .25rem; overflow-wrap: anywhere; }
.gloss span + span::before { content: "\\b7"; margin: 0 .5em; }
ol { list-style: none; padding: 0; margin-top: 1rem; display: grid; gap: 1rem;
  grid-template-columns: repeat(5, minmax(0, 1fr)); }
figure { display: flex; flex-direction: column; height: 100%; }
.frame { position: relative; background: #fff; border: 1px solid var(--line); border-radius: 12px; aspect-ratio: 1;
  padding: 9%; }
.frame img { width: 100%; height: 100%; object-fit: contain; display: block; }
.right .frame { border-color: var(--good); box-shadow: 0 0 0 3px var(--good); }
.mark { position: absolute; top: -9px; right: -9px; width: 30px; height: 30px; }
.mark circle { fill: var(--good); stroke: var(--card); stroke-width: 3; }
.mark path { fill: none; stroke: var(--card); stroke-width: 3; stroke-linecap: round; stroke-linejoin: round; }
figcaption { font-size: .8rem; line-height: 1.35; color: var(--soft); margin-top: .5rem; overflow-wrap: anywhere; }
figcaption b { display: block; color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.right b { color: var(--good); }
.miss { color: var(--miss); background: var(--miss-page); border-radius: 8px; padding: .4rem .75rem; margin-top: 1rem;
  font-size: .85rem; }
@media (max-width: 40rem) { body { padding: 1.25rem .75rem; } h1 { font-size: 1.4rem; } section { padding: 1rem; }
  .gloss span { display: block; } .gloss span + span::before { content: none; }
  ol { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .85rem; } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
MARK = (
    '<svg class="mark" viewBox="0 0 30 30" role="img" aria-label="the right picture"><circle cx="15" cy="15" r="13"/>'
    '<path d="M9 15.5l4 4 8-8.5"/></svg>'
)


def render_html(title: str, rows: list[QueryRow]) -> str:
    """Return the page as text: no script, no file and no address beside it."""
    body = "".join(_section(row) for row in rows)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<header><h1>{escape(title)}</h1>"
        f"<p>{escape(summary(rows))}</p></header>\n{body}</main>\n</body>\n</html>\n"
    )


def _section(row: QueryRow) -> str:
    gloss = "".join(f"<span>{name}: {escape(text)}</span>" for name, text in notes(row))
    items = "".join(
        f'<li{" class=right" if result.correct else ""}><figure><div class="frame">'
        f'<img src="{_data_uri(result.image)}" alt="{escape(result.caption)}">{MARK if result.correct else ""}</div>'
        f"<figcaption><b>{result.score:.3f}</b>{escape(result.caption)}</figcaption></figure></li>\n"
        for result in row.results
    )
    line = miss(row)
    return (
        f"<section><h2>{escape(row.query)}</h2>{f'<p class=gloss>{gloss}</p>' if gloss else ''}\n<ol>\n{items}</ol>"
        f"{f'<p class=miss>{escape(line)}</p>' if line else ''}</section>\n"
    )


def _data_uri(image: Image.Image) -> str:
    image = to_rgb(image)
    image.thumbnail((320, 320))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------------ PNG

PAGE, CARD, INK, SOFT, LINE = "#f5f4f0", "#ffffff", "#1d1c1a", "#615d55", "#e3e0d8"
GOOD, MISS = "#13753a", "#92400e"
WIDTH, MARGIN, SPACE, PADDING, TILE, GAP, PER_LINE = 1600, 48, 20, 32, 196, 26, 5
TEXT_WIDTH = WIDTH - 2 * MARGIN - 2 * PADDING - PER_LINE * (TILE + GAP)
FONTS = (
    ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    ("NotoSans-Regular.ttf", "NotoSans-Bold.ttf"),
    ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf"),
    ("Arial.ttf", "Arial Bold.ttf"),
    ("arial.ttf", "arialbd.ttf"),
    ("NotoSansCJK-Regular.ttc", "NotoSansCJK-Bold.ttc"),
    ("Arial Unicode.ttf", "Arial Unicode.ttf"),
)


@cache
def _load_font(name: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    """Load a font by file name, looked for among the system's; None is Pillow's own, which has no accented letters."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def _missing(font: ImageFont.FreeTypeFont, text: str) -> set[str]:
    """Return the characters that the font draws as the box of an unknown character."""
    box = bytes(font.getmask("\uffff"))
    return {char for char in text if not char.isspace() and bytes(font.getmask(char)) == box}


class Pen:
    """Writes text in the first font that has all its letters; where none has, without the accents."""

    def __init__(self, image: Image.Image, font: str | Path | None = None):
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.names = []
        if font:
            bold = Path(font).with_stem(Path(font).stem + "-Bold")
            self.names = [(str(font), str(bold if bold.is_file() else font))]
        if font and _load_font(str(font), 16) is None:
            raise ValueError(f"Cannot read the font {str(font)!r}: give a TrueType or OpenType file.")
        self.names += [*FONTS, (None, None)]

    def prepare(self, text: str, size: int, bold: bool) -> tuple[str, ImageFont.FreeTypeFont]:
        best = None
        for names in self.names:
            font = _load_font(names[bold], size) or _load_font(names[0], size)
            if font is None:
                continue
            missing = _missing(font, text)
            if best is None or len(missing) < len(best[0]):
                best = missing, font
            if not missing:
                break
        missing, font = best
        plain = {char: unicodedata.normalize("NFD", char)[0] for char in missing}
        still = _missing(font, "".join(plain.values()))
        return "".join(("?" if plain[c] in still else plain[c]) if c in missing else c for c in text), font

    def write(
        self, x: int, y: int, text: str, size: int, width: int, lines: int = 2, color: str = INK, bold: bool = False
    ) -> int:
        """Writes `text`, broken into at most `lines` lines of `width` pixels; returns where the next line starts."""
        text, font = self.prepare(text, size, bold)
        for line in _wrap(text, font, width, lines):
            self.draw.text((x, y), line, font=font, fill=color)
            y += round(size * 1.3)
        return y


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Return lines that fit into `width`; words are kept whole if they fit, and what is too much becomes an
    ellipsis."""
    result, line, rest = [], "", " ".join(text.split())
    while rest:
        word = rest.split(" ")[0]
        if font.getlength(f"{line} {word}".strip()) <= width:
            line, rest = f"{line} {word}".strip(), rest[len(word) :].lstrip()
            continue
        if not line:  # a word that is wider than a line, or a script without spaces
            line = word[:1]
            while len(line) < len(word) and font.getlength(word[: len(line) + 1]) <= width:
                line = word[: len(line) + 1]
            rest = rest[len(line) :].lstrip()
        result.append(line)
        line = ""
    result += [line] if line else []
    if len(result) > lines:
        result, last = result[:lines], result[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        result[-1] = last.rstrip() + "..."
    return result


def draw_sheet(title: str, rows: list[QueryRow], font: str | Path | None = None) -> Image.Image:
    """Draw the page as one picture: a card for each query, its text on the left and five pictures a line."""
    head = Image.new("RGB", (WIDTH - 2 * MARGIN, 220), PAGE)
    pen = Pen(head, font)
    y = pen.write(0, 0, title, 40, head.width, lines=2, bold=True)
    y = pen.write(0, y + 4, summary(rows), 23, head.width, lines=2, color=SOFT)
    parts = [head.crop((0, 0, head.width, y)), *(_draw_card(row, font) for row in rows)]
    sheet = Image.new("RGB", (WIDTH, 2 * MARGIN - SPACE + sum(part.height + SPACE for part in parts)), PAGE)
    y = MARGIN
    for part in parts:
        sheet.paste(part, (MARGIN, y))
        y += part.height + SPACE
    return sheet


def _draw_card(row: QueryRow, font: str | Path | None) -> Image.Image:
    """Draw one query and its pictures, as high as its content."""
    card = Image.new("RGB", (WIDTH - 2 * MARGIN, 400 + (len(row.results) // PER_LINE + 1) * (TILE + 120)), CARD)
    pen = Pen(card, font)
    y = pen.write(PADDING, PADDING - 4, row.query, 28, TEXT_WIDTH, lines=4, bold=True) + 10
    for name, text in notes(row):
        y = pen.write(PADDING, y, f"{name}: {text}", 20, TEXT_WIDTH, lines=3, color=SOFT) + 6
    text_end = pen.write(PADDING, y + 8, miss(row), 20, TEXT_WIDTH, lines=3, color=MISS, bold=True)
    y = PADDING
    for start in range(0, len(row.results), PER_LINE):
        x = card.width - PADDING - PER_LINE * (TILE + GAP) + GAP
        line = row.results[start : start + PER_LINE]
        y = max(_draw_result(pen, result, x + i * (TILE + GAP), y) for i, result in enumerate(line)) + 18
    card = card.crop((0, 0, card.width, max(text_end + PADDING // 2, y + 2)))

    edge = [0, 0, card.width - 1, card.height - 1]
    corners = Image.new("L", card.size)
    ImageDraw.Draw(corners).rounded_rectangle(edge, 18, fill=255)
    ImageDraw.Draw(card).rounded_rectangle(edge, 18, outline=LINE, width=2)
    return Image.composite(card, Image.new("RGB", card.size, PAGE), corners)


def _draw_result(pen: Pen, result: Result, x: int, y: int) -> int:
    """Draws one picture with its score and caption; returns where it ends."""
    color, line = (GOOD, 5) if result.correct else (LINE, 2)
    pen.draw.rounded_rectangle([x, y, x + TILE, y + TILE], 14, fill="white", outline=color, width=line)
    image = to_rgb(result.image)
    scale = (TILE - 36) / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    pen.image.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))
    if result.correct:
        _draw_mark(pen.image, x + TILE - 20, y - 18)
    ink = GOOD if result.correct else INK
    y = pen.write(x, y + TILE + 8, f"{result.score:.3f}", 19, TILE, lines=1, color=ink, bold=True)
    return pen.write(x, y, result.caption, 18, TILE, lines=2, color=SOFT)


def _draw_mark(image: Image.Image, x: int, y: int):
    """Draw a tick in a disc of 38 pixels, drawn four times as large for smooth edges."""
    disc = Image.new("RGBA", (152, 152))
    draw = ImageDraw.Draw(disc)
    draw.ellipse([0, 0, 151, 151], fill=CARD)
    draw.ellipse([10, 10, 141, 141], fill=GOOD)
    draw.line([(44, 78), (66, 100), (110, 52)], fill="white", width=17, joint="curve")
    disc = disc.resize((38, 38), Image.Resampling.LANCZOS)
    image.paste(disc, (x, y), disc)
