"""Initial weights of an untrained bridge, as a source of a conversion."""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any

import numpy as np

from deepgen_jax.config import DeepGenConfig

from .names import weights
from .sources import Source, SourceTensor
from .transforms import Shape, rows_of


def keyed_rng(seed: int, key: str) -> np.random.Generator:
    """A generator that depends only on ``seed`` and the tensor's name, not on the order of drawing."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


class InitialBridge(Source):
    """Initial weights of think tokens, projectors and connector, as at the start of stage 1.

    Think tokens are drawn from N(0, 1/sqrt(hidden)), the output projectors (projector_2, projector_3) are zero, norms
    are the identity, and the other layers are uniform in +-1/sqrt(inputs), biases too.
    """

    layout = "fresh initialisation"

    def __init__(self, config: DeepGenConfig, seed: int) -> None:
        self.label = f"a fresh bridge (seed {seed})"
        self._seed = seed
        shapes = {key: w.shape for key, w in weights(config).items() if w.part == "bridge"}
        self.tensors = {
            key: SourceTensor(self, key, shape, "F32", functools.partial(self._load, key, shape))
            for key, shape in shapes.items()
        }
        self._fan_in = {key: self._inputs(key, shapes) for key in shapes}

    @staticmethod
    def _inputs(key: str, shapes: dict[str, Shape]) -> int:
        return shapes.get(key.replace(".bias", ".weight"), (1,))[-1]

    def _load(self, name: str, shape: Shape, rows: slice | None) -> np.ndarray:
        return rows_of(self._draw(name, shape).astype(np.float32), rows)

    def _draw(self, name: str, shape: Shape) -> np.ndarray:
        rng = keyed_rng(self._seed, name)
        if name == "meta_queries":
            return rng.normal(0.0, shape[-1] ** -0.5, shape)
        if name.startswith(("projector_2", "projector_3")):
            return np.zeros(shape)
        if "layer_norm" in name:
            return np.ones(shape) if name.endswith("weight") else np.zeros(shape)
        bound = 1 / math.sqrt(self._fan_in[name])
        return rng.uniform(-bound, bound, shape)

    def provenance(self) -> dict[str, Any]:
        return {"layout": self.layout, "seed": self._seed}
