"""Models with random weights, so that speed can be measured without a checkpoint."""

from __future__ import annotations

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import (
    BridgeConfig,
    DeepGenConfig,
    MMDiTConfig,
    SchedulerConfig,
    TextConfig,
    VAEConfig,
    VisionConfig,
)
from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.models.patches import sincos_table
from deepgen_jax.models.stack import unrolls, unstack
from deepgen_jax.parallel import rules
from deepgen_jax.stores.merged_params import part_dtypes

_TOKENS: dict[str, Any] = {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "vision_start_token_id": 2,
    "vision_end_token_id": 3,
    "image_token_id": 4,
    "video_token_id": 5,
}

#: Number of normal samples that are drawn and tiled over all weights; prime, so that no two rows are alike.
_DRAWN = 1_000_003

#: "tiny" runs in seconds anywhere, "mid" has an MMDiT of 111 M parameters, "full" has the released sizes.
PRESETS = {
    "tiny": DeepGenConfig(
        text=TextConfig(
            hidden_size=64, intermediate_size=160, num_layers=8, num_heads=4, num_kv_heads=2, vocab_size=500,
            mrope_sections=(2, 3, 3), **_TOKENS,
        ),
        vision=VisionConfig(
            depth=2, hidden_size=64, intermediate_size=96, num_heads=4, full_attention_blocks=(1,), out_hidden_size=64
        ),
        bridge=BridgeConfig(num_queries=16, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4),
        mmdit=MMDiTConfig(
            num_layers=4, num_heads=4, head_dim=16, joint_attention_dim=96, caption_projection_dim=64,
            pooled_projection_dim=48, dual_attention_layers=(0, 1), pos_embed_max_size=96, sample_size=32,
        ),
        vae=VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8),
    ),
    "mid": DeepGenConfig(
        text=TextConfig(
            hidden_size=512, intermediate_size=2048, num_layers=12, num_heads=8, num_kv_heads=2, vocab_size=8000,
            mrope_sections=(8, 12, 12), **_TOKENS,
        ),
        vision=VisionConfig(
            depth=8, hidden_size=320, intermediate_size=1024, num_heads=4, full_attention_blocks=(3, 7),
            out_hidden_size=512,
        ),
        bridge=BridgeConfig(num_queries=128, hidden_size=512, intermediate_size=2048, num_layers=3, num_heads=8),
        mmdit=MMDiTConfig(
            num_layers=5, num_heads=12, head_dim=64, joint_attention_dim=1024, caption_projection_dim=768,
            pooled_projection_dim=512, dual_attention_layers=(0, 1, 2), pos_embed_max_size=96, sample_size=64,
        ),
        vae=VAEConfig(block_out_channels=(32, 64, 128, 128)),
    ),
    "full": DeepGenConfig(),
}  # fmt: skip


class WordTokenizer(PromptTokenizer):
    """A fake tokenizer: every word, punctuation mark or special token of the text is one token."""

    def __init__(self, config: DeepGenConfig) -> None:
        self._config = config

    def encode(self, text: str) -> list[int]:
        config = self._config.text
        special = {"<|im_end|>": config.eos_token_id, "<|image_pad|>": config.image_token_id}
        special |= {"<|vision_start|>": config.vision_start_token_id, "<|vision_end|>": config.vision_end_token_id}
        first, count = (6, config.vocab_size - 6) if config.pad_token_id == 0 else (0, config.pad_token_id)
        words = re.findall(r"<\|\w+\|>|\w+|\S|\n", text)
        return [special.get(word, first + zlib.crc32(word.encode()) % count) for word in words]


def random_pipeline(config: DeepGenConfig, dtype: DTypeLike, mesh: Mesh) -> DeepGenPipeline:
    """A pipeline of ``config`` with random weights, in the dtypes and at the places that a loaded model's have."""
    dtypes = part_dtypes(config, dtype)
    normal = np.random.default_rng(0).standard_normal(_DRAWN, np.float32)
    params: dict[tuple[str, ...], Any] = {}
    for part, tree in abstract_params(config).items():
        shardings = flatten_dict(rules.shardings(tree, mesh, part))
        for path, leaf in flatten_dict(tree).items():
            name = "/".join((part, *path))
            value = _values(name, leaf.shape, jnp.dtype(dtypes[part]), normal, config.mmdit)
            params[part, *path] = jax.device_put(value, shardings[path])
    weights = unflatten_dict(params)
    if unrolls(mesh):
        weights = unstack(weights)
    return DeepGenPipeline(config, SchedulerConfig(), weights, WordTokenizer(config), mesh, dtype)


def _values(path: str, shape: tuple[int, ...], dtype: Any, normal: np.ndarray, mmdit: MMDiTConfig) -> Any:
    """One parameter; activations keep their size through the layers, and no gate is closed."""
    if path == "mmdit/pos_embed":
        base = mmdit.sample_size // mmdit.patch_size
        return sincos_table(mmdit.pos_embed_max_size, base, mmdit.hidden_size).astype(dtype)
    name = path.rpartition("/")[2]
    if name == "scale":
        return np.ones(shape, dtype)
    inputs = math.prod(shape[:-1]) if path.startswith("vae/") else shape[-2] if name == "kernel" else shape[-1]
    std = 0.02 if name == "bias" else inputs**-0.5
    rolled = np.roll(normal, zlib.crc32(path.encode()) % _DRAWN)
    if path == "mmdit/timestep_fc1/kernel":
        return (std * np.resize(rolled, shape) * _damping(shape[0])[:, None]).astype(dtype)
    return np.resize((std * rolled).astype(dtype), shape)


def _damping(channels: int) -> np.ndarray:
    """Weights of the timestep's sinusoids, of mean square 1: float64 [channels].

    With equal weights the fastest sinusoids would make consecutive sampling steps as different as the first and the
    last. Trained models change slowly: of 50 steps, the update of the first layer by 2 to 14% a step, as here.
    """
    frequencies = 1000 * 10_000.0 ** -(np.arange(channels // 2) / (channels // 2))
    weights = np.tile(1 / np.sqrt(1 + (frequencies / 10) ** 2), 2)
    return np.asarray(weights / np.sqrt(np.mean(weights**2)))
