"""A stand-in for ``DeepGenPipeline``: the same call, images that are a cheap function of all that should matter."""

from __future__ import annotations

import hashlib
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.errors import DeepGenError


class FakePipeline:
    """Remembers its calls; a prompt with "refused" in it is an error, and ``seconds`` is how long a batch takes."""

    def __init__(self, seconds: float = 0.0, memory: int = 10**9) -> None:
        self.calls: list[dict[str, Any]] = []
        self.seconds, self.memory = seconds, memory

    def __call__(
        self,
        prompt: list[str],
        image: list[list[Image.Image]] | None = None,
        negative_prompt: list[str] | str = "",
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        seed: list[int] | int = 0,
        latents: Any = None,
        padding: str = "reference",
        reference_posterior: str = "mean",
        output_type: str = "pil",
        sampler: str = "euler",
    ) -> SimpleNamespace:
        self.calls.append(
            dict(
                prompt=prompt, image=image, negative_prompt=negative_prompt, height=height, width=width, seed=seed,
                steps=num_inference_steps, guidance=guidance_scale, padding=padding, posterior=reference_posterior,
                sampler=sampler,
            )
        )  # fmt: skip
        time.sleep(self.seconds)
        if len(prompt) > self.memory:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        if any("refused" in text for text in prompt):
            raise DeepGenError("this batch is refused")
        images = []
        for i, text in enumerate(prompt):
            refs = [(ref.size, ref.tobytes()) for ref in image[i]] if image else None
            settings = (num_inference_steps, guidance_scale, sampler, reference_posterior)
            key = (text, negative_prompt[i], seed[i], refs, settings)
            digest = hashlib.sha256(repr(key).encode()).digest()
            rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
            images.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))
        return SimpleNamespace(images=images, latents=None)


def check_prompt(text: str, image_sizes: Any = None) -> None:
    """The fake model reads thirty words."""
    if len(text.split()) > 30:
        raise DeepGenError(f"the prompt is {len(text.split())} tokens long, the model reads 30; shorten it")
