"""Distillation of a tiny model to 2 evaluations, after `tiny_sft.py`: prompts and edits, no pictures as targets.

TIME s of CPU time, most of it for compiling; much less when the programs are cached.
"""

from deepgen_jax.configs.tiny_vae import SOURCES
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.training.distill_config import DistillConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig, SampleConfig


def get_config() -> DistillConfig:
    """40 steps of 8 samples, half of them edits."""
    return DistillConfig(
        model="out/tiny",
        start="out/runs/tiny_sft",
        out="out/runs/tiny_distill",
        steps=40,
        dtype="float32",
        remat="none",
        evaluations=2,
        estimates=4,
        guidance_scale=2.0,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.05, weight_decay=0.0),
        data=DataConfig(
            sources=(SourceConfig("prompts", "prompts", "out/example/prompts.txt"), SOURCES[1]),
            micro_batch=4,
            mixture=MixtureConfig(cycle=("edit", "t2i")),
            image_size=32,
            min_side=16,
            text_drop=0.0,
            token_multiple=96,
        ),
        accumulation=2,
        checkpoints=CheckpointConfig(every=20),
        samples=SampleConfig(every=20, prompts=("a red circle on a white background",), size=32),
    )
