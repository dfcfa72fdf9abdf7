"""JSON configurations of other libraries, every entry of which must be accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepgen_jax.errors import DeepGenError

_MISSING: Any = object()


class Options:
    """One JSON object whose entries must all be accounted for.

    Entries whose names start with an underscore are notes of the library that wrote the file.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, Mapping):
            raise DeepGenError(f"{where} is not a JSON object")
        if odd := [name for name in values if not isinstance(name, str)]:
            raise DeepGenError(f"{where}: {odd[0]!r} is no name of an option")
        self._values, self._where = values, where
        self._seen: set[str] = set()

    def take(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """The entry ``name``, which must be of type ``kind``; ``default`` where it is absent or null."""
        self._seen.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _MISSING:
                raise DeepGenError(f"{self._where} lacks {name!r}; download it again")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is tuple and isinstance(value, list):
            if not all(type(item) is int for item in value):
                raise DeepGenError(f"{self._where}: {name} is {value!r}, expected a list of integers")
            return tuple(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise DeepGenError(f"{self._where}: {name} is {value!r}, expected {kind.__name__}")
        return value

    def child(self, name: str) -> Options | None:
        """A nested object, or None."""
        self._seen.add(name)
        value = self._values.get(name)
        return None if value is None else Options(value, f"{self._where}: {name}")

    def require(self, **supported: Any) -> None:
        """Entries that may only have one value (a tuple: one of several); absent and null mean that value."""
        for name, value in supported.items():
            self._seen.add(name)
            actual = self._values.get(name)
            choices = value if isinstance(value, tuple) else (value,)
            if actual is not None and actual not in choices:
                wanted = " or ".join(repr(choice) for choice in choices)
                raise DeepGenError(f"{self._where}: {name}={actual!r} is not supported, only {wanted} is")

    def ignore(self, *names: str) -> None:
        """Entries that do not change what is computed here."""
        self._seen.update(names)

    def finish(self) -> None:
        """Raises if an entry was not accounted for."""
        left = sorted(name for name in self._values if name not in self._seen and not name.startswith("_"))
        if left:
            name = left[0]
            more = f" (and {len(left) - 1} more: {', '.join(left[1:4])})" if len(left) > 1 else ""
            raise DeepGenError(
                f"{self._where}: the option {name}={self._values[name]!r} is unknown{more}; "
                "remove it if it does not change the model's results"
            )
