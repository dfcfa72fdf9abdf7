"""Colours of every kind of profile come out as littleCMS gives them; sRGB pictures keep their pixels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from support.icc import ADOBE_RGB, DISPLAY_P3, PROPHOTO, SRGB, grey_profile, rgb_profile, srgb_to_linear

from deepgen_jax.data.images import decode_image, load_image
from deepgen_jax.user_warnings import DeepGenWarning

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
PROFILES = {
    "Display P3": rgb_profile(DISPLAY_P3, "srgb"),
    "Adobe RGB": rgb_profile(ADOBE_RGB, 2.19921875),
    "ProPhoto": rgb_profile(PROPHOTO, 1.8),
    "linear sRGB": rgb_profile(SRGB, 1.0),
    "linear P3": rgb_profile(DISPLAY_P3, 1.0),
}
SRGB_PROFILES = {
    "littleCMS": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "table": rgb_profile(SRGB, "srgb"),
}


def by_littlecms(image: Image.Image, profile: bytes) -> np.ndarray:
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, opened, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    return np.asarray(converted)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "avif"])
@pytest.mark.parametrize("name", PROFILES)
def test_rgb_files(tmp_path: Path, name: str, suffix: str):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOURS).save(path, icc_profile=PROFILES[name])
    with Image.open(path) as opened:
        stored = opened.convert("RGB")
    expected = by_littlecms(stored, PROFILES[name])
    np.testing.assert_array_equal(np.asarray(load_image(path)), expected)
    np.testing.assert_array_equal(np.asarray(decode_image(path)), expected)
    assert np.abs(expected.astype(int) - np.asarray(stored)).mean() > 2


# Linear Display P3 to XYZ and XYZ to linear sRGB, both of white D65 (CSS Color 4).
P3_TO_XYZ = np.array([[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0, 0.04511, 1.04394]])
XYZ_TO_SRGB = np.array([[3.24097, -1.53738, -0.49861], [-0.96924, 1.87597, 0.04156], [0.05563, -0.20398, 1.05697]])


@pytest.mark.parametrize("colour", [(120, 180, 120), (200, 160, 90), (90, 90, 90)])
def test_values_by_the_definition_of_the_spaces(colour: tuple[int, int, int]):
    linear = XYZ_TO_SRGB @ P3_TO_XYZ @ srgb_to_linear(np.array(colour) / 255)
    expected = (1.055 * linear ** (1 / 2.4) - 0.055) * 255
    image = Image.new("RGB", (2, 2), colour)
    image.info["icc_profile"] = PROFILES["Display P3"]
    np.testing.assert_allclose(np.asarray(load_image(image))[0, 0], expected, atol=1)


@pytest.mark.parametrize("name", SRGB_PROFILES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_srgb_changes_no_pixel(name: str, mode: str):
    plain = Image.fromarray(COLOURS).convert(mode)
    tagged = plain.copy()
    tagged.info["icc_profile"] = SRGB_PROFILES[name]
    np.testing.assert_array_equal(np.asarray(load_image(tagged)), np.asarray(load_image(plain)))


@pytest.mark.parametrize("curve", [1.0, 1.8, 2.2])
def test_grey(tmp_path: Path, curve: float):
    profile = grey_profile(curve)
    Image.fromarray(GREYS).save(tmp_path / "a.png", icc_profile=profile)
    expected = by_littlecms(Image.fromarray(GREYS), profile)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), expected)
    with_alpha = Image.fromarray(GREYS).convert("LA")
    with_alpha.info["icc_profile"] = profile
    np.testing.assert_array_equal(np.asarray(load_image(with_alpha)), expected)


def test_sixteen_bit_linear_grey(tmp_path: Path):
    values = np.arange(0, 65536, 17, dtype=np.uint16).reshape(1, -1)
    Image.fromarray(values).save(tmp_path / "a.tif", icc_profile=grey_profile(1.0))
    v = values[0] / 65535
    expected = np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055) * 255
    np.testing.assert_allclose(np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0], expected, atol=0.51)


def test_grey_with_a_profile_of_colours():
    image = Image.fromarray(GREYS)
    image.info["icc_profile"] = PROFILES["Adobe RGB"]
    expected = by_littlecms(image.convert("RGB"), PROFILES["Adobe RGB"])
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


def test_transparency_is_laid_over_white_after_the_conversion():
    image = Image.new("RGBA", (4, 4), (20, 200, 40, 128))
    image.info["icc_profile"] = PROFILES["Display P3"]
    opaque = by_littlecms(Image.new("RGB", (4, 4), (20, 200, 40)), PROFILES["Display P3"])
    expected = opaque * (128 / 255) + 255 * (127 / 255)
    np.testing.assert_allclose(np.asarray(load_image(image)), expected, atol=1)


def test_a_palette_goes_through_the_profile():
    image = Image.fromarray(COLOURS).quantize(16)
    image.info["icc_profile"] = PROFILES["ProPhoto"]
    expected = by_littlecms(image.convert("RGB"), PROFILES["ProPhoto"])
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


def test_large_pictures_are_converted_alike(monkeypatch: pytest.MonkeyPatch):
    images = []
    for mode, profile in (("RGB", PROFILES["Adobe RGB"]), ("RGBA", PROFILES["ProPhoto"]), ("I", b""), ("P", b"")):
        image = Image.fromarray(COLOURS).convert("L").convert("I") if mode == "I" else Image.fromarray(COLOURS)
        image = image.convert("RGB").quantize(20) if mode == "P" else image.convert(mode)
        if mode == "P":
            image.info["transparency"] = 3
        if profile:
            image.info["icc_profile"] = profile
        images.append(image)
    whole = [np.asarray(load_image(image)) for image in images]
    monkeypatch.setattr("deepgen_jax.data.images._BAND_PIXELS", 170)
    for image, expected in zip(images, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


@given(st.data())
def test_broken_profiles_fall_back_with_a_notice(data: st.DataObject):
    profile = data.draw(st.sampled_from([PROFILES["Adobe RGB"], grey_profile(2.2)]))
    broken = bytearray(profile[: data.draw(st.integers(1, len(profile)))])
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), max_size=8)):
        broken[place] = data.draw(st.integers(0, 255))
    image = Image.fromarray(COLOURS)
    image.info["icc_profile"] = bytes(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = np.asarray(load_image(image))
    assert pixels.shape == COLOURS.shape
    if any(issubclass(warning.category, DeepGenWarning) for warning in caught):
        np.testing.assert_array_equal(pixels, COLOURS)
    else:
        # Whole enough for littleCMS.
        assert np.abs(pixels.astype(int) - by_littlecms(image, bytes(broken))).max() <= 1


def spaceless_profile() -> bytes:
    """The signature of its colour space is no text."""
    profile = bytearray(PROFILES["Adobe RGB"])
    profile[16:20] = b"\x80GB "
    return bytes(profile)


@pytest.mark.parametrize("profile", [b"x", "text", grey_profile(2.2), 7, spaceless_profile()])
def test_a_profile_of_no_use_is_named(profile: object):
    image = Image.fromarray(COLOURS)
    image.info["icc_profile"] = profile
    with pytest.warns(DeepGenWarning, match="its colour profile is left out"):
        pixels = load_image(image)
    np.testing.assert_array_equal(np.asarray(pixels), COLOURS)
