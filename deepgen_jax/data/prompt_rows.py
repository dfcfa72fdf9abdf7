"""Rows of prompt files in any format, for generation, evaluation, distillation and reinforcement learning.

Formats: ``.txt`` (a prompt a line), ``.jsonl`` (an object a line), ``.json`` (a list of objects or texts, or an object
of objects), ``.csv`` (with a header), ``.parquet``, and a folder of ``.txt`` files (a prompt each). Lines end with a
line feed, a carriage return, or both. A bad row is returned with its error, and the others are read all the same.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deepgen_jax import files
from deepgen_jax.errors import DeepGenError

#: Columns that hold the prompt, best first; compared without case.
PROMPT_COLUMNS = ("prompt", "caption", "prompt_en", "prompt_zh")
# A CSV cell may be long; the csv module's own limit is 128 KiB.
_MAX_CELL = 2**24


@dataclass(frozen=True)
class Row:
    """A row of a prompt file.

    Attributes:
      file: that holds it.
      number: of its line, or in ``.json`` and ``.parquet`` of the row, from 1.
      fields: its columns.
      error: why it cannot be used; None for a good row.
      key: name of its entry or file, where it has one.
    """

    file: Path
    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: DeepGenError | None = None
    key: str = ""

    @property
    def where(self) -> str:
        """ "FILE:NUMBER", the place for messages."""
        return f"{self.file}:{self.number}"

    def prompt(self) -> tuple[str, str]:
        """The prompt, and the column that holds it.

        Raises:
          DeepGenError: the row is bad, or has no prompt.
        """
        if self.error is not None:
            raise self.error
        columns = {name.casefold(): name for name in reversed(list(self.fields))}
        given = [columns[name] for name in PROMPT_COLUMNS if self.fields.get(columns.get(name, "")) is not None]
        if not given:
            raise DeepGenError("there is no prompt; add the field 'prompt'")
        text = self.fields[given[0]]
        check_text(text, given[0])
        if not text.strip():
            raise DeepGenError("the prompt is empty; write what to show")
        return text, given[0]


def check_text(value: Any, name: str) -> None:
    """Raises a DeepGenError unless a value is a text that UTF-8 can hold, without NUL characters."""
    # JSON can spell half a surrogate pair.
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise DeepGenError(f"{name!r} is {shown(value)}, expected a text")
    if "\0" in value:
        raise DeepGenError(f"{name!r} is {shown(value)}, which holds a NUL character; remove it")


def shown(value: Any) -> str:
    """A value in a message: JSON, cut to 40 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 40 else text[:37] + "..."


def read_rows(path: Path, any_columns: bool = False) -> list[Row]:
    """All rows of a prompt file or folder, the bad ones with their error.

    Args:
      path: of the file or folder.
      any_columns: CSV files need no column with a prompt, and their cells keep the spaces around them.

    Raises:
      DeepGenError: the file as a whole cannot be read: missing, of another type, not UTF-8, damaged, or empty.
    """
    if path.is_dir():
        rows = list(_folder(path))
        if not rows:
            raise DeepGenError(f"prompt folder {path} cannot be read: it holds no .txt files; give a file or fill it")
        return rows
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".txt": _text,
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": partial(_csv, any_columns=any_columns),
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DeepGenError(f"prompt file {path} has the suffix {path.suffix!r}; use one of {', '.join(readers)}")
    if not path.exists():
        raise DeepGenError(f"prompt file {path} does not exist; check the path")
    rows = list(reader(path))
    if not rows:
        raise DeepGenError(f"prompt file {path} holds no prompts; write one a line")
    return rows


def _bytes(path: Path) -> bytes:
    data = files.read_bytes(path)
    start = data[:4096]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) // 8:
        raise DeepGenError(f"prompt file {path} is not UTF-8 text (UTF-16 or binary); save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def _lines(path: Path) -> Iterator[tuple[int, str | DeepGenError]]:
    """Lines that are not blank, with their numbers from 1."""
    # Split as bytes: str.splitlines would also cut at U+2028 and its like inside a prompt.
    for number, raw in enumerate(_bytes(path).splitlines(), 1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            place = f"byte 0x{raw[error.start]:02x} in column {error.start + 1}"
            yield number, DeepGenError(f"{place} is not UTF-8; save the file as UTF-8")
            continue
        if text:
            yield number, text


def _text(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if isinstance(line, DeepGenError):
            yield Row(path, number, error=line)
        else:
            yield Row(path, number, {"prompt": line})


def _folder(path: Path) -> Iterator[Row]:
    for file in sorted(path.iterdir()):
        if file.suffix.lower() != ".txt" or file.name.startswith("."):
            continue
        try:
            yield Row(file, 1, {"prompt": files.read_text(file).strip()}, key=file.stem)
        except DeepGenError as error:
            yield Row(file, 1, error=error, key=file.stem)


def _object(path: Path, number: int, value: Any, key: str = "") -> Row:
    if isinstance(value, dict):
        return Row(path, number, value, key=key)
    return Row(path, number, error=DeepGenError(f'{shown(value)} is not an object; write {{"prompt": "..."}}'), key=key)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DeepGenError(f"not JSON ({place}); write one object a line")


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        value = line if isinstance(line, DeepGenError) else _parsed(line)
        yield Row(path, number, error=value) if isinstance(value, DeepGenError) else _object(path, number, value)


def _json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(_bytes(path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DeepGenError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DeepGenError(f"{path} is not JSON ({place}); if it has one object a line, name it .jsonl") from None
    if isinstance(value, list):
        for number, one in enumerate(value, 1):
            yield Row(path, number, {"prompt": one}) if isinstance(one, str) else _object(path, number, one)
    elif isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
        yield from (_object(path, number, one, key) for number, (key, one) in enumerate(value.items(), 1))
    elif isinstance(value, dict):
        yield Row(path, 1, value)
    else:
        raise DeepGenError(f"{path} holds {shown(value)}, expected a list of objects or texts")


def _csv(path: Path, any_columns: bool) -> Iterator[Row]:
    data = _bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len((data[: error.start] + b"x").splitlines())
        raise DeepGenError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    csv.field_size_limit(_MAX_CELL)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    start = 1
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            # The reader has lost its place (an open quote swallows the rest), so nothing after this can be trusted.
            yield Row(path, start, error=DeepGenError(f"not CSV ({error}); check the quotes"))
            return
        if cells is None:
            return
        if not any_columns:
            cells = [cell.strip() for cell in cells]
        if any(cells) and not header:
            header = [cell.strip() for cell in cells]
            if len(set(header)) != len(header):
                raise DeepGenError(f"{path}:{start}: the header names a column twice")
            if not any_columns and not {name.casefold() for name in header} & set(PROMPT_COLUMNS):
                _check_header(path, start, header)
        elif any(cells):
            if len(cells) != len(header):
                text = f"{len(cells)} cells, but the header has {len(header)}; quote cells with commas"
                yield Row(path, start, error=DeepGenError(text))
            else:
                yield Row(path, start, dict(zip(header, cells, strict=True)))
        start = rows.line_num + 1


def _check_header(path: Path, line: int, header: list[str]) -> None:
    typos = [name for name in header if misspelled(name, PROMPT_COLUMNS)]
    detail = f"unknown field {typos[0]!r}; did you mean 'prompt'?" if typos else "the header has no column 'prompt'"
    raise DeepGenError(f"{path}:{line}: {detail}")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DeepGenError("parquet prompt files need pyarrow; run: pip install 'deepgen-jax[data]'") from error
    files.check_regular(path)
    try:
        schema = parquet.read_schema(path)
        # Encoded pictures are no part of a prompt.
        columns = [column.name for column in schema if "binary" not in str(column.type)]
        records = parquet.read_table(path, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DeepGenError(f"prompt file {path} cannot be read ({' '.join(str(error).split())[:200]})") from error
    for number, record in enumerate(records, 1):
        yield Row(path, number, record)


def misspelled(name: str, known: tuple[str, ...]) -> str:
    """The known name that ``name`` is one typing error away from; "" if there is none, and for short names."""
    return next((other for other in known if min(len(name), len(other)) >= 4 and _one_slip(name.casefold(), other)), "")


def _one_slip(name: str, other: str) -> bool:
    """Whether one letter is missing, added or wrong, or two neighbours are swapped."""
    if name == other or abs(len(name) - len(other)) > 1:
        return False
    short, long = sorted((name, other), key=len)
    at = next((i for i, letter in enumerate(short) if letter != long[i]), len(short))
    if len(short) < len(long):
        return short[at:] == long[at + 1 :]
    return short[at + 1 :] == long[at + 1 :] or (
        short[at : at + 2] == long[at : at + 2][::-1] and short[at + 2 :] == long[at + 2 :]
    )
