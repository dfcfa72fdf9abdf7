"""Weights of a model folder on a mesh, with adapters merged, in the dtypes of the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.models import lora
from deepgen_jax.parallel.mesh import replicated
from deepgen_jax.stores import model_folder

Tree = dict[str, Any]

#: Parts that a model folder's adapters may sit on.
ADAPTED_PARTS = ("vision", "text")


class Adapters(NamedTuple):
    """One part's adapters in float32, alpha / rank, and the folder that they are from."""

    tree: Tree
    scale: float
    where: Path


def part_dtypes(config: DeepGenConfig, dtype: DTypeLike) -> dict[str, Any]:
    """The dtype of each part's weights: float32 for a VAE that asks for it, ``dtype`` for the rest."""
    vae = jnp.float32 if config.vae.force_upcast else dtype
    return {part: vae if part == "vae" else dtype for part in ("vision", "text", "bridge", "mmdit", "vae")}


def read_adapters(folder: Path, mesh: Mesh, parts: Iterable[str] = ADAPTED_PARTS) -> dict[str, Adapters]:
    """Adapters that a model folder keeps apart from its weights, by part, whole on every device."""
    config = model_folder.read_manifest(folder).config
    if config.lora is None:
        return {}
    stored = model_folder.load_lora(folder, tuple(parts), jnp.float32, replicated(mesh)) or {}
    return {part: Adapters(tree, config.lora.scale, folder) for part, tree in stored.items()}


def load_merged(
    folder: Path,
    dtypes: Mapping[str, DTypeLike],
    shardings: Any,
    adapters: Mapping[str, Adapters],
    trained: Callable[[str, DTypeLike], Tree] = lambda part, dtype: {},
) -> Tree:
    """Parts of a model folder, one after the other, adapters merged at full precision before weights are rounded.

    Args:
      folder: the model folder.
      dtypes: dtype by part that is read.
      shardings: a ``Sharding`` for every array, or {part: tree of shardings}.
      adapters: to merge, by part.
      trained: weights of a part, in a dtype, that replace the folder's.

    Returns:
      {part: nested dict of arrays}.

    Raises:
      DeepGenError: the folder is no model folder, or its parameters are missing or damaged.
    """
    params: Tree = {}
    for part, dtype in dtypes.items():
        read = jnp.float32 if part in adapters else dtype
        params |= model_folder.load_params(folder, (part,), read, shardings)
        params[part] = {**params[part], **trained(part, read)}
        if part in adapters:
            layout = shardings if isinstance(shardings, jax.sharding.Sharding) else shardings[part]
            params[part] = merge(params[part], adapters[part].tree, adapters[part].scale, dtype, layout)
    return params


def merge(base: Tree, adapters: Tree, scale: float, dtype: DTypeLike, shardings: Any) -> Tree:
    """``base`` in ``dtype`` with adapters folded in; see `deepgen_jax.models.lora.merged`."""

    def fold(base: Tree, adapters: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), lora.merged(base, adapters, scale))

    return jax.jit(fold, out_shardings=shardings)(base, adapters)
