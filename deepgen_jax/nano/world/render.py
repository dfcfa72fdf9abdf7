"""Renders scenes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepgen_jax.nano.world.scene import SIGN_HEIGHT, Scene, Sign
from deepgen_jax.nano.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES, SIZES

#: Capitals of three DejaVu fonts; their licence is in the same folder.
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
# Drawn larger by this, then reduced, so that edges are smooth.
_OVERSAMPLING = 4
_PLATE, _INK = (250, 250, 250), (10, 10, 10)
#: Width of the widest sign, and height of letters, as shares of the side.
_SIGN_WIDTH, _LETTERS = 0.92, 0.2


def render(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of ``size`` x ``size`` pixels."""
    side = size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        outline = (SHAPES[thing.shape] * SIZES[thing.size] + np.array([thing.x, thing.y])) * side
        draw.polygon([(float(x), float(y)) for x, y in outline], COLOURS[thing.colour])
    if scene.sign is not None:
        _draw_sign(draw, scene.sign, side)
    return image.resize((size, size), Image.Resampling.BOX)


def _draw_sign(draw: ImageDraw.ImageDraw, sign: Sign, side: int) -> None:
    margin = 0.035 * side
    font = _font(sign.font, round(_LETTERS * side))
    width = font.getlength(sign.word)
    widest = _SIGN_WIDTH * side - 2 * margin
    if width > widest:
        font = _font(sign.font, int(_LETTERS * side * widest / width))
        width = font.getlength(sign.word)
    middle, y = side / 2, sign.y * side
    left, right = middle - width / 2 - margin, middle + width / 2 + margin
    height = SIGN_HEIGHT * side / 2
    draw.rectangle((left, y - height, right, y + height), _PLATE, _INK, max(1, round(0.02 * side)))
    draw.text((middle, y), sign.word, _INK, font, anchor="mm")


@functools.lru_cache(maxsize=64)
def _font(number: int, height: int) -> ImageFont.FreeTypeFont:
    # Basic layout, whatever Pillow was built with: the same picture everywhere.
    path = Path(__file__).parent / "fonts" / FONTS[number]
    return ImageFont.truetype(str(path), height, layout_engine=ImageFont.Layout.BASIC)
