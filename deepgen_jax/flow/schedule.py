"""Noise schedules of flow matching: inference sigmas, and noise levels for training.

A sigma runs from 1 (pure noise) to 0 (clean); the model is given the timestep ``sigma * num_train_timesteps``. Both
uses reproduce the flow-match Euler scheduler that ``scheduler_config.json`` describes, including its double shift: with
a static shift the inference grid ends at the last value of the *shifted* training table and is then shifted once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.options import Options

_CLASS_NAME = "FlowMatchEulerDiscreteScheduler"


def parse_config(
    config: SchedulerConfig | Mapping[str, Any], where: str = "scheduler_config.json"
) -> SchedulerConfig:
    """``SchedulerConfig`` of diffusers' ``scheduler_config.json``; a ``SchedulerConfig`` is returned as it is.

    Entries that are absent or null have diffusers' defaults (``FlowMatchEulerDiscreteScheduler``), so shift is 1.0,
    not the released model's 3.0.

    Args:
      config: the parsed file.
      where: its name for messages.

    Raises:
      DeepGenError: it is of another scheduler, an entry is unknown or of the wrong type, or sets something that changes
        the result and is not supported.
    """
    if isinstance(config, SchedulerConfig):
        return config
    options = Options(config, where)
    class_name = config.get("_class_name", _CLASS_NAME)
    if class_name != _CLASS_NAME:
        raise DeepGenError(f"{where}: the scheduler is {class_name!r}, expected {_CLASS_NAME}")
    options.require(
        invert_sigmas=False,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        stochastic_sampling=False,
        time_shift_type="exponential",
        shift_terminal=(None, 0),
    )
    usual = SchedulerConfig(shift=1.0)
    values = {item.name: options.take(item.name, type(getattr(usual, item.name)), getattr(usual, item.name))
              for item in dataclasses.fields(usual)}  # fmt: skip
    options.finish()
    try:
        return SchedulerConfig(**values)
    except DeepGenError as error:
        raise DeepGenError(f"{where}: {error}") from None


def make_sigmas(
    scheduler_config: SchedulerConfig | Mapping[str, Any], num_steps: int, image_seq_len: int | None = None
) -> np.ndarray:
    """Sigmas of an N-step sampler.

    Args:
      scheduler_config: the schedule, or a parsed ``scheduler_config.json``.
      num_steps: N >= 1.
      image_seq_len: patches of the target image; required by dynamic shifting, otherwise unused.

    Returns:
      float32 [N + 1], decreasing from 1 to 0.

    Raises:
      DeepGenError: ``num_steps`` < 1, ``image_seq_len`` is missing, or the configuration is not supported.
    """
    config = parse_config(scheduler_config)
    if num_steps < 1:
        raise DeepGenError(f"number of sampling steps is {num_steps}; give at least 1")
    table = training_sigmas(config)
    grid = np.linspace(float(table[0]), float(table[-1]), num_steps, dtype=np.float64)
    shift = math.exp(dynamic_shift(config, image_seq_len)) if config.use_dynamic_shifting else config.shift
    return np.append(_shifted(grid, shift), 0.0).astype(np.float32)


def segment_times(num_segments: int) -> np.ndarray:
    """Ends of the segments of a few-step policy before shifting, float64 [K + 1] from 1 to 0.

    All segments are equally long but the last, which is half as long, as there errors cannot be undone (pi-Flow,
    arXiv 2510.14974, ``final_step_size_scale``).

    Raises:
      DeepGenError: ``num_segments`` < 1.
    """
    if num_segments < 1:
        raise DeepGenError(f"number of sampling steps is {num_segments}; give at least 1")
    return np.append(1 - np.arange(num_segments) / (num_segments - 0.5), 0.0)


def shifted_time(
    time: ArrayLike, scheduler_config: SchedulerConfig, image_seq_len: ArrayLike | None = None
) -> jax.Array:
    """Noise level of a time in [0, 1], shifted as in inference: float32 of ``time``'s shape.

    ``image_seq_len`` is as in :func:`sigma_from_u`.
    """
    shift: Any = scheduler_config.shift
    if scheduler_config.use_dynamic_shifting:
        shift = jnp.exp(jnp.asarray(dynamic_shift(scheduler_config, image_seq_len), jnp.float32))
    return _shifted(jnp.asarray(time, jnp.float32), shift)


def segment_sigmas(
    scheduler_config: SchedulerConfig, num_segments: int, image_seq_len: int | None = None
) -> np.ndarray:
    """Noise levels at the ends of the segments of a few-step policy, float32 [K + 1] from 1 to 0.

    :func:`make_sigmas` ends with a step from the lowest trained noise level, where nothing is left to do: of few
    evaluations it would waste one.

    Raises:
      DeepGenError: ``num_segments`` < 1, or ``image_seq_len`` is missing.
    """
    return np.asarray(shifted_time(segment_times(num_segments), parse_config(scheduler_config), image_seq_len))


def dynamic_shift(config: SchedulerConfig, image_seq_len: Any) -> Any:
    """Logarithm mu of the dynamic shift: linear in the number of target patches, through the configured base and max.

    ``image_seq_len`` is a number or an array, and so is the result.

    Raises:
      DeepGenError: ``image_seq_len`` is None.
    """
    if image_seq_len is None:
        raise DeepGenError("this scheduler shifts by image size (use_dynamic_shifting); give image_seq_len")
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (image_seq_len - config.base_image_seq_len)


def training_sigmas(config: SchedulerConfig | Mapping[str, Any]) -> np.ndarray:
    """Table of training noise levels, float32 [num_train_timesteps], decreasing; unshifted under dynamic shifting."""
    config = parse_config(config)
    count = config.num_train_timesteps
    table = np.arange(count, 0, -1, dtype=np.float32) / np.float32(count)
    return table if config.use_dynamic_shifting else _shifted(table, config.shift)


def sample_u(
    key: jax.Array,
    shape: tuple[int, ...],
    config: SchedulerConfig | Mapping[str, Any],
    weighting: str = "auto",
    mean: float = 0.0,
    std: float = 1.0,
) -> jax.Array:
    """Draws the positions u in [0, 1] from which ``sigma_from_u`` takes noise levels.

    Args:
      key: PRNG key.
      shape: shape of the result.
      config: the schedule.
      weighting: "none" (uniform), "logit_normal" (sigmoid of a normal of ``mean`` and ``std``) or "auto" (logit-normal
        under dynamic shifting, else uniform).

    Returns:
      float32 array of ``shape``.

    Raises:
      DeepGenError: unknown weighting, or uniform weighting with dynamic shifting, for which it is not meant.
    """
    config = parse_config(config)
    if weighting == "auto":
        weighting = "logit_normal" if config.use_dynamic_shifting else "none"
    if weighting == "logit_normal":
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))
    if weighting != "none":
        raise DeepGenError(f"timestep weighting {weighting!r} is unknown; use auto, none or logit_normal")
    if config.use_dynamic_shifting:
        raise DeepGenError("timestep weighting 'none' does not go with use_dynamic_shifting; use logit_normal")
    return jax.random.uniform(key, shape, jnp.float32)


def sigma_from_u(
    u: ArrayLike, config: SchedulerConfig | Mapping[str, Any], image_seq_len: ArrayLike | None = None
) -> jax.Array:
    """Noise level of position ``u``: entry floor(u * num_train_timesteps) of the table, so u = 0 is the noisiest.

    Under dynamic shifting there is no table: the level is u shifted for the sample's size, so u = 1 is the noisiest.

    Args:
      u: [...] in [0, 1].
      config: the schedule.
      image_seq_len: patches of each target image, scalar or of ``u``'s shape; required by dynamic shifting only.

    Returns:
      float32 of ``u``'s shape.

    Raises:
      DeepGenError: dynamic shifting without ``image_seq_len``.
    """
    config = parse_config(config)
    u = jnp.asarray(u, jnp.float32)
    if config.use_dynamic_shifting:
        return _shifted(u, jnp.exp(jnp.asarray(dynamic_shift(config, image_seq_len), jnp.float32)))
    count = config.num_train_timesteps
    # A sigmoid can round to exactly 1, which is one past the table.
    index = jnp.clip((u * count).astype(jnp.int32), 0, count - 1)
    return jnp.asarray(training_sigmas(config))[index]


def _shifted(sigma: Any, shift: Any) -> Any:
    """Moves noise levels towards 1 for shift > 1 and keeps 0 and 1 where they are."""
    return shift * sigma / (1 + (shift - 1) * sigma)
