"""Rows of benchmark files: JSON lists and objects, JSON lines, CSV, Parquet and Arrow, with the place of each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen_jax.data import prompt_rows
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import read_text


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
      fields: its columns.
      file: the file that holds it.
      number: of the row in the file, from 1, the header not counted.
      key: of its entry, where the file is an object.
    """

    fields: Mapping[str, Any]
    file: Path
    number: int
    key: str = ""

    @property
    def where(self) -> str:
        """The place for messages."""
        return f"{self.file}, row {self.number}"

    def get(self, *names: str) -> Any:
        """The first of several columns that the row has and that is not null.

        Raises:
          DeepGenError: it has none of them.
        """
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        raise DeepGenError(f"{self.where}: there is no column {' or '.join(map(repr, names))}; {self._found()}")

    def text(self, *names: str) -> str:
        """`get`, for a text that is not empty.

        Raises:
          DeepGenError: it is missing, empty or something else.
        """
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise DeepGenError(f"{self.where}: {names[0]!r} is {value!r}, expected a text")
        return value

    def name(self, *names: str) -> str:
        """`get`, for a number or text that becomes part of a file name.

        Raises:
          DeepGenError: it is missing or cannot be part of a file name.
        """
        value = self.get(*names)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value).strip()
        bad = isinstance(value, (bool, float)) or not isinstance(value, (str, int)) or not text
        if bad or text.startswith(".") or re.search(r"[/\\\x00-\x1f\ud800-\udfff]", text) or len(text.encode()) > 200:
            raise DeepGenError(f"{self.where}: {names[0]!r} is {value!r}, which cannot be a file name")
        return text

    def _found(self) -> str:
        found = ", ".join(map(str, self.fields)) or "no columns"
        return f"the row has {found}; give one of the files that `deepgen eval list` names"


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, by its suffix.

    JSON objects whose values are objects are rows with keys; ``{"data_list": [...]}`` and the like are not unwrapped.

    Raises:
      DeepGenError: the file cannot be read, has an unknown suffix, or does not hold rows.
    """
    suffixes = (".json", ".jsonl", ".csv")
    if path.suffix.lower() not in suffixes:
        raise DeepGenError(f"{path} has the suffix {path.suffix!r}; expected {', '.join(suffixes)}")
    rows: list[Row] = []
    for number, row in enumerate(prompt_rows.read_rows(path, any_columns=True), 1):
        if row.error is not None:
            raise DeepGenError(f"{path}, row {number}: {row.error}; download the file again")
        rows.append(Row(row.fields, path, number, row.key))
    return rows


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
      DeepGenError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DeepGenError(f"{path} is not JSON ({place}); download it again") from None


def objects(values: Any, path: Path, what: str = "") -> list[Row]:
    """Rows of a list of objects, or of an object of objects.

    Raises:
      DeepGenError: ``values`` is something else.
    """
    if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
        return [Row(value, path, number, str(key)) for number, (key, value) in enumerate(values.items(), 1)]
    if isinstance(values, list):
        rows = [Row(value, path, number) for number, value in enumerate(values, 1)]
        for row in rows:
            if not isinstance(row.fields, dict):
                raise DeepGenError(f"{row.where}: {str(row.fields)[:40]!r} is no object; check the file")
        return rows
    raise DeepGenError(f"{path}: {what or 'the file'} is no list of objects; check the file")


def find_files(data: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """``data`` itself where it is a file; else the files in it with the first of ``names`` that is there.

    Args:
      data: a file or folder.
      names: glob patterns, tried in order; all matches of the first that matches anything are taken.
      suffixes: of files that ``data`` may be.

    Raises:
      DeepGenError: there is nothing.
    """
    if data.is_file():
        if data.suffix.lower() not in suffixes:
            raise DeepGenError(f"--data {data} has the suffix {data.suffix!r}; expected {', '.join(suffixes)}")
        return [data]
    if not data.exists():
        raise DeepGenError(f"--data {data} does not exist; check the path")
    for name in names:
        if found := sorted(path for path in data.glob(name) if path.is_file()):
            return found
    raise DeepGenError(f"--data {data} holds none of {', '.join(names)}; give the benchmark's file or its folder")
