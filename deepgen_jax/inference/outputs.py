"""Image files with their settings inside, and folders of them that can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import deepgen_jax
from deepgen_jax import files, locks
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.batch import Request, Settings
from deepgen_jax.user_warnings import warn_user

#: Image formats by suffix.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
METADATA_FILE = "metadata.jsonl"

#: Of a file name, on common file systems.
MAX_NAME_BYTES = 255

_KEY = "deepgen"
_EXIF_DESCRIPTION = 0x010E
# Of the 64 KiB that EXIF may take.
_MOST_EXIF = 65_000
_PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Model:
    """The model that makes the images.

    Attributes:
      folder: the model folder.
      dtype: of the computation.
      fingerprint: digest of config.json (which names the weights' sources) and the schedule.
    """

    folder: Path
    dtype: str
    fingerprint: str

    @classmethod
    def of(cls, folder: Path, dtype: str) -> Model:
        """The model in ``folder``, its fingerprint taken now."""
        digest = hashlib.sha256()
        for name in ("config.json", "scheduler_config.json"):
            with contextlib.suppress(FileNotFoundError):
                digest.update((folder / name).read_bytes())
        return cls(folder, dtype, digest.hexdigest()[:32])


def describe(request: Request, settings: Settings, model: Model) -> dict[str, Any]:
    """Everything that is needed to make the image of ``request`` again, JSON-ready.

    ``fingerprint`` is a digest of what decides the pixels: not of paths and versions, but of the contents of the
    reference images and of the model's description.
    """
    what = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "guidance": request.guidance,
        "padding": settings.padding,
        "dtype": model.dtype,
        "model_fingerprint": model.fingerprint,
    }
    if request.sampler != "euler":
        # Left out otherwise, as in folders made before there were other samplers.
        what["sampler"] = request.sampler
    what |= settings.acceleration.arguments()
    if request.images:
        what |= {
            "image_sha256": [_file_digest(path) for path in request.images],
            "reference_posterior": settings.reference_posterior,
            "max_reference_pixels": settings.max_reference_pixels,
        }
        if settings.exact_reference_size is not None:
            what["exact_reference_size"] = list(settings.exact_reference_size)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    return {
        "file": request.file,
        **what,
        "images": [_path_text(path) for path in request.images],
        "model": _path_text(model.folder),
        "deepgen_jax": deepgen_jax.__version__,
        "jax": version("jax"),
        "fingerprint": digest,
        **({"metadata": dict(request.metadata)} if request.metadata else {}),
    }


def _path_text(path: Path) -> str:
    """The whole path as text, also where its bytes are no UTF-8."""
    return str(path.absolute()).encode("utf-8", "backslashreplace").decode()


def save_image(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Writes an image with ``metadata`` inside: a PNG text chunk, or the EXIF description of a JPEG or WebP.

    The file appears whole or not at all; see `files.replacing`.

    Raises:
      DeepGenError: the suffix is unknown, or the file cannot be written.
    """
    check_format(path)
    image_format = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95}
    if image_format == "PNG":
        info = PngInfo()
        info.add_itxt(_KEY, json.dumps(metadata, ensure_ascii=False))
        options = {"pnginfo": info}
    else:
        text = json.dumps(metadata)
        if len(text) > _MOST_EXIF:
            warn_user(f"{path} has no room for the settings of its images; use .png to keep them")
            text = json.dumps({name: metadata[name] for name in ("file", "fingerprint") if name in metadata})
        exif = Image.Exif()
        exif[_EXIF_DESCRIPTION] = text
        options["exif"] = exif
    with files.replacing(path) as partial, open(partial, "wb") as file:
        image.save(file, image_format, **options)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata that `save_image` put into a file; None if there is none."""
    try:
        with Image.open(path) as image:
            text = image.info.get(_KEY) or image.getexif().get(_EXIF_DESCRIPTION) or ""
        value = json.loads(text)
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, zlib.error, struct.error):
        return None
    return value if isinstance(value, dict) and "fingerprint" in value else None


def check_format(path: Path) -> None:
    """Raises a DeepGenError unless ``path`` has a suffix of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise DeepGenError(f"{path} has the suffix {path.suffix!r}; use one of {', '.join(FORMATS)}")


def check_name(path: Path) -> None:
    """Raises a DeepGenError where the name of a file is too long to be written."""
    length = len(os.fsencode(path.name))
    if length > MAX_NAME_BYTES:
        raise DeepGenError(f"the file name {path.name[:40]}... has {length} bytes; use at most {MAX_NAME_BYTES}")


def in_the_way(path: Path) -> DeepGenError:
    """The error of a file that no run has made, where one is to be written."""
    return DeepGenError(f"{path} is in the way and is not from an earlier run; choose another --out or use --overwrite")


class OutputFolder:
    """A folder of images and its ``metadata.jsonl``, held by one run at a time; a context manager.

    On entry the folder is made, leftovers of a killed run are removed and a torn last line of ``metadata.jsonl`` is
    dropped. On exit its lines are in the order of the images asked for, however many runs made them. Image files may
    be in subfolders, which are created as needed.

    Args:
      path: the folder.
      records: folder of ``metadata.jsonl``, for trees that must contain only images; by default ``path``.

    Raises:
      DeepGenError: on entry, where the folder cannot be used or another run holds it.
    """

    def __init__(self, path: Path, records: Path | None = None) -> None:
        self.path = path
        self._metadata_path = (records or path) / METADATA_FILE
        self._lines: dict[str, str] = {}
        self._others: list[str] = []
        self._order: list[str] = []
        self._handle: int | None = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> OutputFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._metadata_path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise DeepGenError(f"{self.path} is a file; give a folder with --out") from error
        except OSError as error:
            raise DeepGenError(f"output folder {self.path} cannot be used: {error.strerror or error}") from error
        with contextlib.ExitStack() as stack:
            stack.enter_context(locks.locked(self.path, "wait until it ends, or choose another --out"))
            files.remove_partials(self.path)
            self._read()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._held:
            if self._handle is not None:
                os.close(self._handle)
            if self._order:
                self._rewrite()

    def missing(
        self, wanted: Iterable[dict[str, Any]], overwrite: bool = False, *, keep_others: bool = False
    ) -> list[str]:
        """Files among ``wanted`` (from `describe`) that are still to be made.

        A file is finished when it is an undamaged PNG made from the same request. One made from a different request
        (changed prompt file or model) is made again, with a warning.

        Args:
          wanted: wanted contents of the folder.
          overwrite: make all of it, whatever is there.
          keep_others: refuse to replace what was made from other requests.

        Raises:
          DeepGenError: a file would leave the folder, or has a name that is too long; or one is in the way that no run
            has made, or that is to be kept, and ``overwrite`` is not set.
        """
        missing: list[str] = []
        changed = damaged = 0
        wanted = list(wanted)
        self._order = [metadata["file"] for metadata in wanted]
        for file in self._order:
            if not _is_inside(file):
                raise DeepGenError(f"image file {file!r} would leave {self.path}; use a name inside the folder")
            check_name(Path(file))
        for folder in {(self.path / file).parent for file in self._order} - {self.path}:
            files.remove_partials(folder)
        for metadata in wanted:
            file = metadata["file"]
            path = self.path / file
            if not os.path.lexists(path):
                self._lines.pop(file, None)
                missing.append(file)
                continue
            # A run killed between the image and its line leaves the image without a line, but with what is inside it.
            line = self._lines.get(file)
            known = json.loads(line) if line is not None else read_metadata(path)
            if known is None and not overwrite:
                raise in_the_way(path)
            other = known is not None and known.get("fingerprint") != metadata["fingerprint"]
            if keep_others and other and not overwrite:
                raise DeepGenError(f"{path} was made from another request; choose another --out or use --overwrite")
            whole = known is not None and not other and not overwrite and _is_whole(path)
            if known is not None and whole:
                self._lines.setdefault(file, _line(known))
            else:
                self._lines.pop(file, None)
                missing.append(file)
                changed += other
                damaged += not (other or overwrite)
        if damaged:
            warn_user(f"{damaged} of the images in {self.path} are damaged; made again")
        if changed:
            warn_user(f"{changed} of the images in {self.path} are of other requests or another model; made again")
        self._rewrite()
        return missing

    def save(self, image: Image.Image, metadata: dict[str, Any]) -> Path:
        """Writes the image, then its line of ``metadata.jsonl`` in one write.

        Raises:
          DeepGenError: either cannot be written.
        """
        path = self.path / metadata["file"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeepGenError(f"folder {path.parent} cannot be made: {error.strerror or error}") from error
        save_image(image, path, metadata)
        try:
            if self._handle is None:
                self._handle = os.open(self._metadata_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(self._handle, _line(metadata).encode())
        except OSError as error:
            raise files.write_error(self._metadata_path, error) from error
        self._lines[metadata["file"]] = _line(metadata)
        return path

    def _read(self) -> None:
        """Lines of images by file, and what else is in the file."""
        path = self._metadata_path
        self._lines, self._others = {}, []
        if not os.path.lexists(path):
            return
        for raw in files.read_bytes(path).splitlines():
            try:
                value = json.loads(raw)
            except (ValueError, RecursionError):
                if raw.strip():
                    warn_user(f"{path} has a damaged line, left by a run that was cut off; dropped")
                continue
            if not (isinstance(value, dict) and isinstance(value.get("file"), str) and "fingerprint" in value):
                self._others.append(raw.decode() + "\n")
            elif _is_inside(value["file"]):
                self._lines[value["file"]] = raw.decode() + "\n"
            else:
                warn_user(f"{path} names {value['file']!r}, which is outside the folder; the line is dropped")

    def _rewrite(self) -> None:
        """Brings ``metadata.jsonl`` to what is known now, in order; untouched where it is so already."""
        path = self._metadata_path
        ordered = [file for file in self._order if file in self._lines]
        rest = [file for file in self._lines if file not in set(self._order)]
        content = "".join([*self._others, *(self._lines[file] for file in (*rest, *ordered))]).encode()
        before = path.read_bytes() if path.exists() else b""
        if content != before:
            files.write_bytes(path, content)


def _line(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False) + "\n"


def _is_inside(file: str) -> bool:
    """Whether a relative path stays below the folder that it is relative to."""
    path = PurePath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file


def _is_whole(path: Path) -> bool:
    """Whether a file is a PNG whose chunks are all there and match their checksums."""
    try:
        data = files.read_bytes(path)
    except DeepGenError:
        return False
    place, kind = len(_PNG_START), b""
    if not data.startswith(_PNG_START):
        return False
    while place < len(data) and kind != b"IEND":
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body, place = data[place + 4 : place + 8 + length], place + 12 + length
        if place > len(data) or zlib.crc32(body) != int.from_bytes(data[place - 4 : place], "big"):
            return False
    return kind == b"IEND" and place == len(data)


def _file_digest(path: Path) -> str:
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DeepGenError(f"image {path} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, mtime: int) -> str:
    """SHA-256 of a file's bytes; size and time are there for the cache, which must not outlive a change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
