"""Stage 1 of DeepGen-nano begins with pictures that are all but noise: there nothing but the text tells what is drawn.

At the noise levels of sampling the DiT learns to make pictures out of noise long before it looks at the text;
`pretrain` comes nearer to those.
"""

from dataclasses import replace

from deepgen_jax.configs.nano import MODEL, world_data
from deepgen_jax.training.config import CheckpointConfig, SampleConfig, SupervisedConfig
from deepgen_jax.training.optimizer import OptimizerConfig


def get_config() -> SupervisedConfig:
    """Pictures of single things, 16 samples a step."""
    return SupervisedConfig(
        model=MODEL,
        start="out/nano/language",
        out="out/nano/pretrain_noisy",
        steps=400,
        trains=("bridge", "mmdit"),
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(
            name="muon", learning_rate=3e-3, schedule="constant", warmup=0.05, weight_decay=0.01
        ),
        noise_shift=30.0,
        data=replace(world_data(16, ("t2i",), skills="single"), token_multiple=52),
        accumulation=1,
        checkpoints=CheckpointConfig(every=200),
        samples=SampleConfig(every=0),
    )
