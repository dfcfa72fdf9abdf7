"""The autoencoder of a tiny model on a dozen drawn pictures, before `tiny_pretrain.py`.

95 s of CPU time.
"""

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig, CheckpointConfig

SOURCES = (
    SourceConfig("pictures", "json", "out/example/t2i.json"),
    SourceConfig("edits", "json", "out/example/edit.json", task="edit"),
)
#: Every step sees edits of both numbers of references, so that one program takes all steps.
MIXTURE = MixtureConfig(cycle=("edit", "t2i", "edit", "t2i"))


def get_config() -> AutoencoderConfig:
    """300 steps of 8 samples, which are 14 pictures."""
    return AutoencoderConfig(
        model="out/tiny",
        out="out/runs/tiny_vae",
        steps=300,
        dtype="float32",
        loss="l2",
        kl_weight=1e-3,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05, beta2=0.99),
        data=DataConfig(sources=SOURCES, micro_batch=2, mixture=MIXTURE, image_size=32, min_side=16),
        accumulation=4,
        checkpoints=CheckpointConfig(every=1000),
    )
