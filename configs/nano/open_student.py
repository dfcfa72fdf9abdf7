"""A student of `open_teacher` that samples in 4 evaluations.

For fewer, ``evaluations=2 data.micro_batch=32 steps=400`` and ``evaluations=1 data.micro_batch=64 steps=300``, with as
many segments a step. The teacher is a folder that
`deepgen export out/nano/open_teacher --ema --format model --out out/nano/open_teacher_model` writes.
"""

from dataclasses import replace

from deepgen_jax.configs.nano.open_pairs import open_data
from deepgen_jax.training.distill_config import DistillConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig


def get_config() -> DistillConfig:
    """All weights of the MMDiT; the teacher without guidance. Of the data only captions are used."""
    return DistillConfig(
        model="out/nano/open_teacher_model",
        out="out/nano/open_student",
        steps=600,
        dtype="float32",
        remat="none",
        evaluations=4,
        guidance_scale=1.0,
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, warmup=10, weight_decay=0.0),
        data=replace(open_data(16, "single", "places"), text_drop=0.0),
        checkpoints=CheckpointConfig(every=60),
    )
