"""Images as JPEG and PNG files, for judges, reward servers and the compressibility reward."""

from __future__ import annotations

import base64
import binascii
import io
import struct

import numpy as np
from PIL import Image

from deepgen_jax.data.images import ImageError, decode_image
from deepgen_jax.errors import DeepGenError

#: Largest image that is accepted from outside, in pixels.
MAX_PIXELS = 2**25
_PNG_HEAD = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def encode(image: np.ndarray, format: str, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] as a "PNG" or "JPEG" file; ``quality`` is that of JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **({"quality": quality} if format == "JPEG" else {}))
    return buffer.getvalue()


def jpeg_data_url(image: np.ndarray, quality: int = 95) -> str:
    """uint8 [H, W, 3] as a ``data:`` URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(encode(image, 'JPEG', quality)).decode()}"


def png_base64(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a PNG file in base64."""
    return base64.b64encode(encode(image, "PNG")).decode()


def png_base64_pixels(text: str) -> int:
    """Number of pixels of a PNG file in base64, read from its header.

    Raises:
      DeepGenError: not base64, no PNG file, or too large.
    """
    head = _base64_bytes(text[:64])
    if not head.startswith(_PNG_HEAD) or len(head) < 24:
        raise DeepGenError("the image is not a PNG file")
    width, height = struct.unpack(">II", head[16:24])
    if not 0 < width * height <= MAX_PIXELS:
        raise DeepGenError(f"the image has {width}x{height} pixels; send 1 to {MAX_PIXELS}")
    return width * height


def decode_png_base64(text: str) -> np.ndarray:
    """The inverse of `png_base64`, uint8 [H, W, 3]; other pictures are read as `decode_image` does.

    Raises:
      DeepGenError: not base64, no PNG file, damaged, or too large.
    """
    png_base64_pixels(text)
    data = _base64_bytes(text)
    try:
        return np.array(decode_image(io.BytesIO(data), MAX_PIXELS))
    except ImageError as error:
        raise DeepGenError(f"the image is not a PNG file that can be read ({error})") from None


def _base64_bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DeepGenError(f"the image is not base64 ({error})") from None
