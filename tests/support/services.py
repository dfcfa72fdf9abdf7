"""A service in the background as tests see it, and pictures to send."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image
from starlette.applications import Starlette


@dataclass
class Running:
    """A service, and what it logged."""

    url: str
    app: Starlette
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def service(self) -> Any:
        return self.app.state.service

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics, such as 'deepgen_images_total{kind="edit"}'."""
        with self.client() as client:
            for found in client.get("/metrics").text.splitlines():
                if found.startswith(line + " "):
                    return float(found.rpartition(" ")[2])
        return 0.0


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Returns when the condition holds; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def png(image: Image.Image | np.ndarray) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    """A picture of random pixels."""
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def pixels(text: str) -> np.ndarray:
    """A picture in base64 -> uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
