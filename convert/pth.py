"""Checkpoints written by ``torch.save``, read tensor by tensor without running any code they contain.

A ``.pth`` is a zip: a pickle of the structure, and one record for each storage. torch unpickles the structure
(``weights_only=True``) from a copy of the zip whose records are empty, so it never touches the bulk. The records are
then read in place, from a file that may itself be a member of an archive. ``torch.save`` stores records uncompressed;
in files that were zipped again they are compressed, which torch reads, too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import logging
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deepgen_jax.errors import DeepGenError, first_line

from .sources import WEIGHT_DTYPES, Source, SourceTensor, check_names, read_exactly, read_rows
from .state_dicts import find_weights
from .transforms import Shape, rows_of
from .zipparts import DAMAGE, member_start

_LOCAL_HEADER_BYTES = 30
#: Members that torch.load reads, beside the records.
_SMALL = ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment")
#: Largest pickle of a structure that is read. 100,000 tensors take 15 MB; unpickling can take 64 times the size.
MAX_PICKLE_BYTES = 16 * 2**20
#: Flags of zip members that torch does not read: encrypted, patch data, strongly encrypted, masked header.
_UNREADABLE_FLAGS = 0x1 | 0x20 | 0x40 | 0x2000
#: How many times smaller each method of compression that torch reads makes data at most.
_RATIOS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}


class TorchFile(Source):
    """A checkpoint of ``torch.save``.

    Args:
      file: the checkpoint, seekable. Reading in order of position only seeks forward.
      label: its name for messages.
      origin: JSON-ready facts for the provenance (path, bytes).
      sequential: seeking back in the file is slow.
      ema: take the moving average of the weights where there is one.

    Raises:
      DeepGenError: the file is truncated, is no checkpoint, or unpickling it would run code.
    """

    def __init__(
        self, file: BinaryIO, label: str, origin: Mapping[str, Any], *, sequential: bool = False, ema: bool = False
    ) -> None:
        self.label, self._file, self._origin = label, file, origin
        try:
            self._archive = zipfile.ZipFile(file)
            self._records = _members(self._archive)
            # torch looks for everything in the folder of the first member.
            root = next(iter(self._records), "").partition("/")[0] + "/"
            if outside := [name for name in self._records if not name.startswith(root)]:
                raise zipfile.BadZipFile(f"{outside[0]} is outside of {root}")
            small = self._small_members(root)
        except DeepGenError:
            raise
        except (*DAMAGE, ValueError) as error:
            raise DeepGenError(f"{label} is truncated or damaged ({first_line(error)}); download it again") from None
        if "data.pkl" not in small:
            raise DeepGenError(f"{label} is a zip file, but not a torch checkpoint (no data.pkl inside)")
        if small.get("byteorder", b"little") != b"little":
            raise DeepGenError(f"{label} was written on a big-endian machine; save it again on a little-endian one")
        records = {name: info for name, info in self._records.items() if name.startswith(f"{root}data/")}
        self.sequential = sequential or any(info.compress_type for info in records.values())
        self._digest = hashlib.sha256(small["data.pkl"]).hexdigest()
        loaded, record_names = _unpickle(small, root, list(records), label)
        weights = find_weights(loaded, label, ema=ema)
        self.layout, self.ignored, self.hparams = weights.layout, weights.ignored, weights.hparams
        self.average = weights.average
        self.tensors = {name: self._tensor(name, tensor, record_names) for name, tensor in weights.tensors.items()}
        check_names(self.tensors, label)

    def _small_members(self, root: str) -> dict[str, bytes]:
        """The small members of the zip that ``torch.load`` reads, read by torch.

        Raises:
          DeepGenError: one is too large, however little it takes while compressed.
          RuntimeError: torch refuses the zip; it is stricter than Python's zipfile.
        """
        _require_torch(self.label)
        import torch

        for name in _SMALL:
            if root + name in self._records and self._records[root + name].file_size > MAX_PICKLE_BYTES:
                limit = f"{MAX_PICKLE_BYTES // 2**20} MiB"
                raise DeepGenError(f"{self.label}: {name} has more than {limit}; save the state dict alone")
        self._file.seek(0)
        # What torch.load opens a zip with; there is no public way to open one without reading its records.
        reader = torch._C.PyTorchFileReader(self._file)
        reader.get_all_records()
        small = {name: reader.get_record(name) for name in _SMALL if root + name in self._records}
        reader.serialization_id()
        for name in _SMALL[3:]:  # numbers, or torch.load refuses them
            int(small.pop(name, b"0"))
        return small

    def _tensor(self, name: str, tensor: Any, record_names: Mapping[int, str]) -> SourceTensor:
        """The tensor that a fake tensor of the structure stands for."""
        check_tensor(tensor, name, self.label)
        # torch says where a storage is by its offset in the zip that it reads.
        record_name = record_names.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or 0)
        if record_name is None:
            raise DeepGenError(f"{self.label}: {name} has no values in this file; save the weights themselves")
        record = self._records[record_name]
        shape, strides, offset = tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()
        held = record.file_size
        if record.compress_type == zipfile.ZIP_STORED and record.compress_size != held:
            raise DeepGenError(f"{self.label}: the record of {name} has two sizes; download it again")
        if held > (record.compress_size + 1) * _RATIOS[record.compress_type]:
            raise DeepGenError(f"{self.label}: the size of the record of {name} is damaged; download it again")
        end = _end(shape, strides, offset) * tensor.element_size()
        if tensor.untyped_storage().nbytes() != held or end > held:
            raise DeepGenError(f"{self.label}: the record of {name} is too short or too long; download it again")
        position = record.header_offset + _LOCAL_HEADER_BYTES + offset * tensor.element_size()
        dtype = dtype_name(tensor)
        load = functools.partial(self._load, record, shape, dtype, strides, offset)
        return SourceTensor(self, name, shape, dtype, load, position)

    def _load(
        self, record: zipfile.ZipInfo, shape: Shape, dtype: str, strides: Shape, offset: int, rows: slice | None
    ) -> np.ndarray:
        """A tensor, or a range of its rows, that is stored in ``record`` at an offset and with strides in elements."""
        view = functools.partial(_read, shape=shape, dtype=WEIGHT_DTYPES[dtype], strides=strides, offset=offset)
        try:
            if record.compress_type == zipfile.ZIP_STORED:
                return view(self._file, member_start(self._file, record), rows=rows, label=self.label)
            with self._archive.open(record) as data:
                value = view(data, 0, rows=rows, label=self.label)  # type: ignore[arg-type]
                while data.read(2**20):  # at the end its checksum is checked
                    pass
                return value
        except DAMAGE as error:
            raise DeepGenError(f"{self.label} is damaged ({first_line(error)}); download it again") from None

    def provenance(self) -> dict[str, Any]:
        return {**self._origin, "layout": self.layout, "header_sha256": self._digest}

    def close(self) -> None:
        self._file.close()


class LegacyTorchFile(Source):
    """A checkpoint of ``torch.save`` before torch 1.6: one pickle, which has to be read whole.

    Raises:
      DeepGenError: the file is truncated, is no checkpoint, or unpickling it would run code.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any], *, ema: bool = False) -> None:
        self.label, self._origin = str(path), origin
        weights = find_weights(_load(path, self.label), self.label, ema=ema)
        self.layout, self.ignored = weights.layout, weights.ignored
        self.hparams, self.average = weights.hparams, weights.average
        check_names(weights.tensors, self.label)
        for name, tensor in weights.tensors.items():
            check_tensor(tensor, name, self.label)
        self.tensors = {
            name: SourceTensor(self, name, tuple(t.shape), dtype_name(t), functools.partial(_rows, t))
            for name, t in weights.tensors.items()
        }

    def provenance(self) -> dict[str, Any]:
        table = sorted((name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items())
        digest = hashlib.sha256(repr(table).encode()).hexdigest()
        return {**self._origin, "layout": self.layout, "header_sha256": digest}


def dtype_name(tensor: Any) -> str:
    """The name of a torch tensor's dtype in safetensors; torch's own for dtypes that weights do not have."""
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return names.get(tensor.dtype, str(tensor.dtype))


def check_tensor(tensor: Any, name: str, label: str) -> None:
    """Raises a DeepGenError unless a torch tensor is plain: its values stand in one storage, strided."""
    import torch

    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else "sparse"
    elif tensor.device.type == "meta":
        kind = "meta"
    elif tensor.is_quantized:
        kind = "quantized"
    elif tensor.is_conj() or tensor.is_neg():
        kind = "lazily negated or conjugated"
    else:
        return
    raise DeepGenError(f"{label}: {name} is a {kind} tensor; save it as a plain one, with its values")


def _rows(tensor: Any, rows: slice | None) -> np.ndarray:
    """A torch tensor, or a range of its rows, as a numpy array."""
    import torch

    values = tensor.detach().contiguous()
    values = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    return rows_of(values.numpy().view(WEIGHT_DTYPES[dtype_name(tensor)]), rows)


def _read(
    file: BinaryIO,
    start: int,
    *,
    shape: Shape,
    dtype: np.dtype,
    strides: Shape,
    offset: int,
    rows: slice | None,
    label: str,
) -> np.ndarray:
    """A tensor, or a range of its rows, of a record whose data are at ``start`` of a file."""
    if strides == _contiguous(shape):
        return read_rows(file, start + offset * dtype.itemsize, shape, dtype, rows, label)
    data = read_exactly(file, start, _end(shape, strides, offset) * dtype.itemsize, label).view(dtype)
    in_bytes = tuple(stride * dtype.itemsize for stride in strides)
    tensor = np.lib.stride_tricks.as_strided(data[offset:], shape, in_bytes)
    return np.ascontiguousarray(rows_of(tensor, rows))


def _end(shape: Shape, strides: Shape, offset: int) -> int:
    """Number of a record's elements up to the last one of a tensor; offset and strides in elements."""
    if not math.prod(shape):
        return 0
    return 1 + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _contiguous(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by name, if torch reads the zip, too.

    Raises:
      zipfile.BadZipFile: torch would reject it, or read a different member.
    """
    infos = archive.infolist()
    for info in infos:
        if info.compress_type not in _RATIOS:
            raise zipfile.BadZipFile(f"{info.filename} is compressed in a way that torch does not read")
        if not info.filename.isascii() or info.flag_bits & _UNREADABLE_FLAGS:
            raise zipfile.BadZipFile(f"the table has a strange entry {info.filename!a}")
    if len({info.filename.lower() for info in infos}) < len(infos):
        raise zipfile.BadZipFile("the table has an entry twice")
    if infos and all(info.header_offset for info in infos):
        raise zipfile.BadZipFile("it does not begin with its first member")
    return {info.filename: info for info in infos}


def _unpickle(small: Mapping[str, bytes], root: str, records: list[str], label: str) -> tuple[Any, dict[int, str]]:
    """The checkpoint's structure with tensors without data, and the record that each ``_checkpoint_offset`` means."""
    _require_torch(label)
    from torch._subclasses.fake_tensor import FakeTensorMode

    skeleton, names = io.BytesIO(), {}
    with zipfile.ZipFile(skeleton, "w") as archive:
        for name, content in small.items():
            archive.writestr(root + name, content)
        for name in records:
            archive.writestr(name, b"")
            info = archive.getinfo(name)
            names[info.header_offset + _LOCAL_HEADER_BYTES + len(name.encode())] = name
    skeleton.seek(0)
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # logs tracebacks of what is refused
    disabled, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode():
            return _load(skeleton, label), names
    finally:
        logger.disabled = disabled


def _load(file: Path | io.BytesIO, label: str) -> Any:
    """Loads a file with ``torch.load`` without running code in it."""
    _require_torch(label)
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(label, error) from None
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        reason = first_line(error)
        if "ompressed tensor" in reason:
            raise DeepGenError(f"{label} holds a sparse tensor; save it as a plain one, with its values") from None
        raise DeepGenError(f"{label} is truncated or no checkpoint ({reason}); download it again") from None


def _require_torch(label: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise DeepGenError(f"reading {label} needs PyTorch; install it with pip install 'deepgen-jax[convert]'")


def _refused(label: str, error: Exception) -> DeepGenError:
    """The error for a pickle that ``weights_only`` does not accept, naming what it would have called."""
    found = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:global|class|operand)[^`\n]*?:? (\S+)", str(error))
    what = next((group for group in found.groups() if group), "") if found else ""
    reason = f"it calls {what}, which can run code" if what else "its pickle is not plain weights"
    return DeepGenError(
        f"{label} is refused: {reason}; save its state dict alone with torch.save on a machine that trusts it"
    )
