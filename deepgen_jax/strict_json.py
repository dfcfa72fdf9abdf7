"""JSON as strictly as users need: bounded in size, depth and digits, with the place of what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import read_text

#: Largest JSON file that is read; tokenizers have 12 MB, indexes of weights less.
MAX_JSON_BYTES = 64 * 2**20
_MAX_DIGITS = 400


def read_json(path: Path, fix: str = "write it again", max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Value of a JSON file; see :func:`open_regular`.

    Args:
      path: the file.
      fix: ends the message.
      max_bytes: largest size accepted; parsed JSON can take 30 times as much memory.

    Raises:
      DeepGenError: also where it is no JSON; see :func:`parse_json`.
    """
    return parse_json(read_text(path, max_bytes), str(path), fix)


def parse_json(text: str | bytes, where: str, fix: str = "write it again") -> Any:
    """Value of a JSON text, as the standard has it (RFC 8259), which is more than Python asks for.

    Raises:
      DeepGenError: it is no JSON, an object has a name twice, it is nested too deeply, or it holds NaN, an infinite
        number, or half of a surrogate pair, which is no text.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
        if "\\ud" in (text if isinstance(text, str) else text.decode("utf-8", "replace")).lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise DeepGenError(f"{where} cannot be read (it is nested too deeply); {fix}") from None
    except UnicodeEncodeError:
        raise DeepGenError(f"{where} cannot be read (half of a surrogate pair in a text); {fix}") from None
    except ValueError as error:
        raise DeepGenError(f"{where} cannot be read ({error}); {fix}") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:20]}... is too large")
    return int(digits)
