"""Pinning the layout of tokens changes where numbers lie, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.models.layout import head_rows, laid_out_in_rows, token_rows

TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 8)), jnp.float32)


def lowered(function) -> str:
    return jax.jit(function).lower(TOKENS).as_text()


def test_values_and_gradients_stay():
    def loss(x, pin):
        return jnp.sum(jnp.sin(laid_out_in_rows(x, "cudnn") if pin else x))

    np.testing.assert_array_equal(laid_out_in_rows(TOKENS, "cudnn"), TOKENS)
    np.testing.assert_array_equal(jax.grad(loss)(TOKENS, True), jax.grad(loss)(TOKENS, False))


@pytest.mark.parametrize(("implementation", "pinned"), [("cudnn", 2), ("splash", 0), ("xla", 0), ("loop", 0)])
def test_only_gpus_are_told_and_the_gradient_is_pinned_too(implementation, pinned):
    found = lowered(jax.grad(lambda x: jnp.sum(jnp.sin(token_rows(x, implementation)))))
    assert found.count("@LayoutConstraint") == pinned


@pytest.mark.parametrize(("implementation", "pinned"), [("splash", 2), ("cudnn", 0), ("xla", 0), ("loop", 0)])
def test_only_tpus_are_told_how_heads_lie(implementation, pinned):
    def loss(x, told):
        heads = x.reshape(4, 6, 2, 4)
        return jnp.sum(jnp.sin(head_rows(heads, implementation) if told else heads) ** 2)

    assert lowered(jax.grad(lambda x: loss(x, True))).count("@LayoutConstraint") == pinned
    told, untold = (jax.value_and_grad(loss)(TOKENS, way) for way in (True, False))
    np.testing.assert_array_equal(told[0], untold[0])
    np.testing.assert_array_equal(told[1], untold[1])


MESHES = """
import jax, jax.numpy as jnp, numpy as np
from deepgen_jax.models.attention import Kernel
from deepgen_jax.models.layout import laid_out_in_rows
from deepgen_jax.parallel.mesh import batch_sharding, make_mesh

for spec in ("data=2,fsdp=1", "data=1,fsdp=2"):
    mesh = make_mesh(spec)
    kernel = Kernel("cudnn", mesh)
    for samples in (4, 3):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(samples, 6, 8)), jnp.float32)
        placed = x if samples % 2 else jax.device_put(x, batch_sharding(mesh, 3))
        step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(laid_out_in_rows(x, kernel)))))
        for actual, wanted in zip(step(placed), jax.value_and_grad(lambda x: jnp.sum(jnp.sin(x)))(x), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-6)
        program = step.lower(placed).compile().as_text()
        assert "all-gather" not in program, (spec, samples)
print("equal")
"""


def test_on_a_mesh_every_device_pins_its_own_samples():
    done = subprocess.run(
        [sys.executable, "-c", MESHES], timeout=300, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr
