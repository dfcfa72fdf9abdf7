"""One part of `device.py`: prints a line of JSON for each result.

    python benchmarks/device_parts.py few --size tiny

Programs other than those of "generate" are the ones that ``deepgen compile`` estimates, run on random weights that are
made on the device.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from measure import environment, peak_memory, progress, seconds_of
from presets import PRESETS

from deepgen_jax import settings
from deepgen_jax.config import DeepGenConfig, QuantizationConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.abstract import AbstractImages
from deepgen_jax.inference.cache import enable_compilation_cache
from deepgen_jax.models.attention import attention
from deepgen_jax.models.plan import Plan, fastest_kernel
from deepgen_jax.parallel.abstract import AbstractProgram
from deepgen_jax.parallel.chips import peak_flops
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.training import config_files
from deepgen_jax.training.abstract_run import AbstractRun
from deepgen_jax.training.stage import stage_class

Say = Callable[..., None]


class Size(NamedTuple):
    """How large everything is.

    Attributes:
      preset: of the model.
      side: of images in pixels.
      batches: images at once.
      steps: guided steps of the usual sampler.
      prompt_tokens: of a prompt with its template.
      step, update: settings of a training step and of an update of reinforcement learning that fit one device.
    """

    preset: str
    side: int
    batches: tuple[int, int]
    steps: int
    prompt_tokens: int
    step: tuple[str, ...]
    update: tuple[str, ...]


SIZES: Mapping[str, Size] = {
    "full": Size(
        "full", 512, (1, 8), 50, 100,
        ("gather_frozen=false", "accumulation=3", "data.micro_batch=8"),
        ("prompts_per_step=4", "rollout.steps=10", "policy.micro_batch=8", "rollout.micro_batch=8",
         "data.micro_batch=8"),
    ),
    "tiny": Size(
        "tiny", 64, (1, 2), 2, 20,
        ("gather_frozen=false", "accumulation=3", "data.micro_batch=2", "data.image_size=64", "data.token_multiple=64"),
        ("prompts_per_step=1", "rollout.steps=2", "rollout.size=64", "policy.micro_batch=8", "rollout.micro_batch=8",
         "data.micro_batch=2", "data.image_size=64", "data.token_multiple=64"),
    ),
}  # fmt: skip
_REPETITIONS, _LONG = 5, 10.0


def _dtype() -> str:
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def parity(size: Size, say: Say) -> None:
    """Fused attention against XLA's on the model's shapes: errors against float32, and times."""
    config, rng = PRESETS[size.preset], np.random.default_rng(0)
    images = (size.side // config.vae.downscale // config.mmdit.patch_size) ** 2
    text = size.prompt_tokens + config.bridge.num_queries
    heads, language = (config.mmdit.num_heads, config.mmdit.head_dim), config.text
    dtype = jnp.dtype(_dtype())
    kernel = fastest_kernel(jax.devices()[:1], dtype)
    joint = images + text
    shapes = {
        "joint": ((joint, *heads), heads[0], {"key_lengths": jnp.array([joint, joint - text // 2])}),
        "joint, four times the pixels": ((4 * images + text, *heads), heads[0], {}),
        "image": ((images, *heads), heads[0], {}),
        "prompt": (
            (text, language.num_heads, language.head_dim), language.num_kv_heads,
            {"key_mask": jnp.arange(text) >= jnp.array([[0], [text // 3]]), "causal": True},
        ),
    }  # fmt: skip
    for name, (shape, groups, mask) in shapes.items():
        query = jnp.asarray(rng.standard_normal((2, *shape)), dtype)
        key, value = (jnp.asarray(rng.standard_normal((2, shape[0], groups, shape[2])), dtype) for _ in range(2))

        def run(kernel: Any, dtype: Any, mask: Any = mask, inputs: Any = (query, key, value)) -> Callable[[], Any]:
            causal = mask.get("causal", False)
            masks = {name: value for name, value in mask.items() if name != "causal"}
            once = jax.jit(lambda q, k, v, masks: attention(q, k, v, **masks, causal=causal, plan=Plan(kernel)))
            arrays = [x.astype(dtype) for x in inputs]
            return lambda: once(*arrays, masks)

        exact = run("xla", jnp.float32)()
        found: dict[str, Any] = {"kernel": kernel, "shape": list(query.shape), "dtype": dtype.name}
        for label, one in (("xla", run("xla", dtype)), ("fused", run(kernel, dtype))):
            difference = float(jnp.abs(one().astype(jnp.float32) - exact).max())
            times = [seconds_of(one) for _ in range(20)]
            found |= {f"{label}_max_error": difference, f"{label}_seconds": statistics.median(times)}
        say(name, **found)


def generate(size: Size, say: Say) -> None:
    """Whole images with guidance; with the block cache; and in PyTorch, eager and with a compiled MMDiT."""
    from inference import GUIDANCE, PROMPT, Workload, measure, torch_model_of
    from presets import random_pipeline

    pipe = random_pipeline(PRESETS[size.preset], _dtype(), make_mesh(None))
    workloads = {batch: Workload(pipe, batch, size.side, size.side, size.steps) for batch in size.batches}

    def say_measured(label: str, batch: int, **settings: Any) -> None:
        found = measure(workloads[batch], repetitions=3, **settings)
        kept = ("seconds", "seconds_an_image", "compile_seconds", "share_of_peak", "matmul_peak", "peak_memory", "peer")
        say(f"{label}, batch {batch}", **{key: found[key] for key in kept if key in found})

    for batch in size.batches:
        say_measured("ours", batch, peer_name="none")
    for batch in size.batches:
        for threshold in (0.08, 0.3):

            def cached(batch: int = batch, threshold: float = threshold) -> tuple[float, float]:
                found = pipe(
                    [PROMPT] * batch, height=size.side, width=size.side, num_inference_steps=size.steps,
                    guidance_scale=GUIDANCE, output_type="np", cache=threshold,
                ).evaluations  # fmt: skip
                assert found is not None
                return found

            done, whole = cached()
            times = [seconds_of(cached) for _ in range(3)]
            say(f"cache {threshold}, batch {batch}", seconds=statistics.median(times), evaluated=done / whole)
    try:
        model = torch_model_of(pipe, "torch")
    except DeepGenError as error:
        say("PyTorch", status="failed", reason=str(error))
        return
    for batch in size.batches:
        say_measured("PyTorch eager", batch, peer_name="torch", torch_model=model)
    model.compile()
    for batch in size.batches:
        say_measured("PyTorch compiled", batch, peer_name="torch-compile", torch_model=model)


def few(size: Size, say: Say) -> None:
    """Four unguided evaluations, as of a distilled model: prompts, sampler, decoder."""
    for batch in size.batches:
        images = _images(size, batch, PRESETS[size.preset], few=True)
        for name, program in (
            ("sampler", images.denoising()), ("prompts", images.prompts()), ("decoder", images.decoding())
        ):  # fmt: skip
            say(f"{name}, batch {batch}", **_timed(program))


def eight_bit(weights: str, products: bool) -> Callable[[Size, Say], None]:
    """The guided sampler with 8-bit weights."""

    def run(size: Size, say: Say) -> None:
        config = replace(PRESETS[size.preset], quantization=QuantizationConfig(weights, products))
        for batch in size.batches:
            say(f"sampler, batch {batch}", **_timed(_images(size, batch, config, few=False).denoising()))

    return run


def _images(size: Size, batch: int, config: DeepGenConfig, *, few: bool) -> AbstractImages:
    steps, sampler = (4, "pi_flow") if few else (size.steps, "euler")
    mesh = make_mesh(None)
    return AbstractImages(
        config, mesh, _dtype(), batch, size.side, steps, size.prompt_tokens, sampler=sampler, guided=not few
    )


def step(size: Size, say: Say) -> None:
    """One optimiser step of stage 2."""
    _train("sft", "step", size, size.step, say)


def update(size: Size, say: Say) -> None:
    """One update of reinforcement learning."""
    _train("grpo", "update", size, size.update, say)


def _train(config_name: str, program: str, size: Size, words: tuple[str, ...], say: Say) -> None:
    config = settings.apply(config_files.load_config(config_name), [*words, "remat=full", f"dtype={_dtype()}"])
    run = AbstractRun(config, PRESETS[size.preset], make_mesh(None), size.prompt_tokens)
    made = stage_class(config).abstract_programs[program].make(run)
    say(program, batch=made.batch, unit=made.unit, **_timed(made, donates=True))


def _timed(program: AbstractProgram, *, donates: bool = False) -> dict[str, Any]:
    """Compiles a program, runs it on random arguments, and returns times, utilisation and peak memory.

    Args:
      program: to run.
      donates: it returns its first argument, updated, first.
    """
    progress(f"compiling {program.name}: {'; '.join(program.summary)}")
    start = time.perf_counter()
    compiled = program.lower().compile()
    compile_seconds = time.perf_counter() - start
    arguments = list(random_arrays(program.arguments))

    def once() -> Any:
        out = compiled(*arguments)
        if donates:
            arguments[0] = out[0]
        return out

    first = seconds_of(once)
    repetitions = _REPETITIONS if first < _LONG else 1
    times = [seconds_of(once) for _ in range(repetitions)]
    seconds, peak = statistics.median(times), peak_flops(jax.devices()[0])
    return {
        "seconds": seconds,
        "repetitions": times,
        "compile_seconds": compile_seconds,
        "operations": program.flops,
        "mfu": None if peak is None else program.flops / seconds / peak,
        "summary": list(program.summary),
        "peak_memory": peak_memory(),
    }


def random_arrays(tree: Any) -> Any:
    """Arrays of the shapes of a tree: weights that keep activations in range, masks that hide nothing."""

    def filled(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        array = _filled(str(getattr(path[-1], "key", "")) if path else "", leaf)
        # Second moments of the optimiser.
        return jnp.abs(array) if any(getattr(entry, "name", "") == "nu" for entry in path) else array

    return jax.tree_util.tree_map_with_path(filled, tree)


def _filled(name: str, leaf: Any) -> jax.Array:
    shape, dtype = leaf.shape, leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0)
    eight_bits = dtype in (jnp.int8, jnp.float8_e4m3fn)
    if dtype == jnp.bool_ or name == "scale":
        return jnp.ones(shape, dtype)
    if name.endswith("_scale"):
        return jnp.full(shape, 1e-3, dtype)
    if jnp.issubdtype(dtype, jnp.integer) and not eight_bits:
        return jnp.zeros(shape, dtype)
    if len(shape) == 1 and not name:
        return jnp.linspace(1, 0, shape[0], dtype=dtype)  # noise levels
    std = 30.0 if eight_bits else 0.02 if name else 1.0
    return jnp.resize(_pattern() * std, shape).astype(dtype)


@functools.cache
def _pattern() -> jax.Array:
    """Normal samples that are tiled over all arrays; a prime number of them, so that no two rows are alike."""
    return jax.random.normal(jax.random.key(1), (100_003,))


PARTS: Mapping[str, Callable[[Size, Say], None]] = {
    "attention": parity,
    "generate": generate,
    "few": few,
    "step": step,
    "update": update,
    "int8": eight_bit("int8", products=False),
    "int8-products": eight_bit("int8", products=True),
    "fp8-products": eight_bit("fp8", products=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--size", choices=list(SIZES), default="full")
    options = parser.parse_args()
    if options.part == "generate":
        # PyTorch lives in the same process.
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.5"
    enable_compilation_cache()
    print(json.dumps({"environment": environment(("jax", "jaxlib", "flax", "numpy"))}), flush=True)

    def say(name: str, **values: Any) -> None:
        print(json.dumps({"name": name, **values}), flush=True)

    PARTS[options.part](SIZES[options.size], say)


if __name__ == "__main__":
    main()
