"""Draws the pictures of the synthetic scenes with Pillow: flat outlined shapes on a pale ground. See [`Scenes`]."""

import math
import random
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter


PICTURE_SIZE = 128
_MASK_SIZE = 208
_MARGIN = 20  # room for the outline, and for corners when it is turned
_OUTLINE = (45, 40, 40)

COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 210),
    "green": (40, 150, 60),
    "yellow": (245, 212, 40),
    "orange": (243, 130, 25),
    "purple": (130, 50, 165),
    "pink": (245, 145, 195),
    "brown": (120, 75, 40),
    "black": (25, 25, 28),
    "white": (252, 252, 252),
    "grey": (140, 140, 140),
    "turquoise": (50, 200, 205),
}

# Each shape in a box of 100 x 100, as steps: "+" draws, "-" cuts out.
_SHAPES = {
    "circle": [("+", "ellipse", 0, 0, 100, 100)],
    "square": [("+", "rectangle", 5, 5, 95, 95)],
    "triangle": [("+", "polygon", 50, 5, 98, 92, 2, 92)],
    "cross": [("+", "rectangle", 34, 0, 66, 100), ("+", "rectangle", 0, 34, 100, 66)],
    "arrow": [("+", "polygon", 0, 36, 52, 36, 52, 10, 100, 50, 52, 90, 52, 64, 0, 64)],
    "ring": [("+", "ellipse", 0, 0, 100, 100), ("-", "ellipse", 26, 26, 74, 74)],
    "moon": [("+", "ellipse", 0, 0, 100, 100), ("-", "ellipse", 34, -12, 118, 88)],
    "house": [
        ("+", "polygon", 50, 0, 100, 46, 0, 46),
        ("+", "rectangle", 12, 42, 88, 100),
        ("-", "rectangle", 24, 62, 44, 100),
        ("-", "rectangle", 58, 58, 76, 76),
    ],
    "tree": [
        ("+", "polygon", 50, 0, 82, 40, 18, 40),
        ("+", "polygon", 50, 22, 94, 78, 6, 78),
        ("+", "rectangle", 41, 76, 59, 100),
    ],
    "fish": [
        ("+", "ellipse", 0, 22, 74, 78),
        ("+", "polygon", 62, 50, 100, 20, 100, 80),
        ("-", "ellipse", 14, 38, 24, 48),
    ],
    "flower": [
        *(
            ("+", "ellipse", *(50 + 31 * f(math.tau * k / 6) + r for r in (-20, 20) for f in (math.sin, math.cos)))
            for k in range(6)
        ),
        ("+", "ellipse", 30, 30, 70, 70),
        ("-", "ellipse", 38, 38, 62, 62),
    ],
    "butterfly": [
        ("+", "polygon", 46, 50, 30, 14, 2, 6, 4, 44, 20, 56),
        ("+", "polygon", 54, 50, 70, 14, 98, 6, 96, 44, 80, 56),
        ("+", "polygon", 46, 52, 18, 62, 14, 90, 34, 96),
        ("+", "polygon", 54, 52, 82, 62, 86, 90, 66, 96),
        ("+", "ellipse", 44, 22, 56, 92),
        ("+", "line", 49, 26, 38, 4),
        ("+", "line", 51, 26, 62, 4),
    ],
    "bird": [
        ("+", "ellipse", 14, 36, 74, 84),
        ("+", "ellipse", 52, 14, 88, 50),
        ("+", "polygon", 84, 26, 100, 34, 84, 42),
        ("+", "polygon", 24, 50, 0, 34, 4, 66),
        ("+", "line", 40, 80, 36, 100),
        ("+", "line", 52, 80, 56, 100),
        ("-", "ellipse", 70, 24, 78, 32),
    ],
    "leaf": [("+", "leaf"), ("+", "line", 50, 66, 50, 100), ("-", "line", 50, 20, 50, 66)],
    "mushroom": [("+", "pieslice", 0, 4, 100, 104, 180, 360), ("+", "rectangle", 36, 52, 64, 98)],
    "umbrella": [
        ("+", "pieslice", 0, 4, 100, 96, 180, 360),
        ("+", "line", 50, 0, 50, 88),
        ("+", "arc", 50, 76, 74, 100, 0, 180),
    ],
    "cup": [
        ("+", "ellipse", 58, 26, 100, 74),
        ("-", "ellipse", 69, 38, 89, 62),
        ("+", "polygon", 4, 12, 76, 12, 68, 92, 12, 92),
    ],
    "boat": [
        ("+", "polygon", 0, 66, 100, 66, 80, 96, 20, 96),
        ("+", "rectangle", 46, 2, 53, 68),
        ("+", "polygon", 57, 6, 92, 56, 57, 56),
    ],
    "flag": [("+", "rectangle", 8, 0, 17, 100), ("+", "polygon", 17, 4, 96, 12, 84, 32, 96, 54, 17, 60)],
    "key": [
        ("+", "ellipse", 0, 28, 44, 72),
        ("-", "ellipse", 13, 41, 31, 59),
        ("+", "rectangle", 42, 44, 100, 56),
        ("+", "rectangle", 72, 54, 80, 74),
        ("+", "rectangle", 88, 54, 97, 78),
    ],
    "apple": [
        ("+", "ellipse", 2, 24, 62, 98),
        ("+", "ellipse", 38, 24, 98, 98),
        ("+", "line", 50, 34, 55, 4),
        ("+", "ellipse", 56, 4, 86, 20),
    ],
    "cloud": [
        ("+", "ellipse", 0, 40, 46, 84),
        ("+", "ellipse", 20, 14, 68, 66),
        ("+", "ellipse", 50, 26, 98, 82),
        ("+", "rectangle", 22, 58, 76, 84),
    ],
    "drop": [("+", "ellipse", 18, 36, 82, 100), ("+", "polygon", 50, 0, 79, 56, 21, 56)],
    "envelope": [
        ("+", "rectangle", 0, 16, 100, 84),
        ("-", "line", 0, 16, 50, 56),
        ("-", "line", 100, 16, 50, 56),
    ],
    "hat": [
        ("+", "ellipse", 0, 66, 100, 92),
        ("+", "polygon", 24, 14, 76, 14, 82, 78, 18, 78),
        ("-", "rectangle", 22, 54, 79, 62),
    ],
    "window": [
        ("+", "rectangle", 8, 0, 92, 100),
        *(("-", "rectangle", x, y, x + 28, y + 34) for x in (18, 54) for y in (11, 55)),
    ],
    "wheel": [
        ("+", "ellipse", 0, 0, 100, 100),
        ("-", "ellipse", 13, 13, 87, 87),
        *(
            ("+", "line", *(50 + s * 45 * f(math.pi * k / 4) for s in (-1, 1) for f in (math.cos, math.sin)))
            for k in range(4)
        ),
        ("+", "ellipse", 36, 36, 64, 64),
    ],
    "star": [
        (
            "+",
            "polygon",
            *(
                50 + (52, 21)[k % 2] * f(math.tau * k / 10) + shift
                for k in range(10)
                for f, shift in ((math.sin, 0), (lambda angle: -math.cos(angle), 4))
            ),
        )
    ],
    "heart": [
        (
            "+",
            "polygon",
            *(
                value
                for k in range(60)
                for t in [math.tau * k / 60]
                for value in (
                    50 + 3.1 * 16 * math.sin(t) ** 3,
                    45 - 3.1 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
                )
            ),
        )
    ],
}


@cache
def shape_masks(shape: str) -> tuple[Image.Image, Image.Image]:
    """Draw the area of a shape and that with its outline, 8-bit."""
    mask = Image.new("L", (_MASK_SIZE, _MASK_SIZE))
    draw = ImageDraw.Draw(mask)
    scale = (_MASK_SIZE - 2 * _MARGIN) / 100
    for sign, kind, *numbers in _SHAPES[shape]:
        fill = 255 if sign == "+" else 0
        angles = numbers[4:] if kind in ("arc", "pieslice") else []
        points = [_MARGIN + scale * number for number in (numbers[:4] if angles else numbers)]
        if kind == "leaf":  # what two circles share
            lens = [Image.new("L", mask.size) for _ in range(2)]
            for circle, left in zip(lens, (-14, 22)):
                box = [_MARGIN + scale * value for value in (left, -6, left + 92, 86)]
                ImageDraw.Draw(circle).ellipse(box, fill=fill)
            mask.paste(ImageChops.darker(*lens))
        elif kind == "line":
            draw.line(points, fill=fill, width=round(9 * scale))
        elif kind == "arc":
            draw.arc(points, *angles, fill=fill, width=round(8 * scale))
        elif kind == "pieslice":
            draw.pieslice(points, *angles, fill=fill)
        else:
            getattr(draw, kind)(points, fill=fill)
    return mask, mask.filter(ImageFilter.MaxFilter(9))


@cache
def pattern_mask(pattern: str) -> Image.Image:
    """Draw where the second tone of a pattern lies, 8-bit."""
    mask = Image.new("L", (_MASK_SIZE, _MASK_SIZE))
    draw = ImageDraw.Draw(mask)
    if pattern == "striped":
        for start in range(-_MASK_SIZE, _MASK_SIZE, 36):
            draw.line((start, 0, start + _MASK_SIZE, _MASK_SIZE), fill=255, width=11)
    step = 32
    for row, y in enumerate(range(0, _MASK_SIZE, step)):
        for x in range(0, _MASK_SIZE, step):
            if pattern == "dotted":
                x += step // 2 * (row % 2)
                draw.ellipse((x + 7, y + 7, x + 25, y + 25), fill=255)
            elif pattern == "checked" and (x // step + row) % 2:
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
    return mask


def draw_shape(
    image: Image.Image,
    shape: str,
    colour: str,
    pattern: str | None,
    centre: tuple[float, float],
    size: float,
    draw: random.Random,
):
    """Draw one shape into `image`; `size` in pixels; `draw` turns it, and varies its colour."""
    light = draw.randint(-18, 18)
    fill = tuple(max(0, min(255, value + light + draw.randint(-8, 8))) for value in COLOURS[colour])
    angle = draw.uniform(-25, 25)
    masks = [mask.rotate(angle, Image.Resampling.BILINEAR) for mask in shape_masks(shape)]
    paint = Image.new("RGB", masks[0].size, fill)
    if pattern is not None:
        is_dark = sum(fill) < 3 * 150
        paint.paste((250, 250, 250) if is_dark else (60, 55, 55), mask=pattern_mask(pattern))
    pixels = round(size * _MASK_SIZE / (_MASK_SIZE - 2 * _MARGIN))
    corner = tuple(round(middle - pixels / 2) for middle in centre)
    area, outlined, paint = (part.resize((pixels, pixels), Image.Resampling.BOX) for part in (*masks, paint))
    image.paste(_OUTLINE, corner, outlined)
    image.paste(paint, corner, area)


# Centres of the things, and how many pixels large, middling and small ones take.
_SPOTS = {
    "top left": (38, 38),
    "top right": (90, 38),
    "middle": (64, 64),
    "bottom left": (38, 90),
    "bottom right": (90, 90),
}
_SIZES = {
    1: {"large": 60, None: 42, "small": 26},
    2: {"large": 54, None: 38, "small": 24},
    3: {"large": 37, None: 28, "small": 19},
}
_GROUPS = {1: [(0, 0)], 2: [(-0.3, 0), (0.3, 0)], 3: [(-0.29, 0.27), (0.29, 0.27), (0, -0.27)]}
_SHARES = {1: 1.0, 2: 0.58, 3: 0.5}  # of the size, that one of so many alike has


def _centres(count: int, place: str, draw: random.Random) -> list[tuple[float, float]]:
    if count == 1:
        return [_SPOTS[place]]
    along = [36, 92] if count == 2 else [23, 64, 105]
    if place in ("right", "below"):
        along.reverse()
    spread = 12 if count == 2 else 18
    across = [64 + draw.uniform(-spread, spread) for _ in along]
    return [(a, b) if place in ("left", "right", "row") else (b, a) for a, b in zip(along, across)]


def _draw_ground(draw: random.Random) -> Image.Image:
    """Draw what no caption speaks of: a shaded ground with bits of ribbon on it."""
    size = (PICTURE_SIZE, PICTURE_SIZE)
    tones = [tuple(draw.randint(165, 245) for _ in range(3)) for _ in range(2)]
    shade = Image.linear_gradient("L").rotate(draw.choice((0, 90, 180, 270))).resize(size)
    image = Image.composite(*(Image.new("RGB", size, tone) for tone in tones), shade)
    pen = ImageDraw.Draw(image)
    for _ in range(draw.randint(3, 6)):
        colour, x, y = draw.choice(list(COLOURS.values())), draw.uniform(0, size[0]), draw.uniform(0, size[1])
        points = [(x, y)]
        for _ in range(3):
            x, y = x + draw.uniform(-16, 16), y + draw.uniform(-16, 16)
            points.append((x, y))
        pen.line(points, fill=colour, width=draw.randint(2, 4), joint="curve")
    return image


def draw_scene(things: Sequence, place: str, draw: random.Random) -> Image.Image:
    """
    Draw the picture of one to three things (each with `number`, `shape`, `colour`, `size`, `pattern`), RGB,
    `PICTURE_SIZE` pixels wide and high. `place`: a spot for one; for two `left`, `right`, `above` or `below`, as the
    first is to the second; for three `row` or `column`. `draw` decides the ground, and shifts, turns and tints things.
    """
    image = _draw_ground(draw)
    for thing, (x, y) in zip(things, _centres(len(things), place, draw)):
        size = _SIZES[len(things)][thing.size] * draw.uniform(0.93, 1.07)
        x, y = x + draw.uniform(-3, 3), y + draw.uniform(-3, 3)
        full = size * (1.25 if thing.number > 1 else 1)
        for dx, dy in _GROUPS[thing.number]:
            at = (x + full * dx, y + full * dy)
            draw_shape(image, thing.shape, thing.colour, thing.pattern, at, full * _SHARES[thing.number], draw)
    return image
