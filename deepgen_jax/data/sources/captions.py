"""Caption sets: a JSON list of ``{"image": ..., "annotation": ...}``, the annotation a JSON file with a ``caption``."""

from __future__ import annotations

from collections.abc import Iterator

from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, bad_row, load_json, read_file
from deepgen_jax.data.sources.columns import Columns
from deepgen_jax.data.sources.json_list import item_place, list_items
from deepgen_jax.data.storage import Blob, join, parent


class Captions(Source):
    """Rows are [list, item, image path, annotation path]."""

    suffixes = (".json", ".jsonl")

    def scan(self, path: str) -> Iterator[Row]:
        names = [self.config.fields.get("image", "image"), self.config.fields.get("annotation", "annotation")]
        root = self.config.root or parent(path)
        for number, item in list_items(path):
            place = item_place(path, number)
            if isinstance(item, BadSample):
                yield item.at(place).as_row()
                continue
            values = [item.get(name) for name in names] if isinstance(item, dict) else []
            paths = [join(root, value) for value in values if isinstance(value, str) and value]
            if len(paths) == len(names):
                yield [path, number, *paths]
            else:
                yield bad_row("missing field", f"no {' or '.join(names)}", place)

    def read(self, row: Row) -> Record:
        _, _, image, annotation = row
        name = self.config.fields.get("text", "caption")
        try:
            content = load_json(read_file(annotation))
            if not isinstance(content, dict):
                raise BadSample("missing field", f"no object with a {name}")
            text, notes = Columns((name,), (), ()).text_of(content)
        except BadSample as bad:
            raise bad.at(annotation) from bad.__cause__
        return Record(text, (Blob(image),), notes)

    def place(self, row: Row) -> str:
        return item_place(*row[:2])
