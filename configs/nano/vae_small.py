"""The autoencoder of DeepGen-nano on small pictures first, where a step costs less; `nano/vae` goes on from it."""

from deepgen_jax.configs.nano import MODEL, world_data
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig, CheckpointConfig


def get_config() -> AutoencoderConfig:
    """Pictures with edges and letters: absolute differences, and a light divergence."""
    return AutoencoderConfig(
        model=MODEL,
        out="out/nano/vae_small",
        steps=5000,
        dtype="float32",
        loss="l1",
        kl_weight=1e-4,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.02),
        data=world_data(4, ("t2i",), size=64),
        checkpoints=CheckpointConfig(every=1000),
    )
