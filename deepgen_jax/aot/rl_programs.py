"""Rollout and update of reinforcement learning as :class:`Program`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.aot.abstract import (
    Program,
    Subject,
    array,
    condition_of,
    image_tokens,
    key_type,
    lora_of,
    placed,
    prompt_length,
    state_memory,
    step_batch,
    weights_of,
    with_batch,
)
from deepgen_jax.config import SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import flops
from deepgen_jax.models.attention import implementation_of
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel import rules
from deepgen_jax.rl.algorithms import ALGORITHMS
from deepgen_jax.rl.policy import policy_variables
from deepgen_jax.rl.programs import (
    canvas_of,
    guidance_scale,
    jit_update,
    learning_passes,
    policy_model,
    rollout_settings,
    run_optimizer,
)
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.rl.rollout import Trajectory, rollout
from deepgen_jax.rl.update import UpdateKeys, learned_steps
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.stage import check_micro_batch
from deepgen_jax.training.state import TrainState, abstract_state


class _Parts(NamedTuple):
    """What rollout and update share; trees of shapes.

    Attributes:
      frozen: of the parts that the two run.
      resident: all that lies on the devices with the optimiser's state, in every program of a step.
    """

    config: GRPOConfig
    model: DeepGen
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Tree
    reference: Tree | None
    resident: dict[str, Any]


def _parts(subject: Subject, batch: int | None) -> _Parts:
    config = subject.config if batch is None else with_batch(subject.config, batch)
    assert isinstance(config, GRPOConfig)
    trainable, frozen = weights_of(subject)
    optimizer = run_optimizer(config)
    algorithm = ALGORITHMS[config.policy.algorithm]
    state = abstract_state(
        optimizer, trainable, subject.mesh, ema=config.ema_decay is not None or algorithm.old_policy
    )
    reference = None
    if config.policy.beta and trainable["params"]:
        reference = {"params": placed(trainable["params"], subject.mesh, jnp.dtype(config.dtype)), "lora": {}}
    resident = {**state_memory(state), "frozen weights": (frozen, reference)}
    used = {part: tree for part, tree in frozen.items() if part not in ("vae", "vision")}
    model = policy_model(config, subject.model, subject.mesh)
    return _Parts(config, model, optimizer, state, used, reference, resident)


def rollout_program(subject: Subject, batch: int | None) -> Program:
    """One micro-batch of a rollout; ``batch`` is the micro-batch."""
    mesh = subject.mesh
    config, model, _, state, frozen, _, resident = _parts(subject, None)
    size, group = batch or config.rollout.micro_batch, config.rollout.group_size
    check_micro_batch("rollout.micro_batch", size, mesh)
    if size % group:
        raise DeepGenError(f"--batch {size} does not divide into groups of {group} images")
    canvas, scale = canvas_of(config, subject.model, mesh), guidance_scale(config)
    settings = rollout_settings(config, canvas)
    lora = lora_of(config)
    policy = state.ema if ALGORITHMS[config.policy.algorithm].old_policy else state.trainable
    variables = jax.eval_shape(lambda f, p: policy_variables(f, p, lora.scale if lora else 0.0), frozen, policy)
    variables = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), variables, {
        name: rules.shardings(tree, mesh) for name, tree in variables.items()
    })
    sides, tokens = (1 if scale is None else 2), image_tokens(subject.model, config.rollout.size)
    length, width = prompt_length(subject), subject.model.mmdit.in_channels * subject.model.mmdit.patch_size**2
    condition = condition_of(subject, size // group * sides, model.dtype, length, None)
    noise = array(mesh, size, tokens, width, axis=0)
    sigmas, keys = array(mesh, config.rollout.steps + 1), array(mesh, size, dtype=key_type())
    operations = size * sides * config.rollout.steps * flops.mmdit(subject.model.mmdit, tokens, length)
    arguments = (model, settings, variables, noise, condition, sigmas, config.rollout.eta, keys, scale)
    return Program(
        "rollout",
        "images",
        size,
        size,
        lambda: rollout.lower(*arguments),
        (variables, noise, condition, sigmas, keys),
        {**resident, "batch": (noise, condition, sigmas, keys)},
        float(operations),
        (
            f"{size} images of {config.rollout.size}x{config.rollout.size}, {config.rollout.steps} steps of "
            f"{config.rollout.sampler}, guidance {scale or 'none'}, sequence {length}",
            f"attention {implementation_of(model.attention)}",
        ),
        False,
    )


def update_program(subject: Subject, batch: int | None) -> Program:
    """One optimiser update from a whole rollout."""
    mesh = subject.mesh
    config, model, optimizer, state, frozen, reference, resident = _parts(subject, batch)
    check_micro_batch("policy.micro_batch", config.policy.micro_batch, mesh)
    if not ALGORITHMS[config.policy.algorithm].trajectory:
        raise DeepGenError("policy.algorithm=nft has no trajectories, and its update is not compiled here; choose grpo")
    canvas, scale, lora = canvas_of(config, subject.model, mesh), guidance_scale(config), lora_of(config)
    sides, tokens = (1 if scale is None else 2), image_tokens(subject.model, config.rollout.size)
    length, width = prompt_length(subject), subject.model.mmdit.in_channels * subject.model.mmdit.patch_size**2
    images, steps = config.prompts_per_step * config.rollout.group_size, config.rollout.steps
    lora_scale = lora.scale if lora else 0.0
    jitted = jit_update(config, model, optimizer, SchedulerConfig(), lora_scale, canvas, state, mesh)
    latents = array(mesh, steps + 1, images, tokens, width, dtype=jnp.dtype(config.rollout.dtype), axis=1)
    trajectory = Trajectory(
        latents,
        array(mesh, steps, images, axis=1),
        array(mesh, steps + 1),
        array(mesh, images, dtype=key_type()),
    )
    condition = condition_of(subject, config.prompts_per_step * sides, model.dtype, length, None)
    micro: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    operations, facts = 0.0, tuple[str, ...]()
    if config.data is not None and config.policy.sft_weight:
        micro, keys, operations, facts = step_batch(subject, model, config.data, 1)
    learned = learned_steps(steps, config.policy.timestep_fraction)
    passes = learning_passes(config) / config.policy.updates_per_rollout
    operations += images * sides * passes * flops.mmdit(subject.model.mmdit, tokens, length)
    arguments = (
        state, frozen, reference, trajectory, condition, array(mesh, images), micro,
        UpdateKeys(array(mesh, dtype=key_type()), keys), array(mesh, dtype=jnp.int32),
    )  # fmt: skip
    return Program(
        "update",
        "images",
        images // config.policy.updates_per_rollout,
        config.policy.micro_batch,
        lambda: jitted.lower(*arguments),
        arguments,
        {**resident, "batch": (trajectory, condition, micro, keys)},
        operations,
        (
            f"{images} images x {learned} of {steps} steps in micro-batches of {config.policy.micro_batch}, sequence "
            f"{length}",
            *facts,
            f"trains {', '.join(config.trains)}; remat {config.remat}; attention {implementation_of(model.attention)}",
        ),
        True,
    )
