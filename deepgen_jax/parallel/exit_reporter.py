"""A small process beside one of several: says why that one ended where it could not say so itself.

When process 0 is gone, JAX's runtime aborts the others from a thread of its own, often before anything in Python has
run. This process holds the same connection to process 0 (see `deepgen_jax.parallel.peer_watch`) and finds there what
had happened. It runs as a file by itself, with nothing but the standard library, so that it is there in milliseconds.

    python witness.py CONNECTION "what to do then" < PIPE

CONNECTION is a file descriptor; only the watched process holds the other end of the pipe.
"""

import select
import socket
import sys

#: Seconds that the news of process 0 may take after the watched process ended.
PATIENCE = 3.0


def receive(connection: socket.socket) -> str:
    """One line; "" where the connection was closed."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            if not (piece := connection.recv(4096)):
                return ""
            text += piece
    except OSError:
        return ""
    return text.decode(errors="replace").strip()


def reason(word: str, process: int) -> str:
    """Why everything ends after this word of a process, "" of one that said none."""
    return word.removeprefix("ended ") or f"process {process} was killed or its machine is gone"


def message(reason: str, mend: str) -> str:
    """The line that tells it."""
    return f"deepgen: error: {reason}; {mend}"


def main(connection: socket.socket, mend: str) -> None:
    """Waits until the watched process ends; speaks only if it did so without a word and process 0 is gone or failed."""
    if sys.stdin.buffer.read(1):
        return
    if not select.select([connection], [], [], PATIENCE)[0]:
        return  # process 0 is alive: the watched process alone was killed, and the lifeline of process 0 says so
    if (word := receive(connection)) != "bye":
        print(message(reason(word, 0), mend), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
