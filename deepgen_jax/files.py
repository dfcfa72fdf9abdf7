"""Files and folders on disk: atomic writes, checks of inputs, and free space.

Every file or folder that this package leaves on disk is written by :func:`replacing`. Importing this module is light.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from deepgen_jax.errors import DeepGenError

#: Prefix of names under which files and folders are written before they are renamed.
PARTIAL_PREFIX = ".deepgen-partial-"
#: Name of the lock file inside a locked folder; see `deepgen_jax.locks`.
LOCK_FILE = ".deepgen-lock"
#: Bytes left free on a disk beside what is written.
_SPARE_BYTES = 64 * 2**20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or a folder to; it becomes ``path`` when the block succeeds.

    The yielded path is in the same folder and does not exist yet. Its content is flushed to the disk before it is
    renamed, so that after a power cut, too, ``path`` is either the old or the new version. A file that is replaced
    passes on its permissions. An exception of any kind removes what was written and leaves ``path`` as it was.

    Args:
      path: of the file or folder.
      keep_existing: for folders that several processes write with the same content: the first one stays.

    Raises:
      DeepGenError: an ``OSError`` in the block or while renaming; it names the file concerned.
    """
    partial = path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield partial
        _flush(partial)
        if keep_existing:
            _rename_first(partial, path)
        else:
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
    """Removes a file, a symbolic link or a whole folder; nothing happens if there is none."""
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


def _rename_first(partial: Path, path: Path) -> None:
    """Renames the folder ``partial`` to ``path`` unless there is a folder with files."""
    try:
        os.rename(partial, path)
    except OSError:
        if not path.is_dir():
            raise


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
