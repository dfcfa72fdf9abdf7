"""Named implementations, such as rewards and data sources, that other packages can add to.

A class is found by name in the built-in table, among those that `Registry.register` added, or among the entry points of
installed packages; or it is named itself, as ``module:Class`` or ``path/to/file.py:Class``. Nothing is imported before
it is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from deepgen_jax.errors import DeepGenError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name.

    Attributes:
      what: what one of them is called in messages, such as "data source".
      group: entry point group in which other packages name theirs, such as "deepgen_jax.data_sources".
    """

    def __init__(self, what: str, group: str, built_in: Mapping[str, str], base: str = "") -> None:
        """Imports nothing.

        Args:
          what, group: see above.
          built_in: name -> ``module:Class``.
          base: ``module:Class`` that classes must inherit from; "" for any callable.
        """
        self.what, self.group = what, group
        self._targets = dict(built_in)
        self._base = base
        self._classes: dict[str, Any] = {}

    def register(self, name: str, target: str | type[T]) -> None:
        """Adds a class, or its ``module:Class``, under a name.

        Raises:
          DeepGenError: the name is taken by another class, or has a colon.
        """
        text = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
        if not name or ":" in name or ":" not in text:
            raise DeepGenError(f"{self.what} {name!r} -> {text!r}: register a plain name and a module:Class")
        if (taken := self._known().get(name, text)) != text:
            raise DeepGenError(f"{self.what} {name!r} is registered already, as {taken}; choose another name")
        self._targets[name] = text
        if not isinstance(target, str):
            self._classes[text] = target

    def names(self) -> list[str]:
        """All names, the built-in ones first."""
        return list(self._known())

    def is_registered(self, name: str) -> bool:
        """Whether a name is built in or was registered in this process; installed packages are not searched."""
        return name in self._targets

    def target(self, name: str, where: str = "") -> str:
        """The ``module:Class`` or ``file.py:Class`` that a name stands for; one of these stands for itself.

        Args:
          name: as a user wrote it.
          where: begins the error message, such as "source pairs: kind".

        Raises:
          DeepGenError: there is no such name.
        """
        if ":" in name:
            return name
        if name in self._targets:
            return self._targets[name]
        known = self._known()
        if name not in known:
            raise DeepGenError(
                f"{where or self.what}: {name!r} is unknown{did_you_mean(name, known)}; or give module:Class or "
                "file.py:Class"
            )
        return known[name]

    def load(self, name: str, where: str = "") -> type[T]:
        """The class of a name, imported on first use.

        Raises:
          DeepGenError: there is no such name, its module cannot be imported, or it names something else.
        """
        text = self.target(name, where)
        if text not in self._classes:
            loaded = load_object(text, where or self.what)
            base = load_object(self._base, self.what) if self._base else object
            if not callable(loaded) or (self._base and not (isinstance(loaded, type) and issubclass(loaded, base))):
                wanted = f"subclass of {self._base.replace(':', '.')}" if self._base else "class"
                raise DeepGenError(f"{where or self.what}: {text} is no {wanted}")
            self._classes[text] = loaded
        return self._classes[text]

    def _known(self) -> dict[str, str]:
        return {**self._targets, **{n: t for n, t in _entry_points(self.group).items() if n not in self._targets}}


def load_object(text: str, where: str) -> Any:
    """The object that ``module:Name`` or ``file.py:Name`` names.

    Args:
      text: the name; dots in ``Name`` go into classes.
      where: begins the error message.

    Raises:
      DeepGenError: there is no such file, module or name, or running it fails.
    """
    module_name, _, name = text.rpartition(":")
    if not module_name or not name:
        raise DeepGenError(f"{where}: {text!r} is no module:Class or file.py:Class")
    module: Any
    if module_name.endswith(".py"):
        module = load_file(Path(module_name), where)
    else:
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # Importing runs code of others, which may raise anything.
            raise DeepGenError(
                f"{where}: {module_name} cannot be imported ({type(error).__name__}: {error}); install its package, or "
                "give a path to the file, file.py:Class"
            ) from error
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError as error:
        known = [found for found in vars(module) if not found.startswith("_")]
        raise DeepGenError(f"{where}: {module_name} has no {name}{did_you_mean(name, known)}") from error


def load_file(path: Path, where: str) -> ModuleType:
    """The module that a Python file makes, run once in this process.

    Raises:
      DeepGenError: it cannot be read, or fails; the message names the line.
    """
    path = path.expanduser().absolute()
    # As a module of its own name: dataclasses and pickle look classes up by it.
    name = f"deepgen_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise DeepGenError(f"{where}: {path} is no Python file; check the path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with errors_of(path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turns what a user's Python file raises into one line that names the line of the file.

    Raises:
      DeepGenError: anything was raised within the block.
    """
    try:
        yield
    except Exception as error:  # The file's own code may raise anything.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        if not isinstance(error, DeepGenError):
            text = f"{type(error).__name__}: {text}"
        raise DeepGenError(f"{path}{f', line {line}' if line else ''}: {text}") from error


@functools.cache
def _entry_points(group: str) -> dict[str, str]:
    """Name -> ``module:Class`` of all installed packages.

    Raises:
      DeepGenError: two packages use one name for different classes.
    """
    found: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=group):
        if found.setdefault(entry.name, entry.value) != entry.value:
            raise DeepGenError(
                f"two installed packages name {entry.name!r} in {group}: {found[entry.name]} and {entry.value}; "
                "uninstall one of them"
            )
    return found
