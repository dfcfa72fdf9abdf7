"""Expands a path to files: one file, a folder, or a pattern; sorted by name."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from deepgen_jax.data.storage import FileInfo, is_remote, local_path, open_store
from deepgen_jax.errors import DeepGenError

_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
# What object stores call the identity of a file's content, best first.
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
# Names that systems leave in folders; those that start with a dot are hidden as well.
_HIDDEN = ("__MACOSX",)
#: Why names in a folder are passed over.
HIDDEN_NAME, SECOND_LINK, BROKEN_LINK = "hidden name", "link to a folder already read", "broken link"


def list_files(
    pattern: str, suffixes: Iterable[str], where: str, passed_over: Counter[str] | None = None
) -> list[FileInfo]:
    """Expands a path to files, sorted by name.

    Hidden names (a leading dot, ``__MACOSX``) are passed over unless ``pattern`` names them. Links to folders are
    followed, but a folder is read once, however many links lead to it.

    Args:
      pattern: a file; a folder, of which all files with one of the suffixes are taken, at any depth; or a pattern with
        ``*``, ``?`` or ``{000..123}``.
      suffixes: such as ".tar", lower case.
      where: begins the error message.
      passed_over: names with one of the suffixes that were not taken are counted here, by reason.

    Raises:
      DeepGenError: nothing is there, or it cannot be listed.
    """
    endings = tuple(suffixes)
    counts: Counter[str] = Counter() if passed_over is None else passed_over
    if "\0" in pattern:
        raise DeepGenError(f"{where}: path {pattern!r} holds a NUL character; check the path")
    found: dict[str, FileInfo] = {}
    for single in _expand_ranges(pattern, where):
        try:
            listed = (_list_remote if is_remote(single) else _list_local)(single, endings, counts)
        except OSError as error:
            raise DeepGenError(f"{where}: {error.filename or single} cannot be listed: {error}") from error
        if not listed:
            status = f"is missing or holds no {' or '.join(endings)} file"
            if not is_remote(single) and os.path.exists(single) and not os.path.isdir(single):
                status = "is a pipe or device, not a regular file"
            raise DeepGenError(f"{where}: {single} {status}; check the path")
        found.update((info.path, info) for info in listed)
    return [found[path] for path in sorted(found)]


def _expand_ranges(pattern: str, where: str) -> Iterator[str]:
    """``a{08..10}`` -> a08, a09, a10, one at a time: the first that is missing ends the listing."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise DeepGenError(f"{where}: the range {match.group()} is empty; write the smaller number first")
    for number in range(int(first), int(last) + 1):
        yield from _expand_ranges(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}", where)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def _hidden_below(path: str, pattern: str) -> bool:
    """Whether a path has a hidden part that its pattern does not ask for."""
    named = set(pattern.split("/"))
    dots = any(part.startswith(".") and glob.has_magic(part) for part in named)
    return any(_hidden(part) and not (dots and part.startswith(".")) for part in set(path.split("/")) - named)


def _list_local(pattern: str, endings: tuple[str, ...], passed_over: Counter[str]) -> list[FileInfo]:
    pattern = local_path(pattern)
    if os.path.isdir(pattern):
        return _walk(pattern, lambda path: path.lower().endswith(endings), passed_over)
    if "**" in pattern.split("/") and not os.path.isfile(pattern):
        # Not by `glob`, which follows links in circles.
        parts = pattern.split("/")
        first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        folder, wanted = "/".join(parts[:first]) or ("/" if first else "."), parts[first:]
        if not os.path.isdir(folder):
            return []
        return _walk(folder, lambda path: _matches(path.split("/"), wanted), passed_over)
    paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    shown = [path for path in paths if not _hidden_below(path, pattern)]
    passed_over[HIDDEN_NAME] += len(paths) - len(shown)
    stats = [(path, os.stat(path)) for path in shown if os.path.isfile(path)]
    return [FileInfo(path, stat.st_size, str(stat.st_mtime_ns)) for path, stat in stats]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, of which ``**`` matches any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _walk(folder: str, wanted: Callable[[str], bool], passed_over: Counter[str]) -> list[FileInfo]:
    """Files below a folder whose relative paths are wanted.

    Folders themselves come before links to them, so that one of the ways to a folder always counts.
    """
    found: list[FileInfo] = []
    entered: set[tuple[int, int]] = set()
    folders, links = [folder], list[str]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in entered:
            passed_over[SECOND_LINK] += 1
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            relative = entry.path[len(folder) :].lstrip("/")
            if _hidden(entry.name):
                passed_over[HIDDEN_NAME] += wanted(relative) or entry.is_dir(follow_symlinks=False)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif os.path.isdir(entry.path):
                links.append(entry.path)
            elif wanted(relative):
                if os.path.isfile(entry.path):
                    stat = os.stat(entry.path)
                    found.append(FileInfo(entry.path, stat.st_size, str(stat.st_mtime_ns)))
                else:
                    passed_over[BROKEN_LINK if entry.is_symlink() else "pipe or device"] += 1
    return found


def _list_remote(pattern: str, endings: tuple[str, ...], passed_over: Counter[str]) -> list[FileInfo]:
    fs, inner = open_store(pattern)
    try:
        if glob.has_magic(inner):
            details = fs.glob(inner, detail=True)
        elif fs.isdir(inner):
            found = fs.find(inner, detail=True).items()
            details = {path: info for path, info in found if path.lower().endswith(endings)}
        elif fs.exists(inner):
            details = {inner: fs.info(inner)}
        else:
            details = {}
    except OSError:
        raise
    except Exception as error:  # Every store has its own errors.
        raise OSError(f"{type(error).__name__}: {error}") from error
    shown = {path: info for path, info in details.items() if not _hidden_below(path, inner)}
    passed_over[HIDDEN_NAME] += len(details) - len(shown)
    files = [(path, info) for path, info in shown.items() if info.get("type", "file") == "file"]
    return [FileInfo(fs.unstrip_protocol(path), int(info.get("size") or 0), _stamp_of(info)) for path, info in files]


def _stamp_of(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _STAMPS if info.get(name)), "")
