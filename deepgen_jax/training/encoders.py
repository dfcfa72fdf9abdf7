"""Frozen encoders (VAE encoder and vision tower): loads them without the rest of the model, and their digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.deepgen import DeepGen, make_network
from deepgen_jax.parallel.mesh import replicated
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.lineage import starting_point_of
from deepgen_jax.stores.merged_params import load_merged, part_dtypes, read_adapters
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.run_config import RunConfig

_ENCODERS = ("vae", "vision")


def encoder_digest(folder: Path) -> str:
    """SHA-256 of the weights that cached features depend on: VAE encoder, vision tower and its adapters.

    Depends on values only, not on the stored dtype, so that copies and exports of a model agree.

    Raises:
      DeepGenError: not a model folder, or its parameters are missing or damaged.
    """
    params = model_folder.load_params(folder, _ENCODERS)
    tree = {"vae": {"encoder": params["vae"]["encoder"]}, "vision": params["vision"]}
    if adapters := _adapters(folder):
        tree["adapters"] = adapters
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(tree, sep="/").items()):
        digest.update(f"{path} {leaf.shape} ".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).data)
    return digest.hexdigest()


def digest_for(data: DataConfig, folder: Path) -> str | None:
    """`encoder_digest` if a source has cached features, else None."""
    return encoder_digest(folder) if has_cached(data) else None


def has_cached(data: DataConfig) -> bool:
    """Whether a source has cached features instead of images."""
    return any(source.kind == "features" for source in data.sources)


def check_untrained(run: RunConfig) -> None:
    """Checks that a run with cached features starts from the encoders that computed them.

    Raises:
      DeepGenError: the run starts from one that trained an encoder.
    """
    inherited = starting_point_of(run).inherited
    if trained := [part for part in _ENCODERS if part in inherited]:
        raise DeepGenError(
            f"{run.start} was trained with another {trained[0]} than that of {run.model_folder}, whose features are "
            f"cached; run `deepgen export {run.start} --format model --out FOLDER`, and give model=FOLDER start="
        )


def load_encoders(folder: Path, dtype: str, mesh: Mesh) -> tuple[DeepGen, Tree]:
    """Loads the model with its encoders' weights, replicated over the mesh, adapters merged.

    Args:
      folder: the model folder.
      dtype: compute dtype.
      mesh: mesh of the computation.

    Raises:
      DeepGenError: not a model folder, or its parameters are missing or damaged.
    """
    config = model_folder.read_manifest(folder).config
    compute, everywhere = jnp.dtype(dtype), replicated(mesh)
    dtypes = {part: dtype for part, dtype in part_dtypes(config, compute).items() if part in _ENCODERS}
    params = load_merged(folder, dtypes, everywhere, read_adapters(folder, mesh, ("vision",)))
    return make_network(config, mesh, compute), params


def _adapters(folder: Path) -> Tree:
    """{"vision": adapters, "scale": alpha / rank}, or {}."""
    config = model_folder.read_manifest(folder).config
    if config.lora is None or "vision" not in model_folder.stored_tree(folder, "lora"):
        return {}
    stored = model_folder.load_lora(folder, ("vision",), jnp.float32)
    assert stored is not None
    return {"vision": stored["vision"], "scale": np.float32(config.lora.scale)}
