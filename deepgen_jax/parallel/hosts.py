"""Multi-host programs: joining processes, and agreement between them."""

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
    """Initialises JAX for several processes, each with its own devices.

    Args:
      coordinator: address:port of process 0; "auto" detects the cluster (SLURM, Kubernetes, TPU VMs); "" for a single
        process.
      num_processes, process_id: number of processes and index of this one, with an address.

    Raises:
      DeepGenError: the arguments do not fit each other, or the others cannot be reached.
    """
    if not coordinator:
        if num_processes or process_id >= 0:
            raise DeepGenError("--num-processes and --process-id need --coordinator ADDRESS:PORT")
        return
    # Collectives of programs in flight at once could be matched with each other.
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
        # Make connections now, while all processes are at the same point: they have half a minute.
        multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DeepGenError(f"process {process_id} could not join {coordinator}: {reason}") from error


def broadcast(mine: Sequence[bool]) -> list[bool]:
    """The values of process 0, on all processes; all pass equally many."""
    values = multihost_utils.broadcast_one_to_all(np.asarray(mine, np.int32))
    return [bool(value) for value in np.asarray(values)]


def any_process(mine: bool) -> bool:
    """Whether any process passes True, on all processes; a collective."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(mine, np.int32))))


def same_on_all(value: object) -> bool:
    """Whether all processes pass a value with the same `repr`, on all processes; a collective."""
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint32)
    return not any_process(bool(np.any(np.asarray(multihost_utils.broadcast_one_to_all(digest)) != digest)))


class Agreement:
    """Lets all hosts learn at the same step that one of them was asked to stop.

    Each call returns the result of the previous one, so that no host waits for a device.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(AXES))
        self._local = len([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def any(self, mine: bool) -> bool:
        """Whether any host passed True: in this call if there is one host, else in the previous one."""
        if self._alone:
            return mine
        values = np.full(self._local, mine, np.int32)
        last, array = self._last, jax.make_array_from_process_local_data(self._sharding, values)
        self._last = self._any(array)
        return last is not None and bool(np.asarray(last.addressable_data(0)))
