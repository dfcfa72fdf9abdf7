"""The flow-matching loss on arrays and on lists of differently sized samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.flow.losses import flow_matching_loss


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_model_sees_the_interpolation_and_predicts_noise_minus_clean(goldens):
    golden = goldens("train")
    latents = [golden["t2i/latent/0"], golden["t2i/latent/1"]]
    noise = [golden["t2i/noise/0"], golden["t2i/noise/1"]]
    sigma = golden["t2i/sigma"]

    def perfect(noisy, levels):
        np.testing.assert_array_equal(levels, sigma)
        for x, e, s, x_t in zip(latents, noise, sigma, noisy, strict=True):
            np.testing.assert_allclose(x_t, (1 - s) * x + s * e, atol=1e-6)
        return [e - x for e, x in zip(noise, latents, strict=True)]

    assert float(flow_matching_loss(perfect, latents, noise, sigma)) == 0


def test_every_sample_weighs_the_same_whatever_its_size():
    noise = [normal(0, 4, 2, 2), normal(1, 4, 6, 2)]
    latents = [np.zeros_like(e) for e in noise]
    loss = flow_matching_loss(lambda x, s: [jnp.zeros_like(v) for v in x], latents, noise, jnp.array([0.2, 0.9]))
    np.testing.assert_allclose(loss, np.mean([np.mean(e**2) for e in noise]), rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, np.array([0.3, 0.6, 0.9], np.float32)])
def test_array_equals_list(sigma):
    latents, noise = normal(0, 3, 4, 2, 2), normal(1, 3, 4, 2, 2)

    def on_array(x, s):
        return jnp.sin(x) * s[:, None, None, None]

    def on_list(x, s):
        return [jnp.sin(v) * level for v, level in zip(x, s, strict=True)]

    array = jax.jit(lambda x: flow_matching_loss(on_array, x, noise, sigma))(latents)
    assert array.shape == ()
    np.testing.assert_allclose(array, flow_matching_loss(on_list, list(latents), list(noise), sigma), rtol=1e-6)


def test_error_is_float32_when_the_model_is_not():
    latents, noise = normal(0, 2, 4, 2, 2), normal(1, 2, 4, 2, 2)
    loss = flow_matching_loss(lambda x, s: x.astype(jnp.bfloat16), jnp.asarray(latents, jnp.bfloat16), noise, 0.5)
    assert loss.dtype == jnp.float32


def test_samples_without_noise_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        flow_matching_loss(lambda x, s: x, [normal(0, 4, 2, 2)] * 2, [normal(1, 4, 2, 2)], 0.5)
