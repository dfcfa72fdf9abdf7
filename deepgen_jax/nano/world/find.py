"""Finds what a picture of the world shows in its pixels: background, things, and the place of a sign.

Connected regions that stand out from the background are things. Each is named by the median colour of its inside, and
by the outline that covers it best at the same area. Tolerates the slight blur, noise and colour shifts of a
model's pictures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from deepgen_jax.nano.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES, SIZES

#: Smaller pictures are enlarged to this side.
_SIDE = 192
#: Distance in RGB from which a pixel is foreground, and up to which a colour matches its nearest named one.
_STANDS_OUT, _SAME_COLOUR = 45.0, 75.0
#: Smallest thing that counts, as a share of the picture; a small star covers 0.018.
_LEAST_AREA = 0.005
#: Least overlap (intersection over union) with the outline of the shape that a thing is named after.
_LEAST_OVERLAP = 0.72
#: Share of a thing's inside, and of the picture's edge, that must be of one colour.
_LEAST_PURE = 0.75
#: A region is a plate or letters where red, green and blue differ by less.
_NEUTRAL = 40.0
#: Height of a sign when it is read.
_SIGN_PIXELS = 96
#: Pixels over which an outline fades, inside and outside a region.
_OUTLINE, _MARGIN = 5.0, 3
#: Shapes are matched sharp and blurred: standard deviations as shares of the root of a shape's area.
_BLURS = (0.0, 0.06, 0.12, 0.18)
#: Shapes are compared on a grid: points a side, and its side in roots of their area.
_GRID, _SPAN = 48, 2.0


@dataclass(frozen=True)
class Found:
    """A thing in a picture.

    Attributes:
      colour, shape: None where it is none of the world's.
      size: "small" or "large".
      x, y: its middle as shares of the picture's sides.
    """

    colour: str | None
    shape: str | None
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class View:
    """Contents of an image.

    Attributes:
      background: None where it is none of the world's, or not plain.
      things: in no particular order, signs left out.
      sign: what encloses all regions without colour, such as a plate and its letters: left, top, right and bottom as
        shares of the picture's sides; None where there are none.
    """

    background: str | None
    things: tuple[Found, ...]
    sign: tuple[float, float, float, float] | None


def sign_of(image: np.ndarray, view: View) -> np.ndarray | None:
    """The part of a picture that holds its sign, enlarged to be read: uint8 [h, w, 3], None without a sign."""
    if view.sign is None:
        return None
    height, width = image.shape[:2]
    left, top, right, bottom = view.sign
    left, top, right, bottom = left * width, top * height, right * width, bottom * height
    scale = _SIGN_PIXELS / max(1.0, bottom - top)
    size = max(1, round((right - left) * scale)), _SIGN_PIXELS
    plate = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom))
    return np.pad(np.asarray(plate), ((_SIGN_PIXELS // 2,) * 2, (_SIGN_PIXELS // 2,) * 2, (0, 0)), mode="edge")


def look(image: np.ndarray) -> View:
    """What a picture shows.

    Args:
      image: uint8 [H, W, 3], RGB, of any size from about 48 pixels on.
    """
    pixels = _smoothed(image)
    height, width = pixels.shape[:2]
    background, plain = _background(pixels)
    distance = np.linalg.norm(pixels - background, axis=-1)
    regions, _ = ndimage.label(distance > _STANDS_OUT)
    things: list[Found] = []
    signs: list[tuple[float, float, float, float]] = []
    for number, box in enumerate(ndimage.find_objects(regions), 1):
        if (regions[box] == number).sum() < _LEAST_AREA * height * width:
            continue
        box = _wider(box, regions.shape)
        region = regions[box] == number
        inside = pixels[box][_inside(region)]
        colour = np.median(inside, axis=0)
        if np.ptp(colour) < _NEUTRAL:
            signs.append((box[1].start / width, box[0].start / height, box[1].stop / width, box[0].stop / height))
            continue
        # 0 on the background, 1 on the thing, in between on a blurred outline.
        axis = colour - background
        cover = np.clip((pixels[box] - background) @ axis / (axis @ axis), 0, 1)
        cover *= ndimage.binary_dilation(region, iterations=_MARGIN)
        area = float(cover.sum())
        rows, columns = np.indices(cover.shape)
        row, column = (cover * rows).sum() / area, (cover * columns).sum() / area
        shape = _shape(cover, row, column)
        # A thing has one colour all over.
        pure = (np.linalg.norm(inside - colour, axis=-1) < _SAME_COLOUR).mean() >= _LEAST_PURE
        things.append(
            Found(
                _nearest(colour, COLOURS) if pure else None,
                shape,
                _size(shape, area / (height * width)),
                float((column + box[1].start + 0.5) / width),
                float((row + box[0].start + 0.5) / height),
            )
        )
    return View(_nearest(background, BACKGROUNDS) if plain else None, tuple(things), _enclosing(signs))


def _smoothed(image: np.ndarray) -> np.ndarray:
    """The picture at `_SIDE` pixels or more, denoised by a median filter, which keeps outlines in place."""
    picture = Image.fromarray(image)
    scale = max(1.0, _SIDE / min(picture.size))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(picture.filter(ImageFilter.MedianFilter(3)), np.float32)


def _enclosing(boxes: list[tuple[float, float, float, float]]) -> tuple[float, float, float, float] | None:
    if not boxes:
        return None
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _background(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """The colour along the picture's edge, float32 [3], and whether the edge is plain."""
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    colour = np.median(edge, axis=0)
    return colour, (np.linalg.norm(edge - colour, axis=-1) < _STANDS_OUT).mean() >= _LEAST_PURE


def _inside(region: np.ndarray) -> np.ndarray:
    """A region without its blurred outline."""
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    return depth >= min(_OUTLINE, 0.5 * depth.max())


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in names.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] < _SAME_COLOUR else None


def _size(shape: str | None, area: float) -> str:
    """The size whose radius is nearer; ``area`` is a share of the picture's."""
    radius = np.sqrt(area / _area(shape or "circle"))
    return min(SIZES, key=lambda name: abs(SIZES[name] - radius))


def _shape(cover: np.ndarray, row: float, column: float) -> str | None:
    normal = _normalised(cover, row, column)
    names, templates = _templates()
    overlaps = np.minimum(normal, templates).sum(axis=(1, 2)) / np.maximum(normal, templates).sum(axis=(1, 2))
    best = int(overlaps.argmax())
    return names[best] if overlaps[best] >= _LEAST_OVERLAP else None


def _normalised(cover: np.ndarray, row: float, column: float) -> np.ndarray:
    """A region on a grid around its centre, scaled by the root of its area, float32 [grid, grid]."""
    reach = (np.arange(_GRID) + 0.5) / _GRID - 0.5
    offsets = reach * _SPAN * np.sqrt(cover.sum())
    where = np.meshgrid(row + offsets, column + offsets, indexing="ij")
    return ndimage.map_coordinates(cover.astype(np.float32), where, order=1, prefilter=False)


@functools.cache
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and float32 [templates, grid, grid]: every shape, sharp and blurred."""
    names, templates = [], []
    for name in SHAPES:
        drawn = _drawn(name).astype(np.float32)
        for blur in _BLURS:
            blurred = ndimage.gaussian_filter(drawn, blur * np.sqrt(drawn.sum())) if blur else drawn
            rows, columns = np.indices(blurred.shape)
            middle = [float((blurred * where).sum() / blurred.sum()) for where in (rows, columns)]
            names.append(name)
            templates.append(_normalised(blurred, *middle))
    return tuple(names), np.stack(templates)


def _wider(box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The box with a margin, inside the picture."""
    return tuple(
        slice(max(0, side.start - _MARGIN), min(length, side.stop + _MARGIN))
        for side, length in zip(box, shape, strict=True)
    )


@functools.cache
def _area(shape: str) -> float:
    """Of the outline, in squares of its radius."""
    side = _drawn(shape).shape[0]
    return float(_drawn(shape).sum() / (side / 3) ** 2)


def _drawn(shape: str) -> np.ndarray:
    """The outline filled, three radii a side."""
    image = Image.new("L", (192, 192))
    points = [(64 * float(x) + 96, 64 * float(y) + 96) for x, y in SHAPES[shape]]
    ImageDraw.Draw(image).polygon(points, 1)
    return np.asarray(image) > 0
