"""Stages 1 and 2, flow matching on pictures with texts: the loss and the training step.

What trains is decided by which tree holds the parameters. Loss and step are pure functions of global arrays: under
`jax.jit` with shardings the same step runs on any mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.flow.losses import noised, velocity_losses
from deepgen_jax.flow.schedule import sample_u, sigma_from_u
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.mmdit import Noisy
from deepgen_jax.random_keys import Training
from deepgen_jax.training.inputs import MicroBatch, hidden_states
from deepgen_jax.training.partition import Tree, join
from deepgen_jax.training.state import TrainState, apply_gradients

#: Noise levels are binned into this many equal bins for the log.
TIMESTEP_BINS = 10


class Draws(NamedTuple):
    """The randomness of a micro-batch's loss: noise levels sigma [B] and noise [B, T, D]; dropout key or None."""

    sigma: jax.Array
    noise: jax.Array
    dropout: jax.Array | None


class Pass(NamedTuple):
    """Micro-batches on a leading axis, with a key [A, B] and a share of the mean loss [A, B] for each sample."""

    micro: MicroBatch
    keys: jax.Array
    shares: jax.Array


@dataclass(frozen=True)
class StepSettings:
    """Static settings of the step; ``merge`` is how many micro-batches of a task the network sees at once, at most.

    Above 1, tasks that then have one pass each run together (:func:`run_together`).
    """

    scheduler: SchedulerConfig
    lora_scale: float = 0.0
    weighting: str = "auto"
    ema_decay: float | None = None
    merge: int = 1


def draw(keys: jax.Array, micro: MicroBatch, settings: StepSettings) -> Draws:
    """Draws for B samples, each from its own key [B], independent of padding and mesh."""
    _, tokens, width = micro.latents.shape

    def one(key: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = sample_u(jax.random.fold_in(key, Training.NOISE_LEVEL), (), settings.scheduler, settings.weighting)
        sigma = sigma_from_u(u, settings.scheduler, length)
        return sigma, jax.random.normal(jax.random.fold_in(key, Training.FLOW_NOISE), (tokens, width), jnp.float32)

    sigma, noise = jax.vmap(one)(keys, jnp.sum(micro.target_mask, axis=1))
    return Draws(sigma, noise, jax.random.fold_in(keys[0], Training.LORA_DROPOUT))


def supervised_losses(
    model: DeepGen, trainable: Tree, frozen: Tree, micro: MicroBatch, draws: Draws, lora_scale: float
) -> jax.Array:
    """Flow-matching loss of each sample of a micro-batch, float32 [B]; a pure function of all it depends on."""
    return losses_together(model, trainable, frozen, (micro,), (draws,), lora_scale)[0]


def losses_together(
    model: DeepGen,
    trainable: Tree,
    frozen: Tree,
    micros: Sequence[MicroBatch],
    draws: Sequence[Draws],
    lora_scale: float,
) -> list[jax.Array]:
    """:func:`supervised_losses` of several micro-batches with targets of one size, such as of two tasks.

    Bridge and MMDiT run each layer on all of them before the next, so that weights are gathered and gradients reduced
    once for all. The language model, whose adapters drop inputs at random, runs on one after another.
    """
    variables = {"params": join(frozen, trainable["params"])}
    if trainable.get("lora"):
        variables["lora"] = lora.scaled(trainable["lora"], lora_scale)
    states = []
    for micro, drawn in zip(micros, draws, strict=True):
        rngs = None if drawn.dropout is None else {"dropout": drawn.dropout}
        states.append(hidden_states(model, variables, micro.text, micro.image_tokens, rngs))
    visible = [micro.text.visible for micro in micros]
    conditions: Any = model.apply(variables, states, visible, method="conditions")

    batches, targets = [], []
    for micro, drawn, (pooled, sequence) in zip(micros, draws, conditions, strict=True):
        noisy, target = noised(micro.latents, drawn.noise, drawn.sigma[:, None, None])
        tokens = jnp.concatenate([noisy, micro.references], axis=1)
        ids = jnp.concatenate([micro.target_ids, micro.reference_ids], axis=1)
        mask = jnp.concatenate([micro.target_mask, micro.reference_mask], axis=1)
        batches.append(Noisy(tokens, ids, drawn.sigma * 1000.0, pooled, sequence, mask, micro.text.visible))
        targets.append(target)
    velocities: Any = model.apply(variables, batches, micros[0].latents.shape[1], method="velocities")
    return [
        velocity_losses(velocity, target, micro.target_mask)
        for velocity, target, micro in zip(velocities, targets, micros, strict=True)
    ]


def train_step(
    model: DeepGen,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    state: TrainState,
    frozen: Tree,
    micro_batches: Mapping[str, MicroBatch],
    keys: Mapping[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step over a full cycle of micro-batches, their gradients accumulated in scans.

    Args:
      model, optimizer, settings: static.
      state: updated functionally; only its counters if the loss or the gradient is not finite.
      frozen: parameters that do not train.
      micro_batches: task -> its micro-batches, stacked on a leading axis.
      keys: task -> keys [A, B], one a sample, from (seed, step, slot).

    Returns:
      The new state and float32 scalars (and [TIMESTEP_BINS] sums and counts of the loss by noise level).
    """
    gradients, metrics = supervised_gradients(model, settings, state.trainable, frozen, micro_batches, keys)
    new_state, norms = apply_gradients(optimizer, settings.ema_decay, state, gradients, metrics["loss"])
    return new_state, metrics | norms


def supervised_gradients(
    model: DeepGen,
    settings: StepSettings,
    trainable: Tree,
    frozen: Tree,
    micro_batches: Mapping[str, MicroBatch],
    keys: Mapping[str, jax.Array],
    gradients: Tree | None = None,
    weight: float = 1.0,
) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradient of the mean loss of micro-batches, accumulated in one scan a task, or for all tasks together.

    Args:
      model, settings, frozen, micro_batches, keys: as for :func:`train_step`.
      trainable: what the gradient is taken of.
      gradients: what is accumulated onto; None starts from zeros.
      weight: of the loss in the gradient; the metrics are not weighted.

    Returns:
      ``gradients`` plus ``weight`` times the gradient, and the metrics of :func:`train_step` about the loss.
    """
    count = sum(micro.latents.shape[0] for micro in micro_batches.values())

    def mean_loss(trainable: Tree, passes: Sequence[Pass]) -> tuple[jax.Array, tuple[Any, ...]]:
        micros, draws = [one.micro for one in passes], [draw(one.keys, one.micro, settings) for one in passes]
        losses = losses_together(model, trainable, frozen, micros, draws, settings.lora_scale)
        found = [jnp.sum(each * one.shares) for each, one in zip(losses, passes, strict=True)]
        bins = (jnp.zeros(TIMESTEP_BINS), jnp.zeros(TIMESTEP_BINS))
        for each, micro, drawn in zip(losses, micros, draws, strict=True):
            places = jnp.clip((drawn.sigma * TIMESTEP_BINS).astype(jnp.int32), 0, TIMESTEP_BINS - 1)
            sums, counts = bins
            bins = (sums.at[places].add(each * micro.weight), counts.at[places].add(micro.weight))
        return weight * sum(found[1:], found[0]), (found, *bins)

    gradients = jax.tree.map(jnp.zeros_like, trainable) if gradients is None else gradients
    bins = (jnp.zeros(TIMESTEP_BINS), jnp.zeros(TIMESTEP_BINS))
    metrics: dict[str, jax.Array] = {}
    passes = {}
    for task, stacked in micro_batches.items():
        shares = stacked.weight / jnp.sum(stacked.weight, axis=1, keepdims=True) / count
        passes[task] = merged(stacked, keys[task], shares, settings.merge)
    for tasks in run_together(passes, settings.merge):

        def accumulate(carry: Any, inputs: Sequence[Pass]) -> tuple[Any, None]:
            (_, found), gradient = jax.value_and_grad(mean_loss, has_aux=True)(trainable, inputs)
            return jax.tree.map(jnp.add, carry, (gradient, found)), None

        start = (gradients, ([jnp.float32(0)] * len(tasks), *bins))
        (gradients, (totals, *sums)), _ = jax.lax.scan(accumulate, start, [passes[task] for task in tasks])
        bins = (sums[0], sums[1])
        for task, total in zip(tasks, totals, strict=True):
            metrics[f"loss/{task}"] = total * count / micro_batches[task].latents.shape[0]
            metrics["loss"] = metrics.get("loss", jnp.float32(0)) + total
    return gradients, metrics | {"loss_bin_sums": bins[0], "loss_bin_counts": bins[1]}


def run_together(passes: Mapping[str, Pass], merge: int) -> list[list[str]]:
    """Tasks whose passes run together: all where each has one pass, and targets have one size; else each alone."""
    shapes = {one.micro.latents.shape[:1] + one.micro.latents.shape[2:] for one in passes.values()}
    if merge > 1 and len(shapes) == 1 and all(count == 1 for count, *_ in shapes):
        return [list(passes)]
    return [[task] for task in passes]


def at_once(count: int, most: int) -> int:
    """Number of micro-batches merged into one: the largest divisor of ``count`` up to ``most``."""
    return max(number for number in range(1, most + 1) if count % number == 0)


def merged(stacked: MicroBatch, keys: jax.Array, shares: jax.Array, most: int) -> Pass:
    """A micro-batches of B samples as A / n of n * B, n = :func:`at_once`.

    The gradient stays the same, as every sample brings its share of the mean; weights are gathered A / n times instead
    of A, and products are larger. Samples stay on their devices: those of one device come one after another.

    Args:
      stacked: micro-batches on a leading axis.
      keys, shares: [A, B], of each sample.
      most: how many become one.
    """
    count = keys.shape[0]
    number = at_once(count, most)

    def join(x: jax.Array, axis: int = 1) -> jax.Array:
        x = jnp.moveaxis(x.reshape(count // number, number, *x.shape[1:]), 1, axis + 1)
        return x.reshape(*x.shape[:axis], number * x.shape[axis], *x.shape[axis + 2 :])

    if number == 1:
        return Pass(stacked, keys, shares)
    micro = jax.tree.map(join, stacked)
    text = micro.text._replace(position_ids=join(stacked.text.position_ids, axis=2))
    return Pass(micro._replace(text=text), join(keys), join(shares))
