"""What every data set gives: rows that are found once, and a record for a row on demand."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deepgen_jax.data import files
from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.files import Blob, FileInfo
from deepgen_jax.data.source_kinds import SOURCE_KINDS


class CachedImage(NamedTuple):
    """What the frozen encoders made of an image.

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
#: What finds a sample again, as JSON; `bad_row` where there is nothing to find.
Row: TypeAlias = Any

_BAD = "bad"


class BadSample(Exception):
    """A sample that cannot be used. Caught and counted, never shown alone.

    Attributes:
      reason: what is wrong in a few words, the same for every sample with that fault.
      detail: which file, and what was found there.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Record(NamedTuple):
    """A sample before its images are decoded.

    Attributes:
      text: caption or instruction.
      images: the target, then the references.
    """

    text: str
    images: tuple[ImageData, ...]


class Source(abc.ABC):
    """A data set of one format.

    ``scan`` runs once when the index is built and tells where each sample is; its rows are kept with the index, so that
    a data set of any size takes no memory and no start-up time later on.
    """

    #: Endings of the files that `files` looks for.
    suffixes: tuple[str, ...] = ()

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes open it anew: open files stay here, and classes of a user's file are found again.
        return _reopen, (SOURCE_KINDS.target(self.config.kind), self.config)

    def files(self) -> list[FileInfo]:
        """The files that hold or list the samples; a change of one makes the index stale.

        Raises:
          DeepGenError: there are none.
        """
        return files.list_files(self.config.path, self.suffixes, f"source {self.config.name}")

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

    def look(self, row: Row) -> Record:
        """`read`, for who wants the text and can do with images that tell their sizes."""
        return self.read(row)


def _reopen(target: str, config: SourceConfig) -> Source:
    # By its class, not its kind: what `register` added is not known in a new process.
    return SOURCE_KINDS.load(target, f"source {config.name}: kind")(config)


def bad_row(reason: str, detail: str = "") -> Row:
    """Stands in for a sample that was found to be of no use during the scan."""
    return {_BAD: [reason, detail]}


def read_row(source: Source, row: Row, *, sizes_only: bool = False) -> Record:
    """`Source.read` of any row, or `Source.look` where only text and sizes are wanted.

    Raises:
      BadSample: the row is a `bad_row`, or the sample cannot be used.
    """
    if isinstance(row, dict) and _BAD in row:
        raise BadSample(*row[_BAD])
    return source.look(row) if sizes_only else source.read(row)


def load_json(data: bytes, where: str) -> Any:
    """Parsed JSON.

    Raises:
      BadSample: it is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("wrong JSON", f"{where}: {error}") from error


def read_file(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """A file, or a part of it.

    Raises:
      BadSample: it cannot be read.
    """
    try:
        return files.read(path, offset, size)
    except FileNotFoundError as error:
        raise BadSample("missing file", path) from error
    except OSError as error:
        raise BadSample("unreadable file", f"{path}: {error}") from error


def damaged(bad: BadSample, path: str, cause: BaseException | None) -> Row:
    """The row that stands for what cannot be read of a file of many samples.

    Raises:
      OSError: the cause was a store that has not answered, which says nothing of the file.
    """
    if isinstance(cause, OSError) and files.is_remote(path):
        raise cause
    return bad_row(bad.reason, bad.detail)
