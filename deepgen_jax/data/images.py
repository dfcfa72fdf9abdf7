"""Image files as a person expects them: upright, RGB and eight bits, for training and for inference alike."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import warn_user

#: Images of more pixels than this are refused before they are decoded.
MAX_PIXELS = 64 * 10**6

#: A file's path, an open file that stands at the image's start, or an image that is already open.
ImageSource: TypeAlias = str | os.PathLike[str] | BinaryIO | Image.Image

_ORIENTATION = 0x0112
# EXIF orientation -> what brings the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(DeepGenError):
    """An image that cannot be used.

    Attributes:
      reason: what is wrong in two or three words, the same for every image with that fault, to count by.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (str(self), self.reason)


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image as 8-bit RGB, upright, without the file's metadata.

    EXIF rotation is applied, transparency is laid over white, CMYK is converted (through its colour profile where
    there is one), 16-bit, 32-bit and floating-point greyscale is scaled to eight bits, and of an animation the first
    frame is taken with a notice.

    Args:
      source: a file's path, an open file, or an image that is already open.
      max_pixels: an image of more pixels is refused by what its header says, before anything is decoded.

    Raises:
      ImageError: the file is missing, empty, truncated, too large or no image; the message names it and the reason.
    """
    label = image_label(source)
    with _opened(source, label, max_pixels) as image:
        if _animated(image):
            warn_user(f"{label} has more than one frame; the first is used")
        # A plain image: an orientation left in its metadata would be applied a second time by others.
        return Image.fromarray(np.asarray(_decoded(image, label, max_pixels)))


def decode_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_image` for who wants the pixels only: no notices, and no copy that drops the metadata."""
    label = image_label(source)
    image, result = _open(source, label, max_pixels), None
    try:
        result = _decoded(image, label, max_pixels)
        return result
    finally:
        # Closing an image destroys its pixels.
        if image is not source and image is not result:
            image.close()


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels that `load_image` would give, from the header alone.

    Raises:
      ImageError: as `load_image`, as far as the header shows it.
    """
    label = image_label(source)
    with _opened(source, label, max_pixels) as image:
        width, height = image.size
        # Pillow reports a TIFF's size as it will be once turned.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def image_label(source: ImageSource) -> str:
    """What to call an image in a message."""
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or f"image ({source.mode}, {source.width}x{source.height})"
    if isinstance(source, str | os.PathLike):
        return str(source)
    return str(getattr(source, "name", "image"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _too_large(label: str, size: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{label} is too large to decode safely ({size}; the limit is {max_pixels / 1e6:g} megapixels); "
        "make it smaller, or raise the limit (--max-image-megapixels, max_pixels=) if you trust the file",
        "too many pixels",
    )


def _open(source: ImageSource, label: str, max_pixels: int) -> Image.Image:
    """The open, not yet decoded image, once its header has passed the size limit."""
    image = source if isinstance(source, Image.Image) else _open_file(source, label, max_pixels)
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        if image is not source:
            image.close()
        raise _too_large(label, size, max_pixels)
    return image


@contextlib.contextmanager
def _opened(source: ImageSource, label: str, max_pixels: int) -> Iterator[Image.Image]:
    """`_open`; a file is closed at the end."""
    image = _open(source, label, max_pixels)
    try:
        yield image
    finally:
        if image is not source:
            image.close()


def _open_file(source: str | os.PathLike[str] | BinaryIO, label: str, max_pixels: int) -> Image.Image:
    # Pillow refuses above twice its own limit, which is one for the whole process; ours is checked in any case.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        if isinstance(source, str | os.PathLike):
            if Path(source).is_dir():
                raise ImageError(f"image {label} is a folder; give one image file", "no image")
            empty = Path(source).stat().st_size == 0
        else:
            empty = not source.read(1)
            source.seek(0)
        if empty:
            raise ImageError(f"image {label} is empty (0 bytes); fetch or save it again", "empty file")
        return Image.open(source)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"image {label} does not exist; check the path", "missing file") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{label} is not an image that Pillow reads; convert it to PNG or JPEG", "no image") from error
    except Image.DecompressionBombError as error:
        raise _too_large(label, _one_line(error), max_pixels) from error
    except Exception as error:
        # Only what the system refuses has a number; a decoder that finds nonsense raises OSError too.
        refused = isinstance(error, OSError) and error.errno is not None
        raise ImageError(
            f"image {label} cannot be opened: {_one_line(error)}", "unreadable file" if refused else "damaged file"
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the block is unreadable."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _animated(image: Image.Image) -> bool:
    # An MPO is a JPEG photograph with previews or a second eye, not an animation.
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def _decoded(image: Image.Image, label: str, max_pixels: int) -> Image.Image:
    try:
        return _upright_rgb(image, label)
    except DeepGenError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(label, str(error), max_pixels) from error
    except Exception as error:
        # Pillow's decoders raise many types (OSError, SyntaxError, struct.error, zlib.error, ...) on broken files.
        raise ImageError(
            f"{label} cannot be decoded ({_one_line(error)}); the file looks truncated or damaged", "damaged file"
        ) from error


def _upright_rgb(image: Image.Image, label: str) -> Image.Image:
    if _animated(image):
        image.seek(0)
    image.load()
    # Read after decoding: Pillow turns a TIFF by itself and drops the tag.
    orientation = _orientation(image)
    rgb = _rgb(image, label)
    if orientation in _TURNS:
        # After the conversion, because not every mode can be turned (big-endian 16-bit).
        rgb = rgb.transpose(_TURNS[orientation])
    return rgb


def _rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        if image.mode == "CMYK" and image.info.get("icc_profile"):
            return _through_profile(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"{label} has the colour mode {image.mode}, not supported; save it as RGB", "colour mode"
        ) from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Greyscale of 16 or 32 bits or floating point -> uint8 [height, width], scaled by the range that it uses."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(values.max(initial=0.0))
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif image.mode == "F" and peak <= 1.0:
        full = 1.0
    else:
        # The mode does not say how many bits are meant: the smallest of the usual ranges that holds the values.
        full = next((limit for limit in (255.0, 65535.0) if peak <= limit), peak)
    return np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8)


def _through_profile(image: Image.Image) -> Image.Image:
    """CMYK to sRGB through the file's own colour profile; plainly where the profile is of no use."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
    assert converted is not None
    return converted
