"""Base class of data sources: rows that are found once, and the sample of a row on demand."""

from __future__ import annotations

import abc
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deepgen_jax.data import storage
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.file_listing import list_files
from deepgen_jax.data.source_kinds import SOURCE_KINDS
from deepgen_jax.data.storage import Blob, FileInfo
from deepgen_jax.errors import DeepGenError


class CachedImage(NamedTuple):
    """Features of an image from the frozen encoders.

    Attributes:
      size: (width, height) in pixels of the image that they saw.
      mean, logvar: float32 [h, w, C], the VAE's posterior; None where only the size was asked for.
      tokens: [n, hidden], VLM tokens of a reference; None for a target.
    """

    size: tuple[int, int]
    mean: np.ndarray | None = None
    logvar: np.ndarray | None = None
    tokens: np.ndarray | None = None


#: The encoded file of one image, in memory, or where to read it; or its features.
ImageData: TypeAlias = bytes | Blob | CachedImage
#: Locates a sample, as JSON: what `Source.scan` yields and `Source.read` takes.
Row: TypeAlias = Any

_BAD = "bad"
_LONGEST_DETAIL = 500


class BadSample(Exception):
    """A sample that cannot be used. It is counted by reason and never ends a run by itself.

    Attributes:
      reason: what is wrong in a few words, the same for every sample with that fault.
      detail: the place (file, and row or member) and what was found there, on one printable line.
    """

    def __init__(self, reason: str, found: str = "", place: str = "") -> None:
        """Takes the reason, what was found, and where; ``found`` may be long or hold any characters."""
        self.reason = reason
        self._found, self._place = _one_line(found), _one_line(place)
        if len(self._found) > _LONGEST_DETAIL:
            self._found = f"{self._found[:_LONGEST_DETAIL]}..."
        super().__init__(reason, self._found, self._place)

    @property
    def detail(self) -> str:
        return ": ".join(part for part in (self._place, self._found) if part)

    def at(self, place: str) -> BadSample:
        """The same at a place, unless it has one already."""
        if self._place or self._found.startswith(_one_line(place)):
            return self
        return BadSample(self.reason, self._found, place)

    def as_row(self) -> Row:
        """The entry that `Source.scan` yields instead of the sample."""
        return {_BAD: list(self.args)}


def _one_line(text: str) -> str:
    """Printable, without line breaks; halves of surrogate pairs and NULs are escaped."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0").split())


class Record(NamedTuple):
    """A sample before its images are decoded.

    Attributes:
      text: caption or instruction.
      images: the target, then the references.
      notes: what was done to it that its user should know, such as "several captions, the first is read"; counted.
    """

    text: str
    images: tuple[ImageData, ...]
    notes: tuple[str, ...] = ()


class Source(abc.ABC):
    """A data set of one format.

    ``scan`` runs once, when the index is built, and locates each sample; its rows are kept with the index, so that
    a data set of any size takes no memory and no start-up time later on.

    Attributes:
      config: as it was configured.
      passed_over: names in its folders that `files` did not take, by reason.
      has_images: its samples have pictures; without, a sample's only image is a `CachedImage` that has just a size.
    """

    #: Endings of the files that `files` looks for, lower case.
    suffixes: tuple[str, ...] = ()
    has_images: bool = True

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.passed_over: Counter[str] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes open it anew: open files stay here, and classes of a user's file are found again.
        return _reopen, (SOURCE_KINDS.target(self.config.kind), self.config)

    def files(self) -> list[FileInfo]:
        """The files that hold or list the samples; a change of one makes the index stale.

        Raises:
          DeepGenError: there are none.
        """
        self.passed_over.clear()
        return list_files(self.config.path, self.suffixes, f"source {self.config.name}", self.passed_over)

    @abc.abstractmethod
    def scan(self, path: str) -> Iterator[Row]:
        """The rows of one of `files`, in a fixed order. A row that is no sample is a `bad_row`.

        Raises:
          DeepGenError: the file cannot be read in this way at all, such as one with other columns.
        """

    @abc.abstractmethod
    def read(self, row: Row) -> Record:
        """The sample of a row.

        Raises:
          BadSample: it cannot be used.
        """

    def read_header(self, row: Row) -> Record:
        """`read` for callers that need the text and the sizes of the images only."""
        return self.read(row)

    def place(self, row: Row) -> str:
        """Location of a row for messages: the file, and the row or member in it."""
        path, *rest = row if isinstance(row, list) else [row]
        if not isinstance(path, str):
            return f"row {path}"
        return f"{path}: row {rest[0]}" if rest and isinstance(rest[0], int) else path


def _reopen(target: str, config: SourceConfig) -> Source:
    # By its class, not its kind: what `register` added is not known in a new process.
    return SOURCE_KINDS.load(target, f"source {config.name}: kind")(config)


def bad_row(reason: str, found: str = "", place: str = "") -> Row:
    """A row in the place of a sample that the scan found unusable; see `BadSample`."""
    return BadSample(reason, found, place).as_row()


def is_bad(row: Row) -> bool:
    """Whether a row is a `bad_row`."""
    return isinstance(row, dict) and _BAD in row


def bad_row_at(row: Row, place: str) -> Row:
    """A row, with a place if it is a `bad_row` without one."""
    return BadSample(*row[_BAD]).at(place).as_row() if is_bad(row) else row


@contextlib.contextmanager
def located(source: Source, row: Row) -> Iterator[None]:
    """Adds the row's place to the detail of a `BadSample` that the block raises."""
    try:
        yield
    except BadSample as bad:
        raise (bad if is_bad(row) else bad.at(source.place(row))) from bad.__cause__


def read_row(source: Source, row: Row, *, header_only: bool = False) -> Record:
    """`Source.read` of any row, or `Source.read_header`.

    Raises:
      BadSample: the row is a `bad_row`, or the sample cannot be used.
    """
    if is_bad(row):
        raise BadSample(*row[_BAD])
    with located(source, row):
        return source.read_header(row) if header_only else source.read(row)


def load_json(data: bytes | str) -> Any:
    """Parsed JSON.

    Raises:
      BadSample: it is not valid, or too deep.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("wrong JSON", str(error)) from error


def read_file(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """A file, or a part of it.

    Raises:
      BadSample: it cannot be read.
    """
    try:
        return storage.read(path, offset, size)
    except FileNotFoundError as error:
        raise BadSample("missing file", path) from error
    except (OSError, DeepGenError) as error:
        raise BadSample("unreadable file", f"{path}: {error}") from error


def damaged_row(bad: BadSample, path: str, cause: BaseException | None) -> Row:
    """A `bad_row` for the unreadable rest of a file of many samples.

    Raises:
      OSError: the cause was an error of a remote store, which may be temporary.
    """
    if isinstance(cause, OSError) and storage.is_remote(path):
        raise cause
    return bad.at(path).as_row()
