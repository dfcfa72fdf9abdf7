"""A client of the service, for the web page and for scripts: events of streamed images over HTTP."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.errors import DeepGenError


@dataclass(frozen=True)
class Event:
    """An image of a stream.

    Attributes:
      image: RGB.
      final: False for a preview.
      seed: of the image.
      place: of the image among those of the request.
    """

    image: Image.Image
    final: bool
    seed: int
    place: int


class ServiceClient:
    """Talks to ``deepgen serve``.

    Attributes:
      url: of the server, without ``/v1``.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        """Sets up; nothing is sent.

        Raises:
          DeepGenError: ``url`` is no address of a server.
        """
        if not url.startswith(("http://", "https://")):
            raise DeepGenError(f"server {url!r} is no address; write http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=10))

    def model(self) -> dict[str, Any]:
        """The served model as ``/v1/models`` describes it.

        Raises:
          DeepGenError: there is no such server, or it refuses.
        """
        try:
            response = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise DeepGenError(f"{self.url} does not answer ({error}); start it with deepgen serve") from error
        _check(response)
        try:
            return dict(response.json()["data"][0])
        except (ValueError, LookupError, TypeError) as error:
            raise DeepGenError(f"{self.url} is no image service; start one with deepgen serve") from error

    def stream(
        self, fields: Mapping[str, Any], images: Sequence[bytes] = (), mask: bytes | None = None
    ) -> Iterator[Event]:
        """Previews and images of one request, as they are made.

        Args:
          fields: of the request.
          images: picture files to edit; none for generation.
          mask: PNG file, transparent where the first picture may change.

        Raises:
          DeepGenError: the server refuses, fails or does not answer; says why.
        """
        fields = {**fields, "stream": True}
        if images:
            files = [("image[]", ("image.png", data, "image/png")) for data in images]
            files += [("mask", ("mask.png", mask, "image/png"))] if mask is not None else []
            text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
            request: dict[str, Any] = {"url": "/v1/images/edits", "data": text, "files": files}
        else:
            request = {"url": "/v1/images/generations", "json": fields}
        try:
            with self._http.stream("POST", **request) as response:
                if response.status_code != 200:
                    response.read()
                    _check(response)
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        yield _event(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise DeepGenError(f"{self.url} does not answer ({error}); is the server still running?") from error


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = f"status {response.status_code}"
    raise DeepGenError(f"the server refuses: {message}")


def _event(data: dict[str, Any]) -> Event:
    if "error" in data:
        raise DeepGenError(str(data["error"]["message"]))
    image = load_image(io.BytesIO(base64.b64decode(data["b64_json"])))
    return Event(image, data["type"].endswith(".completed"), data["seed"], data["image_index"])
