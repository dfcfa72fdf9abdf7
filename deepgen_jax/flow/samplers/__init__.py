"""Samplers of the flow-matching ODE and of the SDEs that reinforcement learning explores with.

A sampler is a small file with a subclass of `Sampler` and a line in `registered.SAMPLERS`.
"""

from deepgen_jax.flow.samplers.loop import CachedVelocityFn, State, advance, sample, start
from deepgen_jax.flow.samplers.registered import SAMPLERS, get_sampler
from deepgen_jax.flow.samplers.sampler import Sampler, Step, VelocityFn, euler_step
from deepgen_jax.flow.samplers.sde import SDESampler, Transition, sde_step, transition

__all__ = [
    "SAMPLERS",
    "CachedVelocityFn",
    "SDESampler",
    "Sampler",
    "State",
    "Step",
    "Transition",
    "VelocityFn",
    "advance",
    "euler_step",
    "get_sampler",
    "sample",
    "sde_step",
    "start",
    "transition",
]
