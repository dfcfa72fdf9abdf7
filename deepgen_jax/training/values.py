"""Values of configuration fields, read from texts and JSON by the fields' types."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from deepgen_jax.errors import DeepGenError, did_you_mean


def parse(hint: Any, value: Any, where: str) -> Any:
    """``value``, a text or something out of JSON, as the type ``hint``; ``where`` begins messages.

    Raises:
      DeepGenError: it does not fit.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _parse_union(args, value, where)
    if origin is typing.Literal:
        by_text = {str(choice): choice for choice in args}
        if str(value) not in by_text:
            raise DeepGenError(f"{where}: {value!r} is unknown{did_you_mean(str(value), by_text)}")
        return by_text[str(value)]
    if dataclasses.is_dataclass(hint):
        return _parse_dataclass(typing.cast(type, hint), value, where)
    if origin is tuple:
        return _parse_tuple(hint, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {parse(args[0], key, where): parse(args[1], item, where) for key, item in _object(value, where).items()}
    if hint is Any:
        return value
    if hint in _SCALARS:
        return _SCALARS[hint](value, where)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise DeepGenError(f"{where}: values of this kind ({hint}) can only be set in a configuration file")


def _parse_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in choices and (value is None or (isinstance(value, str) and value.lower() in ("null", "none"))):
        return None
    errors = []
    for choice in choices:
        if choice is not type(None):
            try:
                return parse(choice, value, where)
            except DeepGenError as error:
                errors.append(error)
    raise errors[-1]


def _parse_dataclass(cls: type, value: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints, given = typing.get_type_hints(cls), _object(value, where)
    for name in given:
        if name not in fields:
            raise DeepGenError(f"{where}: {cls.__name__} has no field {name!r}{did_you_mean(name, fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in given]:
        raise DeepGenError(f"{where}: {', '.join(missing)} must be given")
    return cls(**{name: parse(hints[name], item, f"{where}: {name}") for name, item in given.items()})


def _parse_tuple(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            value = _from_json(value, where)
        elif any(typing.get_origin(arg) is tuple or dataclasses.is_dataclass(arg) for arg in args):
            raise DeepGenError(f"{where}: not a JSON list; write it as [...]")
        else:
            value = [item.strip() for item in value.split(",")] if value.strip() else []
    if not isinstance(value, list):
        raise DeepGenError(f"{where}: not a list; write a,b or a JSON list")
    if args[-1] is not Ellipsis and len(args) != len(value):
        raise DeepGenError(f"{where}: {len(value)} items; give {len(args)}")
    return tuple(parse(item_hint(hint, i), item, where) for i, item in enumerate(value))


def item_hint(hint: Any, index: int) -> Any:
    """The type of item ``index`` of a tuple type."""
    args = typing.get_args(hint)
    return args[0] if args[-1] is Ellipsis else args[index]


def _object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _from_json(value, where)
    if not isinstance(value, dict):
        raise DeepGenError(f'{where}: not a JSON object; write it as {{"name": value}}')
    return value


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DeepGenError(f"{where}: not JSON ({message}); quote it for the shell, '...'") from error


def _bool(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise DeepGenError(f"{where}: not a truth value; write true or false")
    return str(value).lower() == "true"


def _float(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DeepGenError(f"{where}: not a number")
    return number


def _int(value: Any, where: str) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _float(value, where)
    if not number.is_integer():
        raise DeepGenError(f"{where}: not a whole number")
    return int(number)


def _str(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DeepGenError(f"{where}: not a text; put it in quotes")
    return value


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {bool: _bool, int: _int, float: _float, str: _str}
