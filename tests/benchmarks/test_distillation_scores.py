"""Scores of few-step pictures: true scenes are right and spread out, blur and constant places are seen."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from deepgen_jax.errors import DeepGenError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("distillation", FOLDER / "distillation.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["distillation"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("distillation", None)


@pytest.fixture(scope="module")
def scenes(bench):
    samples, opened = bench.captioned(12, "anywhere"), bench.open_samples(8, "anywhere")
    draw = [np.asarray(bench.render(sample.scene, bench.SIZE)) for sample in [*samples, *opened]]
    return samples, draw[:12], opened, draw[12:]


def test_true_scenes(bench, scenes):
    scores = bench.measure(*scenes)
    assert scores.right[0] == 1
    assert all(scores.pictures)
    assert len(scores.pictures) == 12 + 8 * len(bench.OPEN)
    assert scores.doubled[0] == scores.unclear[0] == 0
    assert scores.right[1] < 1
    assert scores.outline[0] < 1.5
    assert 0.15 < scores.spread[0] < 0.35
    assert scores.sizes[0] > 0.5
    assert scores.backgrounds[0] > 1


def test_same_places_have_no_spread(bench, scenes):
    samples, images, opened, shown = scenes
    same = [shown[k // 8 * 8] for k in range(len(shown))]
    scores = bench.measure(samples, images, opened, same)
    assert scores.right[0] == 1
    assert scores.spread == pytest.approx((0, 0, 0), abs=1e-6)
    assert scores.sizes[0] == scores.backgrounds[0] == 0


def test_blurred_and_doubled_pictures(bench, scenes):
    samples, images, opened, shown = scenes
    blurred = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(3))) for image in images]
    assert bench.measure(samples, blurred, opened, shown).outline[0] > 4
    other = [np.asarray(bench.render(sample.scene, bench.SIZE)) for sample in bench.captioned(24, "anywhere")[12:]]
    # Two pictures laid over each other.
    mixed = [np.where((a == a[0, 0]).all(-1, keepdims=True), b, a) for a, b in zip(images, other, strict=True)]
    scores = bench.measure(samples, mixed, opened, shown)
    assert np.mean(scores.pictures[:12]) < 0.5
    assert all(scores.pictures[12:])
    assert scores.doubled[0] > 0.3


def test_results_are_added_to_and_written_into_a_page(bench, scenes, tmp_path):
    samples, images, opened, shown = scenes
    scores = bench.measure(samples, images, opened, shown)
    bench.Results(tmp_path / "out").add(bench.Setting(bench.WORLD, 0), scores, shown)
    bench.Results(tmp_path / "out").add(bench.Setting("student", 4), scores, shown)
    results = bench.Results(tmp_path / "out")
    assert [setting.name for setting, _ in results.rows] == [bench.WORLD, "student"]
    assert results.rows[1][1].right == list(scores.right)
    page, begin, end = tmp_path / "page.md", bench.BEGIN.format("places"), bench.END.format("places")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    bench.write_page(results, page, "places")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| student | 4 | 100.0 (" in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "distillation_places.png", "distillation_places_scores.png",
    }  # fmt: skip
    page.write_text("no place", encoding="utf-8")
    with pytest.raises(DeepGenError, match="has no place for the table"):
        bench.write_page(results, page, "places")


def test_points_are_those_of_the_same_pictures(bench, scenes, tmp_path):
    scores = bench.measure(*scenes)
    count = len(scores.pictures)
    teacher = replace(scores, pictures=tuple(k % 2 == 0 for k in range(count)))
    student = replace(scores, pictures=tuple(k % 2 == 0 and k > 5 for k in range(count)))
    results = bench.Results(tmp_path / "out")
    results.add(bench.Setting(bench.WORLD, 0), scores, scenes[3])
    results.add(bench.Setting("student", 4), student, scenes[3])
    results.add(bench.Setting("student", 50), teacher, scenes[3])
    value, low, high = results.points(bench.Setting("student", 4))
    assert value == pytest.approx(-3 / count)
    assert low < value < high <= 0.02
    assert results.points(bench.Setting("student", 50)) is None
    assert results.points(bench.Setting(bench.WORLD, 0)) is None
    assert any("-6.8 (" in line for line in bench.table(results))
    results.add(bench.Setting("other", 2), replace(scores, pictures=(True,)), scenes[3])
    with pytest.raises(DeepGenError, match="other --prompts or --seeds"):
        results.points(bench.Setting("other", 2))


def test_models_are_parsed(bench):
    assert bench.parse_models(["a=out/x@50,4", "b=y"]) == [("a", "out/x", (50, 4)), ("b", "y", ())]
    for bad in ("x", "=x", "a=", "a=x@", "a=x@4,z", "a=x@0"):
        with pytest.raises(DeepGenError, match="NAME=FOLDER@STEPS"):
            bench.parse_models([bad])
