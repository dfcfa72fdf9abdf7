"""Layers in one loop give what layers one after another give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from deepgen_jax.models.layers import LORA, Linear
from deepgen_jax.models.stack import scanned_groups

GROUPS, SIZE, WIDTH = 2, 3, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, WIDTH)), jnp.float32)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, shift):
        x = jnp.tanh(Linear(WIDTH, name="linear")(x) + shift)
        return x, x


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x, shift):
        return scanned_groups(Layer, GROUPS, SIZE, 1, init=self.is_initializing())(name="groups")(x, shift)


def in_turn(variables, x, shift):
    """Every layer with its own part of the parameters and adapters."""
    seen = []
    for group in range(GROUPS):
        for layer in range(SIZE):
            grouped = {kind: tree["groups"] for kind, tree in variables.items()}
            own = jax.tree.map(lambda p, at=(group, layer): p[at], grouped)
            x, _ = Layer().apply(own, x, shift)
            seen.append(x)
    return x, jnp.stack(seen)


def variables():
    params = Stack().init(jax.random.key(0), X, 0.1)["params"]
    a = 0.1 * jax.random.normal(jax.random.key(1), (GROUPS, SIZE, WIDTH, 2))
    b = 0.1 * jax.random.normal(jax.random.key(2), (GROUPS, SIZE, 2, WIDTH))
    return {"params": params, LORA: {"groups": {"linear": {"a": a, "b": b}}}}


def test_parameters_are_stacked_by_group_and_place():
    kernel = variables()["params"]["groups"]["linear"]["kernel"]
    assert kernel.shape == (GROUPS, SIZE, WIDTH, WIDTH)
    assert len(np.unique(np.asarray(kernel).reshape(GROUPS * SIZE, -1), axis=0)) == GROUPS * SIZE


def test_values_and_gradients_are_those_of_layers_in_turn():
    def total(run):
        def loss(given):
            x, seen = run(given)
            return jnp.sum(x) + jnp.sum(jnp.sin(seen[SIZE - 1 :: SIZE])), (x, seen)

        return jax.value_and_grad(loss, has_aux=True)(variables())

    (_, actual), gradient = total(lambda given: Stack().apply(given, X, 0.1))
    (_, wanted), expected = total(lambda given: in_turn(given, X, 0.1))
    for one, other in zip(jax.tree.leaves((actual, gradient)), jax.tree.leaves((wanted, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
