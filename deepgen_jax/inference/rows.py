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
    """Argument of a ``callback`` during sampling.

    Attributes:
      rows: places in the call's batch of the images concerned.
      step, steps: steps done, and all of them.
      latents: float32 [len(rows), C, H/8, W/8], the predicted clean latents, for `DeepGenPipeline.vae_decode`.
    """

    rows: tuple[int, ...]
    step: int
    steps: int
    latents: np.ndarray


@dataclass(frozen=True)
class Sampled:
    """Result of sampling some requests.

    Attributes:
      pixels: uint8 [B, H, W, 3], None where they are not wanted.
      latents: float32 [B, C, h, w].
      evaluations: MMDiT layers evaluated and those without acceleration, summed over images; None without it.
    """

    pixels: np.ndarray | None
    latents: np.ndarray
    evaluations: tuple[float, float] | None = None


PreviewCallback = Callable[[Preview], None]
#: (steps done, all steps, clean latents).
OnStep = Callable[[int, int, np.ndarray], None]


def on_step_of(callback: PreviewCallback | None, rows: Sequence[int]) -> OnStep | None:
    """``callback`` for the images at ``rows`` of a call's batch."""
    if callback is None:
        return None
    return lambda step, steps, latents: callback(Preview(tuple(rows), step, steps, latents))


def run_each_row(run: Callable[[Requests, Sequence[int]], Sampled], requests: Requests) -> Sampled:
    """Runs each request by itself, several at a time: XLA's CPU products round differently in batches of other sizes.

    The first runs alone, so that the programs are compiled once.
    """
    results = [run(requests.row(0), [0])]
    if requests.count > 1:
        with ThreadPoolExecutor(min(requests.count - 1, os.cpu_count() or 1)) as pool:
            results += pool.map(lambda i: run(requests.row(i), [i]), range(1, requests.count))
    pixels = None if results[0].pixels is None else np.concatenate([np.asarray(one.pixels) for one in results])
    counts = [one.evaluations for one in results if one.evaluations is not None]
    evaluations = (sum(done for done, _ in counts), sum(total for _, total in counts)) if counts else None
    return Sampled(pixels, np.concatenate([one.latents for one in results]), evaluations)
