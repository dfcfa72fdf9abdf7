"""Algorithms by name, and what each needs from the stage that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from deepgen_jax.rl.guard import guarded_surrogate
from deepgen_jax.rl.objective import Step, Surrogate, clipped_surrogate


@dataclass(frozen=True)
class Algorithm:
    """An algorithm.

    Attributes:
      surrogate: (sampler, clip, step, velocity, advantages) -> policy loss of one step of a trajectory; such algorithms
        run through ``update.grpo_step`` and need a stochastic sampler. None where clean images are enough.
      old_policy: the policy that samples is a moving average of the trained one, held in ``TrainState.ema``.
    """

    surrogate: Callable[[str, float, Step, jax.Array, jax.Array], Surrogate] | None
    old_policy: bool = False

    @property
    def trajectory(self) -> bool:
        """Whether it learns from stored trajectories."""
        return self.surrogate is not None


ALGORITHMS = {
    "grpo": Algorithm(clipped_surrogate),  # Liu et al. 2025, arXiv 2505.05470, eq. 5; the paper's eq. 3
    "guard": Algorithm(guarded_surrogate),  # Wang et al. 2025, arXiv 2510.22319; see guard.py
    "nft": Algorithm(None, old_policy=True),  # Zheng et al. 2025, arXiv 2509.16117; see nft.py, run by nft.nft_step
}
