"""The autoencoder of DeepGen-nano, second round: colours come after shapes."""

from dataclasses import replace

from deepgen_jax.configs.nano import vae, world_data
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig


def get_config() -> AutoencoderConfig:
    """More and smaller steps."""
    return replace(
        vae.get_config(),
        start="out/nano/vae",
        out="out/nano/vae_long",
        steps=1500,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup=0.05),
        data=world_data(4, ("t2i",)),
    )
