"""A parsed request and its pictures -> the jobs of its images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.image_inputs import reference_size
from deepgen_jax.serving import pictures
from deepgen_jax.serving.bodies import Body
from deepgen_jax.serving.errors import invalid
from deepgen_jax.serving.jobs import Checked, Engine, Job
from deepgen_jax.serving.parameters import Parameters
from deepgen_jax.serving.settings import ServeConfig


def plan(engine: Engine, parameters: Parameters, body: Body | None, config: ServeConfig) -> list[tuple[Job, Checked]]:
    """The jobs of a request; image k has seed + k. Decodes pictures and tokenises, so run it in a thread.

    References are brought to the size at which they enter the model. An edit without a size keeps that of the first
    picture so fitted.

    Args:
      body: the pictures of an edit; None for generation.

    Raises:
      APIError: a picture, mask or prompt that cannot be used.
    """
    info, p = engine.info, parameters
    references: list[Image.Image] = []
    size, source, mask = p.size or (info.side, info.side), None, None
    if body is not None:
        originals = [pictures.read_picture(data, config.max_image_pixels, name) for name, data in body.images]
        references = [_fitted(image, info.multiple, info.side**2) for image in originals]
        size = p.size or references[0].size
        if body.mask is not None:
            mask = pictures.read_mask(body.mask, originals[0].size, config.max_image_pixels)
            mask = _resized(mask, *size)
        if mask is not None or p.strength < 1:
            source = originals[0] if originals[0].size == size else originals[0].resize(size, Image.Resampling.BICUBIC)
    jobs = [
        Job(
            kind=p.kind, prompt=p.prompt, negative_prompt=p.negative_prompt, seed=p.seed + k, width=size[0],
            height=size[1], steps=p.steps, guidance=p.guidance, sampler=p.sampler, images=tuple(references),
            source=source, mask=mask, strength=p.strength, previews=p.partial_images,
        )
        for k in range(p.n)
    ]  # fmt: skip
    try:
        checked = engine.check(jobs[0])
    except DeepGenError as error:
        raise invalid(str(error), "prompt") from None
    return [(job, checked) for job in jobs]


def _fitted(image: Image.Image, multiple: int, max_pixels: int) -> Image.Image:
    size = reference_size(*image.size, multiple, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _resized(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """A bool mask at another size: every pixel that an editable one reaches may change."""
    if mask.shape == (height, width):
        return mask
    picture = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    resized = np.asarray(picture) > 0
    # A mask of few pixels can vanish when it is made smaller by much.
    return resized if resized.any() else np.ones_like(resized)
