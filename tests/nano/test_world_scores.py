"""Scorers: right pictures pass, also blurred and noisy ones; wrong ones do not."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from deepgen_jax.nano.samples import make_sample, render
from deepgen_jax.nano.world import wrong
from deepgen_jax.nano.world.find import look
from deepgen_jax.nano.world.pictures import Sample
from deepgen_jax.nano.world.scene import Scene, Thing
from deepgen_jax.nano.world.score import Score, score
from deepgen_jax.nano.world.truth import EDIT_SKILLS, SKILLS, Truth, Wanted
from deepgen_jax.nano.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES, SIZES

#: Samples of each skill: few by default, some hundreds where there is time.
FEW, MANY = 15, 300


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, deviation, (*image.size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


SPOILED = {
    "sharp": lambda image: image,
    "jpeg": lambda image: jpeg(image, 60),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.2)),
    "noisy": lambda image: noisy(image, 15),
    "all": lambda image: jpeg(noisy(image.filter(ImageFilter.GaussianBlur(0.8)), 10), 75),
}


def scored(scene: Scene, sample: Sample, spoil: str = "sharp", size: int = 96) -> Score:
    """Words are taken to be read rightly; tests/rewards/test_world_reward.py reads them."""
    picture = np.asarray(SPOILED[spoil](render(scene, size)))
    return score(picture, sample.truth, lambda _: [scene.sign.word] if scene.sign else [])


def check_right(spoil: str, count: int, least: float) -> None:
    for skill in SKILLS:
        samples = [make_sample("held_out", skill, seed=0, index=index) for index in range(count)]
        results = [scored(sample.scene, sample, spoil) for sample in samples]
        right = np.mean([result.done and result.kept for result in results])
        assert right >= least, (skill, spoil, right)
        assert all((result.share == 1) == (result.done and result.kept) for result in results)


def check_wrong(count: int, most: float) -> None:
    for skill in SKILLS:
        samples = [make_sample("held_out", skill, seed=0, index=index) for index in range(count)]
        rng = random.Random(skill)
        undone = [scored(wrong.undone(rng, sample), sample) for sample in samples]
        assert np.mean([result.done for result in undone]) <= most, skill
        crowded = [scored(wrong.crowded(rng, sample), sample) for sample in samples]
        assert np.mean([result.done and result.kept for result in crowded]) <= most, skill
        if skill in EDIT_SKILLS:
            unkept = [scored(wrong.unkept(rng, sample), sample) for sample in samples]
            assert np.mean([result.kept for result in unkept]) <= most, skill
            assert np.mean([result.done for result in unkept]) >= 1 - most, skill


@pytest.mark.parametrize("spoil", SPOILED)
def test_right_pictures_pass(spoil):
    check_right(spoil, FEW, 1.0 if spoil == "sharp" else 0.95)


def test_wrong_pictures_do_not():
    check_wrong(FEW, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", SPOILED)
def test_hundreds_of_right_pictures_pass(spoil):
    check_right(spoil, MANY, 0.99 if spoil == "sharp" else 0.95)


@pytest.mark.slow
def test_hundreds_of_wrong_pictures_do_not():
    check_wrong(MANY, 0.02)


@pytest.mark.parametrize("size", [64, 128])
def test_every_thing_is_found_at_other_sizes(size):
    for background in BACKGROUNDS:
        for number, shape in enumerate(SHAPES):
            for extent in SIZES:
                colour = list(COLOURS)[(number + len(extent)) % len(COLOURS)]
                scene = Scene(background, (Thing(colour, shape, extent, 0.4, 0.6),))
                view = look(np.asarray(render(scene, size)))
                (found,) = view.things
                assert (view.background, found.colour, found.shape, found.size) == (background, colour, shape, extent)
                assert abs(found.x - 0.4) < 0.02
                assert abs(found.y - 0.6) < 0.02
                assert view.sign is None


def test_colours_and_shapes_that_are_none_have_no_name():
    picture = np.full((96, 96, 3), 250, np.uint8)
    picture[30:60, 10:86] = (0, 255, 255)
    (bar,) = look(picture).things
    assert bar.shape is None
    assert bar.colour is None
    picture[30:60, 10:86] = COLOURS["red"]
    picture[30:60, 48:86] = COLOURS["green"]
    (flag,) = look(picture).things
    assert flag.colour is None
    assert look(np.full((96, 96, 3), (200, 90, 60), np.uint8)).background is None


def test_empty_and_random_pictures_fail_every_prompt():
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    for skill in SKILLS:
        sample = make_sample("held_out", skill, seed=0, index=0)
        assert not scored_pixels(noise, sample.truth).done
        if any(not wanted.kept for wanted in sample.truth.things):
            assert not scored_pixels(np.full((96, 96, 3), 250, np.uint8), sample.truth).done


def scored_pixels(pixels: np.ndarray, truth: Truth) -> Score:
    return score(pixels, truth, lambda _: [])


def test_an_edit_at_the_wrong_thing_is_neither_done_nor_kept():
    red, blue = Thing("red", "circle", "small", 0.25, 0.25), Thing("blue", "square", "small", 0.75, 0.75)
    truth = Truth(
        "recolour", (Wanted("green", "circle", "small", at=(0.25, 0.25)), Wanted.where_it_is(blue, kept=True)),
        background="white", gone=(Wanted.where_it_is(red),),
    )  # fmt: skip
    green = Thing("green", "square", "small", 0.75, 0.75)
    result = scored_pixels(np.asarray(render(Scene("white", (red, green)), 96)), truth)
    assert (result.done, result.kept) == (False, False)
    # A wrong new colour is no harm to the rest.
    pink = Thing("pink", "circle", "small", 0.25, 0.25)
    result = scored_pixels(np.asarray(render(Scene("white", (pink, blue)), 96)), truth)
    assert (result.done, result.kept) == (False, True)


def test_words_are_compared_without_case_as_the_only_text():
    sample = make_sample("held_out", "text", seed=0, index=0)
    picture = np.asarray(render(sample.scene, 96))
    word = sample.truth.word
    right, not_right = ([word], [word.lower()], [word[:1], word[1:]]), ([word, "X"], [word[1:]], [])
    for lines, done in [*((lines, True) for lines in right), *((lines, False) for lines in not_right)]:
        assert score(picture, sample.truth, lambda _, lines=lines: lines).done == done
