"""The witness beside a process says why that one ended, if it could not say so itself."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from deepgen_jax.parallel import exit_reporter

GONE = "deepgen: error: process 0 was killed or its machine is gone; start again\n"
FAILED = "deepgen: error: process 0 ended: the disk is full; start again\n"


def words(*, dismissed: bool, sent: bytes, closed: bool) -> str:
    """What a witness says when the watched process ends; ``sent`` and ``closed`` are process 0's doing before that."""
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
        (False, b"ended process 0 ended: the disk is full\n", True, FAILED),
        (False, b"bye\n", True, ""),
        (False, b"", False, ""),
        (True, b"", True, ""),
    ],
    ids=["process 0 killed", "process 0 failed", "process 0 done", "killed by itself", "spoke itself"],
)
def test_words(dismissed, sent, closed, said):
    assert words(dismissed=dismissed, sent=sent, closed=closed) == said
