"""Images that a browser has made, on disk, so that they are still there after a reload."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from deepgen_jax.files import write_bytes, write_text
from deepgen_jax.serving.pictures import png_bytes

_SESSION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Settings:
    """Everything that made an image.

    ``sources`` are names of files in the folder of the session; ``mask`` is one of them, "" for none.
    """

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    strength: float = 1.0
    sources: tuple[str, ...] = ()
    mask: str = ""


class History:
    """A folder with one subfolder a browser, which holds PNG files with their settings in JSON beside them."""

    def __init__(self, folder: Path, keep: int = 200) -> None:
        """``keep`` is the number of images kept for each browser; older ones are removed."""
        self.folder, self._keep = folder, keep

    def session(self, given: object, visit: str) -> str:
        """The session that a browser remembers; where that is none, one that belongs to this ``visit`` of the page."""
        if isinstance(given, str) and _SESSION.fullmatch(given):
            return given
        return hashlib.sha256(visit.encode()).hexdigest()[:32]

    def path(self, session: str, name: str) -> Path:
        """A file of a session."""
        return self._of(session) / name

    def add(self, session: str, image: Image.Image, settings: Settings) -> Path:
        """Keeps an image; returns its path."""
        folder = self._of(session)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns():020d}.png"
        write_bytes(path, png_bytes(image))
        write_text(path.with_suffix(".json"), json.dumps(asdict(settings)))
        for old in self.images(session)[self._keep :]:
            old.unlink(missing_ok=True)
            old.with_suffix(".json").unlink(missing_ok=True)
        return path

    def add_source(self, session: str, data: bytes, name: str) -> str:
        """Keeps a picture that was edited, or a mask; returns the name of its file."""
        folder = self._of(session)
        folder.mkdir(parents=True, exist_ok=True)
        file = f"source_{time.time_ns():020d}_{name}.png"
        write_bytes(folder / file, data)
        return file

    def images(self, session: str) -> list[Path]:
        """Its images, the newest first."""
        return sorted(self._of(session).glob("[0-9]*.png"), reverse=True)

    def settings(self, path: Path) -> Settings | None:
        """What made an image; None if that is not known."""
        try:
            data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return Settings(**{**data, "sources": tuple(data["sources"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _of(self, session: str) -> Path:
        if not _SESSION.fullmatch(session):
            raise ValueError(f"{session!r} is no session")
        return self.folder / session
