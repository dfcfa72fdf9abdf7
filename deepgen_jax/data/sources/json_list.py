"""Lists of samples in JSON: text-to-image pairs and edit triplets, as the released system reads them.

Text to image: ``{"txt": ..., "image_path": ...}``; editing: ``{"instruction": ..., "input_image": [...],
"output_image": ...}``. A file holds a list of them, or (``.jsonl``) one a line. Other names go into
`SourceConfig.fields`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, load_json, read_file
from deepgen_jax.data.sources.columns import columns_of
from deepgen_jax.data.storage import Blob, join, parent
from deepgen_jax.user_warnings import warn_user

# Strings, brackets and commas of JSON; what is between them does not matter for its nesting.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_CLOSING = {"[": "]", "{": "}"}


class JsonList(Source):
    """Rows are [list, item, text, notes, image path, ...]."""

    suffixes = (".json", ".jsonl")

    def scan(self, path: str) -> Iterator[Row]:
        columns = columns_of(self.config)
        root = self.config.root or parent(path)
        for number, item in list_items(path):
            try:
                if isinstance(item, BadSample):
                    raise item
                if not isinstance(item, dict):
                    raise BadSample("wrong JSON", "no object")
                images = columns.images_of(item)
                if not all(isinstance(image, str) for image in images):
                    raise BadSample("wrong JSON", "an image is no path")
                text, notes = columns.text_of(item)
                yield [path, number, text, list(notes), *(join(root, image) for image in images)]
            except BadSample as bad:
                yield bad.at(item_place(path, number)).as_row()

    def read(self, row: Row) -> Record:
        _, _, text, notes, *paths = row
        return Record(text, tuple(Blob(path) for path in paths), tuple(notes))

    def place(self, row: Row) -> str:
        return item_place(*row[:2])


def item_place(path: str, number: int) -> str:
    """Location of an item: its line in a ``.jsonl`` file, from 1, else its index in the list, from 0."""
    return f"{path}: {'line' if _by_line(path) else 'item'} {number}"


def list_items(path: str) -> Iterator[tuple[int, Any]]:
    """(number, item) of a JSON list or a ``.jsonl`` file; an item that cannot be parsed is a `BadSample`."""
    try:
        data = read_file(path)
        if _by_line(path):
            for number, line in enumerate(data.splitlines(), 1):
                if line.strip():
                    yield number, _parsed(line)
            return
        parsed = _parsed(data)
        if isinstance(parsed, BadSample):
            parts = _split(data.decode("utf-8-sig", "surrogateescape"))
            if parts is None:
                raise parsed
            yield from ((number, _parsed(part)) for number, part in enumerate(parts))
            return
    except BadSample as bad:
        warn_user(f"{path} is left out: {bad.reason} ({bad.detail})")
        yield 0, bad
        return
    # A file with a single sample need not wrap it into a list.
    yield from enumerate(parsed if isinstance(parsed, list) else [parsed])


def _by_line(path: str) -> bool:
    return path.lower().endswith(".jsonl")


def _parsed(data: bytes | str) -> Any:
    try:
        return load_json(data)
    except BadSample as bad:
        return bad


def _split(text: str) -> list[str] | None:
    """The items of a list, unparsed, so that one that is broken costs no other; None if brackets do not match."""
    parts: list[str] = []
    open_brackets: list[str] = []
    start = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSING:
            if not open_brackets:
                if token != "[" or parts or text[: match.start()].strip():
                    return None
                start = match.end()
            open_brackets.append(_CLOSING[token])
        elif token in ("]", "}"):
            if not open_brackets or open_brackets.pop() != token:
                return None
            if not open_brackets:
                parts.append(text[start : match.start()])
                return parts if not text[match.end() :].strip() else None
        elif token == "," and len(open_brackets) == 1:
            parts.append(text[start : match.start()])
            start = match.end()
    return None
