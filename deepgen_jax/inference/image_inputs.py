"""Sizes at which images enter and leave the model."""

from __future__ import annotations

import math

from PIL import Image

from deepgen_jax.data.images import image_label
from deepgen_jax.data.transforms import target_size
from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import warn_user

#: References of a larger area are reduced to about this one, the area the model was trained at.
REFERENCE_PIXELS = 512 * 512


def reference_size(width: int, height: int, multiple: int = 32, max_pixels: int = REFERENCE_PIXELS) -> tuple[int, int]:
    """(width, height) at which a reference image enters the model.

    An area above ``max_pixels`` is reduced to it with the aspect kept and the sides rounded up to ``multiple``, as in
    training; a smaller image keeps its size, with each side rounded to the nearest multiple.
    """
    if width * height > max_pixels:
        return target_size(width, height, math.isqrt(max_pixels), "fix_pixels")
    return _nearest(width, multiple) * multiple, _nearest(height, multiple) * multiple


def fit_reference(
    image: Image.Image, multiple: int = 32, max_pixels: int = REFERENCE_PIXELS, name: str = ""
) -> Image.Image:
    """``image`` at its `reference_size`, resized bicubically and with a notice only where that differs from its own."""
    size = reference_size(*image.size, multiple, max_pixels)
    if size == image.size:
        return image
    reason = f"sides are multiples of {multiple}"
    if image.width * image.height > max_pixels:
        reason += f" and the area is at most about {max_pixels} pixels"
    change = f"from {image.width}x{image.height} to {size[0]}x{size[1]}"
    warn_user(f"reference {name or image_label(image)} is resized {change}: {reason}")
    return image.resize(size, Image.Resampling.BICUBIC)


def round_size(width: int, height: int, multiple: int = 32, strict: bool = False) -> tuple[int, int]:
    """(width, height) in pixels with both sides rounded to the nearest multiple, with a notice where that changes them.

    Raises:
      DeepGenError: a side is not positive, or ``strict`` is set and the size would change.
    """
    if width < 1 or height < 1:
        raise DeepGenError(f"image size {width}x{height} is not positive; give sides that are multiples of {multiple}")
    rounded = (_nearest(width, multiple) * multiple, _nearest(height, multiple) * multiple)
    if rounded != (width, height):
        nearest = f"{rounded[0]}x{rounded[1]}"
        if strict:
            raise DeepGenError(
                f"image size {width}x{height} is not made of multiples of {multiple}; the nearest is {nearest}"
            )
        warn_user(f"image size {width}x{height} is rounded to {nearest}: sides are multiples of {multiple}")
    return rounded


def _nearest(side: int, multiple: int) -> int:
    return max(1, (side + multiple // 2) // multiple)
