"""8-bit kernels: rounding within half a step, layers that compute with them, a table that covers every parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.models import quantized
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.models.layers import Embedding, Linear
from deepgen_jax.parallel.rules import matching_rules

KERNELS = arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.floats(-1e4, 1e4, width=32))


@given(KERNELS, st.sampled_from(["x/kernel", "x/embedding"]))
def test_int8_is_within_half_a_step_of_each_channel(value, path):
    values, scale = quantized.quantize(path, value, "int8")
    assert values.dtype == np.int8
    assert scale.shape == quantized.scale_shape(path, value.shape)
    wide = np.expand_dims(scale, -1 if path.endswith("embedding") else -2)
    error = np.abs(values.astype(np.float64) * wide - value)
    assert (error <= 0.5001 * wide).all()


@given(KERNELS)
def test_fp8_keeps_four_bits_of_each_value(value):
    values, scale = quantized.quantize("x/kernel", value, "fp8")
    assert values.dtype == ml_dtypes.float8_e4m3fn
    back = values.astype(np.float64) * np.expand_dims(scale, -2)
    assert np.isfinite(back).all()
    # Half a unit in the last of three stored bits, or half the smallest subnormal.
    assert (np.abs(back - value) <= np.abs(value) / 16 + np.expand_dims(scale, -2) * 2.0**-10 + 1e-30).all()


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("products", [False, True])
def test_a_layer_computes_with_its_8_bit_kernel(to, products):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((3, 5, 64), np.float32), rng.standard_normal((64, 32), np.float32)
    bias = rng.standard_normal(32).astype(np.float32)
    values, scale = quantized.quantize("x/kernel", kernel, to)
    name = quantized.PRODUCT_SCALE if products else quantized.WEIGHT_SCALE
    y = Linear(32).apply({"params": {"kernel": values, name: scale, "bias": bias}}, x)
    rounded = values.astype(np.float32) * scale
    if products:
        largest = quantized.FORMATS[to].largest
        step = np.abs(x).max(-1, keepdims=True) / largest
        x8 = np.rint(x / step) if to == "int8" else (x / step).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_allclose(y, (x8 * step) @ rounded + bias, atol=2e-4, rtol=1e-4)
    else:
        np.testing.assert_allclose(y, x @ rounded + bias, atol=2e-4, rtol=1e-5)
    exact = x @ kernel + bias
    assert np.abs(y - exact).max() > 1e-4
    assert np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)) < (0.02 if to == "int8" else 0.06)


def test_a_table_has_a_scale_for_each_row():
    table = np.random.default_rng(0).standard_normal((7, 16)).astype(np.float32) * 10.0 ** np.arange(-3, 4)[:, None]
    values, scale = quantized.quantize("x/embedding", table, "int8")
    y = Embedding(7, 16).apply({"params": {"embedding": values, quantized.WEIGHT_SCALE: scale}}, jnp.arange(7))
    np.testing.assert_allclose(y, values * scale[:, None], rtol=1e-6)
    assert (np.abs(y - table).max(1) <= 0.51 * scale).all()


def test_weight_only_layers_are_differentiable_in_their_input():
    values, scale = quantized.quantize("x/kernel", np.eye(4, dtype=np.float32), "int8")
    layer = {"params": {"kernel": values, quantized.WEIGHT_SCALE: scale}}
    gradient = jax.grad(lambda x: Linear(4, use_bias=False).apply(layer, x).sum())(jnp.ones(4))
    np.testing.assert_allclose(gradient, 1, rtol=1e-2)


@pytest.mark.parametrize("products", [False, True])
def test_the_full_model_is_half_as_large(products):
    """Every parameter has a treatment, every new one a sharding rule, and 8 bits where most of the weights are."""
    shapes = abstract_params(DeepGenConfig())
    small = flatten_dict(quantized.quantize_tree(shapes, "int8", products), sep="/")
    whole = flatten_dict(shapes, sep="/")
    for path, leaf in small.items():
        assert len(matching_rules(path)) == 1, path
        if path in whole:
            assert leaf.shape == whole[path].shape
        else:
            kernel = next(p for p in whole if quantized.treatment(p, products) != "kept"
                          and quantized.scale_path(p, products) == path)  # fmt: skip
            assert leaf.shape == quantized.scale_shape(kernel, whole[kernel].shape)
    size = sum(np.prod(x.shape) * (1 if x.dtype == np.int8 else 2) for x in small.values())
    before = sum(2 * np.prod(x.shape) for x in whole.values())
    assert size / before < 0.53


def test_every_reason_is_used():
    paths = flatten_dict(abstract_params(DeepGenConfig()), sep="/")
    import re

    for table in (quantized.KEPT, quantized.WEIGHTS_ONLY):
        for pattern, reason in table:
            assert any(re.fullmatch(pattern, path) for path in paths), pattern
            assert reason
