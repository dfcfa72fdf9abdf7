"""Names under which a data set holds the text, the target image and the references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.sources.base import BadSample
from deepgen_jax.errors import DeepGenError, did_you_mean

# Usual names, best first; docs/data.md lists them.
TEXT_NAMES = {
    "t2i": ("txt", "text", "caption", "prompt", "annotation"),
    "edit": ("instruction", "edit_prompt", "prompt", "text", "txt", "caption"),
}
IMAGE_NAMES = {
    "t2i": ("image_path", "image", "jpg", "png", "jpeg", "webp", "image_bytes", "img"),
    "edit": ("output_image", "output", "target_image", "edited_image", "target", "image"),
}
REFERENCE_NAMES = ("input_image", "input_images", "input", "source_image", "original_image", "source", "references")

SEVERAL_CAPTIONS = "several captions, the first is read"


class Columns(NamedTuple):
    """Names in a data set, each a list of alternatives of which the first that is not empty counts."""

    text: tuple[str, ...]
    image: tuple[str, ...]
    references: tuple[str, ...]

    def text_of(self, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The text of a sample, and notes for `Record.notes`. Of a list of captions the first is taken.

        Raises:
          BadSample: there is none, or it is no UTF-8 text.
        """
        value = _first(values, self.text)
        notes: tuple[str, ...] = ()
        if isinstance(value, list):
            captions = [caption for caption in value if not _empty(caption)]
            value = captions[0] if captions else ""
            notes = (SEVERAL_CAPTIONS,) if len(captions) > 1 else ()
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadSample("wrong text", f"not UTF-8: {error}") from error
        if not isinstance(value, str):
            raise BadSample("missing field", f"no text under {' or '.join(self.text)}")
        return value, notes

    def images_of(self, values: Mapping[str, Any]) -> list[Any]:
        """The values of the target and the references, in this order.

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

    @property
    def names(self) -> list[str]:
        """All names, each once."""
        return list(dict.fromkeys((*self.text, *self.image, *self.references)))


def columns_of(config: SourceConfig, available: Iterable[str] | None = None) -> Columns:
    """The names to read, from the configuration, else the usual ones.

    Args:
      config: of the source.
      available: every name that the data set has, where it is known at once; only such names are kept.

    Raises:
      DeepGenError: a name is not available, or none of the usual ones is.
    """
    usual = {"text": TEXT_NAMES[config.task], "image": IMAGE_NAMES[config.task]}
    if config.task == "edit":
        usual["references"] = REFERENCE_NAMES
    names = {key: ((config.fields[key],) if key in config.fields else usual[key]) for key in usual}
    if available is not None:
        known = list(available)
        for key, candidates in names.items():
            names[key] = tuple(name for name in candidates if name in known)
            if not names[key]:
                wanted = candidates[0] if key in config.fields else key
                raise DeepGenError(
                    f"source {config.name}: no column is called {wanted}{did_you_mean(wanted, known)}; name it with "
                    f"data.sources.{config.name}.fields.{key}=COLUMN"
                )
    return Columns(names["text"], names["image"], names.get("references", ()))


def _absent(value: Any) -> bool:
    # Not b"": that is an image file of no bytes.
    return value is None or value == ""


def _empty(value: Any) -> bool:
    return value is None or value in ("", b"", [])


def _first(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first value that is not empty, else the first that is there."""
    present = [values[name] for name in names if values.get(name) is not None]
    return next((value for value in present if not _empty(value)), present[0] if present else None)
