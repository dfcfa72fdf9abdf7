"""Unstacked layers compute the same bits, take the same place in memory, and can be stacked again."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.models.block_cache import empty_cache
from deepgen_jax.models.bridge import ConnectorLayer
from deepgen_jax.models.deepgen import DeepGen, abstract_params
from deepgen_jax.models.mmdit_block import MMDiTBlock
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.qwen_text import DecoderLayer
from deepgen_jax.models.stack import Remat, rematerialised, restack, unrolls, unstack
from deepgen_jax.nano.model import nano_config
from deepgen_jax.parallel.rules import matching_rules


def random_params(config, dtype):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.05, x.shape), dtype), abstract_params(config))


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def test_stacks_are_split_and_joined_again():
    config = nano_config()
    params = random_params(config, jnp.float32)
    layers = unstack(copied(params))
    flat = flatten_dict(layers, sep="/")
    # Every layer has arrays under its own name, and nothing else has changed.
    config_layers = config.mmdit.num_layers, config.text.num_layers - 1, config.bridge.num_layers
    for part, count in zip(("mmdit", "text", "bridge"), config_layers, strict=True):
        names = {path.rpartition("/layer_")[0] + path.rpartition("/layer_")[2].partition("/")[0]
                 for path in flat if path.startswith(part) and "/layer_" in path}  # fmt: skip
        assert len(names) == count
    assert jax.tree.all(jax.tree.map(np.array_equal, layers["vae"], params["vae"]))
    again = restack(layers, config.bridge.selection_stride)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    on_host = restack(jax.device_get(layers), config.bridge.selection_stride)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    assert jax.tree.all(jax.tree.map(np.array_equal, on_host, params))
    assert restack(params, 1).keys() == params.keys()


def test_stacks_are_donated():
    params = random_params(nano_config(), jnp.float32)
    unstack(params)
    for path, leaf in flatten_dict(params, sep="/").items():
        stack = "/blocks_" in path or "layers/" in path or "layer_groups" in path
        assert leaf.is_deleted() == (stack and not path.startswith(("vision", "vae"))), path


def test_shapes_are_split_like_arrays():
    config = nano_config()
    shapes = flatten_dict(unstack(abstract_params(config)), sep="/")
    arrays = flatten_dict(unstack(random_params(config, jnp.float32)), sep="/")
    assert {path: leaf.shape for path, leaf in shapes.items()} == {path: leaf.shape for path, leaf in arrays.items()}


def test_every_layer_of_the_full_model_has_a_sharding_rule():
    for path in flatten_dict(unstack(abstract_params(DeepGenConfig())), sep="/"):
        assert len(matching_rules(path)) == 1, path


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 0.0), (jnp.bfloat16, 0.01)])
def test_the_same_condition_and_velocity(dtype, tolerance):
    """Bit for bit in float32. In bfloat16 the compiler keeps more bits between layers of one program."""
    config = nano_config()
    model = DeepGen(config, dtype=dtype)
    params = random_params(config, dtype)
    layers = unstack(copied(params))
    rng = np.random.default_rng(1)
    length = 8 + config.bridge.num_queries
    ids = jnp.asarray(rng.integers(5, 50, (2, 8)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (3, 2, length))
    real = jnp.ones((2, length), bool)

    @jax.jit
    def condition(params):
        return model.apply({"params": params}, ids, positions, real, real, method="condition")

    width = config.mmdit.patch_size**2 * config.mmdit.in_channels
    patches = jnp.asarray(rng.standard_normal((2, 16, width)), jnp.float32)
    places = jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1))

    @jax.jit
    def velocity(params, pooled, sequence, cache):
        args = (patches, places, jnp.float32([500, 500]), pooled, sequence, None, real, None, cache)
        return model.apply({"params": params}, *args, method="velocity")

    def close(one, other):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.abs(one - other).max() <= tolerance * np.abs(one).max()
        assert np.abs(one).max() > 0

    found = condition(params)
    for one, other in zip(found, condition(layers), strict=True):
        close(one, other)
    close(velocity(params, *found, None), velocity(layers, *found, None))
    cache = empty_cache(2, 16, config.mmdit.hidden_size, dtype, threshold=0.1, extrapolate=False)
    (one, used), (other, used_too) = (velocity(tree, *found, cache) for tree in (params, layers))
    close(one, other)
    # The second evaluation of the same input skips all layers but the first.
    (again, _), (again_too, after) = (velocity(tree, *found, used) for tree in (params, layers))
    close(again, again_too)
    assert (int(used_too.full), int(after.full), int(after.evaluations)) == (1, 1, 2)


def test_a_cpu_keeps_its_stacks():
    assert not unrolls(jax.make_mesh((1,), ("data",)))


def _programs(value):
    """Programs within a parameter of an operation."""
    for one in value if isinstance(value, list | tuple) else [value]:
        inner = getattr(one, "jaxpr", one)
        if hasattr(inner, "eqns"):
            yield inner


def _products(jaxpr):
    """Number of products without batch dimensions, those with weights, in a program and the programs in it."""
    own = sum(one.primitive.name == "dot_general" and not one.params["dimension_numbers"][1][0] for one in jaxpr.eqns)
    return own + sum(_products(x) for one in jaxpr.eqns for value in one.params.values() for x in _programs(value))


_TOKENS = jnp.ones((1, 8), bool)
_LAYERS = {
    "text": lambda config: (
        DecoderLayer(config.text, jnp.float32, Plan(), 0.0), config.text.hidden_size,
        (jnp.ones((1, 8, config.text.head_dim // 2)), _TOKENS),
    ),
    "bridge": lambda config: (
        ConnectorLayer(config.bridge, jnp.float32, Plan()), config.bridge.hidden_size, (_TOKENS,),
    ),
    "mmdit": lambda config: (
        MMDiTBlock(config.mmdit, False, False, 8, jnp.float32, Plan()), config.mmdit.hidden_size,
        (jnp.ones((1, config.mmdit.hidden_size)), {}, {}),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("part", "inner"), [("text", 2), ("bridge", 1), ("mmdit", 2)])
def test_what_rematerialisation_computes_again(part, inner):
    """"mlp" spares the inner products of feed-forward layers, and "dots" all; gradients are the same."""
    layer, width, inputs = _LAYERS[part](nano_config())
    x = jax.random.normal(jax.random.key(0), (1, 8, width))
    carry = (x, jnp.cos(x)) if part == "mmdit" else x
    params = layer.init(jax.random.key(1), carry, *inputs)

    def gradient(remat):
        def turn(layer, carry, inputs):
            return layer(carry, *inputs)[0]

        def loss(params, carry):
            apply = nn.apply(lambda layer: rematerialised(turn, remat)(layer, carry, inputs), layer)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(apply(params)))

        return jax.grad(loss, argnums=(0, 1))

    counts = {remat: _products(jax.make_jaxpr(gradient(remat))(params, carry).jaxpr) for remat in get_args(Remat)}
    assert counts["full"] == counts["flash"]  # off TPUs
    assert counts["full"] - counts["mlp"] == inner
    assert counts["mlp"] > counts["dots"] == counts["none"]
    plain = jax.jit(gradient("none"))(params, carry)
    for remat in ("full", "mlp", "dots"):
        found = jax.jit(gradient(remat))(params, carry)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, plain)
