"""Scores heat maps by IoU with the known object masks of the procedural world.

Renders held-out scenes of two objects, adds noise, and computes heat maps. The map of an object is the sum of the maps
of its colour word and its shape word, upsampled to pixels and thresholded to the object's area. Baselines are a uniform
map, whose expected IoU follows from the area, and the map of the other object's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.errors import DeepGenError
from deepgen_jax.evaluation.explain.heat_maps import encode, heat_maps, reference_latents
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.nano.samples import Sample, make_sample, render
from deepgen_jax.nano.world.scene import Scene, Thing

#: Noise levels at which maps are taken and averaged.
SIGMAS = (0.9, 0.7, 0.5, 0.3)
_SKILLS = ("two", "relation")
_RESAMPLES = 2000


def mask_of(scene: Scene, thing: Thing, size: int) -> np.ndarray:
    """Mask of an object of a scene, bool [size, size]."""
    with_it, without = (render(Scene(scene.background, things), size) for things in ((thing,), ()))
    return np.abs(np.asarray(with_it, int) - np.asarray(without, int)).max(axis=-1) > 32


def iou(heat: np.ndarray, mask: np.ndarray) -> float:
    """IoU of a mask [H, W] with a map [h, w], upsampled and thresholded to the mask's area."""
    enlarged = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(mask.shape[::-1], Image.Resampling.BICUBIC))
    area = int(mask.sum())
    chosen = np.zeros(mask.size, bool)
    chosen[np.argsort(-enlarged.ravel(), kind="stable")[:area]] = True
    both = int((chosen & mask.ravel()).sum())
    return both / (2 * area - both)


def uniform_iou(mask: np.ndarray) -> float:
    """Expected IoU of a mask with the same number of random pixels."""
    area, total = float(mask.sum()), float(mask.size)
    both = area**2 / total
    return both / (2 * area - both)


def samples(count: int, seed: int) -> list[Sample]:
    """Held-out scenes of two objects whose captions name each by a unique colour and shape."""
    found: list[Sample] = []
    for index in range(50 * count):
        sample = make_sample("held_out", _SKILLS[index % len(_SKILLS)], seed=seed, index=index)
        words = sample.text.lower().replace(".", " ").replace(",", " ").split()
        first, second = sample.scene.things
        names = [first.colour, first.shape, second.colour, second.shape]
        if len(set(names)) == len(names) and all(words.count(name) == 1 for name in names):
            found.append(sample)
        if len(found) == count:
            return found
    raise DeepGenError(f"only {len(found)} scenes of the world name both of their things; ask for that many")


def score_heat_maps(pipe: DeepGenPipeline, count: int, *, size: int, seed: int = 0) -> dict[str, Any]:
    """Mean IoU over the objects of ``count`` scenes, with 95% bootstrap intervals over scenes.

    Args:
      pipe: a model trained on the procedural world.
      count: number of scenes, at least 2.
      size: side of the images in pixels.
      seed: seed of scenes and noise.

    Returns:
      JSON values: ``rows`` for "heat maps", "other thing's map" and "uniform", ``scenes``, ``things``, ``sigmas`` and a
      textual ``verdict``.

    Raises:
      DeepGenError: ``count`` is below 2 or exceeds the number of suitable scenes.
    """
    if count < 2:
        raise DeepGenError(f"heat maps are scored on at least 2 scenes, not {count}")
    rng = np.random.default_rng(seed)
    table = []  # scenes x 3
    for sample in samples(count, seed):
        own, other, uniform = zip(*_scene_scores(pipe, sample, size, rng), strict=True)
        table.append([np.mean(own), np.mean(other), np.mean(uniform)])
    values = np.array(table)
    picks = rng.integers(0, count, (_RESAMPLES, count))
    means = values[picks].mean(axis=1)
    names = ("heat maps", "other thing's map", "uniform")
    rows = [
        {"maps": name, "iou": float(values[:, i].mean()),
         "low": float(np.quantile(means[:, i], 0.025)), "high": float(np.quantile(means[:, i], 0.975))}
        for i, name in enumerate(names)
    ]  # fmt: skip
    return {
        "rows": rows, "scenes": count, "things": 2 * count, "sigmas": list(SIGMAS), "verdict": _verdict(means),
    }  # fmt: skip


def _scene_scores(
    pipe: DeepGenPipeline, sample: Sample, size: int, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """IoU of (own map, other object's map, uniform map) for each object."""
    condition = encode(pipe, sample.text)
    (clean,) = reference_latents(pipe, [render(sample.scene, size)])
    noise = rng.standard_normal(clean.shape, np.float32)
    total: Any = 0.0
    for sigma in SIGMAS:
        total = total + heat_maps(pipe, condition, (1 - sigma) * clean + sigma * noise, sigma)[1]
    texts = [word.text.lower() for word in condition.words]
    maps = [_sum(total, texts, (thing.colour, thing.shape)) for thing in sample.scene.things]
    masks = [mask_of(sample.scene, thing, size) for thing in sample.scene.things]
    return [(iou(maps[i], masks[i]), iou(maps[1 - i], masks[i]), uniform_iou(masks[i])) for i in range(2)]


def _sum(maps: np.ndarray, texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
    return np.sum([maps[texts.index(name)] for name in names], axis=0)


def _verdict(means: np.ndarray) -> str:
    """Compares the heat maps with each baseline by their bootstrap intervals."""
    parts = []
    for i, name in ((2, "a uniform map"), (1, "the other thing's map")):
        low, high = np.quantile(means[:, 0] - means[:, i], (0.025, 0.975))
        word = "above" if low > 0 else "below" if high < 0 else "not distinguishable from"
        parts.append(f"{word} {name} (difference {low:+.3f} to {high:+.3f})")
    return f"The heat maps are {' and '.join(parts)}."
