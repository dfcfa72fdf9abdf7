"""A model folder -> what a pipeline is made of: weights on the mesh in the dtype of the computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax import model_folder
from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import make_mesh

_DTYPES = ("float32", "bfloat16", "float16")

Loaded = tuple[DeepGenConfig, SchedulerConfig, dict[str, Any], PromptTokenizer, Mesh, Any]


def part_dtypes(config: DeepGenConfig, dtype: DTypeLike) -> dict[str, Any]:
    """The dtype of each part's weights: float32 for a VAE that asks for it, ``dtype`` for the rest."""
    vae = jnp.float32 if config.vae.force_upcast else dtype
    return {part: vae if part == "vae" else dtype for part in ("vision", "text", "bridge", "mmdit", "vae")}


def load_model(folder: Path, dtype: DTypeLike, mesh: Mesh | str | None) -> Loaded:
    """Everything that ``DeepGenPipeline`` takes; see ``DeepGenPipeline.from_pretrained``."""
    try:
        compute = jnp.dtype(dtype)
    except TypeError:
        compute = None
    if compute is None or compute.name not in _DTYPES:
        raise DeepGenError(f"dtype {dtype!r} is not usable; choose one of {', '.join(_DTYPES)}")
    manifest = model_folder.read_manifest(folder)
    config = manifest.config
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    tokenizer = PromptTokenizer(folder / "tokenizer", config)
    abstract = abstract_params(config)
    adapted = config.lora is not None
    dtypes = part_dtypes(config, compute)
    if adapted:  # adapters are folded in at full precision before the weights are rounded
        dtypes |= dict.fromkeys(("vision", "text"), jnp.float32)
    wanted = {
        part: jax.tree.map(
            lambda leaf, sharding, dtype=dtypes[part]: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            tree,
            rules.shardings(tree, mesh, part),
        )
        for part, tree in abstract.items()
    }
    params = model_folder.load_params(folder, wanted)
    if adapted and config.lora is not None:
        adapters = model_folder.load_lora(folder)
        scale, compute_dtype = config.lora.scale, compute
        for part in ("vision", "text"):
            part_sharding = rules.shardings(abstract[part], mesh, part)
            fold = jax.jit(
                lambda base, low: jax.tree.map(lambda x: x.astype(compute_dtype), lora.merged(base, low, scale)),
                out_shardings=part_sharding,
            )
            params[part] = fold(params[part], adapters.get(part, {}))
    return config, manifest.scheduler, params, tokenizer, mesh, compute
