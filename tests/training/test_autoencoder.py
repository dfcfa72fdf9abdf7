"""The autoencoder's loss and step as pure functions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.convert.random_release import tiny_config
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.vae import VAE, normalise
from deepgen_jax.training.accumulation import start_sums
from deepgen_jax.training.autoencoder import (
    TOTALS,
    Objective,
    accumulate,
    decoder_alone,
    divergence,
    update,
)
from deepgen_jax.training.inputs import Moments
from deepgen_jax.training.run_config import AutoencoderConfig
from deepgen_jax.training.state import init_state

SIZE = 8


@pytest.fixture(scope="module")
def config() -> DeepGenConfig:
    tiny = tiny_config()
    return replace(tiny, vae=replace(tiny.vae, block_out_channels=(4, 8), norm_num_groups=2))


@pytest.fixture(scope="module")
def trainable(config):
    vae = jax.jit(VAE(config.vae).init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return {"params": {"vae": vae}, "lora": {}}


def batch(config, count, seed=0):
    random = np.random.default_rng(seed)
    side = SIZE // config.vae.downscale
    pictures = random.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return pictures, random.standard_normal((count, side, side, config.vae.latent_channels), np.float32)


#: One program a number of pictures and loss.
accumulated = jax.jit(accumulate, static_argnums=(0, 1))


def gather(config, trainable, *calls, loss="l1", kl_weight=0.01, decoder_only=False, latent_noise=0.0):
    sums, objective = start_sums(trainable, TOTALS), Objective(loss, kl_weight, decoder_only, latent_noise)
    for pictures, noise, weight in calls:
        sums = accumulated(DeepGen(config), objective, trainable, sums, pictures, noise, np.float32(weight))
    return sums


def assert_close(tree, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), tree, expected)


def test_divergence_is_measured_from_the_statistics_of_normalised_latents(config):
    shape = (2, 3, 5, config.vae.latent_channels)
    deviation = 1 / config.vae.scaling_factor
    prior = Moments(jnp.full(shape, config.vae.shift_factor), jnp.full(shape, 2 * np.log(deviation)))
    np.testing.assert_allclose(divergence(prior, config.vae), 0, atol=1e-6)
    # A mean that is off by a deviation costs half a nat, a posterior narrower by e one minus (1 - e^-2) / 2.
    off = prior._replace(mean=prior.mean + deviation)
    np.testing.assert_allclose(divergence(off, config.vae), 0.5, rtol=1e-5)
    narrow = prior._replace(logvar=prior.logvar - 2)
    np.testing.assert_allclose(divergence(narrow, config.vae), 1 - (1 - np.exp(-2)) / 2, rtol=1e-5)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_loss_is_that_of_a_posterior_sample(config, trainable, loss):
    pictures, noise = batch(config, 2)
    totals = gather(config, trainable, (pictures, noise, [1, 0]), loss=loss).totals
    pixels = pictures / np.float32(127.5) - 1
    vae, params = VAE(config.vae), {"params": trainable["params"]["vae"]}

    @jax.jit
    def reconstruct(pixels):
        mean, logvar = vae.apply(params, pixels, method="encode")
        return vae.apply(params, mean + jnp.exp(logvar / 2) * noise, method="decode")

    errors = (reconstruct(pixels) - pixels)[0]
    expected = np.mean(np.abs(errors) if loss == "l1" else np.square(errors))
    np.testing.assert_allclose(totals["loss/reconstruction"], expected, rtol=1e-4)
    np.testing.assert_allclose(totals["loss"], expected + 0.01 * totals["loss/kl"], rtol=1e-4)


def test_a_step_is_the_mean_over_pictures_however_they_are_grouped(config, trainable):
    pictures, noise = batch(config, 4)
    paired = gather(config, trainable, (pictures[:2], noise[:2], [1, 1]), (pictures[2:], noise[2:], [1, 1]))
    crossed = gather(config, trainable, (pictures[::2], noise[::2], [1, 1]), (pictures[1::2], noise[1::2], [1, 1]))
    assert_close(crossed, paired)
    assert crossed.totals["pictures"] == 4
    # A stand-in for a picture that could not be read has no say.
    alone = gather(config, trainable, (pictures[:2], noise[:2], [1, 0]))
    assert_close(gather(config, trainable, (pictures[[0, 3]], noise[[0, 3]], [1, 0])), alone)


def test_steps_reduce_the_loss_and_report_latents(config, trainable):
    optimizer = optax.adam(3e-3)
    state = init_state(optimizer, trainable["params"], None, ema=True)
    pictures, noise = batch(config, 2)
    pictures[:] = np.array([200, 40, 90])

    finish = jax.jit(lambda state, sums: update(optimizer, 0.9, state, sums))
    losses = []
    for _ in range(20):
        state, metrics = finish(state, gather(config, state.trainable, (pictures, noise, [1, 1])))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2
    assert int(state.step) == 20
    assert abs(float(metrics["latent_mean"])) < 2
    assert 0.1 < float(metrics["latent_std"]) < 5
    assert {"grad_norm", "grad_norm/vae", "loss/kl", "loss/reconstruction", "skipped"} <= metrics.keys()


def test_a_step_that_is_not_finite_changes_nothing(config, trainable):
    optimizer = optax.adam(1e-3)
    state = init_state(optimizer, trainable["params"], None, ema=False)
    pictures, noise = batch(config, 2)
    sums = gather(config, trainable, (pictures, noise * np.float32(np.nan), [1, 1]))
    after, metrics = update(optimizer, None, state, sums)
    assert metrics["skipped"] == 1
    assert_close(after.trainable, state.trainable)


def test_noise_on_latents_adds_to_the_posteriors_variance(config, trainable):
    pictures, noise = batch(config, 2)
    plain, noisy = (
        gather(config, trainable, (pictures, noise, [1, 1]), latent_noise=deviation).totals for deviation in (0, 0.5)
    )
    # The divergence is the posterior's own, and what is decoded has the second moment of both.
    assert noisy["loss/kl"] == plain["loss/kl"]
    vae = VAE(config.vae)
    mean, logvar = jax.jit(partial(vae.apply, method="encode"))(
        {"params": trainable["params"]["vae"]}, pictures / np.float32(127.5) - 1
    )
    z = mean + np.sqrt(np.exp(logvar) + (0.5 / config.vae.scaling_factor) ** 2) * noise
    square = np.sum(np.mean(np.square(normalise(z, config.vae)), axis=(1, 2, 3)))
    np.testing.assert_allclose(noisy["latent_square"], square, rtol=1e-4)
    assert abs(plain["latent_square"] - square) > 0.1


def test_trains_only_the_decoder(config, trainable):
    pictures, noise = batch(config, 2)
    both, alone = (
        gather(config, trainable, (pictures, noise, [1, 1]), decoder_only=only).gradients["params"]["vae"]
        for only in (False, True)
    )
    assert_close(alone["decoder"], both["decoder"])
    assert optax.tree.norm(both["encoder"]) > 0
    assert optax.tree.norm(alone["encoder"]) == 0

    # Not even weight decay moves the encoder.
    optimizer = decoder_alone(optax.adamw(1e-3, weight_decay=0.1))
    state = init_state(optimizer, trainable["params"], None, ema=False)
    sums = gather(config, trainable, (pictures, noise, [1, 1]), decoder_only=True)
    after, metrics = jax.jit(lambda state: update(optimizer, None, state, sums))(state)
    before, after = (tree["params"]["vae"] for tree in (state.trainable, after.trainable))
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], before["encoder"])
    moved = jax.tree.map(lambda x, y: np.any(x != y), after["decoder"], before["decoder"])
    assert all(jax.tree.leaves(moved))
    assert metrics["update_norm/vae"] == metrics["update_norm"] > 0


def test_noise_of_latents_is_no_less_than_none():
    with pytest.raises(DeepGenError, match=r"latent_noise is -0\.1; it must be at least 0"):
        AutoencoderConfig(model="m", out="o", steps=1, latent_noise=-0.1, data=None)


def test_trains_only_the_vae():
    with pytest.raises(DeepGenError, match="trains only the vae"):
        AutoencoderConfig(model="m", out="o", steps=1, trains=("bridge",), data=None)
