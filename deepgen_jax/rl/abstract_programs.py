"""Rollout and update as programs on shapes, for ``deepgen compile``."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.abstract import abstract_condition, image_tokens, sequence_length
from deepgen_jax.inference.guidance import Condition
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.abstract import AbstractProgram, key_dtype, reshard
from deepgen_jax.parallel.mesh import check_batch
from deepgen_jax.rl.algorithms import get_algorithm
from deepgen_jax.rl.programs import (
    GRPOPrograms,
    guidance_scale,
    learning_passes,
    make_programs,
    policy_weights,
    rollout_settings,
)
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.rl.rollout import Trajectory, rollout
from deepgen_jax.rl.update import UpdateKeys, learned_steps
from deepgen_jax.training.abstract_run import (
    INFERENCE,
    PROMPT_TOKENS,
    AbstractRun,
    AbstractStepBatch,
    Compilable,
    abstract_step_batch,
    sequence_lengths,
    state_memory,
)
from deepgen_jax.training.memory_model import Passes, Workload
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.state import TrainState


def abstract_rollout(run: AbstractRun) -> AbstractProgram:
    """One micro-batch of a rollout; the batch is the micro-batch."""
    config: GRPOConfig = run.config
    state, programs = make_programs(config, run.weights, run.mesh)
    size, group = run.batch or config.rollout.micro_batch, config.rollout.group_size
    check_batch("rollout.micro_batch", size, run.mesh)
    if size % group:
        raise DeepGenError(f"--batch {size} does not divide into groups of {group} images")
    scale, model = guidance_scale(config), programs.model
    weights = partial(policy_weights, config, lora_scale=run.weights.lora_scale)
    variables = jax.eval_shape(weights, programs.frozen, state)
    variables = {name: _sharded(tree, run) for name, tree in variables.items()}
    images = _AbstractImages(run, config)
    noise, keys = run.array(size, images.tokens, images.width, axis=0), run.array(size, dtype=key_dtype())
    condition = images.condition(size // group, model)
    sigmas = run.array(config.rollout.steps + 1)
    settings = rollout_settings(config, programs.canvas)
    arguments = (model, settings, variables, noise, condition, sigmas, config.rollout.eta, keys, scale)
    inputs = (noise, condition, sigmas, keys)
    return AbstractProgram(
        name="rollout",
        unit="images",
        batch=size,
        micro_batch=size,
        lower=lambda: rollout.lower(*arguments),
        arguments=(variables, *inputs),
        memory={**_resident(state, programs, run), "batch": inputs},
        flops=float(size * config.rollout.steps * images.velocity_flops),
        summary=(
            f"{size} images of {config.rollout.size}x{config.rollout.size}, {config.rollout.steps} steps of "
            f"{config.rollout.sampler}, guidance {scale or 'none'}, sequence {images.length}",
            f"attention {model.plan.kernel}",
        ),
        half_batch=f"--batch {size // 2}",
    )


def abstract_update(run: AbstractRun) -> AbstractProgram:
    """One optimiser update from a whole rollout; the batch is the images of a rollout."""
    config = run.config if run.batch is None else _with_images(run.config, run.batch)
    assert isinstance(config, GRPOConfig)
    policy, steps = config.policy, config.rollout.steps
    check_batch("policy.micro_batch", policy.micro_batch, run.mesh)
    if not get_algorithm(policy.algorithm).trajectory:
        raise DeepGenError("policy.algorithm=nft has no trajectories, and its update is not compiled here; choose grpo")
    state, programs = make_programs(config, run.weights, run.mesh)
    images, model = _AbstractImages(run, config), programs.model
    count = config.prompts_per_step * config.rollout.group_size
    trajectory = Trajectory(
        run.array(steps + 1, count, images.tokens, images.width, dtype=jnp.dtype(config.rollout.dtype), axis=1),
        run.array(steps, count, axis=1),
        run.array(steps + 1),
        run.array(count, dtype=key_dtype()),
    )
    condition = images.condition(config.prompts_per_step, model)
    auxiliary = AbstractStepBatch({}, {}, 0.0, ())
    if config.data is not None and policy.sft_weight:
        auxiliary = abstract_step_batch(run, model, config.data, accumulation=1)
    passes = learning_passes(config) / policy.updates_per_rollout
    arguments = (
        state, programs.frozen, programs.reference, trajectory, condition, run.array(count),
        auxiliary.micro_batches, UpdateKeys(run.array(dtype=key_dtype()), auxiliary.keys), run.array(dtype=jnp.int32),
    )  # fmt: skip
    return AbstractProgram(
        name="update",
        unit="images",
        batch=count // policy.updates_per_rollout,
        micro_batch=policy.micro_batch,
        lower=lambda: programs.update.lower(*arguments),
        arguments=arguments,
        memory={
            **_resident(state, programs, run),
            "batch": (trajectory, condition, auxiliary.micro_batches, auxiliary.keys),
        },
        flops=auxiliary.flops + count * passes * images.velocity_flops,
        summary=(
            f"{count} images x {learned_steps(steps, policy.timestep_fraction)} of {steps} steps in micro-batches of "
            f"{policy.micro_batch}, sequence {images.length}",
            *auxiliary.summary,
            f"trains {', '.join(config.trains)}; remat {config.remat}; attention {model.plan.kernel}",
        ),
        trains=True,
        half_batch=f"policy.micro_batch={policy.micro_batch // 2}, the same batch",
    )


def workload(config: GRPOConfig, model: DeepGenConfig) -> Workload:
    """Passes of an update for the memory model, with shapes as in :func:`abstract_update`."""
    size, sides = config.rollout.size, 1 if guidance_scale(config) is None else 2
    length = sequence_length(model, PROMPT_TOKENS)
    samples = sides * config.policy.micro_batch
    passes = [Passes(samples, image_tokens(model, size), length, runs_text=False, loops=2)]
    sizes = [config.policy.micro_batch, config.rollout.micro_batch]
    if config.data is not None and config.policy.sft_weight:
        data = config.data
        tokens, lengths = image_tokens(model, data.image_size), sequence_lengths(model, data, PROMPT_TOKENS)
        passes += [
            Passes(data.micro_batch, tokens * (2 if task == "edit" else 1), lengths[task])
            for task in data.mixture.tasks
        ]
        sizes.append(data.micro_batch)
    trained = bool(config.policy.beta) and "mmdit" in config.trains
    average = config.ema_decay is not None or get_algorithm(config.policy.algorithm).old_policy
    return Workload(tuple(passes), tuple(sizes), average=average, reference=trained)


class _AbstractImages:
    """Shapes of a run's images and of the conditions that they share."""

    def __init__(self, run: AbstractRun, config: GRPOConfig) -> None:
        mmdit = run.model.mmdit
        self._run, self._sides = run, 1 if guidance_scale(config) is None else 2
        self.tokens, self.width = image_tokens(run.model, config.rollout.size), mmdit.in_channels * mmdit.patch_size**2
        self.length = sequence_length(run.model, run.prompt_tokens)
        self.velocity_flops = self._sides * flops.mmdit(mmdit, self.tokens, self.length)

    def condition(self, prompts: int, model: DeepGen) -> Condition:
        """Replicated, of prompts or of their guidance pairs."""
        run = self._run
        return abstract_condition(run.model, run.mesh, prompts * self._sides, self.length, model.dtype, axis=None)


def _sharded(tree: Tree, run: AbstractRun) -> Tree:
    return reshard(tree, rules.shardings(tree, run.mesh))


def _resident(state: TrainState, programs: GRPOPrograms, run: AbstractRun) -> dict[str, Any]:
    """Arrays on the devices in every program of a step."""
    return {**state_memory(state), "frozen weights": (run.weights.frozen, programs.reference)}


def _micro_batches(config: GRPOConfig) -> int:
    """Micro-batches of an update."""
    return config.prompts_per_step * config.rollout.group_size // config.policy.micro_batch


def _with_images(config: GRPOConfig, images: int) -> GRPOConfig:
    """The configuration with rollouts of ``images``, in as many micro-batches as before."""
    prompts, rest = divmod(images, config.rollout.group_size)
    if rest or not prompts:
        raise DeepGenError(f"--batch {images} does not divide into groups of {config.rollout.group_size} images")
    policy = replace(config.policy, micro_batch=max(images // _micro_batches(config), 1))
    sampling = replace(config.rollout, micro_batch=math.gcd(images, config.rollout.micro_batch))
    return replace(config, prompts_per_step=prompts, policy=policy, rollout=sampling)


ABSTRACT_PROGRAMS = {
    "update": Compilable(
        abstract_update, lambda config, pieces: math.lcm(pieces * _micro_batches(config), config.rollout.group_size)
    ),
    "rollout": Compilable(
        abstract_rollout, lambda config, pieces: math.lcm(pieces, config.rollout.group_size)
    ),
    **INFERENCE,
}
