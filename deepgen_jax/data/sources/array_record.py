"""ArrayRecord shards whose records are ``tf.train.Example`` with encoded images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from deepgen_jax.data import storage
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, damaged_row
from deepgen_jax.data.sources.columns import columns_of
from deepgen_jax.data.sources.tf_example import parse_example
from deepgen_jax.errors import DeepGenError


class ArrayRecord(Source):
    """Rows are [path, record]."""

    suffixes = (".array_record", ".arrayrecord")

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._readers = ShardReaders()

    def scan(self, path: str) -> Iterator[Row]:
        try:
            count = self._readers.open(path).num_records()
            if not count:
                # The reader reports no record for a file that is no ArrayRecord.
                raise BadSample("damaged shard", f"{path} holds no record")
            check_columns(self.config, self._readers.read(path, 0))
        except BadSample as bad:
            yield damaged_row(bad, path, bad.__cause__)
            return
        yield from ([path, record] for record in range(count))

    def read(self, row: Row) -> Record:
        return example_record(self.config, self._readers.read(*row))

    def place(self, row: Row) -> str:
        return f"{row[0]}: record {row[1]}"


class ShardReaders:
    """ArrayRecord readers, opened on first use and kept, one a shard; remote shards are copied to a local cache."""

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def open(self, path: str) -> Any:
        """The reader of a shard.

        Raises:
          BadSample: it is no ArrayRecord file.
        """
        try:
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError as error:
            raise DeepGenError("ArrayRecord sources need array_record; run: pip install 'deepgen-jax[data]'") from error
        with self._lock:
            if path not in self._open:
                try:
                    # Without read-ahead: records are read in random order.
                    self._open[path] = ArrayRecordReader(storage.local_copy(path), options="readahead_buffer_size:0")
                except DeepGenError:
                    raise
                except (RuntimeError, ValueError, OSError) as error:
                    raise BadSample("damaged shard", f"{path}: {error}") from error
            return self._open[path]

    def read(self, path: str, record: int) -> bytes:
        """The bytes of a record.

        Raises:
          BadSample: they cannot be read.
        """
        reader = self.open(path)
        try:
            return reader.read([record])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadSample("damaged shard", str(error)) from error


def check_columns(config: SourceConfig, data: bytes) -> None:
    """Checks that a record, taken for all of its file, names text and images.

    One that is no ``tf.train.Example`` is passed over: others may be fine, and it is counted when it is read.

    Raises:
      DeepGenError: it has none of the names of `SourceConfig.fields`, nor of the usual ones.
    """
    try:
        features = parse_example(data)
    except ValueError:
        return
    columns_of(config, features)


def example_record(config: SourceConfig, data: bytes) -> Record:
    """A sample from a serialised ``tf.train.Example``.

    Raises:
      BadSample: it is none, or lacks text or images.
    """
    try:
        features = parse_example(data)
    except ValueError as error:
        raise BadSample("damaged record", str(error)) from error
    values = {
        name: feature[0] if isinstance(feature, list) and len(feature) == 1 else feature
        for name, feature in features.items()
        if isinstance(feature, list)
    }
    columns = columns_of(config)
    images = columns.images_of(values)
    text, notes = columns.text_of(values)
    return Record(text, tuple(images), notes)
