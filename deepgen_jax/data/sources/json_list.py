"""Lists of samples in JSON: text-to-image pairs and edit triplets, as the released system reads them.

Text to image: ``{"txt": ..., "image_path": ...}``; editing: ``{"instruction": ..., "input_image": [...],
"output_image": ...}``. A file holds a list of them, or (``.jsonl``) one a line. Other names go into
`SourceConfig.fields`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepgen_jax.data.files import Blob, join, parent
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, bad_row, load_json, read_file
from deepgen_jax.data.sources.columns import columns_of
from deepgen_jax.user_warnings import warn_user


class JsonList(Source):
    """Rows are [text, image path, ...]."""

    suffixes = (".json", ".jsonl")

    def scan(self, path: str) -> Iterator[Row]:
        columns = columns_of(self.config)
        root = self.config.root or parent(path)
        for number, item in enumerate(list_items(path)):
            try:
                if isinstance(item, BadSample):
                    raise item
                if not isinstance(item, dict):
                    raise BadSample("wrong JSON", f"{path}: item {number} is no object")
                images = columns.images_of(item)
                if not all(isinstance(image, str) for image in images):
                    raise BadSample("wrong JSON", f"{path}: item {number}: an image is no path")
                yield [columns.text_of(item), *(join(root, image) for image in images)]
            except BadSample as bad:
                yield bad_row(bad.reason, bad.detail or f"{path}: item {number}")

    def read(self, row: Row) -> Record:
        text, *paths = row
        return Record(text, tuple(Blob(path) for path in paths))


def list_items(path: str) -> Iterator[Any]:
    """The items of a JSON list or a ``.jsonl`` file; what cannot be parsed is one `BadSample`."""
    try:
        data = read_file(path)
        if path.lower().endswith(".jsonl"):
            for number, line in enumerate(data.splitlines()):
                if line.strip():
                    try:
                        yield load_json(line, f"{path}: line {number + 1}")
                    except BadSample as bad:
                        yield bad
            return
        parsed = load_json(data, path)
    except BadSample as bad:
        warn_user(f"{path} is left out: {bad.reason} ({bad.detail})")
        yield bad
        return
    # A file with a single sample need not wrap it into a list.
    yield from parsed if isinstance(parsed, list) else [parsed]
