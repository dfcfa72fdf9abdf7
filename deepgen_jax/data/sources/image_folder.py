"""A folder of images, each with its caption in a ``.txt`` file of the same name."""

from __future__ import annotations

import os
from collections.abc import Iterator

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.files import Blob
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, read_file
from deepgen_jax.errors import DeepGenError


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
            return Record(caption.decode("utf-8-sig").strip(), (Blob(row),))
        except UnicodeDecodeError as error:
            raise BadSample("wrong text", f"caption of {row}: {error}") from error
