"""Image files as viewers show them: upright, 8-bit sRGB; one decoder for training and inference."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from deepgen_jax.data.color_profiles import ProfileError, convert_to_srgb, needs_conversion, profile_space
from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import warn_user

#: Images of more pixels than this are refused before they are decoded.
MAX_PIXELS = 64 * 10**6
#: File formats that are opened, by Pillow's names; nothing else is, so that no file starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM")

#: A file's path, an open file positioned at the image's start, or an image that is already open.
ImageSource: TypeAlias = str | os.PathLike[str] | BinaryIO | Image.Image

# A row costs memory besides its pixels; up to this side that is little.
_USUAL_SIDE, _ROW_PIXELS = 65_535, 16
# Pixels converted at a time: what is between the file's pixels and the result stays small.
_BAND_PIXELS = 2**20
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
    """Reads an image as 8-bit sRGB, upright, without the file's metadata.

    EXIF rotation is applied; colours are converted to sRGB through the file's ICC profile (a damaged one is left out
    with a notice; one that is sRGB changes no pixel); transparency is laid over white; greyscale of 16 or 32 bits or
    floating point is scaled to eight bits; and of an animation the first frame is taken with a notice. An open image
    is treated as its file would be, except that the frame it is at is taken; it is not changed.

    Args:
      source: a file's path, an open file, or an open image.
      max_pixels: an image of more pixels is refused by its header, before anything is decoded.

    Raises:
      ImageError: the file is missing, empty, truncated, too large or in none of `FORMATS`; the message names it and the
        reason.
    """
    label = image_label(source)
    with _opened(source, label, max_pixels) as image:
        rgb, problem = _decoded(image, label, max_pixels)
        if problem:
            warn_user(f"{label}: its colour profile is left out ({problem}); its colours are taken as sRGB")
        if not image.tell() and _animated(image):
            warn_user(f"{label} has more than one frame; the first is used")
        # A plain image: an orientation left in its metadata would be applied a second time by others.
        plain = Image.new("RGB", rgb.size)
        plain.paste(rgb)
        return plain


def decode_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_image` for many images: notices do not name each, and the metadata may stay."""
    label = image_label(source)
    image, result = _open(source, label, max_pixels), None
    try:
        result, problem = _decoded(image, label, max_pixels)
        if problem:
            warn_user(f"images whose colour profile cannot be used ({problem}) are taken as sRGB")
        return result
    finally:
        # Closing an image destroys its pixels.
        if image is not source and image is not result:
            image.close()


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of `load_image`'s result, read from the header.

    Raises:
      ImageError: as `load_image`, as far as the header shows it.
    """
    label = image_label(source)
    with _opened(source, label, max_pixels) as image:
        width, height = image.size
        # Pillow reports a TIFF's size as it will be once turned.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def load_alpha(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """The alpha channel of an image, upright, uint8 [height, width]; None if it has none.

    Raises:
      ImageError: as `load_image`.
    """
    label = image_label(source)
    with _opened(source, label, max_pixels) as image, _decoding(label, max_pixels):
        image.load()
        if not image.has_transparency_data:
            return None
        return np.asarray(_upright(image.convert("RGBA").getchannel("A"), _orientation(image)))


def image_label(source: ImageSource) -> str:
    """Name of an image in messages."""
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
    longest = max(image.size)
    if image.width * image.height > max_pixels or (
        longest > _USUAL_SIDE and longest * _ROW_PIXELS > max_pixels
    ):
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
            status = os.stat(source)
            if stat.S_ISDIR(status.st_mode):
                raise ImageError(f"image {label} is a folder; give one image file", "no image")
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"image {label} is no regular file (a pipe or device); save it to a file", "no image")
            empty = status.st_size == 0
        else:
            empty = not source.read(1)
            source.seek(0)
        if empty:
            raise ImageError(f"image {label} is empty (0 bytes); fetch or save it again", "empty file")
        return Image.open(source, formats=_formats())
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"image {label} does not exist; check the path", "missing file") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{label} is not an image of a supported format ({', '.join(_formats())}); convert it to PNG or JPEG",
            "no image",
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(label, _one_line(error), max_pixels) from error
    except Exception as error:
        # Only what the system refuses has a number; a decoder that finds nonsense raises OSError too.
        refused = isinstance(error, OSError) and error.errno is not None
        raise ImageError(
            f"image {label} cannot be opened: {_one_line(error)}", "unreadable file" if refused else "damaged file"
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none or the block is unreadable."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _animated(image: Image.Image) -> bool:
    # An MPO is a JPEG photograph with previews or a second eye, not an animation.
    try:
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    except Exception:
        # Counting frames reads them, and a damaged one raises anything; the first is fine.
        return False


def _decoded(image: Image.Image, label: str, max_pixels: int) -> tuple[Image.Image, str]:
    """Upright 8-bit sRGB, and what is wrong with the image's colour profile, "" for nothing."""
    with _decoding(label, max_pixels):
        return _upright_rgb(image, label)


@contextlib.contextmanager
def _decoding(label: str, max_pixels: int) -> Iterator[None]:
    """Turns what Pillow's decoders raise into an `ImageError`."""
    try:
        yield
    except DeepGenError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(label, str(error), max_pixels) from error
    except Exception as error:
        # Pillow's decoders raise many types (OSError, SyntaxError, struct.error, zlib.error, ...) on broken files.
        raise ImageError(
            f"{label} cannot be decoded ({_one_line(error)}); the file looks truncated or damaged", "damaged file"
        ) from error


def _upright_rgb(image: Image.Image, label: str) -> tuple[Image.Image, str]:
    image.load()
    # Read after decoding: Pillow turns a TIFF by itself and drops the tag.
    orientation = _orientation(image)
    try:
        rgb, problem = _rgb(image)
    except ValueError as error:
        raise ImageError(
            f"{label} has the colour mode {image.mode}, not supported; save it as RGB", "colour mode"
        ) from error
    # After the conversion, because not every mode can be turned (big-endian 16-bit).
    return _upright(rgb, orientation), problem


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """8-bit sRGB, and what is wrong with the colour profile."""
    profile, problem, profiled = image.info.get("icc_profile"), "", ""
    if profile:
        try:
            mode = _profiled_mode(image, profile)
            profiled = mode if needs_conversion(profile, mode) else ""
        except ProfileError as error:
            problem = str(error)
    wide = _is_wide(image)
    alpha = not wide and image.has_transparency_data
    if not (profiled or wide or alpha):
        return image if image.mode == "RGB" else image.convert("RGB"), problem
    full = _full_scale(image) if wide else 0.0

    def converted(band: Image.Image) -> Image.Image:
        if profiled == "I;16":
            return convert_to_srgb(Image.fromarray(np.asarray(band).astype(np.uint16)), profile)
        if wide:
            band = _eight_bits(band, full)
        if profiled == "L":
            pixels = convert_to_srgb(band.convert("L"), profile)
            if alpha:
                pixels.putalpha(band.convert("LA").getchannel("A"))
        elif profiled == "CMYK":
            pixels = convert_to_srgb(band, profile)
        else:
            pixels = band.convert("RGBA" if alpha else "RGB")
            if profiled:
                pixels = convert_to_srgb(pixels, profile)
        return _over_white(pixels) if alpha else pixels

    return _in_bands(image, converted), problem


def _profiled_mode(image: Image.Image, profile: object) -> str:
    """The mode in which an image's pixels go through its profile.

    Raises:
      ProfileError: the profile is for other pixels.
    """
    space = profile_space(profile)
    if space == "GRAY":
        if image.mode.startswith("I;16"):
            return "I;16"
        if _is_wide(image) or image.mode in ("1", "L", "LA"):
            return "L"
    if space == "CMYK" and image.mode == "CMYK":
        return "CMYK"
    if space == "RGB" and image.mode not in ("CMYK", "LAB"):
        return "RGB"
    raise ProfileError(f"it is for {space or 'unknown'} pixels, and these are {image.mode}")


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """``convert`` applied to some rows at a time, mode RGB, so that memory is that of the image and its result."""
    rows = max(1, _BAND_PIXELS // image.width)
    if rows >= image.height:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(convert(band), (0, top))
    return result


def _over_white(rgba: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _is_wide(image: Image.Image) -> bool:
    """Whether pixels are greyscale of more than eight bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _full_scale(image: Image.Image) -> float:
    """The value of white in greyscale of 16 or 32 bits or floating point."""
    if image.mode.startswith("I;16"):
        return 65535.0
    rows, peak = max(1, _BAND_PIXELS // image.width), 0.0
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        peak = max(peak, float(_values(band).max(initial=0.0)))
    if image.mode == "F" and peak <= 1.0:
        return 1.0
    # The mode does not say how many bits are meant: the smallest of the usual ranges that holds the values.
    return next((limit for limit in (255.0, 65535.0) if peak <= limit), peak)


def _eight_bits(image: Image.Image, full: float) -> Image.Image:
    """Greyscale of 16 or 32 bits or floating point as mode L, scaled so that ``full`` is white."""
    return Image.fromarray(np.clip(np.rint(_values(image) * (255.0 / full)), 0, 255).astype(np.uint8))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
