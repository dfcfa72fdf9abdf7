"""Colours of a picture's ICC profile converted to sRGB by littleCMS."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# Levels of 255 by which a profile may differ from sRGB and still be it: rounding of its curve and matrix.
_SAME = 1
_SPACES = {"RGB": "RGB", "L": "GRAY", "I;16": "GRAY", "CMYK": "CMYK"}


class ProfileError(Exception):
    """A profile that cannot be used; the message says why in a few words."""


def needs_conversion(profile: Any, mode: str) -> bool:
    """Whether pixels change: False where the profile is sRGB, or its greyscale, up to rounding.

    Args:
      profile: bytes of an ICC profile.
      mode: "RGB", "L", "I;16" or "CMYK", of the pixels that it belongs to.

    Raises:
      ProfileError: it is damaged, or for a different kind of pixels.
    """
    return _conversion(profile, mode) is not None


def convert_to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Pixels in sRGB, mode RGB, or RGBA with the alpha channel as it was.

    Args:
      image: mode RGB, RGBA, L, I;16 or CMYK.
      profile: bytes of its ICC profile, for which `needs_conversion` is True.

    Raises:
      ProfileError: as `needs_conversion`.
    """
    conversion = _conversion(profile, image.mode)
    assert conversion is not None
    converted = conversion.apply(image)
    converted.info.pop("icc_profile", None)
    return converted


def profile_space(profile: Any) -> str:
    """"RGB", "GRAY", "CMYK" or another colour space of ICC.1 that a profile belongs to.

    Raises:
      ProfileError: it is damaged.
    """
    return _space(_parse(profile))


def _parse(profile: Any) -> ImageCms.ImageCmsProfile:
    if not isinstance(profile, bytes):
        raise ProfileError("it is no block of bytes")
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (OSError, ImageCms.PyCMSError) as error:
        raise ProfileError("it is damaged") from error


def _space(profile: ImageCms.ImageCmsProfile) -> str:
    try:
        return profile.profile.xcolor_space.strip()
    except UnicodeDecodeError as error:
        raise ProfileError("it is damaged") from error


def _conversion(profile: Any, mode: str) -> ImageCms.ImageCmsTransform | None:
    found = _cached(profile if isinstance(profile, bytes) else None, mode)
    if isinstance(found, str):
        raise ProfileError(found)
    return found


@functools.lru_cache(maxsize=64)
def _cached(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | str | None:
    """A transform, None for no change, or what is wrong. A data set has few different profiles."""
    alpha = mode == "RGBA"
    base = "RGB" if alpha else mode
    try:
        parsed = _parse(profile)
        space = _space(parsed)
        if space != _SPACES[base]:
            return f"it is for {space or 'unknown'} pixels, and these are {_SPACES[base]}"
        # Optimised, littleCMS reads 16-bit grey through a table too coarse for dark linear values.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "I;16" else ImageCms.Flags.NONE
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(parsed, srgb, mode, "RGBA" if alpha else "RGB", flags=flags)
        if base in ("RGB", "L"):
            probe = _probe().convert(base)
            plain = probe.convert("RGB")
            opaque = ImageCms.buildTransform(parsed, srgb, base, "RGB") if alpha else transform
            difference = np.abs(np.asarray(opaque.apply(probe), np.int16) - np.asarray(plain, np.int16)).max()
            return None if difference <= _SAME else transform
        return transform
    except ProfileError as error:
        return str(error)
    except (ImageCms.PyCMSError, ValueError, OSError):
        return "it is damaged"


@functools.cache
def _probe() -> Image.Image:
    """Colours in steps of 15 and all greys."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(1, -1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)
    return Image.fromarray(np.concatenate([greys, colours], axis=1))
