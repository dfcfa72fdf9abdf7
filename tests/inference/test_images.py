"""Images in every odd mode, made on the fly."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from deepgen_jax.data.images import image_size, load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.image_inputs import fit_reference, reference_size, round_size
from deepgen_jax.user_warnings import DeepGenWarning


def corners(image: Image.Image) -> list[list[int]]:
    """Top-left, top-right, bottom-left and bottom-right pixels."""
    pixels = np.asarray(image).astype(int)
    return [pixels[y, x].tolist() for y in (0, -1) for x in (0, -1)]


def quadrants(width: int = 8, height: int = 6) -> Image.Image:
    """Red, green / blue, white quadrants."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


R, G, B, W = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
# EXIF orientation -> corners of the upright picture when the stored one is `quadrants`.
UPRIGHT = {
    1: [R, G, B, W],
    2: [G, R, W, B],
    3: [W, B, G, R],
    4: [B, W, R, G],
    5: [R, B, G, W],
    6: [B, R, W, G],
    7: [W, G, B, R],
    8: [G, W, R, B],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_exif_rotation(tmp_path: Path, orientation: int, suffix: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    quadrants().save(path, exif=exif, **options)
    image = load_image(path)
    assert corners(image) == UPRIGHT[orientation]
    assert image.size == image_size(path) == ((6, 8) if orientation >= 5 else (8, 6))
    assert load_image(image).size == image.size  # turned once, not again
    with Image.open(path) as opened:
        assert corners(load_image(opened)) == UPRIGHT[orientation]


def test_unreadable_exif_is_no_error(tmp_path: Path):
    quadrants().save(tmp_path / "a.png", exif=b"Exif\x00\x00garbage")
    assert corners(load_image(tmp_path / "a.png")) == UPRIGHT[1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "PA", "P", "L+tRNS", "RGB+tRNS", "1+tRNS"])
def test_transparency_over_white(tmp_path: Path, mode: str):
    """A black picture whose left half is transparent: white and black."""
    if mode.endswith("tRNS"):
        base = mode.split("+")[0]
        image = Image.new(base, (4, 4), 0)
        image.paste(Image.new(base, (2, 4), {"L": 9, "RGB": (9, 9, 9), "1": 1}[base]), (0, 0))
        image.save(tmp_path / "a.png", transparency={"L": 9, "RGB": (9, 9, 9), "1": 1}[base])
        source: Path | Image.Image = tmp_path / "a.png"
    elif mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.paste(1, (0, 0, 2, 4))
        image.save(tmp_path / "a.gif", transparency=1)
        source = tmp_path / "a.gif"
    else:
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
        image.paste((0, 0, 0, 0), (0, 0, 2, 4))
        source = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert corners(load_image(source)) == [W, [0, 0, 0], W, [0, 0, 0]]


def test_half_transparent_red_is_pink():
    assert corners(load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))[0] == pytest.approx([255, 127, 127], abs=1)


def test_cmyk(tmp_path: Path):
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for name in ("a.jpg", "a.tif"):
        image.save(tmp_path / name)
        assert corners(load_image(tmp_path / name))[0] == pytest.approx([0, 255, 255], abs=3)


def test_cmyk_with_a_profile_that_is_no_cmyk_profile():
    image = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    for profile in (b"rubbish", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        image.info["icc_profile"] = profile
        assert corners(load_image(image))[0] == [0, 255, 255]


RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, name: str):
    path = tmp_path / name
    if name.startswith("big"):
        image = Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes())
        exif = Image.Exif()
        exif[0x0112] = 3
        image.save(path, exif=exif)
        expected = np.arange(256).reshape(16, 16)[::-1, ::-1]
    else:
        Image.fromarray(RAMP).save(path)
        expected = np.arange(256).reshape(16, 16)
    pixels = np.asarray(load_image(path)).astype(int)
    assert np.abs(pixels - expected[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 65535]], np.int32), [0, 0, 255]),
        (np.array([[0, 100, 200]], np.int32), [0, 100, 200]),
        (np.array([[0, 50_000, 100_000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 99.6, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-5.0, np.nan, 65535.0]], np.float32), [0, 0, 255]),
        (np.array([[0.0, 0.0, 0.0]], np.float32), [0, 0, 0]),
    ],
)
def test_wide_grey_is_scaled(tmp_path: Path, values: np.ndarray, expected: list[int]):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


def test_other_modes():
    for mode in ("L", "1", "HSV", "YCbCr", "P", "RGBX"):
        image = load_image(quadrants().convert(mode))
        assert image.mode == "RGB"
        assert corners(image)[3] == pytest.approx(W, abs=1)
    with pytest.raises(DeepGenError, match="colour mode La, not supported"):
        load_image(Image.new("La", (2, 2)))


def test_sixteen_bit_rgb_png(tmp_path: Path):
    """Pillow cannot write these, so the file is put together here."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\x00" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[[255, 0, 128], [0, 255, 1]]]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_first_frame_with_a_notice(tmp_path: Path, suffix: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / f"film{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == ".webp" else {}))
    with pytest.warns(DeepGenWarning, match=f"film{suffix} has more than one frame"):
        image = load_image(path)
    assert corners(image)[0] == pytest.approx(R, abs=2)


def test_a_phone_photograph_with_a_preview_is_no_animation(tmp_path: Path):
    quadrants(16, 16).save(tmp_path / "a.mpo", save_all=True, append_images=[quadrants(16, 16)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / "a.mpo")


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG" if "jpeg" in kind else "PNG")
    data = buffer.getvalue()
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("truncated"):
        path.write_bytes(data[: len(data) // 2])
    elif kind == "header only":
        path.write_bytes(data[:40])
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image at all")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        ("zero bytes", "empty"),
        ("text", "not an image"),
        ("truncated png", "truncated or damaged"),
        ("truncated jpeg", "truncated or damaged"),
        ("header only", "truncated or damaged|not an image"),
    ],
)
def test_bad_files(tmp_path: Path, kind: str, message: str):
    path = damaged(tmp_path, kind)
    with pytest.raises(DeepGenError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few kilobytes whose header announces width x height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(height * (1 + (width + 7) // 8))) if width * height < 2e8 else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 50_000])
def test_decompression_bombs_are_refused(tmp_path: Path, side: int):
    path = bomb(tmp_path / "bomb.png", side, side)
    for read in (load_image, image_size):
        with pytest.raises(DeepGenError, match=r"bomb.png is too large .* 64 megapixels.*raise the limit"):
            read(path)


def test_the_limit_can_be_raised_and_lowered(tmp_path: Path):
    path = bomb(tmp_path / "large.png", 8_400, 8_000)
    assert load_image(path, max_pixels=70 * 10**6).size == (8_400, 8_000)
    with pytest.raises(DeepGenError, match="8x6; the limit is 4e-05 megapixels"):
        load_image(quadrants(), max_pixels=40)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (512, 512)),
        ((64, 96), (64, 96)),
        ((608, 448), (608, 448)),  # a training size: a little above the area, because sides are rounded up
        ((4000, 3000), (608, 448)),
        ((1024, 1024), (512, 512)),
        ((500, 400), (512, 416)),
        ((1, 1), (32, 32)),
        ((33, 300), (32, 288)),
    ],
)
def test_reference_sizes(size: tuple[int, int], expected: tuple[int, int]):
    assert reference_size(*size) == expected
    assert reference_size(*expected) == expected


def test_fit_reference_reports_only_changes():
    small = quadrants(64, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_reference(small) is small
    with pytest.warns(DeepGenWarning, match=r"a.png is resized from 70x40 to 64x32: sides are multiples of 32$"):
        assert fit_reference(quadrants(70, 40), name="a.png").size == (64, 32)
    with pytest.warns(DeepGenWarning, match="the area is at most about 2048 pixels"):
        assert fit_reference(quadrants(128, 64), max_pixels=2048).size == (64, 32)


def test_round_size():
    assert round_size(512, 768) == (512, 768)
    with pytest.warns(DeepGenWarning, match="500x770 is rounded to 512x768"):
        assert round_size(500, 770) == (512, 768)
    with pytest.warns(DeepGenWarning):
        assert round_size(1, 48) == (32, 64)
    with pytest.raises(DeepGenError, match="500x770 is not made of multiples of 32; the nearest is 512x768"):
        round_size(500, 770, strict=True)
    for bad in ((0, 32), (32, -32)):
        with pytest.raises(DeepGenError, match="not positive"):
            round_size(*bad)
