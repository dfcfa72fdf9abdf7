"""Settings of dataclasses: typed values from texts and JSON, and changes such as ``optimizer.learning_rate=1e-4``.

The one parser of ``KEY=VALUE`` words, for every command. tyro parses the options beside them; its own overrides
(``--optimizer.learning-rate``) cannot name an item of a tuple (``data.sources.NAME.path``), set what the class does not
declare (``rewards.NAME.options.url``), or check a dataclass once with all its changes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from deepgen_jax.config import to_dict
from deepgen_jax.errors import DeepGenError, did_you_mean

T = TypeVar("T")


def at_least(name: str, value: float, low: float) -> None:
    """Raises a DeepGenError where a setting is below its range."""
    if value < low:
        raise DeepGenError(f"{name} is {value}; it must be at least {low}")


@dataclass(frozen=True)
class _Change:
    """A word ``path=text`` and its halves."""

    word: str
    path: str
    text: str


# Changes by field, as deep as the words' paths are.
_Tree = dict[str, "_Tree | _Change"]


def apply(config: T, words: Sequence[str]) -> T:
    """A dataclass with some fields, at any depth, replaced.

    A word is ``path.to.field=value``. Texts are taken as they are; tuples are ``a,b`` or JSON ``["a", "b"]``; mappings,
    whole dataclasses (what is left out takes its default) and anything deeper are JSON; ``null`` is None. An item of a
    tuple goes by its index or, where it has one, by its name: ``data.sources.pairs.path=/data/pairs.json``. A name that
    is not there is added, if its kind is given: ``rewards.mine.kind=mine.py:Mine``. The order of the words does not
    matter: each dataclass is made, and checks itself, once, with all its changes.

    Raises:
      DeepGenError: a word names no field, its value does not fit, it is given twice, or the result is refused.
    """
    tree: _Tree = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path.strip():
            raise DeepGenError(f"{_short(word)} is no override; write path.to.field=value")
        _insert(tree, _Change(word, path.strip(), text))
    return _changed(config, type(config), tree)


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass exactly as it comes back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(to_dict(config), allow_nan=False))


def _insert(tree: _Tree, change: _Change) -> None:
    *parents, name = change.path.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if isinstance(below, _Change):
            raise _clash(below, change)
        tree = below
    if name in tree:
        raise _clash(_first(tree[name]), change)
    tree[name] = change


def _first(node: _Tree | _Change) -> _Change:
    return node if isinstance(node, _Change) else _first(next(iter(node.values())))


def _clash(one: _Change, other: _Change) -> DeepGenError:
    if one.path == other.path:
        return DeepGenError(f"{one.path} is given twice, {_short(one.word)} and {_short(other.word)}; keep one of them")
    return DeepGenError(f"{_short(one.word)} and {_short(other.word)} set the same thing; keep one of them")


def _changed(value: Any, hint: Any, node: _Tree | _Change, path: str = "") -> Any:
    """``value`` (at ``path``, of type ``hint``) with the changes below ``node``."""
    if isinstance(node, _Change):
        return _json_or_text(node.text) if hint is Any else parse(hint, node.text, _short(node.word))
    if dataclasses.is_dataclass(value):
        return _changed_dataclass(value, node, path)
    if isinstance(value, tuple):
        return _changed_tuple(value, hint, node, path)
    if value is None and hint is Any:
        value = {}  # an option of options that is not given yet, such as a reward's client.cache
    if isinstance(value, Mapping):
        item = (*typing.get_args(hint), Any, Any)[1]
        below = {key: _changed(value.get(key), item, child, f"{path}.{key}") for key, child in node.items()}
        return {**value, **below}
    word = _short(_first(node).word)
    if value is None:
        raise DeepGenError(f"{word}: {path} is null; give it whole, as JSON")
    raise DeepGenError(f"{word}: {path} is a value without fields; write {path}=value")


def _changed_dataclass(value: Any, node: _Tree, path: str) -> Any:
    names = [field.name for field in dataclasses.fields(value) if field.init]
    hints = typing.get_type_hints(type(value))
    changes: dict[str, Any] = {}
    for name, child in node.items():
        if name not in names:
            where = path or type(value).__name__
            hint = did_you_mean(name, names)
            raise DeepGenError(f"{_short(_first(child).word)}: {where} has no field {name!r}{hint}")
        below = f"{path}.{name}" if path else name
        changes[name] = _changed(getattr(value, name), hints[name], child, below)
    return dataclasses.replace(value, **changes)


def _changed_tuple(value: tuple[Any, ...], hint: Any, node: _Tree, path: str) -> tuple[Any, ...]:
    items, names = list(value), [getattr(item, "name", None) for item in value]
    touched: dict[int, _Change] = {}
    for key, child in node.items():
        first = _first(child)
        if key in names:
            index = names.index(key)
        elif key.isdecimal() and int(key) < len(items):
            index = int(key)
        elif (added := _new_item(item_hint(hint, len(items)), key, child, f"{path}.{key}")) is not None:
            items.append(added)
            continue
        else:
            known = [str(name or index) for index, name in enumerate(names)]
            raise DeepGenError(f"{_short(first.word)}: {path} has no item {key!r}{did_you_mean(key, known)}")
        if index in touched:
            raise _clash(touched[index], first)
        touched[index] = first
        items[index] = _changed(items[index], item_hint(hint, index), child, f"{path}.{key}")
    return tuple(items)


def _json_or_text(text: str) -> Any:
    """A value whose type is not known, such as an option of a reward: JSON if it is that, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _new_item(hint: Any, name: str, node: _Tree | _Change, path: str) -> Any:
    """A named item that is not there yet, such as a reward or a data source, if its kind is given; else None."""
    fields = {field.name: field for field in dataclasses.fields(hint)} if dataclasses.is_dataclass(hint) else {}
    if not {"name", "kind"} <= fields.keys() or isinstance(node, _Change) or "kind" not in node:
        return None
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in ("name", *node):
            raise DeepGenError(f"{_short(_first(node).word)}: {path} is new and needs {path}.{field.name}=... as well")
    empty = {
        field.name: None if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields.values()
    }
    hints = typing.get_type_hints(hint)
    values: dict[str, Any] = {"name": name}
    for key, child in node.items():
        if key not in fields:
            raise DeepGenError(f"{_short(_first(child).word)}: {path} has no field {key!r}{did_you_mean(key, fields)}")
        values[key] = _changed(empty[key], hints[key], child, f"{path}.{key}")
    return hint(**values)


def _short(word: str) -> str:
    return word if len(word) <= 100 else f"{word[:97]}..."


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
