"""CRC-32 checksums of the files of model folders and checkpoints, written once and checked before arrays are read.

A CRC-32 detects every flipped bit and every burst of up to 32 bits. Reading is split over threads, and over processes
where several load together. Importing this module is light.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepgen_jax import files
from deepgen_jax.errors import DeepGenError

_BLOCK_BYTES = 4 * 2**20
#: The folder of a run that lists the checksums of its checkpoints, a file by each process that wrote one. A list inside
#: a checkpoint would be written while that may be removed.
LISTS = "checksums"
# How many blocks of `unverified` are open, in any thread.
_unverified = 0
# Files found good by this process: path, size, times of the last changes and inode.
_good: set[tuple[str, int, int, int, int]] = set()


@contextlib.contextmanager
def unverified() -> Iterator[None]:
    """Within the block, files are read without a check of their checksums, in all threads of the process."""
    global _unverified
    _unverified += 1
    try:
        yield
    finally:
        _unverified -= 1


def checksum(path: Path) -> str:
    """CRC-32 of a file as eight hexadecimal digits.

    Raises:
      OSError: it cannot be read.
    """
    value = 0
    buffer = bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return f"{value:08x}"


def checksums(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Checksums of files of a folder by their path in it, in the order given."""
    listed = list(paths)
    with _threads() as pool:
        values = pool.map(checksum, listed)
        return {path.relative_to(folder).as_posix(): value for path, value in zip(listed, values, strict=True)}


def verify(folder: Path, expected: Mapping[str, str], fix: str) -> None:
    """Checks files of a folder against their checksums; each is read once by a process, however often it asks.

    Of several processes, each checks its share.

    Args:
      folder: that the files are in.
      expected: checksum by path in the folder.
      fix: ends the message.

    Raises:
      DeepGenError: a file is missing or has changed.
    """
    if _unverified:
        return
    index, count = _process()
    share = [(folder / name, value) for name, value in sorted(expected.items())[index::count]]

    def check(item: tuple[Path, str]) -> str | None:
        path, value = item
        try:
            status = path.stat()
            key = (str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            if key in _good:
                return None
            if checksum(path) != value:
                return f"{path} has changed since it was written (its checksum is wrong)"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
        _good.add(key)
        return None

    with _threads() as pool:
        problem = next(filter(None, pool.map(check, share)), None)
    if problem is not None:
        raise DeepGenError(f"{problem}; {fix}")


def seal(checkpoint: Path) -> None:
    """Lists the checksums of the files of ``run/checkpoints/STEP``, complete, that this process wrote.

    A checkpoint that is removed meanwhile is left alone.
    """
    index, _ = _process()
    try:
        found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        mine = [path for path in found if _writer(path.relative_to(checkpoint)) == index]
        lines = [f"{value}  {name}\n" for name, value in checksums(checkpoint, mine).items()]
        folder = _lists(checkpoint)
        folder.mkdir(exist_ok=True)
        files.write_text(folder / f"{checkpoint.name}-{index}.txt", "".join(lines))
    except (OSError, DeepGenError):
        # It was removed by age, or the disk is full; without a list it can still be read.
        return


def unseal(checkpoint: Path) -> None:
    """Removes the list that this process wrote of a checkpoint of the same step."""
    (_lists(checkpoint) / f"{checkpoint.name}-{_process()[0]}.txt").unlink(missing_ok=True)


def verify_sealed(checkpoint: Path, fix: str) -> None:
    """Checks the files of a checkpoint against the lists of :func:`seal`; without lists nothing is checked.

    Raises:
      DeepGenError: a file is missing or has changed, or a list is damaged.
    """
    expected: dict[str, str] = {}
    for path in sorted(_lists(checkpoint).glob(f"{checkpoint.name}-*.txt")):
        for line in filter(None, files.read_text(path).split("\n")):
            value, separator, name = line.partition("  ")
            if not separator:
                raise DeepGenError(f"{path} is damaged; {fix}")
            expected[name] = value
    verify(checkpoint, expected, fix)


def _lists(checkpoint: Path) -> Path:
    return checkpoint.parent.parent / LISTS


def _writer(path: Path) -> int:
    """The process that wrote a file of a checkpoint: each process writes its arrays to a separate folder."""
    for name in path.parts:
        head, _, number = name.rpartition("_")
        if head == "ocdbt.process" and number.isdecimal():
            return int(number)
    return 0


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "deepgen-checksums")


def _process() -> tuple[int, int]:
    """Number of this process and how many there are; a program without JAX is alone."""
    if "jax" not in sys.modules:
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()
