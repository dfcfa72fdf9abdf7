"""Analytic memory of a training run on one device: weights, optimiser, and what the backward pass takes.

Weights and state are counted from their shapes and shardings. What the backward pass keeps is counted layer by layer;
its work space is a multiple of the tokens at once, fitted to programs that were compiled for v5e, v5p, v6e and H100
(`docs/data/scaling.json`). Nothing is compiled, and no device is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.models.mmdit import block_runs
from deepgen_jax.models.qwen_text import selected_layers
from deepgen_jax.models.stack import Remat
from deepgen_jax.parallel.abstract import reshard, shard_bytes
from deepgen_jax.parallel.mesh import AXES, BATCH_AXES
from deepgen_jax.parallel.rules import gathered_shardings, shardings
from deepgen_jax.training.optimizer import make_optimizer
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.state import start_state
from deepgen_jax.training.weights import abstract_start

# Flash attention on TPUs pads heads to this many channels.
_LANES = 128
# float32 channels of the VAE's first and widest level that encoding holds at once, as a multiple of its width.
_ENCODER_COPIES = 10


class Passes(NamedTuple):
    """A forward and backward pass.

    Attributes:
      samples: at once over all devices, merged micro-batches included.
      image: tokens of target and references in the MMDiT.
      text: prompt and think tokens.
      runs_text: the language model and the bridge are part of it.
      trains_text: gradients go through the language model.
      loops: how often it runs in a step. Single passes become one program without a loop, and overlap.
    """

    samples: int
    image: int
    text: int
    runs_text: bool = True
    trains_text: bool = False
    loops: int = 1


@dataclass(frozen=True)
class Workload:
    """A run's largest programs.

    Attributes:
      passes: of a step; they run one after another.
      micro_batches: sizes that the mesh has to split evenly.
      step_samples: samples whose inputs are on the devices, over all devices.
      encoded: images at once in the VAE's encoder, over all devices, and their pixels.
      average: the state holds a moving average.
      reference: the trained weights are held once more in the dtype of the computation.
    """

    passes: tuple[Passes, ...]
    micro_batches: tuple[int, ...]
    step_samples: int = 0
    encoded: tuple[int, int] = (0, 0)
    average: bool = False
    reference: bool = False


class _Fit(NamedTuple):
    """Constants of a platform.

    Attributes:
      image: work space for each token of the MMDiT, in float32 vectors of its width.
      text: for each token of the language model, in float32 vectors of its inner width.
      gradients: copies of the gradients besides those that are accumulated.
    """

    image: float
    text: float
    gradients: float


class _Products(NamedTuple):
    """Memory of kept products over their size in the dtype of the computation.

    Attributes:
      inner: of the first products of feed-forward layers.
      others: of other linear layers.
    """

    inner: float
    others: float


_FITS = {"gpu": _Fit(20, 4, 1.0), "tpu": _Fit(3, 1, 1.0)}
_PRODUCTS: Mapping[Remat, _Products] = {
    "full": _Products(0, 0), "flash": _Products(0, 0), "mlp": _Products(1.1, 0), "dots": _Products(1.1, 1.1),
    "none": _Products(3.3, 3.3),
}  # fmt: skip


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, which shapes can be sharded over."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)


@dataclass(frozen=True)
class MemoryModel:
    """Memory of a run on devices of a kind.

    Attributes:
      config: of the run; its mesh, remat and gather_frozen are not used.
      model: sizes.
      workload: of the run.
      platform: "gpu" or "tpu".
      slices: TPU slices, or 1.
    """

    config: RunConfig
    model: DeepGenConfig
    workload: Workload
    platform: str
    slices: int = 1

    def bytes(self, mesh: AbstractMesh, remat: Remat, gather_frozen: bool) -> dict[str, float]:
        """Bytes a device by kind, as in the report of ``deepgen compile``.

        Args:
          mesh: sizes of the axes.
          remat, gather_frozen: as in `deepgen_jax.training.run_config`.
        """
        found = self._held(mesh, gather_frozen)
        pieces = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        gradients = found["gradients"] = found["trainable weights"]
        found["batch"] = self.workload.step_samples / pieces * self._input_bytes()
        # Over the network between slices, gradients are summed before they are split.
        copies = self._fit.gradients + (6 if self.slices > 1 else 0)
        shared = copies * gradients + 3 * self._layer_bytes()
        single, looped = 0.0, 0.0
        for each in self.workload.passes:
            size = self._backward(each, each.samples / pieces, remat)
            single, looped = (single + size, looped) if each.loops == 1 else (single, max(looped, size + gradients))
        images, pixels = self.workload.encoded
        encoder = images / pieces * pixels * 4 * self.model.vae.block_out_channels[0] * _ENCODER_COPIES
        work = shared + max(single, looped) / mesh.shape["tensor"]
        return found | {"activations and work space": max(work, encoder)}

    @property
    def _fit(self) -> _Fit:
        return _FITS[self.platform]

    @property
    def _width(self) -> int:
        """Bytes of a number in the computation."""
        return int(jnp.dtype(self.config.dtype).itemsize)

    def _held(self, mesh: AbstractMesh, gather_frozen: bool) -> dict[str, float]:
        """Weights and optimiser."""
        where: Any = mesh
        trainable, frozen, moments = self._shapes
        layout = {part: shardings(tree, where) for part, tree in trainable.items()}
        trained = shard_bytes(reshard(trainable, layout))
        layout = shardings(frozen, where)
        if gather_frozen and "text" in frozen:
            layout["text"] = gathered_shardings(frozen["text"], where, "text")
        reference = self._width / 4 if self.workload.reference else 0.0
        return {
            "trainable weights": trained,
            "moving average": trained if self.workload.average else 0.0,
            "frozen weights": shard_bytes(reshard(frozen, layout)) + reference * trained,
            "optimiser": moments * trained,
        }

    @cached_property
    def _shapes(self) -> tuple[Tree, Tree, float]:
        """Trainable and frozen weights, and the optimiser's bytes over those of the former."""
        whole: Any = abstract_mesh(dict.fromkeys(AXES, 1))
        weights = abstract_start(self.config, self.model, whole)
        optimizer = make_optimizer(self.config.optimizer, self.config.steps)
        state = start_state(optimizer, weights.trainable, whole, ema=False)
        return weights.trainable, weights.frozen, shard_bytes(state.opt_state) / shard_bytes(weights.trainable)

    def _input_bytes(self) -> float:
        """Of the largest sample of a step: float32 patches, and hidden states of the images in its prompt."""
        mmdit = self.model.mmdit
        patch = mmdit.in_channels * mmdit.patch_size**2
        each = [p.image * (4 * patch + 8) + 4 * p.text * self.model.text.hidden_size for p in self.workload.passes]
        return max(each, default=0.0)

    def _layer_bytes(self) -> int:
        """Weights of the largest layer, which is gathered before use."""
        text, bridge, mmdit = self.model.text, self.model.bridge, self.model.mmdit.hidden_size
        keys = text.num_kv_heads * text.head_dim
        return self._width * max(
            text.hidden_size * (2 * text.hidden_size + 2 * keys + 3 * text.intermediate_size),
            bridge.hidden_size * (4 * bridge.hidden_size + 2 * bridge.intermediate_size),
            43 * mmdit**2,  # a dual layer: 12 projections, two feed-forward layers of 8, modulation of 15
        )

    def _backward(self, each: Passes, samples: float, remat: Remat) -> float:
        """What a pass keeps for the gradients, and its work space, for ``samples`` on a device."""
        total = self._mmdit(samples * each.image, samples * each.text, remat)
        if self._width == 4:  # attention without flash: the scores of a layer and their gradients
            total += 12 * samples * self.model.mmdit.num_heads * (each.image + each.text) ** 2
        return total + (self._condition(samples * each.text, each.trains_text, remat) if each.runs_text else 0.0)

    def _mmdit(self, image: float, text: float, remat: Remat) -> float:
        mmdit, products = self.model.mmdit, _PRODUCTS[remat]
        tokens, heads, dim, size = image + text, mmdit.num_heads, mmdit.head_dim, mmdit.hidden_size
        total = self._fit.image * tokens * size * 4
        for run in block_runs(mmdit):
            # Both streams and the results of the feed-forward layers; q, k, v, out and the inner feed-forward layer.
            vectors = 2 * tokens + 4 * (products.inner * tokens + products.others * (tokens + image * run.dual))
            attended = self._attended(tokens + image * run.dual, heads, dim, remat)
            total += run.length * (vectors * size * self._width + attended)
        return total

    def _condition(self, tokens: float, trains_text: bool, remat: Remat) -> float:
        """Language model and bridge."""
        text, bridge, width, products = self.model.text, self.model.bridge, self._width, _PRODUCTS[remat]
        total = 2.0 * tokens * bridge.num_layers * bridge.hidden_size
        connector = products.others * 5 * bridge.hidden_size + products.inner * bridge.intermediate_size
        total += tokens * bridge.num_layers * connector
        total += tokens * len(selected_layers(text.num_layers, bridge.selection_stride)) * text.hidden_size
        if not trains_text:
            return total * width
        keys = text.num_kv_heads * text.head_dim
        # The residual stream, which is also collected, and the narrow products of seven adapters.
        layer: float = 2 * text.hidden_size + 7 * self.config.lora.rank
        layer += products.others * (3 * text.hidden_size + 2 * keys) + products.inner * 2 * text.intermediate_size
        total += (text.num_layers - 1) * layer * tokens
        attended = (text.num_layers - 1) * self._attended(tokens, text.num_heads, text.head_dim, remat)
        return total * width + attended + self._fit.text * tokens * text.intermediate_size * 4

    def _attended(self, tokens: float, heads: int, dim: int, remat: Remat) -> float:
        """Kept results of flash attention and their softmax statistics."""
        if self._width != 2 or (self.platform == "tpu" and remat == "full"):
            return 0.0
        channels = -(-dim // _LANES) * _LANES if self.platform == "tpu" else dim
        return tokens * heads * (self._width * channels + 4)
