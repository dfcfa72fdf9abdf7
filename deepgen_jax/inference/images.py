"""Image files as a person expects them: upright, RGB, eight bits, and of a size that the model can take."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from deepgen_jax.data.transforms import target_size
from deepgen_jax.errors import DeepGenError
from deepgen_jax.notices import notify

#: Images of more pixels than this are refused before they are decoded.
MAX_PIXELS = 64 * 10**6
#: References of a larger area are reduced to about this one, the area the model was trained at.
REFERENCE_PIXELS = 512 * 512

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


def load_image(source: str | os.PathLike[str] | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image as 8-bit RGB, upright.

    EXIF rotation is applied, transparency is laid over white, CMYK is converted (through its colour profile where
    there is one), 16-bit, 32-bit and floating-point greyscale is scaled to eight bits, and of an animation the first
    frame is taken with a notice.

    Args:
      source: a file's path, or an image that is already open.
      max_pixels: an image of more pixels is refused by what its header says, before anything is decoded.

    Raises:
      DeepGenError: the file is missing, empty, truncated, too large or no image; the message names it and the reason.
    """
    label = _label(source)
    with _opened(source, label, max_pixels) as image:
        try:
            return _upright_rgb(image, label)
        except DeepGenError:
            raise
        except Image.DecompressionBombError as error:
            raise _too_large(label, str(error), max_pixels) from error
        except Exception as error:
            # Pillow's decoders raise many types (OSError, SyntaxError, struct.error, zlib.error, ...) on broken files.
            raise DeepGenError(
                f"{label} cannot be decoded ({_one_line(error)}); the file looks truncated or damaged"
            ) from error


def image_size(source: str | os.PathLike[str] | Image.Image, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels that `load_image` would give, from the header alone.

    Raises:
      DeepGenError: as `load_image`, as far as the header shows it.
    """
    label = _label(source)
    with _opened(source, label, max_pixels) as image:
        width, height = image.size
        # Pillow reports a TIFF's size as it will be once turned.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


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
    notify(f"reference {name or _label(image)} is resized {change}: {reason}")
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
        notify(f"image size {width}x{height} is rounded to {nearest}: sides are multiples of {multiple}")
    return rounded


def _nearest(side: int, multiple: int) -> int:
    return max(1, (side + multiple // 2) // multiple)


def _label(source: str | os.PathLike[str] | Image.Image) -> str:
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or f"image ({source.mode}, {source.width}x{source.height})"
    return str(source)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _too_large(label: str, size: str, max_pixels: int) -> DeepGenError:
    return DeepGenError(
        f"{label} is too large to decode safely ({size}; the limit is {max_pixels / 1e6:g} megapixels); "
        "make it smaller, or raise the limit (--max-image-megapixels, max_pixels=) if you trust the file"
    )


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | Image.Image, label: str, max_pixels: int) -> Iterator[Image.Image]:
    """The open, not yet decoded image, once its header has passed the size limit; a file is closed at the end."""
    image = source if isinstance(source, Image.Image) else _open_file(Path(source), max_pixels)
    try:
        if image.width * image.height > max_pixels:
            raise _too_large(label, f"{image.width}x{image.height}", max_pixels)
        yield image
    finally:
        if image is not source:
            image.close()


def _open_file(path: Path, max_pixels: int) -> Image.Image:
    if not path.exists():
        raise DeepGenError(f"image {path} does not exist; check the path")
    if path.is_dir():
        raise DeepGenError(f"image {path} is a folder; give one image file")
    # Pillow refuses above twice its own limit, which is one for the whole process; ours is checked in any case.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        if path.stat().st_size == 0:
            raise DeepGenError(f"image {path} is empty (0 bytes); fetch or save it again")
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise DeepGenError(f"{path} is not an image that Pillow reads; convert it to PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise _too_large(str(path), _one_line(error), max_pixels) from error
    except DeepGenError:
        raise
    except Exception as error:
        raise DeepGenError(f"image {path} cannot be opened: {_one_line(error)}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the block is unreadable."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _upright_rgb(image: Image.Image, label: str) -> Image.Image:
    # An MPO is a JPEG photograph with previews or a second eye, not an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notify(f"{label} has more than one frame; the first is used", stacklevel=3)
        image.seek(0)
    image.load()
    # Read after decoding: Pillow turns a TIFF by itself and drops the tag.
    orientation = _orientation(image)
    rgb = _rgb(image, label)
    if orientation in _TURNS:
        # After the conversion, because not every mode can be turned (big-endian 16-bit).
        rgb = rgb.transpose(_TURNS[orientation])
    # A plain image without the file's metadata: an orientation left in it would be applied a second time by others.
    return Image.fromarray(np.asarray(rgb))


def _rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        if image.mode == "CMYK" and image.info.get("icc_profile"):
            return _through_profile(image)
        return image.convert("RGB")
    except ValueError as error:
        raise DeepGenError(f"{label} has the colour mode {image.mode}, not supported; save it as RGB") from error


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
