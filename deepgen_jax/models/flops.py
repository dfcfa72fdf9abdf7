"""Analytic floating-point operation counts of every part's forward pass.

Matrix products and convolutions count two operations a multiply-add; norms, activations and softmax are left out.
Attention counts all pairs of a query and a key, masked or not. All counts are of one sample; the backward pass of a
training step costs twice the forward pass.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from deepgen_jax.config import DeepGenConfig, MMDiTConfig, TextConfig, VAEConfig, VisionConfig
from deepgen_jax.models.mmdit import TIMESTEP_CHANNELS, block_runs
from deepgen_jax.models.qwen_text import selected_layers


class GenerationFlops(NamedTuple):
    """Operations of generating one image: prompts -> condition, sampler, latents -> pixels."""

    condition: int
    sampler: int
    decoder: int

    @property
    def total(self) -> int:
        return sum(self)


def linear(tokens: int, width_in: int, width_out: int) -> int:
    """A linear layer."""
    return 2 * tokens * width_in * width_out


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum of attention whose heads together are ``width`` wide."""
    return 4 * queries * keys * width


def mmdit(config: MMDiTConfig, targets: int, context: int, references: int = 0) -> int:
    """One velocity of one sample: ``targets`` and ``references`` image tokens, ``context`` condition tokens."""
    width, image = config.hidden_size, targets + references
    patch = config.patch_size**2
    total = linear(image, patch * config.in_channels, width)
    total += linear(context, config.joint_attention_dim, config.caption_projection_dim)
    total += linear(1, TIMESTEP_CHANNELS, width) + linear(1, config.pooled_projection_dim, width)
    total += 2 * linear(1, width, width)
    for run in block_runs(config):
        # The last layer's image stream has only targets, and its context stream only keys and values.
        queries = targets if run.context_pre_only else image
        context_queries = 0 if run.context_pre_only else context
        layer = linear(1, width, (9 if run.dual else 6) * width)
        layer += linear(1, width, (2 if run.context_pre_only else 6) * width)
        layer += linear(2 * queries + 2 * image + 2 * context_queries + 2 * context, width, width)
        layer += attention(queries + context_queries, image + context, width)
        if run.dual:
            layer += linear(2 * queries + 2 * image, width, width) + attention(queries, image, width)
        layer += 2 * linear(queries + context_queries, width, 4 * width)
        total += run.length * layer
    return total + linear(1, width, 2 * width) + linear(targets, width, config.estimates * patch * config.out_channels)


def text(config: TextConfig, length: int) -> int:
    """The decoder layers that run (all but the last), over prompt and think tokens."""
    width, key_width = config.hidden_size, config.num_kv_heads * config.head_dim
    layer = 2 * linear(length, width, width) + 2 * linear(length, width, key_width)
    layer += attention(length, length, width) + 3 * linear(length, width, config.intermediate_size)
    return (config.num_layers - 1) * layer


def vision(config: VisionConfig, patches: int) -> int:
    """One picture of ``patches`` 14x14 patches; window attention counts all pairs, as it is computed with a mask."""
    width, merge = config.hidden_size, config.spatial_merge_size**2
    layer = 4 * linear(patches, width, width) + attention(patches, patches, width)
    layer += 3 * linear(patches, width, config.intermediate_size)
    merged = linear(1, merge * width, merge * width) + linear(1, merge * width, config.out_hidden_size)
    return linear(patches, config.patch_dim, width) + config.depth * layer + patches // merge * merged


def bridge(config: DeepGenConfig, length: int) -> int:
    """Projector, connector and both output heads over the selected hidden states of ``length`` tokens."""
    connector, width = config.bridge, config.bridge.hidden_size
    stacked = len(selected_layers(config.text.num_layers, connector.selection_stride)) * config.text.hidden_size
    layer = 4 * linear(length, width, width) + attention(length, length, width)
    layer += 2 * linear(length, width, connector.intermediate_size)
    heads = linear(1, width, config.mmdit.pooled_projection_dim)
    heads += linear(length, width, config.mmdit.joint_attention_dim)
    return linear(length, stacked, width) + connector.num_layers * layer + heads


def condition(config: DeepGenConfig, length: int) -> int:
    """Language model and bridge for one sequence of ``length`` prompt and think tokens."""
    return text(config.text, length) + bridge(config, length)


def _convolution(pixels: int, width_in: int, width_out: int, size: int = 3) -> int:
    return linear(pixels, size**2 * width_in, width_out)


def _resnet(pixels: int, width_in: int, width_out: int) -> int:
    total = _convolution(pixels, width_in, width_out) + _convolution(pixels, width_out, width_out)
    return total + (_convolution(pixels, width_in, width_out, 1) if width_in != width_out else 0)


def _vae_middle(pixels: int, width: int) -> int:
    return 2 * _resnet(pixels, width, width) + 4 * linear(pixels, width, width) + attention(pixels, pixels, width)


def vae_decoder(config: VAEConfig, height: int, width: int) -> int:
    """One picture of ``height`` x ``width`` pixels."""
    widths = config.block_out_channels[::-1]
    pixels = (height // config.downscale) * (width // config.downscale)
    total = _convolution(pixels, config.latent_channels, widths[0]) + _vae_middle(pixels, widths[0])
    features = widths[0]
    for i, features_out in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            total += _resnet(pixels, features, features_out)
            features = features_out
        if i < len(widths) - 1:
            pixels *= 4
            total += _convolution(pixels, features, features)
    return total + _convolution(pixels, features, config.out_channels)


def vae_encoder(config: VAEConfig, height: int, width: int) -> int:
    """One picture of ``height`` x ``width`` pixels."""
    widths = config.block_out_channels
    pixels = height * width
    features = widths[0]
    total = _convolution(pixels, config.in_channels, features)
    for i, features_out in enumerate(widths):
        for _ in range(config.layers_per_block):
            total += _resnet(pixels, features, features_out)
            features = features_out
        if i < len(widths) - 1:
            pixels //= 4
            total += _convolution(pixels, features, features)
    return total + _vae_middle(pixels, features) + _convolution(pixels, features, 2 * config.latent_channels)


def text_to_image(
    config: DeepGenConfig, height: int, width: int, steps: int, length: int, guided: bool
) -> GenerationFlops:
    """One text-to-image sample.

    Args:
      config: the model.
      height, width: of the image in pixels.
      steps: Euler steps.
      length: prompt and think tokens of a sequence.
      guided: both sides of classifier-free guidance run.
    """
    sides = 2 if guided else 1
    unit = config.vae.downscale * config.mmdit.patch_size
    targets = (height // unit) * (width // unit)
    return GenerationFlops(
        condition=sides * condition(config, length),
        sampler=sides * steps * mmdit(config.mmdit, targets, length),
        decoder=vae_decoder(config.vae, height, width),
    )


def training(
    config: DeepGenConfig, trains: Collection[str], targets: int, context: int, references: int = 0
) -> int:
    """Forward and backward pass of one sample through language model, bridge and MMDiT.

    A part that trains costs three forward passes; one that only propagates gradients, two; one before all trainable
    parts, one. Think tokens are parameters of the bridge and inputs of the language model, which propagates their
    gradients. Products of adapters and recomputation are not counted.

    Args:
      config: the model.
      trains: names of the parts that train: "bridge", "mmdit", "lora".
      targets, references: image tokens.
      context: prompt and think tokens.
    """
    language = 2 if {"lora", "bridge"} & set(trains) else 1
    total = language * text(config.text, context)
    total += (3 if "bridge" in trains else language) * bridge(config, context)
    return total + (3 if "mmdit" in trains else 2) * mmdit(config.mmdit, targets, context, references)


def distillation(
    config: DeepGenConfig,
    trains: Collection[str],
    guided: bool,
    student: float,
    learned: int,
    teacher: int,
    targets: int,
    context: int,
    references: int = 0,
) -> int:
    """Distillation of one sample to a few-step policy: conditions, the student's evaluations, and the teacher's.

    Args:
      config: the student.
      trains: "mmdit", or "mmdit_lora" alone.
      guided: the teacher is evaluated on the empty prompt as well.
      student: evaluations of the student without gradient.
      learned: those with gradient.
      teacher: evaluations of the teacher.
      targets, context, references: as for :func:`training`.
    """
    sides = 2 if guided else 1
    one = mmdit(config.mmdit, targets, context, references)
    passes = student + learned * (3 if "mmdit" in trains else 2) + teacher * sides
    return sides * condition(config, context) + round(passes * one)
