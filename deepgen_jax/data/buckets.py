"""Buckets: the image sizes that batches have, and the assignment of samples to them.

The size rule (`deepgen_jax.data.transforms.target_size`) gives at most some ninety sizes at one ``image_size``, but
edits have many pairs and triples of them. Common sizes are buckets; a rare size joins the nearest common one if that
differs in few pixels, so that most pixels of a run are exactly those of the rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.transforms import UNIT, target_size

#: (width, height) of the target, then of each reference.
Sizes: TypeAlias = tuple[tuple[int, int], ...]


class Bucket(NamedTuple):
    """A shape of batches.

    Attributes:
      task: "t2i" or "edit".
      target: (width, height) in pixels.
      references: (width, height) of each reference image.
      samples: in all sources together.
    """

    task: str
    target: tuple[int, int]
    references: Sizes
    samples: int

    def __str__(self) -> str:
        sizes = " + ".join(f"{width}x{height}" for width, height in (self.target, *self.references))
        return f"{self.task} {sizes}"

    @property
    def image_tokens(self) -> int:
        """VLM tokens of all references."""
        return sum(width * height for width, height in self.references) // UNIT**2


def exact_sizes(sizes: np.ndarray, config: DataConfig, *, final: bool = False) -> tuple[np.ndarray, list[Sizes]]:
    """Sizes of each sample's images by the rule.

    Args:
      sizes: int [n, images, 2], (width, height) as stored; zeros for images that a sample does not have.
      config: gives the rule.
      final: sizes are kept: those of cached features.

    Returns:
      int64 [n], which of the list's entries a sample has; and the list of different entries.
    """
    wide = sizes.astype(np.int64)
    pairs, inverse = np.unique(wide[..., 0] << 32 | wide[..., 1], return_inverse=True)
    stored = [(int(pair >> 32), int(pair & 0xFFFFFFFF)) for pair in pairs]
    fitted = [
        size if final or size == (0, 0) else target_size(*size, config.image_size, config.transform) for size in stored
    ]
    different = sorted(set(fitted))
    place = {size: number for number, size in enumerate(different)}
    numbers = np.array([place[size] for size in fitted], np.int64)[inverse].reshape(sizes.shape[:2])
    # Combined image by image, so that the keys of many references do not overflow.
    keys = np.zeros(len(sizes), np.int64)
    entries: list[Sizes] = [()]
    for image in range(sizes.shape[1]):
        combined, keys = np.unique(keys * len(different) + numbers[:, image], return_inverse=True)
        entries = [(*entries[key // len(different)], different[key % len(different)]) for key in combined.tolist()]
    return keys, [tuple(size for size in entry if size != (0, 0)) for entry in entries]


def choose_buckets(counts: Mapping[Sizes, int], config: DataConfig) -> dict[Sizes, Sizes]:
    """The bucket of every exact size, from how many samples of a task have it.

    Sizes with at least ``bucket_share`` of the samples, all sizes where ``exact_sizes`` is set, and rare ones that
    differ from every bucket by more than ``bucket_tolerance`` in some image, get separate buckets.
    """
    total = sum(counts.values())
    chosen: dict[Sizes, Sizes] = {}
    # Number of images -> buckets so far.
    buckets: dict[int, list[Sizes]] = {}
    for sizes, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        near = None
        if not config.exact_sizes and count < config.bucket_share * total:
            near = _nearest(sizes, buckets.get(len(sizes), []), config.bucket_tolerance)
        if near is None:
            buckets.setdefault(len(sizes), []).append(sizes)
        chosen[sizes] = near or sizes
    return chosen


def pixel_difference(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Share of pixels that two sizes do not have in common when overlaid."""
    return float(_differences(np.array([a]), np.array([b]))[0])


def list_buckets(task: str, counts: Mapping[Sizes, int], chosen: Mapping[Sizes, Sizes]) -> list[Bucket]:
    """The buckets of a task with their numbers of samples, in a fixed order."""
    samples: Counter[Sizes] = Counter()
    for sizes, count in counts.items():
        samples[chosen[sizes]] += count
    return [Bucket(task, sizes[0], sizes[1:], samples[sizes]) for sizes in sorted(samples)]


def _nearest(sizes: Sizes, buckets: Sequence[Sizes], tolerance: float) -> Sizes | None:
    if not buckets:
        return None
    worst = _differences(np.array(sizes)[None], np.array(buckets)).max(axis=-1)
    best = int(worst.argmin())
    return buckets[best] if worst[best] <= tolerance else None


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`pixel_difference` over the last axis."""
    common = np.minimum(a, b).prod(axis=-1)
    return 1 - common / np.maximum(a.prod(axis=-1), b.prod(axis=-1))
