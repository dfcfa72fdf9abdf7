"""Planning and batching, with a stand-in for the pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fake_pipeline import FakePipeline, check_prompt

from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.batch import Request, Settings, batch_sizes, plan, render
from deepgen_jax.inference.prompts import Record
from deepgen_jax.user_warnings import DeepGenWarning

SETTINGS = Settings(side=64, max_reference_pixels=64 * 64, steps=3)


def record(index: int, prompt: str = "a cat", **fields: object) -> Record:
    return Record(index=index, line=index + 1, prompt=prompt, **fields)  # type: ignore[arg-type]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, size in zip(paths, ((64, 32), (32, 64), (32, 64)), strict=True):
        Image.new("RGB", size, "red").save(path)
    return paths


def test_plan_names_seeds_and_sizes():
    named = record(4, name="x", width=32, height=96, steps=9, guidance=1.5)
    records = [record(0), record(3, num_images=3, seed=7), named]
    requests, failures = plan(records, dataclasses.replace(SETTINGS, seed=5, negative_prompt="ugly"), check_prompt)
    assert not failures
    assert [(r.file, r.seed) for r in requests] == [
        ("00000.png", 5), ("00003_0.png", 7), ("00003_1.png", 8), ("00003_2.png", 9), ("x.png", 5)]  # fmt: skip
    assert requests[0].layout == (64, 64, 3, 4.0, "euler", ())
    assert requests[4].layout == (32, 96, 9, 1.5, "euler", ())
    assert {r.negative_prompt for r in requests} == {"ugly"}
    assert plan([record(0, negative_prompt="")], SETTINGS, check_prompt)[0][0].negative_prompt == ""
    with pytest.warns(DeepGenWarning, match="a negative prompt has no effect at guidance 1"):
        (request,), _ = plan([record(0, guidance=1, negative_prompt="word " * 31)], SETTINGS, check_prompt)
    assert request.negative_prompt == ""


def test_plan_takes_the_size_from_the_first_reference(pictures: list[Path]):
    requests, _ = plan([record(0, images=tuple(pictures[:2]))], SETTINGS, check_prompt)
    assert (requests[0].width, requests[0].height) == (64, 32)
    assert requests[0].reference_sizes == ((64, 32), (32, 64))
    given = dataclasses.replace(SETTINGS, width=96, height=96, images=(pictures[2],))
    requests, _ = plan([record(0)], given, check_prompt)
    assert (requests[0].width, requests[0].height) == (96, 96)
    assert requests[0].images == (pictures[2],)


def test_plan_reports_records_that_cannot_be_used(tmp_path: Path, pictures: list[Path]):
    (tmp_path / "empty.png").write_bytes(b"")
    long = "word " * 31
    records = [
        record(0, long),
        record(1, negative_prompt=long),
        record(2, images=(tmp_path / "none.png",)),
        record(3, images=(tmp_path / "empty.png",)),
        record(4, seed=2**32 - 1, num_images=2),
        record(5, name="X"),
        record(6, name="x"),
        record(7, width=33, height=64),
        record(8, name="x_1"),
        record(9, name="x_0", num_images=2),
    ]
    strict = dataclasses.replace(SETTINGS, strict_size=True)
    requests, failures = plan(records, strict, check_prompt, "p.jsonl")
    assert [r.file for r in requests] == ["X.png", "x_1.png", "x_0_0.png", "x_0_1.png"]
    assert [str(f) for f in failures] == [
        "p.jsonl:1: the prompt is 31 tokens long, the model reads 30; shorten it",
        "p.jsonl:2: negative prompt: the prompt is 31 tokens long, the model reads 30; shorten it",
        f"p.jsonl:3: image {tmp_path / 'none.png'} does not exist; check the path",
        f"p.jsonl:4: image {tmp_path / 'empty.png'} is empty (0 bytes); fetch or save it again",
        "p.jsonl:5: seed 4294967295 and 2 images go beyond the largest seed 4294967295; use a smaller seed",
        "p.jsonl:7: its image x.png is also that of p.jsonl:6; give it another id",
        "p.jsonl:8: image size 33x64 is not made of multiples of 32; the nearest is 32x64",
    ]
    editing = dataclasses.replace(SETTINGS, needs_image=True)
    requests, failures = plan([record(0), record(1, images=(pictures[0],))], editing, check_prompt, "p.txt")
    assert [r.file for r in requests] == ["00001.png"]
    assert "no image to edit" in failures[0].reason


def test_prompts_are_checked_with_the_size_of_their_references(pictures: list[Path]):
    seen = []
    plan([record(0), record(1, images=(pictures[0],))], SETTINGS, lambda text, sizes: seen.append((text, sizes)))
    assert seen == [("a cat", None), ("", None), ("a cat", ((64, 32),)), ("", ((64, 32),))]


def rendered(pipe: FakePipeline, requests: list[Request], batch_size: int) -> dict[str, np.ndarray | DeepGenError]:
    batches = render(pipe, requests, batch_sizes(requests, batch_size), SETTINGS)
    return {
        request.file: image if isinstance(image, DeepGenError) else np.asarray(image)
        for batch in batches
        for request, image in batch
    }


def test_batches_have_one_shape_a_layout():
    records = [record(i, f"prompt {i}", **({"width": 32, "height": 32} if i % 3 == 0 else {})) for i in range(10)]
    requests, _ = plan(records, SETTINGS, check_prompt)
    pipe = FakePipeline()
    images = rendered(pipe, requests, batch_size=4)
    assert [(call["width"], len(call["prompt"])) for call in pipe.calls] == [(32, 4), (64, 4), (64, 4)]
    assert pipe.calls[2]["prompt"] == ["prompt 7", "prompt 8", "prompt 8", "prompt 8"]
    alone = rendered(FakePipeline(), requests, batch_size=1)
    assert list(images) == [f"{i:05d}.png" for i in (0, 3, 6, 9, 1, 2, 4, 5, 7, 8)]
    for file, image in images.items():
        np.testing.assert_array_equal(image, alone[file])


def test_a_short_plan_makes_a_short_batch_and_a_resumed_one_the_planned_batch():
    requests, _ = plan([record(i) for i in range(3)], SETTINGS, check_prompt)
    pipe = FakePipeline()
    rendered(pipe, requests, batch_size=8)
    list(render(pipe, requests[2:], batch_sizes(requests, 2), SETTINGS))
    assert [len(call["prompt"]) for call in pipe.calls] == [3, 2]


def test_references_are_read_and_fitted_once_a_batch(tmp_path: Path, pictures: list[Path]):
    large = tmp_path / "large.png"
    Image.new("RGB", (256, 256)).save(large)
    records = [record(i, images=(large, pictures[0])) for i in range(2)] + [record(2, images=(pictures[1],))]
    requests, _ = plan(records, SETTINGS, check_prompt)
    pipe = FakePipeline()
    with pytest.warns(DeepGenWarning, match=r"large.png is resized from 256x256 to 64x64"):
        rendered(pipe, requests, batch_size=4)
    assert [[[ref.size for ref in refs] for refs in call["image"]] for call in pipe.calls] == [
        [[(64, 64), (64, 32)]] * 2,
        [[(32, 64)]],
    ]
    first, second = pipe.calls[0]["image"]
    assert first[0] is second[0]


def test_a_damaged_reference_fails_alone(tmp_path: Path, pictures: list[Path]):
    truncated = tmp_path / "truncated.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:3000])
    records = [record(i, images=(path,)) for i, path in enumerate([pictures[1], truncated, pictures[2]])]
    requests, failures = plan(records, SETTINGS, check_prompt)
    assert not failures  # the header is fine
    images = rendered(FakePipeline(), requests, batch_size=2)
    assert "truncated or damaged" in str(images.pop("00001.png"))
    assert all(isinstance(image, np.ndarray) for image in images.values())


def test_a_refused_batch_does_not_stop_the_next():
    requests, _ = plan([record(0, "refused"), record(1), record(2)], SETTINGS, check_prompt)
    images = rendered(FakePipeline(), requests, batch_size=2)
    assert [isinstance(image, DeepGenError) for image in images.values()] == [True, True, False]


def test_out_of_memory_names_the_mend():
    requests, _ = plan([record(i) for i in range(8)], SETTINGS, check_prompt)
    with pytest.raises(DeepGenError, match=r"out of memory for 8 images of 64x64 .* use a smaller --batch-size"):
        rendered(FakePipeline(memory=4), requests, batch_size=8)
    with pytest.raises(DeepGenError, match="smaller --size"):
        rendered(FakePipeline(memory=0), requests, batch_size=1)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        rendered(broken, requests, batch_size=1)  # type: ignore[arg-type]


def test_references_of_an_exact_size_are_resized_bicubically(tmp_path: Path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    exact = dataclasses.replace(SETTINGS, exact_reference_size=(64, 64), images=(tmp_path / "a.png",))
    requests, _ = plan([record(0)], exact, check_prompt)
    assert requests[0].layout == (64, 64, 3, 4.0, "euler", ((64, 64),))
    fake = FakePipeline()
    list(render(fake, requests, batch_sizes(requests, 1), exact))
    wanted = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(fake.calls[0]["image"][0][0]), wanted)
