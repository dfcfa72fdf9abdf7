"""Checkpoints written by ``torch.save``, read tensor by tensor without running any code they contain.

A ``.pth`` is a zip: a pickle of the structure, and one stored record for each storage. torch unpickles the structure
(``weights_only=True``) from a copy of the zip whose records are empty, so it never touches the bulk. The records are
then read where they stand in the file, which may itself be a member of an archive.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deepgen_jax.errors import DeepGenError

from .sources import WEIGHT_DTYPES, Source, TensorInfo, read_exactly, read_rows
from .transforms import Shape, rows_of
from .zipparts import DAMAGE

#: Entries that hold the weights where a checkpoint is more than a bare state dict, and the layout that they mean.
_WRAPPERS = {"state_dict": "mmengine checkpoint", "module": "DeepSpeed checkpoint"}
_LOCAL_HEADER_BYTES = 30


class _Slot(NamedTuple):
    """Where a tensor's elements are: a record of the zip, then an offset and strides in elements."""

    record: zipfile.ZipInfo
    offset: int
    strides: Shape


class TorchFile(Source):
    """A checkpoint of ``torch.save``.

    Args:
      file: the checkpoint, seekable. Reading in order of position only seeks forward.
      label: its name for messages.
      origin: JSON-ready facts for the provenance (path, bytes).
      sequential: seeking back in the file is slow.

    Raises:
      DeepGenError: the file is truncated, is no checkpoint, or unpickling it would run code.
    """

    def __init__(self, file: BinaryIO, label: str, origin: Mapping[str, Any], *, sequential: bool = False) -> None:
        self.label, self._file, self._origin, self.sequential = label, file, origin, sequential
        try:
            archive = zipfile.ZipFile(file)
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = pickles[0].removesuffix("data.pkl") if pickles else ""
            program = archive.read(pickles[0]) if pickles else b""
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"
        except DAMAGE as error:
            raise DeepGenError(f"{label} is truncated or damaged ({error}); download it again") from None
        if len(pickles) != 1:
            raise DeepGenError(f"{label} is a zip file, but not a torch checkpoint (no data.pkl inside)")
        if order != b"little":
            raise DeepGenError(f"{label} was written on a big-endian machine; save it again on a little-endian one")
        records = {i.filename: i for i in archive.infolist() if i.filename.startswith(f"{root}data/")}
        self._digest = hashlib.sha256(program).hexdigest()
        self._slots: dict[str, _Slot] = {}
        loaded = _unpickle(program, root, records, label)
        state_dict, self.layout, self.ignored = _find_weights(loaded, label)
        meta = loaded.get("meta")
        self.hparams = meta.get("deepgen_config") if isinstance(meta, Mapping) else None
        self.tensors = self._locate(state_dict, records)

    def _locate(self, state_dict: Mapping[str, Any], records: Mapping[str, zipfile.ZipInfo]) -> dict[str, TensorInfo]:
        dtypes = _dtype_names()
        infos = {}
        for name, tensor in state_dict.items():
            record = records[tensor.record_name]
            shape, itemsize = tuple(tensor.shape), tensor.element_size()
            slot = _Slot(record, tensor.storage_offset(), tuple(tensor.stride()))
            last = slot.offset + sum((n - 1) * s for n, s in zip(shape, slot.strides, strict=True))
            if math.prod(shape) and (last + 1) * itemsize > record.file_size:
                raise DeepGenError(f"{self.label}: the record of {name} is too short; download it again")
            position = record.header_offset + _LOCAL_HEADER_BYTES + slot.offset * itemsize
            infos[name] = TensorInfo(shape, dtypes.get(tensor.dtype, str(tensor.dtype)), position)
            self._slots[name] = slot
        return infos

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        info, slot = self.tensors[name], self._slots[name]
        dtype = WEIGHT_DTYPES[info.dtype]
        try:
            header = read_exactly(self._file, slot.record.header_offset, _LOCAL_HEADER_BYTES, self.label).tobytes()
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            start = slot.record.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
            if slot.strides == _contiguous(info.shape):
                position = start + slot.offset * dtype.itemsize
                return read_rows(self._file, position, info.shape, dtype, rows, self.label)
            data = read_exactly(self._file, start, slot.record.file_size, self.label).view(dtype)
        except DAMAGE as error:
            raise DeepGenError(f"{self.label} is damaged ({error}); download it again") from None
        strides = tuple(s * dtype.itemsize for s in slot.strides)
        tensor = np.lib.stride_tricks.as_strided(data[slot.offset :], info.shape, strides)
        return np.ascontiguousarray(rows_of(tensor, rows))

    def provenance(self) -> dict[str, Any]:
        return {**self._origin, "layout": self.layout, "header_sha256": self._digest}

    def close(self) -> None:
        self._file.close()


class LegacyTorchFile(Source):
    """A checkpoint of ``torch.save`` before torch 1.6: one pickle, which has to be read whole.

    Raises:
      DeepGenError: the file is truncated, is no checkpoint, or unpickling it would run code.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        self.label, self._origin = str(path), origin
        self._tensors, self.layout, self.ignored = _find_weights(_load(path, self.label), self.label)
        dtypes = _dtype_names()
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), dtypes.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach().contiguous()
        values = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return rows_of(values.numpy().view(WEIGHT_DTYPES[self.tensors[name].dtype]), rows)

    def provenance(self) -> dict[str, Any]:
        table = sorted((name, info.dtype, info.shape) for name, info in self.tensors.items())
        digest = hashlib.sha256(repr(table).encode()).hexdigest()
        return {**self._origin, "layout": self.layout, "header_sha256": digest}


def _contiguous(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _dtype_names() -> dict[Any, str]:
    import torch

    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _unpickle(program: bytes, root: str, records: Mapping[str, zipfile.ZipInfo], label: str) -> Any:
    """The checkpoint's structure; its tensors have no data, and an attribute ``record_name``."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    # torch tells where a storage is by its offset in the zip it reads, so a record's offset identifies it.
    skeleton, names = io.BytesIO(), {}
    with zipfile.ZipFile(skeleton, "w") as archive:
        archive.writestr(f"{root}data.pkl", program)
        archive.writestr(f"{root}byteorder", b"little")
        archive.writestr(f"{root}version", b"3\n")
        for name in records:
            archive.writestr(name, b"")
            info = archive.getinfo(name)
            names[info.header_offset + _LOCAL_HEADER_BYTES + len(name.encode())] = name
    skeleton.seek(0)
    with FakeTensorMode():
        loaded = _load(skeleton, label)

    def annotate(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            node.record_name = names[node.untyped_storage()._checkpoint_offset or 0]  # type: ignore[attr-defined]
        elif isinstance(node, Mapping):
            for child in node.values():
                annotate(child)

    annotate(loaded)
    return loaded


def _load(file: Path | io.BytesIO, label: str) -> Any:
    """What ``torch.load`` makes of a file, without running any code in it."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(label, error) from None
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DeepGenError(f"{label} is truncated or no checkpoint ({reason}); download it again") from None


def _refused(label: str, error: Exception) -> DeepGenError:
    """The error for a pickle that ``weights_only`` does not accept, naming what it would have called."""
    found = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:global|class|operand)[^`\n]*?:? (\S+)", str(error))
    what = next((group for group in found.groups() if group), "") if found else ""
    reason = f"it calls {what}, which can run code" if what else "its pickle is not plain weights"
    return DeepGenError(
        f"{label} is refused: {reason}; save its state dict alone with torch.save on a machine that trusts it"
    )


def _find_weights(loaded: Any, label: str) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The state dict inside a checkpoint, the layout's name and the entries left out with the reason."""
    import torch

    if not isinstance(loaded, Mapping):
        raise DeepGenError(f"{label} holds a {type(loaded).__name__}, expected a state dict")
    state, layout, ignored = loaded, "bare state dict", {}
    wrapper = next((key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
    if wrapper is not None:
        state, layout = loaded[wrapper], _WRAPPERS[wrapper]
        ignored = {str(name): "training state beside the weights" for name in loaded if name != wrapper}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        names = ", ".join(str(name) for name in list(loaded)[:5]) or "nothing"
        raise DeepGenError(
            f"{label} holds no weights (entries: {names}); expected a state dict, or one under {' or '.join(_WRAPPERS)}"
        )
    ignored |= {str(name): "not a tensor" for name in state if name not in tensors}
    return tensors, layout, ignored
