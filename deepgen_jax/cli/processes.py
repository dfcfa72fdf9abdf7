"""Options of commands that several processes can run together, each on its own devices."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessOptions:
    """Several processes as one program, such as one for each host of a TPU pod."""

    coordinator: str = ""
    """Address:port of process 0 where several processes work together; "auto" asks SLURM, Kubernetes or the TPU VM."""
    num_processes: int = 0
    """How many processes, with an address."""
    process_id: int = -1
    """Which of them this is, with an address."""

    def join(self) -> bool:
        """Joins the others, if there are any; returns whether this is process 0, which writes and prints for all.

        Raises:
          DeepGenError: the options do not fit each other, or the others were not reached.
        """
        if self._alone:
            return True
        import jax

        from deepgen_jax.parallel import hosts

        hosts.join(self.coordinator, self.num_processes, self.process_id)
        return jax.process_index() == 0

    def peer_watch(self) -> contextlib.AbstractContextManager[object]:
        """Context in which all processes stop when one fails; see `deepgen_jax.parallel.peer_watch`."""
        if self._alone:
            return contextlib.nullcontext()
        from deepgen_jax.parallel.peer_watch import PeerWatch

        return PeerWatch()

    @property
    def mesh(self) -> str | None:
        """Where nothing else is asked for, once joined: `parallel.mesh.usual_mesh` of all devices; None when alone."""
        if self._alone:
            return None
        import jax

        from deepgen_jax.parallel.mesh import usual_mesh_of

        return usual_mesh_of(jax.devices())

    def broadcast(self, mine: Sequence[bool]) -> list[bool]:
        """The values of process 0, which writes, on all processes; all pass equally many."""
        if self._alone:
            return list(mine)
        from deepgen_jax.parallel import hosts

        return hosts.broadcast(mine)

    def any(self, mine: bool) -> bool:
        """Whether any process passes True, on all processes."""
        if self._alone:
            return mine
        from deepgen_jax.parallel import hosts

        return hosts.any_process(mine)

    def same(self, value: object) -> bool:
        """Whether all processes pass what has the same `repr`, on all."""
        if self._alone:
            return True
        from deepgen_jax.parallel import hosts

        return hosts.same_on_all(value)

    @property
    def _alone(self) -> bool:
        return self == ProcessOptions()
