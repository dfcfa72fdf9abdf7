"""Prompt files: ``.txt`` (one prompt a line), ``.jsonl`` (one object a line) and ``.csv`` (with a header).

A line that cannot be used is reported with its number and the others are read all the same.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import refuse_url
from deepgen_jax.inference.requests import MAX_SEED

#: Names of a line's fields; all but ``prompt`` may be absent.
FIELDS = (
    "prompt", "negative_prompt", "image", "images", "seed", "size", "width", "height", "id", "name", "num_images",
    "steps", "guidance", "sampler",
)  # fmt: skip
# A CSV cell or a path list may be long; the csv module's own limit is 128 KiB.
_MAX_CELL = 2**24


@dataclass(frozen=True)
class Record:
    """One usable line. What the line leaves out is None, and taken from the command line's settings.

    Attributes:
      index: number of the line among the file's prompts, from 0, bad ones counted, blank ones not.
      line: line number in the file, from 1.
      images: reference images; relative paths have been taken relative to the file's folder.
      width, height: pixels; both or none.
      name: file name of the image without its suffix.
    """

    index: int
    line: int
    prompt: str
    negative_prompt: str | None = None
    images: tuple[Path, ...] = ()
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    name: str | None = None
    num_images: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that was left out, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_prompts(path: str | Path) -> tuple[list[Record], list[BadLine]]:
    """Reads a prompt file; bad lines are returned beside the good ones.

    Fields of ``.jsonl`` objects and ``.csv`` columns: `FIELDS`. ``size`` is "WIDTHxHEIGHT", one number for a square, or
    [width, height]; ``image`` and ``images`` hold a path or a list of paths (in CSV separated by ";"); ``id`` and
    ``name`` are the same thing.

    Raises:
      DeepGenError: the file as a whole cannot be read: missing, wrong type, not UTF-8 text, bad CSV header, no prompt.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, bytes], Iterator[tuple[int, Any]]]] = {
        ".txt": _text_lines,
        ".jsonl": _json_lines,
        ".csv": _csv_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DeepGenError(f"prompt file {path} has the suffix {path.suffix!r}; use one of {', '.join(readers)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DeepGenError(f"prompt file {path} does not exist; check the path") from None
    except OSError as error:
        raise DeepGenError(f"prompt file {path} cannot be read: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4096]:
        raise DeepGenError(f"prompt file {path} is not UTF-8 text (UTF-16 or binary); save it as UTF-8")

    records: list[Record] = []
    bad: list[BadLine] = []
    for index, (line, fields) in enumerate(reader(path, data.removeprefix(codecs.BOM_UTF8))):
        try:
            if isinstance(fields, DeepGenError):
                raise fields
            records.append(parse_record(fields, index, line, path.parent))
        except DeepGenError as error:
            bad.append(BadLine(path, line, str(error)))
    if not records and not bad:
        raise DeepGenError(f"prompt file {path} holds no prompts; write one a line")
    return records, bad


def parse_record(fields: dict[str, Any], index: int, line: int, folder: Path) -> Record:
    """One record from a line's fields; values are JSON values or, from CSV, strings.

    Raises:
      DeepGenError: a name is unknown or a value cannot be used; the message does not name the line.
    """
    for name in fields:
        check_field(name)
    given = {name: value for name, value in fields.items() if value is not None}
    for one, other in (("image", "images"), ("id", "name"), ("size", "width"), ("size", "height")):
        if one in given and other in given:
            raise DeepGenError(f"{one!r} and {other!r} are both given; keep one of them")
    prompt = _text(given, "prompt")
    if prompt is None:
        raise DeepGenError("there is no prompt; add the field 'prompt'")
    if not prompt.strip():
        raise DeepGenError("the prompt is empty; write what to show")
    width, height = _size(given)
    return Record(
        index=index,
        line=line,
        prompt=prompt,
        negative_prompt=_text(given, "negative_prompt"),
        images=_images(given.get("image", given.get("images", ())), folder),
        seed=_integer(given, "seed", 0, MAX_SEED),
        width=width,
        height=height,
        name=_name(given.get("id", given.get("name"))),
        num_images=_integer(given, "num_images", 1),
        steps=_integer(given, "steps", 1),
        guidance=_guidance(given.get("guidance")),
        sampler=_sampler(_text(given, "sampler")),
    )


def parse_size(text: str) -> tuple[int, int]:
    """ "WIDTHxHEIGHT" or "SIDE" -> (width, height) in pixels.

    Raises:
      DeepGenError: the text has another form.
    """
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[xX×*]\s*(\d{1,6}))?\s*", text)
    if match is None:
        raise DeepGenError(f"size {text!r} is not understood; write WIDTHxHEIGHT, such as 512x768")
    width, height = int(match[1]), int(match[2] or match[1])
    if min(width, height) < 1:
        raise DeepGenError(f"size {text!r} is not positive; write WIDTHxHEIGHT, such as 512x768")
    return width, height


def check_field(name: str) -> None:
    """Raises a DeepGenError with a suggestion unless ``name`` is one of `FIELDS`."""
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, n=1)
        mend = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(FIELDS)}"
        raise DeepGenError(f"unknown field {name!r}; {mend}")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DeepGenError(
            f"byte 0x{data[error.start]:02x} in column {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None


def _text_lines(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    # Split as bytes: str.splitlines would also cut at U+2028 and its like inside a prompt.
    for line, raw in enumerate(data.splitlines(), 1):
        try:
            text = _decoded(raw).strip()
        except DeepGenError as error:
            yield line, error
            continue
        if text:
            yield line, {"prompt": text}


def _json_lines(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    for line, fields in _text_lines(path, data):
        if isinstance(fields, DeepGenError):
            yield line, fields
            continue
        try:
            value = json.loads(fields["prompt"])
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield line, DeepGenError(f"not JSON ({reason}); write one object a line")
            continue
        if isinstance(value, dict):
            yield line, value
        else:
            yield line, DeepGenError(f'{_shown(value)} is not an object; write {{"prompt": "..."}}')


def _csv_rows(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DeepGenError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    csv.field_size_limit(_MAX_CELL)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    start = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            # The reader has lost its place (an open quote swallows the rest), so nothing after this can be trusted.
            yield start, DeepGenError(f"not CSV ({error}); check the quotes")
            return
        if row is None:
            return
        cells = [cell.strip() for cell in row]
        if any(cells) and not header:
            header = cells
            try:
                for name in header:
                    check_field(name)
                if "prompt" not in header:
                    raise DeepGenError("the header has no column 'prompt'")
                if len(set(header)) != len(header):
                    raise DeepGenError("the header names a column twice")
            except DeepGenError as error:
                raise DeepGenError(f"{path}:{start}: {error}") from None
        elif any(cells):
            if len(cells) != len(header):
                yield (
                    start,
                    DeepGenError(f"{len(cells)} cells, but the header has {len(header)}; quote cells with commas"),
                )
            else:
                yield start, {name: _csv_cell(name, cell) for name, cell in zip(header, cells, strict=True)}
        start = rows.line_num + 1


def _csv_cell(name: str, cell: str) -> Any:
    if name in ("image", "images"):
        return [part.strip() for part in cell.split(";") if part.strip()] or None
    # An empty prompt is told apart from an absent one; any other empty cell means "not given".
    return cell if cell or name == "prompt" else None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 40 else text[:37] + "..."


def _text(given: dict[str, Any], name: str) -> str | None:
    value = given.get(name)
    # JSON can spell half a surrogate pair, which no UTF-8 text holds.
    if value is not None and (not isinstance(value, str) or re.search("[\ud800-\udfff]", value)):
        raise DeepGenError(f"{name!r} is {_shown(value)}, expected a text")
    return value


def _integer(given: dict[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DeepGenError(f"{name!r} is {_shown(value)}, expected a whole number")
    if value < least or (most is not None and value > most):
        raise DeepGenError(f"{name!r} is {value}, expected {least} {'or more' if most is None else f'to {most}'}")
    return value


def _guidance(value: Any) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise DeepGenError(f"'guidance' is {_shown(value)}, expected a number") from None
    if not math.isfinite(number) or number < 0:
        raise DeepGenError(f"'guidance' is {number}, expected 0 or more")
    return number


def _sampler(name: str | None) -> str | None:
    if name is None:
        return None
    from deepgen_jax.flow.samplers.registered import SAMPLERS, canonical_name

    SAMPLERS.target(canonical_name(name), "'sampler'")
    return canonical_name(name)


def _size(given: dict[str, Any]) -> tuple[int | None, int | None]:
    if "size" in given:
        value = given["size"]
        if isinstance(value, list) and len(value) == 2:
            given = {"width": value[0], "height": value[1]}
        elif isinstance(value, (str, int)) and not isinstance(value, bool):
            return parse_size(str(value))
        else:
            raise DeepGenError(f"'size' is {_shown(value)}, expected \"WIDTHxHEIGHT\" or [width, height]")
    if ("width" in given) != ("height" in given):
        raise DeepGenError("'width' and 'height' go together; give both or none")
    return _integer(given, "width", 1, 999_999), _integer(given, "height", 1, 999_999)


def _images(value: Any, folder: Path) -> tuple[Path, ...]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) and path for path in paths):
        raise DeepGenError(f"'image' is {_shown(value)}, expected a path or a list of paths")
    for path in paths:
        refuse_url(path, "'image'")
    # Joining keeps an absolute path as it is.
    return tuple(folder / path for path in paths)


def _name(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DeepGenError(f"'id' is {_shown(value)}, expected a text or a whole number")
    name = str(value).removesuffix(".png")
    if (
        not name.strip()
        or name.startswith(".")
        or re.search('[<>:"/\\\\|?*\x00-\x1f\ud800-\udfff]', name)
        or len(name.encode()) > 200
    ):
        raise DeepGenError(f"'id' is {_shown(value)}, which cannot be a file name; use letters, digits, '-' and '_'")
    return name
