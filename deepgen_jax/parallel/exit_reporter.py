"""A watchdog process that reports why another process was aborted before it could report so itself.

When process 0 is gone, a thread of JAX's runtime aborts the others, often before any Python code runs.
The watchdog shares the connection to process 0 (see `deepgen_jax.parallel.peer_watch`) and reads the reason from it. It
is run as a script that imports only the standard library, so that it starts in milliseconds.

    python exit_reporter.py CONNECTION "what to do next" < PIPE

CONNECTION is a file descriptor; only the watched process holds the other end of the pipe.
"""

import select
import socket
import sys

#: Seconds to wait for the message of process 0 after the watched process has ended.
TIMEOUT = 3.0
#: Messages: a process is done, or failed, with the reason after a space.
DONE, FAILED = "done", "failed"


def receive(connection: socket.socket) -> str:
    """One message, a line; "" if the connection was closed."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            if not (piece := connection.recv(4096)):
                return ""
            text += piece
    except OSError:
        return ""
    return text.decode(errors="replace").strip()


def failure_reason(message: str, process: int) -> str:
    """The reason in the last message of a process, "" if it closed the connection without one."""
    return message.removeprefix(f"{FAILED} ") or f"process {process} was killed or its machine is gone"


def error_line(reason: str, advice: str) -> str:
    """The line on stderr."""
    return f"deepgen: error: {reason}; {advice}"


def main(connection: socket.socket, advice: str) -> None:
    """Waits for the watched process to end; prints only if it was aborted because process 0 failed or is gone."""
    if sys.stdin.buffer.read(1):
        return
    if not select.select([connection], [], [], TIMEOUT)[0]:
        return  # Process 0 is alive: only the watched process was killed, which process 0 reports.
    if (message := receive(connection)) != DONE:
        print(error_line(failure_reason(message, 0), advice), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
