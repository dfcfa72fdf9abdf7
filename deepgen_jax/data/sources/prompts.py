"""Prompts without pictures, for distillation: any file that `deepgen_jax.data.prompt_rows` reads.

The fields ``width`` and ``height`` of a row, in pixels, give the aspect of its image; without them it is square.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.prompt_rows import Row as PromptRow
from deepgen_jax.data.prompt_rows import read_rows
from deepgen_jax.data.sources.base import CachedImage, Record, Row, Source, bad_row
from deepgen_jax.data.storage import is_remote
from deepgen_jax.errors import DeepGenError

# Sides in pixels. An image that has none is larger than ``data.image_size``, so that every rule fits it to that.
_LARGEST_SIDE = 16384


class Prompts(Source):
    """Rows are [file, number, text, width, height]."""

    suffixes = (".txt", ".jsonl", ".json", ".csv", ".parquet")
    has_images = False

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        where = f"source {config.name}"
        if config.task != "t2i":
            raise DeepGenError(f"{where}: prompts have no references; set task=t2i, or give edits as kind=json")
        if config.fields:
            raise DeepGenError(f"{where}: fields are not renamed in prompt files; call the column 'prompt'")
        if is_remote(config.path):
            raise DeepGenError(f"{where}: prompt files are read from a local disk; copy {config.path} there")

    def scan(self, path: str) -> Iterator[Row]:
        for row in read_rows(Path(path)):
            try:
                text, _ = row.prompt()
                yield [str(row.file), row.number, text.strip(), *_size(row)]
            except DeepGenError as error:
                yield bad_row("wrong prompt", str(error), row.where)

    def read(self, row: Row) -> Record:
        _, _, text, width, height = row
        return Record(text, (CachedImage((width, height)),))


def _size(row: PromptRow) -> tuple[int, int]:
    """(width, height) of a row.

    Raises:
      DeepGenError: only one is given, or one is no number of pixels.
    """
    given = [row.fields.get(name) for name in ("width", "height")]
    if given == [None, None]:
        return _LARGEST_SIDE, _LARGEST_SIDE
    sides = [int(side) if isinstance(side, str) and side.isdecimal() else side for side in given]
    checked: list[int] = []
    for name, side in zip(("width", "height"), sides, strict=True):
        if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= _LARGEST_SIDE:
            raise DeepGenError(f"{name!r} is {side!r}, expected 1 to {_LARGEST_SIDE} pixels; give both or neither")
        checked.append(side)
    return checked[0], checked[1]
