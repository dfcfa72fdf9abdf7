"""Writes the shards that `deepgen_jax.data.feature_files` describes; a shard is written whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from deepgen_jax.data.feature_files import LINES, RECORDS, write_features
from deepgen_jax.data.sources.base import BadSample, CachedImage
from deepgen_jax.files import replacing, write_text


class ShardCounts(NamedTuple):
    """Contents of shards: their number, samples, and unreadable samples by reason, with an example of each."""

    shards: int
    samples: int
    bad: Counter[str]
    examples: dict[str, str]


class ShardWriter:
    """A shard that appears under its name when the ``with`` block succeeds; an exception leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        self._writer: Any = None
        self._lines: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        from array_record.python.array_record_module import ArrayRecordWriter

        partial = self._stack.enter_context(replacing(self._path))
        # Groups of one can be read in any order; floats are not worth compressing.
        self._writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None:
            # First: a shard counts once its ArrayRecord file is there.
            write_text(self._path.with_suffix(LINES), "".join(f"{json.dumps(line)}\n" for line in self._lines))
        self._stack.__exit__(kind, error, trace)

    def add(self, name: str, source: str, text: str, images: Sequence[CachedImage]) -> None:
        """Adds a sample."""
        self._writer.write(write_features(name, source, text, images))
        self._lines.append({"id": name, "text": text, "sizes": [list(image.size) for image in images]})

    def add_bad(self, name: str, bad: BadSample) -> None:
        """Records that a sample could not be read."""
        self._lines.append({"id": name, "bad": [bad.reason, bad.detail]})


def shard_path(folder: Path, shard: int) -> Path:
    """The ArrayRecord file of a shard."""
    return folder / f"{shard:05d}{RECORDS}"


def count_shards(folder: Path, shards: int) -> ShardCounts:
    """Counts the first ``shards`` shards of a folder, as far as they are there."""
    found = ShardCounts(0, 0, Counter(), {})
    for path in (shard_path(folder, shard) for shard in range(shards)):
        if not path.is_file():
            continue
        found = found._replace(shards=found.shards + 1)
        for line in path.with_suffix(LINES).read_bytes().splitlines():
            if b'"bad"' in line and "bad" in (values := json.loads(line)):
                reason, detail = values["bad"]
                found.bad[reason] += 1
                found.examples.setdefault(reason, detail)
            else:
                found = found._replace(samples=found.samples + 1)
    return found
