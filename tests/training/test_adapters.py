"""Fresh adapters: where they are, what they do at first, and dropout in them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from deepgen_jax.models.layers import Linear, adapter_input
from deepgen_jax.models.plan import Plan
from deepgen_jax.models.qwen_text import DecoderLayer
from deepgen_jax.training.partition import decays, init_lora


@pytest.fixture(scope="module")
def params(pipelines):
    return pipelines("none").params


def test_every_linear_and_the_embedding_of_the_language_model(params):
    adapters = init_lora(params["text"], 4, jax.random.key(0))["text"]
    adapted = {path.rpartition("/")[0] for path, _ in flatten_dict(adapters, sep="/").items()}
    assert adapted == {
        path.rpartition("/")[0]
        for path, _ in flatten_dict(params["text"], sep="/").items()
        if path.rpartition("/")[2] in ("kernel", "embedding")
    }
    weights = flatten_dict(params["text"], sep="/")
    for path in adapted:
        weight = weights.get(f"{path}/kernel", weights.get(f"{path}/embedding"))
        a, b = (flatten_dict(adapters, sep="/")[f"{path}/{side}"] for side in "ab")
        assert (a @ b).shape == weight.shape
        assert not np.any(a @ b)


def test_standard_deviations(params):
    adapters = flatten_dict(init_lora(params["text"], 8, jax.random.key(1))["text"], sep="/")
    a = np.concatenate([np.ravel(x) for path, x in adapters.items() if path.endswith("/a") and "embed" not in path])
    assert a.std() == pytest.approx(1 / 8, rel=0.02)
    np.testing.assert_allclose(a.mean(), 0, atol=0.005)
    assert not np.any(adapters["embed_tokens/a"])
    assert np.std(adapters["embed_tokens/b"]) == pytest.approx(1, rel=0.2)


class Dropped(nn.Module):
    """A layer whose adapter reads its input with half of it dropped."""

    @nn.compact
    def __call__(self, x):
        layer = Linear(3)
        nn.share_scope(self, layer)
        return layer(x, adapter_input(self, x, 0.5))


def test_dropout_is_only_in_the_adapter_and_keeps_the_mean():
    layer, x = Dropped(), jnp.ones((20_000, 4))
    params = layer.init(jax.random.key(0), x)["params"]
    variables = {"params": params, "lora": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 3))}}
    without = layer.apply({"params": params}, x)
    exact = layer.apply(variables, x)
    np.testing.assert_allclose(exact - without, 4.0, rtol=1e-5)
    dropped = layer.apply(variables, x, rngs={"dropout": jax.random.key(1)}) - without
    np.testing.assert_allclose(np.unique(np.round(dropped)), [0, 2, 4, 6, 8])
    assert np.mean(dropped) == pytest.approx(4.0, abs=0.05)
    again = layer.apply(variables, x, rngs={"dropout": jax.random.key(1)}) - without
    np.testing.assert_array_equal(dropped, again)


def test_layers_that_read_the_same_share_a_draw(pipelines):
    config = pipelines("none").config.text
    layer = DecoderLayer(config, jnp.float32, Plan(), 0.05)
    inputs = jnp.ones((1, 3, config.hidden_size)), jnp.ones((1, 3, config.head_dim // 2)), jnp.ones((1, 3), bool)
    params = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    traced = jax.make_jaxpr(lambda params, key: layer.apply(params, *inputs, rngs={"dropout": key}))
    draws = [one for one in traced(params, jax.random.key(0)).eqns if one.params.get("name") == "_bernoulli"]
    # What q, k and v read; o; gate and up; down.
    assert len(draws) == 4


def test_decay_is_for_matrices_only(params):
    flags = flatten_dict(decays({"bridge": params["bridge"], "mmdit": params["mmdit"]}), sep="/")
    weights = flatten_dict({"bridge": params["bridge"], "mmdit": params["mmdit"]}, sep="/")
    shapes = {path: leaf.shape for path, leaf in weights.items()}
    for path, decays_ in flags.items():
        stacked = "/layers/" in path or "/blocks_" in path
        assert decays_ == (len(shapes[path]) - stacked >= 2), path
