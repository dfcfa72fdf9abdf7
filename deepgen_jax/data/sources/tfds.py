"""Prepared TensorFlow Datasets in a folder, as ArrayRecord or TFRecord shards, read without TensorFlow."""

from __future__ import annotations

import glob
import os
import struct
from collections.abc import Iterator
from typing import Any

from deepgen_jax.data import storage
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.file_listing import list_files
from deepgen_jax.data.sources.array_record import ShardReaders, check_columns, example_record
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, damaged_row, read_file
from deepgen_jax.data.storage import FileInfo
from deepgen_jax.errors import DeepGenError

# A TFRecord: length (8 bytes), its checksum (4), the data, their checksum (4).
_HEADER, _FOOTER = 12, 4


class TensorFlowDataset(Source):
    """Rows are [path, record] in ArrayRecord shards and [path, offset, size] in TFRecord shards."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._readers = ShardReaders()

    def files(self) -> list[FileInfo]:
        where = f"source {self.config.name}"
        return [info for path in self._shards() for info in list_files(glob.escape(path), ("",), where)]

    def scan(self, path: str) -> Iterator[Row]:
        first, last = self._shards()[path]
        rows = self._array_records(path) if "array_record" in os.path.basename(path) else _tf_records(path)
        try:
            for number, row in enumerate(rows):
                if number == 0:
                    check_columns(self.config, self._bytes(row))
                if first <= number < last:
                    yield row
        except BadSample as bad:
            yield damaged_row(bad, path, bad.__cause__)

    def read(self, row: Row) -> Record:
        return example_record(self.config, self._bytes(row))

    def place(self, row: Row) -> str:
        return f"{row[0]}: record {row[1]}" if len(row) == 2 else f"{row[0]}: byte {row[1]}"

    def _array_records(self, path: str) -> Iterator[Row]:
        yield from ([path, record] for record in range(self._readers.open(path).num_records()))

    def _bytes(self, row: Row) -> bytes:
        path, *place = row
        return self._readers.read(path, *place) if len(place) == 1 else read_file(path, *place)

    def _shards(self) -> dict[str, tuple[int, int]]:
        """Path -> (first, last + 1) record that the split takes from it."""
        config = self.config
        try:
            import tensorflow_datasets
        except ImportError as error:
            raise DeepGenError("tfds sources need tensorflow-datasets; run: pip install 'deepgen-jax[data]'") from error
        try:
            info: Any = tensorflow_datasets.builder_from_directory(config.path).info
            parts = info.splits[config.split].file_instructions
        except Exception as error:
            # Its errors have many types; all mean that the folder or the split is not what it should be.
            reason = " ".join(str(error).split())[:300]
            raise DeepGenError(
                f"source {config.name}: {config.path} gives no split {config.split} ({reason}); give the folder of a "
                "prepared version, the one with dataset_info.json"
            ) from error
        shards = {}
        for part in parts:
            last = part.examples_in_shard if part.take < 0 else part.skip + part.take
            shards[str(part.filename)] = (part.skip, last)
        return shards


def _tf_records(path: str) -> Iterator[Row]:
    with storage.open_file(path) as file:
        end = file.seek(0, os.SEEK_END)
        position = 0
        while position < end:
            file.seek(position)
            header = file.read(_HEADER)
            size = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else end
            if position + _HEADER + size + _FOOTER > end:
                raise BadSample("damaged shard", f"{path} ends early")
            yield [path, position + _HEADER, size]
            position += _HEADER + size + _FOOTER
