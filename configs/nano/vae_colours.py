"""The autoencoder of DeepGen-nano, third round: squared differences, as a wrong colour matters more than an outline."""

from dataclasses import replace

from deepgen_jax.configs.nano import vae_small, world_data
from deepgen_jax.training.run_config import AutoencoderConfig


def get_config() -> AutoencoderConfig:
    """On small pictures again."""
    return replace(
        vae_small.get_config(),
        start="out/nano/vae_long",
        out="out/nano/vae_colours",
        steps=2000,
        loss="l2",
        kl_weight=1e-5,
        data=world_data(8, ("t2i",), size=64),
    )
