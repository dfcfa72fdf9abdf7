"""AutoencoderKL of Stable Diffusion 3.5: convolutional encoder and decoder, channels last.

Pixels are in -1..1. Latents that the MMDiT sees are normalised (:func:`normalise`); the encoder and the decoder work on
latents that are not.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from deepgen_jax.config import VAEConfig
from deepgen_jax.models.attention import attention
from deepgen_jax.models.layers import Linear, parameter, precision_of
from deepgen_jax.models.plan import Plan

_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)


def normalise(z: jax.Array, config: VAEConfig) -> jax.Array:
    """Latents of the encoder -> latents that the MMDiT works on."""
    return (z - config.shift_factor) * config.scaling_factor


def denormalise(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """The inverse of :func:`normalise`."""
    return latents / config.scaling_factor + config.shift_factor


def sample_posterior(mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
    """Sample of the posterior, not normalised; ``noise`` is standard normal of the same shape."""
    return mean + jnp.exp(0.5 * logvar) * noise


class Conv(nn.Module):
    """3x3 (or ``size`` x ``size``) convolution: [B, H, W, in] -> [B, H', W', features].

    ``precision`` is that of float32 products; None for full precision.
    """

    features: int
    dtype: DTypeLike
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision or precision_of(self.dtype),
        )
        return y + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group norm over (H, W, channels of a group), computed and returned in float32."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, (channels,)).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,)).astype(jnp.float32)

        def group_mean(y: jax.Array) -> jax.Array:
            per_channel = jnp.mean(y, axis=(1, 2))
            per_group = jnp.mean(per_channel.reshape(-1, self.groups, channels // self.groups), axis=-1)
            return jnp.repeat(per_group, channels // self.groups, axis=-1)[:, None, None]

        x = x.astype(jnp.float32)
        x = x - group_mean(x)
        return x * (jax.lax.rsqrt(group_mean(jnp.square(x)) + _EPS) * scale) + bias


class ResnetBlock(nn.Module):
    """Two norm-SiLU-convolution steps with a shortcut, a 1x1 convolution where the width changes."""

    features: int
    groups: int
    dtype: DTypeLike
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(Conv, precision=self.precision)
        h = nn.silu(GroupNorm(self.groups, name="norm1")(x))
        h = conv(self.features, self.dtype, name="conv1")(h)
        h = nn.silu(GroupNorm(self.groups, name="norm2")(h))
        h = conv(self.features, self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, self.dtype, size=1, padding=(0, 0), name="shortcut")(x)
        return x + h


class MidAttention(nn.Module):
    """Self-attention over all positions with a single head as wide as the block."""

    groups: int
    dtype: DTypeLike
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, name="group_norm")(x).reshape(batch, height * width, channels)
        query, key, value = (
            Linear(channels, dtype=self.dtype, name=name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v")
        )
        h = attention(query, key, value, plan=self.plan)[:, :, 0]
        return x + Linear(channels, dtype=self.dtype, name="to_out")(h).reshape(x.shape)


def _middle(
    x: jax.Array, groups: int, dtype: DTypeLike, plan: Plan, precision: jax.lax.Precision | None
) -> jax.Array:
    """The widest, coarsest part of the encoder or decoder that calls it."""
    x = ResnetBlock(x.shape[-1], groups, dtype, precision, name="mid_resnet_0")(x)
    x = MidAttention(groups, dtype, plan, name="mid_attention")(x)
    return ResnetBlock(x.shape[-1], groups, dtype, precision, name="mid_resnet_1")(x)


class Encoder(nn.Module):
    """[B, H, W, in_channels] -> float32 mean and log variance [B, H / f, W / f, 2 * latent_channels]."""

    config: VAEConfig
    dtype: DTypeLike
    plan: Plan
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtype, conv = self.config, self.dtype, partial(Conv, precision=self.precision)
        x = conv(cfg.block_out_channels[0], dtype, name="conv_in")(x)
        for i, features in enumerate(cfg.block_out_channels):
            for j in range(cfg.layers_per_block):
                x = ResnetBlock(features, cfg.norm_num_groups, dtype, self.precision, name=f"down_{i}_resnet_{j}")(x)
            if i < len(cfg.block_out_channels) - 1:
                # Padded on the right and at the bottom only.
                x = conv(features, dtype, stride=2, padding=(0, 1), name=f"down_{i}_downsample")(x)
        x = _middle(x, cfg.norm_num_groups, dtype, self.plan, self.precision)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, name="norm_out")(x))
        return conv(2 * cfg.latent_channels, jnp.float32, name="conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, latent_channels] -> float32 [B, h * f, w * f, out_channels]."""

    config: VAEConfig
    dtype: DTypeLike
    plan: Plan
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        cfg, dtype, conv = self.config, self.dtype, partial(Conv, precision=self.precision)
        widths = cfg.block_out_channels[::-1]
        x = conv(widths[0], dtype, name="conv_in")(z)
        x = _middle(x, cfg.norm_num_groups, dtype, self.plan, self.precision)
        for i, features in enumerate(widths):
            for j in range(cfg.layers_per_block + 1):
                x = ResnetBlock(features, cfg.norm_num_groups, dtype, self.precision, name=f"up_{i}_resnet_{j}")(x)
            if i < len(widths) - 1:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = conv(features, dtype, name=f"up_{i}_upsample")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, name="norm_out")(x))
        return conv(cfg.out_channels, jnp.float32, name="conv_out")(x)


class VAE(nn.Module):
    """The autoencoder. The last convolutions, like all norms, are float32 whatever ``dtype`` is.

    ``precision`` is that of float32 convolutions; None for full precision. `jax.lax.Precision.HIGH` is TF32 on GPUs, as
    PyTorch computes them by default, three bfloat16 products on TPUs, and the same as full precision on CPUs.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    plan: Plan = Plan()
    precision: jax.lax.Precision | None = None

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype, self.plan, self.precision)
        self.decoder = Decoder(self.config, self.dtype, self.plan, self.precision)

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, H, W, 3] in -1..1 -> posterior mean and log variance, float32 [B, H / f, W / f, C]."""
        mean, logvar = jnp.split(self.encoder(pixels), 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOGVAR_RANGE)

    def decode(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, C], not normalised -> pixels, float32 [B, h * f, w * f, 3], about -1..1, not clipped."""
        return self.decoder(z)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Reconstruction through the posterior mean."""
        return self.decode(self.encode(pixels)[0])
