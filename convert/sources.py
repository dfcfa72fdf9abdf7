"""Lazy readers of weight files behind one interface: names, shapes and dtypes first, then one tensor at a time.

Reading is by position in the file, not by memory maps: mapped pages would count as the process's memory.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from deepgen_jax.errors import DeepGenError, first_line
from deepgen_jax.files import open_regular
from deepgen_jax.strict_json import parse_json, read_json

from .transforms import Shape, row_count

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: Dtypes that weights may have, by their name in safetensors.
WEIGHT_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")
#: As in the safetensors library.
_MAX_HEADER_BYTES = 100_000_000


def check_names(names: Iterable[Any], label: str) -> None:
    """Raises a DeepGenError unless all names of tensors are text that can be printed."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            kind = "no name" if isinstance(name, str) else f"of type {type(name).__name__}, not a name"
            raise DeepGenError(f"{label}: the key {name!r} of a tensor is {kind}; save a state dict of a module")


@dataclass(frozen=True, eq=False)
class SourceTensor:
    """One tensor of a source, read on demand.

    Attributes:
      source: holds it.
      name: in the source.
      shape: as stored.
      dtype: as safetensors spells it ("BF16"); torch's name for dtypes that weights do not have.
      load: reads a range of its rows (None: all); :meth:`read` calls it.
      position: offset in the source; reading in order of position is sequential.
    """

    source: Source
    name: str
    shape: Shape
    dtype: str
    load: Callable[[slice | None], np.ndarray] = field(repr=False)
    position: int = 0

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of what :meth:`read` returns; ``dtype`` must be one of ``WEIGHT_DTYPES``."""
        return WEIGHT_DTYPES[self.dtype]

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The tensor, or a range of its rows (see ``row_count``). ``dtype`` must be one of ``WEIGHT_DTYPES``.

        Raises:
          DeepGenError: the file is truncated or damaged.
        """
        return self.load(rows)

    def __str__(self) -> str:
        return f"{self.name} of {self.source.label}"


class Source(abc.ABC):
    """Named tensors of one release or part of one.

    Attributes:
      label: path for messages.
      layout: what kind of release it is, in words.
      tensors: its tensors by name.
      ignored: further entries that are no weights, with the reason.
      sequential: going back in the file is slow, since it means decompressing it again.
      average: its tensors are the moving average of the trained ones.
      hparams: hyper-parameters stored beside the weights, in the form of ``--hparams``; only our exports have them.
    """

    label: str
    layout: str
    tensors: Mapping[str, SourceTensor]
    ignored: Mapping[str, str] = {}
    sequential: bool = False
    average: bool = False
    hparams: Mapping[str, Any] | None = None

    @abc.abstractmethod
    def provenance(self) -> dict[str, Any]:
        """JSON-ready identity: path, layout, size in bytes and a hash of the file's table of contents."""

    def close(self) -> None:  # noqa: B027 - optional to implement
        """Closes open files."""


def read_exactly(file: BinaryIO, position: int, count: int, label: str) -> np.ndarray:
    """``count`` bytes at ``position`` as a uint8 array.

    Raises:
      DeepGenError: the file ends before.
    """
    buffer = np.empty(count, np.uint8)
    view = buffer.data
    file.seek(position)
    done = 0
    while done < count:
        read = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not read:
            raise DeepGenError(f"{label} is truncated: it ends inside a tensor; download it again")
        done += read
    return buffer


class SafetensorsFile(Source):
    """One ``.safetensors`` file.

    The safetensors library checks the header, so that what it refuses is refused here: offsets that overlap, leave
    gaps or do not fit shape and dtype, and files that are too short or too long.
    """

    def __init__(self, path: Path, layout: str = "safetensors") -> None:
        """Reads the header.

        Raises:
          DeepGenError: the file is no safetensors file, or it is truncated or damaged.
        """
        self.label, self.layout = str(path), layout
        self._path = path
        self._file = open_regular(path)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = self._path.stat().st_size
        start = self._file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise DeepGenError(f"{self.label} is not a safetensors file, or its start is damaged; download it again")
        header = self._file.read(length)
        if len(header) < length:
            raise DeepGenError(f"{self.label} is truncated: its header is cut off; download it again")
        try:
            with safe_open(self._path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            missing = _missing_bytes(header, 8 + length, size)
            if missing:
                raise DeepGenError(f"{self.label} is truncated: {missing} are missing; download it again") from None
            reason = first_line(error).removeprefix("Error while deserializing header: ")
            raise DeepGenError(f"{self.label}: its header cannot be used ({reason}); download it again") from None
        table = parse_json(header.decode("utf-8"), f"{self.label}: its header", "download it again")
        table.pop("__metadata__", None)
        check_names(table, self.label)
        self.tensors = {
            name: self._tensor(name, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in table.items()
        }
        self._size, self._digest = size, hashlib.sha256(header).hexdigest()

    def _tensor(self, name: str, shape: Shape, dtype: str, position: int) -> SourceTensor:
        def load(rows: slice | None) -> np.ndarray:
            return read_rows(self._file, position, shape, WEIGHT_DTYPES[dtype], rows, self.label)

        return SourceTensor(self, name, shape, dtype, load, position)

    def provenance(self) -> dict[str, Any]:
        return {"path": self.label, "layout": self.layout, "bytes": self._size, "header_sha256": self._digest}

    def close(self) -> None:
        self._file.close()


def _missing_bytes(header: bytes, start: int, size: int) -> str | None:
    """What a file of ``size`` bytes whose tensors begin at ``start`` lacks, by a header that may be damaged."""
    try:
        table = parse_json(header, "header")
        end = start + max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
        return f"{end - size:,} of {end:,} bytes" if end > size else None
    except (DeepGenError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def read_rows(
    file: BinaryIO, position: int, shape: Shape, dtype: np.dtype, rows: slice | None, label: str
) -> np.ndarray:
    """A range of the rows (None: all) of a contiguous tensor that starts at ``position``."""
    if rows is not None:
        count = row_count(shape)
        start, stop, _ = rows.indices(count)
        position += start * (math.prod(shape) // count) * dtype.itemsize
        shape = (1, stop - start, *shape[2:]) if shape[0] != count else (stop - start, *shape[1:])
    return read_exactly(file, position, math.prod(shape) * dtype.itemsize, label).view(dtype).reshape(shape)


@dataclass
class Shards(Source):
    """Several files as one source; positions keep the order of the files."""

    label: str
    layout: str
    files: list[SafetensorsFile]
    tensors: Mapping[str, SourceTensor] = field(init=False)

    def __post_init__(self) -> None:
        tensors, start = {}, 0
        for file in self.files:
            for name, tensor in file.tensors.items():
                tensors[name] = dataclasses.replace(tensor, source=self, position=start + tensor.position)
            start += file.provenance()["bytes"]
        self.tensors = tensors

    def provenance(self) -> dict[str, Any]:
        parts = [file.provenance() for file in self.files]
        digest = hashlib.sha256("".join(part["header_sha256"] for part in parts).encode()).hexdigest()
        size = sum(part["bytes"] for part in parts)
        return {"path": self.label, "layout": self.layout, "bytes": size, "header_sha256": digest}

    def close(self) -> None:
        for file in self.files:
            file.close()


class _FileSet(NamedTuple):
    """The files of one set of weights in a folder; ``variant`` is "fp16" in ``model.fp16.safetensors``, else ""."""

    stem: str
    variant: str
    indexes: list[Path]
    files: list[Path]


def open_safetensors(folder: Path, layout: str) -> Source:
    """The safetensors weights of a folder: one file, or shards with an index.

    Of several variants of the weights (``model.safetensors`` and ``model.fp16.safetensors``) the one without a name is
    taken; the others are copies of it in lower precision.

    Raises:
      DeepGenError: there are none, several sets, or the files do not agree with the index.
    """
    sets = _file_sets(folder)
    if not sets:
        raise DeepGenError(f"{folder} holds no .safetensors file; download the weights of this part")
    plain = [found for found in sets if not found.variant] if len({found.stem for found in sets}) == 1 else sets
    chosen = plain if len(plain) == 1 else sets
    if len(chosen) > 1:
        names = ", ".join((found.indexes or found.files)[0].name for found in chosen[:4])
        raise DeepGenError(f"{folder} holds several sets of weights ({names}); keep one set of weights")
    found = chosen[0]
    if len(found.indexes) > 1 or (not found.indexes and len(found.files) > 1):
        names = ", ".join(path.name for path in (found.indexes or found.files)[:4])
        fix = "keep one index" if found.indexes else "add their *.safetensors.index.json or keep one file"
        raise DeepGenError(f"{folder} holds several sets of weights ({names}); {fix}")
    if found.indexes:
        return _open_shards(folder, found.indexes[0], layout)
    return SafetensorsFile(found.files[0], layout)


def _file_sets(folder: Path) -> list[_FileSet]:
    """The sets of weights in a folder, by the names that transformers and diffusers give to files and variants.

    These are ``S.safetensors``, ``S-00001-of-00002.safetensors`` and ``S.safetensors.index.json``; with a variant V
    ``S.V.safetensors``, ``S.V-00001-of-00002.safetensors`` or ``S-00001-of-00002.V.safetensors``, and
    ``S.safetensors.index.V.json`` or ``S.V.safetensors.index.json``.
    """
    sets: dict[tuple[str, str], _FileSet] = {}
    for path in sorted(folder.glob("*.safetensors*")):
        words = _SHARD.sub("", path.name).split(".")
        index = words[-1] == "json" and "index" in words
        if not index and words[-1] != "safetensors":
            continue
        stem, *rest = [word for word in words if word not in ("safetensors", "index", "json")] or [""]
        found = sets.setdefault((stem, ".".join(rest)), _FileSet(stem, ".".join(rest), [], []))
        (found.indexes if index else found.files).append(path)
    return list(sets.values())


def _open_shards(folder: Path, index: Path, layout: str) -> Shards:
    values = read_json(index, "download it again")
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DeepGenError(f"{index} is not a safetensors index; download it again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or "\0" in name]
    if outside:
        raise DeepGenError(f"{index} names {outside[0]!r}, which is no file beside it; download it again")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise DeepGenError(f"{folder}: {absent[0]} is missing though {index.name} names it; download it again")
    files: list[SafetensorsFile] = []
    try:
        for name in names:
            files.append(SafetensorsFile(folder / name, layout))
            expected = {tensor for tensor, file in weight_map.items() if file == name}
            wrong = sorted(expected ^ set(files[-1].tensors))
            if wrong:
                what = "lacks" if wrong[0] in expected else "holds, unlisted,"
                raise DeepGenError(
                    f"{folder / name} {what} {wrong[0]} ({len(wrong)} differ from {index.name}); download both again"
                )
    except BaseException:
        for file in files:
            file.close()
        raise
    return Shards(str(folder), layout, files)
