"""Files by path, on local disks and behind any fsspec address (``gs://``, ``s3://``, ``https://``, ...)."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import refuse_url

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# What object stores call the identity of a file's content, best first.
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


class FileInfo(NamedTuple):
    """A file and what tells its content from another's.

    Attributes:
      path: local path or fsspec address.
      size: bytes.
      stamp: time of change or entity tag.
    """

    path: str
    size: int
    stamp: str


class Blob(NamedTuple):
    """Bytes inside a file; ``size`` None is to its end."""

    path: str
    offset: int = 0
    size: int | None = None


def cache_folder(chosen: str = "") -> Path:
    """Where what is derived from data is kept: ``chosen``, else ``$DEEPGEN_CACHE``, else ``~/.cache/deepgen-jax``."""
    if not chosen and (given := os.environ.get("DEEPGEN_CACHE")):
        refuse_url(given, "$DEEPGEN_CACHE")
    return Path(chosen or os.environ.get("DEEPGEN_CACHE") or Path.home() / ".cache" / "deepgen-jax")


def is_remote(path: str) -> bool:
    """Whether ``path`` is an fsspec address rather than a local path."""
    return "://" in path


def join(root: str, path: str) -> str:
    """``path`` seen from the folder ``root``; absolute paths and addresses stay as they are."""
    if not root or is_remote(path) or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}"


def parent(path: str) -> str:
    """The folder that holds ``path``."""
    return path.rpartition("/")[0] or ("" if "/" not in path else "/")


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a file, or of a part of it.

    Raises:
      FileNotFoundError, OSError: as the file system says.
    """
    if is_remote(path):
        fs, inner = _remote(path)
        try:
            return fs.cat_file(inner, start=offset or None, end=None if size is None else offset + size)
        except OSError:
            raise
        except Exception as error:
            # Every store has errors of its own.
            raise OSError(f"{type(error).__name__}: {error}") from error
    with open(path, "rb", buffering=0) as file:
        if size is None:
            file.seek(offset)
            return file.readall()
        return os.pread(file.fileno(), size, offset)


def open_blob(data: bytes | Blob) -> BinaryIO:
    """A seekable file over the bytes; a whole local file is not read beyond what the caller reads."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not is_remote(data.path) and not data.offset and data.size is None:
        return open(data.path, "rb")
    return io.BytesIO(read(*data))


def open_file(path: str) -> BinaryIO:
    """The file, open for reading, seekable."""
    if is_remote(path):
        fs, inner = _remote(path)
        return fs.open(inner, "rb")
    return open(path, "rb")


def local_copy(path: str) -> str:
    """``path`` itself, or a copy of the remote file in the cache folder, for readers of local files only."""
    if not is_remote(path):
        return path
    import fsspec

    return fsspec.open_local(f"filecache::{path}", filecache={"cache_storage": str(cache_folder() / "files")})


def list_files(pattern: str, suffixes: Iterable[str], where: str) -> list[FileInfo]:
    """The files meant by a path, in order of their names.

    Args:
      pattern: a file; a folder, of which all files with one of the suffixes are taken, at any depth; or a pattern with
        ``*``, ``?`` or ``{000..123}``.
      suffixes: such as ".tar", lower case.
      where: begins the error message.

    Raises:
      DeepGenError: nothing is there.
    """
    endings = tuple(suffixes)
    found: dict[str, FileInfo] = {}
    for single in _expand_ranges(pattern):
        listed = _list_remote(single, endings) if is_remote(single) else _list_local(single, endings)
        if not listed:
            raise DeepGenError(f"{where}: {single} is missing or holds no {' or '.join(endings)} file; check the path")
        found.update((info.path, info) for info in listed)
    return [found[path] for path in sorted(found)]


def _expand_ranges(pattern: str) -> list[str]:
    """``a{08..10}`` -> a08, a09, a10."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        path
        for number in numbers
        for path in _expand_ranges(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")
    ]


def _list_local(pattern: str, endings: tuple[str, ...]) -> list[FileInfo]:
    if os.path.isdir(pattern):
        return _walk(pattern, lambda name: name.lower().endswith(endings))
    paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    stats = [(path, os.stat(path)) for path in paths if os.path.isfile(path)]
    return [FileInfo(path, stat.st_size, str(stat.st_mtime_ns)) for path, stat in stats]


def _walk(folder: str, wanted: Callable[[str], bool]) -> list[FileInfo]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found += _walk(entry.path, wanted)
            elif wanted(entry.name) and entry.is_file():
                stat = entry.stat()
                found.append(FileInfo(entry.path, stat.st_size, str(stat.st_mtime_ns)))
    return found


def _list_remote(pattern: str, endings: tuple[str, ...]) -> list[FileInfo]:
    fs, inner = _remote(pattern)
    if glob.has_magic(inner):
        details = fs.glob(inner, detail=True)
    elif fs.isdir(inner):
        details = {path: info for path, info in fs.find(inner, detail=True).items() if path.lower().endswith(endings)}
    elif fs.exists(inner):
        details = {inner: fs.info(inner)}
    else:
        details = {}
    files = [(path, info) for path, info in details.items() if info.get("type", "file") == "file"]
    return [
        FileInfo(fs.unstrip_protocol(path), int(info.get("size") or 0), _stamp_of(info)) for path, info in files
    ]


def _stamp_of(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _STAMPS if info.get(name)), "")


def _remote(path: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(path)
    except ImportError as error:
        raise DeepGenError(f"{path} needs a package that is missing ({error}); install it") from error
    except ValueError as error:
        raise DeepGenError(f"{path} cannot be opened ({error}); check the address") from error
