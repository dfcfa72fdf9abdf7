"""Performance model: time, memory traffic and collectives of a compiled program, from the text of its HLO.

:func:`estimate` is the interface; `hlo` parses, `loops` finds trip counts, `costs` prices instructions and `roofline`
adds them up in the compiler's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepgen_jax.aot.estimate import hlo, roofline
from deepgen_jax.aot.estimate.roofline import ASSUMPTIONS, Estimate, Traffic
from deepgen_jax.aot.topology import Topology, compiler_versions
from deepgen_jax.errors import DeepGenError

__all__ = ["ASSUMPTIONS", "Estimate", "Traffic", "estimate"]


def estimate(text: str, topology: Topology, devices: Sequence[Any]) -> Estimate:
    """Time and traffic of one run of a program on one device.

    Args:
      text: ``compiled.as_text()``, or XLA's dump of the optimised module.
      topology: that it was compiled for.
      devices: of the mesh, in its order.

    Raises:
      DeepGenError: the text cannot be parsed, or the trip count of a loop cannot be determined from it.
    """
    try:
        module = hlo.parse(text)
        unknown = module.unknown_loops()
        if not unknown:
            return roofline.estimate(module, topology, devices)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        # Whatever a parser meets in a form of text that it does not know.
        raise DeepGenError(
            f"the optimised program cannot be parsed ({type(error).__name__}: {error}); it was compiled with "
            f"{compiler_versions(topology)}, whose text of HLO is not supported: install versions listed in setup.py"
        ) from error
    raise DeepGenError(
        f"the trip counts of {unknown} loops cannot be determined, so the program cannot be estimated; it was compiled "
        f"with {compiler_versions(topology)}: install versions listed in setup.py"
    )
