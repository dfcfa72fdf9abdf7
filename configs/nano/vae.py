"""The autoencoder of DeepGen-nano at the size of its pictures, after `vae_small` of `rounds.py`."""

from deepgen_jax.configs.nano import MODEL, world_data
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig, CheckpointConfig


def get_config() -> AutoencoderConfig:
    """Pictures with edges and letters: absolute differences, and a light divergence."""
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
