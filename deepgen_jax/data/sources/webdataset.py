"""WebDataset tars: members that share a name up to its first dot are one sample.

``0001.jpg`` with ``0001.txt`` or ``0001.json`` is a captioned image; an edit is ``0001.input.jpg`` (or ``input_0``,
``input_1``, ...), ``0001.output.jpg`` and ``0001.txt`` or ``0001.json``. A JSON member holds the text under one of the
usual names. Members are read by their place in the tar, in any order, so the tars must not be compressed.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any

from deepgen_jax.data import files
from deepgen_jax.data.files import Blob
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, bad_row, load_json, read_file
from deepgen_jax.data.sources.columns import Columns, columns_of
from deepgen_jax.errors import DeepGenError

_NUMBERED = re.compile(r"(.*?)_?(\d+)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

#: Members of a sample by name: ``input`` or else the ending; places are (offset, size).
_Members = dict[str, Any]


class WebDataset(Source):
    """Rows are [tar, name of the text member, place of the text, place of the target, places of references...]."""

    suffixes = (".tar",)

    def scan(self, path: str) -> Iterator[Row]:
        columns = columns_of(self.config)
        with files.open_file(path) as file:
            start = file.read(6)
            for magic, name in _COMPRESSED.items():
                if start.startswith(magic):
                    raise DeepGenError(f"source {self.config.name}: {path} is compressed with {name}; unpack it first")
            file.seek(0)
            try:
                for key, members in _samples(file):
                    yield _row(path, key, members, columns)
            except (tarfile.TarError, EOFError) as error:
                yield bad_row("damaged tar", f"{path}: {error}")

    def read(self, row: Row) -> Record:
        path, name, text, *images = row
        content: Any = read_file(path, *text)
        values = load_json(content, path) if name == "json" else {name: content}
        if not isinstance(values, dict):
            raise BadSample("wrong JSON", f"{path}: a JSON member is no object")
        caption = columns_of(self.config).text_of(values)
        return Record(caption, tuple(Blob(path, *image) for image in images))


def _samples(file: Any) -> Iterator[tuple[str, _Members]]:
    """(key, members) of each run of members with one key."""
    current, members = "", dict[str, Any]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # tarfile keeps every member that it has passed.
            tar.members = []  # type: ignore[attr-defined]
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if not member.isfile() or not stem or not ending:
                continue
            key = f"{folder}/{stem}"
            if key != current and members:
                yield current, members
                members = {}
            current = key
            _add(members, ending.lower(), (member.offset_data, member.size))
        if members:
            yield current, members
        # tarfile takes a cut-off header for the end; the true end is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends early")


def _add(members: _Members, ending: str, place: tuple[int, int]) -> None:
    name = ending.rpartition(".")[0] or ending
    match = _NUMBERED.fullmatch(name)
    if match is None or not match.group(1):
        members[name] = place
        return
    # input_0, input_1, ...: one list, in the order of the numbers.
    numbered = members.setdefault(match.group(1), [])
    if isinstance(numbered, list):
        numbered.append((int(match.group(2)), place))


def _row(path: str, key: str, members: _Members, columns: Columns) -> Row:
    values = {
        name: [place for _, place in sorted(found)] if isinstance(found, list) else found
        for name, found in members.items()
    }
    try:
        name = next((name for name in (*columns.text, "json") if name in values), None)
        if name is None:
            raise BadSample("missing field", "no text member")
        return [path, name, values[name], *columns.images_of(values)]
    except BadSample as bad:
        return bad_row(bad.reason, f"{path}: {key}: {bad.detail}")
