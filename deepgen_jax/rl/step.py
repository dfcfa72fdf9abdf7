"""What a run of reinforcement learning jits: made from its configuration and the model's sizes, without weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.models.attention import choose_kernel
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.mesh import batch_sharding
from deepgen_jax.rl.algorithms import ALGORITHMS
from deepgen_jax.rl.nft import nft_step
from deepgen_jax.rl.policy import Canvas
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.rl.rollout import RolloutSettings
from deepgen_jax.rl.update import UpdateSettings, grpo_step, learned_steps
from deepgen_jax.training.optimizer import learning_rate, make_optimizer
from deepgen_jax.training.state import TrainState
from deepgen_jax.training.supervised import StepSettings

#: (state, frozen, reference, *learned, auxiliary micro-batches, keys, part) -> (state, metrics); ``learned`` is what
#: the algorithm learns from, see ``update.grpo_step`` and ``nft.nft_step``.
Update = Callable[..., tuple[TrainState, dict[str, Any]]]


def policy_model(config: GRPOConfig, model: DeepGenConfig, mesh: Mesh) -> DeepGen:
    """The network of rollout and update: with the same attention their rounding is the same, and first ratios are 1."""
    attention = choose_kernel(mesh, config.dtype, gradients=True)
    return DeepGen(model, dtype=jnp.dtype(config.dtype), remat=config.remat, attention=attention)


def canvas_of(config: GRPOConfig, model: DeepGenConfig, mesh: Mesh) -> Canvas:
    """Sizes of the run's images, split over the mesh."""
    side = config.rollout.size // model.vae.downscale
    return Canvas(side, side, config.rollout.group_size, batch_sharding(mesh, 1))


def rollout_settings(config: GRPOConfig, canvas: Canvas) -> RolloutSettings:
    """Static settings of ``rollout.rollout``."""
    return RolloutSettings(canvas, config.rollout.sampler, jnp.dtype(config.rollout.dtype))


def guidance_scale(config: GRPOConfig) -> float | None:
    """Of rollout and update alike; None for none."""
    return config.rollout.guidance_scale or None


def run_optimizer(config: GRPOConfig) -> optax.GradientTransformation:
    """The optimiser over all updates of the run."""
    return make_optimizer(config.optimizer, config.steps * config.policy.updates_per_rollout)


def learning_passes(config: GRPOConfig) -> int:
    """What all updates of a rollout cost for each image, in forward passes of the MMDiT (see ``flops.training``).

    What the backward pass computes again is not counted.
    """
    each = (3 if "mmdit" in config.trains else 2) + bool(config.policy.beta)
    if ALGORITHMS[config.policy.algorithm].trajectory:
        return learned_steps(config.rollout.steps, config.policy.timestep_fraction) * each
    return config.policy.nft.draws * (each + 1)  # the old policy's velocity, too


def make_update(
    config: GRPOConfig,
    model: DeepGen,
    optimizer: optax.GradientTransformation,
    scheduler: SchedulerConfig,
    lora_scale: float,
    canvas: Canvas,
) -> Update:
    """An update of the run's algorithm, as the stage jits it."""
    settings = UpdateSettings(
        canvas,
        config.policy,
        StepSettings(scheduler, lora_scale, ema_decay=config.ema_decay),
        config.rollout.sampler,
        config.rollout.eta,
        guidance_scale(config),
    )
    rate = learning_rate(config.optimizer, config.steps * config.policy.updates_per_rollout)
    one = grpo_step if ALGORITHMS[config.policy.algorithm].trajectory else nft_step
    update = partial(one, model, optimizer, settings)

    def step(state: TrainState, *args: Any) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = update(state, *args)
        return new, metrics | {"learning_rate": rate(state.step)}

    return step
