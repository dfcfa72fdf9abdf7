"""Stand-ins for the devices of a topology."""

from __future__ import annotations

import itertools
from types import SimpleNamespace


def chips(topology):
    """Devices as libtpu describes them."""
    return [SimpleNamespace(coords=coords) for coords in itertools.product(*map(range, topology.shape))]
