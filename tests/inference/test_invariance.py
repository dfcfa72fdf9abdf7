"""An image depends on its own prompt, references and seed: not on its batch, nor on how devices share the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROMPTS = ["a red fox", "a much longer prompt " * 12, "x", "glass teapot on a table", "", "猫", "dog and cat and " * 5]
MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
SETTINGS = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((len(PROMPTS), 16, 8, 8), np.float32)


def references(pictures):
    """Per prompt none to three references of different sizes; a batch is either all editing or all text-to-image."""
    names = ("s", "t", "w")
    return [[pictures[name] for name in names[: 1 + i % 3]] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("task", ["generate", "edit"])
@pytest.mark.parametrize("padding", ["reference", "masked"])
def test_alone_or_in_a_batch(task, padding, pipelines, pictures, noise):
    pipe = pipelines("sft")
    images = references(pictures) if task == "edit" else None
    options = {**SETTINGS, "padding": padding, "negative_prompt": "blurry, low quality"}
    together = pipe(PROMPTS, images, latents=noise, **options).latents
    for i in (0, 1, 4) if task == "generate" else (2, 4):
        alone = pipe(PROMPTS[i], images and images[i], latents=noise[i : i + 1], **options).latents
        np.testing.assert_allclose(alone[0], together[i], **CLOSE)


def test_batch_padding_does_depend_on_the_batch(pipelines, noise):
    pipe = pipelines("sft")
    together = pipe(PROMPTS[:2], latents=noise[:2], padding="batch", **SETTINGS).latents
    alone = pipe(PROMPTS[0], latents=noise[:1], padding="batch", **SETTINGS).latents
    assert np.max(np.abs(alone[0] - together[0])) > 1e-3


def test_each_seed_gives_its_noise(pipelines):
    pipe = pipelines("sft")
    listed = pipe(PROMPTS[:3], seed=[5, 6, 5], **SETTINGS).latents
    np.testing.assert_allclose(pipe(PROMPTS[1], seed=6, **SETTINGS).latents[0], listed[1], **CLOSE)
    one_seed = pipe([PROMPTS[0]] * 2, seed=5, **SETTINGS).latents
    np.testing.assert_allclose(one_seed[0], listed[0], **CLOSE)
    assert np.max(np.abs(one_seed[0] - one_seed[1])) > 0.1


def test_sampled_references_follow_the_seed(pipelines, pictures):
    pipe = pipelines("sft")
    options = {**SETTINGS, "image": pictures["s"], "reference_posterior": "sample"}
    first, again, other = (pipe(PROMPTS[0], seed=seed, **options).latents for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 0.1


_ON_A_MESH = """
import sys
import numpy as np
from PIL import Image
from deepgen_jax import DeepGenPipeline

folder, work, mesh, *prompts = sys.argv[1:]
pipe = DeepGenPipeline.from_pretrained(folder, mesh=mesh)
sharded = [x for x in __import__("jax").tree.leaves(pipe.params) if not x.sharding.is_fully_replicated]
assert bool(sharded) == ("fsdp" in mesh or "tensor" in mesh)
options = dict(height=64, width=64, num_inference_steps=3, output_type="latent", negative_prompt="blurry, low quality")
with np.load(work + "/inputs.npz") as inputs:
    noise, picture = inputs["noise"], Image.fromarray(inputs["picture"])
made = {"generate": pipe(prompts, latents=noise, **options).latents}
made["edit"] = pipe(prompts[:2], [[picture], [picture]], latents=noise[:2], **options).latents
np.savez(work + "/" + mesh + ".npz", **made)
"""


@pytest.mark.parametrize("mesh", [*(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[:-1]), MESHES[-1]])
def test_any_mesh_of_eight_devices(mesh, folders, pipelines, pictures, noise, tmp_path):
    picture = pictures["s"]
    np.savez(tmp_path / "inputs.npz", noise=noise, picture=np.asarray(picture))
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", _ON_A_MESH, str(folders("sft")), str(tmp_path), mesh, *PROMPTS],
        check=True,
        timeout=600,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
    )
    pipe, options = pipelines("sft"), {**SETTINGS, "negative_prompt": "blurry, low quality"}
    with np.load(tmp_path / f"{mesh}.npz") as made:
        np.testing.assert_allclose(made["generate"], pipe(PROMPTS, latents=noise, **options).latents, **CLOSE)
        edits = pipe(PROMPTS[:2], [[picture], [picture]], latents=noise[:2], **options).latents
        np.testing.assert_allclose(made["edit"], edits, **CLOSE)
