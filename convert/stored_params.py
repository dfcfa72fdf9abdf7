"""Parameters stored in Orbax checkpoints: their shapes first, then the arrays, streamed in order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepgen_jax.config import DeepGenConfig, SchedulerConfig
from deepgen_jax.errors import DeepGenError, first_line
from deepgen_jax.stores.model_folder import read_manifest, read_scheduler, stored_tree

from .names import Weight, weights
from .orbax_writer import nested
from .transforms import Shape

#: Arrays are read together up to about this many bytes.
_BATCH_BYTES = 256 * 2**20

#: Names of the parameters that a layer's adapter adds to.
_ADAPTED = ("kernel", "embedding")

TreePath = tuple[str, ...]


class StoredArray(NamedTuple):
    """One array of an Orbax checkpoint, by its path there; :class:`Reader` reads it."""

    checkpoint: Path
    path: TreePath
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredAdapter(NamedTuple):
    """A LoRA adapter: ``scale * a @ b`` is added to its layer's weight."""

    a: StoredArray
    b: StoredArray
    scale: float


@dataclass(frozen=True)
class StoredModel:
    """A model whose parameters are in Orbax checkpoints.

    Attributes:
      where: for messages.
      config: of the model; ``lora`` is set where the adapters can be kept apart.
      scheduler: its noise schedule.
      tokenizer: folder of the tokenizer.
      params: parameters by path.
      adapters: by the path of their layer.
    """

    where: str
    config: DeepGenConfig
    scheduler: SchedulerConfig
    tokenizer: Path
    params: Mapping[TreePath, StoredArray]
    adapters: Mapping[TreePath, StoredAdapter]

    def merged_config(self) -> DeepGenConfig:
        """The configuration once adapters are merged."""
        return dataclasses.replace(self.config, lora=None)

    def adapter(self, weight: Weight) -> StoredAdapter | None:
        """The adapter of the layer whose kernel or embedding holds ``weight``; None for other parameters."""
        return self.adapters.get(weight.path[:-1]) if weight.path[-1] in _ADAPTED else None

    def groups(self) -> list[list[Weight]]:
        """The tensors of a release that are stacked in each parameter, in the order of the name tables.

        Raises:
          DeepGenError: they are not those of the configuration.
        """
        groups: dict[TreePath, list[Weight]] = {}
        for weight in weights(self.config).values():
            groups.setdefault(weight.path, []).append(weight)
        wrong = set(groups) ^ set(self.params)
        for path in set(groups) & set(self.params):
            if self.params[path].shape != (*groups[path][0].stack, *groups[path][0].target_shape):
                wrong.add(path)
        layers = {path: path[:-1] for path in groups if path[-1] in _ADAPTED}
        wrong |= set(self.adapters) - set(layers.values())
        wrong |= {path for path, layer in layers.items() if not self._fits(path, layer)}
        if wrong:
            raise DeepGenError(
                f"{self.where}: params/ does not fit config.json at {'/'.join(min(wrong))}; convert the model again"
            )
        return list(groups.values())

    def _fits(self, path: TreePath, layer: TreePath) -> bool:
        """Whether a layer's adapter, if it has one, has the shapes that its weight asks for."""
        if layer not in self.adapters or path not in self.params:
            return True
        a, b, _ = self.adapters[layer]
        *stack, rows, columns = self.params[path].shape
        return a.shape[:-1] == (*stack, rows) and b.shape == (*stack, a.shape[-1], columns)


def open_folder(folder: Path) -> StoredModel:
    """A model folder.

    Raises:
      DeepGenError: it is none, its weights are 8-bit, or something in it is missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest.config.quantization is not None:
        raise DeepGenError(
            f"{folder} has {manifest.config.quantization.weights} weights, which can be neither exported nor "
            "quantized again; name the model folder that it was made from"
        )
    lora = manifest.config.lora
    params, adapters = stored_arrays(folder / "params", stored_tree(folder)), {}
    if lora is not None:
        adapters = stored_adapters(stored_arrays(folder / "lora", stored_tree(folder, "lora")), lora.scale)
    scheduler = read_scheduler(folder)
    return StoredModel(str(folder), manifest.config, scheduler, folder / "tokenizer", params, adapters)


def stored_arrays(checkpoint: Path, tree: Mapping[str, Any], root: TreePath = ()) -> dict[TreePath, StoredArray]:
    """The leaves of a tree of shapes that is stored in ``checkpoint`` below ``root``, by path."""
    return {
        path: StoredArray(checkpoint, (*root, *path), tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in flatten(tree).items()
    }


def stored_adapters(arrays: Mapping[TreePath, StoredArray], scale: float) -> dict[TreePath, StoredAdapter]:
    """Adapters by the path of their layer, from the arrays of a LoRA tree."""
    layers = [path[:-1] for path in arrays if path[-1] == "a"]
    return {layer: StoredAdapter(arrays[*layer, "a"], arrays[*layer, "b"], scale) for layer in layers}


class Reader:
    """Reads arrays in batches, in the order announced; one batch is held at a time.

    A separate thread reads, because the caller may be part of Orbax, which does not read while it
    writes.
    """

    def __init__(self, groups: Iterable[Sequence[StoredArray]]) -> None:
        """``groups``: arrays that are used together, in the order in which they will be asked for."""
        self._batches = list(_batches(groups))
        self._number = {stored: number for number, batch in enumerate(self._batches) for stored in batch}
        self._held: tuple[int, dict[StoredArray, np.ndarray]] = (-1, {})
        self._thread = ThreadPoolExecutor(1, "deepgen-export")

    def __call__(self, stored: StoredArray) -> np.ndarray:
        """One of the arrays.

        Raises:
          DeepGenError: it is damaged.
        """
        number = self._number[stored]
        if number != self._held[0]:
            self._held = (-1, {})  # not both at once
            self._held = number, self._thread.submit(_read, self._batches[number]).result()
        return self._held[1][stored]


def _batches(groups: Iterable[Sequence[StoredArray]]) -> Iterator[list[StoredArray]]:
    batch: list[StoredArray] = []
    size = 0
    for group in groups:
        nbytes = sum(stored.nbytes for stored in group)
        if batch and size + nbytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch += group
        size += nbytes
    if batch:
        yield batch


def _read(batch: Sequence[StoredArray]) -> dict[StoredArray, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    values: dict[StoredArray, np.ndarray] = {}
    for checkpoint in dict.fromkeys(stored.checkpoint for stored in batch):
        chosen = [stored for stored in batch if stored.checkpoint == checkpoint]
        wanted = nested({stored.path: jax.ShapeDtypeStruct((), np.float32) for stored in chosen})
        arguments = nested({stored.path: ocp.RestoreArgs(restore_type=np.ndarray) for stored in chosen})
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        try:
            arrays = flatten(ocp.PyTreeCheckpointHandler().restore(checkpoint.absolute(), args=args))
        except (ValueError, KeyError, OSError) as error:
            raise DeepGenError(f"{checkpoint} is damaged ({first_line(error)}); copy or make it again") from error
        values |= {stored: arrays[stored.path] for stored in chosen}
    return values


def flatten(tree: Mapping[str, Any], path: TreePath = ()) -> dict[TreePath, Any]:
    """The leaves of nested dicts by path."""
    leaves: dict[TreePath, Any] = {}
    for name, child in tree.items():
        leaves |= flatten(child, (*path, name)) if isinstance(child, Mapping) else {(*path, name): child}
    return leaves
