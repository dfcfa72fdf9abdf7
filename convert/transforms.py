"""Transforms between tensors of a PyTorch release and our parameters."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]


def row_count(shape: Shape) -> int:
    """Length of the axis of a source tensor that is its rows: the first, or the second of a table [1, n, d]."""
    return shape[1] if shape[0] == 1 and len(shape) > 1 else shape[0]


def rows_of(tensor: np.ndarray, rows: slice | None) -> np.ndarray:
    """A range of a source tensor's rows; None: all."""
    if rows is None:
        return tensor
    return tensor[:, rows] if tensor.shape[0] == 1 and tensor.ndim > 1 else tensor[rows]


class Transform(enum.Enum):
    """The layouts that occur; each is a bijection that only moves elements."""

    #: Same layout.
    SAME = "same"
    #: Linear weight [out, in] <-> kernel [in, out].
    LINEAR = "linear"
    #: Convolution weight [out, in, h, w] <-> kernel [h, w, in, out].
    CONV = "conv"
    #: Patch convolution [out, c, p, q] <-> kernel [p * q * c, out]: a patch is flattened channels last.
    PATCH_CHANNELS_LAST = "patch_channels_last"
    #: Patch convolution [out, c, t, p, q] <-> kernel [c * t * p * q, out]: a patch is flattened channels first.
    PATCH_CHANNELS_FIRST = "patch_channels_first"
    #: Table [1, n, d] <-> [n, d].
    TABLE = "table"

    @property
    def row_axis(self) -> int | None:
        """The target's axis for the source's rows, where rows can be converted one by one, else None."""
        return {Transform.SAME: 0, Transform.LINEAR: 1, Transform.TABLE: 0}.get(self)


def target_shape(transform: Transform, shape: Shape) -> Shape:
    """Shape of our parameter for a source tensor of ``shape``."""
    match transform:
        case Transform.SAME:
            return shape
        case Transform.LINEAR:
            return shape[::-1]
        case Transform.CONV:
            return (*shape[2:], shape[1], shape[0])
        case Transform.PATCH_CHANNELS_LAST | Transform.PATCH_CHANNELS_FIRST:
            return (math.prod(shape[1:]), shape[0])
        case Transform.TABLE:
            return shape[1:]


def to_target(transform: Transform, tensor: np.ndarray) -> np.ndarray:
    """A source tensor, or some of its rows where ``row_axis`` is one, in our layout; a view where possible."""
    match transform:
        case Transform.SAME:
            return tensor
        case Transform.LINEAR:
            return tensor.T
        case Transform.CONV:
            return tensor.transpose(2, 3, 1, 0)
        case Transform.PATCH_CHANNELS_LAST:
            return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
        case Transform.PATCH_CHANNELS_FIRST:
            return tensor.reshape(tensor.shape[0], -1).T
        case Transform.TABLE:
            return tensor[0]


def to_source(transform: Transform, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """One parameter of ours as the source tensor of ``shape``; inverse of :func:`to_target`."""
    match transform:
        case Transform.SAME:
            return value
        case Transform.LINEAR:
            return value.T
        case Transform.CONV:
            return value.transpose(3, 2, 0, 1)
        case Transform.PATCH_CHANNELS_LAST:
            out, channels, height, width = shape
            return value.reshape(height, width, channels, out).transpose(3, 2, 0, 1)
        case Transform.PATCH_CHANNELS_FIRST:
            return value.T.reshape(shape)
        case Transform.TABLE:
            return value[None]
