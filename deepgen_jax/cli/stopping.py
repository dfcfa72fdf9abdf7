"""Ctrl-C and SIGTERM while compiled programs run.

Python runs signal handlers only between its own instructions, so none while a compiled program runs, which may be
minutes. A thread that the system itself wakes (`signal.set_wakeup_fd`) therefore answers at once, and ends the process
where the main thread cannot. Files are written whole or not at all, so that is safe.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# How long the main thread has to come back from a compiled program before the process is ended.
_PATIENCE_SECONDS = 1.0


class Terminated(BaseException):
    """SIGTERM, raised so that temporary files are cleaned up on the way out."""


def raise_for(signum: int) -> NoReturn:
    """KeyboardInterrupt for SIGINT, `Terminated` for SIGTERM."""
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


class Stop:
    """Context manager that decides what Ctrl-C and SIGTERM do inside it.

    ``Stop(graceful=True)``: the first only sets `signum`, so that the current batch can be finished, and says so; the
    second ends the process. ``Stop(graceful=False)``: the first is raised as usual, or ends the process if the main
    thread does not come to that.

    Outside the main thread it does nothing, because signals cannot be caught there. ``unit`` names what
    is being finished, in the message.
    """

    def __init__(self, graceful: bool, unit: str = "batch") -> None:
        self.graceful = graceful
        self._unit = unit
        self.signum: int | None = None
        self._active = False
        self._noticed = threading.Event()

    @property
    def name(self) -> str:
        """The signal that was received, "Ctrl-C" or "SIGTERM"; empty while there was none."""
        return "" if self.signum is None else _NAMES[signal.Signals(self.signum)]

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._active = True
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._usual: dict[int, Any] = {number: signal.signal(number, self._handle) for number in _NAMES}
            self._usual_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._active:
            signal.set_wakeup_fd(self._usual_descriptor)
            for number, handler in self._usual.items():
                signal.signal(number, handler)
            # The watching thread reads the end of the stream and returns.
            self._noticed.set()
            self._writer.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._noticed.set()
        if not self.graceful:
            raise_for(signum)
        if self.signum is None:
            self.signum = signum

    def _watch(self, reader: socket.socket) -> None:
        seen = 0
        with reader:
            while data := reader.recv(1):
                if data[0] not in _NAMES:
                    continue
                seen += 1
                name = _NAMES[signal.Signals(data[0])]
                if self.graceful and seen == 1:
                    print(
                        f"\ndeepgen: {name}: finishing the current {self._unit}; once more stops at once",
                        file=sys.stderr,
                    )
                elif self.graceful or not self._noticed.wait(_PATIENCE_SECONDS):
                    print(f"\ndeepgen: stopped by {name}", file=sys.stderr, flush=True)
                    os._exit(128 + data[0])
