"""Utilities for benchmarks: repeated timing, memory, measured matmul peak, and the environment."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepgen_jax.models.layers import precision_of

#: Side of the square matrices of the peak measurement: large enough to fill the device.
_PEAK_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
_PEAK_PRODUCTS = 8


class Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def progress(message: str) -> None:
    """Prints a line to stderr; stdout contains only the result."""
    print(message, file=sys.stderr, flush=True)


#: Clocks that calls are timed with; CPU seconds are of all threads, for machines that do other work as well.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_of(function: Callable[[], Any], clock: str = "wall") -> float:
    """Seconds of one call; blocks on JAX results, other functions must be synchronous."""
    now = CLOCKS[clock]
    start = now()
    jax.block_until_ready(function())
    return now() - start


def alternate(
    functions: dict[str, Callable[[], Any]], repetitions: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each function over ``repetitions`` interleaved calls, so that slow phases affect all equally."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions):
        for name, function in functions.items():
            times[name].append(seconds_of(function, clock))
            progress(f"{name} {repetition + 1}/{repetitions}: {times[name][-1]:.3f} s")
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and all repetitions, in seconds."""
    return {
        "median": round(statistics.median(times), 6),
        "minimum": round(min(times), 6),
        "repetitions": [round(t, 6) for t in times],
    }


def ratios(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Speed-up over ``slower``: ratio of medians, ratio of minima, and lowest ratio over the repetitions."""
    return {
        "median": round(statistics.median(slower) / statistics.median(faster), 4),
        "minimum": round(min(slower) / min(faster), 4),
        "lowest_repetition": round(min(a / b for a, b in zip(slower, faster, strict=True)), 4),
    }


def matmul_peak(dtype: DTypeLike, devices: int, clock: str = "wall") -> dict[str, Any]:
    """Operations per second of square matmuls on one device, at the layers' precision; best of five.

    Args:
      dtype: dtype of the operands.
      devices: number of devices by which the peak is multiplied.
      clock: as for :func:`alternate`.
    """
    size = _PEAK_SIZE[jax.devices()[0].platform]
    x = jnp.full((size, size), 1 / size, dtype)

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        def one(_: int, y: jax.Array) -> jax.Array:
            return jnp.matmul(y, x, precision=precision_of(dtype))

        return jax.lax.fori_loop(0, _PEAK_PRODUCTS, one, x)

    products(x).block_until_ready()
    best = min(seconds_of(lambda: products(x), clock) for _ in range(5))
    rate = 2 * size**3 * _PEAK_PRODUCTS / best
    return {"size": size, "dtype": jnp.dtype(dtype).name, "operations_a_second": rate * devices, "devices": devices}


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process, and peak memory of its fullest device if the platform reports it."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_bytes": host, "device_bytes": max(peaks, default=None)}


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Date, versions and device."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind if device.platform != "cpu" else _cpu_name(),
            "count": len(jax.devices()),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
