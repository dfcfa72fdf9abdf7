"""``deepgen export``: a model folder or a training run -> a model folder or a released layout."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import deepgen_jax
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import require_space
from deepgen_jax.models.lora import folded
from deepgen_jax.stores.model_folder import locate
from deepgen_jax.stores.run_folder import is_run

from .conversion import DTYPES
from .folder_writer import Contents, write_arrays, write_manifest
from .lazy_params import Leaf, Piece, chunk_shape, row_blocks, slice_index
from .names import Weight
from .output import staged
from .progress import progress_bar
from .release import ReleaseWriter, hparams_json
from .stored_params import Reader, StoredArray, StoredModel, open_folder
from .tensor_files import TensorWriter, TorchWriter, nbytes, parse_size
from .transforms import to_source

Format = Literal["model", "diffusers", "pth"]
FORMATS = ("model", "diffusers", "pth")

_ADAPTER_NAME = "default"


def export(
    folder: str | Path,
    format: Format,
    out: str | Path,
    *,
    step: int | None = None,
    ema: bool = False,
    keep_lora: bool = False,
    model: str | Path | None = None,
    start: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Exports a model folder, or the model of a training run, to a different format.

    Nothing is written in between: tensors go from where they are stored to where they are wanted, one by one.

    Args:
      folder: model folder, folder of a training run, or "nano" for the package's model.
      format: "model": a model folder, from a run only; "diffusers": the release layout, adapters merged; "pth": one
        checkpoint of everything, with adapters as peft names them where they are kept apart.
      out: the folder or file to write; it appears when everything is written, or not at all.
      step: of a run's checkpoint; the newest by default.
      ema: take the moving average of what the run trained.
      keep_lora: keep a run's adapters apart; a model folder's always are.
      model: new path of the model folder that the run started from; by default the recorded path.
      start: new path of the run that this run continued; by default the recorded path.
      dtype: "bfloat16" or "float32" for everything; None keeps what is stored, float32 for merged weights.
      max_shard_size: of the safetensors files, like "5GB".
      overwrite: replace ``out``.

    Returns:
      ``out``.

    Raises:
      DeepGenError: the folder is neither or damaged, what a run builds on is missing, or ``out`` exists.
    """
    if format not in FORMATS:
        raise DeepGenError(f"--format {format} is unknown; use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if dtype is not None and dtype not in DTYPES:
        raise DeepGenError(f"--dtype {dtype} is unknown; use {' or '.join(DTYPES)}")
    if keep_lora and format == "diffusers":
        raise DeepGenError("a diffusers release has no place for adapters; leave out --keep-lora, or use --format pth")
    folder, out = locate(folder), Path(out)
    shard_bytes = parse_size(max_shard_size)
    given = {"step": step, "ema": ema, "keep-lora": keep_lora, "model": model, "start": start}
    sources: list[dict[str, Any]] = []
    if is_run(folder):
        from .trained_model import open_run

        base = None if model is None else locate(model)
        earlier = None if start is None else Path(start)
        opened, sources = open_run(folder, step=step, ema=ema, keep_lora=keep_lora, model=base, start=earlier)
        merge = not keep_lora
    else:
        opened, merge = open_folder(folder), format == "diffusers"
        if used := [name for name, value in given.items() if value not in (None, False)]:
            raise DeepGenError(f"--{used[0]} is for training runs, and {folder} is a model folder; leave it out")
        if format == "model":
            raise DeepGenError(f"{folder} is a model folder already; copy it, or choose another --format")
    if format != "model" and opened.config.mmdit.estimates > 1:
        raise DeepGenError(
            f"{folder} is a model of few steps with {opened.config.mmdit.estimates} estimates, for which released "
            "layouts have no place; use --format model, or give the folder itself to users"
        )
    tensors = StoredTensors(opened, merge=merge, dtype=None if dtype is None else DTYPES[dtype])
    with staged(out, overwrite=overwrite) as partial:
        if format == "model":
            contents = tensors.contents()
            write_arrays(partial, out, contents, "exporting")
            provenance = {
                "deepgen_jax": deepgen_jax.__version__,
                "sources": sources,
                "options": {"ema": ema, "keep_lora": keep_lora, "dtype": dtype},
                "merged_adapters": tensors.merged,
            }
            write_manifest(partial, contents, provenance)
        else:
            _write_release(partial, out, tensors, format, shard_bytes)
    return out


def _write_release(partial: Path, out: Path, tensors: StoredTensors, format: str, shard_bytes: int) -> None:
    released, model = list(tensors.released()), tensors.model
    specs = {key: spec for key, spec, _ in released}
    total = sum(map(nbytes, specs.values()))
    require_space(out, total)
    writer: TensorWriter
    if format == "diffusers":
        partial.mkdir()
        writer = ReleaseWriter(partial, tensors.config, model.scheduler, specs, shard_bytes)
        shutil.copytree(model.tokenizer, partial / "tokenizer")
    else:
        writer = TorchWriter(partial, specs, {"deepgen_config": hparams_json(tensors.config)})
    try:
        with progress_bar(total, "exporting") as progress:
            for key, _, read in released:
                value = read()
                writer.add(key, value)
                progress(value.nbytes)
                del value  # a view that would keep its array while the next is read
    finally:
        writer.close()


class StoredTensors:
    """Everything of a model, read array by array: as leaves of a model folder or under the keys of a release.

    Args:
      model: where it is.
      merge: fold adapters in; otherwise they stay apart.
      dtype: of everything; None keeps what is stored, float32 for merged weights.
    """

    def __init__(self, model: StoredModel, *, merge: bool, dtype: np.dtype | None) -> None:
        self.model, self._merge, self._dtype = model, merge, dtype
        self.config = model.merged_config() if merge else model.config
        self._groups = model.groups()
        self._read = Reader([model.params[group[0].path], *self._factors_of(group[0])] for group in self._groups)

    @property
    def merged(self) -> int:
        """Number of weights that adapters are folded into."""
        return sum(len(group) for group in self._groups if self.model.adapter(group[0])) if self._merge else 0

    def contents(self) -> Contents:
        """All as leaves to write."""
        apart = [group for group in self._groups if self._apart(group[0])]
        if apart:  # their adapters are written after everything else, and so read then
            params = ([self.model.params[group[0].path]] for group in self._groups)
            self._read = Reader([*params, *(self._factors_of(group[0]) for group in apart)])
        leaves = [self._leaf(number, group) for number, group in enumerate(self._groups)]
        factors = [factor for number, group in enumerate(apart) for factor in self._factors(number, group)]
        return Contents(self.config, self.model.scheduler, self.model.tokenizer, leaves, factors)

    def _leaf(self, number: int, group: Sequence[Weight]) -> Leaf:
        first = group[0]
        stored, dtype = self.model.params[first.path], self._dtype_of(first)
        pieces: list[Piece] = []
        for weight in group:
            blocks = row_blocks(weight, dtype)
            for rows in blocks:
                value = functools.partial(self._value, weight, rows, copy=True)
                pieces.append(Piece(slice_index(weight, rows), (number, len(pieces)), value))
        chunks = (*(1,) * len(first.stack), *chunk_shape(first, blocks))
        return Leaf(first.path, stored.shape, dtype, chunks, pieces)

    def _factors(self, number: int, group: Sequence[Weight]) -> Iterator[Leaf]:
        path, stack = group[0].path, group[0].stack
        for role, stored in self._apart(group[0]):
            pieces = [
                Piece(weight.index, (number, role, weight.index), functools.partial(self._factor, stored, weight, True))
                for weight in group
            ]
            chunks = (*(1,) * len(stack), *stored.shape[len(stack) :])
            yield Leaf((*path[:-1], role), stored.shape, self._dtype or stored.dtype, chunks, pieces)

    def _dtype_of(self, weight: Weight) -> np.dtype:
        merged = self._merge and self.model.adapter(weight) is not None
        return self._dtype or (np.dtype(np.float32) if merged else self.model.params[weight.path].dtype)

    def _value(self, weight: Weight, rows: slice | None = None, copy: bool = False) -> np.ndarray:
        """One tensor in our layout, or a range of its rows; a view of what was read where nothing has to be done."""
        index, adapter = slice_index(weight, rows), self.model.adapter(weight)
        value = self._read(self.model.params[weight.path])[index]
        if adapter is not None and self._merge:
            row, column = index[len(weight.stack) :] or (slice(None), slice(None))
            a, b = self._read(adapter.a)[weight.index], self._read(adapter.b)[weight.index]
            value = folded(value, a[row], b[:, column], adapter.scale)
        return value.astype(self._dtype_of(weight), copy=copy)

    def _factor(self, stored: StoredArray, weight: Weight, copy: bool = False) -> np.ndarray:
        return self._read(stored)[weight.index].astype(self._dtype or stored.dtype, copy=copy)

    def released(self) -> Iterator[tuple[str, jax.ShapeDtypeStruct, Callable[[], np.ndarray]]]:
        """(key, shape and dtype, a function that reads it) of every tensor of a release, in the order of reading."""
        for group in self._groups:
            for weight in group:
                spec = jax.ShapeDtypeStruct(weight.shape, self._dtype_of(weight))
                yield self._key(weight), spec, functools.partial(self._released_value, weight)
                for role, stored in self._apart(weight):
                    shape = stored.shape[len(weight.stack) :][::-1]
                    spec = jax.ShapeDtypeStruct(shape, self._dtype or stored.dtype)
                    yield _adapter_key(weight, role), spec, functools.partial(self._released_factor, stored, weight)

    def _released_value(self, weight: Weight) -> np.ndarray:
        return to_source(weight.transform, self._value(weight), weight.shape)

    def _released_factor(self, stored: StoredArray, weight: Weight) -> np.ndarray:
        return self._factor(stored, weight).T

    def _apart(self, weight: Weight) -> Sequence[tuple[str, StoredArray]]:
        """(role, factor) of the adapter that stays beside a weight."""
        return [] if self._merge else list(zip("ab", self._factors_of(weight), strict=False))

    def _factors_of(self, weight: Weight) -> list[StoredArray]:
        adapter = self.model.adapter(weight)
        return [] if adapter is None else [adapter.a, adapter.b]

    def _key(self, weight: Weight) -> str:
        """The canonical key; weight and bias of a layer with an adapter beside it stand in ``base_layer``."""
        if weight.module not in self._adapted:
            return weight.key
        return f"{weight.module}.base_layer.{weight.key.rpartition('.')[2]}"

    @functools.cached_property
    def _adapted(self) -> set[str]:
        """Names of the layers that have adapters beside them."""
        return {weight.module for group in self._groups for weight in group if self._apart(weight)}


def _adapter_key(weight: Weight, role: str) -> str:
    if weight.path[-1] == "embedding":
        return f"{weight.module}.lora_embedding_{role.upper()}.{_ADAPTER_NAME}"
    return f"{weight.module}.lora_{role.upper()}.{_ADAPTER_NAME}.weight"
