"""The training state: trained parameters, optimiser and counters, and the update that all stages share."""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepgen_jax.parallel.abstract import is_abstract
from deepgen_jax.parallel.mesh import replicated
from deepgen_jax.training.partition import Tree


class TrainState(NamedTuple):
    """All that a checkpoint holds of the parameters and the optimiser.

    Attributes:
      step: int32, optimiser steps taken, skipped ones included.
      trainable: {"params": float32 tree, "lora": float32 tree}; the adapters' scale is not folded in.
      opt_state: of optax.
      ema: moving average of ``trainable``, or None.
      skipped: int32, steps skipped in a row because the loss or the gradient was not finite.
    """

    step: jax.Array
    trainable: Tree
    opt_state: optax.OptState
    ema: Tree | None
    skipped: jax.Array


def init_state(optimizer: optax.GradientTransformation, params: Tree, adapters: Tree | None, ema: bool) -> TrainState:
    """A state at step 0 for float32 trainable ``params`` and ``adapters``."""
    trainable = {"params": params, "lora": adapters or {}}
    average = jax.tree.map(jnp.copy, trainable) if ema else None
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), average, jnp.int32(0))


def abstract_state(optimizer: optax.GradientTransformation, trainable: Tree, mesh: Mesh, *, ema: bool) -> TrainState:
    """Shapes, dtypes and shardings of a state; the optimiser's moments are sharded like their parameters.

    Args:
      optimizer: of the run.
      trainable: {"params": ..., "lora": ...}, arrays or ``ShapeDtypeStruct``s, with their shardings.
      mesh: counters are replicated on it.
      ema: the state holds a moving average.
    """
    shapes = jax.eval_shape(partial(init_state, optimizer, ema=ema), trainable["params"], trainable["lora"])
    layout, everywhere = shardings_of(trainable), replicated(mesh)
    of_parameter = {_dict_keys(path): where for path, where in jax.tree_util.tree_leaves_with_path(layout)}
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, _: of_parameter.get(_dict_keys(path), everywhere), shapes.opt_state
    )
    shardings: Any = shapes._replace(
        step=everywhere, trainable=layout, opt_state=opt_state, ema=layout if ema else None, skipped=everywhere
    )
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def _dict_keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dict keys that end a path: optax wraps trees of moments, which have the structure of the parameters."""
    keys = takewhile(lambda entry: isinstance(entry, jax.tree_util.DictKey), reversed(path))
    return tuple(entry.key for entry in keys)[::-1]


def start_state(optimizer: optax.GradientTransformation, trainable: Tree, mesh: Mesh, *, ema: bool) -> TrainState:
    """A state at step 0, sharded as :func:`abstract_state` says; shapes of ``trainable`` give that of the state.

    The arrays of ``trainable``, {"params": ..., "lora": ...}, are donated to it.
    """
    abstract = abstract_state(optimizer, trainable, mesh, ema=ema)
    if is_abstract(trainable):
        return abstract
    make = partial(init_state, optimizer, ema=ema)
    layout: Any = shardings_of(abstract)
    return jax.jit(make, out_shardings=layout, donate_argnums=(0, 1))(trainable["params"], trainable["lora"])


def shardings_of(tree: Any) -> Any:
    """The sharding of every array or ``ShapeDtypeStruct``."""
    return jax.tree.map(lambda x: x.sharding, tree)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    state: TrainState,
    gradients: Tree,
    loss: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the state, or only counts the step where the loss or the gradient is not finite; reports norms.

    ``optax.apply_if_finite`` is not used: it looks at the updates alone, not at the loss, would move the average on a
    skipped step, applies what is not finite after a number of errors in a row, and adds counters to the optimiser's
    state, so that earlier checkpoints would not load.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
        ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, trainable)

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

    new_state = TrainState(
        step=state.step + 1,
        trainable=choose(trainable, state.trainable),
        opt_state=choose(opt_state, state.opt_state),
        ema=choose(ema, state.ema),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    norms = {"grad_norm": norm, "update_norm": optax.tree.norm(updates), "skipped": 1.0 - finite}
    norms["skipped_in_a_row"] = new_state.skipped
    for name, tree in (("grad_norm", gradients), ("update_norm", updates)):
        norms |= {f"{name}/{part}": optax.tree.norm(child) for part, child in parts(tree).items()}
    return new_state, norms


def parts(trainable: Tree) -> dict[str, Any]:
    """The trained parts by name: "bridge", "mmdit", "lora"."""
    adapters = {"lora": trainable["lora"]} if trainable.get("lora") else {}
    return {**trainable["params"], **adapters}


def parameter_counts(trainable: Tree) -> str:
    """Number of parameters of each trained part, for people: "bridge 1,234, mmdit 5,678"."""
    return ", ".join(
        f"{name} {sum(x.size for x in jax.tree.leaves(tree)):,}" for name, tree in parts(trainable).items()
    )
