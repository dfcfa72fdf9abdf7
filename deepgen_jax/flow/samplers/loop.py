"""Integrates from noise to a clean sample: all steps in one `jax.lax` loop, or a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepgen_jax.flow.samplers.registered import get_sampler
from deepgen_jax.flow.samplers.sampler import Step, VelocityFn

#: int32 scalar, number of the step -> standard normal noise of the sample's shape.
NoiseFn = Callable[[jax.Array], jax.Array]
#: (x, sigma, cache) -> (velocity, cache).
CachedVelocityFn = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class State(NamedTuple):
    """State of sampling; a pytree.

    Attributes:
      x: [B, ...] float32, the current sample.
      clean: [B, ...] float32, the clean sample predicted at the last velocity evaluation, for previews.
      memory: of the sampler.
      cache: of the velocity function, such as activations to be used again; () without one.
    """

    x: jax.Array
    clean: jax.Array
    memory: Any
    cache: Any = ()


def start(name: str, noise: ArrayLike, cache: Any = ()) -> State:
    """State before the first step.

    Args:
      name: of the sampler.
      noise: [B, ...] initial sample.
      cache: initial cache of a velocity function that has one.

    Raises:
      DeepGenError: unknown sampler.
    """
    x = jnp.asarray(noise, jnp.float32)
    return State(x, x, get_sampler(name).start(x), cache)


def advance(
    name: str,
    velocity_fn: CachedVelocityFn,
    state: State,
    sigmas: ArrayLike,
    first: ArrayLike,
    last: ArrayLike,
    noise_fn: NoiseFn | None = None,
    eta: ArrayLike = 1.0,
) -> State:
    """Takes the steps ``first`` to ``last`` - 1.

    Args:
      name: of the sampler.
      velocity_fn: (x [B, ...] float32, sigma scalar float32, cache) -> velocity [B, ...], cache.
      state: of :func:`start` or an earlier call.
      sigmas: float32 [N + 1] or longer; the rest is not used.
      first, last: numbers of steps. As arrays they may differ between calls of one compiled program; as Python
        integers the trip count is known to the compiler and the loop can be differentiated.
      noise_fn: noise of stochastic samplers; by default that of ``jax.random.key(0)``.
      eta: strength of that noise.
    """
    sampler = get_sampler(name)
    levels, strength = jnp.asarray(sigmas, jnp.float32), jnp.asarray(eta, jnp.float32)

    def noise_of(index: jax.Array) -> jax.Array:
        if noise_fn is not None:
            return noise_fn(index)
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), index), state.x.shape, jnp.float32)

    def body(index: jax.Array, state: State) -> State:
        cache, clean = state.cache, state.clean

        def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
            nonlocal cache, clean
            v, cache = velocity_fn(x, sigma, cache)
            # Of several velocities side by side, the last is that of the step's end.
            clean = x - sigma * v[..., -x.shape[-1] :].astype(jnp.float32)
            return v

        step = Step(index, levels[index], levels[index + 1], levels[1], strength, lambda: noise_of(index))
        x, memory = sampler.step(velocity, state.x, state.memory, step)
        return State(x, clean, memory, cache)

    if not (isinstance(first, int) and isinstance(last, int)):
        first, last = jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)
    return jax.lax.fori_loop(first, last, body, state)


@overload
def sample(
    name: str,
    velocity_fn: VelocityFn,
    x: ArrayLike,
    sigmas: ArrayLike,
    *,
    noise_fn: NoiseFn | None = None,
    eta: ArrayLike = 1.0,
    return_trajectory: Literal[False] = False,
) -> jax.Array: ...
@overload
def sample(
    name: str,
    velocity_fn: VelocityFn,
    x: ArrayLike,
    sigmas: ArrayLike,
    *,
    noise_fn: NoiseFn | None = None,
    eta: ArrayLike = 1.0,
    return_trajectory: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def sample(
    name: str,
    velocity_fn: VelocityFn,
    x: ArrayLike,
    sigmas: ArrayLike,
    *,
    noise_fn: NoiseFn | None = None,
    eta: ArrayLike = 1.0,
    return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Integrates from noise to a clean sample.

    Args:
      name: a name in `SAMPLERS`, such as "euler", "heun" or "dpmpp_2m".
      velocity_fn: (x [B, ...] float32, sigma scalar float32) -> velocity [B, ...].
      x: initial sample [B, ...] at noise level ``sigmas[0]``.
      sigmas: [N + 1] decreasing noise levels, such as those of ``schedule.make_sigmas``.
      noise_fn, eta: of stochastic samplers; see :func:`advance`.
      return_trajectory: return every state as well.

    Returns:
      The last sample [B, ...] in float32; with ``return_trajectory`` also all samples [N + 1, B, ...], ``x`` first.

    Raises:
      DeepGenError: unknown sampler.
    """
    state = start(name, x)
    steps = jnp.shape(sigmas)[0] - 1

    def uncached(x: jax.Array, sigma: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return velocity_fn(x, sigma), cache

    if not return_trajectory:
        return advance(name, uncached, state, sigmas, 0, steps, noise_fn, eta).x

    def one(state: State, index: jax.Array) -> tuple[State, jax.Array]:
        state = advance(name, uncached, state, sigmas, index, index + 1, noise_fn, eta)
        return state, state.x

    final, states = jax.lax.scan(one, state, jnp.arange(steps, dtype=jnp.int32))
    return final.x, jnp.concatenate([state.x[None], states])
