"""Limits and batching options of the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepgen_jax.errors import DeepGenError


@dataclass(frozen=True)
class ServeConfig:
    """Batching and limits of requests.

    Attributes:
      max_batch: most images in one batch.
      batch_window: seconds that the first image of a batch waits for others while the model is idle.
      max_queue: images that may wait, generation and edits each; more get status 429.
      deadline: seconds after which a request that has not begun gets status 504.
      max_body: largest request body in bytes.
      upload_seconds: time in which a request body must arrive, else status 408.
      max_uploads: request bodies that are read at the same time; more get status 429.
      max_pixels: largest result in pixels; None for four times the area of the model's default size.
      max_image_pixels: largest picture that is decoded, in pixels.
      max_images: reference pictures of one request.
      max_n: images of one request.
      max_steps: sampler steps.
      api_keys: file of accepted bearer keys, one a line; None accepts every request.
      warm: compile the programs of the usual sizes before reporting ready.
    """

    max_batch: int = 8
    batch_window: float = 0.005
    max_queue: int = 64
    deadline: float = 300.0
    max_body: int = 64 * 10**6
    upload_seconds: float = 60.0
    max_uploads: int = 32
    max_pixels: int | None = None
    max_image_pixels: int = 32 * 10**6
    max_images: int = 8
    max_n: int = 10
    max_steps: int = 200
    api_keys: Path | None = None
    warm: bool = False

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_queue": 1, "max_body": 1024, "max_uploads": 1, "max_image_pixels": 1,
                 "max_images": 1, "max_n": 1, "max_steps": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise DeepGenError(f"{name} is {getattr(self, name)}; use {bound} or more")
        if self.max_n > 10:
            raise DeepGenError(f"max_n is {self.max_n}; OpenAI's format allows at most 10 images a request")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise DeepGenError(f"max_pixels is {self.max_pixels}; use 1 or more")
        if not 0 <= self.batch_window <= 10:
            raise DeepGenError(f"batch_window is {self.batch_window} s; use 0 to 10")
        for name in ("deadline", "upload_seconds"):
            if not getattr(self, name) > 0:
                raise DeepGenError(f"{name} is {getattr(self, name)} s; use more than 0")
