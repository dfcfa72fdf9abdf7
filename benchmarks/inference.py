"""Speed and memory of text-to-image generation, printed as JSON; optionally against PyTorch with the same weights.

    python benchmarks/inference.py --preset mid --dtype float32 --steps 4 --peer torch

Times the prompt stage (language model and bridge for prompt and negative prompt), the sampler (all guided denoising
steps) and the decoder separately, and a whole pipeline call. The first call of each is the warm-up; compile seconds are
its excess over a later call. With a peer, repetitions alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Parser, alternate, environment, matmul_peak, peak_memory, progress, ratios, summary
from presets import PRESETS, random_pipeline

from deepgen_jax.data.tokens import TokenizedPrompt
from deepgen_jax.data.vision_inputs import to_uint8
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference import programs
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models import flops
from deepgen_jax.parallel.mesh import batch_sharding, batch_size_multiple, make_mesh
from deepgen_jax.random_keys import Inference
from deepgen_jax.stores.model_folder import read_manifest

PROMPT = (
    "A wide photograph of a small harbour at dawn: fishing boats with red hulls lie at a wooden pier, gulls circle "
    "over the water, and a hand-painted sign above the shop reads \"FRESH TODAY\"."
)
GUIDANCE = 4.0
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """"512" or "640x384" (width x height) -> (width, height)."""
    sides = [_positive(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512 or 640x384 (width x height)")
    return sides[0], sides[-1]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", help="a model folder")
    model.add_argument("--preset", choices=sorted(PRESETS), help="a model with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True, help="weights and computation")
    parser.add_argument("--batch-size", type=_positive, default=1, help="images a call (default: 1)")
    parser.add_argument("--steps", type=_positive, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--size", type=_size, default=(512, 512), help="512 or 640x384, width x height (default: 512)")
    parser.add_argument("--mesh", help="data=..,fsdp=..,tensor=.. (default: one device)")
    parser.add_argument("--repetitions", type=_positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument(
        "--peer",
        choices=("none", "torch", "torch-compile"),
        default="none",
        help="also time PyTorch, eager or with a compiled MMDiT (default: none)",
    )
    return parser.parse_args()


@dataclass(frozen=True)
class Workload:
    """A workload: ``batch`` images of (width, height) from one prompt in ``steps`` guided steps."""

    pipe: DeepGenPipeline
    batch: int
    width: int
    height: int
    steps: int

    def prompts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Condition of prompt and negative prompt of each image, side by side."""
        return self.pipe.encode_prompt([PROMPT, ""] * self.batch, pair_with=["", PROMPT] * self.batch)

    def noise(self) -> jax.Array:
        """Initial noise, as a call of the pipeline with seed 0 draws it."""
        vae = self.pipe.config.vae
        shape = (vae.latent_channels, self.height // vae.downscale, self.width // vae.downscale)
        seeds, indices = np.zeros(self.batch, np.uint32), np.arange(self.batch, dtype=np.uint32)
        return self._split(programs.normal_noise(seeds, indices, shape, Inference.INITIAL_NOISE))

    def sigmas(self) -> np.ndarray:
        """Noise levels."""
        unit = self.pipe.config.vae.downscale * self.pipe.config.mmdit.patch_size
        return make_sigmas(self.pipe.scheduler, self.steps, (self.height // unit) * (self.width // unit))

    def sampler(self, condition: tuple[np.ndarray, ...]) -> Callable[[], jax.Array]:
        """All denoising steps, inputs on the mesh."""
        pipe = self.pipe
        noise, sigmas = self.noise(), jnp.asarray(self.sigmas())
        inputs = programs.Condition(*(self._split(x) for x in condition))
        mmdit, scale = {"mmdit": pipe.params["mmdit"]}, jnp.float32(GUIDANCE)
        return lambda: programs.denoise(pipe.model, mmdit, noise, None, inputs, sigmas, scale)

    def decoder(self, latents: jax.Array) -> np.ndarray:
        """Latents to uint8 pixels on the host."""
        vae = {"vae": self.pipe.params["vae"]}
        return to_uint8(np.asarray(programs.vae_decode(self.pipe.model, vae, latents, self.pipe.mesh.size == 1)))

    def end_to_end(self) -> Any:
        """A whole call: prompts to uint8 pixels on the host."""
        return self.pipe(
            [PROMPT] * self.batch,
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            output_type="np",
        ).images

    def operations(self, length: int) -> dict[str, int]:
        """Operations of each stage; ``length``: condition tokens."""
        config = self.pipe.config
        count = flops.text_to_image(config, self.height, self.width, self.steps, length, guided=True)
        stages = {"prompts": count.condition, "sampler": count.sampler, "decoder": count.decoder}
        return {name: operations * self.batch for name, operations in {**stages, "end_to_end": count.total}.items()}

    def _split(self, x: Any) -> jax.Array:
        return jax.device_put(x, batch_sharding(self.pipe.mesh, np.ndim(x)))


def measure(workload: Workload, peer_name: str, repetitions: int, torch_model: Any = None) -> dict[str, Any]:
    """All results except environment and settings; ``torch_model`` is the peer's, made from our weights if None."""
    pipe = workload.pipe
    first: dict[str, float] = {}

    def first_call(name: str, stage: Callable[[], Any]) -> Any:
        progress(f"compiling: {name}")
        start = time.perf_counter()
        result = jax.block_until_ready(stage())
        first[name] = time.perf_counter() - start
        return result

    condition = first_call("prompts", workload.prompts)
    sampler = workload.sampler(condition)
    latents = first_call("sampler", sampler)
    stages: dict[str, Callable[[], Any]] = {
        "prompts": workload.prompts,
        "sampler": sampler,
        "decoder": lambda: workload.decoder(latents),
        "end_to_end": workload.end_to_end,
    }
    first_call("decoder", stages["decoder"])
    workload.end_to_end()
    memory = peak_memory()

    theirs = Peer(workload, peer_name, torch_model) if peer_name != "none" else None
    times: dict[str, list[float]] = {}
    for name, stage in stages.items():
        pair = {name: stage} | ({f"{peer_name} {name}": theirs.stages[name]} if theirs else {})
        times |= alternate(pair, repetitions)

    medians = {name: statistics.median(times[name]) for name in stages}
    length = condition[2].shape[1]
    peak = matmul_peak(pipe.model.dtype, pipe.mesh.size)
    operations = workload.operations(length)
    rates = {name: count / medians[name] for name, count in operations.items()}
    result = {
        "parameters": {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in pipe.params.items()},
        "attention": pipe.model.plan.kernel,
        "condition_tokens": length,
        "compile_seconds": {name: round(seconds - medians[name], 3) for name, seconds in first.items()},
        "seconds": {name: summary(times[name]) for name in stages},
        "seconds_an_image": medians["end_to_end"] / workload.batch,
        "images_a_second": workload.batch / medians["end_to_end"],
        "peak_memory": memory,
        "operations": operations,
        "operations_a_second": rates,
        "matmul_peak": peak,
        "share_of_peak": {name: round(rate / peak["operations_a_second"], 4) for name, rate in rates.items()},
    }
    if theirs:
        times_of = {name: times[f"{peer_name} {name}"] for name in stages}
        result["peer"] = {
            "name": peer_name,
            "versions": theirs.versions,
            "seconds": {name: summary(t) for name, t in times_of.items()},
            "peer_seconds_over_ours": {name: ratios(t, times[name]) for name, t in times_of.items()},
            "latents": theirs.compare(np.asarray(latents)),
        }
    return result


class Peer:
    """The stages of a workload in PyTorch, from the same weights, prompts and noise, warmed up."""

    def __init__(self, workload: Workload, name: str, model: Any = None) -> None:
        from torch_peer import versions

        pipe = workload.pipe
        model = torch_model_of(pipe, name) if model is None else model
        positive, negative = (TokenizedPrompt(**pipe.tokenize(text)) for text in (PROMPT, ""))
        prompts = [positive] * workload.batch + [negative] * workload.batch
        noise, sigmas = np.array(workload.noise()), workload.sigmas()
        condition = model.condition(prompts)

        def sampler(pooled: Any = condition[0], sequence: Any = condition[1]) -> Any:
            return model.denoise(noise, pooled, sequence, sigmas, GUIDANCE)

        progress("warming torch up")
        latents = sampler()
        self.versions = versions()
        self.stages: dict[str, Callable[[], Any]] = {
            "prompts": lambda: model.condition(prompts),
            "sampler": sampler,
            "decoder": lambda: model.decode(latents),
            "end_to_end": lambda: model.decode(sampler(*model.condition(prompts))),
        }
        self.stages["end_to_end"]()
        self._latents = latents.cpu().numpy()

    def compare(self, latents: np.ndarray) -> dict[str, float]:
        """Difference between our latents and the peer's."""
        difference = np.abs(latents - self._latents)
        return {
            "max_abs_difference": float(difference.max()),
            "mean_abs_difference": float(difference.mean()),
            "max_abs": float(np.abs(self._latents).max()),
        }


def torch_model_of(pipe: DeepGenPipeline, name: str) -> Any:
    """The `TorchPeer` of a pipeline, with its weights.

    Raises:
      DeepGenError: the peer's packages are missing, or torch does not see the device.
    """
    device = peer_device(name)
    from torch_peer import TorchPeer

    progress("copying weights to torch")
    return TorchPeer(pipe.config, pipe.params, jnp.dtype(pipe.model.dtype).name, device, name == "torch-compile")


def pipeline_of(args: argparse.Namespace) -> DeepGenPipeline:
    """The pipeline selected on the command line; validates the arguments before creating weights.

    Raises:
      DeepGenError: the arguments do not fit the model or the machine.
    """
    mesh = make_mesh(args.mesh)
    if args.batch_size % batch_size_multiple(mesh):
        raise DeepGenError(f"--batch-size {args.batch_size} must be a multiple of {batch_size_multiple(mesh)} here")
    if args.peer != "none" and mesh.size > 1:
        raise DeepGenError(f"--peer {args.peer} runs on one device; leave --mesh out")
    if args.peer != "none":
        peer_device(args.peer)
    config = PRESETS[args.preset] if args.preset else read_manifest(Path(args.model)).config
    width, height = args.size
    if width % config.image_multiple or height % config.image_multiple:
        raise DeepGenError(f"--size {width}x{height}: both sides must be multiples of {config.image_multiple}")
    progress("making weights" if args.preset else "loading weights")
    if args.preset:
        return random_pipeline(config, args.dtype, mesh)
    return DeepGenPipeline.from_pretrained(args.model, args.dtype, mesh)


def peer_device(name: str) -> str:
    """The torch device that matches JAX's platform.

    Raises:
      DeepGenError: the peer's packages are missing, or torch does not see the device.
    """
    try:
        from torch_peer import device_for
    except ImportError as error:
        raise DeepGenError(f"--peer {name} needs {error.name}; install the project with its test extra") from error
    platform = jax.devices()[0].platform
    device = device_for(platform)
    if device is None:
        raise DeepGenError(f"--peer {name}: this torch has no {platform} device; install one that has")
    return device


def main() -> None:
    args = arguments()
    width, height = args.size
    if args.peer != "none":
        # Both frameworks live in one process: leave half of a GPU to the other.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        workload = Workload(pipeline_of(args), args.batch_size, width, height, args.steps)
    except DeepGenError as error:
        progress(f"inference.py: error: {error}")
        sys.exit(2)
    result = measure(workload, args.peer, args.repetitions)
    settings = vars(args) | {"size": f"{width}x{height}", "guidance_scale": GUIDANCE}
    print(json.dumps({"benchmark": "inference", **environment(PACKAGES), "settings": settings, **result}, indent=2))


if __name__ == "__main__":
    main()
