"""Checks of a sample by the headers of its images; the index makes them once for every sample."""

from __future__ import annotations

import os
from typing import BinaryIO, NamedTuple

from PIL.Image import Image

from deepgen_jax.data.images import ImageError, decode_image, image_size
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.sources import BadSample, Row, Source, read_row
from deepgen_jax.data.sources.base import CachedImage, ImageData, located
from deepgen_jax.data.storage import Blob, open_blob
from deepgen_jax.errors import DeepGenError

# How far before a file's end its end marker is looked for: some programs append a few bytes.
_TAIL = 64


class SampleInfo(NamedTuple):
    """Entry of a sample in the index.

    Attributes:
      length: tokens of its prompt, image tokens not counted, not cut.
      sizes: (width, height) of its images as stored, upright.
      notes: see `deepgen_jax.data.sources.base.Record`.
    """

    length: int
    sizes: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()


def check_sample(source: Source, row: Row, prompts: PromptEncoder, max_pixels: int) -> SampleInfo:
    """Reads a sample's text and the headers of its images.

    Raises:
      BadSample: it cannot be used; the detail begins with its place.
    """
    record = read_row(source, row, header_only=True)
    edit = source.config.task == "edit"
    with located(source, row):
        if not record.text.strip():
            raise BadSample("empty caption")
        length = prompts.length(record.text, len(record.images) - 1 if edit else None)
        sizes = tuple(_measure(image, max_pixels) for image in record.images)
        return SampleInfo(length, sizes, record.notes)


def load_pixels(data: bytes | Blob, max_pixels: int) -> Image:
    """The decoded image, upright, RGB.

    Raises:
      BadSample: it cannot be read.
    """
    try:
        with open_blob(data) as file:
            return decode_image(file, max_pixels)
    except (OSError, DeepGenError) as error:
        raise _bad(data, error) from error


def _measure(data: ImageData, max_pixels: int) -> tuple[int, int]:
    """(width, height); a file without its end marker, or of a format without one, is decoded to see whether it can be.

    Nearly all broken files with a whole header are truncated ones, so that hardly any is left to be found while
    training runs.
    """
    if isinstance(data, CachedImage):
        return data.size
    try:
        with open_blob(data) as file:
            whole = _has_end(file)
            file.seek(0)
            if whole:
                return image_size(file, max_pixels)
            return decode_image(file, max_pixels).size
    except (OSError, DeepGenError) as error:
        raise _bad(data, error) from error


def _bad(data: bytes | Blob, error: Exception) -> BadSample:
    where = data.path if isinstance(data, Blob) else ""
    if isinstance(error, ImageError):
        reason = error.reason
    else:
        reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
    text = str(error)
    return BadSample(reason, text if where in text else f"{where}: {text}")


def _has_end(file: BinaryIO) -> bool:
    start = file.read(12)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    if start.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" in tail
    if start.startswith(b"\x89PNG"):
        return b"IEND\xae\x42\x60\x82" in tail
    if start.startswith(b"RIFF"):
        return int.from_bytes(start[4:8], "little") + 8 <= size
    return start.startswith(b"GIF8") and tail.rstrip(b"\0").endswith(b"\x3b")
