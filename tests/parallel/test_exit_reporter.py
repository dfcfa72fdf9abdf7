"""The watchdog of a process reports why that one was aborted, if it could not report so itself."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from deepgen_jax.parallel import exit_reporter

GONE = "deepgen: error: process 0 was killed or its machine is gone; start again\n"
FAILED = "deepgen: error: process 0 ended: the disk is full; start again\n"


def printed(*, dismissed: bool, sent: bytes, closed: bool) -> str:
    """What a watchdog prints when the watched process ends, after process 0 has sent `sent` and perhaps `closed`."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-I", "-S", exit_reporter.__file__, str(theirs.fileno()), "start again"]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        theirs.close()
        ours.sendall(sent)
        if closed:
            ours.close()
        _, said = process.communicate("." if dismissed else "", timeout=30)
        assert process.returncode == 0
        return said


@pytest.mark.parametrize(
    ("dismissed", "sent", "closed", "said"),
    [
        (False, b"", True, GONE),
        (False, b"failed process 0 ended: the disk is full\n", True, FAILED),
        (False, b"done\n", True, ""),
        (False, b"", False, ""),
        (True, b"", True, ""),
    ],
    ids=["process 0 killed", "process 0 failed", "process 0 done", "killed by itself", "reported itself"],
)
def test_reason(dismissed, sent, closed, said):
    assert printed(dismissed=dismissed, sent=sent, closed=closed) == said
