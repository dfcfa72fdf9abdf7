"""Splits the parameter tree into trainable and frozen parts, which are joined again inside the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from deepgen_jax.errors import DeepGenError

Tree = dict[str, Any]

#: What can be trained by name; "lora" are adapters on the language model, "mmdit_lora" on the MMDiT.
TRAINABLE = ("bridge", "mmdit", "lora", "mmdit_lora", "vae", "text", "vision")
#: Stored tables that no stage trains.
_TABLES = (("mmdit", "pos_embed"),)


def split(params: Mapping[str, Any], trains: Sequence[str]) -> tuple[Tree, Tree]:
    """(trainable, frozen) of a parameter tree.

    Args:
      params: parts by name.
      trains: names of :data:`TRAINABLE`; those of adapters are not parts of ``params`` and are ignored.

    Raises:
      DeepGenError: an unknown name.
    """
    unknown = sorted(set(trains) - set(TRAINABLE))
    if unknown:
        raise DeepGenError(f"{', '.join(unknown)} cannot be trained; choose among {', '.join(TRAINABLE)}")
    trainable: Tree = {part: dict(params[part]) for part in trains if part in params}
    frozen: Tree = {part: dict(tree) for part, tree in params.items() if part not in trainable}
    for part, table in _TABLES:
        if part in trainable:
            frozen.setdefault(part, {})[table] = trainable[part].pop(table)
    return trainable, frozen


def join(*trees: Mapping[str, Any]) -> Tree:
    """One tree of several that share no leaf."""
    flat: dict[tuple[str, ...], Any] = {}
    for tree in trees:
        flat |= traverse_util.flatten_dict(dict(tree))
    return traverse_util.unflatten_dict(flat)


def decays(params: Mapping[str, Any]) -> Tree:
    """True where weight decay applies: tensors of rank 2 and more, the axis of stacked layers not counted."""
    return dict(traverse_util.path_aware_map(lambda path, _: path[-1] not in ("bias", "scale"), dict(params)))


def init_lora(params: Mapping[str, Any], rank: int, key: jax.Array, part: str = "text") -> Tree:
    """New adapters on every Linear and the Embedding of one part, the language model by default: {part: ...}.

    Linear layers get a Gaussian ``a`` of standard deviation 1 / rank and zero ``b``. The embedding gets zero ``a``
    and standard normal ``b``, as the released system's adapters do. Either way the update starts at zero.

    Args:
      params: parameters of that part, or their shapes.
      rank: of the adapters.
      key: PRNG key.
      part: "text" or "mmdit".
    """
    adapters: dict[tuple[str, ...], jax.Array] = {}
    flat = traverse_util.flatten_dict(dict(params))
    weights = [(path, leaf) for path, leaf in flat.items() if path[-1] in ("kernel", "embedding")]
    for index, (path, leaf) in enumerate(weights):
        *module, name = path
        *stack, rows, columns = leaf.shape
        shapes = {"a": (*stack, rows, rank), "b": (*stack, rank, columns)}
        drawn, std = ("b", 1.0) if name == "embedding" else ("a", 1.0 / rank)
        for side, shape in shapes.items():
            adapters[*module, side] = jnp.zeros(shape, jnp.float32)
        adapters[*module, drawn] = std * jax.random.normal(jax.random.fold_in(key, index), shapes[drawn], jnp.float32)
    return {part: traverse_util.unflatten_dict(adapters)}
