"""AdamW with decay on matrices only, global-norm clipping, warm-up, and cosine or constant learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import optax

from deepgen_jax.errors import DeepGenError
from deepgen_jax.training.trees import decays


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of one stage; the defaults are those of alignment pre-training (paper, Table 8)."""

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
    clip_norm: float = 1.0


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
    """Clipping, then AdamW; biases and norm scales do not decay."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
