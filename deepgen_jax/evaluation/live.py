"""A benchmark's images from a pipeline at hand, such as one over the weights of a training run; nothing is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.benchmark import Benchmark, Item
from deepgen_jax.evaluation.run import plan_images
from deepgen_jax.inference.batch import Request, Settings, render


def make_images(
    benchmark: Benchmark,
    items: Sequence[Item],
    pipe: Callable[..., Any],
    settings: Settings,
    batch_size: int,
    references: Path,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the images of all items, uint8 [H, W, 3] by file, in the order of their batches.

    Args:
      benchmark: lays out and prepares the items.
      items: what to make.
      pipe: a ``DeepGenPipeline``.
      settings: from `deepgen_jax.evaluation.run.run_settings`.
      batch_size: rows of every batch: the same few programs serve all calls, whatever their number of items.
      references: folder for source images that the benchmark prepares; relative sources are in it.

    Raises:
      DeepGenError: a prompt or reference cannot be used.
    """
    requests, failures = plan_images(benchmark, items, settings, lambda text, sizes: None, references)
    if failures:
        raise DeepGenError(str(failures[0]))
    for batch in render(pipe, requests, _same_sizes(requests, batch_size), settings):
        for request, image in batch:
            if isinstance(image, DeepGenError):
                raise image
            yield request.file, np.asarray(image)


def _same_sizes(requests: Sequence[Request], batch_size: int) -> dict[Any, int]:
    return {request.layout: batch_size for request in requests}
