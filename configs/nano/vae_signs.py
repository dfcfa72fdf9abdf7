"""The autoencoder of DeepGen-nano, fourth round: the decoder alone, mostly on signs, whose letters it smears so far.

Latents stay as they are, so that this round may come at any time, also last.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import vae, world_sources
from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig

_SOURCES = world_sources(
    ("words", "t2i", "text", 0.6),
    ("world", "t2i", "", 0.4),
    ("signs", "edit", "replace_word", 0.4),
    ("edits", "edit", "", 0.6),
)


def get_config() -> AutoencoderConfig:
    """Absolute differences, as letters are edges; latents a little off, as those that the DiT makes are."""
    config = vae.get_config()
    return replace(
        config,
        start="out/nano/vae_colours",
        out="out/nano/vae_signs",
        steps=1500,
        decoder_only=True,
        latent_noise=0.1,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.03),
        data=replace(config.data, sources=_SOURCES, mixture=MixtureConfig(cycle=("t2i", "t2i", "edit"))),
    )
