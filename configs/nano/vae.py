"""The autoencoder of DeepGen-nano at the size of its pictures."""

from dataclasses import replace

from deepgen_jax.configs.nano import vae_small, world_data
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig, CheckpointConfig


def get_config() -> AutoencoderConfig:
    """As on small pictures, at a lower rate."""
    return replace(
        vae_small.get_config(),
        start="out/nano/vae_small",
        out="out/nano/vae",
        steps=600,
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup=0.05),
        data=world_data(8, ("t2i",)),
        checkpoints=CheckpointConfig(every=200),
    )
