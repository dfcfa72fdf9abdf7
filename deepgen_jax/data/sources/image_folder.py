"""A folder of images, each with its caption in a ``.txt`` file of the same name.

The whole file is the caption, however many lines it has. Images that differ only in their ending share a caption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, read_file
from deepgen_jax.data.storage import Blob
from deepgen_jax.errors import DeepGenError

SEVERAL_LINES = "caption of several lines, read as one"


class ImageFolder(Source):
    """Rows are image paths."""

    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        if config.task != "t2i":
            raise DeepGenError(f"source {config.name}: an image_folder holds no edits; list them in a json source")

    def scan(self, path: str) -> Iterator[Row]:
        yield path

    def read(self, row: Row) -> Record:
        caption = read_file(f"{os.path.splitext(row)[0]}.txt")
        try:
            text = caption.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadSample("wrong text", f"its caption: {error}") from error
        return Record(text, (Blob(row),), (SEVERAL_LINES,) if len(text.splitlines()) > 1 else ())
