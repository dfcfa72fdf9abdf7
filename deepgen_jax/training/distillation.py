"""Distillation to a few-step policy (pi-Flow, Chen et al. 2025, arXiv 2510.14974): the loss and the training step.

The student is evaluated once in each segment of the noise levels, where its N estimates define a policy
(`deepgen_jax.flow.policy`). The policy is followed without gradient to levels within the segment, and its velocity
there is regressed on the teacher's, guided if asked for (paper, Algorithm 1). Segments begin where the student's own
sampling arrives, so that prompts alone suffice, or at noised pictures. Their gradients are independent and summed in a
scan: memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.flow import policy
from deepgen_jax.flow.schedule import segment_times, shifted_time
from deepgen_jax.inference.guidance import Condition, guided_velocity
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.random_keys import Training
from deepgen_jax.training.inputs import MicroBatch, condition
from deepgen_jax.training.partition import Tree, join
from deepgen_jax.training.state import TrainState, apply_gradients


class Networks(NamedTuple):
    """The student, with its wide head, and the teacher: modules without parameters."""

    student: DeepGen
    teacher: DeepGen


@dataclass(frozen=True)
class DistillSettings:
    """Static settings of the step; see `deepgen_jax.training.distill_config.DistillConfig`.

    ``guidance`` is None for an unguided teacher; ``noised`` begins segments at noised pictures, ``one`` learns from one
    segment of a micro-batch.
    """

    scheduler: SchedulerConfig
    evaluations: int
    targets: int
    guidance: float | None = None
    window: float = 3 / 128
    noised: bool = False
    one: bool = False
    lora_scale: float = 0.0
    ema_decay: float | None = None


class Flow(NamedTuple):
    """A micro-batch with its conditions.

    Attributes:
      student: (trainable, x [B, T, D], sigma) -> estimates as velocities [B, T, N * D].
      teacher: (x, sigma [B]) -> velocity [B, T, D].
      clean, noise: [B, T, D] float32.
      mask: bool [B, T].
      tokens: int32 scalar, patches of a target.
      keys: [B], of the samples.
    """

    student: Callable[[Tree, jax.Array, jax.Array], jax.Array]
    teacher: Callable[[jax.Array, jax.Array], jax.Array]
    clean: jax.Array
    noise: jax.Array
    mask: jax.Array
    tokens: jax.Array
    keys: jax.Array


def make_flow(
    nets: Networks, settings: DistillSettings, frozen: Tree, teacher: Tree, micro: MicroBatch, keys: jax.Array
) -> Flow:
    """Encodes the prompts of a micro-batch, and binds the velocities to them; nothing here receives a gradient."""
    batch, targets, width = micro.latents.shape
    encode = partial(condition, nets.teacher, {"params": frozen}, image_tokens=micro.image_tokens)
    prompt = Condition(*encode(text=micro.text), micro.text.visible)
    pair = prompt
    if settings.guidance is not None:
        assert micro.negative is not None
        negative = Condition(*encode(text=micro.negative), micro.negative.visible)
        sides = [jnp.stack(pair, axis=1) for pair in zip(prompt, negative, strict=True)]
        pair = Condition(*(x.reshape(2 * batch, *x.shape[2:]) for x in sides))
    ids = jnp.concatenate([micro.target_ids, micro.reference_ids], axis=1)
    mask = jnp.concatenate([micro.target_mask, micro.reference_mask], axis=1)
    teacher_weights = {"params": {"mmdit": {**frozen["mmdit"], **teacher["mmdit"]}}}

    def evaluate(net: DeepGen, weights: Tree, x: jax.Array, sigma: jax.Array, side: Condition, scale: Any) -> jax.Array:
        tokens = jnp.concatenate([x, micro.references], axis=1)
        return guided_velocity(net, weights, tokens, ids, sigma, side, scale, mask, targets)

    def student(trainable: Tree, x: jax.Array, sigma: jax.Array) -> jax.Array:
        weights = {"params": {"mmdit": join(frozen["mmdit"], trainable["params"]["mmdit"])}}
        if trainable["lora"]:
            weights["lora"] = lora.scaled(trainable["lora"], settings.lora_scale)
        return evaluate(nets.student, weights, x, sigma, prompt, None)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, Training.FLOW_NOISE), (targets, width), jnp.float32)

    return Flow(
        student,
        lambda x, sigma: evaluate(nets.teacher, teacher_weights, x, sigma, pair, settings.guidance),
        micro.latents,
        jax.vmap(draw)(keys),
        micro.target_mask,
        jnp.sum(micro.target_mask[0]),
        keys,
    )


def segment_losses(
    flow: Flow, settings: DistillSettings, trainable: Tree, x: jax.Array, segment: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of each sample in a segment, float32 [B], and the state at its end [B, T, D].

    Args:
      flow: of the micro-batch.
      settings: static.
      trainable: of the student.
      x: [B, T, D], states at the start of the segment.
      segment: int32 scalar, 0 to K - 1.
    """
    times = jnp.asarray(segment_times(settings.evaluations), jnp.float32)
    level = partial(shifted_time, scheduler_config=settings.scheduler, image_seq_len=flow.tokens)
    start, end = times[segment], times[segment + 1]
    count = settings.targets

    def draw(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, Training.POLICY_TARGETS), segment)
        return (jnp.arange(count) + jax.random.uniform(key, (count,))) / count

    window = jnp.minimum(settings.window, start - end)
    targets = start - jax.vmap(draw, out_axes=1)(flow.keys) * (start - end - window)

    sigma, sigma_next = level(start), level(end)
    output = flow.student(trainable, x, sigma)
    levels = policy.grid(sigma, sigma_next, output.shape[-1] // x.shape[-1])
    estimates = policy.estimates_of(output, x, sigma)
    losses = policy.policy_losses(
        estimates, levels, flow.teacher, x, level(targets), level(jnp.maximum(targets - window, 0)), flow.mask
    )
    return losses, policy.follow(x, jax.lax.stop_gradient(estimates), levels, sigma_next)


def start_of(flow: Flow, settings: DistillSettings, trainable: Tree, segment: jax.Array) -> jax.Array:
    """States at the start of a segment, [B, T, D]: noised pictures, or rolled out by the student from noise."""
    times = jnp.asarray(segment_times(settings.evaluations), jnp.float32)
    level = partial(shifted_time, scheduler_config=settings.scheduler, image_seq_len=flow.tokens)
    if settings.noised:
        sigma = level(times[segment])
        return (1 - sigma) * flow.clean + sigma * flow.noise

    def through(index: jax.Array, x: jax.Array) -> jax.Array:
        sigma, sigma_next = level(times[index]), level(times[index + 1])
        output = flow.student(trainable, x, sigma)
        levels = policy.grid(sigma, sigma_next, output.shape[-1] // x.shape[-1])
        return policy.follow(x, policy.estimates_of(output, x, sigma), levels, sigma_next)

    return jax.lax.fori_loop(0, segment, through, flow.noise)


def micro_gradients(
    flow: Flow, settings: DistillSettings, trainable: Tree, shares: jax.Array
) -> tuple[Tree, jax.Array, jax.Array]:
    """Gradient of a micro-batch's loss, and sums of the loss and of the shares by segment, float32 [K] each.

    Segments are weighted by their length in time, or one is drawn by it.

    Args:
      flow: the micro-batch.
      settings: static.
      trainable: what the gradient is taken of.
      shares: [B], weight of each sample in the loss.
    """
    count = settings.evaluations
    lengths = jnp.asarray(-np.diff(segment_times(count)), jnp.float32)

    def loss(trainable: Tree, x: jax.Array, segment: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
        losses, following = segment_losses(flow, settings, trainable, x, segment)
        total = jnp.sum(losses * shares)
        return weight * total, (total, following)

    gradient = jax.value_and_grad(loss, has_aux=True)
    if settings.one:
        key = jax.random.fold_in(flow.keys[0], Training.POLICY_SEGMENT)
        segment = jnp.sum(jax.random.uniform(key) >= jnp.cumsum(lengths)[:-1])
        x = start_of(flow, settings, trainable, segment)
        (_, (total, _)), gradients = gradient(trainable, x, segment, jnp.float32(1))
        chosen = jax.nn.one_hot(segment, count)
        return gradients, chosen * total, chosen * jnp.sum(shares)

    def step(carry: tuple[Tree, jax.Array], segment: jax.Array) -> tuple[Any, jax.Array]:
        gradients, x = carry
        if settings.noised:
            x = start_of(flow, settings, trainable, segment)
        (_, (total, following)), found = gradient(trainable, x, segment, lengths[segment])
        return (jax.tree.map(jnp.add, gradients, found), following), total

    start = (jax.tree.map(jnp.zeros_like, trainable), flow.noise)
    (gradients, _), totals = jax.lax.scan(step, start, jnp.arange(count))
    return gradients, totals, jnp.full(count, jnp.sum(shares))


def distill_step(
    nets: Networks,
    optimizer: optax.GradientTransformation,
    settings: DistillSettings,
    state: TrainState,
    frozen: Tree,
    teacher: Tree,
    micro_batches: Mapping[str, MicroBatch],
    keys: Mapping[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step over a cycle of micro-batches, their gradients accumulated in a scan for each task.

    Args:
      nets, optimizer, settings: static.
      state: of the student; only its counters change if the loss or the gradient is not finite.
      frozen: language model, bridge, and what of the MMDiT student and teacher share.
      teacher: {"mmdit": what only the teacher has}.
      micro_batches: task -> its micro-batches, stacked on a leading axis.
      keys: task -> keys [A, B], one a sample, from (seed, step, slot).

    Returns:
      The new state, float32 scalars, and the loss by segment [K]: not a number for segments that were not drawn.
    """
    count = sum(micro.latents.shape[0] for micro in micro_batches.values())
    sums = (jax.tree.map(jnp.zeros_like, state.trainable), *(jnp.zeros(settings.evaluations),) * 2)

    def accumulate(carry: Any, inputs: Any) -> tuple[Any, None]:
        micro, keys = inputs
        shares = micro.weight / jnp.sum(micro.weight) / count
        flow = make_flow(nets, settings, frozen, teacher, micro, keys)
        return jax.tree.map(jnp.add, carry, micro_gradients(flow, settings, state.trainable, shares)), None

    for task, stacked in micro_batches.items():
        sums, _ = jax.lax.scan(accumulate, sums, (stacked, keys[task]))
    gradients, totals, counts = sums
    lengths = 1.0 if settings.one else jnp.asarray(-np.diff(segment_times(settings.evaluations)), jnp.float32)
    loss = jnp.sum(lengths * totals)
    new_state, norms = apply_gradients(optimizer, settings.ema_decay, state, gradients, loss)
    return new_state, {"loss": loss, "loss_by_segment": totals / counts, **norms}
