"""Files and folders on disk: local paths, atomic writes, checks of inputs, free space, and the lock of a folder.

Every file or folder that this package leaves on disk is written by :func:`replacing`, and every folder that one
process may write at a time is held with :func:`locked`. Importing this module is light.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, get_args, get_type_hints

from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import warn_user

#: Prefix of names under which files and folders are written before they are renamed.
PARTIAL_PREFIX = ".deepgen-partial-"
#: Name of the lock file inside a locked folder.
LOCK_FILE = ".deepgen-lock"
#: Bytes left free on a disk beside what is written.
_SPARE_BYTES = 64 * 2**20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

#: Largest JSON file that is read; tokenizers have 12 MB, indexes of weights less.
MAX_JSON_BYTES = 64 * 2**20
_MAX_DIGITS = 400

# Descriptors of the locks that this process holds.
_held: set[int] = set()


#: Type of a configuration's field that holds a local path, for :func:`refuse_urls`.
LocalPath = Annotated[str, "local path"]

# Also "gs:/bucket", which pathlib makes of "gs://bucket".
_URL = re.compile(r"\s*([A-Za-z][\w+.-]+(?:::[\w+.-]+)*):/+")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, such as ``gs://bucket/name``; ``./gs:/name`` is a local path."""
    return _URL.match(os.fspath(path)) is not None


def refuse_url(path: str | os.PathLike[str], where: str) -> None:
    """Raises a DeepGenError where a local path is expected and ``path`` is a URL.

    Args:
      path: as the user gave it.
      where: begins the message, such as "--out" or "samples.images".
    """
    if is_url(path):
        url = os.fspath(path)
        if "://" not in url:
            url = url.replace(":/", ":///" if url.startswith("file") else "://", 1)
        raise DeepGenError(f"{where} is the URL {url}, but must be a local path; copy it to a disk or mount the store")


def refuse_urls(settings: Any, name: Callable[[str], str] = str) -> None:
    """:func:`refuse_url` for every field of type `Path` or `LocalPath` of a dataclass and of those inside it.

    Args:
      settings: a dataclass instance.
      name: what to call a field in the message, from its dotted name.
    """
    _refuse_urls(settings, "", name)


def _refuse_urls(settings: Any, prefix: str, name: Callable[[str], str]) -> None:
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        values = value if isinstance(value, tuple | list) else (value,)
        for one in values:
            if dataclasses.is_dataclass(one) and not isinstance(one, type):
                _refuse_urls(one, f"{prefix}{field.name}.", name)
            elif isinstance(one, str | os.PathLike) and is_path_type(hints[field.name]):
                refuse_url(one, name(f"{prefix}{field.name}"))


def is_path_type(hint: Any) -> bool:
    """Whether a type hint is, or contains, `Path` or `LocalPath`."""
    if "local path" in getattr(hint, "__metadata__", ()) or (isinstance(hint, type) and issubclass(hint, Path)):
        return True
    return any(is_path_type(inner) for inner in get_args(hint))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write a file or a folder to; it becomes ``path`` when the block succeeds.

    The yielded path is in the same folder and does not exist yet. Its content is flushed to the disk before it is
    renamed, so that after a power cut, too, ``path`` is either the old or the new version. A file that is replaced
    passes on its permissions. An exception of any kind removes what was written and leaves ``path`` as it was.

    Raises:
      DeepGenError: an ``OSError`` in the block or while renaming; it names the file concerned.
    """
    partial = path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield partial
        _flush(partial)
        _rename(partial, path)
        _flush_entry(path.parent)
    except OSError as error:
        raise write_error(path, error, partial) from error
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically; see :func:`replacing`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically; see :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def remove(path: Path) -> None:
    """Removes a file, a symbolic link or a whole folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_own(path: Path) -> bool:
    """Whether a file or folder is a lock or half written, so that a folder with nothing else counts as empty."""
    return path.name == LOCK_FILE or path.name.startswith(PARTIAL_PREFIX)


def remove_partials(folder: Path) -> None:
    """Removes what a killed process left half written directly in ``folder``; call it while the folder is locked."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        remove(path)


def open_regular(path: Path, max_bytes: int | None = None) -> BinaryIO:
    """Opens an input file for reading bytes; a pipe, device or folder is refused instead of waited for.

    Args:
      path: symbolic links are followed.
      max_bytes: largest size accepted; None for any.

    Raises:
      DeepGenError: it is missing, unreadable, no regular file, or too large.
    """
    try:
        # Opening a pipe waits for its other end without O_NONBLOCK, which regular files ignore.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise DeepGenError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise DeepGenError(f"{str(path)!r} is no file name: {error}") from error
    try:
        _check_regular(path, os.fstat(descriptor), max_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Raises as :func:`open_regular` does, for libraries that open files by name."""
    open_regular(path, max_bytes).close()


def read_bytes(path: Path, max_bytes: int | None = None) -> bytes:
    """Content of an input file; see :func:`open_regular`."""
    with open_regular(path, max_bytes) as file:
        try:
            return file.read()
        except OSError as error:
            raise DeepGenError(f"{path} cannot be read: {error.strerror or error}") from error


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """UTF-8 text of an input file without a byte order mark; see :func:`open_regular`.

    Raises:
      DeepGenError: also where it is not UTF-8, with the line.
    """
    content = read_bytes(path, max_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DeepGenError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8") from None


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


def _check_regular(path: Path, status: os.stat_result, max_bytes: int | None) -> None:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(status.st_mode):
        kind = kinds.get(stat.S_IFMT(status.st_mode), "something else")
        raise DeepGenError(f"{path} is {kind}, not a regular file; give a file on disk")
    if max_bytes is not None and status.st_size > max_bytes:
        raise DeepGenError(f"{path} has {size(status.st_size)}; at most {size(max_bytes)} can be read")


@contextlib.contextmanager
def locked(
    folder: Path, fix: str = "wait until it ends, or choose another folder", *, wait: bool = False
) -> Iterator[None]:
    """Holds ``folder`` for this process within the block.

    The folder is made where it is missing, and removed again if it is empty at the end.

    The system releases the lock when the process ends, however it ends. One process of a multi-process run, the one
    that writes, holds it for all. A file system without locks is reported once and not locked.

    Args:
      folder: to hold.
      fix: ends the message where another process holds it.
      wait: wait until the folder is free.

    Raises:
      DeepGenError: another process, or another thread of this one, holds the folder, or it cannot be written.
    """
    new = not folder.exists()
    try:
        with _holding(folder, folder / LOCK_FILE, fix, wait):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextlib.contextmanager
def locked_output(
    path: Path, fix: str = "wait until it ends, or choose another --out", *, wait: bool = False
) -> Iterator[None]:
    """As :func:`locked`, for a file or folder that is made as a whole: the lock file is beside it.

    Raises:
      DeepGenError: another process makes it, or its folder is missing or cannot be written.
    """
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    with _holding(path, path.with_name(f".{name}.deepgen-lock"), fix, wait):
        yield


def require_space(path: Path, needed: int, fix: str = "free some space or choose another --out") -> None:
    """Raises a DeepGenError unless the disk of ``path`` (which need not exist) has ``needed`` bytes to spare."""
    free = free_bytes(path)
    if free < needed + _SPARE_BYTES:
        lacking = needed + _SPARE_BYTES - free
        raise DeepGenError(
            f"{path} needs {size(needed)}, but its disk has {size(free)} free: {size(lacking)} are lacking; {fix}"
        )


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the disk of ``path``, which need not exist."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def disk_usage(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk, in whole blocks."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def size(count: int) -> str:
    """A number of bytes for people, such as "13.5 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a disk was full or a quota used up, however the error was wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if any(os.strerror(number) in str(error) for number in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_error(path: Path, error: OSError, partial: Path | None = None) -> DeepGenError:
    """The message for an ``OSError`` while ``path`` was written, under the name ``partial`` meanwhile."""
    if is_disk_full(error):
        return DeepGenError(f"{path} cannot be written: its disk is full ({size(free_bytes(path))} free); free some")
    name = error.filename
    if name is None or (partial is not None and str(name).startswith(str(partial))):
        name = path
    return DeepGenError(f"{name} cannot be written: {error.strerror or error}")


def _flush(path: Path) -> None:
    """Waits until the content of a file, or of all files in a folder, is on the disk."""
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                _flush_entry(Path(folder, name))
            _flush_entry(Path(folder))
    else:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    # Some network file systems do not know fsync, and a folder cannot be opened on every system. What fails because
    # the disk is full must not pass for written.
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (*_DISK_FULL, errno.EIO):
            raise
    finally:
        os.close(descriptor)


def _rename(partial: Path, path: Path) -> None:
    """Renames ``partial`` to ``path``; a folder that is there is put aside first and removed last."""
    replaced = not path.is_symlink() and path.exists()
    if replaced and path.is_file() and partial.is_file():
        partial.chmod(stat.S_IMODE(path.stat().st_mode))
    if not os.path.lexists(path) or not (partial.is_dir() or (replaced and path.is_dir())):
        os.replace(partial, path)
        return
    old = path.with_name(f"{PARTIAL_PREFIX}old-{os.getpid()}-{secrets.token_hex(4)}")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(old, path)
        raise
    remove(old)


@contextlib.contextmanager
def _holding(what: Path, lock: Path, fix: str, wait: bool) -> Iterator[None]:
    descriptor = _acquire(what, lock, fix, wait)
    if descriptor is None:
        yield
        return
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        # Removed while it is held: whoever opened it meanwhile sees that its name is gone and opens a new one.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(what: Path, lock: Path, fix: str, wait: bool) -> int | None:
    """A descriptor of the locked file; None where the system or the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        warn_user(f"this system has no file locks; make sure that no other process writes to {what}", stacklevel=4)
        return None
    while True:
        try:
            if lock.parent == what:
                # Again each time: whoever held it last removes the folder that it left empty.
                what.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError as error:
            if lock.parent == what and what.parent.is_dir():
                continue
            raise write_error(what, error, lock) from error
        except OSError as error:
            raise write_error(what, error, lock) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_named(descriptor, lock):
                _sign(descriptor)
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise DeepGenError(f"{what} is in use by {holder}; {fix}") from None
        except OSError as error:
            os.close(descriptor)
            warn_user(
                f"{what} cannot be locked ({error.strerror or error}); make sure that no other process writes to it",
                stacklevel=4,
            )
            return None


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Writes who holds the lock; on a full disk the lock holds without it."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    """Describes the holder of a lock from its file."""
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {values['pid']} on {values['host']} since {values['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _forget_locks() -> None:
    """In a forked child: its copies of the descriptors would keep the locks after the parent's death."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
