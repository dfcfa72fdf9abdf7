"""Small training runs for tests: pictures, a configuration file, and the command line in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

CONFIG = """
from deepgen_jax.data.data_config import DataConfig, SourceConfig
from deepgen_jax.training.run_config import AdapterConfig, CheckpointConfig, LogConfig, SupervisedConfig
from deepgen_jax.training.optimizer import OptimizerConfig

def get_config():
    sources = (
        SourceConfig("pictures", "json", "{folder}/t2i.json"),
        SourceConfig("edits", "json", "{folder}/edit.json", task="edit"),
    )
    return SupervisedConfig(
        model="{model}", out="{folder}/run", steps=5, trains={trains}, dtype="float32", remat="none",
        lora=AdapterConfig(rank=4, alpha=8), optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.1),
        data=DataConfig(sources=sources, micro_batch=8, image_size=64, min_side=16, token_multiple=64,
                        cache_dir="{folder}/index"),
        checkpoints=CheckpointConfig(every=100), log=LogConfig(tensorboard=False, sample_ids=True),
    )
"""

GRPO_CONFIG = """
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.rewards.registry import RewardConfig
from deepgen_jax.rl.rl_config import GRPOConfig, NFTConfig, PolicyConfig, PromptsConfig, RolloutConfig
from deepgen_jax.training.run_config import CheckpointConfig, LogConfig
from deepgen_jax.training.optimizer import OptimizerConfig

def get_config():
    source = SourceConfig("pictures", "json", "{folder}/t2i.json")
    return GRPOConfig(
        model="{model}", out="{folder}/run", steps=4, trains=("mmdit",), dtype="float32", remat="none",
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0.0),
        rollout=RolloutConfig(steps=4, group_size=2, size=64, micro_batch=4),
        policy=PolicyConfig(clip=0.01, micro_batch=4, updates_per_rollout=2, beta=0.01, sft_weight=0.1,
                            nft=NFTConfig(draws=2)),
        prompts=PromptsConfig("{folder}/prompts.txt", rewards={weights}), prompts_per_step=4,
        rewards=({rewards},), data=DataConfig((source,), micro_batch=4, mixture=MixtureConfig(cycle=("t2i",)),
        image_size=64, min_side=16, token_multiple=64, cache_dir="{folder}/index"),
        checkpoints=CheckpointConfig(every=2), log=LogConfig(tensorboard=False, sample_ids=True), pictures_every=2,
    )
"""


def write_model(folder: Path) -> Path:
    """A model folder with a layer of each kind and random weights: its programs compile in seconds."""
    from deepgen_jax.convert import convert
    from deepgen_jax.convert.random_release import tiny_config, write_release

    tiny = tiny_config()
    config = replace(
        tiny,
        text=replace(tiny.text, num_layers=6),
        vision=replace(tiny.vision, depth=1, full_attention_blocks=(0,)),
        bridge=replace(tiny.bridge, num_layers=1, num_queries=4),
        mmdit=replace(tiny.mmdit, num_layers=2, dual_attention_layers=(0,)),
    )
    write_release(folder / "release", config, dtype="float32")
    convert(diffusers=folder / "release", out=folder / "model")
    return folder / "model"


def write_data(folder: Path) -> None:
    """40 pictures with captions, and 20 edits of them."""
    random = np.random.default_rng(0)
    rows, edits = [], []
    for i in range(40):
        width, height = (64, 64)
        picture = Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8))
        picture.save(folder / f"{i}.png")
        rows.append({"txt": f"picture number {i} " * (1 + i % 3), "image_path": f"{i}.png"})
    for i in range(20):
        edits.append({"input_image": [f"{i}.png"], "output_image": f"{i + 20}.png", "instruction": f"change {i}"})
    (folder / "t2i.json").write_text(json.dumps(rows))
    (folder / "edit.json").write_text(json.dumps(edits))


def write_config(folder: Path, model: Path, trains: tuple[str, ...] = ("bridge", "mmdit", "lora")) -> Path:
    """A configuration file over the data in ``folder``."""
    path = folder / "config.py"
    path.write_text(CONFIG.format(folder=folder, model=model, trains=trains))
    return path


def write_grpo_config(
    folder: Path,
    model: Path,
    weights: dict[str, float],
    rewards: str = 'RewardConfig("color_target"), RewardConfig("jpeg")',
    name: str = "config.py",
) -> Path:
    """A configuration file of reinforcement learning: 2 chunks of a rollout and 2 updates a step."""
    (folder / "prompts.txt").write_text("".join(f"picture number {i}\n" for i in range(9)))
    path = folder / name
    path.write_text(GRPO_CONFIG.format(folder=folder, model=model, weights=weights, rewards=rewards))
    return path


def environment(devices: int = 1) -> dict[str, str]:
    """Environment of a process: number of CPU devices, and the shared compilation cache."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Threads of XLA's pool, which the devices share: one that waits in a collective holds its thread.
        "NPROC": str(8 * devices),
    }


def printed(program: str, *words: str, devices: int = 1) -> str:
    """Output of Python code in a separate process, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment(devices), timeout=600, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def start(
    folder: Path, *words: str, devices: int = 1, config: str = "config.py", program: str = ""
) -> subprocess.Popen:
    """``deepgen train`` in a separate process; ``program`` replaces its entry point, to inject faults."""
    entry = ["-c", program] if program else ["-m", "deepgen_jax.cli.main"]
    command = [sys.executable, *entry, "train", str(folder / config), *words]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for it and returns what it printed."""
    text, _ = process.communicate(timeout=600)
    assert process.returncode == status, text
    return text


def metrics(run: Path) -> list[dict]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Losses of all steps of a run, in order, each step once."""
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def sample_ids(run: Path, hosts: int = 1) -> list[list[str]]:
    """Ids of the samples of every step, over all hosts."""
    steps: list[list[str]] = []
    for host in range(hosts):
        lines = [json.loads(line) for line in (run / f"samples-{host}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        steps = steps or [[] for _ in lines]
        for step, line in zip(steps, lines, strict=True):
            step.extend(line["ids"])
    return [sorted(step) for step in steps]


def parameters(run: Path) -> dict[str, np.ndarray]:
    """Trained parameters and optimiser state of a run's newest checkpoint, by path."""
    import jax
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    folder, handler = (run / "checkpoints" / str(step) / "state").absolute(), ocp.PyTreeCheckpointHandler()
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
    tree = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=plain))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
