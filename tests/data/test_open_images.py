"""An open PIL image is read as its file is, wherever one enters."""

from __future__ import annotations

import ast
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from support.icc import ADOBE_RGB, DISPLAY_P3, PROPHOTO, grey_profile, rgb_profile

import deepgen_jax
from deepgen_jax.data.images import decode_image, image_size, load_alpha, load_image
from deepgen_jax.data.vision_inputs import to_pixels
from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.image_codec import decode_png_base64
from deepgen_jax.serving.errors import APIError
from deepgen_jax.serving.pictures import base64_text, read_mask, read_picture

COLOURED = {
    "P3": rgb_profile(DISPLAY_P3, "srgb"),
    "Adobe": rgb_profile(ADOBE_RGB, 2.2),
    "Pro": rgb_profile(PROPHOTO, 1.8),
}
GREY = {"dark": grey_profile(1.0), "light": grey_profile(2.2)}
# Format -> modes that it stores.
MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "I;16", "1"),
    "TIFF": ("RGB", "RGBA", "L", "CMYK", "I;16", "F", "P"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
}


def stored(format: str, mode: str, orientation: int, profile: bytes | None, seed: int, width=64, height=32) -> bytes:
    """A file with noise in ``mode``."""
    rng = np.random.default_rng(seed)
    if mode in ("I;16", "F"):
        values = rng.integers(0, 65536, (height, width))
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
        image = image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)
    options: dict[str, Any] = {"icc_profile": profile} if profile else {}
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if mode == "P" and format == "PNG":
        options["transparency"] = 3
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@st.composite
def files(draw: st.DrawFn, formats=tuple(MODES)) -> bytes:
    format = draw(st.sampled_from(formats))
    mode = draw(st.sampled_from(MODES[format]))
    grey = mode in ("L", "LA", "I;16", "F", "1")
    profile = draw(st.none() | st.sampled_from(list((GREY if grey else COLOURED).values())))
    if mode == "CMYK":
        profile = None
    return stored(format, mode, draw(st.integers(1, 8)), profile, draw(st.integers(0, 99)))


@given(files())
def test_open_image_and_file_are_equal(data: bytes):
    expected = load_image(io.BytesIO(data))
    opened = Image.open(io.BytesIO(data))
    assert image_size(Image.open(io.BytesIO(data))) == expected.size
    for read in (load_image, decode_image):
        np.testing.assert_array_equal(np.asarray(read(opened)), np.asarray(expected))
        np.testing.assert_array_equal(np.asarray(read(io.BytesIO(data))), np.asarray(expected))
    # What was read once is plain: reading it again changes nothing.
    np.testing.assert_array_equal(np.asarray(load_image(expected)), np.asarray(expected))
    assert not expected.info
    assert not expected.getexif()
    np.testing.assert_array_equal(to_pixels(expected), np.asarray(expected, np.float32) / 255 * 2 - 1)


@pytest.fixture(scope="module")
def pipe(pipelines):
    return pipelines("sft")


@settings(max_examples=25)
@given(data=files())
def test_pipeline_reads_open_images_as_files(pipe, data: bytes):
    plain, opened = load_image(io.BytesIO(data)), Image.open(io.BytesIO(data))
    requests = pipe._requests(["a", "b"], [[opened], [plain, opened]], "", 0)
    (first,), (_, second) = requests.images
    for image in (first, second):
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(plain))


@pytest.mark.parametrize(("format", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("TIFF", "CMYK"), ("PNG", "I;16")])
def test_edits_of_open_images_are_those_of_files(pipe, format: str, mode: str):
    profile = {"RGB": COLOURED["P3"], "RGBA": COLOURED["Adobe"]}.get(mode)
    data = stored(format, mode, 6, profile, 1)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": 3}
    of_file = pipe("a fox", load_image(io.BytesIO(data)), **options).images[0]
    of_open = pipe("a fox", Image.open(io.BytesIO(data)), **options).images[0]
    assert of_open.size == of_file.size == (32, 64)  # of the upright picture
    np.testing.assert_array_equal(np.asarray(of_open), np.asarray(of_file))
    states = [
        pipe.hidden_states("a fox", [image]) for image in (load_image(io.BytesIO(data)), Image.open(io.BytesIO(data)))
    ]
    np.testing.assert_array_equal(*states)


def test_explanations_read_open_images_as_files(pipe):
    from deepgen_jax.evaluation.explain.heat_maps import encode, reference_latents

    data = stored("JPEG", "RGB", 8, COLOURED["Pro"], 2)
    plain, opened = load_image(io.BytesIO(data)), Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(reference_latents(pipe, [plain]), reference_latents(pipe, [opened]))
    expected, found = encode(pipe, "a fox", [plain]), encode(pipe, "a fox", [opened])
    np.testing.assert_array_equal(found.sequence, expected.sequence)
    assert found.words == expected.words


@given(files(formats=("PNG", "JPEG", "WEBP")))
def test_uploads_are_read_as_files(data: bytes):
    expected = np.asarray(load_image(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(read_picture(data, 10**6, "image")), expected)


@given(files(formats=("PNG",)))
def test_pictures_of_reward_requests_are_read_as_files(data: bytes):
    np.testing.assert_array_equal(decode_png_base64(base64_text(data)), np.asarray(load_image(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_with_their_pictures(orientation: int):
    """A mask and a picture of the same camera have the same orientation, and stay on top of each other."""
    data = stored("PNG", "RGBA", orientation, None, 5)
    picture = Image.open(io.BytesIO(data))
    alpha = load_alpha(picture)
    assert alpha is not None
    assert alpha.shape == np.asarray(load_image(picture)).shape[:2]
    mask = read_mask(data, load_image(picture).size, 10**6)
    np.testing.assert_array_equal(mask, alpha < 128)
    upright = Image.merge("RGBA", [Image.fromarray(x) for x in (alpha,) * 4])
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    np.testing.assert_array_equal(read_mask(buffer.getvalue(), upright.size, 10**6), mask)
    if orientation >= 5:
        with pytest.raises(APIError, match="send equal sizes"):
            read_mask(data, (64, 32), 10**6)


def test_the_editor_of_the_demo_reads_its_background_as_a_file():
    read_editor = pytest.importorskip("deepgen_jax.serving.demo.page").read_editor
    data = stored("PNG", "RGBA", 6, COLOURED["P3"], 4)
    picture, mask = read_editor({"background": Image.open(io.BytesIO(data)), "layers": [None], "composite": None})
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(load_image(io.BytesIO(data))))
    assert mask is None


def test_an_open_image_stays_as_it_was():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    opened = Image.open(buffer)
    with pytest.warns(UserWarning, match="more than one frame"):
        assert load_image(opened).getpixel((0, 0)) == (255, 0, 0)
    opened.seek(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(opened).getpixel((0, 0)) == (0, 0, 255)
    assert opened.tell() == 1


def test_a_truncated_open_image_is_one_error(pipe):
    data = stored("PNG", "RGB", 1, None, 6)
    with pytest.raises(DeepGenError, match="truncated or damaged"):
        pipe("a fox", Image.open(io.BytesIO(data[: len(data) // 2])), num_inference_steps=1)


def test_a_profile_for_another_mode_is_left_out(tmp_path: Path):
    image = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    image.save(tmp_path / "a.tif", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for source in (tmp_path / "a.tif", Image.open(tmp_path / "a.tif")):
        with pytest.warns(UserWarning, match="its colour profile is left out"):
            assert load_image(source).getpixel((0, 0)) == (0, 255, 255)


# Files that may open or convert images themselves, and why.
ALLOWED = {
    "data/images.py": "the decoder",
    "data/color_profiles.py": "a probe made of arrays",
    "inference/outputs.py": "verifies files that it wrote",
    "serving/pictures.py": "reads headers of uploads",
    "training/tracking.py": "pictures made by training",
}


def test_images_are_decoded_in_one_place():
    """``Image.open`` and ``convert("RGB")`` skip orientation, profile and transparency."""
    root = Path(deepgen_jax.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            opens = node.func.attr == "open" and getattr(node.func.value, "id", "") == "Image"
            converts = node.func.attr == "convert" and any(getattr(a, "value", "") == "RGB" for a in node.args)
            if opens or converts:
                found.add(path.relative_to(root).as_posix())
    assert found <= set(ALLOWED), sorted(found - set(ALLOWED))
