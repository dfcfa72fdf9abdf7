"""Benchmarks by name. A new one is one small file, and a line here or an entry point of its package."""

from __future__ import annotations

from deepgen_jax.evaluation.benchmark import Benchmark
from deepgen_jax.registry import Registry

_PACKAGE = "deepgen_jax.evaluation.benchmarks"

#: Benchmarks by name. Packages add theirs in the entry point group ``deepgen_jax.benchmarks``, programs with
#: ``BENCHMARKS.register(name, class)``.
BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark",
    "deepgen_jax.benchmarks",
    {
        "geneval": f"{_PACKAGE}.geneval:GenEval",
        "dpg": f"{_PACKAGE}.dpg:DPGBench",
        "unigenbench": f"{_PACKAGE}.unigenbench:UniGenBench",
        "wise": f"{_PACKAGE}.wise:WISE",
        "wise_verified": f"{_PACKAGE}.wise:WISEVerified",
        "corebench": f"{_PACKAGE}.corebench:CoReBench",
        "cvtg": f"{_PACKAGE}.cvtg:CVTG2K",
        "imgedit": f"{_PACKAGE}.imgedit:ImgEdit",
        "gedit": f"{_PACKAGE}.gedit:GEdit",
        "rise": f"{_PACKAGE}.rise:RISE",
        "uniredit": f"{_PACKAGE}.uniredit:UniREditBench",
    },
    "deepgen_jax.evaluation.benchmark:Benchmark",
)


def open_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      DeepGenError: there is none.
    """
    return BENCHMARKS.load(name)()
