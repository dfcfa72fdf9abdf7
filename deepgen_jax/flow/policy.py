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

from deepgen_jax.flow.samplers.sampler import per_sample


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
    """x_0(s): linear interpolation of estimates [N, ...] at ``levels`` [N], constant outside.

    ``sigma`` is a scalar, or broadcasts against [...] from the left: one noise level per sample is [B].
    """
    if len(estimates) == 1:
        return estimates[0]
    place = (levels[0] - sigma) / jnp.maximum(levels[0] - levels[-1], 1e-12) * (len(estimates) - 1)
    place = per_sample(jnp.clip(place, 0, len(estimates) - 1), estimates[0])
    shares = (jnp.maximum(1 - jnp.abs(place - i), 0) for i in range(len(estimates)))
    return sum((share * estimate for share, estimate in zip(shares, estimates, strict=True)), jnp.float32(0))


def velocity(x: jax.Array, sigma: jax.Array, estimates: jax.Array, levels: jax.Array) -> jax.Array:
    """The policy's velocity (x - x_0(s)) / s, for s > 0; ``sigma`` is as in :func:`clean_at`."""
    return (x - clean_at(estimates, levels, sigma)) / per_sample(sigma, x)


def follow(
    x: jax.Array, estimates: jax.Array, levels: jax.Array, sigma: jax.Array, start: jax.Array | None = None
) -> jax.Array:
    """Integrates the policy from x at ``start`` to ``sigma``, both within the grid.

    Args:
      x: [...].
      estimates: [N, ...].
      levels: [N], see :func:`grid`.
      sigma: scalar, or one of each sample [B].
      start: of ``sigma``'s shape, at least ``sigma`` and above 0; None for ``levels[0]``.
    """
    begin = per_sample(levels[0] if start is None else start, x)
    sigma = per_sample(sigma, x)
    if len(estimates) == 1:
        ratio = sigma / begin
        return ratio * x + (1 - ratio) * estimates[0]
    for i in range(len(estimates) - 1):
        high, low = levels[i], levels[i + 1]
        # Intervals before ``start`` and beyond ``sigma`` have zero length.
        top, end = jnp.clip(begin, low, high), jnp.clip(sigma, low, high)
        slope = (estimates[i] - estimates[i + 1]) / jnp.maximum(high - low, 1e-12)
        constant = estimates[i] - slope * high
        ratio = end / top
        # s' log(s/s') is 0 at s' = 0.
        log = end * jnp.log(top / jnp.where(end > 0, end, top))
        x = ratio * x + (1 - ratio) * constant + log * slope
    return x


def policy_losses(
    estimates: jax.Array,
    levels: jax.Array,
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    targets: jax.Array,
    ends: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Imitation loss of one segment (paper, section 3.3 and Algorithm 1): mean of |u - v_teacher|^2, float32 [B].

    The student was evaluated once, at the start of the segment. Its policy is followed without gradient to each target
    level, where its velocity is regressed on the teacher's. Training on the student's own states avoids accumulated
    errors, and needs neither a discriminator nor Jacobian-vector products.

    With ``ends`` u is the policy's mean velocity from the target level to the end of a window, as in the authors'
    implementation: near s = 0 the local velocity divides the error of x_0 by s.

    Args:
      estimates: [N, B, T, D] of :func:`estimates_of`, which receive the gradient.
      levels: [N], see :func:`grid`.
      teacher: (x [B, T, D], sigma [B]) -> velocity [B, T, D], guided if the student should learn guidance; receives no
        gradient.
      x: [B, T, D], samples at ``levels[0]``.
      targets: [M, B] noise levels within the segment, above 0.
      ends: [M, B], below ``targets``; None for the local velocity.
      mask: bool [B, T], False at padding, which is ignored.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    fixed = jax.lax.stop_gradient(estimates)
    weight = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)

    def one(at: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        level, end = at
        visited = follow(x, fixed, levels, level)
        wanted = jax.lax.stop_gradient(teacher(visited, level).astype(jnp.float32))
        if end is None:
            found = velocity(visited, level, estimates, levels)
        else:
            reached = follow(visited, estimates, levels, end, start=level)
            found = (visited - reached) / per_sample(level - end, x)
        errors = jnp.mean(jnp.square(found - wanted), axis=-1)
        return jnp.sum(errors * weight, axis=1) / jnp.sum(weight, axis=1)

    return jnp.mean(jax.lax.map(one, (targets, ends)), axis=0)
