"""The index of a source: where its samples are, the sizes of their images, the lengths of their prompts, which are bad.

It is built once (a pass over all image headers and texts), kept on disk, and mapped into memory, so that a run over any
number of samples starts at once, needs no memory for them, and knows every bucket ahead.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deepgen_jax.data.checks import SampleInfo
from deepgen_jax.data.sources import BadSample, Row
from deepgen_jax.errors import DeepGenError

#: Changes when the files of an index do.
VERSION = 2


class Index:
    """An index on disk.

    Attributes:
      folder: where it is.
      meta: source, rows, reasons (what can be wrong, by code), counts (bad samples by reason), examples (one by
        reason), notes (samples by note, see `deepgen_jax.data.sources.base.Record`) and digest (of all columns).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    def __len__(self) -> int:
        return self.meta["rows"]

    def check(self) -> None:
        """Raises ``ValueError``, or what reading raises (``OSError``, ``EOFError``), unless all files fit together."""
        rows = len(self)
        shapes = {"status": (rows,), "lengths": (rows,), "offsets": (rows + 1,), "sizes": (rows, *self.sizes.shape[1:])}
        for name, shape in shapes.items():
            if self._load(name).shape != shape:
                raise ValueError(f"{name}.npy does not have {rows} rows")
        if self._offsets[-1] != (self.folder / "rows.bin").stat().st_size:
            raise ValueError("rows.bin has another size")
        if not {"reasons", "counts", "examples", "notes", "digest"} <= self.meta.keys():
            raise ValueError("meta.json lacks a field")

    def row(self, number: int) -> Row:
        """The row of a sample, for its source to read."""
        start, end = self._offsets[number : number + 2]
        return json.loads(self._rows[start:end].tobytes())

    @functools.cached_property
    def status(self) -> np.ndarray:
        """uint8 [rows], 0 for usable samples, else 1 + the place of the reason in ``meta["reasons"]``."""
        return self._load("status")

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [rows], tokens of each prompt, image tokens not counted, not cut."""
        return self._load("lengths")

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int32 [rows, images, 2], (width, height) of the target and the references, zeros where there are fewer."""
        return self._load("sizes")

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return self._load("offsets")

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return np.memmap(self.folder / "rows.bin", np.uint8, "r")

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


class IndexWriter:
    """Collects rows, then what was found about them, and writes the files of an `Index` into a folder."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder
        self._source = source
        self._file = open(folder / "rows.bin", "wb")  # noqa: SIM115 (closed by `finish_rows`)
        self._lengths: list[np.ndarray] = []
        self._columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._reasons: list[str] = []
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}
        self._notes: dict[str, int] = {}

    def add_rows(self, encoded: list[bytes]) -> None:
        """More rows, as JSON."""
        self._file.write(b"".join(encoded))
        self._lengths.append(np.array([len(row) for row in encoded], np.int64))

    def finish_rows(self) -> int:
        """Ends the rows; their number.

        Raises:
          DeepGenError: there are none.
        """
        self._file.close()
        lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
        self._lengths = []
        if len(lengths) == 1:
            raise DeepGenError(f"source {self._source}: there is no sample in it; check its path and kind")
        np.save(self.folder / "offsets.npy", np.cumsum(lengths))
        return len(lengths) - 1

    def encoded_rows(self, start: int, end: int) -> list[bytes]:
        """Rows as they were added, after `finish_rows`."""
        offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")[start : end + 1]
        data = np.memmap(self.folder / "rows.bin", np.uint8, "r")
        return [data[a:b].tobytes() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]

    def add_samples(self, samples: Iterable[SampleInfo | BadSample]) -> None:
        """Entries of the next rows."""
        items = list(samples)
        status = np.array([self._code(item) if isinstance(item, BadSample) else 0 for item in items], np.uint8)
        good = [item if isinstance(item, SampleInfo) else SampleInfo(0, ()) for item in items]
        for note in (note for item in good for note in item.notes):
            self._notes[note] = self._notes.get(note, 0) + 1
        images = max((len(item.sizes) for item in good), default=0)
        sizes = np.zeros((len(items), images, 2), np.int32)
        for number, item in enumerate(good):
            sizes[number, : len(item.sizes)] = np.array(item.sizes, np.int32).reshape(-1, 2)
        self._columns.append((status, np.array([item.length for item in good], np.int32), sizes))

    def finish(self) -> None:
        """Writes the rest; ``meta.json`` comes last and makes the index valid."""
        images = max(1, *(sizes.shape[1] for _, _, sizes in self._columns))
        columns = {
            "status": np.concatenate([status for status, _, _ in self._columns]),
            "lengths": np.concatenate([lengths for _, lengths, _ in self._columns]),
            "sizes": np.concatenate(
                [np.pad(sizes, ((0, 0), (0, images - sizes.shape[1]), (0, 0))) for _, _, sizes in self._columns]
            ),
        }
        for name, column in columns.items():
            np.save(self.folder / f"{name}.npy", column)
        meta = {
            "version": VERSION,
            "source": self._source,
            "rows": len(columns["status"]),
            "reasons": self._reasons,
            "counts": self._counts,
            "examples": self._examples,
            "notes": self._notes,
            "digest": _digest(columns),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def _code(self, bad: BadSample) -> int:
        if bad.reason not in self._reasons:
            self._reasons.append(bad.reason)
            self._examples[bad.reason] = bad.detail
        self._counts[bad.reason] = self._counts.get(bad.reason, 0) + 1
        return 1 + self._reasons.index(bad.reason)


def _digest(columns: dict[str, np.ndarray]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for column in columns.values():
        digest.update(np.ascontiguousarray(column).view(np.uint8).data)
    return digest.hexdigest()
