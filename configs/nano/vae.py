"""The autoencoder of DeepGen-nano at full image size, after `vae_small` of `rounds.py`."""

from deepgen_jax.configs.nano import MODEL, world_data
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig, CheckpointConfig


def get_config() -> AutoencoderConfig:
    """Images with edges and letters: absolute error, and a small KL weight."""
    return AutoencoderConfig(
        model=MODEL,
        start="out/nano/vae_small",
        out="out/nano/vae",
        steps=600,
        dtype="float32",
        loss="l1",
        kl_weight=1e-4,
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup=0.05),
        data=world_data(8, ("t2i",)),
        checkpoints=CheckpointConfig(every=200),
    )
