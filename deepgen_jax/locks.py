"""The lock of a folder that one process may write at a time, held across processes and released by death.

Importing this module is light.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import LOCK_FILE, write_error
from deepgen_jax.user_warnings import warn_user

# Descriptors of the locks that this process holds.
_held: set[int] = set()


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
    """A descriptor of the locked file; None if the system or the file system has no locks."""
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
