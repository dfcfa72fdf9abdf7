"""Folders that Hugging Face ``datasets`` wrote with ``save_to_disk``, and other Arrow IPC files; read without it.

A folder of several splits has one folder each, chosen by `SourceConfig.split`. Files are mapped into memory, so that
only the bytes of the sample are read.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections.abc import Iterator
from typing import Any

from deepgen_jax.data import storage
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.file_listing import list_files
from deepgen_jax.data.sources.arrow_rows import import_pyarrow, record_of
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, damaged_row
from deepgen_jax.data.sources.columns import Columns, columns_of
from deepgen_jax.data.storage import FileInfo, join
from deepgen_jax.errors import DeepGenError, did_you_mean

# Names that `save_to_disk` writes: the splits of several, and the files of one.
_SPLITS, _STATE = "dataset_dict.json", "state.json"
_FILE_MAGIC = b"ARROW1"


class Arrow(Source):
    """Rows are [path, row]."""

    suffixes = (".arrow",)

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._tables: dict[str, _Batches] = {}
        self._lock = threading.Lock()

    def files(self) -> list[FileInfo]:
        self.passed_over.clear()
        where, folder = f"source {self.config.name}", self.config.path
        splits = _saved(join(folder, _SPLITS), "splits", where)
        if splits is not None:
            if self.config.split not in splits:
                raise DeepGenError(
                    f"{where}: {folder} has no split {self.config.split}{did_you_mean(self.config.split, splits)}"
                )
            folder = join(folder, self.config.split)
        shards = _saved(join(folder, _STATE), "_data_files", where)
        found = list_files(folder, self.suffixes, where, self.passed_over)
        if shards is None:
            return found
        # Beside them may be what a program cached there.
        wanted = {str(shard.get("filename")) for shard in shards if isinstance(shard, dict)}
        kept = [info for info in found if info.path.rpartition("/")[2] in wanted]
        if len(kept) != len(wanted):
            raise DeepGenError(f"{where}: {folder} holds {len(kept)} of {len(wanted)} shards; copy it whole")
        if len(found) > len(kept):
            self.passed_over["file that is no shard"] += len(found) - len(kept)
        return kept

    def scan(self, path: str) -> Iterator[Row]:
        try:
            batches = self._batches(path)
        except BadSample as bad:
            yield damaged_row(bad, path, bad.__cause__)
            return
        yield from ([path, row] for row in range(batches.ends[-1]))

    def read(self, row: Row) -> Record:
        path, number = row
        batches = self._batches(path)
        if number >= batches.ends[-1]:
            raise BadSample("changed since indexed", f"the file has {batches.ends[-1]} rows")
        place = bisect.bisect_right(batches.ends, number)
        start = batches.ends[place - 1] if place else 0
        return record_of(self.config, batches.columns, batches.batches[place], number - start, path)

    def _batches(self, path: str) -> _Batches:
        pyarrow = import_pyarrow()
        with self._lock:
            if path not in self._tables:
                try:
                    self._tables[path] = _Batches(self.config, path)
                except FileNotFoundError as error:
                    raise BadSample("missing file", path) from error
                except (pyarrow.ArrowException, OSError) as error:
                    raise BadSample("damaged shard", f"{path}: {error}") from error
            return self._tables[path]


class _Batches:
    """The record batches of a file, mapped into memory.

    Attributes:
      batches: in the order of the file; ends: rows up to the end of each.
      columns: names that hold text and images.
    """

    def __init__(self, config: SourceConfig, path: str) -> None:
        pyarrow = import_pyarrow()
        mapped = pyarrow.memory_map(storage.local_copy(path))
        if mapped.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            mapped.seek(0)
            reader = pyarrow.ipc.open_file(mapped)
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            mapped.seek(0)
            reader = pyarrow.ipc.open_stream(mapped)
            self.batches = list(reader)
        self.columns: Columns = columns_of(config, reader.schema.names)
        self.ends: list[int] = []
        for batch in self.batches:
            batch.validate()
            self.ends.append(batch.num_rows + (self.ends[-1] if self.ends else 0))
        if not self.ends:
            self.ends, self.batches = [0], [None]


def _saved(path: str, name: str, where: str) -> list[Any] | None:
    """A list in one of the JSON files of `save_to_disk`; None if there is no such file.

    Raises:
      DeepGenError: the file cannot be read, or holds no such list.
    """
    try:
        data = storage.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DeepGenError(f"{where}: {path} cannot be read: {error}") from error
    try:
        values = json.loads(data)[name]
        if isinstance(values, list):
            return values
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DeepGenError(f"{where}: {path} is damaged: it holds no list {name}; save the data set again")
