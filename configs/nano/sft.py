"""Stage 2 of DeepGen-nano: bridge, DiT and adapters on the VLM learn."""

from dataclasses import replace

from deepgen_jax.configs.nano import pretrain, world_data
from deepgen_jax.training.config import AdapterConfig, SupervisedConfig
from deepgen_jax.training.optimizer import OptimizerConfig


def get_config() -> SupervisedConfig:
    """As stage 1, at a lower rate."""
    return replace(
        pretrain.get_config(),
        start="out/nano/pretrain",
        out="out/nano/sft",
        steps=300,
        trains=("bridge", "mmdit", "lora"),
        lora=AdapterConfig(rank=16, alpha=32, dropout=0.05),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup=0.02),
        data=world_data(16),
        accumulation=3,
    )
