"""Stage 1 of DeepGen-nano in small, to compare bridges: single things and relations, with encoders that are trained.

`deepgen nano init --encoders nano --out out/nano/bridge_trial/model` writes what it begins with.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain
from deepgen_jax.training.run_config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """19,200 pictures, 64 a step; the learning rate falls to zero, so that what was learned shows."""
    config = pretrain.get_config()
    return replace(
        config,
        model="out/nano/bridge_trial/model",
        start="",
        out="out/nano/bridge_trial/run",
        steps=300,
        optimizer=replace(config.optimizer, schedule="cosine"),
        ema_decay=None,
        data=caption_data(64, "single+relation"),
    )
