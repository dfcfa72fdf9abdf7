"""Request bodies with limits: JSON and multipart forms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from deepgen_jax.serving.errors import APIError, invalid
from deepgen_jax.serving.pictures import read_data_url

#: A body that is too large is drained up to this many times the limit and this many seconds: the client then gets the
#: answer instead of a broken connection.
_DRAIN_TIMES, _DRAIN_SECONDS = 4, 5.0
#: Longest text field of a form in bytes.
_MAX_FIELD = 256 * 1024


@dataclass
class Body:
    """Fields of a request, and its pictures as bytes with the names that messages use for them."""

    fields: dict[str, Any]
    images: list[tuple[str, bytes]] = field(default_factory=list)
    mask: bytes | None = None


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
      APIError: too large, or no JSON object.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(
            415, f"Content-Type {kind!r} is not supported here; send application/json", "unsupported_media_type"
        )
    data = b"".join([chunk async for chunk in _limited(request, limit)])
    try:
        value = await asyncio.to_thread(json.loads, data)
    except (ValueError, RecursionError) as error:
        raise invalid(f"The body is not JSON ({error})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("The body is not a JSON object", code="invalid_json")
    return value


async def read_edit(request: Request, limit: int, max_images: int) -> Body:
    """The body of an edit: a multipart form, or JSON with data URLs.

    Raises:
      APIError: too large, malformed, or too many pictures.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await asyncio.to_thread(_json_edit, await read_json(request, limit), max_images)
    if kind != "multipart/form-data":
        message = f"Content-Type {kind!r} is not supported here; send multipart/form-data or application/json"
        raise APIError(415, message, "unsupported_media_type")
    try:
        parser = MultiPartParser(
            request.headers, _limited(request, limit), max_files=max_images + 1, max_fields=64, max_part_size=_MAX_FIELD
        )
        form = await parser.parse()
    except (MultiPartException, UnicodeDecodeError, LookupError, KeyError, ValueError) as error:
        # The parser raises its own type for most faults, and ordinary ones for headers that it did not expect.
        message = getattr(error, "message", None) or str(error)
        raise invalid(f"The form is malformed ({message})", code="invalid_form") from None
    body = Body({})
    try:
        for name, value in form.multi_items():
            if name in ("image", "image[]"):
                body.images.append((name, await _upload(value, name)))
            elif name == "mask":
                if body.mask is not None:
                    raise invalid("'mask' is given twice", "mask")
                body.mask = await _upload(value, name)
            elif isinstance(value, UploadFile):
                raise invalid(f"'{name}' is a file, expected a text", name, "invalid_type")
            elif name in body.fields:
                raise invalid(f"'{name}' is given twice", name)
            else:
                body.fields[name] = value
    finally:
        await form.close()
    return _checked(body, max_images)


async def _upload(value: UploadFile | str, name: str) -> bytes:
    if not isinstance(value, UploadFile):
        raise invalid(f"'{name}' is a text, expected a file", name, "invalid_type")
    return await value.read()


def _json_edit(value: dict[str, Any], max_images: int) -> Body:
    fields = dict(value)
    images, mask = fields.pop("images", None), fields.pop("mask", None)
    if not isinstance(images, list):
        raise invalid("'images' is missing; send [{\"image_url\": \"data:image/png;base64,...\"}]", "images",
                      "missing_required_parameter")  # fmt: skip
    if len(images) > max_images:
        raise _too_many(len(images), max_images)
    body = Body(fields)
    for i, entry in enumerate(images):
        name = f"images[{i}]"
        body.images.append((name, read_data_url(_url(entry, name), f"{name}.image_url")))
    if mask is not None:
        body.mask = read_data_url(_url(mask, "mask"), "mask.image_url")
    return _checked(body, max_images)


def _url(entry: Any, name: str) -> Any:
    if not isinstance(entry, dict) or "image_url" not in entry:
        hint = "; 'file_id' is not supported" if isinstance(entry, dict) and "file_id" in entry else ""
        raise invalid(f"'{name}' has no 'image_url'{hint}; send a data URL", name, "invalid_type")
    return entry["image_url"]


def _checked(body: Body, max_images: int) -> Body:
    if not body.images:
        raise invalid("'image' is missing; send the picture to edit", "image", "missing_required_parameter")
    if len(body.images) > max_images:
        raise _too_many(len(body.images), max_images)
    return body


def _too_many(count: int, most: int) -> APIError:
    return invalid(f"{count} images are given; send at most {most}", "image", "too_many_images")


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body in chunks.

    Raises:
      APIError: 413 when it is larger than ``limit``; some of what follows is read and dropped first.
    """
    length = request.headers.get("content-length", "")
    received = 0
    too_large = length.isdigit() and int(length) > limit
    stream = request.stream()
    try:
        if not too_large:
            async for chunk in stream:
                received += len(chunk)
                if received > limit:
                    too_large = True
                    break
                yield chunk
        if not too_large:
            return
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in stream:
                received += len(chunk)
                if received > _DRAIN_TIMES * limit:
                    break
    except TimeoutError:
        pass
    except ClientDisconnect:
        if not too_large:
            raise
    message = f"The body is larger than {limit / 1e6:g} MB, the most that this server takes"
    raise APIError(413, message, "request_too_large", headers={"Connection": "close"})
