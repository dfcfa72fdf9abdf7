"""Single things and pairs anywhere, of any size, on any background: the round before `open_teacher`."""

from dataclasses import replace

from deepgen_jax.configs.nano import caption_data
from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig, SupervisedConfig


def open_data(micro_batch: int, skills: str, where: str = "anywhere") -> DataConfig:
    """Captions of these skills; what they leave open is drawn at random, things anywhere or at named places."""
    data = caption_data(micro_batch, skills)
    (source,) = data.sources
    return replace(data, sources=(replace(source, path=f"{source.path},varied={where}"),))


def get_config() -> SupervisedConfig:
    """Starts from the packaged nano, which gives all that a caption leaves open the same value."""
    return SupervisedConfig(
        model="nano",
        out="out/nano/open_pairs",
        steps=300,
        trains=("bridge", "mmdit"),
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(
            name="muon", learning_rate=2e-3, schedule="constant", warmup=20, weight_decay=0.01
        ),
        ema_decay=0.995,
        noise_shift=3.0,
        data=open_data(16, "single+two"),
        accumulation=4,
        checkpoints=CheckpointConfig(every=100),
    )
