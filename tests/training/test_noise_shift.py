"""A shift of the training noise levels in place of the scheduler's."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.schedule import sample_u, sigma_from_u
from deepgen_jax.training.config_files import load_config
from deepgen_jax.training.supervised_stage import training_schedule


def test_noise_levels_follow_the_shift():
    config = load_config("pretrain")
    assert training_schedule(config, SchedulerConfig()) == SchedulerConfig()
    schedule = training_schedule(replace(config, noise_shift=30.0), SchedulerConfig())
    sigma = sigma_from_u(sample_u(jax.random.key(0), (4096,), schedule), schedule)
    # Uniform u, so the median is where u is one half: 30 / 31.
    np.testing.assert_allclose(np.median(sigma), 30 / 31, atol=2e-3)


def test_bad_shifts_are_refused():
    config = load_config("pretrain")
    with pytest.raises(DeepGenError, match="noise_shift is 0"):
        replace(config, noise_shift=0.0)
    with pytest.raises(DeepGenError, match="leave it out"):
        training_schedule(replace(config, noise_shift=3.0), SchedulerConfig(use_dynamic_shifting=True))
