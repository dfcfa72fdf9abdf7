"""Packed bfloat16 kernels compute the same, and keep programs on CPUs from holding float32 copies of stacks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.config import DeepGenConfig, MMDiTConfig
from deepgen_jax.inference import programs
from deepgen_jax.inference.guidance import Condition
from deepgen_jax.models.deepgen import DeepGen, abstract_params
from deepgen_jax.models.packing import pack_kernels, unpacked
from deepgen_jax.nano.model import nano_config


def test_every_value_survives():
    bits = jnp.arange(2**16, dtype=jnp.uint16)
    values = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    packed = pack_kernels(
        {
            "a": {"kernel": jnp.array(values), "bias": values},
            "b": {"kernel": jnp.ones(2)},
            "vae": {"kernel": jnp.array(values)},
        }
    )
    assert packed["a"]["kernel"].dtype == jnp.uint16
    assert packed["a"]["bias"].dtype == packed["vae"]["kernel"].dtype == jnp.bfloat16
    assert packed["b"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(unpacked(packed["a"]["kernel"])).view(np.uint16), bits)


def test_the_same_velocity():
    config = nano_config()
    model = DeepGen(config, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    shapes = {"mmdit": abstract_params(config)["mmdit"]}
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.bfloat16), shapes)
    width, joint = config.mmdit.patch_size**2 * config.mmdit.in_channels, config.mmdit.joint_attention_dim
    inputs = [
        jnp.asarray(rng.standard_normal((2, 16, width)), jnp.float32),
        jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1)),
        jnp.float32([500.0, 20.0]),
        jnp.asarray(rng.standard_normal((2, config.mmdit.pooled_projection_dim)), jnp.bfloat16),
        jnp.asarray(rng.standard_normal((2, 9, joint)), jnp.bfloat16),
    ]
    plain = programs.velocity(model, params, *inputs, None, None, num_targets=16)
    packed = pack_kernels(jax.tree.map(jnp.array, params))
    np.testing.assert_array_equal(plain, programs.velocity(model, packed, *inputs, None, None, num_targets=16))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="CPU only")
def test_no_copy_of_the_weights_in_a_program():
    """A stack of large layers under a small batch: the temporary memory is below half of the weights."""
    sizes = MMDiTConfig(
        num_layers=8, num_heads=8, head_dim=64, joint_attention_dim=64, caption_projection_dim=512,
        pooled_projection_dim=64, dual_attention_layers=(), pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    model = DeepGen(DeepGenConfig(mmdit=sizes), dtype=jnp.bfloat16)

    def stored(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.uint16 if path[-1].key == "kernel" else jnp.bfloat16)

    params = {"mmdit": jax.tree_util.tree_map_with_path(stored, abstract_params(model.config)["mmdit"])}
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    condition = Condition(
        jax.ShapeDtypeStruct((1, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 4, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 4), jnp.bool_),
    )
    noise, sigmas = jax.ShapeDtypeStruct((1, 16, 8, 8), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
    compiled = programs.denoise.lower(model, params, noise, None, condition, sigmas, None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weights / 2
