"""Acceleration settings: a first-block cache, and guidance in only part of the steps.

Both change the image slightly and need no training; `deepgen_jax.inference.accelerated` implements them. Importing
this module is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepgen_jax.errors import DeepGenError


@dataclass(frozen=True)
class Acceleration:
    """Acceleration settings; off by default.

    Attributes:
      cache: threshold of the first-block cache, such as 0.08; larger values skip more. None always runs all layers.
      taylor: extrapolate skipped layers from the last two full evaluations instead of reusing the last.
      guidance_interval: (start, stop) as shares of the steps, such as (0, 0.6); guidance applies only within it.

    Raises:
      DeepGenError: a value is out of range.
    """

    cache: float | None = None
    taylor: bool = False
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and not 0 <= self.cache <= 10:
            raise DeepGenError(f"the cache's threshold is {self.cache}; use 0 to 10, such as 0.08")
        if self.taylor and self.cache is None:
            raise DeepGenError("extrapolation (taylor) needs the cache; set its threshold, too")
        if self.guidance_interval is not None:
            start, stop = self.guidance_interval
            if not 0 <= start < stop <= 1:
                raise DeepGenError(
                    f"the guidance interval is {start:g} to {stop:g}; use shares of the steps, such as 0 to 0.6"
                )

    def __bool__(self) -> bool:
        return self.cache is not None or self.guidance_interval is not None

    def arguments(self) -> dict[str, Any]:
        """The settings in use, as keyword arguments of a pipeline call and as image metadata."""
        values: dict[str, Any] = {}
        if self.cache is not None:
            values["cache"] = self.cache
        if self.taylor:
            values["taylor"] = True
        if self.guidance_interval is not None:
            values["guidance_interval"] = list(self.guidance_interval)
        return values


NO_ACCELERATION = Acceleration()


def interval_of(values: str | Sequence[float]) -> tuple[float, float]:
    """Parses (start, stop) from "0,0.6" or two numbers.

    Raises:
      DeepGenError: ``values`` is not a pair of numbers.
    """
    try:
        start, stop = map(float, values.split(",") if isinstance(values, str) else values)
    except (TypeError, ValueError):
        raise DeepGenError(
            f"guidance interval {values!r}: not two numbers; write shares of the steps, such as 0,0.6"
        ) from None
    return start, stop
