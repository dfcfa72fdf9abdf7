"""Losses of policy-gradient training of a flow model: the clipped objective and the KL penalties.

Everything is float32. The clip range is as small as 1e-4, so log-probabilities must never be rounded to bfloat16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepgen_jax.errors import DeepGenError


def policy_ratio(log_prob: ArrayLike, old_log_prob: ArrayLike) -> jax.Array:
    """Importance ratio exp(log p - log p_old), float32 [B]; exactly 1 on the first update of a rollout."""
    return jnp.exp(jnp.asarray(log_prob, jnp.float32) - jnp.asarray(old_log_prob, jnp.float32))


def clipped_policy_loss(
    log_prob: ArrayLike, old_log_prob: ArrayLike, advantage: ArrayLike, clip: float | ArrayLike
) -> jax.Array:
    """Clipped policy-gradient loss, mean of max(-A r, -A clip(r, 1 - clip, 1 + clip)) (paper eq. 3, negated).

    Args:
      log_prob: [B], of the policy being trained.
      old_log_prob: [B], of the policy that sampled.
      advantage: [B]; a sample of advantage 0 adds nothing to the sum and still counts in the mean.
      clip: clip range of the ratio.

    Returns:
      Scalar float32.
    """
    ratio = policy_ratio(log_prob, old_log_prob)
    advantage = jnp.asarray(advantage, jnp.float32)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.mean(jnp.maximum(-advantage * ratio, -advantage * clipped))


def velocity_kl(v: ArrayLike, v_ref: ArrayLike, std: ArrayLike | None = None, reduction: str = "mean") -> jax.Array:
    """KL penalty in velocity space: squared difference of the policy's and the reference's velocity (paper eq. 4).

    Args:
      v: policy velocity [B, ...].
      v_ref: reference velocity [B, ...].
      std: None, or the schedule's standard deviation (``samplers.Transition.schedule_std``), scalar or [B], to divide
        the square by 2 std^2 + 1e-7.
      reduction: "mean" over all elements, or "sum" over a sample's elements and mean over samples.

    Returns:
      Scalar float32.
    """
    return _penalty(v, v_ref, std, reduction)


def latent_kl(mean: ArrayLike, mean_ref: ArrayLike, std: ArrayLike | None = None, reduction: str = "mean") -> jax.Array:
    """KL penalty in sample space: squared difference of the two policies' transition means, [B, ...].

    With ``std``, that of the noise added, it is the KL divergence of the two transitions (an element's, by default);
    other arguments and the result as for ``velocity_kl``.
    """
    return _penalty(mean, mean_ref, std, reduction)


def _penalty(value: ArrayLike, reference: ArrayLike, std: ArrayLike | None, reduction: str) -> jax.Array:
    squares = jnp.square(jnp.asarray(value, jnp.float32) - jnp.asarray(reference, jnp.float32))
    squares = squares.reshape(squares.shape[0], -1)
    if reduction not in ("mean", "sum"):
        raise DeepGenError(f"KL reduction {reduction!r} is unknown; use mean or sum")
    per_sample = jnp.mean(squares, axis=1) if reduction == "mean" else jnp.sum(squares, axis=1)
    if std is not None:
        # 1e-7 keeps the last step of a schedule, which may add no noise, finite.
        per_sample = per_sample / (2 * jnp.square(jnp.asarray(std, jnp.float32)) + 1e-7)
    return jnp.mean(per_sample)
