"""A model folder -> what a pipeline is made of: weights on the mesh in the dtype of the computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.merged_params import load_merged, part_dtypes, read_adapters

_DTYPES = ("float32", "bfloat16", "float16")

Loaded = tuple[DeepGenConfig, SchedulerConfig, dict[str, Any], PromptTokenizer, Mesh, Any]


def load_model(folder: Path, dtype: DTypeLike, mesh: Mesh | str | None) -> Loaded:
    """Everything that ``DeepGenPipeline`` takes; see ``DeepGenPipeline.from_pretrained``."""
    try:
        compute = jnp.dtype(dtype)
    except TypeError:
        compute = None
    if compute is None or compute.name not in _DTYPES:
        raise DeepGenError(f"dtype {dtype!r} is not usable; choose one of {', '.join(_DTYPES)}")
    config = model_folder.read_manifest(folder).config
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    tokenizer = PromptTokenizer(folder / "tokenizer", config)
    dtypes = part_dtypes(config, compute)
    # The shapes that are stored: tracing the model's initialisers for them takes longer than reading a small model.
    stored = model_folder.stored_tree(folder)
    shardings = rules.shardings({part: stored[part] for part in dtypes if part in stored}, mesh)
    params = load_merged(folder, dtypes, shardings, read_adapters(folder, mesh))
    return config, model_folder.read_scheduler(folder), params, tokenizer, mesh, compute
