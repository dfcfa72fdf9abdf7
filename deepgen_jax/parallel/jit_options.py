"""``jax.jit`` with the compiler options of the device in use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from deepgen_jax.parallel.chips import find_chip

# XLA of jax 0.10 hands sums of products of two arrays to YNNPACK, where they take 10 to 30 times as long as in a loop:
# gradients of norms, modulation and gates. With the option only matrix products go there.
_CPU_GRADIENTS: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def compiler_options(device_kind: str, latency_hiding: bool, gradients: bool = False) -> dict[str, Any] | None:
    """Compiler options of large programs on a kind of device; None for the defaults.

    Args:
      device_kind: as ``jax.Device.device_kind``.
      latency_hiding, gradients: as for :class:`device_jit`.
    """
    if device_kind == "cpu":
        return dict(_CPU_GRADIENTS) if gradients and jax.__version_info__ < (0, 11) else None
    chip = find_chip(device_kind)
    return chip.compiler_options(latency_hiding) or None if chip else None


class device_jit:
    """``jax.jit`` with the options of the default device, looked up at the first call rather than at import.

    ``deepgen compile`` passes the same options to the compiler of a device that is absent.

    ``latency_hiding`` starts collectives as early as their operands and a latency model allow. By the estimates of
    ``deepgen compile``, steps of stage 2 are 2% to 10% faster with it; steps of stage 1 are 2% slower, and sampling and
    updates of reinforcement learning, whose collectives overlap better without, 2% to 8% slower.

    ``gradients`` marks programs that differentiate the network: on CPUs they get options of their own.
    """

    def __init__(
        self, function: Callable[..., Any], *, latency_hiding: bool = False, gradients: bool = False, **settings: Any
    ) -> None:
        self._function, self._settings = function, settings
        self._latency_hiding, self._gradients = latency_hiding, gradients
        functools.update_wrapper(self, function)

    @functools.cached_property
    def _jitted(self) -> Any:
        options = compiler_options(jax.devices()[0].device_kind, self._latency_hiding, self._gradients)
        return jax.jit(self._function, compiler_options=options, **self._settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        return self._jitted(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """The traced program for arguments or their shapes."""
        return self._jitted.trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The lowered program for arguments or their shapes."""
        return self._jitted.lower(*args, **kwargs)
