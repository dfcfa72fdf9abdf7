"""A PNG of batches: references and targets of a few samples of each, with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepgen_jax.data.reader import Batch
from deepgen_jax.files import replacing, write_error

_HEIGHT, _MARGIN, _FONT_SIZE, _LINES = 192, 8, 13, 4
# Faces that hold Chinese besides Latin, as the usual systems name their files.
_FACES = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf",
    "SourceHanSans-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "Arial Unicode.ttf", "msyh.ttc", "simhei.ttf",
    "DejaVuSans.ttf",
)  # fmt: skip


def write_contact_sheet(path: Path, batches: Sequence[tuple[Batch, Sequence[str]]]) -> None:
    """Writes one row a batch; as many samples of it as there are texts.

    Args:
      path: of the PNG.
      batches: with the texts of their first samples.

    Raises:
      DeepGenError: it cannot be written.
    """
    font = _font()
    rows = [_row(batch, texts, font) for batch, texts in batches]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path.parent, error) from error
    with replacing(path) as partial:
        sheet.save(partial, "PNG")


def _row(batch: Batch, texts: Sequence[str], font: ImageFont.FreeTypeFont) -> Image.Image:
    tiles = []
    for place, text in enumerate(texts):
        pictures = [_small(image) for image in _images(batch, place)]
        tiles.append(_tile(pictures, text, font))
    (width, height), references = batch["bucket"]
    sizes = " + ".join(f"{w}x{h}" for w, h in references)
    title = f"{batch['task']} {sizes + ' -> ' if sizes else ''}{width}x{height}"
    heading = _FONT_SIZE + 2 * _MARGIN
    row = Image.new("RGB", (sum(tile.width for tile in tiles), heading + tiles[0].height), "white")
    ImageDraw.Draw(row).text((_MARGIN, _MARGIN), title, "black", font)
    left = 0
    for tile in tiles:
        row.paste(tile, (left, heading))
        left += tile.width
    return row


def _images(batch: Batch, place: int) -> list[np.ndarray]:
    """A sample's references and target, uint8 [H, W, 3]; of cached features three channels of the mean in false colour.
    """
    if "features" not in batch:
        return [images[place] for images in (*batch["references"], batch["target"])]
    features = batch["features"]
    means = [mean[place, ..., :3] for mean, _ in (*features["references"], features["target"])]
    low, high = min(mean.min() for mean in means), max(mean.max() for mean in means)
    return [(255 * (mean - low) / max(high - low, 1e-6)).astype(np.uint8) for mean in means]


def _small(pixels: np.ndarray) -> Image.Image:
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((max(1, width * _HEIGHT // height), _HEIGHT))


def _tile(pictures: Sequence[Image.Image], text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    width = sum(picture.width + _MARGIN for picture in pictures) + _MARGIN
    line = _FONT_SIZE + 4
    tile = Image.new("RGB", (width, _HEIGHT + _LINES * line + 2 * _MARGIN), "white")
    left = _MARGIN
    for picture in pictures:
        tile.paste(picture, (left, 0))
        left += picture.width + _MARGIN
    draw = ImageDraw.Draw(tile)
    for number, words in enumerate(_wrapped(text, width - 2 * _MARGIN, font)):
        draw.text((_MARGIN, _HEIGHT + _MARGIN + number * line), words, "black", font)
    return tile


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The first lines of a text, broken at spaces, or between letters if there are none, as in Chinese."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < _LINES:
        end = next((n for n in range(2, len(rest) + 1) if font.getlength(rest[:n]) > width), len(rest) + 1) - 1
        if end < len(rest) and rest[end] != " " and " " in rest[:end]:
            end = rest.rindex(" ", 0, end)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = f"{lines[-1][:-1]}…"
    return lines


def _font() -> ImageFont.FreeTypeFont:
    for face in _FACES:
        try:
            return ImageFont.truetype(face, _FONT_SIZE)
        except OSError:
            continue
    default = ImageFont.load_default(_FONT_SIZE)
    assert isinstance(default, ImageFont.FreeTypeFont)
    return default
