"""Requests to ``deepgen serve`` with only the standard library, so that ComfyUI needs no further package."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from typing import Any


class ServerError(RuntimeError):
    """The server refused, failed or did not answer; the message says why."""


def generate(url: str, api_key: str, fields: dict[str, Any], timeout: float) -> list[bytes]:
    """Image files of a generation."""
    body = json.dumps(fields).encode()
    return _images(_post(f"{_base(url)}/v1/images/generations", body, "application/json", api_key, timeout))


def edit(
    url: str, api_key: str, fields: dict[str, Any], images: Sequence[bytes], mask: bytes | None, timeout: float
) -> list[bytes]:
    """Image files of an edit.

    Args:
      images: PNG files; the first is edited, the others are further references.
      mask: PNG file, transparent where the first picture may change; None for everywhere.
    """
    boundary = uuid.uuid4().hex
    parts = [_part(boundary, name, str(value).encode()) for name, value in fields.items()]
    parts += [_part(boundary, "image[]", data, "image.png") for data in images]
    if mask is not None:
        parts.append(_part(boundary, "mask", mask, "mask.png"))
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    kind = f"multipart/form-data; boundary={boundary}"
    return _images(_post(f"{_base(url)}/v1/images/edits", body, kind, api_key, timeout))


def _base(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ServerError(f"server {url!r} is no address; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


def _part(boundary: str, name: str, data: bytes, file: str = "") -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
    head += f'; filename="{file}"\r\nContent-Type: image/png' if file else ""
    return f"{head}\r\n\r\n".encode() + data + b"\r\n"


def _post(url: str, body: bytes, kind: str, api_key: str, timeout: float) -> dict[str, Any]:
    headers = {"Content-Type": kind, **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = f"status {error.code}"
        raise ServerError(f"DeepGen server: {message}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"{url} does not answer ({reason}); start it with: deepgen serve") from error


def _images(answer: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(entry["b64_json"]) for entry in answer["data"]]
