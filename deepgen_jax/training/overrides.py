"""Run configurations: read from a Python file, changed by words such as ``optimizer.learning_rate=1e-4``."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pkgutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deepgen_jax.config import to_dict
from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.registry import errors_of, load_file
from deepgen_jax.training.run_config import RunConfig
from deepgen_jax.training.values import item_hint, parse

T = TypeVar("T")

#: Package that holds one configuration file for each published stage.
CONFIGS = "deepgen_jax.configs"
# A file with several configurations, and its table of them by name.
_ROUNDS_FILE, ROUNDS = "rounds", "ROUNDS"


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


def load_config(path_or_name: str) -> RunConfig:
    """What ``get_config()`` returns, in a Python file or in a packaged configuration such as "pretrain".

    Raises:
      DeepGenError: there is no such file, it fails (told with its line), or it gives something else.
    """
    path = _config_file(path_or_name)
    try:
        code = path.read_bytes()
    except OSError as error:
        raise DeepGenError(f"{path} cannot be read: {error.strerror or error}") from error
    module = types.ModuleType(f"deepgen_config_{path.stem}")
    module.__file__ = str(path)
    # Dataclasses that the file defines look their annotations up in the module of their name.
    sys.modules[module.__name__] = module
    with errors_of(path):
        exec(compile(code, str(path), "exec"), module.__dict__)
    rounds = getattr(module, ROUNDS, None)
    named = rounds.get(path_or_name.rpartition("/")[2]) if path.stem == _ROUNDS_FILE and rounds else None
    get_config = named or getattr(module, "get_config", None)
    if not callable(get_config):
        raise DeepGenError(f"{path} has no function get_config(); define one that returns a RunConfig")
    with errors_of(path):
        config = get_config()
    if not isinstance(config, RunConfig):
        raise DeepGenError(f"{path}: get_config() returned a {type(config).__name__}; return a RunConfig")
    return config


def packaged_configs() -> dict[str, Path]:
    """Files of the packaged configurations by name; those in a folder go by its name, too: "nano/vae".

    The file ``rounds.py`` of a folder holds several, by name in its ``ROUNDS``: "nano/sft_words".
    """
    spec = importlib.util.find_spec(CONFIGS)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return dict(sorted(_configs_in(Path(folders[0])).items())) if folders else {}


def _configs_in(folder: Path, prefix: str = "") -> dict[str, Path]:
    found: dict[str, Path] = {}
    for module in pkgutil.iter_modules([str(folder)]):
        name = f"{prefix}{module.name}"
        if module.name == _ROUNDS_FILE:
            path = folder / f"{module.name}.py"
            rounds = getattr(load_file(path, "packaged configurations"), ROUNDS)
            found |= {f"{prefix}{name}": path for name in rounds}
            continue
        found |= _configs_in(folder / module.name, f"{name}/") if module.ispkg else {name: folder / f"{module.name}.py"}
    return found


def _config_file(path_or_name: str) -> Path:
    path, packaged = Path(path_or_name), packaged_configs()
    if path_or_name in packaged:
        return packaged[path_or_name]
    if path.suffix == ".py" and path.is_file():
        return path
    if path.exists():
        raise DeepGenError(f"{path} is no Python file; name one that ends with .py and defines get_config()")
    what = "no such file" if path.suffix == ".py" or os.sep in path_or_name else "no configuration of that name"
    raise DeepGenError(f"{path_or_name}: {what}{did_you_mean(path.stem, packaged)}")


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
            mend = did_you_mean(name, names)
            raise DeepGenError(f"{_short(_first(child).word)}: {where} has no field {name!r}{mend}")
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
