"""Size rules and resizing against the golden cases."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from deepgen_jax.data.transforms import resize, target_size
from deepgen_jax.errors import DeepGenError

MODES = ["fix_pixels", "dynamic"]


@pytest.mark.parametrize("mode", MODES)
def test_target_size_matches_golden(cases, mode):
    for case in cases["resize"]:
        assert list(target_size(case["w"], case["h"], case["size"], mode)) == case[mode], case


@pytest.mark.parametrize("mode", MODES)
def test_resized_pixels_match_golden(goldens, mode):
    golden = goldens("data")
    resized = resize(Image.fromarray(golden["image"]), 64, mode)
    np.testing.assert_array_equal(np.asarray(resized), golden[f"{mode}64/uint8"])


sides = st.integers(1, 5000)
sizes = st.integers(1, 40).map(lambda n: 32 * n)


@given(width=sides, height=sides, image_size=sizes, mode=st.sampled_from(MODES))
@example(width=3141, height=3141, image_size=480, mode="dynamic")  # 3141 * (480 / 3141) > 480 in doubles
def test_sides_are_whole_units_and_turn_with_the_image(width, height, image_size, mode):
    target = target_size(width, height, image_size, mode)
    assert all(side % 32 == 0 and side >= 32 for side in target)
    assert target_size(height, width, image_size, mode) == target[::-1]


@given(width=sides, height=sides, image_size=sizes)
def test_dynamic_never_exceeds_the_edge_nor_enlarges_by_a_unit(width, height, image_size):
    target = target_size(width, height, image_size, "dynamic")
    assert max(target) <= max(image_size, 32)
    assert all(new < old + 32 for new, old in zip(target, (width, height), strict=True))


@given(width=sides, height=sides, image_size=sizes)
def test_fix_pixels_keeps_the_area_up_to_rounding_up(width, height, image_size):
    scale = image_size / (width * height) ** 0.5
    for new, old in zip(target_size(width, height, image_size, "fix_pixels"), (width, height), strict=True):
        assert old * scale - 1e-6 <= new < old * scale + 32 + 1e-6


def test_squares():
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste("blue", (10, 0, 20, 10))
    cropped = resize(picture, 64, "crop2square")
    assert cropped.size == (64, 64) == resize(picture, 64, "resize2square").size
    assert cropped.getcolors() == [(64 * 64, (0, 0, 255))]
    np.testing.assert_array_equal(resize(picture, 64, "resize2square"), picture.resize((64, 64)))


def test_a_bucket_takes_the_place_of_the_target_size():
    picture = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3))
    np.testing.assert_array_equal(resize(picture, 64, "fix_pixels", (96, 64)), picture.resize((96, 64)))


def test_bad_input_is_refused():
    with pytest.raises(DeepGenError, match="crop"):
        target_size(64, 64, 64, "crop")
    with pytest.raises(DeepGenError, match="0x64"):
        target_size(0, 64, 64, "dynamic")
    with pytest.raises(DeepGenError, match="multiple of 32"):
        target_size(64, 64, 500, "dynamic")


def test_host_side_modules_do_not_load_jax():
    code = (
        "import sys, deepgen_jax.data.transforms, deepgen_jax.rewards.ocr, deepgen_jax.rewards.preference;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
