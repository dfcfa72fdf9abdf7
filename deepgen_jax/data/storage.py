"""Files by path, on local disks and behind any fsspec address (``gs://``, ``s3://``, ``https://``, ...)."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import open_regular
from deepgen_jax.local_paths import refuse_url

_LOCAL = "file://"


class FileInfo(NamedTuple):
    """A file, and what identifies its content.

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
    """Folder of indices and local copies: ``chosen``, else ``$DEEPGEN_CACHE``, else ``~/.cache/deepgen-jax``."""
    if not chosen and (given := os.environ.get("DEEPGEN_CACHE")):
        refuse_url(given, "$DEEPGEN_CACHE")
    return Path(chosen or os.environ.get("DEEPGEN_CACHE") or Path.home() / ".cache" / "deepgen-jax")


def is_remote(path: str) -> bool:
    """Whether ``path`` is an fsspec address rather than a local path."""
    return "://" in path and not path.startswith(_LOCAL)


def local_path(path: str) -> str:
    """A local path without ``file://``."""
    return path.removeprefix(_LOCAL)


def join(root: str, path: str) -> str:
    """``path`` relative to the folder ``root``; absolute paths and addresses are kept."""
    if not root or "://" in path or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}"


def parent(path: str) -> str:
    """The folder that holds ``path``."""
    return path.rpartition("/")[0] or ("" if "/" not in path else "/")


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a file, or of a part of it.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read, is no regular file, or ends before the part does.
      DeepGenError: the address needs a package that is missing, or is of an unknown kind.
    """
    if is_remote(path):
        fs, inner = open_store(path)
        try:
            data = fs.cat_file(inner, start=offset or None, end=None if size is None else offset + size)
        except OSError:
            raise
        except Exception as error:  # Every store has its own errors.
            raise OSError(f"{type(error).__name__}: {error}") from error
    else:
        with open_file(path) as file:
            end = os.fstat(file.fileno()).st_size
            if size is not None and offset + size <= end:
                data = os.pread(file.fileno(), size, offset)
            else:
                file.seek(offset)
                data = b"" if size is not None else file.read()
    if size is not None and len(data) < size:
        raise OSError(f"the file ends before byte {offset + size}")
    return data


def open_blob(data: bytes | Blob) -> BinaryIO:
    """A seekable file over the bytes; a whole local file is not read beyond what the caller reads."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not is_remote(data.path) and not data.offset and data.size is None:
        return open_file(data.path)
    return io.BytesIO(read(*data))


def open_file(path: str) -> BinaryIO:
    """The file, open for reading, seekable.

    Raises:
      FileNotFoundError, OSError, DeepGenError: as `read`.
    """
    if is_remote(path):
        fs, inner = open_store(path)
        try:
            return fs.open(inner, "rb")
        except OSError:
            raise
        except Exception as error:  # Every store has its own errors.
            raise OSError(f"{type(error).__name__}: {error}") from error
    try:
        return open_regular(Path(local_path(path)))
    except DeepGenError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        # A name that no file can have is missing; a pipe, device or folder is there and cannot be read.
        raise (FileNotFoundError if isinstance(error.__cause__, ValueError) else OSError)(str(error)) from error


def local_copy(path: str) -> str:
    """``path`` itself, or a copy of the remote file in the cache folder, for readers of local files only.

    Raises:
      OSError: it cannot be read, or is no regular file.
      DeepGenError: as `read`.
    """
    if not is_remote(path):
        open_file(path).close()
        return local_path(path)
    import fsspec

    return fsspec.open_local(f"filecache::{path}", filecache={"cache_storage": str(cache_folder() / "files")})


def open_store(path: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path within it.

    Raises:
      DeepGenError: a package is missing, or the address is of an unknown kind.
    """
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(path)
    except ImportError as error:
        raise DeepGenError(f"{path} needs a package that is missing ({error}); install it") from error
    except ValueError as error:
        raise DeepGenError(f"{path} cannot be opened ({error}); check the address") from error
