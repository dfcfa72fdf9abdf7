"""Leaves of a parameter tree whose values are computed piece by piece while they are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .names import Weight
from .transforms import Shape, row_count

#: Larger tensors are converted in blocks of rows of about this many bytes, where their layout allows it.
BLOCK_BYTES = 64 * 2**20

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Piece:
    """Part of a leaf.

    Attributes:
      index: where it goes, as numpy would index it.
      order: pieces are made in this order, which reads every source from its start to its end.
      value: reads and converts it.
    """

    index: Index
    order: tuple[Any, ...]
    value: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Leaf:
    """One stored array; ``chunks`` is the unit of its storage."""

    path: tuple[str, ...]
    shape: Shape
    dtype: np.dtype
    chunks: Shape
    pieces: list[Piece]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)


def row_blocks(weight: Weight, dtype: np.dtype) -> list[slice | None]:
    """Ranges of the source's rows to convert one by one; ``[None]`` where the tensor is one piece."""
    count = math.ceil(math.prod(weight.shape) * dtype.itemsize / BLOCK_BYTES)
    if weight.transform.row_axis is None or count < 4:
        return [None]
    rows = row_count(weight.shape)
    block = math.ceil(rows / count)
    return [slice(start, min(start + block, rows)) for start in range(0, rows, block)]


def chunk_shape(weight: Weight, blocks: list[slice | None]) -> Shape:
    """Shape of one of the blocks into which :func:`row_blocks` cuts a weight, in our layout."""
    if blocks[0] is None:
        return weight.target_shape
    rows = blocks[0].stop - blocks[0].start
    return tuple(rows if i == weight.transform.row_axis else n for i, n in enumerate(weight.target_shape))


def slice_index(weight: Weight, rows: slice | None) -> Index:
    """Position of a weight, or of a range of its rows, in its leaf."""
    if rows is None:
        return weight.index
    axis = weight.transform.row_axis
    return (*weight.index, *(rows if i == axis else slice(None) for i in range(len(weight.target_shape))))
