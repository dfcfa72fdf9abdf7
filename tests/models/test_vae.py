"""The autoencoder against the golden arrays and against diffusers' AutoencoderKL."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.config import VAEConfig
from deepgen_jax.models.vae import VAE, denormalise, normalise, sample_posterior

TINY = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def params(data_dir, read_state, vae_params):
    return vae_params(read_state(data_dir / "sd3_5_kontext/vae"), TINY)


@partial(jax.jit, static_argnames=("model", "method"))
def run(model, params, x, method):
    return model.apply({"params": params}, x, method=method)


def channels_last(x):
    return np.moveaxis(np.asarray(x), -3, -1)


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, -3)


@pytest.mark.parametrize("key", ["s", "t"])
def test_posterior_matches_goldens(key, params, goldens, tolerance):
    golden = goldens("vae")
    pixels = goldens("vision")[f"image/{key}"][None].astype(np.float32) / 255 * 2 - 1
    posterior = run(VAE(TINY), params, pixels, "encode")
    for moment, value in zip(("mean", "logvar"), posterior, strict=True):
        name = f"encode/{key}/{moment}"
        np.testing.assert_allclose(channels_first(value[0]), golden[name], rtol=0, atol=tolerance("vae", name))


def test_normalised_sample_matches_goldens(params, goldens, tolerance):
    golden = goldens("vae")
    pixels = goldens("vision")["image/t"][None].astype(np.float32) / 255 * 2 - 1
    mean, logvar = run(VAE(TINY), params, pixels, "encode")
    z = sample_posterior(mean, logvar, channels_last(golden["sample/t/eps"])[None])
    latent = channels_first(normalise(z, TINY))[0]
    np.testing.assert_allclose(latent, golden["sample/t/latent"], rtol=0, atol=tolerance("vae", "sample/t/latent"))
    np.testing.assert_allclose(denormalise(normalise(z, TINY), TINY), z, rtol=0, atol=1e-5)


def test_decoded_pixels_match_goldens(params, goldens, tolerance):
    golden = goldens("vae")
    z = denormalise(channels_last(golden["decode/z"]), TINY)
    pixels = np.asarray(run(VAE(TINY), params, z, "decode"))
    expected = golden["decode/pixels"]
    np.testing.assert_allclose(channels_first(pixels), expected, rtol=0, atol=tolerance("vae", "decode/pixels"))
    quantised = np.clip(127.5 * pixels + 128, 0, 255).astype(np.uint8)
    on_an_edge = np.abs(127.5 * pixels + 128 - np.round(127.5 * pixels + 128)) < 1e-2
    np.testing.assert_array_equal(quantised[~on_an_edge], golden["decode/uint8"][~on_an_edge])
    assert np.abs(quantised.astype(int) - golden["decode/uint8"]).max() <= 1


PEERS = {
    "two layers a block": VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4),
    "three widths": VAEConfig(
        block_out_channels=(6, 12, 18), layers_per_block=1, norm_num_groups=3, latent_channels=5
    ),
    "one width": VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=8, latent_channels=2),
    "no downsampling, other channels": VAEConfig(
        in_channels=4,
        out_channels=2,
        latent_channels=3,
        block_out_channels=(10,),
        layers_per_block=3,
        norm_num_groups=5,
    ),
}


@pytest.mark.parametrize("config", PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("grid", [(2, 3), (5, 2)], ids=["wide", "tall"])
def test_moments_and_pixels_match_diffusers(config, grid, vae_params):
    import torch
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    torch.manual_seed(0)
    peer = AutoencoderKL(
        **dataclasses.asdict(config),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    params = vae_params(peer.state_dict(), config)

    rng = np.random.default_rng(0)
    height, width = (side * config.downscale for side in grid)
    pixels = rng.uniform(-1, 1, (2, config.in_channels, height, width)).astype(np.float32)
    z = rng.normal(size=(2, config.latent_channels, *grid)).astype(np.float32)
    with torch.no_grad():
        posterior = peer.encode(torch.from_numpy(pixels)).latent_dist
        expected = [posterior.mean.numpy(), posterior.logvar.numpy(), peer.decode(torch.from_numpy(z)).sample.numpy()]
    actual = [
        *run(VAE(config), params, channels_last(pixels), "encode"),
        run(VAE(config), params, channels_last(z), "decode"),
    ]
    for value, reference in zip(actual, expected, strict=True):
        assert value.shape == channels_last(reference).shape
        np.testing.assert_allclose(channels_first(value), reference, rtol=0, atol=2e-5 * np.abs(reference).max())


def test_log_variance_is_clamped(params):
    head = params["encoder"]["conv_out"]
    for bias, limit in ((1e3, 20), (-1e3, -30)):
        extreme = {**params["encoder"], "conv_out": {**head, "bias": np.full_like(head["bias"], bias)}}
        _, logvar = run(VAE(TINY), {**params, "encoder": extreme}, jnp.zeros((1, 8, 8, 3)), "encode")
        np.testing.assert_array_equal(logvar, limit)


def test_images_of_a_batch_are_independent(params):
    z = np.random.default_rng(0).normal(size=(3, 4, 6, 16)).astype(np.float32)
    together = run(VAE(TINY), params, z, "decode")
    for i in range(3):
        np.testing.assert_allclose(run(VAE(TINY), params, z[i : i + 1], "decode")[0], together[i], rtol=0, atol=1e-5)


def test_bfloat16_stays_near_float32(params, goldens):
    golden = goldens("vae")
    z = denormalise(channels_last(golden["decode/z"]), TINY)
    pixels = run(VAE(TINY, jnp.bfloat16), params, z, "decode")
    assert pixels.dtype == jnp.float32
    expected = golden["decode/pixels"]
    assert np.linalg.norm(channels_first(pixels) - expected) < 0.02 * np.linalg.norm(expected)
