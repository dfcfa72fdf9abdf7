"""Failure detection between processes: when one fails or is lost, the others report it and stop within seconds.

A process in a collective with one that is gone would hang until the runtime's time-out, minutes later, and end without
a reason. So every process keeps a TCP connection to process 0, over which it sends "done" or "failed REASON". A
connection that closes without a message means that the process was killed; keep-alive probes detect a machine that is
gone. If JAX aborts a process because process 0 is gone, a watchdog process reports the reason
(`deepgen_jax.parallel.exit_reporter`).
"""

from __future__ import annotations

import atexit
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import jax
import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel import exit_reporter

#: Exit status of a process whose peer was lost, as of all errors.
STATUS = 2
# Seconds for which a runtime error waits for its reason: a collective often notices a lost peer first.
_REASON_TIMEOUT = 5.0
_CONNECT_TIMEOUT = 60.0
# Seconds between the message of process 0 and its exit, which takes down JAX's coordination service and with it the
# other processes.
_GRACE_PERIOD = 1.0
_ADVICE = "start all processes again: the run resumes from its newest checkpoint"


class PeerWatch:
    """Context manager around the work of one of several processes; does nothing for a single process.

    Leaving it with an error sends the reason to the others, and the interpreter then exits without waiting for them.
    """

    def __init__(self) -> None:
        self._connections: dict[int, socket.socket] = {}
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._reported = threading.Event()
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PeerWatch:
        if jax.process_count() > 1:
            self._connect()
            if jax.process_index():
                self._watchdog = _start_watchdog(self._connections[0])
            self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            self._done.set()
            self._send(exit_reporter.DONE)
            self._dismiss_watchdog()
            return
        if isinstance(error, Exception) and not isinstance(error, DeepGenError):
            # If a peer was lost this does not return: the watching thread reports it and ends the process.
            self._reported.wait(_REASON_TIMEOUT)
        self._done.set()
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        self._send(f"{exit_reporter.FAILED} process {jax.process_index()} ended: {reason}")
        self._dismiss_watchdog()
        # JAX would wait for the others at exit. Handlers run in reverse order of registration.
        atexit.register(_exit)

    def _connect(self) -> None:
        """Connects every process with process 0.

        Raises:
          DeepGenError: process 0 cannot be reached.
        """
        from jax.experimental import multihost_utils

        host = coordinator_host()
        listener = socket.create_server(("", 0)) if jax.process_index() == 0 else None
        # The token keeps foreign connections out.
        mine = [listener.getsockname()[1] if listener else 0, secrets.randbits(31)]
        port, token = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array(mine, np.int32)))
        try:
            if listener is None:
                connection = socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT)
                connection.sendall(f"{token} {jax.process_index()}\n".encode())
                self._connections[0] = connection
            else:
                with listener:
                    listener.settimeout(_CONNECT_TIMEOUT)
                    while len(self._connections) < jax.process_count() - 1:
                        self._accept(listener, token)
        except OSError as error:
            raise DeepGenError(
                f"process {jax.process_index()} could not meet the others at {host}:{port} ({error}); processes must "
                "reach process 0 on any port"
            ) from error
        for connection in self._connections.values():
            connection.settimeout(None)
            _probe(connection)

    def _accept(self, listener: socket.socket, token: int) -> None:
        connection, _ = listener.accept()
        connection.settimeout(_CONNECT_TIMEOUT)
        words = connection.makefile("r", encoding="utf-8").readline().split()
        if len(words) == 2 and words[0] == str(token):
            self._connections[int(words[1])] = connection
        else:
            connection.close()

    def _watch(self) -> None:
        """Reads all connections until every process is done, or one has failed or is lost."""
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    message = exit_reporter.receive(self._connections[key.data])
                    if message == exit_reporter.DONE:
                        selector.unregister(key.fileobj)
                        continue
                    self._fail(exit_reporter.failure_reason(message, key.data))
                    return

    def _fail(self, reason: str) -> None:
        """Forwards the reason and ends this process, unless it is already ending."""
        if self._done.is_set():
            return
        self._reported.set()
        self._send(f"{exit_reporter.FAILED} {reason}")
        print(exit_reporter.error_line(reason, _ADVICE), file=sys.stderr, flush=True)
        self._dismiss_watchdog()
        if jax.process_index() == 0:
            time.sleep(_GRACE_PERIOD)
        _exit()

    def _dismiss_watchdog(self) -> None:
        """Stops the watchdog: from here on this process reports its own end."""
        if self._watchdog is not None:
            try:
                self._watchdog.communicate(b".", timeout=1)
            except (OSError, subprocess.TimeoutExpired):  # It was killed.
                return

    def _send(self, message: str) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(f"{message}\n".encode())
            except OSError:  # The peer is gone, too.
                continue


def coordinator_host() -> str:
    """Host name or address of process 0, after ``jax.distributed.initialize``.

    JAX has no public name for it, and with automatic cluster detection nothing else knows it;
    ``tests/parallel/test_peer_watch.py`` fails where a release of JAX moves it.
    """
    from jax._src import distributed

    return str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")


def _start_watchdog(connection: socket.socket) -> subprocess.Popen[bytes]:
    """A watchdog on a connection to process 0; it waits for a byte or the end of its input."""
    # Isolated and without site packages, so that it starts fast and imports nothing.
    command = [sys.executable, "-I", "-S", str(Path(exit_reporter.__file__)), str(connection.fileno()), _ADVICE]
    # In its own session, so that Ctrl-C in a terminal does not reach it.
    return subprocess.Popen(
        command, pass_fds=[connection.fileno()], stdin=subprocess.PIPE, start_new_session=True
    )


def _probe(connection: socket.socket) -> None:
    """Enables TCP keep-alive: a machine that is gone is detected within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # macOS has no TCP_KEEPIDLE
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)
