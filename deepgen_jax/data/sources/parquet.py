"""Parquet files with images as bytes, as ``{"bytes", "path"}`` structs (Hugging Face), or as paths.

Paths are taken into the index. Bytes have no cheap random access in Parquet: every sample costs the reading of its row
group, of which the last few are kept. Groups of at most a hundred images are bearable; better are ArrayRecord or tars.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator
from typing import Any

from deepgen_jax.data import files
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.files import Blob, join, parent
from deepgen_jax.data.sources.base import BadSample, ImageData, Record, Row, Source, bad_row, damaged
from deepgen_jax.data.sources.columns import Columns, columns_of
from deepgen_jax.errors import DeepGenError

#: Row groups kept in memory.
_KEPT_GROUPS = 4


class Parquet(Source):
    """Rows are [path, row group, row in it], or [text, image path, ...] where the file holds no image bytes."""

    suffixes = (".parquet",)

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._groups: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def scan(self, path: str) -> Iterator[Row]:
        import pyarrow

        with files.open_file(path) as file:
            try:
                table = _parquet_file(file)
            except (pyarrow.ArrowException, OSError) as error:
                yield damaged(BadSample("damaged parquet", f"{path}: {error}"), path, error)
                return
            columns = columns_of(self.config, table.schema_arrow.names)
            images = [table.schema_arrow.field(name).type for name in (*columns.image, *columns.references)]
            by_path = all(_holds_paths(kind) for kind in images)
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                if not by_path:
                    yield from ([path, group, row] for row in range(count))
                    continue
                for values in table.read_row_group(group, _names(columns)).to_pylist():
                    try:
                        record = self._record(values, columns, path)
                        yield [record.text, *(image.path for image in record.images if isinstance(image, Blob))]
                    except BadSample as bad:
                        yield bad_row(bad.reason, f"{path}: {bad.detail}")

    def read(self, row: Row) -> Record:
        if not isinstance(row[1], int):
            text, *paths = row
            return Record(text, tuple(Blob(path) for path in paths))
        path, group, number = row
        table, columns = self._group(path, group)
        values = {name: table.column(name)[number].as_py() for name in table.column_names}
        return self._record(values, columns, path)

    def _record(self, values: dict[str, Any], columns: Columns, path: str) -> Record:
        root = self.config.root or parent(path)
        images = columns.images_of(values)
        return Record(columns.text_of(values), tuple(_image(value, root) for value in images))

    def _group(self, path: str, group: int) -> tuple[Any, Columns]:
        import pyarrow

        with self._lock:
            key = (path, group)
            if key not in self._groups:
                try:
                    with files.open_file(path) as file:
                        table = _parquet_file(file)
                        columns = columns_of(self.config, table.schema_arrow.names)
                        self._groups[key] = (table.read_row_group(group, _names(columns)), columns)
                except (pyarrow.ArrowException, OSError) as error:
                    raise BadSample("damaged parquet", f"{path}: {error}") from error
                if len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _parquet_file(file: Any) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DeepGenError("parquet sources need pyarrow; run: pip install 'deepgen-jax[data]'") from error
    return ParquetFile(file)


def _names(columns: Columns) -> list[str]:
    return list(dict.fromkeys((*columns.text, *columns.image, *columns.references)))


def _holds_paths(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)


def _image(value: Any, root: str) -> ImageData:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and value:
        return Blob(join(root, value))
    if isinstance(value, bytes):
        return value
    raise BadSample("missing field", "an image is neither bytes nor a path")
