"""Rollouts: against a plain loop, against the PyTorch system's, and what their noise depends on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_rl as tiny

from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.samplers import sample, sde_step
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference.programs import Condition
from deepgen_jax.models import patches as grids
from deepgen_jax.rl import rollout as module
from deepgen_jax.rl.policy import Canvas, rows_of, velocity
from deepgen_jax.rl.rollout import RolloutSettings, concatenated, image_keys, initial_noise, step_noise

NAMES = {"cps": "cps_sde", "flow": "flowgrpo_sde", "dance": "dance_sde"}


@pytest.fixture(scope="module")
def case():
    return tiny.Case()


@pytest.fixture(scope="module")
def predict(case):
    rows = rows_of(case.condition, jnp.arange(case.images), case.group_size, 1)
    return jax.jit(lambda x, s: velocity(tiny.MODEL, case.variables(), case.canvas, x, s, rows))


@pytest.mark.parametrize(("sampler", "eta"), [("cps", 1.0), ("flow", 0.7)])
def test_scan_equals_a_loop_over_the_steps(sampler, eta, case, predict):
    images, trajectory = case.rollout(sampler, eta)
    x, sigmas = trajectory.latents[0], jnp.asarray(case.sigmas)
    for i in range(case.steps):
        noise = step_noise(trajectory.keys, i, x.shape[1:])
        x, *_, log_prob = sde_step(sampler, predict(x, sigmas[i]), x, *sigmas[i : i + 2], sigmas[1], eta, noise=noise)
        np.testing.assert_allclose(trajectory.latents[i + 1], x, atol=2e-5)
        np.testing.assert_allclose(trajectory.log_probs[i], log_prob, atol=2e-5)
    np.testing.assert_array_equal(trajectory.sigmas, case.sigmas)
    np.testing.assert_array_equal(grids.patchify(images, 2), trajectory.latents[-1])


def test_ode_leaves_no_trajectory(case, predict):
    images, trajectory = case.rollout("ode", share=False)
    assert trajectory is None
    noise = initial_noise(tiny.SEED, np.arange(case.prompts), case.group_size, (tiny.TOKENS, tiny.WIDTH), share=False)
    expected = sample("euler", predict, noise, case.sigmas)
    np.testing.assert_allclose(grids.patchify(images, 2), expected, atol=2e-5)


@pytest.mark.parametrize("sampler", NAMES)
def test_rollout_golden(sampler, cases, pipelines, goldens, check_golden, monkeypatch):
    """The whole rollout with guidance; only the noise is the PyTorch system's."""
    case, pipe, name = cases["rollout"], pipelines("sft"), NAMES[sampler]
    arrays = {key: goldens("rl")[f"rollout/{name}/{key}"] for key in ("noise", "step_noise")}
    fresh = grids.patchify(jnp.asarray(arrays["step_noise"]), pipe.config.mmdit.patch_size)
    monkeypatch.setattr(module, "step_noise", lambda keys, step, shape: fresh[step])
    pair = [case["prompt"], case["negative"]]
    condition = Condition(*map(jnp.asarray, pipe.encode_prompt(pair, pair_with=pair[::-1])))
    height, width = (side // 8 for side in case["size"])
    images, trajectory = module.rollout(
        pipe.model,
        RolloutSettings(Canvas(height, width, group_size=2), sampler),
        {"params": {"mmdit": pipe.params["mmdit"]}},
        grids.patchify(jnp.asarray(arrays["noise"]), pipe.config.mmdit.patch_size),
        condition,
        jnp.asarray(make_sigmas(pipe.scheduler, case["steps"])),
        case["eta"],
        image_keys(0, np.arange(2)),
        guidance_scale=case["guidance"],
    )
    states = grids.unpatchify(trajectory.latents[1:], height, width, 2, 16)
    check_golden("rl", f"rollout/{name}/next", jnp.moveaxis(states, 1, 0))
    check_golden("rl", f"rollout/{name}/log_prob", trajectory.log_probs.T)
    np.testing.assert_array_equal(images, states[-1])


def test_an_image_does_not_depend_on_its_rollout_batch(case):
    _, together = case.rollout()
    pieces = [case.rollout(first=i, prompts=1)[1] for i in range(case.prompts)]
    apart = concatenated(pieces)
    np.testing.assert_allclose(apart.latents, together.latents, atol=2e-5)
    np.testing.assert_allclose(apart.log_probs, together.log_probs, atol=2e-5)
    np.testing.assert_array_equal(*(jax.random.key_data(t.keys) for t in (apart, together)))
    with pytest.raises(DeepGenError, match="no trajectories"):
        concatenated([])


def test_groups_share_their_initial_noise_or_do_not(case):
    shape = (tiny.TOKENS, tiny.WIDTH)
    for share in (True, False):
        noise = initial_noise(7, np.arange(3), 4, shape, share).reshape(3, 4, *shape)
        assert bool(jnp.all(noise[:, 0] == noise[:, 1])) == share
        assert not jnp.any(noise[0, 0] == noise[1, 0])
        np.testing.assert_array_equal(noise[2], initial_noise(7, np.array([2]), 4, shape, share))
    assert not jnp.any(initial_noise(8, np.arange(3), 4, shape)[0] == initial_noise(7, np.arange(3), 4, shape)[0])
    _, trajectory = case.rollout()
    first, second = trajectory.latents[:, 0], trajectory.latents[:, 1]
    np.testing.assert_array_equal(first[0], second[0])
    assert float(jnp.min(jnp.std(first[1:] - second[1:], axis=(1, 2)))) > 0.1


def test_noise_of_steps_and_images_is_independent():
    keys = image_keys(1, np.arange(4))
    noise = jnp.stack([step_noise(keys, i, (500,)) for i in range(3)]).reshape(12, 500)
    correlation = np.corrcoef(noise) - np.eye(12)
    assert np.max(np.abs(correlation)) < 0.2
