"""The engine on a real model: the pipeline's own images, whatever shares the batch; masks, strength and previews."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.services import noise

from deepgen_jax import DeepGenPipeline
from deepgen_jax.inference.acceleration import Acceleration
from deepgen_jax.serving.blending import latent_mask
from deepgen_jax.serving.engine import PipelineEngine
from deepgen_jax.serving.jobs import Job

FOX = Job("generation", "a red fox", "", 3, 64, 64, 3, 1.0, "euler")


@pytest.fixture(scope="module")
def pipe(pipelines) -> DeepGenPipeline:
    return pipelines("sft")


@pytest.fixture(scope="module")
def engine(pipe) -> PipelineEngine:
    return PipelineEngine(pipe, "tiny")


def run(engine: PipelineEngine, jobs: list[Job], rows: int | None = None):
    """Images, and previews by (place, index)."""
    assert len({engine.check(job).bucket for job in jobs}) == 1
    previews = {}
    phases = []
    rows = rows or next(size for size in engine.row_sizes(8) if size >= len(jobs))
    images = engine.run(jobs, rows, lambda *event: previews.update({event[:2]: event[2]}), lambda *p: phases.append(p))
    assert {name for name, _ in phases} == {"condition", "denoise", "decode"}
    return images, previews


def by_pipeline(pipe: DeepGenPipeline, job: Job) -> np.ndarray:
    out = pipe(
        job.prompt, list(job.images) or None, negative_prompt=job.negative_prompt, height=job.height, width=job.width,
        num_inference_steps=job.steps, guidance_scale=job.guidance, seed=job.seed, sampler=job.sampler,
        output_type="np",
    )  # fmt: skip
    return out.images[0]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["generation", "edit"])
def test_images_are_those_of_the_pipeline_in_any_batch(pipe, engine, kind, guidance):
    pictures = [(Image.fromarray(noise(64, 32)),), (Image.fromarray(noise(64, 32)[::-1].copy()),)]
    jobs = [
        replace(
            FOX, kind=kind, prompt=prompt, seed=seed, guidance=guidance, previews=seed % 3,
            negative_prompt="dark" * (seed % 2), images=pictures[seed % 2] if kind == "edit" else (),
        )
        for seed, prompt in enumerate(["a red fox", "a house on a hill", "x", "two dogs", "a red fox"])
    ]  # fmt: skip
    together, _ = run(engine, jobs)
    shuffled, _ = run(engine, [jobs[3], jobs[0]])
    for job, image in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(image, by_pipeline(pipe, job))
    np.testing.assert_array_equal(shuffled, [together[3], together[0]])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "cps"])
def test_samplers(pipe, engine, sampler):
    job = replace(FOX, sampler=sampler, steps=4)
    plain, _ = run(engine, [job])
    np.testing.assert_array_equal(plain[0], by_pipeline(pipe, job))
    watched, previews = run(engine, [replace(job, previews=2)])
    np.testing.assert_array_equal(watched[0], plain[0])
    assert set(previews) == {(0, 0), (0, 1)}


def test_previews_come_nearer_to_the_image(engine):
    (image,), previews = run(engine, [replace(FOX, steps=12, previews=3)])
    errors = [np.abs(previews[0, k].astype(int) - image).mean() for k in range(3)]
    assert errors[0] > errors[1] > errors[2] > 0


def masked(seed: int = 3) -> Job:
    source = Image.fromarray(noise(64, 64))
    mask = np.zeros((64, 64), np.bool_)
    mask[16:44, 8:40] = True
    return replace(FOX, kind="edit", images=(source,), source=source, mask=mask, seed=seed)


def test_a_mask_keeps_every_pixel_outside_and_changes_those_inside(engine):
    job = masked()
    (image,), previews = run(engine, [replace(job, previews=2)])
    source = np.asarray(job.source)
    for picture in (image, *previews.values()):
        np.testing.assert_array_equal(picture[~job.mask], source[~job.mask])
        assert (picture[job.mask] != source[job.mask]).mean() > 0.9


def test_the_model_sees_the_source_outside_the_mask_while_it_samples(engine):
    """The inside differs from that of an edit without a mask, which a composite alone would have kept."""
    job = masked()
    (image,), _ = run(engine, [job])
    (free,), _ = run(engine, [replace(job, mask=None, source=None)])
    assert (image[job.mask] != free[job.mask]).any()
    everywhere = replace(job, mask=np.ones((64, 64), np.bool_))
    np.testing.assert_array_equal(run(engine, [everywhere])[0][0], free)


def test_masks_in_a_batch_are_their_own_rows(engine):
    jobs = [masked(1), replace(masked(2), mask=None, source=None), masked(3)]
    together, _ = run(engine, jobs)
    for job, image in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(run(engine, [job])[0][0], image)


def test_strength_keeps_more_of_the_source(pipe, engine):
    source = Image.fromarray(np.repeat(np.repeat(noise(4, 4), 16, 0), 16, 1))
    job = replace(FOX, kind="edit", images=(source,), source=source, steps=10)
    kept = [np.abs(run(engine, [replace(job, strength=s)])[0][0].astype(int) - source).mean() for s in (0.1, 0.5, 1.0)]
    assert kept[0] < kept[1] < kept[2]
    np.testing.assert_array_equal(run(engine, [replace(job, strength=1.0)])[0][0], by_pipeline(pipe, job))


def test_any_editable_pixel_opens_its_cell():
    mask = np.zeros((32, 16), np.bool_)
    mask[8, 15] = True
    np.testing.assert_array_equal(latent_mask(mask, 8), [[False, False], [False, True], [False, False], [False, False]])


def test_accelerators_pad_to_powers_of_two_and_meshes_to_what_they_split(pipe, engine, monkeypatch):
    assert engine.row_sizes(3) == (1, 2, 3)
    monkeypatch.setattr(engine, "_by_row", False)
    assert engine.row_sizes(6) == (1, 2, 4, 6)
    assert engine.row_sizes(1) == (1,)


def test_together_as_on_an_accelerator(pipe, engine, monkeypatch):
    """The padded batch program, which CPUs do not use, gives the same images within rounding."""
    monkeypatch.setattr(engine, "_pool", None)
    guided = [replace(masked(seed), guidance=1.5 + seed, previews=seed) for seed in range(3)]
    images, previews = run(engine, guided, rows=4)
    assert set(previews) == {(1, 0), (2, 0), (2, 1)}
    monkeypatch.undo()
    for job, image in zip(guided, images, strict=True):
        assert np.abs(run(engine, [job])[0][0].astype(int) - image).max() <= 1


def test_usual_jobs_are_accepted(engine):
    for job in engine.usual_jobs():
        engine.check(job)


def test_acceleration_is_that_of_the_pipeline_and_never_sees_the_batch(pipe, monkeypatch):
    """Images computed together would share the cache's decisions."""
    accelerated = PipelineEngine(pipe, "tiny", Acceleration(0.5, False, (0.0, 0.5)))
    jobs = [replace(FOX, prompt=prompt, guidance=4.0, steps=6) for prompt in ("a red fox", "two dogs", "x")]
    wanted = [
        pipe(
            job.prompt, height=64, width=64, num_inference_steps=6, guidance_scale=4.0, seed=[3], output_type="np",
            cache=0.5, guidance_interval=(0.0, 0.5),
        ).images[0]
        for job in jobs
    ]  # fmt: skip
    assert any((image != by_pipeline(pipe, job)).any() for image, job in zip(wanted, jobs, strict=True))
    np.testing.assert_array_equal(run(accelerated, jobs)[0], wanted)
    monkeypatch.setattr(accelerated, "_pool", None)
    monkeypatch.setattr(accelerated, "_by_row", False)
    assert accelerated.row_sizes(8) == (1,)
    np.testing.assert_array_equal(run(accelerated, jobs, rows=1)[0], wanted)
