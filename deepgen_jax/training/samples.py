"""Pictures made during training from fixed prompts, references and noise, so that they can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.training.run_config import SampleConfig

if TYPE_CHECKING:
    from deepgen_jax.inference.pipeline import DeepGenPipeline


def check_images(config: SampleConfig) -> None:
    """Raises a DeepGenError where a reference image is missing, before training starts."""
    for name in filter(None, config.images):
        if not Path(name).is_file():
            raise DeepGenError(f"samples.images: {name} does not exist; give the path of a picture")


def make_samples(pipeline: DeepGenPipeline, config: SampleConfig) -> list[Image.Image]:
    """One picture for each prompt."""
    pictures: list[Image.Image | None] = [None] * len(config.prompts)
    names = config.images or ("",) * len(config.prompts)
    for with_reference in (False, True):
        rows = [i for i, name in enumerate(names) if bool(name) == with_reference]
        if not rows:
            continue
        references = [[_reference(Path(names[i]), config.size)] for i in rows] if with_reference else None
        made = pipeline(
            [config.prompts[i] for i in rows],
            references,
            height=config.size,
            width=config.size,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            sampler=config.sampler,
            seed=[config.seed + i for i in rows],
        ).images
        for i, picture in zip(rows, made or (), strict=True):
            pictures[i] = picture
    return [picture for picture in pictures if picture is not None]


def _reference(path: Path, size: int) -> Image.Image:
    return load_image(path).resize((size, size), Image.Resampling.BICUBIC)
