"""Writers of weight files: tensors arrive one by one, in the order announced, and go straight to disk."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax
import numpy as np

from deepgen_jax.errors import DeepGenError

from .sources import WEIGHT_DTYPES
from .transforms import Shape

_DTYPE_NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
_ALIGNMENT = 64


#: Tensors that are going to be written, by key and in this order.
TensorSpecs = Mapping[str, jax.ShapeDtypeStruct]


def nbytes(spec: jax.ShapeDtypeStruct) -> int:
    """Size of a tensor's values."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


class TensorWriter(Protocol):
    """Receives the tensors of an export."""

    def add(self, key: str, rows: np.ndarray) -> None:
        """Writes a tensor, or the next part of it in row-major order; keys come in the order announced."""

    def close(self) -> None:
        """Completes the files."""


class SafetensorsWriter:
    """One set of ``.safetensors`` files in a folder: a single file, or shards with an index.

    Args:
      folder: where to write.
      stem: name of the file without its suffix ("model").
      specs: the tensors in the order in which they will be added.
      max_shard_bytes: a file holds no more, unless a single tensor is larger.
    """

    def __init__(self, folder: Path, stem: str, specs: TensorSpecs, max_shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
        size = 0
        for key, spec in specs.items():
            if shards[-1] and size + nbytes(spec) > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][key] = spec
            size += nbytes(spec)
        count = len(shards)
        names = [f"{stem}.safetensors"]
        if count > 1:
            names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            index = {
                "metadata": {"total_size": sum(map(nbytes, specs.values()))},
                "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
            }
            write_json(folder / f"{stem}.safetensors.index.json", index)
        self._paths = {key: folder / name for name, shard in zip(names, shards, strict=True) for key in shard}
        self._specs = specs
        self._headers = {folder / name: _header(shard) for name, shard in zip(names, shards, strict=True)}
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def add(self, key: str, rows: np.ndarray) -> None:
        path = self._paths[key]
        if path != self._path or self._file is None:
            self.close()
            self._path, self._file = path, path.open("wb")
            self._file.write(self._headers[path])
        _write_array(self._file, rows, self._specs[key].dtype)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _header(specs: TensorSpecs) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, spec in specs.items():
        offsets = [start, start + nbytes(spec)]
        table[key] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        start += nbytes(spec)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_array(file: Any, rows: np.ndarray, dtype: np.dtype) -> None:
    if rows.dtype != dtype:
        raise TypeError(f"announced {dtype}, got {rows.dtype}")
    file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


class _Storage(NamedTuple):
    dtype: np.dtype
    number: int
    size: int


class _Tensor:
    """Stands for a tensor in the pickle."""

    def __init__(self, storage: _Storage, shape: Shape) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        import torch

        classes = {"F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage}
        return ("storage", classes[_DTYPE_NAMES[obj.dtype]], str(obj.number), "cpu", obj.size)


class TorchWriter:
    """A ``.pth`` as ``torch.save`` writes it, holding {"state_dict": tensors, "meta": meta}.

    Args:
      path: the file.
      specs: the tensors in the order in which they will be added.
      meta: plain values to store beside them.
    """

    def __init__(self, path: Path, specs: TensorSpecs, meta: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._specs = specs
        self._numbers = {key: number for number, key in enumerate(specs)}
        state = OrderedDict(
            (key, _Tensor(_Storage(spec.dtype, number, math.prod(spec.shape)), spec.shape))
            for number, (key, spec) in enumerate(specs.items())
        )
        program = io.BytesIO()
        _Pickler(program, protocol=2).dump({"state_dict": state, "meta": meta})
        self._file = path.open("wb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._root = "archive"
        for name, data in (("data.pkl", program.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            self._archive.writestr(zipfile.ZipInfo(f"{self._root}/{name}"), data)
        self._key: str | None = None
        self._record: Any = None

    def add(self, key: str, rows: np.ndarray) -> None:
        if key != self._key:
            self._end_record()
            self._key, self._record = key, self._begin_record(key)
        _write_array(self._record, rows, self._specs[key].dtype)

    def _begin_record(self, key: str) -> Any:
        """Opens the record of a tensor, its data aligned so that torch can map it into memory."""
        info = zipfile.ZipInfo(f"{self._root}/data/{self._numbers[key]}")
        info.file_size = nbytes(self._specs[key])
        zip64 = 20 if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0
        start = self._file.tell() + 30 + len(info.filename) + zip64 + 4
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return self._archive.open(info, "w")

    def _end_record(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None

    def close(self) -> None:
        self._end_record()
        self._archive.close()
        self._file.close()


def parse_size(text: str) -> int:
    """ "5GB", "500MB", "10KB" or plain bytes -> bytes.

    Raises:
      DeepGenError: it is none of these.
    """
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    number = text.upper().rstrip("GMKB ")
    unit = text.upper()[len(number) :].strip()
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise DeepGenError(f"--max-shard-size {text} is not a size; write it like 5GB or 500MB")
    return int(number) * units[unit]


def write_json(path: Path, values: Any) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
