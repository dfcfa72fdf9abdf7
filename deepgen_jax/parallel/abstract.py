"""Programs and their arguments as shapes on a mesh, for compilation ahead of time.

Code that prepares a program works on arrays and on ``jax.ShapeDtypeStruct``s alike, so that a run and
``deepgen compile`` share it: :func:`map_arrays` and :func:`reshard` do on shapes what they do on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import batch_sharding, replicated

Tree = dict[str, Any]


@dataclass(frozen=True)
class AbstractProgram:
    """A jitted program with the shapes of its arguments.

    Attributes:
      name: as for ``deepgen compile --program``.
      unit: what a batch counts, such as "samples".
      batch: samples or images of one run of the program, over all devices.
      micro_batch: how many of them the network sees at once.
      lower: traces and lowers it.
      arguments: trees of shapes.
      memory: kind -> tree of what is on the devices while it runs, the weights of other programs of the run included.
      flops: operations of the model in one run, over all devices; recomputation is not counted.
      summary: lines about shapes and settings, for people.
      trains: it ends in an optimiser step.
      latency_hiding: as for `deepgen_jax.parallel.jit_options`.
      advice: settings that take less memory.
      half_batch: settings that halve ``micro_batch``.
    """

    name: str
    unit: str
    batch: int
    micro_batch: int
    lower: Callable[[], Any]
    arguments: Any
    memory: dict[str, Any]
    flops: float
    summary: tuple[str, ...]
    trains: bool = False
    latency_hiding: bool = False
    advice: tuple[str, ...] = ()
    half_batch: str = ""


def abstract_array(mesh: Mesh, *shape: int, dtype: DTypeLike = jnp.float32, axis: int | None = None) -> Any:
    """A shape on the mesh, split over the batch axes along dimension ``axis``, replicated for None."""
    sharding = replicated(mesh) if axis is None else batch_sharding(mesh, len(shape), axis)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def key_dtype() -> Any:
    """Dtype of typed random keys."""
    return jax.eval_shape(lambda: jax.random.key(0)).dtype


def abstract_tree(tree: Tree, mesh: Mesh, dtype: DTypeLike | None) -> Tree:
    """Shapes of a parameter tree in ``dtype`` (None: each in its own), sharded by `deepgen_jax.parallel.rules`."""

    def place(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype, sharding=sharding)

    return jax.tree.map(place, tree, rules.shardings(tree, mesh)) if tree else {}


def is_abstract(tree: Any) -> bool:
    """Whether the leaves of a tree are shapes rather than arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def map_arrays(function: Callable[[jax.Array], jax.Array], tree: Tree) -> Tree:
    """``function``, which keeps shapes, of every array in one program, or of every shape; shardings stay."""
    if is_abstract(tree):
        found: Tree = jax.tree.map(lambda x: jax.eval_shape(function, x).update(sharding=x.sharding), tree)
        return found
    out: Tree = jax.jit(lambda tree: jax.tree.map(function, tree))(tree)
    return out


def reshard(tree: Tree, shardings: Tree) -> Tree:
    """The tree with other shardings."""
    if is_abstract(tree):
        return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, shardings)
    out: Tree = jax.jit(lambda tree: tree, out_shardings=shardings)(tree)
    return out


def shard_bytes(tree: Any) -> float:
    """Bytes of a tree of sharded shapes on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        width = leaf.dtype.itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * width
    return float(total)
