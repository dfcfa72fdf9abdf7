"""A model folder -> what a pipeline is made of: weights on the mesh in the dtype of the computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import make_mesh, replicated
from deepgen_jax.stores import model_folder

_DTYPES = ("float32", "bfloat16", "float16")
#: Parts on which adapters sit.
ADAPTED_PARTS = ("vision", "text")

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
    shardings = rules.shardings(abstract, mesh)
    dtypes = part_dtypes(config, compute)
    if config.lora is not None:  # adapters are folded in at full precision before the weights are rounded
        dtypes |= dict.fromkeys(ADAPTED_PARTS, jnp.float32)
    params: dict[str, Any] = {}
    for part, part_dtype in dtypes.items():
        params |= model_folder.load_params(folder, (part,), part_dtype, shardings)
    adapters = model_folder.load_lora(folder, ADAPTED_PARTS, jnp.float32, replicated(mesh))
    if adapters is not None and config.lora is not None:
        scale = config.lora.scale
        for part, tree in adapters.items():
            fold = jax.jit(
                lambda base, low: jax.tree.map(lambda x: x.astype(compute), lora.merged(base, low, scale)),
                out_shardings=shardings[part],
            )
            params[part] = fold(params[part], tree)
    return config, model_folder.read_scheduler(folder), params, tokenizer, mesh, compute
