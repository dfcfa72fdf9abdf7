"""A small process beside one of several: says why that one ended where it could not say so itself.

When process 0 is gone, JAX's runtime aborts the others from a thread of its own, often before anything in Python has
run. This process holds the same connection to process 0 (see `deepgen_jax.parallel.lifeline`), and finds there what had
happened. It runs as a file by itself, with nothing but the standard library, so that it is there in milliseconds.

    python witness.py CONNECTION "what to do then" < PIPE

CONNECTION is a file descriptor; only the watched process holds the other end of the pipe.
"""

import select
import socket
import sys

#: Seconds that the news of process 0 may take after the watched process ended.
PATIENCE = 3.0


def main(connection: socket.socket, mend: str) -> None:
    """Waits until the watched process ends; speaks only if it did so without a word and process 0 is gone or failed."""
    if sys.stdin.buffer.read(1):
        return
    connection.setblocking(False)
    text = b""
    while select.select([connection], [], [], PATIENCE)[0]:
        try:
            piece = connection.recv(4096)
        except OSError:
            piece = b""
        text += piece
        if not piece or text.endswith(b"\n"):
            break
    else:
        return  # process 0 is alive: the watched process alone was killed, and the lifeline of process 0 says so
    word = text.decode(errors="replace").strip()
    if word != "bye":
        reason = word.removeprefix("ended ") or "process 0 was killed or its machine is gone"
        print(f"deepgen: error: {reason}; {mend}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
