"""Steps over batches of different shapes: sum gradients batch by batch, then update once with their mean.

All functions are pure functions of global arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepgen_jax.training.partition import Tree
from deepgen_jax.training.state import TrainState, apply_gradients

#: Trainable tree -> quantities of each sample, float32 [B] by name; "loss" is differentiated.
Losses = Callable[[Tree], dict[str, jax.Array]]


class Sums(NamedTuple):
    """Sums over the samples of a step so far.

    Attributes:
      gradients: of the summed loss, like ``TrainState.trainable``.
      totals: float32 scalars by name, as :data:`Losses` names them.
    """

    gradients: Tree
    totals: dict[str, jax.Array]


def start_sums(trainable: Tree, names: Sequence[str]) -> Sums:
    """Sums over no sample."""
    return Sums(jax.tree.map(jnp.zeros_like, trainable), dict.fromkeys(names, jnp.float32(0)))


def add_batch(losses: Losses, trainable: Tree, sums: Sums, weight: jax.Array) -> Sums:
    """Adds a batch of B samples.

    Args:
      losses: what each sample brings.
      trainable: what the gradient is taken of.
      sums: so far.
      weight: [B]; 0 leaves a sample out.
    """

    def total(trainable: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        totals = {name: jnp.sum(weight * values) for name, values in losses(trainable).items()}
        return totals["loss"], totals

    (_, totals), gradients = jax.value_and_grad(total, has_aux=True)(trainable)
    return jax.tree.map(jnp.add, sums, Sums(gradients, totals))


def mean_step(
    optimizer: optax.GradientTransformation, ema_decay: float | None, state: TrainState, sums: Sums, count: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step on the summed loss over the total ``count``.

    Returns:
      The new state, and the mean loss with the norms of `deepgen_jax.training.state.apply_gradients`.
    """
    number = sums.totals[count]
    gradients = jax.tree.map(lambda x: x / number, sums.gradients)
    loss = sums.totals["loss"] / number
    new_state, norms = apply_gradients(optimizer, ema_decay, state, gradients, loss)
    return new_state, {"loss": loss, **norms}
