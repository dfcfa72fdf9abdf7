"""The autoencoder of DeepGen-nano, before all other stages."""

from deepgen_jax.configs.nano import MODEL, world_data
from deepgen_jax.training.config import AutoencoderConfig, CheckpointConfig
from deepgen_jax.training.optimizer import OptimizerConfig


def get_config() -> AutoencoderConfig:
    """Pictures with edges and letters: absolute differences, and a light divergence."""
    return AutoencoderConfig(
        model=MODEL,
        out="out/nano/vae",
        steps=4000,
        dtype="float32",
        loss="l1",
        kl_weight=1e-3,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.02, beta2=0.99),
        data=world_data(8),
        checkpoints=CheckpointConfig(every=500),
    )
