"""The inference benchmark: refuses bad arguments with one line, and agrees with its PyTorch peer."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("--preset", "tiny", "--dtype", "float32")


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(*arguments)` runs the script in this process; ``benchmark.module(name)`` imports another script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["inference.py", *arguments])
        importlib.import_module("inference").main()

    run.module = importlib.import_module
    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--dtype", "float32"), "--preset"),
        (("--preset", "tiny"), "--dtype"),
        ((*TINY, "--steps", "0"), "'0'"),
        ((*TINY, "--size", "70"), "multiples of 32"),
        ((*TINY, "--size", "64x64x3"), "width x height"),
        ((*TINY, "--peer", "numpy"), "numpy"),
        ((*TINY, "--mesh", "data=1000"), "1000"),
        (("--model", "no-such-folder", "--dtype", "float32"), "no-such-folder"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, named, benchmark, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark(*arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert named in err
    assert err.count("\n") == 1


def test_full_preset_has_the_released_sizes_and_mid_about_100_million(benchmark):
    from deepgen_jax.config import DeepGenConfig
    from deepgen_jax.models.deepgen import abstract_params

    presets = benchmark.module("presets").PRESETS
    assert presets["full"] == DeepGenConfig()
    weights = flatten_dict(abstract_params(presets["mid"])["mmdit"], sep="/")
    learned = [leaf.size for path, leaf in weights.items() if path != "pos_embed"]
    assert sum(learned) == pytest.approx(100e6, rel=0.15)


def test_ratios_say_how_much_longer_the_first_took(benchmark):
    ratios = benchmark.module("measure").ratios
    assert ratios([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "minimum": 2.0, "lowest_repetition": 1.0}


@pytest.mark.slow
def test_both_sides_give_the_same_latents(benchmark, capsys):
    arguments = ("--size", "64x32", "--steps", "2", "--batch-size", "2", "--repetitions", "2", "--peer", "torch")
    benchmark(*TINY, *arguments)
    result = json.loads(capsys.readouterr().out)
    latents = result["peer"]["latents"]
    assert latents["max_abs_difference"] < 1e-4 * latents["max_abs"]
    stages = {"prompts", "sampler", "decoder", "end_to_end"}
    assert set(result["seconds"]) == set(result["peer"]["seconds"]) == set(result["share_of_peak"]) == stages
    assert result["images_a_second"] == pytest.approx(1 / result["seconds_an_image"])
    assert result["operations"]["end_to_end"] == sum(result["operations"][name] for name in stages - {"end_to_end"})
    assert all(math.isfinite(x) and x > 0 for x in result["operations_a_second"].values())


@pytest.mark.slow
def test_random_weights_are_drawn_in_the_dtypes_they_are_kept_in(benchmark):
    from deepgen_jax.parallel.mesh import make_mesh

    presets = benchmark.module("presets")
    pipe = presets.random_pipeline(presets.PRESETS["tiny"], "bfloat16", make_mesh(None))
    kernel = pipe.params["mmdit"]["context_embedder"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert np.std(np.asarray(kernel, np.float32)) == pytest.approx(kernel.shape[0] ** -0.5, rel=0.1)
    assert pipe.params["vae"]["decoder"]["conv_in"]["kernel"].dtype == jnp.float32
