"""Only single things anywhere, of any size, on any background: the round before `open_teacher`."""

from dataclasses import replace

from deepgen_jax.configs.nano import open_pairs
from deepgen_jax.training.run_config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """The learning rate falls to zero."""
    config = open_pairs.get_config()
    return replace(
        config,
        start="out/nano/open_pairs",
        out="out/nano/open_singles",
        steps=750,
        optimizer=replace(config.optimizer, schedule="cosine"),
        ema_decay=0.99,
        data=open_pairs.open_data(16, "single"),
    )
