"""Several processes that end together: when one is lost or fails, the others say so and stop, and none waits for it.

A process that waits in a collective for one that is gone would wait for the runtime's own time-out, minutes later, and
end without a reason. So every process holds a connection to process 0 that carries two words: "bye" of one that is
done, and "ended" with the reason of one that is not. A connection that closes without a word was a process that was
killed; keep-alive probes find a machine that is gone. Where JAX aborts a process because process 0 is gone, a witness
says why (`deepgen_jax.parallel.exit_reporter`).
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
# Seconds that an error of the runtime waits for its reason: a lost peer is often noticed by a collective first.
_PATIENCE = 5.0
_MEETING = 60.0
# Seconds that process 0 leaves the others to end by themselves: JAX's service goes down with it, and they with that.
_GRACE = 1.0
_MEND = "start all processes again: the run goes on from its newest checkpoint"


class Lifeline:
    """Context manager around the work of one of several processes; does nothing for a process on its own.

    Leaving it with an error tells the others the reason, and ends the interpreter later without waiting for them.
    """

    def __init__(self) -> None:
        self._connections: dict[int, socket.socket] = {}
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._explained = threading.Event()
        self._witness: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lifeline:
        if jax.process_count() > 1:
            self._meet()
            if jax.process_index():
                self._witness = _start_witness(self._connections[0])
            self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            self._done.set()
            self._send("bye")
            self._dismiss_witness()
            return
        if isinstance(error, Exception) and not isinstance(error, DeepGenError):
            # Does not return where a peer was lost: the other thread says so and ends the process.
            self._explained.wait(_PATIENCE)
        self._done.set()
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        self._send(f"ended process {jax.process_index()} ended: {reason}")
        self._dismiss_witness()
        # JAX would wait for the others at exit. What is registered last comes first.
        atexit.register(_end)

    def _meet(self) -> None:
        """Connects every process with process 0."""
        from jax._src import distributed
        from jax.experimental import multihost_utils

        host = str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")
        listener = socket.create_server(("", 0)) if jax.process_index() == 0 else None
        # Nobody else's connection is taken for a process's.
        mine = [listener.getsockname()[1] if listener else 0, secrets.randbits(31)]
        port, token = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array(mine, np.int32)))
        try:
            if listener is None:
                connection = socket.create_connection((host, port), timeout=_MEETING)
                connection.sendall(f"{token} {jax.process_index()}\n".encode())
                self._connections[0] = connection
            else:
                with listener:
                    listener.settimeout(_MEETING)
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
        connection.settimeout(_MEETING)
        words = connection.makefile("r", encoding="utf-8").readline().split()
        if len(words) == 2 and words[0] == str(token):
            self._connections[int(words[1])] = connection
        else:
            connection.close()

    def _watch(self) -> None:
        """Listens to all connections until all said that they are done, or one is lost."""
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    word = exit_reporter.receive(self._connections[key.data])
                    if word == "bye":
                        selector.unregister(key.fileobj)
                        continue
                    self._end(exit_reporter.reason(word, key.data))
                    return

    def _end(self, reason: str) -> None:
        """Passes the reason on and ends this process, unless it is ending by itself."""
        if self._done.is_set():
            return
        self._explained.set()
        self._send(f"ended {reason}")
        print(exit_reporter.message(reason, _MEND), file=sys.stderr, flush=True)
        self._dismiss_witness()
        if jax.process_index() == 0:
            time.sleep(_GRACE)
        _end()

    def _dismiss_witness(self) -> None:
        """From here on this process has said itself why it ends."""
        if self._witness is not None:
            try:
                self._witness.communicate(b".", timeout=1)
            except (OSError, subprocess.TimeoutExpired):  # somebody stopped it
                return

    def _send(self, word: str) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(f"{word}\n".encode())
            except OSError:  # it is gone, too
                continue


def _start_witness(connection: socket.socket) -> subprocess.Popen[bytes]:
    """A witness on a connection to process 0; it waits for a byte or the end of its input."""
    # Isolated and without site packages: nothing to import, nothing to find in the way.
    command = [sys.executable, "-I", "-S", str(Path(exit_reporter.__file__)), str(connection.fileno()), _MEND]
    # A session of its own: a Ctrl-C in a terminal is not meant for it.
    return subprocess.Popen(
        command, pass_fds=[connection.fileno()], stdin=subprocess.PIPE, start_new_session=True
    )


def _probe(connection: socket.socket) -> None:
    """Has the system look every few seconds whether the other machine is there: lost after half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # macOS has no TCP_KEEPIDLE
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)
