"""Programs get the options of the devices they run on."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from deepgen_jax.aot.topology import parse_topology
from deepgen_jax.parallel.jit_options import compiler_options, device_jit


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        ("TPU v6 lite", "v6e:8x8"), ("TPU v6e", "v6e:8x8"), ("TPU v5 lite", "v5e:4x4"), ("TPU v5e", "v5e:16x16"),
        ("TPU v5", "v5p:4x4x4"), ("TPU v5p", "v5p:2x2x1"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_compiles_with_what_was_estimated(kind, topology, ahead):
    assert compiler_options(kind, ahead) == parse_topology(topology).compiler_options(ahead)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_gpus_get_options_valid_without_the_device(kind):
    usual, ahead = (compiler_options(kind, latency_hiding) for latency_hiding in (False, True))
    assert usual
    assert usual.items() < ahead.items() < parse_topology("h100:8").compiler_options(latency_hiding=True).items()


@pytest.mark.parametrize("kind", ["cpu", "TPU v4", "NVIDIA A100-SXM4-80GB"])
def test_other_devices_keep_the_defaults(kind):
    assert compiler_options(kind, latency_hiding=True) is None


def test_gradients_on_cpus_leave_sums_of_products_to_xla():
    """The compiler of jax 0.10 fuses them into calls of YNNPACK, which later ones do not."""
    options = compiler_options("cpu", False, gradients=True)
    assert (options is None) == (jax.__version_info__ >= (0, 11))
    summed = device_jit(lambda x, y: jnp.sum(x * y, axis=0), gradients=True)
    x = jnp.ones((64, 32))
    assert "ynn_fusion" not in summed.lower(x, x).compile().as_text()
    assert compiler_options("TPU v6e", True, gradients=True) == compiler_options("TPU v6e", True)
    assert compiler_options("NVIDIA H100 80GB HBM3", True, gradients=True) == compiler_options("NVIDIA H100", True)


def test_options_of_the_device_reach_the_compiler(monkeypatch):
    options = "deepgen_jax.parallel.jit_options.compiler_options"
    monkeypatch.setattr(options, lambda kind, latency_hiding, gradients: {"xla_no_such_option": kind})

    @partial(device_jit, static_argnames="power")
    def raised(x: jax.Array, power: int) -> jax.Array:
        """A power."""
        return x**power

    assert raised.__doc__ == "A power."
    assert "stablehlo" in raised.lower(jnp.ones(2), power=2).as_text()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        raised(jnp.ones(2), power=2)


def test_it_is_jit():
    traced = []

    @device_jit
    def double(x: jax.Array) -> jax.Array:
        traced.append(x)
        return 2 * x

    assert float(double(jnp.float32(2))) == 4.0
    assert float(double(jnp.float32(3))) == 6.0
    assert len(traced) == 1
