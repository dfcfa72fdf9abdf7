"""Stage 1 of DeepGen-nano begins with pictures that are all but noise: there nothing but the text tells what is drawn.

At the noise levels of sampling the DiT learns to make pictures out of noise long before it looks at the text;
`pretrain` comes nearer to those.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data, pretrain
from deepgen_jax.training.config import CheckpointConfig, SampleConfig, SupervisedConfig


def get_config() -> SupervisedConfig:
    """Pictures of single things, 16 samples a step, without moving average or falling rate: `pretrain` goes on."""
    config = pretrain.get_config()
    return replace(
        config,
        start="out/nano/language",
        out="out/nano/pretrain_noisy",
        steps=400,
        optimizer=replace(config.optimizer, schedule="constant", warmup=0.05),
        ema_decay=None,
        noise_shift=30.0,
        data=caption_data(16, "single"),
        checkpoints=CheckpointConfig(every=200),
        samples=SampleConfig(every=0),
    )
