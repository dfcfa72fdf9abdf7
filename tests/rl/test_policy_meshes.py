"""Rollouts and updates give the same numbers on any mesh of eight devices as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
#: Run in its own process, because the number of devices is fixed when JAX starts.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
from support import tiny_rl as tiny
from deepgen_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from deepgen_jax.parallel.rules import shardings
from deepgen_jax.rl.update import draw_images, policy_gradients

spec, out = sys.argv[2:]
mesh = make_mesh(spec) if spec else None
case = tiny.Case(prompts=4, mesh=mesh)
if mesh:
    case.frozen = jax.device_put(case.frozen, shardings(case.frozen, mesh))
    case.trainable["params"] = jax.device_put(case.trainable["params"], shardings(case.trainable["params"], mesh))
    case.reference = case.trainable
    case.condition = jax.device_put(case.condition, replicated(mesh))
images, trajectory = case.rollout()
if mesh:
    assert trajectory.latents.sharding.is_equivalent_to(batch_sharding(mesh, 4, axis=1), 4), trajectory.latents.sharding
settings = case.settings(micro_batch=8, beta=0.1)
micro = draw_images(jax.random.key(0), case.images, settings.policy, 0)
step = jax.jit(policy_gradients, static_argnums=(0, 1))
found = step(tiny.MODEL, settings, case.trainable, case.frozen, case.reference, trajectory, case.condition,
             case.advantages, micro, jnp.arange(case.steps - 1))
leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(found.gradients))}
np.savez(out, images=images, log_probs=trajectory.log_probs, deviation=found.statistics.deviation, **leaves)
"""


def run(spec, folder):
    out = folder / f"{spec or 'one'}.npz"
    flags = "--xla_force_host_platform_device_count=8" if spec else ""
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(TESTS), spec, str(out)],
        check=True,
        timeout=900,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=TESTS.parent,
    )
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run("", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("spec", ["data=2,fsdp=4", "data=2,fsdp=2,tensor=2"])
def test_any_mesh(spec, alone, tmp_path):
    sharded = run(spec, tmp_path)
    assert sharded.keys() == alone.keys()
    assert float(sharded["deviation"]) <= 1e-6
    for name, expected in alone.items():
        np.testing.assert_allclose(sharded[name], expected, rtol=0, atol=1e-5, err_msg=name)
