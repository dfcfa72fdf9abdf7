"""Stage 1 of DeepGen-nano, all skills: trains bridge and MMDiT; `rounds.py` has the earlier rounds."""

from deepgen_jax.configs.nano import MODEL, caption_data
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig, SampleConfig, SupervisedConfig


def get_config() -> SupervisedConfig:
    """Only text-to-image, 64 samples a step; edits follow in stage 2, where the learning rate decays."""
    return SupervisedConfig(
        model=MODEL,
        start="out/nano/pretrain_counts",
        out="out/nano/pretrain",
        steps=558,
        trains=("bridge", "mmdit"),
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(
            name="muon", learning_rate=3e-3, schedule="constant", warmup=20, weight_decay=0.01
        ),
        ema_decay=0.995,
        noise_shift=4.0,
        data=caption_data(64, "single+relation+two+count+reasoning+text"),
        accumulation=1,
        checkpoints=CheckpointConfig(every=200),
        samples=SampleConfig(every=0),
    )
