"""Ctrl-C and SIGTERM in a long run: the first lets the batch in hand finish, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class GracefulStop:
    """Context manager; `signum` is the signal that asked for the end, None until one has.

    Python runs signal handlers only between its own instructions, so none while a compiled program runs, which may be
    minutes. A thread that is told by the system itself (`signal.set_wakeup_fd`) therefore answers the person at once
    and ends the process on the second signal. Files are written whole or not at all, so that is safe.

    Outside the main thread it does nothing, because signals cannot be caught there.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._active = False

    @property
    def name(self) -> str:
        """What the person or the system did."""
        return _NAMES.get(signal.Signals(self.signum), "a signal") if self.signum is not None else ""

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._active = True
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._usual: dict[int, Any] = {number: signal.signal(number, self._handle) for number in _NAMES}
            self._usual_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._active:
            signal.set_wakeup_fd(self._usual_descriptor)
            for number, handler in self._usual.items():
                signal.signal(number, handler)
            # The watching thread reads the end of the stream and returns.
            self._writer.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum

    @staticmethod
    def _watch(reader: socket.socket) -> None:
        seen = 0
        with reader:
            while data := reader.recv(1):
                if data[0] not in _NAMES:
                    continue
                seen += 1
                if seen == 2:
                    os._exit(128 + data[0])
                text = "finishing the batch in hand; once more to stop at once"
                print(f"\ndeepgen: {_NAMES[signal.Signals(data[0])]}: {text}", file=sys.stderr, flush=True)
