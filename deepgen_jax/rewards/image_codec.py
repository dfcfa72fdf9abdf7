"""Pictures as the bytes that judges, scorers and the compressibility reward take."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from deepgen_jax.errors import DeepGenError

#: Largest picture that is accepted from outside, in pixels.
MAX_PIXELS = 2**25


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


def decode_png_base64(text: str) -> np.ndarray:
    """The inverse of `png_base64`; other colour modes are converted to RGB.

    Raises:
      DeepGenError: not base64, no PNG file, damaged, or too large.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DeepGenError(f"the image is not base64 ({error})") from None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DeepGenError(f"the image has {picture.width}x{picture.height} pixels; send at most {MAX_PIXELS}")
            return np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DeepGenError):
            raise
        raise DeepGenError(f"the image is not a PNG file that can be read ({error})") from None
