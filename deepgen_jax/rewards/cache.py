"""Cache of services' answers, in memory and optionally in a file, so that each request is sent once."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from deepgen_jax.errors import DeepGenError
from deepgen_jax.local_paths import refuse_url
from deepgen_jax.user_warnings import warn_user


def request_key(payload: Mapping[str, Any]) -> str:
    """SHA-256 of a request with the model's name, but without the address, which may change between runs."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """The most recently used answers, by the key of their request; safe to use from several threads.

    The file holds one JSON object a line, {"key", "answer"}, and only ever grows. A last line that was cut off, as by a
    kill, is dropped.
    """

    def __init__(self, path: str = "", entries: int = 2**18) -> None:
        """Reads the file, if there is one.

        Args:
          path: the file; "" keeps nothing on disk.
          entries: answers kept in memory, the newest of the file to begin with.

        Raises:
          DeepGenError: the file cannot be read or written.
        """
        self._entries = entries
        self._answers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        refuse_url(path, "the path of cached answers")
        self._file: TextIO | None = self._open(Path(path)) if path else None

    def get(self, key: str) -> Any:
        """The answer, or None."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def put(self, key: str, answer: Any) -> None:
        """Keeps an answer, JSON-ready and not None."""
        with self._lock:
            self._keep(key, answer)
            if self._file is not None:
                # One write and one flush: another process that appends to the file never cuts a line in two.
                self._file.write(json.dumps({"key": key, "answer": answer}) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Closes the file; later answers are kept only in memory."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _keep(self, key: str, answer: Any) -> None:
        self._answers[key] = answer
        self._answers.move_to_end(key)
        if len(self._answers) > self._entries:
            self._answers.popitem(last=False)

    def _open(self, path: Path) -> TextIO:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise DeepGenError(f"the cache {path} cannot be opened: {error.strerror}; choose another file") from error
        file.seek(0)
        bad, line = 0, "\n"
        for line in file:
            try:
                entry = json.loads(line)
                self._keep(entry["key"], entry["answer"])
            except (ValueError, KeyError, TypeError):
                bad += 1
        if not line.endswith("\n"):
            file.write("\n")
        if bad:
            warn_user(f"{path}: {bad} unreadable lines were left out; their requests are sent again")
        return file
