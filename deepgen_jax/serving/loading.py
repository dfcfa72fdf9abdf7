"""A model folder -> an engine."""

from __future__ import annotations

from pathlib import Path

from deepgen_jax.errors import DeepGenError, is_out_of_memory
from deepgen_jax.inference.acceleration import NO_ACCELERATION, Acceleration
from deepgen_jax.serving.engine import PipelineEngine


def model_name(folder: Path) -> str:
    """Model name in ``/v1/models``: the folder's name."""
    return folder.resolve().name


def load_engine(
    folder: Path,
    dtype: str = "auto",
    mesh: str | None = None,
    compilation_cache: str | None = None,
    acceleration: Acceleration = NO_ACCELERATION,
) -> PipelineEngine:
    """Loads a model folder, with compiled programs kept on disk.

    Args:
      dtype: "float32", "bfloat16", or "auto": float32 on CPU, bfloat16 elsewhere.
      mesh: sizes of its axes, such as "fsdp=8"; None for one device.
      compilation_cache: folder of compiled programs, "off", or None for the usual one.
      acceleration: of all images.

    Raises:
      DeepGenError: not a model folder, damaged weights, an unusable mesh, or out of memory.
    """
    import jax

    from deepgen_jax.inference.cache import enable_compilation_cache
    from deepgen_jax.inference.pipeline import DeepGenPipeline

    enable_compilation_cache(compilation_cache)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        pipe = DeepGenPipeline.from_pretrained(folder, dtype=dtype, mesh=mesh)
        return PipelineEngine(pipe, model_name(folder), acceleration)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeepGenError(f"out of memory while loading {folder}; split the model over devices with --mesh") from error
