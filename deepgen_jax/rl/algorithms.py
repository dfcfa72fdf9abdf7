"""Algorithms by name, and what each needs from the stage that runs it.

An algorithm that learns from trajectories is one function, its policy loss of one denoising step; see
`deepgen_jax.rl.objective.clipped_surrogate`. Adding one:

    register("my_algorithm", "my_package.my_module:my_surrogate")

or an entry point of the group ``deepgen_jax.algorithms`` in an installed package; or, without a name,
``policy.algorithm=path/to/file.py:my_surrogate`` on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepgen_jax.registry import Registry

if TYPE_CHECKING:
    import jax

    from deepgen_jax.rl.objective import Step, Surrogate

_HERE = "deepgen_jax.rl"
#: Learns from clean images instead, and so is a whole update.
NFT = "nft"
#: Name -> surrogate loss, except `NFT`.
ALGORITHMS: Registry[Any] = Registry(
    "algorithm",
    "deepgen_jax.algorithms",
    {
        "grpo": f"{_HERE}.objective:clipped_surrogate",  # Liu et al. 2025, arXiv 2505.05470, eq. 5; the paper's eq. 3
        "guard": f"{_HERE}.guard:guarded_surrogate",  # Wang et al. 2025, arXiv 2510.22319
        NFT: f"{_HERE}.nft:nft_step",  # Zheng et al. 2025, arXiv 2509.16117
    },
)
register = ALGORITHMS.register


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


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of a name, ``module:function`` or ``file.py:function``.

    Raises:
      DeepGenError: there is no such algorithm.
    """
    return Algorithm(None, old_policy=True) if name == NFT else Algorithm(ALGORITHMS.load(name, "policy.algorithm"))
