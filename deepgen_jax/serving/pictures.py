"""Pictures of requests and answers: reading uploads, data URLs and masks, and encoding results."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.data.images import load_alpha, load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.serving.errors import APIError, invalid

#: Pillow's names of the formats that are read.
READABLE = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:image/[\w.+-]{1,40}(?:;[\w.+=-]{1,60}){0,4};base64,", re.ASCII)
_SAVE: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 4},
    "jpeg": {"format": "JPEG", "quality": 95},
    "webp": {"format": "WEBP", "quality": 90},
}


def read_picture(data: bytes, max_pixels: int, param: str) -> Image.Image:
    """An uploaded PNG, JPEG or WebP file as upright RGB.

    Raises:
      APIError: empty, another format, damaged, or more than ``max_pixels``.
    """
    _check_header(data, max_pixels, param)
    stream = io.BytesIO(data)
    stream.name = f"'{param}'"  # what messages call it
    try:
        return load_image(stream, max_pixels)
    except DeepGenError as error:
        raise invalid(str(error), param, "invalid_image") from None


def read_mask(data: bytes, size: tuple[int, int], max_pixels: int) -> np.ndarray:
    """An uploaded mask -> bool [height, width], True where alpha is below one half: there the picture may change.

    Args:
      size: (width, height) of the picture that it belongs to.

    Raises:
      APIError: not a readable picture, no alpha channel, another size, or nothing to change.
    """
    _check_header(data, max_pixels, "mask")
    stream = io.BytesIO(data)
    stream.name = "'mask'"
    try:
        alpha = load_alpha(stream, max_pixels)
    except DeepGenError as error:
        raise invalid(str(error), "mask", "invalid_image") from None
    if alpha is None:
        message = "'mask' has no alpha channel; send a PNG that is transparent where the picture may change"
        raise invalid(message, "mask", "invalid_image")
    if alpha.shape[::-1] != size:
        found, wanted = (f"{width}x{height}" for width, height in (alpha.shape[::-1], size))
        raise invalid(f"'mask' is {found}, the first image {wanted}; send equal sizes", "mask", "invalid_image")
    editable = alpha < 128
    if not editable.any():
        raise invalid("'mask' is opaque everywhere; make it transparent where the picture may change", "mask")
    return editable


def read_data_url(url: object, param: str) -> bytes:
    """The bytes of a ``data:image/...;base64,`` URL.

    Raises:
      APIError: another kind of URL (nothing is fetched), or no base64.
    """
    if not isinstance(url, str):
        raise invalid(f"'{param}' is no text; send a data URL", param, "invalid_type")
    match = _DATA_URL.match(url)
    if match is None:
        message = f"'{param}' is no data:image/...;base64 URL; this server does not fetch URLs, send the picture itself"
        raise invalid(message, param, "invalid_image_url")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"'{param}' is not valid base64", param, "invalid_image_url") from None


def encode(image: np.ndarray, format: str, compression: int | None) -> bytes:
    """uint8 [H, W, 3] as a file; ``compression`` is the quality of JPEG and WebP, 0 to 100."""
    options = dict(_SAVE[format])
    if compression is not None and format != "png":
        options["quality"] = compression
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def png_bytes(image: Image.Image) -> bytes:
    """A picture as a PNG file, transparency kept."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def base64_text(data: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(data).decode("ascii")


def as_data_url(data: bytes, format: str) -> str:
    """An encoded picture as a ``data:`` URL."""
    return f"data:image/{format};base64,{base64_text(data)}"


def _check_header(data: bytes, max_pixels: int, param: str) -> None:
    """Refuses, before anything is decoded, what is empty, of an unsupported format or too large."""
    if not data:
        raise invalid(f"'{param}' is empty; send a PNG, JPEG or WebP file", param, "invalid_image")
    try:
        with Image.open(io.BytesIO(data), formats=READABLE) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:
        raise _too_large(param, "far too many pixels", max_pixels) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        message = f"'{param}' is not a PNG, JPEG or WebP file that can be read ({_one_line(error)})"
        raise invalid(message, param, "invalid_image") from None
    if width * height > max_pixels:
        raise _too_large(param, f"{width}x{height}", max_pixels)


def _too_large(param: str, size: str, max_pixels: int) -> APIError:
    return invalid(f"'{param}' has {size}; send at most {max_pixels / 1e6:g} megapixels", param, "image_too_large")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
