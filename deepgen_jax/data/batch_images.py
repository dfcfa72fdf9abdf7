"""Images of a batch: their pixels, or features cached from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from deepgen_jax.data.buckets import Bucket, Sizes
from deepgen_jax.data.checks import load_pixels
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.sources import BadSample, Record
from deepgen_jax.data.sources.base import CachedImage
from deepgen_jax.data.transforms import resize


class BatchImages(Protocol):
    """The images of a batch, filled in sample by sample, from several threads."""

    def put(self, place: int, record: Record, stored: Sequence[Sequence[int]]) -> None:
        """Adds a sample's images.

        Args:
          place: of the sample in the batch.
          record: the sample.
          stored: (width, height) of its images when they were indexed.

        Raises:
          BadSample: they cannot be used.
        """

    def entries(self) -> dict[str, Any]:
        """The batch's entries."""


class PixelBatch:
    """``target`` and ``references``: uint8 [B, H, W, 3], resized to a bucket; black where there is no picture."""

    def __init__(self, config: DataConfig, bucket: Bucket, count: int) -> None:
        self._config = config
        self._sizes: Sizes = (bucket.target, *bucket.references)
        self._images = tuple(np.zeros((count, height, width, 3), np.uint8) for width, height in self._sizes)

    def put(self, place: int, record: Record, stored: Sequence[Sequence[int]]) -> None:
        """See `BatchImages`."""
        config = self._config
        _check_count(record, self._sizes)
        # The index pads its sizes to the most images that a sample has.
        for data, before, size, pixels in zip(record.images, stored, self._sizes, self._images, strict=False):
            if isinstance(data, CachedImage):  # of a prompt without a picture
                continue
            image = load_pixels(data, config.max_pixels)
            if image.size != tuple(before):
                raise BadSample("changed since indexed", f"an image is now {image.width}x{image.height}")
            pixels[place] = np.asarray(resize(image, config.image_size, config.transform, size))

    def entries(self) -> dict[str, Any]:
        """See `BatchImages`."""
        target, *references = self._images
        return {"target": target, "references": tuple(references)}


class FeatureShapes(NamedTuple):
    """Pixels per latent, latent channels, pixels per VLM token (sides), and width and dtype of the tokens."""

    downscale: int
    channels: int
    token_pixels: int
    hidden: int
    dtype: Any


class FeatureBatch:
    """``features``: VAE posteriors of the target and of each reference, and VLM tokens."""

    def __init__(self, features: FeatureShapes, bucket: Bucket, count: int) -> None:
        self._sizes: Sizes = (bucket.target, *bucket.references)
        shapes = [(height // features.downscale, width // features.downscale) for width, height in self._sizes]
        self._moments = tuple(
            tuple(np.zeros((count, *shape, features.channels), np.float32) for _ in range(2)) for shape in shapes
        )
        lengths = [width * height // features.token_pixels**2 for width, height in bucket.references]
        self._ends = np.cumsum([0, *lengths]).tolist()
        self._tokens = np.zeros((count, self._ends[-1], features.hidden), features.dtype)

    def put(self, place: int, record: Record, stored: Sequence[Sequence[int]]) -> None:
        """See `BatchImages`."""
        _check_count(record, self._sizes)
        for number, (image, size) in enumerate(zip(record.images, self._sizes, strict=True)):
            assert isinstance(image, CachedImage)
            if image.size != size:
                raise BadSample("changed since indexed", f"an image is now {image.size[0]}x{image.size[1]}")
            pairs = list(zip((image.mean, image.logvar), self._moments[number], strict=True))
            if number:
                pairs.append((image.tokens, self._tokens[:, self._ends[number - 1] : self._ends[number]]))
            for array, batch in pairs:
                if array is None or (array.shape, array.dtype) != (batch.shape[1:], batch.dtype):
                    raise BadSample("damaged record", f"features of an image of {size[0]}x{size[1]} have a wrong shape")
                batch[place] = array

    def entries(self) -> dict[str, Any]:
        """See `BatchImages`."""
        target, *references = self._moments
        return {"features": {"target": target, "references": tuple(references), "image_tokens": self._tokens}}


def _check_count(record: Record, sizes: Sizes) -> None:
    if len(record.images) != len(sizes):
        raise BadSample("changed since indexed", f"it has {len(record.images)} images")
