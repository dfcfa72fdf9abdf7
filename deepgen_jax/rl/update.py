"""One optimiser update of the policy: gradients accumulated over steps and micro-batches, and the auxiliary loss.

Gradients are summed in nested scans, so that memory does not depend on the number of steps, of images, or on the group
size; only the trajectory itself grows with them. Everything is a function of global arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.inference.programs import Condition
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.random_keys import Update
from deepgen_jax.rl.algorithms import get_algorithm
from deepgen_jax.rl.objective import RatioStatistics, penalty, step_of
from deepgen_jax.rl.policy import Canvas, policy_variables, rows_of, velocity
from deepgen_jax.rl.rl_config import PolicyConfig
from deepgen_jax.rl.rollout import Trajectory
from deepgen_jax.training.inputs import MicroBatch
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.state import TrainState, apply_gradients
from deepgen_jax.training.supervised import StepSettings, supervised_gradients


@dataclass(frozen=True)
class UpdateSettings:
    """Static settings of an update.

    Attributes:
      canvas: sizes of the images.
      policy: how to learn.
      supervised: of the auxiliary loss; its adapter scale and moving average are the update's as well.
      sampler, eta: of the rollout.
      guidance_scale: of the rollout; None for none.
    """

    canvas: Canvas
    policy: PolicyConfig
    supervised: StepSettings
    sampler: str = "cps"
    eta: float = 1.0
    guidance_scale: float | None = None


class VelocityLoss(NamedTuple):
    """Loss of one micro-batch: losses of the velocity at given latents.

    Attributes:
      latents: [b, T, D] float32, where the velocity is evaluated.
      sigma: noise level, scalar or [b].
      policy: velocity -> (scalar loss, statistics); gradients flow to the velocity alone.
      penalty: velocity -> scalar penalty, already weighted; None for none.
    """

    latents: jax.Array
    sigma: jax.Array
    policy: Callable[[jax.Array], tuple[jax.Array, Any]]
    penalty: Callable[[jax.Array], jax.Array] | None


class PolicyGradients(NamedTuple):
    """Sums over (step, micro-batch), divided by their number.

    Attributes:
      gradients: ("policy", "kl") -> tree where they are separate, else "grpo" -> their sum.
      policy, kl: mean losses, the latter weighted.
      statistics: of all micro-batches.
    """

    gradients: dict[str, Tree]
    policy: jax.Array
    kl: jax.Array
    statistics: Any


class Velocities:
    """Velocities of the policy and its reference at latents of the images of a batch."""

    def __init__(self, model: DeepGen, settings: UpdateSettings, frozen: Tree, condition: Condition) -> None:
        self._model, self._settings, self._frozen, self._condition = model, settings, frozen, condition

    def at(self, variables: Tree, latents: jax.Array, sigma: jax.Array, images: jax.Array) -> jax.Array:
        """Under any variables of the MMDiT."""
        canvas, scale = self._settings.canvas, self._settings.guidance_scale
        rows = rows_of(self._condition, images, canvas.group_size, 1 if scale is None else 2)
        return velocity(self._model, variables, canvas, canvas.split(latents), sigma, rows, scale)

    def policy(self, trained: Mapping[str, Any] | None, *where: jax.Array) -> jax.Array:
        """Under trained parameters and adapters; None for what does not train alone."""
        return self.at(policy_variables(self._frozen, trained, self._settings.supervised.lora_scale), *where)

    def reference(self, reference: Tree | None, *where: jax.Array) -> jax.Array:
        """Under the frozen start; no gradient."""
        return jax.lax.stop_gradient(self.policy(reference, *where))


def accumulated_gradients(
    velocities: Velocities,
    loss_of: Callable[[Any, jax.Array], VelocityLoss],
    trainable: Tree,
    outer: Any,
    images: jax.Array,
    empty: Any,
    separate: bool,
) -> PolicyGradients:
    """Gradients summed over (outer, micro-batch) in nested scans.

    Args:
      velocities: of the policy.
      loss_of: (one of ``outer``, images [b]) -> its loss.
      trainable: what the gradient is taken of.
      outer: stacked on a leading axis, such as the steps [K].
      images: int32 [M, b], the micro-batches.
      empty: statistics of no micro-batch, with a method ``merged``.
      separate: keep the gradients of policy loss and penalty separate, which takes one more gradient in memory and a
        second backward pass through the network.
    """
    number = jax.tree.leaves(outer)[0].shape[0] * images.shape[0]

    def one(item: Any, micro: jax.Array) -> tuple[dict[str, Tree], jax.Array, jax.Array, Any]:
        what = loss_of(item, micro)
        v, pullback = jax.vjp(lambda t: velocities.policy(t, what.latents, what.sigma, micro), trainable)
        (policy, statistics), towards = jax.value_and_grad(what.policy, has_aux=True)(v)
        kl, back = jnp.float32(0), jnp.zeros_like(v)
        if what.penalty is not None:
            kl, back = jax.value_and_grad(what.penalty)(v)
        cotangents = {"policy": towards, "kl": back} if separate else {"grpo": towards + back}
        gradients = {name: pullback(cotangent / number)[0] for name, cotangent in cotangents.items()}
        return gradients, policy / number, kl / number, statistics

    def micro_batch(carry: tuple[Any, Any], inputs: tuple[Any, jax.Array]) -> tuple[tuple[Any, Any], None]:
        sums, statistics = carry
        *found, more = one(*inputs)
        return (jax.tree.map(jnp.add, sums, tuple(found)), statistics.merged(more)), None

    def scan_images(carry: tuple[Any, Any], item: Any) -> tuple[tuple[Any, Any], None]:
        return jax.lax.scan(lambda c, micro: micro_batch(c, (item, micro)), carry, images)

    names = ("policy", "kl") if separate else ("grpo",)
    zeros = {name: jax.tree.map(jnp.zeros_like, trainable) for name in names}
    start = ((zeros, jnp.float32(0), jnp.float32(0)), empty)
    (sums, statistics), _ = jax.lax.scan(scan_images, start, outer)
    return PolicyGradients(*sums, statistics)


def policy_gradients(
    model: DeepGen,
    settings: UpdateSettings,
    trainable: Tree,
    frozen: Tree,
    reference: Tree | None,
    trajectory: Trajectory,
    condition: Condition,
    advantages: jax.Array,
    images: jax.Array,
    timesteps: jax.Array,
) -> PolicyGradients:
    """Gradient of the policy loss and the KL penalty (paper eq. 3, negated).

    Args:
      model, settings: static.
      trainable: {"params": ..., "lora": ...} as in ``TrainState``.
      frozen: parameters that do not train.
      reference: starting values of ``trainable``; None if that is fresh adapters alone, or without a penalty.
      trajectory: of B images.
      condition: of their prompts, or with guidance of pairs.
      advantages: float32 [B].
      images: int32 [M, b], those to learn from, in micro-batches.
      timesteps: int32 [K], those to learn from.
    """
    policy, sampler = settings.policy, settings.sampler
    surrogate = get_algorithm(policy.algorithm).surrogate
    if surrogate is None:
        raise ValueError(f"{policy.algorithm} does not learn from trajectories")
    velocities = Velocities(model, settings, frozen, condition)

    def loss_of(index: jax.Array, micro: jax.Array) -> VelocityLoss:
        step = step_of(trajectory, index, micro, settings.eta)
        step = step._replace(sample=settings.canvas.split(step.sample), following=settings.canvas.split(step.following))

        def loss(v: jax.Array) -> tuple[jax.Array, RatioStatistics]:
            found = surrogate(sampler, policy.clip, step, v, advantages[micro])
            return found.loss, RatioStatistics.of(found.ratio, policy.clip)

        if not policy.beta:
            return VelocityLoss(step.sample, step.levels[0], loss, None)
        anchor = velocities.reference(reference, step.sample, step.levels[0], micro)
        return VelocityLoss(
            step.sample, step.levels[0], loss, lambda v: policy.beta * penalty(policy.kl, sampler, step, v, anchor)
        )

    empty, separate = RatioStatistics.empty(), policy.log_part_norms
    return accumulated_gradients(velocities, loss_of, trainable, timesteps, images, empty, separate)


def draw_timesteps(key: jax.Array, steps: int, fraction: float) -> jax.Array:
    """Steps to learn from, drawn without replacement from all but the last; int32 [K], see :func:`learned_steps`."""
    return jnp.sort(jax.random.permutation(key, steps - 1)[: learned_steps(steps, fraction)]).astype(jnp.int32)


def learned_steps(steps: int, fraction: float) -> int:
    """Number of a rollout's steps that an update learns from: floor(fraction * steps), at least 1, never the last."""
    return min(max(int(fraction * steps), 1), steps - 1)


def draw_images(key: jax.Array, images: int, policy: PolicyConfig, part: jax.Array | int) -> jax.Array:
    """Images of one of a rollout's updates in micro-batches, int32 [M, b]; the parts are disjoint and random."""
    order = jnp.arange(images, dtype=jnp.int32)
    if policy.updates_per_rollout > 1:
        order = jax.random.permutation(key, order)
    return order.reshape(policy.updates_per_rollout, -1, policy.micro_batch)[part]


class UpdateKeys(NamedTuple):
    """Randomness of an update.

    Attributes:
      rollout: key of the rollout, the same for all its updates.
      sft: task -> keys [A, B] of the auxiliary micro-batches.
    """

    rollout: jax.Array
    sft: Mapping[str, jax.Array]


def grpo_step(
    model: DeepGen,
    optimizer: optax.GradientTransformation,
    settings: UpdateSettings,
    state: TrainState,
    frozen: Tree,
    reference: Tree | None,
    trajectory: Trajectory,
    condition: Condition,
    advantages: jax.Array,
    sft_micro_batches: Mapping[str, MicroBatch],
    keys: UpdateKeys,
    part: jax.Array | int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of GRPO or GRPO-Guard from a rollout: (1 - lambda) GRPO + lambda SFT (paper eq. 5).

    Args:
      sft_micro_batches: task -> stacked micro-batches; empty for no auxiliary loss, with lambda 0.
      part: number of the update in its rollout; the parts of a rollout learn from disjoint images.
      the others: as in :func:`policy_gradients` and ``supervised.train_step``.

    Returns:
      The new state and float32 scalars. ``first_ratio_deviation`` is the largest |ratio - 1| of a rollout's first
      update, where every ratio is 1 up to rounding, and 0 for later ones.
    """
    steps, images = trajectory.log_probs.shape
    micro = draw_images(jax.random.fold_in(keys.rollout, Update.PARTS), images, settings.policy, part)
    timesteps_key = jax.random.fold_in(jax.random.fold_in(keys.rollout, Update.TIMESTEPS), part)
    timesteps = draw_timesteps(timesteps_key, steps, settings.policy.timestep_fraction)
    found = policy_gradients(
        model, settings, state.trainable, frozen, reference, trajectory, condition, advantages, micro, timesteps
    )
    state, metrics = finish(model, optimizer, settings, state, frozen, found, sft_micro_batches, keys.sft)
    first = jnp.where(jnp.asarray(part) == 0, found.statistics.deviation, 0.0)
    return state, metrics | {"first_ratio_deviation": first}


def finish(
    model: DeepGen,
    optimizer: optax.GradientTransformation,
    settings: UpdateSettings,
    state: TrainState,
    frozen: Tree,
    found: PolicyGradients,
    sft_micro_batches: Mapping[str, MicroBatch],
    sft_keys: Mapping[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Adds the auxiliary loss and updates the state; the last part of any algorithm's update.

    Gradient norms of the parts are those of the weighted terms of the total loss.
    """
    share = settings.policy.sft_weight if sft_micro_batches else 0.0
    gradients = {name: jax.tree.map(lambda x: (1 - share) * x, tree) for name, tree in found.gradients.items()}
    loss = (1 - share) * (found.policy + found.kl)
    metrics = {"loss/policy": found.policy, **found.statistics.metrics()}
    if settings.policy.beta:
        metrics["loss/kl"], metrics["kl"] = found.kl, found.kl / settings.policy.beta
    norms = {name: optax.tree.norm(tree) for name, tree in gradients.items()}
    first, *others = gradients.values()
    total = jax.tree.map(lambda *x: sum(x), first, *others)
    if share:
        separate = settings.policy.log_part_norms
        sft, sft_metrics = supervised_gradients(
            model,
            settings.supervised,
            state.trainable,
            frozen,
            sft_micro_batches,
            sft_keys,
            None if separate else total,
            share,
        )
        if separate:
            norms["sft"] = optax.tree.norm(sft)
        total = jax.tree.map(jnp.add, total, sft) if separate else sft
        metrics["loss/sft"] = sft_metrics["loss"]
        loss = loss + share * sft_metrics["loss"]
    new_state, applied = apply_gradients(optimizer, settings.supervised.ema_decay, state, total, loss)
    return new_state, metrics | applied | {"loss": loss} | {f"grad_norm/{name}": x for name, x in norms.items()}
