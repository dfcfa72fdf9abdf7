"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from deepgen_jax.errors import DeepGenError

#: Extra of setup.py -> modules that it brings.
EXTRAS: dict[str, tuple[str, ...]] = {
    "serve": ("starlette", "uvicorn", "python_multipart", "prometheus_client"),
    "demo": ("starlette", "uvicorn", "python_multipart", "prometheus_client", "httpx", "gradio"),
    "convert": ("torch",),
    "data": ("grain", "array_record", "fsspec", "pyarrow", "tensorflow_datasets"),
    "rewards": ("rapidfuzz", "httpx", "rapidocr", "onnxruntime"),
    "log": ("matplotlib", "tensorboardX", "wandb"),
}
#: Extra -> what it is for.
USES: dict[str, str] = {
    "serve": "deepgen serve",
    "demo": "deepgen demo",
    "convert": "deepgen convert of .pth files, deepgen export --format pth",
    "data": "deepgen train, deepgen data",
    "rewards": "deepgen train grpo, deepgen reward-server, deepgen eval score",
    "log": "deepgen plot, TensorBoard and Weights & Biases logs",
}


def missing(extra: str) -> list[str]:
    """Modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def require(extra: str, command: str) -> None:
    """Raises a DeepGenError with the fix unless the modules of an extra are installed."""
    lacking = missing(extra)
    if lacking:
        raise DeepGenError(
            f"{command} needs {', '.join(lacking)}; install them with pip install 'deepgen-jax[{extra}]'"
        )
