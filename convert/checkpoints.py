"""Opens stage checkpoints of every layout, by what they hold."""

from __future__ import annotations

from pathlib import Path

from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.path_kinds import Folder, describe, file_kind, folder_kind, merge_hint
from deepgen_jax.user_warnings import warn_user

from .keys import is_adapter
from .sources import SafetensorsFile, Source, open_safetensors
from .zipparts import choose_member, find_parts, is_torch_file, open_archive, open_member

_DCP_TO_TORCH = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"


def open_checkpoint(path: Path, member: str | None = None, *, ema: bool = False) -> Source:
    """The checkpoint at ``path``: a file, a part of a cut archive, or a folder that holds one checkpoint.

    Args:
      path: of the checkpoint.
      member: part of the name of the checkpoint inside an archive that holds several.
      ema: take the moving average of the weights where there is one.

    Raises:
      DeepGenError: there is no checkpoint, more than one, an adapter alone, or it is damaged.
    """
    if not path.exists():
        raise DeepGenError(f"--checkpoint: {path} does not exist")
    source = _open_folder(path, member, ema) if path.is_dir() else _open_file(path, member, ema)
    if source.tensors and all(map(is_adapter, source.tensors)):
        source.close()
        raise DeepGenError(f"--checkpoint: {path} is {Folder.ADAPTER.value}; {merge_hint(path)}")
    return source


def _open_file(path: Path, member: str | None, ema: bool) -> Source:
    from . import pth

    parts = find_parts(path)
    kind = file_kind(parts[0])
    if kind == "safetensors":
        return SafetensorsFile(path, "safetensors checkpoint")
    origin = {"path": str(path), "bytes": sum(part.stat().st_size for part in parts)}
    if kind == "pickle":
        return pth.LegacyTorchFile(path, origin, ema=ema)
    if kind is None:
        raise DeepGenError(f"--checkpoint: {path} is {describe(path)}, expected .pth, .safetensors or a zip of .pth")
    archive, file = open_archive(parts)
    if is_torch_file(archive):
        return pth.TorchFile(file, str(path), origin, ema=ema)
    info = choose_member(archive, str(path), member)
    stream, sequential = open_member(archive, file, info)
    label = f"{path}: {info.filename}"
    return pth.TorchFile(stream, label, {**origin, "member": info.filename}, sequential=sequential, ema=ema)


def _open_folder(path: Path, member: str | None, ema: bool) -> Source:
    kind = folder_kind(path)
    if kind is not None:
        fix = {
            Folder.RELEASE: "; pass it as --diffusers",
            Folder.QWEN: "; pass it as --qwen",
            Folder.SD3: "; pass it as --sd3",
            Folder.MODEL: ", which is converted already",
            Folder.RUN: f"; run `deepgen export {path} --format model --out FOLDER`",
            Folder.ADAPTER: f"; {merge_hint(path)}",
            Folder.DISTRIBUTED: f"; run `{_DCP_TO_TORCH} {path} FILE.pth` and pass FILE.pth",
        }[kind]
        raise DeepGenError(f"--checkpoint: {path} is {kind.value}{fix}")
    if any(path.glob("*.safetensors")):
        return open_safetensors(path, "safetensors checkpoint")
    files = [file for file in sorted(path.iterdir()) if file.is_file() and file_kind(file) in ("zip", "pickle")]
    files = [file for file in files if find_parts(file)[0] == file]
    if len(files) == 1:
        return _open_file(files[0], member, ema)
    # A DeepSpeed folder keeps the optimiser's state in further files, which hold no weights.
    opened: list[Source] = []
    for file in files:
        try:
            opened.append(_open_file(file, member, ema))
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
