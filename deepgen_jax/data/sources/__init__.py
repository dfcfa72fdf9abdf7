"""Data sets by format; `open_source` is the registry."""

from __future__ import annotations

import importlib

from deepgen_jax.data.data_config import KINDS, SourceConfig
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, read_row

__all__ = ["BadSample", "Record", "Row", "Source", "open_source", "read_row"]

# Kind -> module and class; a module is imported when a source of its kind is opened.
_SOURCES = {
    "json": ("json_list", "JsonList"),
    "captions": ("captions", "Captions"),
    "webdataset": ("webdataset", "WebDataset"),
    "parquet": ("parquet", "Parquet"),
    "array_record": ("array_record", "ArrayRecord"),
    "tfds": ("tfds", "TensorFlowDataset"),
    "image_folder": ("image_folder", "ImageFolder"),
    "features": ("features", "Features"),
    "synthetic": ("synthetic", "Synthetic"),
}
assert set(_SOURCES) == set(KINDS)


def open_source(config: SourceConfig) -> Source:
    """The data set that ``config`` describes; nothing is read yet."""
    module, name = _SOURCES[config.kind]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)(config)
