"""Files of `deepgen data cache`: a folder a source, with features of the frozen encoders instead of pictures.

    OUT/pairs/manifest.json           encoders and settings, number of samples and shards
    OUT/pairs/00000.array_record      a ``tf.train.Example`` for each sample
    OUT/pairs/00000.jsonl             a line for each planned sample: its id, text and sizes, or why it is bad

The index reads the lines only. A shard exists once its ArrayRecord file does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgen_jax.config import DeepGenConfig, to_dict
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.data.sources.base import CachedImage
from deepgen_jax.data.sources.tf_example import Feature, parse_example, write_example
from deepgen_jax.errors import DeepGenError

FORMAT, VERSION = "deepgen-jax-features", 1
MANIFEST = "manifest.json"
#: Endings of a shard's two files.
RECORDS, LINES = ".array_record", ".jsonl"
#: What VLM tokens may be stored as.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class FeatureManifest:
    """``manifest.json`` of one source's features.

    Attributes:
      source: name of the source; task: its task.
      samples: planned, those included that turned out to be bad.
      shard_size: planned samples of a shard.
      data_digest: of the data and the choice of buckets; "origin" in the file.
      weights: digest of the encoders' weights.
      vae, vision: configurations of the encoders.
      image_size, transform: as in `DataConfig`.
      dtype: of the computation, and of the VLM tokens.
    """

    source: str
    task: str
    samples: int
    shard_size: int
    data_digest: str
    weights: str
    vae: dict[str, Any]
    vision: dict[str, Any]
    image_size: int
    transform: str
    dtype: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.shard_size)

    def to_json(self) -> str:
        """The file's text."""
        values = dataclasses.asdict(self)
        values["origin"] = values.pop("data_digest")
        return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1)

    @classmethod
    def from_json(cls, text: bytes, where: str) -> FeatureManifest:
        """Parsed.

        Raises:
          DeepGenError: not a manifest, or of a different version.
        """
        try:
            values = json.loads(text)
            kind, version = values.pop("format"), values.pop("version")
            if kind != FORMAT:
                raise ValueError(f"format is {kind!r}")
            if version != VERSION:
                raise DeepGenError(f"{where} is of version {version}, expected {VERSION}; cache the features again")
            return cls(data_digest=values.pop("origin"), **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DeepGenError(f"{where} is no manifest of cached features ({error}); cache them again") from None

    def differences(self, other: FeatureManifest) -> list[str]:
        """Names of the fields in which two manifests differ."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def check(self, where: str, config: DataConfig, model: DeepGenConfig, weights: str) -> None:
        """Checks that a run may use the features.

        Args:
          where: begins the message.
          config: the run's data.
          model: the run's model.
          weights: digest of the run's encoders.

        Raises:
          DeepGenError: they come from a different model or image size.
        """
        current: dict[str, Any] = {
            "image_size": config.image_size,
            "transform": config.transform,
            **encoder_configs(model),
            "weights": weights,
        }
        for name, value in current.items():
            if getattr(self, name) != value:
                what = f"{name} {getattr(self, name)}, and this run has {value}"
                if name in ("vae", "vision", "weights"):
                    what = f"another model: its {'encoders have other weights' if name == 'weights' else name}"
                raise DeepGenError(f"{where} was cached with {what}; run `deepgen data cache` with this run's config")


def encoder_configs(model: DeepGenConfig) -> dict[str, Any]:
    """``vae`` and ``vision`` of a manifest."""
    return json.loads(json.dumps({"vae": to_dict(model.vae), "vision": to_dict(model.vision)}))


def write_features(sample_id: str, source: str, text: str, images: Sequence[CachedImage]) -> bytes:
    """A sample as a serialised ``tf.train.Example``; arrays are stored as their bytes, little-endian."""
    means, logvars = [_array(image.mean) for image in images], [_array(image.logvar) for image in images]
    tokens = [_array(image.tokens) for image in images[1:]]
    features: dict[str, Any] = {
        "id": [sample_id.encode()],
        "source": [source.encode()],
        "text": [text.encode()],
        "sizes": np.array([image.size for image in images], np.int64),
        "latent_shapes": np.array([mean.shape for mean in means], np.int64),
        "mean": [mean.astype("<f4").tobytes() for mean in means],
        "logvar": [logvar.astype("<f4").tobytes() for logvar in logvars],
    }
    if tokens:
        features["token_shapes"] = np.array([array.shape for array in tokens], np.int64)
        features["token_dtype"] = [tokens[0].dtype.name.encode()]
        features["tokens"] = [array.tobytes() for array in tokens]
    return write_example(features)


def read_features(data: bytes) -> tuple[str, list[CachedImage]]:
    """Text and images of `write_features`.

    Raises:
      ValueError: the bytes are no cached features.
    """
    features = parse_example(data)
    try:
        sizes = _numbers(features["sizes"]).reshape(-1, 2).tolist()
        shapes = _numbers(features["latent_shapes"]).reshape(len(sizes), 3).tolist()
        means, logvars = _bytes(features["mean"]), _bytes(features["logvar"])
        tokens: list[np.ndarray | None] = [None]
        if len(sizes) > 1:
            dtype = token_dtype(_bytes(features["token_dtype"])[0].decode())
            token_shapes = _numbers(features["token_shapes"]).reshape(-1, 2).tolist()
            stored = zip(_bytes(features["tokens"]), token_shapes, strict=True)
            tokens += [np.frombuffer(array, dtype).reshape(shape) for array, shape in stored]
        columns = zip(sizes, shapes, means, logvars, tokens, strict=True)
        images = []
        for (width, height), shape, *stored_moments, array in columns:
            mean, logvar = (np.frombuffer(moment, "<f4").reshape(shape) for moment in stored_moments)
            images.append(CachedImage((width, height), mean, logvar, array))
        return _bytes(features["text"])[0].decode(), images
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no cached features: {error}") from error


def token_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of stored VLM tokens.

    Raises:
      ValueError: it is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"tokens are of the unknown dtype {name}")
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else "<f4")


def _array(array: np.ndarray | None) -> np.ndarray:
    if array is None:
        raise ValueError("an image without its features cannot be stored")
    return np.ascontiguousarray(array)


def _numbers(feature: Feature) -> np.ndarray:
    if not isinstance(feature, np.ndarray):
        raise TypeError("bytes where numbers are expected")
    return feature


def _bytes(feature: Feature) -> list[bytes]:
    if isinstance(feature, np.ndarray):
        raise TypeError("numbers where bytes are expected")
    return feature
