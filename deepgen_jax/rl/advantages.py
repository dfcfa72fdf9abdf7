"""Advantages of a batch of generated images from several rewards.

Rows of the reward matrix are images, grouped by prompt: rows ``g * group_size`` to ``(g + 1) * group_size - 1`` are
the group of prompt g. A reward that is not finite is missing, never zero: it enters no statistics, and its term is left
out of the image's weighted sum in such a way that the image is neither favoured nor punished for it. An image without
any reward of non-zero weight gets advantage 0 and enters no statistics of the weighted sums.

A new kind is one function and one line in ``_KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepgen_jax.errors import DeepGenError

EPSILON = 1e-4
CLIP = 5.0


def compute(kind: str, rewards: ArrayLike, weights: ArrayLike, group_size: int) -> jax.Array:
    """Advantage of every image, clipped to +-5.

    Args:
      kind: "gdpo" (each reward standardised in its group, weighted sum, standardised over the batch; paper eq. 2),
        "grpo" (weighted sum standardised in its group), "grpo_global_std" (group mean, batch standard deviation) or
        "reinforcepp" (batch mean and standard deviation). Standard deviations are unbiased, plus 1e-4.
      rewards: [N, K], NaN where missing; N is the whole batch, over all devices.
      weights: [N, K].
      group_size: images of one prompt; divides N.

    Returns:
      float32 [N].

    Raises:
      DeepGenError: unknown kind, or shapes that do not fit.
    """
    if kind not in _KINDS:
        raise DeepGenError(f"advantage kind {kind!r} is unknown; use one of {', '.join(_KINDS)}")
    rewards, weights = jnp.asarray(rewards, jnp.float32), jnp.asarray(weights, jnp.float32)
    if rewards.ndim != 2 or rewards.shape != weights.shape:
        raise DeepGenError(f"rewards {rewards.shape} and weights {weights.shape} must both be [images, rewards]")
    if group_size < 1 or rewards.shape[0] % group_size:
        raise DeepGenError(f"{rewards.shape[0]} images do not divide into groups of {group_size}")
    groups = (-1, group_size, rewards.shape[1])
    rewards, weights = rewards.reshape(groups), weights.reshape(groups)
    present = jnp.isfinite(rewards)
    counted = jnp.any(present & (weights != 0), axis=-1)
    advantages = _KINDS[kind](jnp.where(present, rewards, 0), present, weights, counted)
    return jnp.where(counted, jnp.clip(advantages, -CLIP, CLIP), 0).reshape(-1)


# Functions of rewards, present, weights [groups, G, K] and counted [groups, G], which give advantages [groups, G].


def _gdpo(rewards: jax.Array, present: jax.Array, weights: jax.Array, counted: jax.Array) -> jax.Array:
    mean, std = _statistics(rewards, present, axis=1)
    standardised = jnp.where(present, (rewards - mean) / (std + EPSILON), 0)
    return _over_batch(jnp.sum(weights * standardised, axis=-1), counted)


def _grpo(rewards: jax.Array, present: jax.Array, weights: jax.Array, counted: jax.Array) -> jax.Array:
    total = _total(rewards, present, weights)
    mean, std = _statistics(total, counted, axis=1)
    return (total - mean) / (std + EPSILON)


def _grpo_global_std(rewards: jax.Array, present: jax.Array, weights: jax.Array, counted: jax.Array) -> jax.Array:
    total = _total(rewards, present, weights)
    mean, _ = _statistics(total, counted, axis=1)
    _, std = _statistics(total, counted, axis=None)
    return (total - mean) / (std + EPSILON)


def _reinforcepp(rewards: jax.Array, present: jax.Array, weights: jax.Array, counted: jax.Array) -> jax.Array:
    return _over_batch(_total(rewards, present, weights), counted)


_KINDS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "gdpo": _gdpo,
    "grpo": _grpo,
    "grpo_global_std": _grpo_global_std,
    "reinforcepp": _reinforcepp,
}


def _statistics(values: jax.Array, mask: jax.Array, axis: int | None) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased standard deviation of the values in the mask, axes kept; the latter is 0 of fewer than two."""
    count = jnp.sum(mask, axis=axis, keepdims=True)
    mean = jnp.sum(jnp.where(mask, values, 0), axis=axis, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(mask, jnp.square(values - mean), 0), axis=axis, keepdims=True)
    return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def _over_batch(total: jax.Array, counted: jax.Array) -> jax.Array:
    mean, std = _statistics(total, counted, axis=None)
    return (total - mean) / (std + EPSILON)


def _total(rewards: jax.Array, present: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of an image's rewards, [groups, G].

    Dropping a missing term would make it a reward of 0. The mean of its group stands in for it (of the batch, where the
    group has none), which drops it from the image's deviation from that mean.
    """
    group_mean, _ = _statistics(rewards, present, axis=1)
    reward_axes = (0, 1)
    batch_mean = jnp.sum(jnp.where(present, rewards, 0), reward_axes) / jnp.maximum(jnp.sum(present, reward_axes), 1)
    neutral = jnp.where(jnp.any(present, axis=1, keepdims=True), group_mean, batch_mean)
    return jnp.sum(weights * jnp.where(present, rewards, neutral), axis=-1)
