"""``tf.train.Example`` records without TensorFlow: its protocol buffers, read and written by hand.

Wire format: Example {1: Features {1: map<string, Feature>}}; Feature {1: BytesList, 2: FloatList, 3: Int64List}, each
list {1: values}, numbers packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

#: Bytes, float32 or int64 values.
Feature: TypeAlias = list[bytes] | np.ndarray

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def parse_example(data: bytes) -> dict[str, Feature]:
    """Features of a serialised example by name.

    Raises:
      ValueError: the bytes are no example.
    """
    try:
        features: dict[str, Feature] = {}
        for number, message in _fields(memoryview(data)):
            for inner, entry in _fields(_message(message)) if number == 1 else ():
                if inner == 1:
                    pair = dict(_fields(_message(entry)))
                    features[bytes(_message(pair[1])).decode()] = _feature(_message(pair.get(2, memoryview(b""))))
        return features
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"no tf.train.Example: {error}") from error


def write_example(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """Serialises features; float arrays become float32, integer arrays int64."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.floating):
            feature = _field(2, _field(1, values.astype("<f4").tobytes()))
        elif isinstance(values, np.ndarray):
            packed = b"".join(_varint(int(value) % 2**64) for value in values.ravel())
            feature = _field(3, _field(1, packed))
        else:
            feature = _field(1, b"".join(_field(1, value) for value in values))
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def _feature(data: memoryview) -> Feature:
    for number, content in _fields(data):
        values = [value for inner, value in _fields(_message(content)) if inner == 1]
        if number == 1:
            return [bytes(_message(value)) for value in values]
        if number == 2:
            return np.frombuffer(b"".join(_message(value) for value in values), "<f4")
        if number == 3:
            numbers = [n for value in values for n in ([value] if isinstance(value, int) else _varints(value))]
            return np.array(numbers, np.uint64).astype(np.int64)
    return []


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message; varints are ints, everything else is bytes."""
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _read_varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, position = _read_varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {kind}")
        if position + size > len(data):
            raise IndexError("data end early")
        yield tag >> 3, data[position : position + size]
        position += size


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise IndexError("a number where a message is expected")
    return value


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _read_varint(data, position)
        yield value


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError("a number is too long")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content
