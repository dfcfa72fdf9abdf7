"""Few-step policy of pi-Flow (Chen et al. 2025, arXiv 2510.14974): one evaluation per segment of sampling.

The network is evaluated once, at the start of a segment between two noise levels, and predicts N estimates of the clean
sample on a grid of noise levels (the paper's dynamic-x_0 policy, section 3.2). Between grid points x_0(s) is
interpolated linearly, and the policy's velocity is

    u(x, s) = (x - x_0(s)) / s.

With x_0(s) = a + b s on an interval of the grid, dx/ds = u has the solution

    x(s') = (s'/s) x(s) + a (1 - s'/s) + b s' log(s/s'),

so a segment is integrated exactly, without inner steps, and x(0) = x_0(0). All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def grid(sigma: jax.Array, sigma_next: jax.Array, count: int) -> jax.Array:
    """Noise levels of the estimates, float32 [count], from ``sigma`` down to ``sigma_next``."""
    return jnp.linspace(sigma, sigma_next, count, dtype=jnp.float32)


def estimates_of(output: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """Clean estimates [N, ...] from the network's output of N concatenated velocities: x_0 = x - s v.

    N copies of a teacher's velocity give the teacher's estimate, constant over the segment.

    Args:
      output: [..., N * D].
      x: [..., D], the network's input.
      sigma: scalar, noise level of ``x``.
    """
    count = output.shape[-1] // x.shape[-1]
    velocities = jnp.stack(jnp.split(output.astype(jnp.float32), count, axis=-1))
    return x.astype(jnp.float32) - sigma * velocities


def clean_at(estimates: jax.Array, levels: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_0(s): linear interpolation of estimates [N, ...] at ``levels`` [N], constant outside."""
    if len(estimates) == 1:
        return estimates[0]
    place = (levels[0] - sigma) / jnp.maximum(levels[0] - levels[-1], 1e-12) * (len(estimates) - 1)
    place = jnp.clip(place, 0, len(estimates) - 1)
    below = jnp.minimum(place.astype(jnp.int32), len(estimates) - 2)
    share = place - below
    return (1 - share) * estimates[below] + share * estimates[below + 1]


def velocity(x: jax.Array, sigma: jax.Array, estimates: jax.Array, levels: jax.Array) -> jax.Array:
    """The policy's velocity (x - x_0(s)) / s, for s > 0."""
    return (x - clean_at(estimates, levels, sigma)) / sigma


def follow(x: jax.Array, estimates: jax.Array, levels: jax.Array, sigma: jax.Array) -> jax.Array:
    """Integrates the policy from x at ``levels[0]`` to ``sigma``, which must be within the grid."""
    if len(estimates) == 1:
        ratio = sigma / levels[0]
        return ratio * x + (1 - ratio) * estimates[0]
    for i in range(len(estimates) - 1):
        high, low = levels[i], levels[i + 1]
        # Stop at ``sigma``: intervals beyond it have zero length.
        end = jnp.clip(sigma, low, high)
        slope = (estimates[i] - estimates[i + 1]) / jnp.maximum(high - low, 1e-12)
        constant = estimates[i] - slope * high
        ratio = end / high
        # s' log(s/s') is 0 at s' = 0.
        log = end * jnp.log(high / jnp.where(end > 0, end, high))
        x = ratio * x + (1 - ratio) * constant + log * slope
    return x


def policy_losses(
    student: Callable[[jax.Array, jax.Array], jax.Array],
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    targets: jax.Array,
    count: int,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Imitation loss of one segment (paper, section 3.3 and Algorithm 1): mean of |u - v_teacher|^2, float32 [B].

    The student is evaluated once, at the start of the segment. Its policy is followed without gradient to each target
    level, where its velocity is regressed on the teacher's. Training on the student's own states avoids accumulated
    errors, and needs neither a discriminator nor Jacobian-vector products.

    Args:
      student: (x [B, T, D], sigma scalar) -> [B, T, N * D].
      teacher: (x, sigma) -> velocity [B, T, D], guided if the student should learn guidance; receives no gradient.
      x: [B, T, D], samples at ``sigma``.
      sigma, sigma_next: scalars, start and end of the segment, sigma > sigma_next.
      targets: [M] noise levels within the segment, above 0.
      count: number of estimates N.
      mask: bool [B, T], False at padding, which is ignored.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    levels = grid(sigma, sigma_next, count)
    estimates = estimates_of(student(x, sigma), x, sigma)
    fixed = jax.lax.stop_gradient(estimates)
    weight = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)

    def one(level: jax.Array) -> jax.Array:
        visited = follow(x, fixed, levels, level)
        wanted = jax.lax.stop_gradient(teacher(visited, level).astype(jnp.float32))
        errors = jnp.mean(jnp.square(velocity(visited, level, estimates, levels) - wanted), axis=-1)
        return jnp.sum(errors * weight, axis=1) / jnp.sum(weight, axis=1)

    return jnp.mean(jax.lax.map(one, targets), axis=0)
