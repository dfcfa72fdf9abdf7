"""Image sizes of training samples, and resizing to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deepgen_jax.errors import DeepGenError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Sides of training images are multiples of this many pixels.
UNIT = 32
#: Ways of giving a training image its size.
MODES = ("fix_pixels", "dynamic", "crop2square", "resize2square")


def target_size(width: int, height: int, image_size: int, mode: str) -> tuple[int, int]:
    """Size in pixels to which an image is resized, sides multiples of 32.

    The order of the float64 operations matters: because of rounding, an exact multiple may come out one unit larger, as
    in the released model.

    Args:
      width: of the source, in pixels.
      height: of the source, in pixels.
      image_size: side of the square whose area or edge is aimed at.
      mode: "fix_pixels" (about ``image_size``^2 pixels, aspect kept), "dynamic" (longest edge ``image_size``, aspect
        kept; a smaller image is only rounded up to whole units), "crop2square" or "resize2square" (a square of side
        ``image_size``, from the centre or from the whole picture).

    Returns:
      (width, height).

    Raises:
      DeepGenError: unknown mode, or sizes that are not positive; in all but "fix_pixels" also an ``image_size`` that
        is no multiple of 32.
    """
    if min(width, height, image_size) < 1:
        raise DeepGenError(f"image of {width}x{height} cannot be resized to size {image_size}; sizes must be positive")
    if mode == "fix_pixels":
        scale = image_size / math.sqrt(height * width)
        return _whole_units(width * scale), _whole_units(height * scale)
    if mode not in MODES:
        raise DeepGenError(f"image size mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if image_size % UNIT:
        raise DeepGenError(f"image_size {image_size} must be a multiple of {UNIT} in mode {mode}")
    if mode != "dynamic":
        return image_size, image_size
    longest = max(width, height)
    if longest < image_size:
        return _whole_units(width), _whole_units(height)
    scale = image_size / longest

    def scaled(side: int) -> int:
        # The longest edge (both of a square) is set: rounding could push it a unit beyond image_size.
        return image_size if side == longest else _whole_units(side * scale)

    return scaled(width), scaled(height)


def resize(image: Image, image_size: int, mode: str, size: tuple[int, int] | None = None) -> Image:
    """Resizes with Pillow's default filter (bicubic, antialiased).

    Args:
      image: the picture, upright.
      image_size, mode: as in `target_size`.
      size: (width, height) in the place of ``target_size``: that of a bucket near it.
    """
    size = size or target_size(*image.size, image_size, mode)
    if mode == "crop2square":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image.resize(size)


def _whole_units(side: float) -> int:
    return math.ceil(side / UNIT) * UNIT
