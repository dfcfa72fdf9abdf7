"""Reads a model folder: config.json, params/ (Orbax), perhaps lora/, tokenizer/ and scheduler_config.json.

Importing this module, and reading the manifest, is light; arrays bring in JAX and Orbax.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepgen_jax.config import DeepGenConfig, SchedulerConfig, from_dict
from deepgen_jax.errors import DeepGenError, first_line, is_out_of_memory
from deepgen_jax.local_paths import refuse_url
from deepgen_jax.stores import checksums, orbax_logs
from deepgen_jax.stores.path_kinds import Folder, describe, folder_kind, merge_hint
from deepgen_jax.strict_json import read_json

if TYPE_CHECKING:
    import jax
    from jax.typing import DTypeLike

FORMAT, VERSION = "deepgen-jax", 1

#: Parts of the parameter tree that the model computes with. A folder also has "unused": weights that releases hold and
#: nothing computes with, kept so that an export is complete.
PARTS = ("text", "vision", "bridge", "mmdit", "vae")

#: Folder of the models that the package contains, and the name of the one.
PACKAGED, NANO = Path(__file__).parents[1] / "weights", "nano"


@dataclass(frozen=True)
class PartSummary:
    """Summary of one part in a folder: number of parameters, their bytes, and the number of parameters by dtype."""

    count: int
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """``config.json`` of a model folder.

    Attributes:
      config: the model.
      provenance: where the weights came from and how they were converted.
      parameters: part -> what is stored; "unused" and, where adapters are kept, "lora" included.
      files: the stored files' sizes in bytes, by path within the folder.
      checksums: CRC-32 of the files of arrays, by path within the folder; empty in folders of earlier versions.
    """

    config: DeepGenConfig
    provenance: dict[str, Any]
    parameters: dict[str, PartSummary]
    files: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)


def locate(model: str | os.PathLike[str] | None) -> Path:
    """The folder of a model that goes by its path or, as "nano" does, by the name of one in the package.

    Args:
      model: a path, or "nano", which means a folder of that name where there is one; None for the package's nano.

    Raises:
      DeepGenError: the package's nano is asked for, and the package has none.
    """
    if model is not None:
        refuse_url(model, "the model")
    if model is not None and (Path(model) != Path(NANO) or os.path.isdir(model)):
        return Path(model)
    if not (PACKAGED / NANO).is_dir():
        asked = "no model is named" if model is None else "there is no folder nano"
        raise DeepGenError(
            f"{asked}, and this package lacks its weights of nano; install it again, or name a MODEL folder, made by "
            "deepgen convert or trained as in docs/nano.md"
        )
    return PACKAGED / NANO


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a model folder; no arrays are read.

    Raises:
      DeepGenError: the folder does not exist, is not a model folder, or has an unsupported version.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise DeepGenError(f"{folder} is not a folder; give the folder that `deepgen convert` wrote")
    values = _json(path) if path.is_file() else {}
    if values.get("format") != FORMAT:
        raise DeepGenError(f"{folder} is not a model folder: {_looks_like(folder)}")
    if values.get("version") != VERSION:
        raise DeepGenError(
            f"{path} is of version {values.get('version')}, expected {VERSION}; convert the model again or update"
        )
    try:
        parameters = {part: PartSummary(**summary) for part, summary in values["parameters"].items()}
        config = from_dict(DeepGenConfig, values["config"], str(path))
        listed, sums = dict(values["files"]), dict(values.get("checksums") or {})
        return Manifest(config, values["provenance"], parameters, listed, sums)
    except (KeyError, TypeError, AttributeError) as error:
        raise DeepGenError(f"{path} is damaged ({error}); convert the model again") from None


def read_scheduler(folder: str | Path) -> SchedulerConfig:
    """``scheduler_config.json`` of a model folder.

    Raises:
      DeepGenError: it is missing or damaged.
    """
    path = Path(folder) / "scheduler_config.json"
    if not path.is_file():
        raise DeepGenError(f"{path} is missing; convert the model again")
    return from_dict(SchedulerConfig, _json(path), str(path))


def load_params(
    folder: str | Path,
    parts: Sequence[str] = PARTS,
    dtype: DTypeLike | None = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """Parameters of a model folder, read straight to their dtype and devices.

    Args:
      folder: the model folder.
      parts: which parts to read; "unused" only if named.
      dtype: dtype of every array but 8-bit weights and their scales; None keeps what is stored.
      shardings: a ``jax.sharding.Sharding`` for every array, or a tree like the result with one for each; None puts
        everything on the default device.

    Returns:
      {part: nested dict of jax arrays}.

    Raises:
      DeepGenError: the folder is no model folder, or its parameters are missing or damaged.
    """
    return _restore(Path(folder), "params", parts, dtype, shardings)


def load_lora(
    folder: str | Path, parts: Sequence[str] = PARTS, dtype: DTypeLike | None = None, shardings: Any = None
) -> dict[str, Any] | None:
    """Adapters that are kept apart from the base weights, their scale not folded in; None if there are none.

    Arguments, result and errors are as those of :func:`load_params`; parts without adapters are absent.
    """
    if read_manifest(folder).config.lora is None:
        return None
    return _restore(Path(folder), "lora", parts, dtype, shardings)


def _restore(folder: Path, name: str, parts: Sequence[str], dtype: Any, shardings: Any) -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp

    from deepgen_jax.models.quantized import keeps_dtype

    stored = stored_tree(folder, name)
    wanted = {part: stored[part] for part in parts if part in stored}
    absent = [part for part in parts if part not in stored]
    if absent and name == "params":
        raise DeepGenError(f"{folder / name} lacks {', '.join(absent)} (it has {', '.join(stored)})")
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def arguments(path: tuple[Any, ...], leaf: Any, sharding: jax.sharding.Sharding) -> ocp.ArrayRestoreArgs:
        as_stored = dtype is None or keeps_dtype(path[-1].key, leaf.dtype)
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=leaf.dtype if as_stored else dtype, sharding=sharding)

    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        one = default if shardings is None else shardings
        restore_args = jax.tree_util.tree_map_with_path(lambda path, leaf: arguments(path, leaf, one), wanted)
    else:
        chosen = {part: shardings[part] for part in wanted}
        restore_args = jax.tree_util.tree_map_with_path(arguments, wanted, chosen)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
            return checkpointer.restore((folder / name).absolute(), args=args)
    except Exception as error:  # Orbax wraps errors of reading in bare exceptions
        if is_out_of_memory(error):
            raise DeepGenError(
                f"out of memory while loading {folder / name}; split the model over more devices with a mesh, or use "
                "dtype bfloat16"
            ) from error
        raise DeepGenError(f"{folder / name} is damaged ({first_line(error)}); convert the model again") from error


def stored_tree(folder: Path, name: str = "params") -> dict[str, Any]:
    """The tree that is stored, with a ``jax.ShapeDtypeStruct`` at every leaf.

    Raises:
      DeepGenError: the folder is no model folder, or its parameters are missing or damaged.
    """
    import jax
    import orbax.checkpoint as ocp

    manifest = read_manifest(folder)
    if not (folder / name).is_dir():
        raise DeepGenError(f"{folder / name} is missing; convert the model again")
    for file, size in manifest.files.items():
        if file.startswith(f"{name}/"):
            _check_size(folder / file, size)
    arrays = {file: value for file, value in manifest.checksums.items() if file.startswith(f"{name}/")}
    checksums.verify(folder, arrays, "copy the model folder again or convert the model again")
    # Parts are read one by one, and each asks for the tree, which takes Orbax a while to read.
    state = _state(folder / name / "_METADATA")
    if state is None or state not in _trees:
        try:
            with orbax_logs.hidden(), ocp.PyTreeCheckpointer() as checkpointer:
                metadata = checkpointer.metadata((folder / name).absolute()).item_metadata
        except (ValueError, KeyError, OSError, AttributeError) as error:
            raise DeepGenError(f"{folder / name} is damaged ({first_line(error)}); convert the model again") from error
        if metadata is None:
            lacking = "its list of arrays cannot be read"
            raise DeepGenError(f"{folder / name} is damaged: {lacking}; convert the model again")
        tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)
        _trees.clear()
        _trees[state] = tree
    return jax.tree.map(lambda leaf: leaf, _trees[state])


# The tree read last, by the state of its file.
_trees: dict[tuple[str, int, int, int] | None, dict[str, Any]] = {}


def _state(path: Path) -> tuple[str, int, int, int] | None:
    """Path, size, time of the last change and inode of a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ino


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise DeepGenError(f"{path} is missing; copy the model folder again or convert the model again")
    actual = path.stat().st_size
    if actual != size:
        raise DeepGenError(
            f"{path} has {actual:,} bytes, expected {size:,}; copy the model folder again or convert the model again"
        )


def _json(path: Path) -> dict[str, Any]:
    values = read_json(path, "convert the model again")
    if not isinstance(values, Mapping):
        raise DeepGenError(f"{path} is not a JSON object; convert the model again")
    return dict(values)


def _looks_like(folder: Path) -> str:
    """What a folder is instead, and what to do with it."""
    fixes: dict[Folder | None, str] = {
        Folder.RELEASE: f"run `deepgen convert --diffusers {folder} --out FOLDER`",
        Folder.QWEN: f"run `deepgen convert --qwen {folder} --sd3 DIR --checkpoint PATH --out FOLDER`",
        Folder.SD3: f"run `deepgen convert --qwen DIR --sd3 {folder} --checkpoint PATH --out FOLDER`",
        Folder.RUN: f"run `deepgen export {folder} --format model --out FOLDER`",
        Folder.ADAPTER: merge_hint(folder),
    }
    otherwise = "give the folder that `deepgen convert` wrote"
    return f"it is {describe(folder)}; {fixes.get(folder_kind(folder), otherwise)}"
