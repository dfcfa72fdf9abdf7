"""Detects the kind of a path by its contents: configurations in folders, first bytes of files. Ignores names.

Importing this module is light.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import open_regular
from deepgen_jax.strict_json import read_json

#: First bytes of zip files (which new torch checkpoints are) and of pickles (which old ones are).
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"


class Folder(Enum):
    """Kinds of folders, recognised by their configurations."""

    QWEN = "a Qwen2.5-VL folder"
    SD3 = "a diffusers SD3.5 folder (transformer/, vae/, scheduler/)"
    RELEASE = "a DeepGen diffusers release (transformer/, vae/, vlm/, connector/)"
    MODEL = "a DeepGen-JAX model folder"
    RUN = "the folder of a training run"
    ADAPTER = "a LoRA adapter without its base model"
    DISTRIBUTED = "a torch distributed checkpoint (.distcp)"


def folder_kind(path: Path) -> Folder | None:
    """Kind of a folder; None if its configurations do not determine it."""
    config = _settings(path / "config.json")
    kind = config.get("format")
    if kind in ("deepgen-jax", "deepgen-jax-run"):
        return Folder.MODEL if kind == "deepgen-jax" else Folder.RUN
    if config.get("model_type") == "qwen2_5_vl":
        return Folder.QWEN
    if _settings(path / "transformer" / "config.json") and _settings(path / "vae" / "config.json"):
        return Folder.RELEASE if _settings(path / "vlm" / "config.json") else Folder.SD3
    if "peft_type" in _settings(path / "adapter_config.json"):
        return Folder.ADAPTER
    if any(path.glob("*.distcp")):
        return Folder.DISTRIBUTED
    return None


def file_kind(path: Path) -> str | None:
    """ "zip", "pickle", "safetensors" or None, by the first bytes.

    Raises:
      DeepGenError: it is no regular file, or cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(9)
    if start.startswith(ZIP_MAGIC):
        return "zip"
    if start.startswith(PICKLE_MAGIC):
        return "pickle"
    if len(start) == 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    return None


def describe(path: Path) -> str:
    """Description of a path's kind."""
    if not path.exists():
        return "nothing there"
    if path.is_file():
        return {
            "zip": "a zip file or torch checkpoint",
            "pickle": "an old torch checkpoint or a pickle",
            "safetensors": "a safetensors file",
        }.get(file_kind(path) or "", "a file of another kind")
    if not path.is_dir():
        return "no regular file"
    kind = folder_kind(path)
    if kind is not None:
        return kind.value
    config = _settings(path / "config.json")
    for key in ("model_type", "_class_name"):
        if key in config:
            return f"a folder whose config.json says {key}={config[key]!r}"
    names = sorted(entry.name for entry in path.iterdir())
    return f"a folder with {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else "an empty folder"


def require_folder(path: Path, kind: Folder, option: str) -> None:
    """Raises a DeepGenError unless ``path`` is a folder of ``kind``; a release also serves as the SD3.5 folder."""
    if not path.exists():
        raise DeepGenError(f"{option}: {path} does not exist")
    found = folder_kind(path) if path.is_dir() else None
    if found is not kind and not (kind is Folder.SD3 and found is Folder.RELEASE):
        raise DeepGenError(f"{option}: {path} is {describe(path)}, expected {kind.value}{_hint(path, found)}")


def _hint(path: Path, found: Folder | None) -> str:
    return f"; {merge_hint(path)}" if found is Folder.ADAPTER else ""


def merge_hint(path: Path) -> str:
    """Advice for a LoRA adapter without its base model."""
    base = _settings(path / "adapter_config.json").get("base_model_name_or_path") if path.is_dir() else None
    of = f" ({base})" if isinstance(base, str) and base.isprintable() and base else ""
    how = "peft's merge_and_unload or diffusers' fuse_lora"
    return f"merge it into its base model{of} with {how}, save that, and convert the result"


def _settings(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing if there is none that can be read."""
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except DeepGenError:
        return {}
    return values if isinstance(values, dict) else {}
