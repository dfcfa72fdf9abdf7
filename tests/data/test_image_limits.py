"""Pictures made to exhaust memory, to start other programs, or broken part of the way."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepgen_jax.data.images import ImageError, decode_image, image_size, load_image
from deepgen_jax.errors import DeepGenError


def png(path: Path, width: int, height: int, bits: int = 8, colour: int = 2) -> Path:
    """All zeros, so that any size is a small file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + width * bits // 8 * {0: 1, 2: 3, 6: 4}[colour])
    packer, data = zlib.compressobj(), []
    for _ in range(height):
        data.append(packer.compress(row))
    data.append(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(data)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(("width", "height"), [(1, 60_000_000), (60_000_000, 1), (2, 5_000_000)])
def test_long_and_thin_pictures_are_refused(tmp_path: Path, width: int, height: int):
    # Rows cost memory besides their pixels: 60 million took 2.9 GB.
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path = tmp_path / "thin.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4))
    for read in (load_image, decode_image, image_size):
        with pytest.raises(ImageError, match="too large to decode safely") as caught:
            read(path)
        assert caught.value.reason == "too many pixels"


def test_panoramas_are_read(tmp_path: Path):
    assert load_image(png(tmp_path / "a.png", 70_000, 16)).size == (70_000, 16)


@pytest.mark.parametrize(("bits", "colour"), [(8, 6), (16, 0)])
def test_memory_at_the_limit(tmp_path: Path, bits: int, colour: int):
    path = png(tmp_path / "a.png", 8_000, 8_000, bits, colour)
    code = (
        "import resource, sys; from deepgen_jax.data.images import decode_image; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; decode_image(sys.argv[1]); "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    # MB: the decoded picture and its RGB form, four bytes a pixel each, and some.
    assert int(run.stdout) < 700


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "PSD", "SGI"])
def test_other_formats_are_not_opened(tmp_path: Path, kind: str):
    path = tmp_path / "picture.png"
    if kind == "PSD":
        path.write_bytes(b"8BPS\0\1" + bytes(200))
    else:
        Image.new("RGB", (16, 16)).save(path, kind)
    with pytest.raises(DeepGenError, match=r"picture.png is not an image of a supported format \(JPEG, PNG, .*PPM\)"):
        load_image(path)


def test_pipes_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DeepGenError, match="no regular file"):
        load_image(tmp_path / "a.png")


def film(kind: str) -> bytes:
    rng = np.random.default_rng(1)
    frames = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


FILMS = {kind: film(kind) for kind in ("GIF", "WEBP", "PNG", "TIFF")}


@pytest.mark.filterwarnings("ignore::deepgen_jax.user_warnings.DeepGenWarning")
@given(kind=st.sampled_from(list(FILMS)), data=st.data())
def test_films_broken_at_a_frame(kind: str, data: st.DataObject):
    """The first frame, if it is whole; else one error."""
    whole = FILMS[kind]
    broken = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), max_size=5)):
        broken[place] = data.draw(st.integers(0, 255))
    for read in (load_image, decode_image):
        with contextlib.suppress(ImageError):
            assert read(io.BytesIO(bytes(broken)), max_pixels=10**6).mode == "RGB"


@pytest.mark.filterwarnings("ignore::deepgen_jax.user_warnings.DeepGenWarning")
def test_a_film_cut_after_its_first_frame():
    first = np.asarray(load_image(io.BytesIO(FILMS["GIF"])))
    # The second image block starts after the first; cut within it.
    second = FILMS["GIF"].index(b"\x21\xf9\x04", FILMS["GIF"].index(b"\x21\xf9\x04") + 1) + 60
    for end in (second, second + 40):
        np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(FILMS["GIF"][:end]))), first)
        broken = FILMS["GIF"][:end] + b"\xff" * 50
        np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(broken))), first)
