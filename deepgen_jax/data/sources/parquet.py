"""Parquet files with images as bytes, as ``{"bytes", "path"}`` structs (Hugging Face), or as paths.

Paths are taken into the index. Bytes have no cheap random access in Parquet: every sample costs the reading of its row
group, of which the last few are kept. Groups of at most a hundred images are bearable; better are ArrayRecord, Arrow or
tars.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator
from typing import Any

from deepgen_jax.data import storage
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.sources.arrow_rows import import_pyarrow, record_of
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, damaged_row
from deepgen_jax.data.sources.columns import Columns, columns_of
from deepgen_jax.data.storage import Blob

#: Row groups kept in memory.
_KEPT_GROUPS = 4


class Parquet(Source):
    """Rows are [path, row group, row in it], and text, notes, image path, ... where the file holds no image bytes."""

    suffixes = (".parquet",)

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._groups: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def scan(self, path: str) -> Iterator[Row]:
        pyarrow = import_pyarrow()
        from pyarrow.parquet import ParquetFile

        with storage.open_file(path) as file:
            try:
                table = ParquetFile(file)
                columns = columns_of(self.config, table.schema_arrow.names)
                images = [table.schema_arrow.field(name).type for name in (*columns.image, *columns.references)]
                by_path = all(_holds_paths(kind) for kind in images)
                for group in range(table.num_row_groups):
                    count = table.metadata.row_group(group).num_rows
                    if not by_path:
                        yield from ([path, group, row] for row in range(count))
                        continue
                    rows = table.read_row_group(group, columns.names)
                    yield from (self._row(columns, rows, [path, group, row]) for row in range(count))
            except (pyarrow.ArrowException, OSError) as error:
                yield damaged_row(BadSample("damaged parquet", f"{path}: {error}"), path, error)

    def read(self, row: Row) -> Record:
        path, group, number, *rest = row
        if rest:
            text, notes, *paths = rest
            return Record(text, tuple(Blob(path) for path in paths), tuple(notes))
        table, columns = self._group(path, group)
        if number >= table.num_rows:
            raise BadSample("changed since indexed", f"the row group has {table.num_rows} rows")
        return record_of(self.config, columns, table, number, path)

    def place(self, row: Row) -> str:
        return f"{row[0]}: row group {row[1]}, row {row[2]}"

    def _row(self, columns: Columns, rows: Any, row: list[Any]) -> Row:
        try:
            record = record_of(self.config, columns, rows, row[2], row[0])
        except BadSample as bad:
            return bad.at(self.place(row)).as_row()
        paths = [image.path for image in record.images if isinstance(image, Blob)]
        return [*row, record.text, list(record.notes), *paths]

    def _group(self, path: str, group: int) -> tuple[Any, Columns]:
        pyarrow = import_pyarrow()
        from pyarrow.parquet import ParquetFile

        with self._lock:
            key = (path, group)
            if key not in self._groups:
                try:
                    with storage.open_file(path) as file:
                        table = ParquetFile(file)
                        columns = columns_of(self.config, table.schema_arrow.names)
                        self._groups[key] = (table.read_row_group(group, columns.names), columns)
                except FileNotFoundError as error:
                    raise BadSample("missing file", path) from error
                except (pyarrow.ArrowException, OSError) as error:
                    raise BadSample("damaged parquet", f"{path}: {error}") from error
                if len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _holds_paths(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)
