"""Records of prompt files: what a row asks for beside its prompt, such as seed, size and reference images.

`deepgen_jax.data.prompt_rows` reads the files. A row that cannot be used is reported with its place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepgen_jax.data.prompt_rows import PROMPT_COLUMNS, Row, check_text, misspelled, read_rows, shown
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.requests import MAX_SEED
from deepgen_jax.local_paths import refuse_url
from deepgen_jax.user_warnings import warn_user

#: Names of a record's fields, compared without case; all but the prompt may be absent.
FIELDS = (
    "prompt", "negative_prompt", "image", "images", "seed", "size", "width", "height", "id", "name", "num_images",
    "steps", "guidance", "sampler",
)  # fmt: skip
#: Images of one record, and steps of one image, at most.
MAX_IMAGES, MAX_STEPS = 100_000, 10_000

# Other names of the id, which public files use; "id" and "name" come first.
_ID_COLUMNS = ("prompt_id", "key")
# What a metadata.jsonl says of its images beside a record's fields.
_METADATA_FIELDS = frozenset(
    {
        "file", "padding", "dtype", "model", "model_fingerprint", "fingerprint", "deepgen_jax", "jax", "image_sha256",
        "reference_posterior", "max_reference_pixels", "exact_reference_size", "metadata",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One usable row. What the row leaves out is None, and taken from the command line's settings.

    Attributes:
      index: number of the row in its file, from 0, bad ones counted, blank lines not.
      line: line in the file, from 1.
      images: reference images; relative paths have been taken relative to the file's folder.
      width, height: pixels; both or none.
      name: file name of the image without its suffix.
      metadata: the other fields, JSON values, for the image's metadata.
      place: "FILE:LINE" for messages; "" where the record is from no file.
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
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class BadLine:
    """A row that was left out, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_prompts(path: str | Path) -> tuple[list[Record], list[BadLine]]:
    """Reads a prompt file or a folder of ``.txt`` files; bad rows are returned beside the good ones.

    The prompt is in "prompt", "caption", "prompt_en" or "prompt_zh", other fields are `FIELDS`. ``size`` is
    "WIDTHxHEIGHT", one number for a square, or [width, height]; ``image`` and ``images`` hold a path or a list of paths
    (in CSV separated by ";"); ``id`` and ``name`` are the same thing, for which ``prompt_id``, ``key`` and the key of a
    JSON entry stand in. Other fields are passed on as metadata, with one warning for the file, unless they look like
    a misspelled field. A ``metadata.jsonl`` of an earlier run asks for the same images again.

    Raises:
      DeepGenError: the file as a whole cannot be read; see `prompt_rows.read_rows`.
    """
    path = Path(path)
    records: list[Record] = []
    bad: list[BadLine] = []
    rows = read_rows(path)
    for index, row in enumerate(rows):
        try:
            records.append(parse_row(row, index))
        except DeepGenError as error:
            bad.append(BadLine(row.file, row.number, str(error)))
    others = list(dict.fromkeys(name for record in records for name in record.metadata))
    if others:
        listed = ", ".join(others[:8]) + (" and others" if len(others) > 8 else "")
        warn_user(f"{path}: fields {listed} are no settings; they are passed on to the metadata of the images")
    return records, bad


def parse_record(fields: Mapping[str, Any], index: int, line: int, folder: Path) -> Record:
    """One record from a row's fields; see :func:`parse_row`."""
    return parse_row(Row(folder / "record", line, fields), index)


def parse_row(row: Row, index: int) -> Record:
    """One record from a row; values are JSON values or, from CSV, strings.

    Raises:
      DeepGenError: a name looks misspelled or a value cannot be used; the message does not name the row.
    """
    if row.error is not None:
        raise row.error
    csv = row.file.suffix.lower() == ".csv"
    earlier_run = "fingerprint" in row.fields and "file" in row.fields
    given: dict[str, Any] = {}
    metadata: dict[str, Any] = dict(row.fields.get("metadata") or {}) if earlier_run else {}
    for name, value in row.fields.items():
        lower = str(name).casefold()
        if lower in FIELDS:
            if value is not None and not (csv and value == "" and lower != "prompt"):
                given[lower] = value
        elif earlier_run and name in _METADATA_FIELDS:
            continue
        elif (meant := misspelled(str(name), FIELDS)) and lower not in PROMPT_COLUMNS:
            raise DeepGenError(f"unknown field {name!r}; did you mean {meant!r}?")
        else:
            metadata[str(name)] = value
    for one, other in (("image", "images"), ("id", "name"), ("size", "width"), ("size", "height")):
        if one in given and other in given:
            raise DeepGenError(f"{one!r} and {other!r} are both given; keep one of them")
    prompt, column = row.prompt()
    metadata.pop(column, None)
    width, height = _size(given)
    return Record(
        index=index,
        line=row.number,
        prompt=prompt,
        negative_prompt=_text(given, "negative_prompt"),
        images=_images(given.get("image", given.get("images", ())), row.file.parent, csv),
        seed=_integer(given, "seed", 0, MAX_SEED),
        width=width,
        height=height,
        name=_name(given.get("id", given.get("name"))) or _other_name(row, metadata, earlier_run),
        num_images=_integer(given, "num_images", 1, MAX_IMAGES),
        steps=_integer(given, "steps", 1, MAX_STEPS),
        guidance=_guidance(given.get("guidance")),
        sampler=_sampler(_text(given, "sampler")),
        metadata=_json_values(metadata),
        place=row.where,
    )


def _other_name(row: Row, metadata: dict[str, Any], earlier_run: bool) -> str | None:
    """File name from a column that stands in for the id, or from the row's key."""
    candidates = [metadata[column] for column in _ID_COLUMNS if metadata.get(column) is not None]
    candidates += [row.key] if row.key else []
    if earlier_run:
        candidates = [Path(str(row.fields["file"])).stem, *candidates]
    for value in candidates:
        try:
            return _name(value)
        except DeepGenError:
            continue
    return None


def _json_values(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DeepGenError(f"the other fields must be JSON values ({' '.join(str(error).split())[:100]})") from None
    return metadata


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


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None:
        check_text(value, name)
    return value


def _integer(given: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DeepGenError(f"{name!r} is {shown(value)}, expected a whole number")
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
        raise DeepGenError(f"'guidance' is {shown(value)}, expected a number") from None
    if not math.isfinite(number) or number < 0:
        raise DeepGenError(f"'guidance' is {number}, expected 0 or more")
    return number


def _sampler(name: str | None) -> str | None:
    if name is None:
        return None
    from deepgen_jax.flow.samplers.registered import SAMPLERS, canonical_name

    SAMPLERS.target(canonical_name(name), "'sampler'")
    return canonical_name(name)


def _size(given: Mapping[str, Any]) -> tuple[int | None, int | None]:
    if "size" in given:
        value = given["size"]
        if isinstance(value, list) and len(value) == 2:
            given = {"width": value[0], "height": value[1]}
        elif isinstance(value, (str, int)) and not isinstance(value, bool):
            return parse_size(str(value))
        else:
            raise DeepGenError(f"'size' is {shown(value)}, expected \"WIDTHxHEIGHT\" or [width, height]")
    if ("width" in given) != ("height" in given):
        raise DeepGenError("'width' and 'height' go together; give both or none")
    return _integer(given, "width", 1, 999_999), _integer(given, "height", 1, 999_999)


def _images(value: Any, folder: Path, csv: bool) -> tuple[Path, ...]:
    if csv and isinstance(value, str):
        value = [part.strip() for part in value.split(";") if part.strip()]
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) and path for path in paths):
        raise DeepGenError(f"'image' is {shown(value)}, expected a path or a list of paths")
    for path in paths:
        refuse_url(path, "'image'")
    # Joining keeps an absolute path as it is.
    return tuple(folder / path for path in paths)


def _name(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DeepGenError(f"'id' is {shown(value)}, expected a text or a whole number")
    name = str(value).removesuffix(".png")
    if (
        not name.strip()
        or name.startswith(".")
        or re.search('[<>:"/\\\\|?*\x00-\x1f\ud800-\udfff]', name)
        or len(name.encode()) > 200
    ):
        raise DeepGenError(f"'id' is {shown(value)}, which cannot be a file name; use letters, digits, '-' and '_'")
    return name
