"""The programs of a run of reinforcement learning, made from its configuration and from weights or their shapes.

The stage runs them on arrays; ``deepgen compile`` lowers them on shapes (`deepgen_jax.rl.abstract_programs`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.models.deepgen import DeepGen, make_network
from deepgen_jax.parallel.abstract import map_arrays
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.parallel.mesh import batch_sharding, replicated
from deepgen_jax.random_keys import Rollout
from deepgen_jax.rl.algorithms import get_algorithm
from deepgen_jax.rl.nft import nft_step
from deepgen_jax.rl.policy import Canvas, policy_variables
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.rl.rollout import RolloutSettings
from deepgen_jax.rl.update import UpdateSettings, grpo_step, learned_steps
from deepgen_jax.training.optimizer import learning_rate, make_optimizer
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.state import TrainState, shardings_of, start_state
from deepgen_jax.training.supervised import StepSettings
from deepgen_jax.training.weights import Weights


def policy_model(config: GRPOConfig, model: DeepGenConfig, mesh: Mesh) -> DeepGen:
    """The network of rollout and update: with the same attention their rounding is the same, and first ratios are 1."""
    return make_network(model, mesh, config.dtype, remat=config.chosen_remat)


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
    """Cost of all updates of a rollout for each image, in forward passes of the MMDiT (see ``flops.training``).

    Recomputation in the backward pass is not counted.
    """
    each = (3 if "mmdit" in config.trains else 2) + bool(config.policy.beta)
    if get_algorithm(config.policy.algorithm).trajectory:
        return learned_steps(config.rollout.steps, config.policy.timestep_fraction) * each
    return config.policy.nft.draws * (each + 1)  # the old policy's velocity, too


def jit_update(
    config: GRPOConfig,
    model: DeepGen,
    optimizer: optax.GradientTransformation,
    scheduler: SchedulerConfig,
    lora_scale: float,
    canvas: Canvas,
    state: TrainState,
    mesh: Mesh,
) -> device_jit:
    """The compiled program of an update of the run's algorithm.

    It maps (state, frozen, reference, *learned, auxiliary micro-batches, keys, part) to (state, metrics); ``learned``
    is what the algorithm learns from, see ``update.grpo_step`` and ``nft.nft_step``.

    Args:
      config: of the run.
      model: see :func:`policy_model`.
      optimizer: see :func:`run_optimizer`.
      scheduler: of the model.
      lora_scale: alpha over rank of adapters that train.
      canvas: see :func:`canvas_of`.
      state: arrays, or shapes with shardings; the new state is sharded alike.
      mesh: metrics are replicated on it.
    """
    settings = UpdateSettings(
        canvas,
        config.policy,
        StepSettings(scheduler, lora_scale, ema_decay=config.ema_decay),
        config.rollout.sampler,
        config.rollout.eta,
        guidance_scale(config),
    )
    rate = learning_rate(config.optimizer, config.steps * config.policy.updates_per_rollout)
    one = grpo_step if get_algorithm(config.policy.algorithm).trajectory else nft_step
    update = partial(one, model, optimizer, settings)

    def step(state: TrainState, *args: Any) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = update(state, *args)
        return new, metrics | {"learning_rate": rate(state.step)}

    return device_jit(step, gradients=True, donate_argnums=0, out_shardings=(shardings_of(state), replicated(mesh)))


class GRPOPrograms(NamedTuple):
    """Compiled programs and device arrays of a reinforcement learning run, built from arrays or from shapes.

    Attributes:
      model: the network of rollout and update: with the same attention their rounding is the same, and the first
        ratios are 1.
      frozen: weights that rollout and update take.
      reference: starting values of what trains, for the KL penalty; None if they are in ``frozen``, or not needed.
      canvas: sizes of the run's images.
      update: (state, frozen, reference, *learned, auxiliary micro-batches, keys, part) -> (state, metrics); ``learned``
        is what the algorithm learns from, see ``update.grpo_step`` and ``nft.nft_step``. The state is donated.
    """

    model: DeepGen
    frozen: Tree
    reference: Tree | None
    canvas: Canvas
    update: device_jit


def policy_weights(config: GRPOConfig, frozen: Tree, state: TrainState, lora_scale: float) -> Tree:
    """Variables of the policy that samples; see `deepgen_jax.rl.policy.policy_variables`."""
    policy = state.ema if get_algorithm(config.policy.algorithm).old_policy else state.trainable
    return policy_variables(frozen, policy, lora_scale)


def make_programs(config: GRPOConfig, weights: Weights, mesh: Mesh) -> tuple[TrainState, GRPOPrograms]:
    """The state at step 0 and the programs of a run, from arrays or from shapes with shardings.

    The arrays of ``weights.trainable`` are donated to the state.
    """
    reference = None
    if config.policy.beta and (weights.trainable["params"] or weights.adapters_begun):
        # Rounded as the computation rounds its weights anyway; adapters are added unrounded.
        dtype = jnp.dtype(config.dtype)
        reference = {
            "params": map_arrays(lambda x: x.astype(dtype), weights.trainable["params"]),
            "lora": map_arrays(jnp.copy, weights.trainable["lora"]),
        }
    optimizer = run_optimizer(config)
    average = config.ema_decay is not None or get_algorithm(config.policy.algorithm).old_policy
    state = start_state(optimizer, weights.trainable, mesh, ema=average)
    model = policy_model(config, weights.config, mesh)
    canvas = canvas_of(config, weights.config, mesh)
    frozen = {part: tree for part, tree in weights.frozen.items() if part not in ("vae", "vision")}
    update = jit_update(
        config, model, optimizer, weights.scheduler, weights.lora_scale, canvas, state, mesh
    )
    return state, GRPOPrograms(model, frozen, reference, canvas, update)


def jit_update_key(mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
    """The program that makes the key of a rollout's updates from (seed, step)."""

    def update_key(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), Rollout.UPDATE), step)

    return jax.jit(update_key, out_shardings=replicated(mesh))
