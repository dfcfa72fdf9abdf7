"""Writing what `deepgen_jax.data.feature_files` describes: shards that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepgen_jax.data.feature_files import LINES, RECORDS, write_features
from deepgen_jax.data.sources.base import BadSample, CachedImage

#: Ending of files that are being written; what stands under such a name is left over.
PARTIAL = ".writing"


class ShardCounts(NamedTuple):
    """What shards hold: their number, samples, and samples that could not be read, by reason, with one of each."""

    shards: int
    samples: int
    bad: Counter[str]
    examples: dict[str, str]


class ShardWriter:
    """A shard that appears under its name when the ``with`` block ends well, and leaves nothing otherwise."""

    def __init__(self, path: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path, self._temporary = path, path.with_name(f"{path.name}{PARTIAL}")
        # Groups of one can be read in any order; floats are not worth compressing.
        self._writer: Any = ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")
        self._lines: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        write_whole(self._path.with_suffix(LINES), "".join(f"{json.dumps(line)}\n" for line in self._lines))
        _flush(self._temporary)
        self._temporary.replace(self._path)

    def add(self, name: str, source: str, text: str, images: Sequence[CachedImage]) -> None:
        """Takes a sample."""
        self._writer.write(write_features(name, source, text, images))
        self._lines.append({"id": name, "text": text, "sizes": [list(image.size) for image in images]})

    def add_bad(self, name: str, bad: BadSample) -> None:
        """Notes a sample that could not be read."""
        self._lines.append({"id": name, "bad": [bad.reason, bad.detail]})


def shard_path(folder: Path, shard: int) -> Path:
    """The ArrayRecord file of a shard."""
    return folder / f"{shard:05d}{RECORDS}"


def count_shards(folder: Path, shards: int) -> ShardCounts:
    """Counts what is there of so many shards."""
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


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}{PARTIAL}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
