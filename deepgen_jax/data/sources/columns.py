"""Which of a data set's names hold the text, the target image and the references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.sources.base import BadSample
from deepgen_jax.errors import DeepGenError, did_you_mean

# Usual names, best first.
_TEXT = {
    "t2i": ("txt", "text", "caption", "prompt", "annotation"),
    "edit": ("instruction", "edit_prompt", "prompt", "text", "txt", "caption"),
}
_IMAGE = {
    "t2i": ("image_path", "image", "jpg", "png", "jpeg", "webp", "image_bytes", "img"),
    "edit": ("output_image", "output", "target_image", "edited_image", "target", "image"),
}
_REFERENCES = ("input_image", "input_images", "input", "source_image", "original_image", "source", "references")


class Columns(NamedTuple):
    """Names in a data set, each a list of alternatives of which the first that is not empty counts."""

    text: tuple[str, ...]
    image: tuple[str, ...]
    references: tuple[str, ...]

    def text_of(self, values: Mapping[str, Any]) -> str:
        """The text of a sample.

        Raises:
          BadSample: there is none.
        """
        value = _first(values, self.text)
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadSample("wrong text", f"not UTF-8: {error}") from error
        if not isinstance(value, str):
            raise BadSample("missing field", f"no text under {' or '.join(self.text)}")
        return value

    def images_of(self, values: Mapping[str, Any]) -> list[Any]:
        """The values that stand for the target and the references, in this order.

        Raises:
          BadSample: one is missing.
        """
        target = _first(values, self.image)
        if isinstance(target, list) and len(target) == 1:
            target = target[0]
        if _absent(target) or isinstance(target, list):
            raise BadSample("missing field", f"no image under {' or '.join(self.image)}")
        if not self.references:
            return [target]
        references = _first(values, self.references)
        references = references if isinstance(references, list) else [references]
        if not references or any(_absent(reference) for reference in references):
            raise BadSample("missing field", f"no reference under {' or '.join(self.references)}")
        return [target, *references]


def columns_of(config: SourceConfig, available: Iterable[str] | None = None) -> Columns:
    """The names to read, from the configuration, else the usual ones.

    Args:
      config: of the source.
      available: every name that the data set has, where it is known at once; only such names are kept.

    Raises:
      DeepGenError: a name is not available, or none of the usual ones is.
    """
    usual = {"text": _TEXT[config.task], "image": _IMAGE[config.task]}
    if config.task == "edit":
        usual["references"] = _REFERENCES
    names = {key: ((config.fields[key],) if key in config.fields else usual[key]) for key in usual}
    if available is not None:
        known = list(available)
        for key, candidates in names.items():
            names[key] = tuple(name for name in candidates if name in known)
            if not names[key]:
                wanted = candidates[0] if key in config.fields else key
                raise DeepGenError(
                    f"source {config.name}: nothing is called {wanted}{did_you_mean(wanted, known)}; "
                    f"say which with fields={{'{key}': ...}}"
                )
    return Columns(names["text"], names["image"], names.get("references", ()))


def _absent(value: Any) -> bool:
    # Not b"": that is an image file of no bytes.
    return value is None or value == ""


def _first(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first value that is not empty, else the first that is there."""
    present = [values[name] for name in names if values.get(name) is not None]
    return next((value for value in present if value not in ("", b"", [])), present[0] if present else None)
