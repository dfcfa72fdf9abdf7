"""Samples from rows of Arrow tables, as Parquet files and Hugging Face folders hold them.

An image is bytes, a ``{"bytes", "path"}`` struct (Hugging Face), or a path.
"""

from __future__ import annotations

from typing import Any

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.sources.base import BadSample, ImageData, Record
from deepgen_jax.data.sources.columns import Columns
from deepgen_jax.data.storage import Blob, join, parent
from deepgen_jax.errors import DeepGenError


def import_pyarrow() -> Any:
    """The module.

    Raises:
      DeepGenError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DeepGenError(
            "parquet and arrow sources need pyarrow; run: pip install 'deepgen-jax[data]'"
        ) from error
    return pyarrow


def record_of(config: SourceConfig, columns: Columns, table: Any, row: int, path: str) -> Record:
    """The sample of a row of a table or record batch.

    Args:
      config: gives the folder of relative paths.
      columns: names to read.
      table: holds these columns.
      row: its place in the table.
      path: of the file that the table comes from.

    Raises:
      BadSample: a value is missing, or is no text or image.
    """
    values = {}
    for name in columns.names:
        try:
            values[name] = table.column(name)[row].as_py()
        except (ValueError, ArithmeticError) as error:  # Of text that is not UTF-8, or times out of range.
            raise BadSample("wrong text", f"column {name}: {error}") from error
    root = config.root or parent(path)
    images = columns.images_of(values)
    text, notes = columns.text_of(values)
    return Record(text, tuple(_image(value, root) for value in images), notes)


def _image(value: Any, root: str) -> ImageData:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and value:
        return Blob(join(root, value))
    if isinstance(value, bytes):
        return value
    raise BadSample("missing field", "an image is neither bytes nor a path")
