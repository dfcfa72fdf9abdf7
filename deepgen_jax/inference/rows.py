"""Images of a batch computed one by one, and the previews of a batch while it is sampled."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from deepgen_jax.inference.requests import Requests


@dataclass(frozen=True)
class Preview:
    """What a ``callback`` receives while images are sampled.

    Attributes:
      rows: places in the call's batch of the images concerned.
      step, steps: steps done, and all of them.
      latents: float32 [len(rows), C, H/8, W/8], the predicted clean latents, for `DeepGenPipeline.vae_decode`.
    """

    rows: tuple[int, ...]
    step: int
    steps: int
    latents: np.ndarray


PreviewCallback = Callable[[Preview], None]
#: (steps done, all steps, clean latents).
OnStep = Callable[[int, int, np.ndarray], None]


def on_step_of(callback: PreviewCallback | None, rows: Sequence[int]) -> OnStep | None:
    """``callback`` for the images at ``rows`` of a call's batch."""
    if callback is None:
        return None
    return lambda step, steps, latents: callback(Preview(tuple(rows), step, steps, latents))


def run_each_row(
    run: Callable[[Requests, Sequence[int]], tuple[np.ndarray | None, np.ndarray]], requests: Requests
) -> tuple[np.ndarray | None, np.ndarray]:
    """Runs each request by itself, several at a time: XLA's CPU products round differently in batches of other sizes.

    The first runs alone, so that the programs are compiled once.
    """
    results = [run(requests.row(0), [0])]
    if requests.count > 1:
        with ThreadPoolExecutor(min(requests.count - 1, os.cpu_count() or 1)) as pool:
            results += pool.map(lambda i: run(requests.row(i), [i]), range(1, requests.count))
    pixels, latents = zip(*results, strict=True)
    return (None if pixels[0] is None else np.concatenate(pixels)), np.concatenate(latents)
