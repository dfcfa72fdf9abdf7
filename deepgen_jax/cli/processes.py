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
        """Joins the others, if there are any; tells whether this process is the one that writes and speaks for all.

        Raises:
          DeepGenError: the options do not fit each other, or the others were not reached.
        """
        if self._alone:
            return True
        import jax

        from deepgen_jax.parallel import hosts

        hosts.join(self.coordinator, self.num_processes, self.process_id)
        return jax.process_index() == 0

    def lifeline(self) -> contextlib.AbstractContextManager[object]:
        """What the work is done in, so that all end where one does; see `deepgen_jax.parallel.peer_watch`."""
        if self._alone:
            return contextlib.nullcontext()
        from deepgen_jax.parallel.peer_watch import Lifeline

        return Lifeline()

    @property
    def mesh(self) -> str | None:
        """Where nothing else is asked for, once joined: `parallel.mesh.usual_mesh` of all devices; None when alone."""
        if self._alone:
            return None
        import jax

        from deepgen_jax.parallel.mesh import usual_mesh_of

        return usual_mesh_of(jax.devices())

    def of_first(self, mine: Sequence[bool]) -> list[bool]:
        """What the process that writes passes, on all; all pass as many."""
        if self._alone:
            return list(mine)
        from deepgen_jax.parallel import hosts

        return hosts.of_first(mine)

    def of_any(self, mine: bool) -> bool:
        """Whether a process passes True, on all."""
        if self._alone:
            return mine
        from deepgen_jax.parallel import hosts

        return hosts.of_any(mine)

    def same(self, value: object) -> bool:
        """Whether all processes pass what has the same `repr`, on all."""
        if self._alone:
            return True
        from deepgen_jax.parallel import hosts

        return hosts.same_on_all(value)

    @property
    def _alone(self) -> bool:
        return self == ProcessOptions()
