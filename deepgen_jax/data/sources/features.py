"""Features that `deepgen data cache` wrote, a folder a source; see `deepgen_jax.data.feature_files`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from deepgen_jax.data import storage
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.feature_files import LINES, MANIFEST, RECORDS, FeatureManifest, read_features
from deepgen_jax.data.sources.array_record import ShardReaders
from deepgen_jax.data.sources.base import (
    BadSample,
    CachedImage,
    Record,
    Row,
    Source,
    bad_row,
    load_json,
    read_file,
)
from deepgen_jax.data.storage import FileInfo, join
from deepgen_jax.errors import DeepGenError


class Features(Source):
    """Rows are [shard, record, text, sizes]."""

    suffixes = (RECORDS,)

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._readers = ShardReaders()

    @functools.cached_property
    def manifest(self) -> FeatureManifest:
        """Manifest of the features.

        Raises:
          DeepGenError: there is none, or it is of a different task.
        """
        where = f"source {self.config.name}"
        path = join(self.config.path, MANIFEST)
        try:
            found = FeatureManifest.from_json(storage.read(path), path)
        except OSError as error:
            raise DeepGenError(
                f"{where}: {self.config.path} holds no {MANIFEST}; give the folder of one source written by `deepgen "
                "data cache`"
            ) from error
        if found.task != self.config.task:
            raise DeepGenError(f"{where}: {self.config.path} holds features for {found.task}; set task to that")
        return found

    def files(self) -> list[FileInfo]:
        manifest = self.manifest
        found = super().files()
        if len(found) != manifest.shards:
            raise DeepGenError(
                f"source {self.config.name}: {self.config.path} holds {len(found)} of {manifest.shards} shards; run "
                "the same `deepgen data cache` again to complete it"
            )
        return found

    def scan(self, path: str) -> Iterator[Row]:
        record = 0
        try:
            lines = read_file(path.removesuffix(RECORDS) + LINES).splitlines()
            parsed = [load_json(line) for line in lines]
            if not all(isinstance(line, dict) and ("bad" in line or "sizes" in line) for line in parsed):
                raise BadSample("damaged shard", f"{path}: its lines describe no samples")
            good = sum("bad" not in line for line in parsed)
            if good and self._readers.open(path).num_records() != good:
                raise BadSample("damaged shard", f"{path} does not hold the {good} records that it should")
        except BadSample as bad:
            yield bad.at(path).as_row()
            return
        for line in parsed:
            if "bad" in line:
                yield bad_row(*line["bad"])
                continue
            yield [path, record, line["text"], line["sizes"]]
            record += 1

    def read_header(self, row: Row) -> Record:
        _, _, text, sizes = row
        return Record(text, tuple(CachedImage((width, height)) for width, height in sizes))

    def read(self, row: Row) -> Record:
        path, record, *_ = row
        try:
            text, images = read_features(self._readers.read(path, record))
        except ValueError as error:
            raise BadSample("damaged record", str(error)) from error
        return Record(text, tuple(images))

    def place(self, row: Row) -> str:
        return f"{row[0]}: record {row[1]}"
