"""The policy update: first ratios, gradients part by part, accumulation, finite differences, memory."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny_rl as tiny

from deepgen_jax.rl.objective import KL_KINDS, clipped_surrogate, penalty, step_of
from deepgen_jax.rl.policy import policy_variables, rows_of, velocity
from deepgen_jax.rl.rollout import Trajectory
from deepgen_jax.rl.update import UpdateKeys, draw_images, draw_timesteps, grpo_step, policy_gradients
from deepgen_jax.training.state import init_state

gradients = jax.jit(policy_gradients, static_argnums=(0, 1))
step = jax.jit(grpo_step, static_argnums=(0, 1, 2))
#: New parameters are old ones less the gradient.
DESCENT = optax.sgd(1.0)


@cache
def case(**options):
    return tiny.Case(**options)


@cache
def sampled(sampler="cps", eta=1.0, dtype=jnp.float32):
    return case().rollout(sampler, eta, dtype=dtype)[1]


def found(run, settings, trajectory, trainable=None, timesteps=None, advantages=None):
    images = draw_images(jax.random.key(0), run.images, settings.policy, 0)
    return gradients(
        tiny.MODEL,
        settings,
        run.trainable if trainable is None else trainable,
        run.frozen,
        run.reference,
        trajectory,
        run.condition,
        run.advantages if advantages is None else advantages,
        images,
        jnp.arange(run.steps - 1) if timesteps is None else timesteps,
    )


@pytest.mark.parametrize(
    ("sampler", "eta", "micro_batch", "dtype"),
    [
        ("cps", 1.0, 1, jnp.float32),
        ("cps", 1.0, 4, jnp.float32),
        ("cps", 1.0, 8, jnp.bfloat16),
        ("flow", 0.7, 2, jnp.float32),
        ("dance", 0.5, 8, jnp.float32),
    ],
)
def test_first_ratio_is_one_for_every_sample_and_step(sampler, eta, micro_batch, dtype):
    run = case()
    settings = run.settings(sampler, eta, micro_batch=micro_batch)
    statistics = found(run, settings, sampled(sampler, eta, dtype)).statistics
    assert float(statistics.number) == run.images * (run.steps - 1)
    assert float(statistics.deviation) <= 1e-6
    np.testing.assert_allclose(statistics.metrics()["ratio_mean"], 1, atol=1e-6)


def test_accumulated_gradient_is_that_of_the_whole_objective():
    run, trajectory = case(), sampled()
    settings, moved = run.settings(micro_batch=2, beta=0.3, clip=1e-3), run.moved()
    rows = rows_of(run.condition, jnp.arange(run.images), run.group_size, 1)

    def predict(variables, taken):
        return velocity(tiny.MODEL, variables, run.canvas, taken.sample, taken.levels[0], rows)

    def objective(trainable):
        def loss(i):
            taken = step_of(trajectory, i, jnp.arange(run.images), 1.0)
            v = predict(policy_variables(run.frozen, trainable), taken)
            anchor = predict(policy_variables(run.frozen, run.reference), taken)
            policy = clipped_surrogate("cps", 1e-3, taken, v, run.advantages).loss
            return policy + 0.3 * penalty("velocity", "cps", taken, v, anchor)

        return jnp.mean(jax.lax.map(loss, jnp.array([1, 3])))

    value, expected = jax.jit(jax.value_and_grad(objective))(moved)
    got = found(run, settings, trajectory, moved, jnp.array([1, 3]))
    np.testing.assert_allclose(got.policy + got.kl, value, rtol=1e-4)
    assert 0 < float(got.statistics.metrics()["clip_share"]) < 1
    scale = tiny.norm(expected)
    assert tiny.norm(jax.tree.map(jnp.subtract, got.gradients["grpo"], expected)) < 1e-4 * scale


class Whole:
    """The whole objective of one compiled step, gradient norms of its parts apart."""

    def __init__(self):
        self.run = case()
        self.settings = self.run.settings(micro_batch=4, beta=0.5, sft_weight=0.3, clip=0.5, log_part_norms=True)
        self.micro, keys = tiny.auxiliary()
        self.keys = UpdateKeys(jax.random.key(0), keys)

    def __call__(self, trainable, advantages=None):
        run, advantages = self.run, self.run.advantages if advantages is None else advantages
        state = init_state(DESCENT, trainable["params"], trainable["lora"], False)
        inputs = (run.frozen, run.reference, sampled(), run.condition, advantages, self.micro, self.keys)
        new, metrics = step(tiny.MODEL, DESCENT, self.settings, state, *inputs)
        return metrics, jax.tree.map(jnp.subtract, trainable, new.trainable)


@cache
def whole():
    return Whole()


def test_each_part_has_a_gradient_where_it_should_and_none_where_it_should_not():
    run = case()
    parts = ("policy", "kl", "sft")

    def norms(*inputs):
        metrics, _ = whole()(*inputs)
        return {part: float(metrics[f"grad_norm/{part}"]) for part in parts}, metrics

    away, metrics = norms(run.moved())
    assert min(away.values()) > 1e-3
    assert float(metrics["kl"]) > 0
    at_start, metrics = norms(run.trainable)
    assert at_start["kl"] == 0
    assert at_start["policy"] > 1e-3
    assert float(metrics["first_ratio_deviation"]) <= 1e-6
    unjudged, _ = norms(run.moved(), jnp.zeros_like(run.advantages))
    assert unjudged["policy"] == 0
    assert min(unjudged["kl"], unjudged["sft"]) > 1e-3


def test_finite_differences_of_the_whole_objective():
    run = case()
    moved = run.moved()
    metrics, gradient = whole()(moved)
    size = tiny.norm(gradient)
    np.testing.assert_allclose(size, metrics["grad_norm"], rtol=1e-3)
    step = 0.02
    ends = [jax.tree.map(lambda p, g, s=s: p + s * step / size * g, moved, gradient) for s in (-1, 1)]
    low, high = (float(whole()(end)[0]["loss"]) for end in ends)
    np.testing.assert_allclose((high - low) / (2 * step), size, rtol=1e-2)
    expected = 0.7 * (metrics["loss/policy"] + metrics["loss/kl"]) + 0.3 * metrics["loss/sft"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_adapters_alone_need_no_second_copy():
    run = case(lora=True)
    assert run.reference is None
    settings = run.settings(beta=0.5, micro_batch=4)
    trajectory = run.rollout()[1]
    start = found(run, settings, trajectory)
    assert float(start.kl) < 1e-12
    assert float(start.statistics.deviation) <= 1e-6
    moved = found(run, settings, trajectory, run.moved())
    assert float(moved.kl) > 0
    assert set(moved.gradients["grpo"]) == {"params", "lora"}
    assert moved.gradients["grpo"]["params"] == {}
    assert tiny.norm(moved.gradients["grpo"]["lora"]) > 0


def test_adapters_that_go_on_are_the_reference_as_they_began():
    run = tiny.Case(lora=True)
    run.trainable = run.reference = run.moved()
    settings = run.settings(beta=0.5, micro_batch=4)
    trajectory = run.rollout()[1]
    assert float(found(run, settings, trajectory).kl) < 1e-12
    assert float(found(run, settings, trajectory, run.moved()).kl) > 0


@pytest.mark.parametrize("kind", KL_KINDS)
def test_penalties_by_kind(kind):
    taken = step_of(sampled("flow", 0.7), jnp.int32(2), jnp.arange(4), 0.7)
    v, anchor = np.random.default_rng(0).standard_normal((2, *taken.sample.shape)).astype(np.float32)
    s, following, *_ = map(float, taken.levels)
    diffusion, dt = 0.7 * np.sqrt(s / (1 - s)), following - s
    square = np.mean((v - anchor) ** 2)
    added = diffusion**2 * -dt
    gain = dt * (1 + 0.7**2 / 2)
    expected = {
        "velocity": square,
        "velocity_scaled": square / (2 * diffusion**2 + 1e-7),
        "latent": square * gain**2 / (2 * added + 1e-7),
    }
    np.testing.assert_allclose(penalty(kind, "flow", taken, v, anchor), expected[kind], rtol=1e-4)


def test_timesteps_are_drawn_without_replacement_from_all_but_the_last():
    drawn = np.stack([draw_timesteps(jax.random.key(i), 50, 0.6) for i in range(40)])
    assert drawn.shape == (40, 30)
    assert (np.diff(drawn, axis=1) > 0).all()
    assert set(drawn.ravel()) == set(range(49))
    np.testing.assert_array_equal(draw_timesteps(jax.random.key(0), 4, 1.0), [0, 1, 2])
    assert draw_timesteps(jax.random.key(0), 4, 0.01).shape == (1,)


def test_updates_of_a_rollout_learn_from_disjoint_random_parts():
    policy = case().settings(updates_per_rollout=3, micro_batch=4).policy
    parts = [draw_images(jax.random.key(1), 24, policy, part) for part in range(3)]
    assert {part.shape for part in parts} == {(2, 4)}
    assert sorted(np.ravel(parts)) == list(range(24))
    assert not np.array_equal(np.ravel(parts), np.arange(24))


def test_memory_of_the_update_does_not_grow_with_groups_or_steps():
    run = case()
    settings = run.settings(micro_batch=4, beta=0.5, timestep_fraction=0.6)
    tree = (run.trainable, run.frozen, run.reference)

    def memory(group_size, steps):
        sized = tiny.Case(group_size=group_size)
        images = sized.images
        trajectory = Trajectory(
            jax.ShapeDtypeStruct((steps + 1, images, tiny.TOKENS, tiny.WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((steps, images), jnp.float32),
            jax.ShapeDtypeStruct((steps + 1,), jnp.float32),
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images)),
        )
        micro = draw_images(jax.random.key(0), images, settings.policy, 0)
        timesteps = draw_timesteps(jax.random.key(0), steps, settings.policy.timestep_fraction)
        rest = (run.condition, jax.ShapeDtypeStruct((images,), jnp.float32), micro, timesteps)
        analysis = gradients.lower(tiny.MODEL, settings, *tree, trajectory, *rest).compile().memory_analysis()
        stored = sum(x.size * 4 for x in trajectory[:2])
        return analysis.temp_size_in_bytes, analysis.argument_size_in_bytes - stored

    small = memory(4, 10)
    for temporary, arguments in (memory(16, 10), memory(4, 50)):
        assert temporary <= small[0] * 1.01
        # Besides the trajectory: a key, an advantage and an index for each image, an index for each step.
        assert arguments - small[1] < 1024
