"""Layout in memory and on a mesh changes no values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import runs

from deepgen_jax.models.plan import Plan

TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 8)), jnp.float32)


def lowered(function) -> str:
    return jax.jit(function).lower(TOKENS).as_text()


def test_values_and_gradients_stay():
    def loss(x, pin):
        return jnp.sum(jnp.sin(Plan("cudnn").row_major(x) if pin else x))

    np.testing.assert_array_equal(Plan("cudnn").row_major(TOKENS), TOKENS)
    np.testing.assert_array_equal(jax.grad(loss)(TOKENS, True), jax.grad(loss)(TOKENS, False))


@pytest.mark.parametrize(("kernel", "pinned"), [("cudnn", 2), ("splash", 0), ("xla", 0), ("loop", 0)])
def test_tokens_are_row_major_on_gpus_alone_and_in_the_gradient_too(kernel, pinned):
    found = lowered(jax.grad(lambda x: jnp.sum(jnp.sin(Plan(kernel).token_rows(x)))))
    assert found.count("@LayoutConstraint") == pinned


@pytest.mark.parametrize(("kernel", "pinned"), [("splash", 2), ("cudnn", 0), ("xla", 0), ("loop", 0)])
def test_heads_are_row_major_on_tpus_alone(kernel, pinned):
    def loss(x, told):
        heads = x.reshape(4, 6, 2, 4)
        return jnp.sum(jnp.sin(Plan(kernel).head_rows(heads) if told else heads) ** 2)

    assert lowered(jax.grad(lambda x: loss(x, True))).count("@LayoutConstraint") == pinned
    told, untold = (jax.value_and_grad(loss)(TOKENS, way) for way in (True, False))
    np.testing.assert_array_equal(told[0], untold[0])
    np.testing.assert_array_equal(told[1], untold[1])


MESHES = """
import jax, jax.numpy as jnp, numpy as np
from deepgen_jax.models.plan import Plan
from deepgen_jax.parallel.mesh import batch_sharding, make_mesh

for spec in ("data=2,fsdp=1", "data=1,fsdp=2"):
    mesh = make_mesh(spec)
    plan = Plan("cudnn", mesh)
    for samples in (4, 3):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(samples, 6, 8)), jnp.float32)
        placed = x if samples % 2 else jax.device_put(x, batch_sharding(mesh, 3))
        step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(plan.row_major(x)))))
        for actual, wanted in zip(step(placed), jax.value_and_grad(lambda x: jnp.sum(jnp.sin(x)))(x), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-6)
        program = step.lower(placed).compile().as_text()
        assert "all-gather" not in program, (spec, samples)
print("equal")
"""


def test_on_a_mesh_every_device_constrains_its_own_samples():
    assert runs.printed(MESHES, devices=2) == "equal"


TENSOR = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
from deepgen_jax.config import MMDiTConfig
from deepgen_jax.models.mmdit import MMDiT
from deepgen_jax.models.plan import Plan
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import batch_sharding, make_mesh

mesh = make_mesh("data=2,fsdp=2,tensor=2")
plan = Plan("xla", mesh)
for shape, wanted in (((4, 6, 8), "tensor"), ((4, 5, 8), None)):
    split = jax.jit(lambda x: plan.shard_tokens(x))(jnp.ones(shape))
    assert split.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(mesh, PartitionSpec(("data", "fsdp"), wanted)), 3), split.sharding
assert plan.shard_tokens(x := jnp.ones((3, 6, 8))) is x

config = MMDiTConfig(
    num_layers=2, num_heads=4, head_dim=8, joint_attention_dim=24, caption_projection_dim=32,
    pooled_projection_dim=16, dual_attention_layers=(0,), pos_embed_max_size=8, sample_size=16)
rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape, np.float32)
patches, positions = normal(8, 12, 64), np.tile(np.arange(12, dtype=np.int32), (8, 1))
inputs = (patches, positions, 500 + normal(8), normal(8, 16), normal(8, 6, 24))
masks = {"patch_mask": np.ones((8, 12), bool), "context_mask": rng.random((8, 6)) > 0.3}
masks["patch_mask"][::2, 10:] = False
shapes = jax.eval_shape(MMDiT(config).init, jax.random.key(0), *inputs)["params"]
params = jax.tree.map(lambda x: 0.2 * normal(*x.shape), shapes)


def velocity(params, plan, *inputs, **masks):
    return MMDiT(config, plan=plan).apply({"params": params}, *inputs, num_targets=8, **masks)


def both(plan, params, inputs, masks, **layout):
    def loss(params, inputs, masks):
        v = velocity(params, plan, *inputs, **masks)
        return jnp.sum(jnp.sin(v)), v

    (_, v), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), **layout)(params, inputs, masks)
    return [np.asarray(x) for x in jax.tree.leaves((v, gradient))]


where = rules.shardings(params, mesh, "mmdit")
placed = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim)), (inputs, masks))
alone = both(Plan(), params, inputs, masks)
spread = both(plan, jax.device_put(params, where), *placed, out_shardings=(None, where))
for actual, wanted in zip(spread, alone, strict=True):
    np.testing.assert_allclose(actual, wanted, atol=2e-5 * np.abs(wanted).max())
print("equal")
"""


def test_with_a_tensor_axis_tokens_are_split_and_velocities_and_gradients_stay():
    assert runs.printed(TENSOR, devices=8) == "equal"
