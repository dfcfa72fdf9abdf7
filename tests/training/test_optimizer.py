"""AdamW and Muon as stages use them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.training.optimizer import OptimizerConfig, make_optimizer

CONSTANT = {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "clip_norm": 1e9}


def first_update(name: str, params: dict, gradients: dict) -> dict:
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.1, **CONSTANT), 10)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return updates


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "blocks": {"to_q": {"kernel": random(0, 3, 16, 8), "bias": random(1, 3, 8)}},
    "fc": {"kernel": random(2, 16, 64)},
    "conv": {"kernel": random(3, 3, 3, 4, 8)},
    "text": {"embedding": random(4, 32, 8)},
    "proj_out": {"kernel": random(5, 16, 8)},
}
GRADIENTS = jax.tree.map(lambda x: x**3, PARAMS)


def test_muon_makes_updates_of_linear_layers_orthogonal():
    updates = first_update("muon", PARAMS, GRADIENTS)
    matrices = [*updates["blocks"]["to_q"]["kernel"], updates["fc"]["kernel"]]
    gradients = [*GRADIENTS["blocks"]["to_q"]["kernel"], GRADIENTS["fc"]["kernel"]]
    for update, gradient in zip(matrices, gradients, strict=True):
        singular = np.linalg.svd(update, compute_uv=False)
        # Newton-Schulz iterations bring singular values near one, times the root mean square that is asked for.
        assert np.all(np.abs(singular / (0.1 * 0.2 * max(update.shape) ** 0.5) - 1) < 0.35)
        assert np.sum(update * gradient) < 0


def test_muon_leaves_everything_else_to_adamw():
    ours = first_update("muon", PARAMS, GRADIENTS)
    optimizer = optax.nadamw(0.1, b2=0.95, weight_decay=0.0)
    adamw, _ = optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)
    for module, name in (("conv", "kernel"), ("text", "embedding"), ("proj_out", "kernel")):
        np.testing.assert_allclose(ours[module][name], adamw[module][name], rtol=1e-5)
    np.testing.assert_allclose(ours["blocks"]["to_q"]["bias"], adamw["blocks"]["to_q"]["bias"], rtol=1e-5)


def test_stacked_layers_are_updated_like_single_layers():
    stacked = first_update("muon", PARAMS, GRADIENTS)["blocks"]["to_q"]["kernel"]
    for layer in range(3):
        one = [{"to_q": {"kernel": tree["blocks"]["to_q"]["kernel"][layer]}} for tree in (PARAMS, GRADIENTS)]
        alone = first_update("muon", *one)
        np.testing.assert_allclose(stacked[layer], alone["to_q"]["kernel"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, **CONSTANT | {"weight_decay": 0.5})
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    assert np.all(after["blocks"]["to_q"]["bias"] == PARAMS["blocks"]["to_q"]["bias"])
    for module in ("fc", "conv", "proj_out"):
        np.testing.assert_allclose(after[module]["kernel"], 0.95 * PARAMS[module]["kernel"], rtol=1e-5)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(DeepGenError, match=r"optimizer.name 'sgd' is unknown; choose adamw or muon"):
        make_optimizer(OptimizerConfig(name="sgd"), 10)  # type: ignore[arg-type]


def test_no_clipping_leaves_gradients_as_they_are():
    params, gradients = {"a": {"bias": jnp.zeros(3)}}, {"a": {"bias": jnp.array([3.0, 4.0, 0.0])}}
    free, wide = (
        make_optimizer(OptimizerConfig(learning_rate=0.1, **CONSTANT | {"clip_norm": norm}), 10) for norm in (0, 1e9)
    )
    for (got, _), (expected, _) in [(x.update(gradients, x.init(params), params) for x in (free, wide))]:
        np.testing.assert_array_equal(got["a"]["bias"], expected["a"]["bias"])
        assert float(jnp.abs(got["a"]["bias"]).max()) > 0


@pytest.mark.parametrize(("name", "value"), [("clip_norm", -1.0), ("learning_rate", math.nan), ("beta2", 1.0)])
def test_values_that_cannot_be_are_refused(name, value):
    with pytest.raises(DeepGenError, match=f"optimizer.{name} is {value}"):
        OptimizerConfig(**{name: value})
