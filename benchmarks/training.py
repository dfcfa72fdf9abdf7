"""Speed of a training step, printed as JSON; optionally against PyTorch with the same weights, data and noise.

    python benchmarks/training.py --preset mid --dtype float32 --batch-size 2 --peer torch

The step is that of stage 2 without adapters: flow matching on text-to-image samples, bridge and MMDiT train, gradients
pass through the frozen language model to the think tokens, the global norm is clipped, AdamW updates. Times the loss
with its gradient, and whole steps. With a peer, repetitions alternate, and losses, gradients and the
losses of consecutive steps are compared. ``--table`` prints Markdown instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from inference import PACKAGES, PROMPT, _positive, _size, peer_device
from measure import CLOCKS, Parser, alternate, environment, matmul_peak, peak_memory, progress, ratios, summary
from presets import PRESETS, random_pipeline

from deepgen_jax.convert.transforms import to_source
from deepgen_jax.data.tokens import TokenizedPrompt, pad_prompts
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models import flops
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import make_network
from deepgen_jax.models.stack import Remat
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.training.inputs import MicroBatch, Text, sample_keys
from deepgen_jax.training.optimizer import OptimizerConfig, make_optimizer
from deepgen_jax.training.partition import join, split
from deepgen_jax.training.state import start_state
from deepgen_jax.training.supervised import StepSettings, draw, supervised_gradients, train_step

TRAINS = ("bridge", "mmdit")
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup=0.0)
STAGES = ("loss and gradient", "step")
#: Steps whose losses are compared.
CONSECUTIVE = 3


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True, help="a model with random weights")
    parser.add_argument("--dtype", choices=("float32",), default="float32", help="of the computation")
    parser.add_argument("--batch-size", type=_positive, default=2, help="samples a step (default: 2)")
    parser.add_argument("--size", type=_size, default=(512, 512), help="512 or 640x384, width x height (default: 512)")
    parser.add_argument("--remat", choices=get_args(Remat), default="none", help="what is recomputed (default: none)")
    parser.add_argument("--repetitions", type=_positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu counts CPU seconds of all threads (default: wall)"
    )
    parser.add_argument("--peer", choices=("none", "torch"), default="none", help="also time PyTorch (default: none)")
    parser.add_argument("--table", action="store_true", help="print a Markdown table instead of JSON")
    return parser.parse_args()


def prompts_of(pipe: DeepGenPipeline, count: int) -> list[TokenizedPrompt]:
    """Different prompts of one length."""
    words = PROMPT.split()
    return [TokenizedPrompt(**pipe.tokenize(" ".join(words[k:] + words[:k]))) for k in range(count)]


class Ours:
    """The step of the training loop on one micro-batch, and its pieces.

    Attributes:
      prompts: tokenised texts of the samples.
      latents, noise: float32 [B, C, h, w]; sigma: float32 [B].
      state: of the training loop; it holds the pipeline's arrays of the parts that train.
    """

    def __init__(self, pipe: DeepGenPipeline, batch: int, width: int, height: int, remat: Remat) -> None:
        config, self._settings = pipe.config.mmdit, StepSettings(pipe.scheduler)
        self.pipe, self.prompts = pipe, prompts_of(pipe, batch)
        down = pipe.config.vae.downscale
        shape = (batch, config.in_channels, height // down, width // down)
        self.latents = np.random.default_rng(1).standard_normal(shape, np.float32)
        micro = self._micro_batch()
        self._micro = {"t2i": jax.tree.map(lambda x: x[None], micro)}
        index = np.stack([np.zeros(batch, np.uint32), np.arange(batch, dtype=np.uint32)], axis=1)
        self._keys = {"t2i": sample_keys(0, jnp.asarray(index))[None]}
        self._model = make_network(pipe.config, pipe.mesh, pipe.model.dtype, remat=remat)
        optimizer = make_optimizer(OPTIMIZER, steps=1000)
        params, self._frozen = split({name: pipe.params[name] for name in ("text", "bridge", "mmdit")}, TRAINS)
        self.state = start_state(optimizer, {"params": params, "lora": {}}, pipe.mesh, ema=False)
        draws = jax.jit(draw, static_argnums=2)(self._keys["t2i"][0], micro, self._settings)
        self.sigma = np.asarray(draws.sigma)
        self.noise = np.asarray(grids.unpatchify(draws.noise, shape[2], shape[3], config.patch_size, shape[1]))

        self._gradients = device_jit(
            lambda trainable, frozen, micro, keys: supervised_gradients(
                self._model, self._settings, trainable, frozen, micro, keys
            ),
            gradients=True,
        )
        self._step = device_jit(
            lambda state, frozen, micro, keys: train_step(
                self._model, optimizer, self._settings, state, frozen, micro, keys
            ),
            latency_hiding=True,
            gradients=True,
            donate_argnums=0,
        )

    def _micro_batch(self) -> MicroBatch:
        config = self.pipe.config.mmdit
        batch, length = len(self.latents), len(self.prompts[0].input_ids)
        padded = pad_prompts(self.prompts, [length] * batch, self.pipe.config)
        fields: list[Any] = [padded.input_ids, padded.position_ids, padded.real, padded.visible, padded.image_slots]
        text = Text(*fields)
        tokens = np.asarray(grids.patchify(jnp.asarray(self.latents), config.patch_size))
        height, width = self.latents.shape[2:]
        ids = grids.position_ids(height, width, config.patch_size, config.pos_embed_max_size)
        none = np.zeros((batch, 0), np.int32)
        arrays: tuple[Any, ...] = (
            tokens, np.tile(ids, (batch, 1)), np.ones(tokens.shape[:2], bool),
            np.zeros((batch, 0, tokens.shape[2]), np.float32), none, none.astype(bool),
            np.zeros((batch, 0, self.pipe.config.vision.out_hidden_size), np.float32), np.ones(batch, np.float32), text,
        )  # fmt: skip
        micro: MicroBatch = jax.tree.map(jnp.asarray, MicroBatch(*arrays))
        return micro

    def gradients(self) -> tuple[Any, jax.Array]:
        """Gradients and loss of the next step."""
        gradients, metrics = self._gradients(self.state.trainable, self._frozen, self._micro, self._keys)
        return gradients["params"], metrics["loss"]

    def step(self) -> jax.Array:
        """One optimiser step; returns the loss before it."""
        self.state, metrics = self._step(self.state, self._frozen, self._micro, self._keys)
        return metrics["loss"]

    def operations(self) -> dict[str, int]:
        """Operations of each stage; the optimiser's are not counted."""
        tokens = self.latents[0, 0].size // self.pipe.config.mmdit.patch_size**2
        length = len(self.prompts[0].input_ids) + self.pipe.config.bridge.num_queries
        config = self.pipe.config
        forward = flops.mmdit(config.mmdit, tokens, length) + flops.condition(config, length)
        # Frozen weights take no gradient, but what is in front of them does.
        backward = 2 * flops.mmdit(config.mmdit, tokens, length) + 2 * flops.bridge(config, length)
        backward += flops.text(config.text, length)
        return dict.fromkeys(STAGES, (forward + backward) * len(self.latents))


class Peer:
    """The same step in PyTorch."""

    def __init__(self, ours: Ours) -> None:
        from torch_peer import TorchPeer, TorchTraining, versions

        pipe = ours.pipe
        progress("copying weights to torch")
        params = {**pipe.params, **join(ours._frozen, ours.state.trainable["params"])}
        peer = TorchPeer(pipe.config, params, "float32", peer_device("torch"), False)
        self._training = TorchTraining(peer, TRAINS, OPTIMIZER)
        batch = (ours.prompts, ours.latents, ours.noise, ours.sigma)
        self.gradients: Callable[[], float] = lambda: self._training.gradients(*batch)
        self.step: Callable[[], float] = lambda: self._training.step(*batch)
        self.versions = versions()

    def compare(self, gradients: Any) -> dict[str, dict[str, float]]:
        """Our gradients against those of :meth:`gradients`, by part: relative to the peer's values."""
        squares: dict[str, list[float]] = {}
        for part, weight, theirs in self._training.gradients_by_name():
            value = gradients
            for step in weight.path:
                value = value[step]
            mine = to_source(weight.transform, np.asarray(value[weight.index]), weight.shape)
            difference = np.abs(mine.astype(np.float64) - theirs)
            row = squares.setdefault(part, [0.0, 0.0, 0.0, 0.0])
            row[0] = max(row[0], float(difference.max()))
            row[1] = max(row[1], float(np.abs(theirs).max()))
            row[2] += float(np.sum(difference**2))
            row[3] += float(np.sum(theirs.astype(np.float64) ** 2))
        return {part: {"max": row[0] / row[1], "rms": (row[2] / row[3]) ** 0.5} for part, row in squares.items()}


def measure(ours: Ours, peer: bool, repetitions: int, clock: str) -> dict[str, Any]:
    """Everything but environment and settings."""
    progress("compiling")
    gradients, loss = ours.gradients()
    result: dict[str, Any] = {"loss": float(loss)}
    theirs = None
    if peer:
        theirs = Peer(ours)
        progress("comparing gradients")
        peer_loss = theirs.gradients()
        result["peer"] = {
            "versions": theirs.versions,
            "loss": peer_loss,
            "loss_difference": abs(peer_loss - float(loss)) / abs(peer_loss),
            "gradients": theirs.compare(gradients),
        }
        progress(json.dumps({name: result["peer"][name] for name in ("loss_difference", "gradients")}))
    del gradients
    progress("taking steps")
    ours_losses = [float(ours.step()) for _ in range(CONSECUTIVE)]
    result["steps"] = ours_losses
    if theirs:
        their_losses = [theirs.step() for _ in range(CONSECUTIVE)]
        difference = max(abs(a - b) / abs(b) for a, b in zip(ours_losses, their_losses, strict=True))
        result["peer"] |= {"steps": their_losses, "steps_difference": difference}
    times: dict[str, list[float]] = {}
    for name, attribute in zip(STAGES, ("gradients", "step"), strict=True):
        pair = {name: getattr(ours, attribute)}
        if theirs:
            pair[f"torch {name}"] = getattr(theirs, attribute)
        times |= alternate(pair, repetitions, clock)
    medians = {name: statistics.median(times[name]) for name in STAGES}
    operations, peak = ours.operations(), matmul_peak(jnp.float32, 1, clock)
    rates = {name: operations[name] / medians[name] for name in STAGES}
    result |= {
        "attention": ours._model.plan.kernel,
        "seconds": {name: summary(times[name]) for name in STAGES},
        "operations": operations,
        "matmul_peak": peak,
        "share_of_peak": {name: round(rate / peak["operations_a_second"], 4) for name, rate in rates.items()},
        "peak_memory": peak_memory(),
    }
    if theirs:
        result["peer"]["seconds"] = {name: summary(times[f"torch {name}"]) for name in STAGES}
        result["peer"]["peer_seconds_over_ours"] = {
            name: ratios(times[f"torch {name}"], times[name]) for name in STAGES
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown of a run with a peer."""
    peer, lines = result["peer"], []
    lines += ["| | ours, median | PyTorch eager, median | ratio of medians | lowest repetition | share of peak |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for name in STAGES:
        ratio = peer["peer_seconds_over_ours"][name]
        lines.append(
            f"| {name} | {result['seconds'][name]['median']:.2f} s | {peer['seconds'][name]['median']:.2f} s "
            f"| {ratio['median']:.2f} | {ratio['lowest_repetition']:.2f} | {result['share_of_peak'][name]:.0%} |"
        )
    gradients = ", ".join(
        f"{part} {row['rms']:.0e} (largest {row['max']:.0e})" for part, row in peer["gradients"].items()
    )
    lines += ["", f"Differences, relative: loss {peer['loss_difference']:.0e}; gradients, rms: {gradients}; losses of"]
    lines += [f"{CONSECUTIVE} steps {peer['steps_difference']:.0e}."]
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    width, height = args.size
    try:
        if args.peer != "none":
            peer_device(args.peer)
        elif args.table:
            raise DeepGenError("--table compares two sides; add --peer torch")
        config = PRESETS[args.preset]
        if width % config.image_multiple or height % config.image_multiple:
            raise DeepGenError(f"--size {width}x{height}: both sides must be multiples of {config.image_multiple}")
        progress("making weights")
        ours = Ours(random_pipeline(config, args.dtype, make_mesh(None)), args.batch_size, width, height, args.remat)
    except DeepGenError as error:
        progress(f"training.py: error: {error}")
        sys.exit(2)
    result = measure(ours, args.peer != "none", args.repetitions, args.clock)
    settings = vars(args) | {"size": f"{width}x{height}", "trains": TRAINS}
    result = {"benchmark": "training", **environment(PACKAGES), "settings": settings, **result}
    print(table(result) if args.table else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
