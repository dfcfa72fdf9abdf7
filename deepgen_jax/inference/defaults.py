"""Settings of an image: what a call asks for, and the model's defaults for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.acceleration import Acceleration
from deepgen_jax.user_warnings import warn_user


@dataclass(frozen=True)
class Sampling:
    """How an image is sampled: number of steps, guidance scale (1 for none) and name of the sampler."""

    steps: int
    guidance: float
    sampler: str


def resolve_sampling(
    config: DeepGenConfig, steps: int | None = None, guidance: float | None = None, sampler: str | None = None
) -> Sampling:
    """The settings of a call; None takes the model's default.

    Raises:
      DeepGenError: a value is out of range, there is no such sampler, or the model was distilled to other settings.
    """
    from deepgen_jax.flow.samplers.registered import SAMPLERS, canonical_name

    steps = config.num_inference_steps if steps is None else steps
    guidance = config.guidance(guidance)
    sampler = canonical_name(config.sampler if sampler is None else sampler)
    if config.few_step:
        _check_few_step(config, steps, guidance, sampler)
    if steps < 1:
        raise DeepGenError(f"the number of steps is {steps}; use 1 or more")
    if not 0 <= guidance < math.inf:
        raise DeepGenError(f"guidance is {guidance}; use 0 or more")
    SAMPLERS.target(sampler)
    limit = config.max_guidance_scale
    if limit is not None and guidance > limit:
        warn_user(f"guidance {guidance:g} ruins this model's images; use at most {limit:g}", stacklevel=3)
    return Sampling(steps, guidance, sampler)


def _check_few_step(config: DeepGenConfig, steps: int, guidance: float, sampler: str) -> None:
    """A policy belongs to its segments, and its guidance is the teacher's."""
    what = f"this model was distilled to {config.num_inference_steps} evaluations"
    if sampler != config.sampler:
        raise DeepGenError(f"{what} of the sampler {config.sampler}, not {sampler}; leave the sampler out")
    if steps != config.num_inference_steps:
        raise DeepGenError(f"{what}, not {steps}; leave the steps out")
    if guidance != 1:
        raise DeepGenError(f"{what} without guidance, not at guidance {guidance:g}; leave the guidance out")


def check_acceleration(config: DeepGenConfig, acceleration: Acceleration) -> None:
    """Raises a DeepGenError where a model of few steps is to skip work: nothing is left to be skipped."""
    if config.few_step and acceleration:
        name = "cache" if acceleration.cache is not None else "guidance interval"
        raise DeepGenError(
            f"this model was distilled to {config.num_inference_steps} evaluations, of which none can be saved; leave "
            f"the {name} out"
        )


def guidance_or_none(scale: float) -> float | None:
    """None for 1, which needs no negative side."""
    return None if scale == 1 else scale


def resolve_size(
    config: DeepGenConfig,
    width: int | None = None,
    height: int | None = None,
    reference_sizes: Sequence[tuple[int, int]] = (),
) -> tuple[int, int]:
    """(width, height) in pixels: as asked for, else of the first reference, else the model's default square."""
    side = config.default_side
    default_width, default_height = reference_sizes[0] if reference_sizes else (side, side)
    return (default_width if width is None else width), (default_height if height is None else height)
