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

TreePath = tuple[str, ...]


class Stored(NamedTuple):
    """One array: the Orbax checkpoint that holds it, its path there, and what is known before it is read."""

    checkpoint: Path
    path: TreePath
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Update(NamedTuple):
    """An adapter: ``scale * a @ b`` is added to its layer's weight."""

    a: Stored
    b: Stored
    scale: float


class StoredLeaf(NamedTuple):
    """A parameter: where it is, the tensors of a release that are stacked in it, and its adapter."""

    path: TreePath
    stored: Stored
    members: Sequence[Weight]
    update: Update | None

    @property
    def arrays(self) -> list[Stored]:
        return [self.stored] if self.update is None else [self.stored, self.update.a, self.update.b]


@dataclass(frozen=True)
class StoredModel:
    """Locations of a model's arrays.

    Attributes:
      where: for messages.
      config: of the model; ``lora`` is set where the adapters can be kept apart.
      scheduler: its noise schedule.
      tokenizer: folder of the tokenizer.
      params: parameters by path.
      updates: adapters by the path of their layer.
    """

    where: str
    config: DeepGenConfig
    scheduler: SchedulerConfig
    tokenizer: Path
    params: Mapping[TreePath, Stored]
    updates: Mapping[TreePath, Update]

    def merged_config(self) -> DeepGenConfig:
        """The configuration once adapters are merged."""
        return dataclasses.replace(self.config, lora=None)

    def leaves(self) -> list[StoredLeaf]:
        """All parameters in the order of the name tables.

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
        layers = {path: path[:-1] for path in groups if path[-1] in ("kernel", "embedding")}
        wrong |= set(self.updates) - set(layers.values())
        wrong |= {path for path, layer in layers.items() if not self._fits(path, layer)}
        if wrong:
            raise DeepGenError(
                f"{self.where}: params/ does not fit config.json at {'/'.join(min(wrong))}; convert the model again"
            )
        return [
            StoredLeaf(path, self.params[path], members, self.updates.get(layers[path]) if path in layers else None)
            for path, members in groups.items()
        ]

    def _fits(self, path: TreePath, layer: TreePath) -> bool:
        """Whether a layer's adapter, if it has one, has the shapes that its weight asks for."""
        if layer not in self.updates or path not in self.params:
            return True
        a, b, _ = self.updates[layer]
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
    updates = {} if lora is None else pairs(located(folder / "lora", stored_tree(folder, "lora")), lora.scale)
    params = located(folder / "params", stored_tree(folder))
    scheduler = read_scheduler(folder)
    return StoredModel(str(folder), manifest.config, scheduler, folder / "tokenizer", params, updates)


def located(checkpoint: Path, tree: Mapping[str, Any], root: TreePath = ()) -> dict[TreePath, Stored]:
    """The leaves of a tree of shapes that is stored in ``checkpoint`` below ``root``, by path."""
    return {
        path: Stored(checkpoint, (*root, *path), tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in flatten(tree).items()
    }


def pairs(leaves: Mapping[TreePath, Stored], scale: float) -> dict[TreePath, Update]:
    """Adapters by the path of their layer, from the leaves of a LoRA tree."""
    return {path[:-1]: Update(leaf, leaves[*path[:-1], "b"], scale) for path, leaf in leaves.items() if path[-1] == "a"}


class Reader:
    """Reads arrays in batches, in the order announced; one batch is held at a time.

    A separate thread reads, because the caller may be part of Orbax, which does not read while it
    writes.
    """

    def __init__(self, groups: Iterable[Sequence[Stored]]) -> None:
        """``groups``: arrays that are used together, in the order in which they will be asked for."""
        self._batches = list(_batches(groups))
        self._number = {stored: number for number, batch in enumerate(self._batches) for stored in batch}
        self._held: tuple[int, dict[Stored, np.ndarray]] = (-1, {})
        self._thread = ThreadPoolExecutor(1, "deepgen-export")

    def __call__(self, stored: Stored) -> np.ndarray:
        """One of the arrays.

        Raises:
          DeepGenError: it is damaged.
        """
        number = self._number[stored]
        if number != self._held[0]:
            self._held = (-1, {})  # not both at once
            self._held = number, self._thread.submit(_read, self._batches[number]).result()
        return self._held[1][stored]


def _batches(groups: Iterable[Sequence[Stored]]) -> Iterator[list[Stored]]:
    batch: list[Stored] = []
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


def _read(batch: Sequence[Stored]) -> dict[Stored, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    values: dict[Stored, np.ndarray] = {}
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
