"""The procedural world as a data set: rows are numbers, pictures are drawn when they are read.

The path says what would else be the files' own business, ``size=96,samples=200000,seed=0``: the side of the pictures in
pixels, samples of an epoch, and the seed; what is left out takes these values. ``split`` is "train" or "held_out".
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from PIL import Image

from deepgen_jax.data import synthetic
from deepgen_jax.data.config import SourceConfig
from deepgen_jax.data.files import FileInfo
from deepgen_jax.data.sources.base import CachedImage, Record, Row, Source
from deepgen_jax.data.transforms import UNIT
from deepgen_jax.errors import DeepGenError

_DEFAULTS = {"size": 96, "samples": 200_000, "seed": 0}


class Synthetic(Source):
    """See `deepgen_jax.data.synthetic`."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        values = _parse(config)
        self._size, self._samples, self._seed = (values[name] for name in _DEFAULTS)
        if config.split not in synthetic.SPLITS:
            raise DeepGenError(
                f"source {config.name}: split is {config.split!r}; use {' or '.join(synthetic.SPLITS)}"
            )

    def files(self) -> list[FileInfo]:
        """A single one that does not exist; its stamp is the version of the world."""
        return [FileInfo(self.config.path, self._samples, f"world {synthetic.VERSION}")]

    def scan(self, path: str) -> Iterator[Row]:
        yield from range(self._samples)

    def read(self, row: Row) -> Record:
        sample = self._sample(row)
        scenes = (sample.scene, *sample.references)
        return Record(sample.text, tuple(_encoded(synthetic.render(scene, self._size)) for scene in scenes))

    def look(self, row: Row) -> Record:
        sample = self._sample(row)
        picture = CachedImage((self._size, self._size))
        return Record(sample.text, (picture,) * (1 + len(sample.references)))

    def _sample(self, row: Row) -> synthetic.Sample:
        return synthetic.make_sample(self.config.split, self.config.task, seed=self._seed, index=int(row))


def _parse(config: SourceConfig) -> dict[str, int]:
    values = dict(_DEFAULTS)
    for part in config.path.split(","):
        name, equals, text = part.strip().partition("=")
        if name not in values or not equals or not text.strip().isdecimal():
            raise DeepGenError(
                f"source {config.name}: path has {part.strip()!r}; write size=96,samples=200000,seed=0 or a part of it"
            )
        values[name] = int(text)
    if values["size"] < 2 * UNIT or values["size"] % UNIT or not values["samples"]:
        raise DeepGenError(
            f"source {config.name}: size is {values['size']} and samples {values['samples']}; sizes are multiples of "
            f"{UNIT} from {2 * UNIT} on, and there must be samples"
        )
    return values


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    # Hardly compressed: it is read again at once.
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
