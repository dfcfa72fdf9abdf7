"""Which parameters train: the parameter tree split in two, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.rules import leaves

Tree = dict[str, Any]

#: What can be trained by name; "lora" are adapters on the language model, "mmdit_lora" on the MMDiT.
TRAINABLE = ("bridge", "mmdit", "lora", "mmdit_lora", "vae", "text", "vision")
#: Stored tables that no stage trains.
_TABLES = (("mmdit", "pos_embed"),)


def split(params: Mapping[str, Any], trains: Sequence[str]) -> tuple[Tree, Tree]:
    """(trainable, frozen) of a parameter tree.

    Args:
      params: parts by name.
      trains: names of :data:`TRAINABLE`; those of adapters are no parts of ``params`` and are passed over.

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
    out: Tree = {}
    for tree in trees:
        for name, child in tree.items():
            if name in out:
                out[name] = join(out[name], child)
            else:
                out[name] = dict(child) if isinstance(child, Mapping) else child
    return out


def decays(params: Mapping[str, Any]) -> Tree:
    """True where weight decay applies: tensors of rank 2 and more, the axis of stacked layers not counted."""

    def walk(tree: Mapping[str, Any]) -> Tree:
        return {
            name: walk(child) if isinstance(child, Mapping) else name not in ("bias", "scale")
            for name, child in tree.items()
        }

    return walk(params)


def init_lora(params: Mapping[str, Any], rank: int, key: jax.Array, part: str = "text") -> Tree:
    """Fresh adapters on every Linear and the Embedding of one part, the language model by default: {part: ...}.

    Linear layers get a Gaussian ``a`` of standard deviation 1 / rank and zero ``b``. The embedding gets zero ``a``
    and standard normal ``b``, as the released system's adapters do. Either way the update starts at zero.

    Args:
      params: parameters of that part, or their shapes.
      rank: of the adapters.
      key: PRNG key.
      part: "text" or "mmdit".
    """
    adapters: Tree = {}
    weights = [(path, leaf) for path, leaf in leaves(params) if path.rpartition("/")[2] in ("kernel", "embedding")]
    for index, (path, leaf) in enumerate(weights):
        *module, name = path.split("/")
        *stack, rows, columns = leaf.shape
        shapes = {"a": (*stack, rows, rank), "b": (*stack, rank, columns)}
        drawn, std = ("b", 1.0) if name == "embedding" else ("a", 1.0 / rank)
        pair = {side: jnp.zeros(shape, jnp.float32) for side, shape in shapes.items()}
        pair[drawn] = std * jax.random.normal(jax.random.fold_in(key, index), shapes[drawn], jnp.float32)
        node = adapters
        for parent in module[:-1]:
            node = node.setdefault(parent, {})
        node[module[-1]] = pair
    return {part: adapters}
