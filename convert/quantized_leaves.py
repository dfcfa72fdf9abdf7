"""Leaves of a model folder -> the same in 8 bits with their scales, rounded while they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import numpy as np

from deepgen_jax.config import QuantizationConfig
from deepgen_jax.models import quantized
from deepgen_jax.models.quantized import Format

from .folder_writer import Contents
from .lazy_params import Index, Leaf, Piece


def quantized_contents(contents: Contents, how: QuantizationConfig) -> Contents:
    """The same model with 8-bit kernels and tables and their scales.

    Matrices that nothing computes with are left out: they are kept for exports, which 8-bit weights do not have.
    """
    params = [leaf for each in contents.params for leaf in _quantized(each, how)]
    return dataclasses.replace(contents, config=dataclasses.replace(contents.config, quantization=how), params=params)


def _quantized(leaf: Leaf, how: QuantizationConfig) -> Iterator[Leaf]:
    path = "/".join(leaf.path)
    if leaf.path[0] == "unused":
        if leaf.path[-1] not in ("kernel", "embedding"):
            yield leaf
        return
    if quantized.treatment(path, how.products) == "kept":
        yield leaf
        return
    to = cast("Format", how.weights)
    both = [_Rounded(path, piece, to) for piece in leaf.pieces]
    values = [Piece(each.piece.index, (*each.piece.order, 0), each.values) for each in both]
    dtype = quantized.FORMATS[quantized.stored_format(path, to)].dtype
    yield Leaf(leaf.path, leaf.shape, dtype, leaf.chunks, values)
    scale_path = tuple(quantized.scale_path(path, how.products).split("/"))
    scales = [
        Piece(_scale_index(path, each.piece.index, leaf.ndim), (*each.piece.order, 1), each.scale) for each in both
    ]
    shape, chunks = (quantized.scale_shape(path, sizes) for sizes in (leaf.shape, leaf.chunks))
    yield Leaf(scale_path, shape, np.dtype(np.float32), chunks, scales)


def _scale_index(path: str, index: Index, ndim: int) -> Index:
    """Where the scales of a piece go: its index without the axis that scales lack, where the index reaches it."""
    if len(index) < ndim:
        return index
    return index[:-1] if quantized.is_table(path) else (*index[:-2], index[-1])


class _Rounded:
    """A piece in 8 bits and its scales, made from one reading. A piece holds whole channels."""

    def __init__(self, path: str, piece: Piece, to: Format) -> None:
        self.piece = piece
        self._path, self._to = path, to
        self._scale: np.ndarray | None = None

    def values(self) -> np.ndarray:
        values, self._scale = quantized.quantize(self._path, self.piece.value(), self._to)
        return values

    def scale(self) -> np.ndarray:
        """Scales are small, and wait for the writer, which asks for the values first."""
        if self._scale is None:
            self.values()
        assert self._scale is not None
        return self._scale
