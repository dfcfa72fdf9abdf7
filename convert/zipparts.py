"""Archives of checkpoints, whole or cut in parts, read in place: nothing is unpacked to disk."""

from __future__ import annotations

import bisect
import io
import itertools
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

from deepgen_jax.errors import DeepGenError, first_line
from deepgen_jax.files import open_regular
from deepgen_jax.stores.path_kinds import PICKLE_MAGIC, ZIP_MAGIC

_PART = re.compile(r"^(?P<stem>.+\.part-?)(?P<number>[a-z]+|\d+)$")
#: Bytes of a compressed member that are kept in memory: at each of its ends, and behind the place of reading.
KEPT_BYTES = 16 * 2**20
RECENT_BYTES = 64 * 2**20
_STEP_BYTES = 8 * 2**20
#: What reading a damaged zip file raises, besides DeepGenError.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, UnicodeDecodeError, NotImplementedError, RuntimeError,
    OverflowError,
)  # fmt: skip


def _sought(offset: int, whence: int, position: int, size: int) -> int:
    """The position that ``seek`` asks for."""
    position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: position, io.SEEK_END: size}[whence]
    if position < 0:
        raise zipfile.BadZipFile("it points before its start")
    return position


class JoinedFile(io.RawIOBase):
    """Several files read as if they were one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[BinaryIO] = []
        try:
            for path in paths:
                self._files.append(open_regular(path))
        except BaseException:
            self.close()
            raise
        sizes = [os.fstat(file.fileno()).st_size for file in self._files]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._position = 0

    @property
    def size(self) -> int:
        return self._starts[-1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = _sought(offset, whence, self._position, self.size)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._position >= self.size:
            return 0
        part = bisect.bisect_right(self._starts, self._position) - 1
        count = min(len(buffer), self._starts[part + 1] - self._position)
        self._files[part].seek(self._position - self._starts[part])
        done = self._files[part].readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._position += done
        return done

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


class _Window(io.RawIOBase):
    """A stored (uncompressed) member: a range of the archive."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = _sought(offset, whence, self._position, self._size)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        done = self._file.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._position += done
        return done

    def close(self) -> None:
        self._file.close()
        super().close()


class _Inflated(io.RawIOBase):
    """A compressed member. Going forward decompresses, going back starts anew, except to bytes that are kept.

    Those are its first and last, where a torch checkpoint has its tables, and those just passed, since an adapter's
    factors may be between the weight and the bias of its layer.
    """

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self._archive, self._info = archive, info
        self._size, self._position = info.file_size, 0
        self._stream, self._stream_position = archive.open(info), 0
        self._head, self._tail, self._recent = bytearray(), bytearray(), bytearray()
        self._tail_start = max(0, self._size - KEPT_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = _sought(offset, whence, self._position, self._size)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position, _STEP_BYTES))
        data = self._kept(count)
        if data is None:
            if self._position < self._stream_position:
                self._stream.close()
                self._stream, self._stream_position = self._archive.open(self._info), 0
                self._recent.clear()
            while self._stream_position < self._position:
                self._inflate(min(_STEP_BYTES, self._position - self._stream_position))
            data = self._inflate(count)
        memoryview(buffer)[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _kept(self, count: int) -> bytes | None:
        """Up to ``count`` bytes at the position, if they are kept."""
        behind = self._stream_position - len(self._recent)
        for kept, start in ((self._head, 0), (self._tail, self._tail_start), (self._recent, behind)):
            place = self._position - start
            if 0 <= place < len(kept):
                return bytes(memoryview(kept)[place : place + count])
        return None

    def _inflate(self, count: int) -> bytes:
        """The next bytes of the stream."""
        data = self._stream.read(count)
        if count and not data:
            raise EOFError("its compressed data end too early")
        start = self._stream_position
        self._stream_position += len(data)
        if start == len(self._head):
            self._head += data[: max(0, KEPT_BYTES - start)]
        known = self._tail_start + len(self._tail)
        if start <= known < self._stream_position:
            self._tail += data[known - start :]
        self._recent += data
        if len(self._recent) > 2 * RECENT_BYTES:
            del self._recent[:-RECENT_BYTES]
        return data

    def close(self) -> None:
        self._stream.close()
        super().close()


def find_parts(path: Path) -> list[Path]:
    """All parts of the archive that ``path`` is a part of, in order; just ``path`` where it is no part.

    Raises:
      DeepGenError: a part between two others, or the first, is missing.
    """
    match = _PART.match(path.name)
    if match is None:
        return [path]
    found = {}
    for other in path.parent.iterdir():
        other_match = _PART.match(other.name)
        if other_match and other_match["stem"] == match["stem"]:
            found[_part_number(other_match["number"])] = other
    numbers = sorted(found)
    width = len(match["number"])
    base = 1 if match["number"].isdigit() and 0 not in found else 0
    for expected, number in enumerate(numbers, base):
        if number != expected:
            name = match["stem"] + _part_name(expected, width, match["number"].isdigit())
            raise DeepGenError(
                f"{path.parent / name} is missing, though {found[numbers[-1]].name} is there; download all parts"
            )
    return [found[number] for number in numbers]


def _part_number(text: str) -> int:
    """ "aa" -> 0, "ab" -> 1, ..., "07" -> 7."""
    if text.isdigit():
        return int(text)
    number = 0
    for letter in text:
        number = number * 26 + ord(letter) - ord("a")
    return number


def _part_name(number: int, width: int, digits: bool) -> str:
    if digits:
        return f"{number:0{width}d}"
    letters = []
    for _ in range(width):
        number, letter = divmod(number, 26)
        letters.append(chr(ord("a") + letter))
    return "".join(reversed(letters))


def open_archive(parts: Sequence[Path]) -> tuple[zipfile.ZipFile, BinaryIO]:
    """The archive and the file under it.

    Raises:
      DeepGenError: it is damaged or its last part is missing.
    """
    file = cast(BinaryIO, io.BufferedReader(JoinedFile(parts)))
    try:
        return zipfile.ZipFile(file), file
    except DAMAGE as error:
        file.close()
        if not isinstance(error, zipfile.BadZipFile):
            raise DeepGenError(f"{parts[0]} is damaged ({first_line(error)}); download it again") from None
        if len(parts) > 1 or _PART.match(parts[0].name):
            raise DeepGenError(
                f"{parts[-1]} is truncated, or parts after it are missing ({len(parts)} found): the "
                "archive's table is not at its end; download all parts"
            ) from None
        raise DeepGenError(f"{parts[0]} is truncated: the table at its end is missing; download it again") from None


def is_torch_file(archive: zipfile.ZipFile) -> bool:
    """Whether a zip is what ``torch.save`` writes, not an archive of such files."""
    return any(name.endswith("/data.pkl") and name.count("/") == 1 for name in archive.namelist())


def choose_member(archive: zipfile.ZipFile, label: str, member: str | None) -> zipfile.ZipInfo:
    """The checkpoint in an archive: the only one, or the one whose name contains ``member``.

    Raises:
      DeepGenError: there is none, or not exactly one.
    """
    checkpoints = []
    for info in archive.infolist():
        if not info.is_dir():
            try:
                with archive.open(info) as stream:
                    start = stream.read(len(ZIP_MAGIC))
            except DAMAGE as error:
                reason = first_line(error)
                raise DeepGenError(f"{label}: {info.filename} is damaged ({reason}); download it again") from None
            if start.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
                checkpoints.append(info)
    if not checkpoints:
        raise DeepGenError(f"{label} holds no torch checkpoint (members: {_names(archive.infolist())})")
    chosen = [info for info in checkpoints if member is None or member in info.filename]
    if len(chosen) == 1:
        return chosen[0]
    if member is None:
        raise DeepGenError(
            f"{label} holds {len(checkpoints)} checkpoints ({_names(checkpoints)}); choose one with "
            "--member and a part of its name, such as --member SFT"
        )
    raise DeepGenError(
        f"--member {member} fits {len(chosen)} of the checkpoints in {label} ({_names(checkpoints)}); "
        "give a part of one name"
    )


def _names(infos: Sequence[zipfile.ZipInfo]) -> str:
    return ", ".join(info.filename for info in infos[:6]) + (", ..." if len(infos) > 6 else "")


def open_member(archive: zipfile.ZipFile, file: BinaryIO, info: zipfile.ZipInfo) -> tuple[BinaryIO, bool]:
    """A member as a seekable file, and whether seeking back in it is slow (it is compressed)."""
    if info.compress_type != zipfile.ZIP_STORED:
        return cast(BinaryIO, io.BufferedReader(_Inflated(archive, info))), True
    return cast(BinaryIO, io.BufferedReader(_Window(file, member_start(file, info), info.file_size))), False


def member_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Position of a member's data in the archive ``file``."""
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != ZIP_MAGIC:
        raise zipfile.BadZipFile(f"{info.filename} is not where the table says")
    return info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
