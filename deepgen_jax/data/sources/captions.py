"""Caption sets: a JSON list of ``{"image": ..., "annotation": ...}``, the annotation a JSON file with a ``caption``."""

from __future__ import annotations

from collections.abc import Iterator

from deepgen_jax.data.files import Blob, join, parent
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, bad_row, load_json, read_file
from deepgen_jax.data.sources.json_list import list_items


class Captions(Source):
    """Rows are [image path, annotation path]."""

    suffixes = (".json", ".jsonl")

    def scan(self, path: str) -> Iterator[Row]:
        names = [self.config.fields.get("image", "image"), self.config.fields.get("annotation", "annotation")]
        root = self.config.root or parent(path)
        for number, item in enumerate(list_items(path)):
            if isinstance(item, BadSample):
                yield bad_row(item.reason, item.detail)
                continue
            values = [item.get(name) for name in names] if isinstance(item, dict) else []
            paths = [join(root, value) for value in values if isinstance(value, str) and value]
            if len(paths) == len(names):
                yield paths
            else:
                yield bad_row("missing field", f"{path}: item {number} lacks {' or '.join(names)}")

    def read(self, row: Row) -> Record:
        image, annotation = row
        name = self.config.fields.get("text", "caption")
        content = load_json(read_file(annotation), annotation)
        caption = content.get(name) if isinstance(content, dict) else None
        if not isinstance(caption, str):
            raise BadSample("missing field", f"{annotation} holds no {name}")
        return Record(caption, (Blob(image),))
