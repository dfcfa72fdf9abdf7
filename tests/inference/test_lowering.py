"""The full-size programs lower quickly, from shapes only, to a text that does not grow with depth."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

from deepgen_jax.config import DeepGenConfig, MMDiTConfig, TextConfig
from deepgen_jax.inference import programs
from deepgen_jax.models.deepgen import DeepGen, abstract_params

FULL = DeepGenConfig()
HALF = DeepGenConfig(
    mmdit=MMDiTConfig(num_layers=12, dual_attention_layers=tuple(range(7))), text=TextConfig(num_layers=18)
)
STEPS, LATENT, SEQUENCE = 50, 64, 192
#: Numbers that tell depths apart ("tensor<13x1536x..." and "tensor<7x1536x...") have one or two digits.
SLACK = 0.01


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered_denoise(config):
    """50 guided steps of one 512x512 image."""
    sizes = config.mmdit
    condition = programs.Condition(
        array(2, sizes.pooled_projection_dim),
        array(2, SEQUENCE, sizes.joint_attention_dim),
        array(2, SEQUENCE, dtype=jnp.bool_),
    )
    noise, sigmas = array(1, sizes.in_channels, LATENT, LATENT), array(STEPS + 1)
    params = {"mmdit": abstract_params(config)["mmdit"]}
    return programs.denoise.lower(DeepGen(config), params, noise, None, condition, sigmas, array()).as_text()


def lowered_condition(config):
    """A prompt and its negative prompt."""
    params = abstract_params(config)
    ids = array(2, SEQUENCE - config.bridge.num_queries, dtype=jnp.int32)
    positions, mask = array(3, 2, SEQUENCE, dtype=jnp.int32), array(2, SEQUENCE, dtype=jnp.bool_)
    params = {part: params[part] for part in ("text", "bridge")}
    return programs.condition.lower(DeepGen(config), params, ids, positions, mask, mask).as_text()


@pytest.mark.parametrize("lowered", [lowered_denoise, lowered_condition])
def test_full_size_program_lowers_within_a_minute_and_does_not_grow_with_depth(lowered):
    start = time.perf_counter()
    full = lowered(FULL)
    assert time.perf_counter() - start < 60
    assert len(full) == pytest.approx(len(lowered(HALF)), rel=SLACK)
