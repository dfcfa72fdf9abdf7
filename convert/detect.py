"""What a path is, told by its contents: configurations in folders, first bytes of files. Names decide nothing."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import warn_user

from .sources import SafetensorsFile, Source, open_safetensors
from .zipparts import PICKLE_MAGIC, ZIP_MAGIC, choose_member, find_parts, is_torch_file, open_archive, open_member


class Folder(Enum):
    """Folders that can be told apart by their configurations."""

    QWEN = "a Qwen2.5-VL folder"
    SD3 = "a diffusers SD3.5 folder (transformer/, vae/, scheduler/)"
    RELEASE = "a DeepGen diffusers release (transformer/, vae/, vlm/, connector/)"
    MODEL = "a DeepGen-JAX model folder"
    RUN = "the folder of a training run"


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def folder_kind(path: Path) -> Folder | None:
    """What a folder is, or None where its configurations do not tell."""
    config = _json(path / "config.json")
    formats = {"deepgen-jax": Folder.MODEL, "deepgen-jax-run": Folder.RUN}
    if (ours := formats.get(config.get("format", ""))) is not None:
        return ours
    if config.get("model_type") == "qwen2_5_vl":
        return Folder.QWEN
    if _json(path / "transformer" / "config.json") and _json(path / "vae" / "config.json"):
        return Folder.RELEASE if _json(path / "vlm" / "config.json") else Folder.SD3
    return None


def describe(path: Path) -> str:
    """What a path is, in words."""
    if not path.exists():
        return "nothing there"
    if path.is_file():
        return {
            "zip": "a zip file or torch checkpoint",
            "pickle": "an old torch checkpoint or a pickle",
            "safetensors": "a safetensors file",
        }.get(file_kind(path) or "", "a file of another kind")
    kind = folder_kind(path)
    if kind is not None:
        return kind.value
    config = _json(path / "config.json")
    for key in ("model_type", "_class_name"):
        if key in config:
            return f"a folder whose config.json says {key}={config[key]!r}"
    names = sorted(entry.name for entry in path.iterdir())
    return f"a folder with {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else "an empty folder"


def require_folder(path: Path, kind: Folder, option: str) -> None:
    """Raises unless ``path`` is a folder of ``kind``; a release also serves as the SD3.5 folder."""
    if not path.exists():
        raise DeepGenError(f"{option}: {path} does not exist")
    found = folder_kind(path) if path.is_dir() else None
    if found is not kind and not (kind is Folder.SD3 and found is Folder.RELEASE):
        raise DeepGenError(f"{option}: {path} is {describe(path)}, expected {kind.value}")


def file_kind(path: Path) -> str | None:
    """ "zip", "pickle", "safetensors" or None, by the first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(ZIP_MAGIC):
        return "zip"
    if start.startswith(PICKLE_MAGIC):
        return "pickle"
    if len(start) == 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    return None


def open_checkpoint(path: Path, member: str | None = None) -> Source:
    """The checkpoint at ``path``: a file, a part of a cut archive, or a folder that holds one checkpoint.

    Raises:
      DeepGenError: there is no checkpoint, more than one, or it is damaged.
    """
    if not path.exists():
        raise DeepGenError(f"--checkpoint: {path} does not exist")
    if path.is_file():
        return _open_file(path, member)
    return _open_folder(path, member)


def _open_file(path: Path, member: str | None) -> Source:
    from . import pth

    parts = find_parts(path)
    kind = file_kind(parts[0])
    if kind == "safetensors":
        return SafetensorsFile(path, "safetensors checkpoint")
    origin = {"path": str(path), "bytes": sum(part.stat().st_size for part in parts)}
    if kind == "pickle":
        return pth.LegacyTorchFile(path, origin)
    if kind is None:
        raise DeepGenError(f"--checkpoint: {path} is {describe(path)}, expected .pth, .safetensors or a zip of .pth")
    archive, file = open_archive(parts)
    if is_torch_file(archive):
        return pth.TorchFile(file, str(path), origin)
    info = choose_member(archive, str(path), member)
    stream, sequential = open_member(archive, file, info)
    label = f"{path}: {info.filename}"
    return pth.TorchFile(stream, label, {**origin, "member": info.filename}, sequential=sequential)


def _open_folder(path: Path, member: str | None) -> Source:
    kind = folder_kind(path)
    if kind is not None:
        mend = {
            Folder.RELEASE: "; pass it as --diffusers",
            Folder.QWEN: "; pass it as --qwen",
            Folder.SD3: "; pass it as --sd3",
            Folder.MODEL: ", which is converted already",
            Folder.RUN: f"; run `deepgen export {path} --format model --out FOLDER`",
        }[kind]
        raise DeepGenError(f"--checkpoint: {path} is {kind.value}{mend}")
    if any(path.glob("*.safetensors")):
        return open_safetensors(path, "safetensors checkpoint")
    files = [file for file in sorted(path.iterdir()) if file.is_file() and file_kind(file) in ("zip", "pickle")]
    files = [file for file in files if find_parts(file)[0] == file]
    if len(files) == 1:
        return _open_file(files[0], member)
    # A DeepSpeed folder keeps the optimiser's state in further files, which hold no weights.
    opened: list[Source] = []
    for file in files:
        try:
            opened.append(_open_file(file, member))
        except DeepGenError as error:
            warn_user(f"{file.name} is left out: {error}")
    if len(opened) == 1:
        return opened[0]
    for source in opened:
        source.close()
    if not files:
        wanted = "a .pth, a DeepSpeed folder, a .safetensors or a zip of .pth"
        raise DeepGenError(f"--checkpoint: {path} is {describe(path)}, expected a checkpoint ({wanted})")
    names = ", ".join(file.name for file in files[:4])
    raise DeepGenError(f"--checkpoint: {path} holds {len(opened)} checkpoints (files: {names}); give the path of one")
