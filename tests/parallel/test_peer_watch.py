"""Private names of JAX that failure detection between processes depends on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

PROGRAM = """
import sys, jax
from deepgen_jax.parallel.peer_watch import coordinator_host
jax.distributed.initialize(sys.argv[1], 1, 0)
print(coordinator_host())
"""


def test_jax_still_tells_the_coordinators_address():
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, address],
        check=True, timeout=120, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout.split()[-1] == "localhost"
