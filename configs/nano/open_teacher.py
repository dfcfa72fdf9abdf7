"""A teacher for distillation, of a world where many pictures answer a caption.

A single thing is at any of five places, of any size, on any background, unless its caption says it.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import open_pairs, open_singles
from deepgen_jax.training.run_config import SupervisedConfig


def get_config() -> SupervisedConfig:
    """Few places, because outlines anywhere take longer to learn."""
    config = open_singles.get_config()
    return replace(
        config,
        start="out/nano/open_singles",
        out="out/nano/open_teacher",
        steps=600,
        optimizer=replace(config.optimizer, learning_rate=1.5e-3, warmup=10),
        data=open_pairs.open_data(16, "single", "places"),
    )
