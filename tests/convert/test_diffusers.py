"""An exported release opens in diffusers, and generates what the JAX pipeline does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deepgen_jax import DeepGenPipeline
from deepgen_jax.convert import convert, export


@pytest.mark.parametrize("layout", ["sft"])
def test_an_exported_release_generates_the_same_in_diffusers(
    layout: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    release = export(folders(layout), "diffusers", tmp_path / "release", dtype="float32")
    pipe = DiffusionPipeline.from_pretrained(str(release), trust_remote_code=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((2, 16, 8, 12)).astype(np.float32)
    prompts = ["a red fox in fresh snow", "a house"]
    settings = {"negative_prompt": "blurry, dark and noisy", "height": 64, "width": 96, "num_inference_steps": 3}
    theirs = pipe(prompts, latents=torch.from_numpy(noise), output_type="latent", **settings).images
    ours = DeepGenPipeline.from_pretrained(folders(layout))(prompts, latents=noise, output_type="latent", **settings)
    np.testing.assert_allclose(np.asarray(ours.latents), theirs.numpy(), rtol=0, atol=2e-4)
    picture = pipe("a house", height=64, width=64, num_inference_steps=1).images[0]
    assert picture.size == (64, 64)
    with pytest.raises(ValueError, match="multiples of 16"):
        pipe("a house", height=65)


def test_a_release_with_its_code_converts(folders: Callable[[str], Path], tmp_path: Path) -> None:
    release = export(folders("rl"), "diffusers", tmp_path / "release")
    assert (release / "deepgen_pipeline.py").is_file()
    assert (release / "connector" / "deepgen_connector.py").is_file()
    convert(out=tmp_path / "m", diffusers=release)
