"""Does reinforcement learning learn? Three runs of `deepgen train tiny_grpo` on the tiny model, and their curves.

    python benchmarks/grpo_learning.py --model out/tiny --start out/runs/tiny_sft --data out/example

One run is rewarded for small JPEG files, two for red images: with the KL penalty and the auxiliary loss, and without.
The supervised loss on the example pictures, at fixed noise and noise levels, measures the drift from earlier training.
Finished runs are not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Parser

from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import flops
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.stores.jsonl import read_lines
from deepgen_jax.training import config_files
from deepgen_jax.training.inputs import MicroBatch
from deepgen_jax.training.run_config import SupervisedConfig
from deepgen_jax.training.step_batches import StepBatches, open_loader
from deepgen_jax.training.supervised import Draws, supervised_losses
from deepgen_jax.training.weights import load_start

#: Noise levels of the supervised loss, and draws of noise at each.
LEVELS, DRAWS = (0.1, 0.3, 0.5, 0.7, 0.9), 8
#: Steps at both ends of a run whose mean rewards are compared.
ENDS = 15


@dataclass(frozen=True)
class Run:
    """A run: its title in the picture, its reward, its colour, and its settings besides the common ones."""

    title: str
    reward: str
    colour: str
    words: tuple[str, ...]


#: Penalty and auxiliary loss weigh more than published, because the larger steps drift faster.
HELD = ("policy.beta=0.002", "policy.sft_weight=0.002")
RUNS = {
    "jpeg": Run("small JPEG files", "jpeg", "tab:blue", HELD),
    "red": Run("red, with KL and auxiliary loss", "red", "tab:green", HELD),
    "red_free": Run("red, without both", "red", "tab:red", ("policy.beta=0", "policy.sft_weight=0", "data=null")),
}
#: To change a DiT of 1.8 million parameters within 150 updates takes a learning rate far above the published one. With
#: one update per rollout ratios are 1 and the clip range has no effect, so it stays as published.
SETTINGS = (
    "optimizer.learning_rate=3e-4",
    "optimizer.warmup=5",
    "rollout.group_size=8",
    "rollout.steps=6",
    "rollout.micro_batch=16",
    "policy.micro_batch=16",
    "prompts_per_step=2",
    "checkpoints.every=1000",
    "pictures_every=50",
    "log.tensorboard=false",
)


def train(run: Run, folder: Path, args: Any) -> list[dict[str, Any]]:
    """Trains through the command line, unless the run is finished; returns its logged steps."""
    log = folder / "metrics.jsonl"
    if not log.is_file() or len(list(read_lines(log))) < args.steps:
        words = [*SETTINGS, *run.words, f"steps={args.steps}", f"model={args.model}", f"start={args.start}"]
        words += [f"out={folder}", f"prompts.path={args.data / 'prompts.txt'}"]
        words.append(f'prompts.rewards={{"{run.reward}": 1.0}}')
        if "data=null" not in words:
            words.append(f"data.sources.pictures.path={args.data / 't2i.json'}")
        subprocess.run([sys.executable, "-m", "deepgen_jax.cli.main", "train", "tiny_grpo", *words], check=True)
    return list(read_lines(log))


def supervised_loss(args: Any, run: Path) -> float:
    """Mean flow-matching loss of a run's weights on the example pictures, at fixed noise and noise levels."""
    loaded = config_files.load_config("tiny_sft")
    assert isinstance(loaded, SupervisedConfig)
    mesh = make_mesh("data=1")
    rows = len(json.loads((args.data / "t2i.json").read_text(encoding="utf-8")))
    source = replace(loaded.data.sources[0], path=str(args.data / "t2i.json"))
    data = replace(loaded.data, sources=(source,), mixture=MixtureConfig(cycle=("t2i",)), micro_batch=rows)
    config = replace(loaded, model=str(args.model), start=str(run), out="", trains=("mmdit",), data=data)
    weights = load_start(config, mesh)
    model = DeepGen(weights.config, dtype=jnp.float32)
    with open_loader(config, data, weights, mesh) as loader:
        feed = StepBatches(loader, model, weights.frozen, mesh, accumulation=1, seed=0,
                           operations=partial(flops.training, model.config, ("mmdit",)))
        (stacked,) = next(feed).micro_batches.values()
    micro = jax.tree.map(lambda x: x[0], stacked)

    keys = jax.random.split(jax.random.key(0), DRAWS)
    return float(_mean_loss(model, weights.trainable, weights.frozen, micro, keys))


@partial(jax.jit, static_argnums=0)
def _mean_loss(model: DeepGen, trainable: Any, frozen: Any, micro: MicroBatch, keys: jax.Array) -> jax.Array:
    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, sigma = inputs
        noise = jax.random.normal(key, micro.latents.shape)
        draws = Draws(jnp.full(micro.latents.shape[0], sigma), noise, None)
        return jnp.mean(supervised_losses(model, trainable, frozen, micro, draws, 0.0))

    levels = jnp.array(LEVELS, jnp.float32)
    return jnp.mean(jax.lax.map(one, (jnp.repeat(keys, len(LEVELS)), jnp.tile(levels, len(keys)))))


def gain(rewards: np.ndarray) -> dict[str, float]:
    """First and last mean reward of a run, and their difference in its standard errors (steps are independent)."""
    first, last = rewards[:ENDS], rewards[-ENDS:]
    error = float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / ENDS))
    rise = float(last.mean() - first.mean())
    return {"first": float(first.mean()), "last": float(last.mean()), "rise_in_standard_errors": rise / error}


def draw(logs: dict[str, list[dict[str, Any]]], losses: dict[str, float], out: Path) -> None:
    """Rewards, KL and drift in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    left, middle, right, drift = figure.subplots(1, 4)
    for name, log in logs.items():
        run = RUNS[name]
        steps = [line["step"] for line in log]
        axes = left if run.reward == "jpeg" else middle
        axes.plot(steps, [line[f"reward/{run.reward}/mean"] for line in log], color=run.colour, label=run.title)
        if "rl/kl" in log[0]:
            right.plot(steps, [line["rl/kl"] for line in log], color=run.colour, label=run.title)
    titles = ("JPEG reward (-kB / 500)", "colour reward", "KL: mean of (v - v_ref)²")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("update")
        axes.legend(fontsize=7)
    names = list(losses)
    colours = ["grey" if name == "start" else RUNS[name].colour for name in names]
    bars = drift.bar([name.replace("_", "\n") for name in names], list(losses.values()), color=colours)
    drift.bar_label(bars, fmt="%.2f", fontsize=8)
    drift.set_title("supervised loss after the run", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)


def main() -> None:
    """Trains, draws and prints."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=Path("out/tiny"))
    parser.add_argument("--start", type=Path, default=Path("out/runs/tiny_sft"), help="run of tiny_sft")
    parser.add_argument("--data", type=Path, default=Path("out/example"), help="what `deepgen data example` wrote")
    parser.add_argument("--out-runs", type=Path, default=Path("out/runs/grpo_learning"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/grpo_learning.png"))
    parser.add_argument("--steps", type=int, default=150, help="updates of each run")
    args = parser.parse_args()
    if args.steps < 2 * ENDS:
        raise DeepGenError(f"--steps is {args.steps}; give at least {2 * ENDS}")
    args.out_runs.mkdir(parents=True, exist_ok=True)
    logs = {name: train(run, args.out_runs / name, args) for name, run in RUNS.items()}
    folders = {"start": args.start} | {name: args.out_runs / name for name in RUNS}
    losses = {name: supervised_loss(args, folder) for name, folder in folders.items()}
    draw(logs, losses, args.out)
    result: dict[str, Any] = {"steps": args.steps, "supervised_loss": losses}
    for name, log in logs.items():
        result[name] = gain(np.array([line[f"reward/{RUNS[name].reward}/mean"] for line in log]))
        if "rl/kl" in log[0]:
            kl = [line["rl/kl"] for line in log]
            result[name] |= {"kl_largest": max(kl), "kl_last": float(np.mean(kl[-ENDS:]))}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
