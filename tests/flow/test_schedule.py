"""Sigmas against the golden arrays and against diffusers' own scheduler."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow import schedule

DYNAMIC = SchedulerConfig(use_dynamic_shifting=True)


@pytest.mark.parametrize("steps", [4, 28, 50])
def test_inference_sigmas_match_golden(goldens, tolerance, data_dir, steps):
    config = json.loads((data_dir / "sd3_5_kontext" / "scheduler" / "scheduler_config.json").read_text())
    sigmas = schedule.make_sigmas(config, steps)
    assert sigmas.dtype == np.float32
    golden = goldens("schedule")
    np.testing.assert_allclose(
        sigmas, golden[f"sigmas_{steps}"], rtol=0, atol=tolerance("schedule", f"sigmas_{steps}")
    )
    timesteps = sigmas[:-1] * config["num_train_timesteps"]
    np.testing.assert_allclose(
        timesteps, golden[f"timesteps_{steps}"], rtol=0, atol=tolerance("schedule", f"timesteps_{steps}")
    )


def test_rollout_sigmas_match_golden(goldens, tolerance):
    sigmas = schedule.make_sigmas(SchedulerConfig(), 8)
    np.testing.assert_allclose(sigmas, goldens("rl")["sde/sigmas"], rtol=0, atol=tolerance("rl", "sde/sigmas"))


def test_training_table_matches_golden(goldens, tolerance):
    table = schedule.training_sigmas(SchedulerConfig())
    assert table.shape == (1000,)
    name = "train_sigmas_every37"
    np.testing.assert_allclose(table[::37], goldens("schedule")[name], rtol=0, atol=tolerance("schedule", name))


def test_sigma_of_u_matches_golden(goldens, tolerance):
    golden = goldens("train")
    sigma = schedule.sigma_from_u(golden["t2i/u"], SchedulerConfig())
    np.testing.assert_allclose(sigma, golden["t2i/sigma"], rtol=0, atol=tolerance("train", "t2i/sigma"))
    np.testing.assert_allclose(sigma * 1000, golden["t2i/t"], rtol=0, atol=tolerance("train", "t2i/t"))


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_static_shift_equals_diffusers(shift, steps):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    np.testing.assert_array_equal(schedule.training_sigmas(SchedulerConfig(shift=shift)), peer.sigmas.numpy())
    peer.set_timesteps(steps)
    np.testing.assert_array_equal(schedule.make_sigmas(SchedulerConfig(shift=shift), steps), peer.sigmas.numpy())


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("image_seq_len", [64, 256, 1024, 4096, 8192])
def test_dynamic_shift_equals_diffusers(image_seq_len, steps):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    config = dataclasses.replace(DYNAMIC, base_shift=0.4, max_shift=1.3, max_image_seq_len=2048)
    peer = diffusers.FlowMatchEulerDiscreteScheduler(**dataclasses.asdict(config))
    np.testing.assert_array_equal(schedule.training_sigmas(config), peer.sigmas.numpy())
    mu = calculate_shift(image_seq_len, config.base_image_seq_len, config.max_image_seq_len, 0.4, 1.3)
    peer.set_timesteps(steps, mu=mu)
    sigmas = schedule.make_sigmas(config, steps, image_seq_len)
    np.testing.assert_allclose(sigmas, peer.sigmas.numpy(), rtol=0, atol=1.2e-7)


def test_a_file_without_shift_means_no_shift():
    assert schedule.parse_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "base_shift": None}).shift == 1.0


@pytest.mark.parametrize(
    "option",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"shift_terminal": 0.1},
        {"time_shift_type": "linear"},
        {"option_of_tomorrow": 2},
    ],
)
def test_unsupported_option_is_named(option):
    with pytest.raises(DeepGenError, match=next(iter(option))):
        schedule.make_sigmas({"shift": 3.0, **option}, 4)


def test_inert_options_are_accepted():
    config = {"shift": 3.0, "use_karras_sigmas": False, "shift_terminal": None, "time_shift_type": "exponential"}
    np.testing.assert_array_equal(schedule.make_sigmas(config, 4), schedule.make_sigmas(SchedulerConfig(), 4))


def test_bad_input_is_refused():
    with pytest.raises(DeepGenError, match="DDIMScheduler"):
        schedule.make_sigmas({"_class_name": "DDIMScheduler"}, 4)
    with pytest.raises(DeepGenError, match="image_seq_len"):
        schedule.make_sigmas(DYNAMIC, 4)
    with pytest.raises(DeepGenError, match="image_seq_len"):
        schedule.sigma_from_u(0.5, DYNAMIC)
    with pytest.raises(DeepGenError, match="at least 1"):
        schedule.make_sigmas(SchedulerConfig(), 0)
    with pytest.raises(DeepGenError, match="logit_normal"):
        schedule.sample_u(jax.random.key(0), (2,), DYNAMIC, weighting="none")
    with pytest.raises(DeepGenError, match="cosmap"):
        schedule.sample_u(jax.random.key(0), (2,), DYNAMIC, weighting="cosmap")


def test_u_is_uniform_for_static_and_logit_normal_for_dynamic_shift():
    count = 20000
    uniform = np.asarray(schedule.sample_u(jax.random.key(0), (count,), SchedulerConfig()))
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(uniform.std() - 1 / np.sqrt(12)) < 0.01
    logit_normal = np.asarray(schedule.sample_u(jax.random.key(1), (count,), DYNAMIC))
    logit = np.log(logit_normal / (1 - logit_normal))
    assert abs(logit.mean()) < 0.03
    assert abs(logit.std() - 1) < 0.03


def test_level_covers_the_table_and_stays_inside():
    table = schedule.training_sigmas(SchedulerConfig())
    sigma = schedule.sigma_from_u(np.array([0.0, 0.9995, 1.0], np.float32), SchedulerConfig())
    np.testing.assert_array_equal(sigma, table[[0, -1, -1]])


def test_dynamic_level_depends_on_each_samples_size():
    u = np.array([0.25, 0.25, 0.0, 1.0], np.float32)
    sigma = jax.jit(lambda u, n: schedule.sigma_from_u(u, DYNAMIC, n))(u, np.array([256, 4096, 256, 256]))
    shift = np.exp([0.5, 1.15, 0.5, 0.5])
    np.testing.assert_allclose(sigma, shift * u / (1 + (shift - 1) * u), rtol=1e-6)
