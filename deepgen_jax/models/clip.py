"""CLIP's text and image towers (Radford et al., 2021); the cosine of their features scores how an image fits a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from deepgen_jax.models.attention import attention
from deepgen_jax.models.layers import Embedding, LayerNorm, Linear
from deepgen_jax.models.stack import scanned

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True)
class CLIPTowerConfig:
    """Sizes of a transformer; the defaults are the text tower of ViT-L/14."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    activation: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers; the defaults are ViT-L/14.

    ``eos_token_id``: text features are read at this token; 2 means the largest token id of the text, as in older
    configurations with a wrong id.
    """

    text: CLIPTowerConfig = field(default_factory=CLIPTowerConfig)
    vision: CLIPTowerConfig = field(default_factory=lambda: CLIPTowerConfig(1024, 4096, 24, 16))
    vocab_size: int = 49408
    max_positions: int = 77
    eos_token_id: int = 2
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 768


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer."""

    config: CLIPTowerConfig
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        cfg = self.config

        def linear(name: str, features: int) -> Linear:
            return Linear(features, dtype=self.dtype, name=name)

        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm1")(x)
        heads = (*x.shape[:2], cfg.num_heads, cfg.hidden_size // cfg.num_heads)
        query, key, value = (linear(f"{n}_proj", cfg.hidden_size)(h).reshape(heads) for n in "qkv")
        h = attention(query, key, value, causal=self.causal)
        x = x + linear("out_proj", cfg.hidden_size)(h.reshape(x.shape))

        h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm2")(x)
        h = _ACTIVATIONS[cfg.activation](linear("fc1", cfg.intermediate_size)(h))
        return x + linear("fc2", cfg.hidden_size)(h), None


class CLIP(nn.Module):
    """Features of texts and of images in one space, not normalised."""

    config: CLIPConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        cfg = self.config
        text, vision = cfg.text, cfg.vision
        positions = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.token_embedding = Embedding(cfg.vocab_size, text.hidden_size, self.dtype)
        self.text_positions = self.param("text_positions", _INIT, (cfg.max_positions, text.hidden_size))
        self.text_layers = scanned(CLIPLayer, text.num_layers, 0)(text, True, self.dtype)
        self.text_norm = LayerNorm(text.layer_norm_eps, self.dtype)
        self.text_projection = Linear(cfg.projection_dim, use_bias=False, dtype=self.dtype)
        self.patch_embedding = Linear(vision.hidden_size, use_bias=False, dtype=self.dtype)
        self.class_embedding = self.param("class_embedding", _INIT, (vision.hidden_size,))
        self.vision_positions = self.param("vision_positions", _INIT, (positions, vision.hidden_size))
        self.vision_norm_in = LayerNorm(vision.layer_norm_eps, self.dtype)
        self.vision_layers = scanned(CLIPLayer, vision.num_layers, 0)(vision, False, self.dtype)
        self.vision_norm_out = LayerNorm(vision.layer_norm_eps, self.dtype)
        self.vision_projection = Linear(cfg.projection_dim, use_bias=False, dtype=self.dtype)

    def text_features(self, input_ids: jax.Array) -> jax.Array:
        """Token ids [B, L] int32, each text closed by its end token and then padded -> [B, projection_dim].

        Attention is causal, so that tokens after the end token do not matter.
        """
        x = self.token_embedding(input_ids) + self.text_positions[: input_ids.shape[1]].astype(self.dtype)
        x, _ = self.text_layers(x)
        x = self.text_norm(x)
        eos = self.config.eos_token_id
        end = jnp.argmax(input_ids if eos == 2 else input_ids == eos, axis=1)
        return self.text_projection(x[jnp.arange(x.shape[0]), end])

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, image_size, image_size, 3] -> [B, projection_dim]."""
        size, count = self.config.patch_size, pixels.shape[0]
        side = self.config.image_size // size
        patches = pixels.reshape(count, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embedding(patches.reshape(count, side * side, -1))
        first = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (count, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.vision_positions.astype(self.dtype)
        x, _ = self.vision_layers(self.vision_norm_in(x))
        return self.vision_projection(self.vision_norm_out(x[:, 0]))

    def similarity(self, input_ids: jax.Array, pixels: jax.Array) -> jax.Array:
        """Cosine of each text's and its image's features, float32 [B]; shapes as for the two towers."""
        text, image = (x.astype(jnp.float32) for x in (self.text_features(input_ids), self.image_features(pixels)))
        norms = jnp.linalg.norm(text, axis=-1) * jnp.linalg.norm(image, axis=-1)
        return jnp.sum(text * image, axis=-1) / norms


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(1.702 * x)


def _gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=False)


_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {"quick_gelu": _quick_gelu, "gelu": _gelu}
_INIT = nn.initializers.normal(0.02)
