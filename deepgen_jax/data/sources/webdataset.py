"""WebDataset tars: neighbouring members that share a name up to its first dot are one sample.

``0001.jpg`` with ``0001.txt`` or ``0001.json`` is a captioned image; an edit is ``0001.input.jpg`` (or ``input_0``,
``input_1``, ...), ``0001.output.jpg`` and ``0001.txt`` or ``0001.json``. A JSON member holds the text under one of the
usual names. Members are read by their place in the tar, in any order, so the tars must not be compressed.

A further dot, as in ``photo.v2.jpg``, starts the ending; where a sample lacks something because of that, it is
counted under "dots in member name".
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from deepgen_jax.data import storage
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, bad_row, load_json, read_file
from deepgen_jax.data.sources.columns import Columns, columns_of
from deepgen_jax.data.storage import Blob
from deepgen_jax.errors import DeepGenError

_NUMBERED = re.compile(r"(.*?)_?(\d{1,9})")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Headers with long names and attributes take a few kilobytes.
_LONGEST_HEADER = 2**24
# What tarfile raises on headers that are wrong in some way.
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)


class _Sample(NamedTuple):
    """Members with one key.

    Attributes:
      key: folder and name up to the first dot.
      places: (offset, size) by name, ``input`` or else the ending; a list of (number, place) for numbered ones.
      dotted: names of members whose ending has a dot.
      repeated: names that occur twice.
    """

    key: str
    places: dict[str, Any]
    dotted: list[str]
    repeated: list[str]


class WebDataset(Source):
    """Rows are [tar, key, name of the text member, place of the text, place of the target, of the references...]."""

    suffixes = (".tar",)

    def scan(self, path: str) -> Iterator[Row]:
        columns = columns_of(self.config)
        with storage.open_file(path) as file:
            start = file.read(6)
            for magic, name in _COMPRESSED.items():
                if start.startswith(magic):
                    raise DeepGenError(f"source {self.config.name}: {path} is compressed with {name}; unpack it first")
            try:
                for sample in _samples(_Headers(file)):
                    yield _row(path, sample, columns)
            except _TAR_ERRORS as error:
                yield bad_row("damaged tar", str(error), path)

    def read(self, row: Row) -> Record:
        path, _, name, text, *images = row
        content: Any = read_file(path, *text)
        values = load_json(content) if name == "json" else {name: content}
        if not isinstance(values, dict):
            raise BadSample("wrong JSON", "the JSON member is no object")
        caption, notes = columns_of(self.config).text_of(values)
        return Record(caption, tuple(Blob(path, *image) for image in images), notes)

    def place(self, row: Row) -> str:
        return f"{row[0]}: member {row[1]}"


class _Headers:
    """A tar whose reader cannot be led to read a huge header, or to places outside the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, 2)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header says that it has {size} bytes")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if not 0 <= position <= self.size:
            raise tarfile.ReadError("a member reaches beyond the end")
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def _samples(file: _Headers) -> Iterator[_Sample]:
    """Each run of members with one key."""
    sample = _Sample("", {}, [], [])
    opened: Any = file
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        for member in tar:
            # tarfile keeps every member that it has passed.
            tar.members = []  # type: ignore[attr-defined]
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            taken = member.isreg() and not member.issparse() and stem and ending
            key = f"{folder}/{stem}" if folder else stem
            if taken and key != sample.key:
                if sample.places:
                    yield sample
                sample = _Sample(key, {}, [], [])
            if member.size < 0 or member.offset_data + member.size > file.size or tar.offset <= member.offset:
                raise tarfile.ReadError(f"member {member.name} says that it has {member.size} bytes")
            if taken:
                _add(sample, name, ending.lower(), (member.offset_data, member.size))
        if sample.places:
            yield sample
        # tarfile takes a broken or cut-off header for the end; the true end is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends early")


def _add(sample: _Sample, member: str, ending: str, place: tuple[int, int]) -> None:
    name = ending.rpartition(".")[0] or ending
    if name != ending:
        sample.dotted.append(member)
    match = _NUMBERED.fullmatch(name)
    if match is not None and match.group(1):
        # input_0, input_1, ...: one list, in the order of the numbers.
        numbered = sample.places.setdefault(match.group(1), [])
        if isinstance(numbered, list):
            numbered.append((int(match.group(2)), place))
        return
    if name in sample.places:
        sample.repeated.append(member)
    sample.places[name] = place


def _row(path: str, sample: _Sample, columns: Columns) -> Row:
    values = {
        name: [place for _, place in sorted(found)] if isinstance(found, list) else found
        for name, found in sample.places.items()
    }
    try:
        name = next((name for name in (*columns.text, "json") if name in values), None)
        if name is None:
            raise BadSample("missing field", f"no text member: .json or .{' or .'.join(columns.text)}")
        if isinstance(values[name], list):
            raise BadSample("missing field", f"the text member {name} is numbered")
        images = columns.images_of(values)
        if sample.repeated:
            raise BadSample("member twice", f"{sample.repeated[0]} and another have one name")
        return [path, sample.key, name, values[name], *images]
    except BadSample as bad:
        known = {*columns.text, *columns.image, *columns.references}
        if any(not _is_known(member, known) for member in sample.dotted):
            bad = BadSample(
                "dots in member name", f"{bad.detail}: {sample.dotted[0]} belongs to {sample.key} with the ending after"
                " its first dot; write another character for it"
            )
        return bad.at(f"{path}: member {sample.key}").as_row()


def _is_known(member: str, known: set[str]) -> bool:
    name = member.partition(".")[2].lower().rpartition(".")[0]
    match = _NUMBERED.fullmatch(name)
    return name in known or (match is not None and match.group(1) in known)
