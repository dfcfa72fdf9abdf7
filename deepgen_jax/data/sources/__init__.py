"""Data sets by format. Adding one: a `Source` in a file, and its name in the registry.

    register("my_format", "my_package.my_module:MySource")

or an entry point of the group ``deepgen_jax.data_sources`` in an installed package; or, without a name,
``data.sources.NAME.kind=my_module:MySource`` or ``kind=path/to/my_source.py:MySource`` on the command line.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepgen_jax.data.data_config import SourceConfig
from deepgen_jax.data.source_kinds import SOURCE_KINDS
from deepgen_jax.data.sources.base import BadSample, Record, Row, Source, read_row
from deepgen_jax.errors import DeepGenError

__all__ = ["BadSample", "Record", "Row", "Source", "open_source", "read_row", "register", "require_images"]

register = SOURCE_KINDS.register


def open_source(config: SourceConfig) -> Source:
    """The data set that ``config`` describes; nothing is read yet.

    Raises:
      DeepGenError: its kind is unknown or cannot be imported, or its settings do not fit the kind.
    """
    return SOURCE_KINDS.load(config.kind, f"source {config.name}: kind")(config)


def require_images(sources: Sequence[SourceConfig]) -> None:
    """Raises a DeepGenError where a source has prompts without pictures."""
    for source in sources:
        if not open_source(source).has_images:
            raise DeepGenError(
                f"source {source.name} has prompts without pictures, from which only distillation learns, with "
                "states=noise; give pictures, or take the source out"
            )
