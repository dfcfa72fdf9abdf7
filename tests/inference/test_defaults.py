"""Defaults of a model folder, used alike by the pipeline and the command line; batches and steps compile once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from deepgen_jax import DeepGenPipeline
from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig, MMDiTConfig, from_dict, to_dict
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.defaults import Sampling, resolve_sampling, resolve_size
from deepgen_jax.inference.outputs import read_metadata
from deepgen_jax.user_warnings import collect_warnings

PROMPTS = ["a large blue square in the top left corner", "three red circles", "a green star", 'a sign that says "OPEN"']


@pytest.fixture(scope="module")
def nano() -> DeepGenPipeline:
    return DeepGenPipeline.from_pretrained("nano")


def test_resolved_settings():
    config = DeepGenConfig(guidance_scale=3.0, num_inference_steps=9, sampler="heun", max_guidance_scale=5.0)
    assert resolve_sampling(config) == Sampling(9, 3.0, "heun")
    assert resolve_sampling(config, 2, 1.0, "DPM++ 2M") == Sampling(2, 1.0, "dpmpp_2m")
    said: list[str] = []
    with collect_warnings(said.append):
        resolve_sampling(config, guidance=5.0)
        resolve_sampling(config, guidance=5.5)
    assert said == ["guidance 5.5 ruins this model's images; use at most 5"]
    for arguments, message in (
        ({"steps": 0}, "the number of steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"sampler": "eular"}, "did you mean euler"),
    ):
        with pytest.raises(DeepGenError, match=message):
            resolve_sampling(config, **arguments)


def test_resolved_sizes():
    config = DeepGenConfig(mmdit=MMDiTConfig(sample_size=9))
    assert resolve_size(config) == (64, 64)
    assert resolve_size(config, reference_sizes=[(32, 96), (64, 64)]) == (32, 96)
    assert resolve_size(config, 96, 32, [(64, 64)]) == (96, 32)
    assert resolve_size(config, height=32) == (64, 32)
    assert resolve_size(dataclasses.replace(config, image_size=128)) == (128, 128)
    with pytest.raises(DeepGenError, match="image_size is 100"):
        dataclasses.replace(config, image_size=100)


def test_older_folders_mean_the_defaults():
    values = to_dict(DeepGenConfig(num_inference_steps=7))
    added = ("num_inference_steps", "sampler", "image_size", "max_guidance_scale")
    old = from_dict(DeepGenConfig, {name: value for name, value in values.items() if name not in added})
    assert old == DeepGenConfig()
    with pytest.raises(DeepGenError, match="missing: guidance_scale"):
        from_dict(DeepGenConfig, {name: value for name, value in values.items() if name != "guidance_scale"})


def test_nano_without_any_setting(nano: DeepGenPipeline, tmp_path: Path):
    image = nano("a red circle in the middle").images[0]
    assert image.size == (96, 96)
    explicit = nano("a red circle in the middle", height=96, width=96, num_inference_steps=4, guidance_scale=1.0)
    np.testing.assert_array_equal(image, explicit.images[0])
    assert main(["generate", "a red circle in the middle", "--out", str(tmp_path / "a.png")]) == 0
    np.testing.assert_array_equal(image, Image.open(tmp_path / "a.png"))
    told = read_metadata(tmp_path / "a.png")
    assert told is not None
    assert (told["width"], told["height"], told["steps"], told["guidance"]) == (96, 96, 4, 1.0)
    picture = Image.new("RGB", (128, 64), "white")
    assert nano("add a red circle", picture, output_type="latent").latents.shape[2:] == (8, 16)


def test_an_image_is_the_same_in_any_batch_bit_for_bit(nano: DeepGenPipeline):
    together = nano(PROMPTS, seed=[1, 2, 3, 4], num_inference_steps=3, output_type="np")
    for i, prompt in enumerate(PROMPTS):
        alone = nano(prompt, seed=[i + 1], num_inference_steps=3, output_type="np")
        np.testing.assert_array_equal(alone.latents[0], together.latents[i])
        np.testing.assert_array_equal(alone.images[0], together.images[i])
    one_seed = nano(PROMPTS[:2], seed=1, negative_prompt=None, num_inference_steps=3, output_type="latent").latents
    np.testing.assert_array_equal(one_seed[0], together.latents[0])


def test_edits_are_the_same_in_any_batch_bit_for_bit(nano: DeepGenPipeline):
    pictures = [Image.new("RGB", size, color) for size, color in (((96, 96), "white"), ((64, 96), "navy"))]
    images = [pictures[:1], pictures, pictures[1:]]
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64, "guidance_scale": 1.5}
    together = nano(PROMPTS[:3], images, seed=[1, 2, 3], reference_posterior="sample", **options).latents
    for i in range(3):
        alone = nano(PROMPTS[i], images[i], seed=[i + 1], reference_posterior="sample", **options).latents
        np.testing.assert_array_equal(alone[0], together[i])


def test_another_number_of_steps_compiles_nothing(nano: DeepGenPipeline):
    compiled: list[str] = []
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    nano("a red circle", num_inference_steps=3)
    jax.monitoring.register_event_duration_secs_listener(listen)
    for steps in (1, 5, 50):
        nano("a red circle", num_inference_steps=steps)
    nano(PROMPTS[1:3], num_inference_steps=2)
    assert not compiled


@pytest.mark.parametrize("sampler", ["heun", "dance"])
def test_every_sampler_and_previews(nano: DeepGenPipeline, sampler: str):
    seen: list[tuple[tuple[int, ...], int, int]] = []
    cleans: list[np.ndarray] = []

    def callback(preview):
        seen.append((preview.rows, preview.step, preview.steps))
        cleans.append(preview.latents)

    options = {"sampler": sampler, "num_inference_steps": 8, "output_type": "np", "seed": [5, 5]}
    plain = nano(PROMPTS[:2], **options)
    shown = nano(PROMPTS[:2], **options, callback=callback, callback_every=3)
    np.testing.assert_array_equal(plain.images, shown.images)
    assert sorted(seen) == [((row,), step, 8) for row in (0, 1) for step in (3, 6, 8)]
    if sampler not in ("flow", "dance"):  # these add noise in the last step, too
        np.testing.assert_allclose(cleans[2][0], plain.latents[0], atol=1e-5)
        euler = nano(PROMPTS[:2], **options | {"sampler": "euler"})
        assert np.mean(np.abs(plain.images.astype(int) - euler.images)) < 12
    again = nano(PROMPTS[1], **options | {"seed": [5]})
    np.testing.assert_array_equal(again.latents[0], plain.latents[1])


def test_config_json_of_nano_is_that_of_its_recipe():
    from deepgen_jax.nano.model import nano_config
    from deepgen_jax.stores.model_folder import NANO, PACKAGED

    stored = json.loads((PACKAGED / NANO / "config.json").read_text())["config"]
    names = ("guidance_scale", "num_inference_steps", "sampler", "image_size", "max_guidance_scale")
    assert {name: stored[name] for name in names} == {name: getattr(nano_config(), name) for name in names}
