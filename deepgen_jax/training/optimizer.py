"""AdamW or Muon with decay on matrices only, global-norm clipping, warm-up, and cosine or constant learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from deepgen_jax.errors import DeepGenError
from deepgen_jax.training.partition import decays

# Root mean square of Muon's updates per learning rate: about that of AdamW's, so that one rate does for both
# (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
_MUON_RMS = 0.2
# Output heads: orthogonal updates are for hidden layers.
_HEADS = ("proj_out",)


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of one stage; the defaults are those of alignment pre-training (paper, Table 8).

    "muon" orthogonalises the updates of linear layers and leaves all else to AdamW with Nesterov's momentum: fewer
    steps for what is trained from random weights, at more arithmetic a step.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    #: Steps of linear warm-up; a value below 1 is a share of all steps.
    warmup: float = 0.01
    #: The learning rate starts at this share of its peak.
    warmup_start: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    #: The norm of the whole gradient is cut to this; 0 leaves it as it is.
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "warmup", "warmup_start", "eps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DeepGenError(f"optimizer.{name} is {getattr(self, name)}; it must be a number of at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise DeepGenError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and below 1")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine to zero at ``steps`` or constant."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    if warmup >= steps and config.schedule == "cosine":
        raise DeepGenError(f"warm-up takes {warmup} of {steps} steps and leaves none to train; lower optimizer.warmup")
    start = config.learning_rate * config.warmup_start
    ramp = optax.linear_schedule(start, config.learning_rate, max(warmup, 1))
    if config.schedule == "constant":
        body: optax.Schedule = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "cosine":
        body = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        raise DeepGenError(f"optimizer.schedule {config.schedule!r} is unknown; choose cosine or constant")
    return optax.join_schedules([ramp, body], [warmup]) if warmup else body


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW or Muon; biases and norm scales do not decay."""
    rate = learning_rate(config, steps)
    if config.name == "muon":
        direction = muon(
            1.0,
            eps=config.eps,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=_MUON_RMS,
        )
        update = optax.chain(
            direction,
            optax.scale(-1.0),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(rate),
        )
    elif config.name == "adamw":
        update = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        )
    else:
        raise DeepGenError(f"optimizer.name {config.name!r} is unknown; choose adamw or muon")
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, update)


def _matrices(params: Any) -> Any:
    """Axes of inputs and outputs of every linear layer's weight, stacked or not; None for all other parameters."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        module, name = (entry.key for entry in path[-2:])
        # Weights of convolutions have four axes.
        if name != "kernel" or module in _HEADS or leaf.ndim > 3:
            return None
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)
