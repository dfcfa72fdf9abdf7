"""CLIP similarity: the cosine between a prompt's and its image's features."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Reward, RewardSample, Scores

#: Mean and standard deviation of the training data, by colour.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """As CLIP was trained: shorter side resized to ``size`` (bicubic), centre cut out, normalised.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result.

    Returns:
      float32 [size, size, 3].
    """
    height, width = image.shape[:2]
    scale = size / min(height, width)
    new_width, new_height = (size if side == min(height, width) else int(side * scale) for side in (width, height))
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return (resized[top : top + size, left : left + size].astype(np.float32) / 255 - MEAN) / STD


class CLIPReward(Reward):
    """Cosine similarity by a CLIP model, ViT-L/14 in the paper.

    Args:
      folder: the model as transformers stores it: ``config.json``, weights, tokenizer.
      batch_size: images of one program call; smaller batches are padded.
      dtype: of the computation, "float32" or "bfloat16".
      device: "" computes on the first local device of JAX's default platform, "cpu" on the host.
    """

    def __init__(self, folder: str, batch_size: int = 16, dtype: str = "float32", device: str = "") -> None:
        if batch_size < 1:
            raise DeepGenError(f"batch_size is {batch_size}; it must be at least 1")
        if dtype not in ("float32", "bfloat16"):
            raise DeepGenError(f"dtype is {dtype!r}; use float32 or bfloat16")
        path = Path(folder)
        if not path.is_dir():
            raise DeepGenError(f"folder {folder} does not exist; give a CLIP model as transformers stores it")
        self.batch_size = batch_size
        self._model = _Model(path, dtype, device)
        # One batch at a time: two at once would only take twice the memory.
        self._turn = asyncio.Lock()

    async def score(self, samples: Sequence[RewardSample]) -> Scores:
        results: list[float] = []
        async with self._turn:
            for start in range(0, len(samples), self.batch_size):
                batch = samples[start : start + self.batch_size]
                results += await asyncio.to_thread(self._model.similarities, batch, self.batch_size)
        return Scores.of(results)


class _Model:
    """Weights on the device, tokenizer and compiled program."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        import jax
        from transformers import AutoTokenizer

        from deepgen_jax.convert.clip_weights import load_clip
        from deepgen_jax.models.clip import CLIP

        self.config, params = load_clip(folder)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise DeepGenError(f"{folder} holds no tokenizer; download tokenizer.json, too")
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        try:
            self._device = jax.local_devices(backend=device or None)[0]
        except RuntimeError as error:
            raise DeepGenError(f"there is no device {device!r}; use cpu, or leave it out") from error
        kind = jax.numpy.dtype(dtype)
        self._params = jax.device_put(jax.tree.map(lambda x: x.astype(kind), params), self._device)
        model = CLIP(self.config, dtype=kind)
        self._program = jax.jit(lambda p, ids, pixels: model.apply({"params": p}, ids, pixels, method="similarity"))

    def similarities(self, samples: Sequence[RewardSample], batch_size: int) -> list[float]:
        """Cosines of at most ``batch_size`` samples."""
        import jax

        ids = np.zeros((batch_size, self.config.max_positions), np.int32)
        pixels = np.zeros((batch_size, self.config.image_size, self.config.image_size, 3), np.float32)
        ids[: len(samples)] = self.tokens([sample.prompt for sample in samples])
        for row, sample in enumerate(samples):
            pixels[row] = preprocess(sample.image, self.config.image_size)
        placed: Any = jax.device_put((ids, pixels), self._device)
        cosines = np.asarray(self._program(self._params, *placed))
        return [float(value) for value in cosines[: len(samples)]]

    def tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids [N, max_positions], cut at that length with the end token kept, and padded behind it."""
        length = self.config.max_positions
        encoded = self._tokenizer(list(prompts), truncation=True, max_length=length, padding="max_length")
        return np.asarray(encoded["input_ids"], np.int32)
