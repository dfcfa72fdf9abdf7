"""Several hosts as one program: joining them, and agreeing without waiting."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepgen_jax.errors import DeepGenError
from deepgen_jax.parallel.mesh import AXES


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Makes this process one of several, each with its own devices.

    Args:
      coordinator: address:port of process 0; "auto" asks the cluster (SLURM, Kubernetes, TPU VMs) for everything; ""
        for a process on its own.
      num_processes, process_id: how many and which, with an address.

    Raises:
      DeepGenError: the arguments do not fit each other, or the others were not reached.
    """
    if not coordinator:
        if num_processes or process_id >= 0:
            raise DeepGenError("--num-processes and --process-id need --coordinator ADDRESS:PORT")
        return
    # Programs in flight at once would meet each other's collectives.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        elif num_processes < 1 or not 0 <= process_id < num_processes:
            raise DeepGenError(
                f"--coordinator {coordinator} needs --num-processes N and --process-id from 0 to N - 1 "
                f"(given: {num_processes} and {process_id})"
            )
        else:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        # Connections are made now, while all are at the same point: they have half a minute to meet.
        multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DeepGenError(f"process {process_id} could not join {coordinator}: {reason}") from error


def of_first(mine: Sequence[bool]) -> list[bool]:
    """What process 0 passes, on all processes; every one passes as many."""
    told = multihost_utils.broadcast_one_to_all(np.asarray(mine, np.int32))
    return [bool(value) for value in np.asarray(told)]


def of_any(mine: bool) -> bool:
    """Whether one of the processes passes True, on all of them; each waits for the others."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(mine, np.int32))))


def same_on_all(value: object) -> bool:
    """Whether all processes pass what has the same `repr`, on all of them."""
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint32)
    return not of_any(bool(np.any(np.asarray(multihost_utils.broadcast_one_to_all(digest)) != digest)))


class Agreement:
    """Lets all hosts learn that one of them was asked to stop, at the same step.

    The answer of one call is what was said at the call before, so that no host waits for a device.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(AXES))
        self._local = len([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def any(self, mine: bool) -> bool:
        """Says ``mine`` and tells whether a host said True: now if there is one host, else at the call before."""
        if self._alone:
            return mine
        said = np.full(self._local, mine, np.int32)
        last, array = self._last, jax.make_array_from_process_local_data(self._sharding, said)
        self._last = self._any(array)
        return last is not None and bool(np.asarray(last.addressable_data(0)))
