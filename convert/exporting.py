"""``deepgen export``: a model folder -> a released layout."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.model_folder import Manifest, read_manifest, read_scheduler, stored_tree

from .files import Spec, TensorWriter, TorchWriter, parse_size
from .names import Weight, weights
from .progress import progress_bar
from .release import ReleaseWriter, hparams_json
from .staging import require_space, staged
from .transforms import to_source

Format = Literal["diffusers", "pth"]

#: Leaves are read together up to about this many bytes.
_BATCH_BYTES = 256 * 2**20
_ADAPTER_NAME = "default"

TreePath = tuple[str, ...]


def export(
    folder: str | Path,
    format: Format,
    out: str | Path,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a model folder back into a released layout.

    Args:
      folder: model folder.
      format: "diffusers": the release layout, adapters merged; "pth": one checkpoint of everything, with adapters as
        peft names them where the folder keeps them.
      out: the folder or file to write; it appears when everything is written, or not at all.
      max_shard_size: of the safetensors files, like "5GB".
      overwrite: replace ``out``.

    Returns:
      ``out``.

    Raises:
      DeepGenError: the folder is no model folder or damaged, or ``out`` exists.
    """
    if format not in ("diffusers", "pth"):
        raise DeepGenError(f"--format {format} is unknown; use diffusers or pth")
    folder, out = Path(folder), Path(out)
    manifest = read_manifest(folder)
    shard_bytes = parse_size(max_shard_size)
    exporter = _Exporter(folder, manifest, merge=format == "diffusers")
    specs = exporter.specs()
    total = sum(spec.nbytes for spec in specs)
    with staged(out, overwrite=overwrite) as partial:
        require_space(out, total)
        writer: TensorWriter
        if format == "diffusers":
            partial.mkdir()
            config = dataclasses.replace(manifest.config, lora=None)
            writer = ReleaseWriter(partial, config, read_scheduler(folder), specs, shard_bytes)
            shutil.copytree(folder / "tokenizer", partial / "tokenizer")
        else:
            writer = TorchWriter(partial, specs, {"deepgen_config": hparams_json(manifest.config)})
        try:
            with progress_bar(total, "exporting") as progress:
                for key, value in exporter.tensors():
                    writer.add(key, value)
                    progress(value.nbytes)
                    del value  # a view that would keep its leaf while the next is read
        finally:
            writer.close()
    return out


@dataclass(frozen=True)
class _Leaf:
    """A stored leaf and the tensors in it; with ``factors``, the paths of its adapters' leaves "a" and "b"."""

    path: TreePath
    members: Sequence[Weight]
    dtype: np.dtype
    nbytes: int
    factors: Mapping[str, TreePath]


class _Exporter:
    """Tensors of a model folder under canonical keys, read leaf by leaf."""

    def __init__(self, folder: Path, manifest: Manifest, *, merge: bool) -> None:
        self._folder, self._config, self._merge = folder, manifest.config, merge
        stored = _flatten(stored_tree(folder))
        self._lora = {} if self._config.lora is None else _flatten(stored_tree(folder, "lora"))
        groups: dict[TreePath, list[Weight]] = {}
        for weight in weights(self._config).values():
            groups.setdefault(weight.path, []).append(weight)
        wrong = sorted("/".join(path) for path in set(groups) ^ set(stored))
        for path in set(groups) & set(stored):
            first = groups[path][0]
            if tuple(stored[path].shape) != (*first.stack, *first.target_shape):
                wrong.append("/".join(path))
        if wrong:
            raise DeepGenError(f"{folder}: params/ does not fit config.json at {wrong[0]}; convert the model again")
        self._leaves = [self._leaf(path, members, stored[path]) for path, members in groups.items()]

    def _leaf(self, path: TreePath, members: list[Weight], struct: Any) -> _Leaf:
        factors = {role: (*path[:-1], role) for role in ("a", "b")} if members[0].adaptable else {}
        if any(factor not in self._lora for factor in factors.values()):
            factors = {}
        dtype = np.dtype(struct.dtype)
        return _Leaf(path, members, dtype, int(np.prod(struct.shape)) * dtype.itemsize, factors)

    def specs(self) -> list[Spec]:
        """What :meth:`tensors` yields, in its order."""
        specs = []
        for leaf in self._leaves:
            for weight in leaf.members:
                if not leaf.factors:
                    specs.append(Spec(weight.key, weight.shape, leaf.dtype))
                elif self._merge:
                    specs.append(Spec(weight.key, weight.shape, np.dtype(np.float32)))
                else:
                    specs.append(Spec(f"{weight.module}.base_layer.weight", weight.shape, leaf.dtype))
                    for role, path in leaf.factors.items():
                        struct = self._lora[path]
                        shape = tuple(struct.shape)[len(weight.stack) :][::-1]
                        specs.append(Spec(_adapter_key(weight, role), shape, np.dtype(struct.dtype)))
        return specs if self._merge else [self._bias_of_adapted(spec) for spec in specs]

    def _bias_of_adapted(self, spec: Spec) -> Spec:
        """The bias of an adapted layer stands beside its weight, in ``base_layer``."""
        module, _, name = spec.key.rpartition(".")
        return spec._replace(key=f"{module}.base_layer.bias") if name == "bias" and module in self._adapted else spec

    @functools.cached_property
    def _adapted(self) -> set[str]:
        """Names of the layers that have adapters."""
        return {weight.module for leaf in self._leaves if leaf.factors for weight in leaf.members}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(key, tensor) of everything."""
        for batch in self._batches():
            yield from self._tensors_of(batch)

    def _tensors_of(self, batch: Sequence[_Leaf]) -> Iterator[tuple[str, np.ndarray]]:
        """(key, tensor) of some leaves; a function of its own so that they are freed before the next are read."""
        params = _read(self._folder / "params", [leaf.path for leaf in batch])
        factors = [path for leaf in batch for path in leaf.factors.values()]
        lora = _read(self._folder / "lora", factors) if factors else {}
        for leaf in batch:
            for weight in leaf.members:
                pair = {role: lora[path][weight.index] for role, path in leaf.factors.items()}
                yield from self._emit(weight, params[leaf.path][weight.index], pair)

    def _emit(
        self, weight: Weight, value: np.ndarray, pair: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        lora = self._config.lora
        if pair and self._merge and lora is not None:
            update = pair["a"].astype(np.float32) @ pair["b"].astype(np.float32)
            update *= np.float32(lora.scale)
            update += value
            value, pair = update, {}
        key = weight.key
        if not self._merge and weight.module in self._adapted:
            key = f"{weight.module}.base_layer.{key.rpartition('.')[2]}"
        yield key, to_source(weight.transform, value, weight.shape)
        for role, factor in pair.items():
            yield _adapter_key(weight, role), factor.T

    def _batches(self) -> Iterator[list[_Leaf]]:
        batch: list[_Leaf] = []
        size = 0
        for leaf in self._leaves:
            if batch and size + leaf.nbytes > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(leaf)
            size += leaf.nbytes
        if batch:
            yield batch


def _adapter_key(weight: Weight, role: str) -> str:
    if weight.path[-1] == "embedding":
        return f"{weight.module}.lora_embedding_{role.upper()}.{_ADAPTER_NAME}"
    return f"{weight.module}.lora_{role.upper()}.{_ADAPTER_NAME}.weight"


def _flatten(tree: Mapping[str, Any], path: TreePath = ()) -> dict[TreePath, Any]:
    leaves: dict[TreePath, Any] = {}
    for name, child in tree.items():
        leaves |= _flatten(child, (*path, name)) if isinstance(child, Mapping) else {(*path, name): child}
    return leaves


def _read(checkpoint: Path, paths: Sequence[TreePath]) -> dict[TreePath, np.ndarray]:
    """Some leaves of an Orbax checkpoint as numpy arrays."""
    import jax
    import orbax.checkpoint as ocp

    from .writer import nested

    wanted = nested({path: jax.ShapeDtypeStruct((), np.float32) for path in paths})
    arguments = nested({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
            return _flatten(checkpointer.restore(checkpoint.absolute(), args=args))
    except (ValueError, KeyError, OSError) as error:
        raise DeepGenError(f"{checkpoint} is damaged ({str(error)[:200]}); convert the model again") from error
