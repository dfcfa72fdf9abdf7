"""8-bit kernels: rounding within half a step, layers that compute with them, a table that covers every parameter."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deepgen_jax.aot.estimate import hlo
from deepgen_jax.config import DeepGenConfig, QuantizationConfig, from_dict, to_dict
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.abstract import abstract_weights
from deepgen_jax.models import quantized
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.models.layers import Embedding, Linear
from deepgen_jax.models.mmdit import MMDiT
from deepgen_jax.models.packing import pack_kernels
from deepgen_jax.models.patches import sincos_table
from deepgen_jax.nano.model import nano_config
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


def test_the_full_model_takes_6_8_gigabytes():
    """As a folder: the VAE and what is kept in bfloat16, scales in float32."""
    shapes = flatten_dict(quantized.quantize_tree(abstract_params(DeepGenConfig()), "int8", False), sep="/")
    scales = (quantized.WEIGHT_SCALE, quantized.PRODUCT_SCALE)
    size = sum(
        np.prod(leaf.shape, dtype=np.int64) * (1 if leaf.dtype == np.int8 else 4 if path.endswith(scales) else 2)
        for path, leaf in shapes.items()
    )
    assert size < 6.8e9


class Positions(MMDiT):
    """What the MMDiT reads of its table of positions."""

    @nn.compact
    def __call__(self, position_ids):
        return self._positions()(position_ids)


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_positions_are_close(to):
    """The table is read with its scales: rounding is three times that of bfloat16, 1/400 of the values."""
    config = nano_config().mmdit
    exact = np.asarray(sincos_table(config.pos_embed_max_size, config.sample_size // 2, config.hidden_size))
    values, scale = quantized.quantize("mmdit/pos_embed", exact, to)
    assert values.dtype == np.int8
    ids = jnp.arange(len(exact)).reshape(2, -1)
    params = {"pos_embed": values, quantized.WEIGHT_SCALE: scale}
    found = Positions(config).apply({"params": params}, ids).reshape(exact.shape)
    errors = [float(np.sqrt(np.mean((x - exact) ** 2))) for x in (found, exact.astype(jnp.bfloat16).astype(np.float32))]
    assert np.abs(found - exact).max() <= 0.5 / 127 + 1e-6
    assert errors[0] < 3.5 * errors[1]
    assert errors[0] < np.sqrt(np.mean(exact**2)) / 390


def test_every_reason_is_used():
    paths = flatten_dict(abstract_params(DeepGenConfig()), sep="/")
    for table in (quantized.KEPT, quantized.WEIGHTS_ONLY):
        for pattern, reason in table:
            assert any(re.fullmatch(pattern, path) for path in paths), pattern
            assert reason


def operand_types(text):
    """Element types of the operands of each matrix product of an optimised program, pairs sorted."""
    found = []
    for computation in hlo.parse(text).computations.values():
        types = {each.name: [array.dtype for array in each.results] for each in computation.instructions}
        for each in computation.instructions:
            library = (each.attribute(r'custom_call_target="([^"]*)"') or "").startswith("__cublas")
            if each.opcode in ("dot", "convolution") or library:
                # A GPU library's product of fp8 has scales as further operands.
                found.append(tuple(sorted(types[name][0] for name in each.operands[:2])))
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program of a CPU")
def test_products_are_of_8_bit_integers():
    def operands(name):
        layer = {"params": {"kernel": jnp.ones((64, 32), jnp.int8), name: jnp.ones(32)}}
        apply = jax.jit(Linear(32, use_bias=False, dtype=jnp.bfloat16).apply)
        return operand_types(apply.lower(layer, jnp.ones((8, 64), jnp.bfloat16)).compile().as_text())

    assert operands(quantized.PRODUCT_SCALE) == [("s8", "s8")]
    assert operands(quantized.WEIGHT_SCALE) != [("s8", "s8")]


DEVICE_PROGRAM = """
from deepgen_jax.aot.topology import describe, parse_topology, prepare

topology = parse_topology(TOPOLOGY)
prepare(topology)
import jax
import jax.numpy as jnp
from deepgen_jax.models.layers import Linear

place = jax.sharding.SingleDeviceSharding(describe(topology)[0])


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


layer = {"kernel": array(512, 256, dtype=jnp.DTYPE), NAME: array(256, dtype=jnp.float32)}
apply = jax.jit(Linear(256, use_bias=False, dtype=jnp.bfloat16).apply)
lowered = apply.lower({"params": layer}, array(1024, 512, dtype=jnp.bfloat16))
print(lowered.compile(compiler_options=topology.compiler_options(False)).as_text())
"""


def device_operand_types(topology, name, dtype):
    """Operands of the product of a layer that is compiled for an absent device."""
    program = DEVICE_PROGRAM.replace("NAME", repr(name)).replace("DTYPE", dtype).replace("TOPOLOGY", repr(topology))
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=300, capture_output=True, text=True)
    return operand_types(done.stdout)


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("name", "types"), [(quantized.PRODUCT_SCALE, ("s8", "s8")), (quantized.WEIGHT_SCALE, ("bf16", "s8"))]
)
def test_a_tpu_multiplies_8_bit_integers(name, types):
    """The TPU's compiler hands 8-bit operands to the matrix unit; weights alone are never widened in memory."""
    assert device_operand_types("v6e:2x2", name, "int8") == [types]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax[cuda12]")
@pytest.mark.parametrize(
    ("dtype", "name", "types"),
    [
        ("int8", quantized.PRODUCT_SCALE, ("s8", "s8")),
        ("float8_e4m3fn", quantized.PRODUCT_SCALE, ("f8e4m3fn", "f8e4m3fn")),
        ("int8", quantized.WEIGHT_SCALE, ("bf16", "bf16")),
        ("float8_e4m3fn", quantized.WEIGHT_SCALE, ("bf16", "bf16")),
    ],
)
def test_a_gpu_multiplies_in_8_bits(dtype, name, types):
    """cuBLAS gets 8-bit operands, int8 and fp8 alike; weights alone are widened first."""
    assert device_operand_types("h100:1", name, dtype) == [types]


def test_8_bit_kernels_are_not_packed():
    kernels = {"int8": jnp.ones((2, 2), jnp.int8), "fp8": jnp.ones((2, 2), jnp.float8_e4m3fn)}
    packed = pack_kernels({"mmdit": {name: {"kernel": value} for name, value in kernels.items()}})
    for name, value in kernels.items():
        assert packed["mmdit"][name]["kernel"] is value


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_shapes_of_a_quantised_model_keep_their_dtypes(to):
    config = dataclasses.replace(nano_config(), quantization=QuantizationConfig(to, products=True))
    whole, shapes = abstract_params(nano_config()), abstract_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {np.dtype(np.float32)}
    assert shapes == quantized.quantize_tree(whole, to, products=True)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    held = flatten_dict(abstract_weights(config, mesh, jnp.bfloat16), sep="/")
    for path, leaf in flatten_dict(shapes, sep="/").items():
        if quantized.keeps_dtype(path, leaf.dtype):
            assert held[path].dtype == leaf.dtype, path
        else:
            assert held[path].dtype == (jnp.float32 if path.startswith("vae/") else jnp.bfloat16), path
    assert sum(leaf.dtype == quantized.FORMATS[to].dtype for leaf in held.values()) > 20


def test_values_too_small_for_a_scale_are_zero():
    for largest in (1e-45, 190 * 1.4e-45, 1e-37):
        values, scale = quantized.quantize("x/kernel", np.float32([[largest], [-largest]]), "int8")
        assert not values.any()
        np.testing.assert_array_equal(scale, 1)
    tiny = jnp.full((1, 2), 1e-38, jnp.float32)
    kernel = {"params": {"kernel": jnp.ones((2, 2), jnp.int8), quantized.PRODUCT_SCALE: jnp.ones(2)}}
    assert jnp.isfinite(Linear(2, use_bias=False).apply(kernel, tiny)).all()


def test_not_finite_weights_are_refused():
    for bad in (np.nan, np.inf):
        with pytest.raises(DeepGenError, match="NaN or infinite weights in x/kernel"):
            quantized.quantize("x/kernel", np.array([[1, bad]], np.float32), "int8")


@pytest.mark.parametrize("path", ["x/kernel", "x/embedding"])
def test_dequantize_is_the_inverse(path):
    value = np.random.default_rng(0).standard_normal((3, 6, 4)).astype(np.float32)
    values, scale = quantized.quantize(path, value, "int8")
    back = quantized.dequantize(path, values, scale)
    assert 0 < np.abs(back - value).max() < 0.05
    np.testing.assert_array_equal(quantized.quantize(path, back, "int8")[0], values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization": {"weights": "int4", "products": False}}, "weights is 'int4'; it must be int8 or fp8"),
        ({"quantization": "int8"}, "QuantizationConfig is 'int8', expected a JSON object"),
        ({"quantization": {"weights": "int8", "products": 1}}, "products is 1, expected bool"),
        (
            {"quantization": {"weights": "int8", "products": False}, "lora": {"rank": 4, "alpha": 8.0}},
            "lora and quantization are both set",
        ),
    ],
)
def test_wrong_configurations(values, message):
    with pytest.raises(DeepGenError, match=message):
        from_dict(DeepGenConfig, to_dict(DeepGenConfig()) | values)


def test_earlier_configurations_are_not_quantised():
    values = to_dict(DeepGenConfig())
    del values["quantization"]
    assert from_dict(DeepGenConfig, values).quantization is None


def test_the_page_lists_every_reason():
    page = (Path(__file__).parents[2] / "docs/quantize.md").read_text(encoding="utf-8")
    for table in (quantized.KEPT, quantized.WEIGHTS_ONLY):
        rows = ["| `{}` | {} |".format(pattern.replace("|", "\\|"), reason) for pattern, reason in table]
        assert "\n".join(rows) in page
    assert len(page.encode()) <= 4000
