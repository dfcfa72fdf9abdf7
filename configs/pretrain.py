"""Stage 1, alignment pre-training: think tokens and bridge learn; Tables 8 and 9 of the paper.

The data sets are the public ones of Table 8. Put them under `data/` as the paths say, or set other paths
(`data.sources.NAME.path=...`). The paper's in-house editing data are not public.
"""

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig, SampleConfig, SupervisedConfig

#: General generation, 35M pictures, as caption sets: {"image": ..., "annotation": ...}.
GENERATION = ("text-to-image-2m", "laion-aesthetic-6m", "megalith-10m", "redcaps-5m", "cc-12m")
#: General editing, 6.6M, as {"input_image": [...], "output_image": ..., "instruction": ...}.
EDITING = (
    "nhr-edit",
    "gpt-image-edit",
    "sharegpt-4o-image-edit",
    "opengpt4o-image-edit",
    "nano-banana-consist",
    "pico-banana",
    "x2i2",
    "uniworld-edit",
)


def get_config() -> SupervisedConfig:
    """Published hyper-parameters: batch 512, 200,000 steps, edit and generation batches 1:2."""
    generation = [SourceConfig(name, "captions", f"data/pretrain/{name}") for name in GENERATION]
    editing = [SourceConfig(name, "json", f"data/editing/{name}", task="edit") for name in EDITING]
    return SupervisedConfig(
        model="deepgen-base",
        out="runs/pretrain",
        steps=200_000,
        trains=("bridge",),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            schedule="cosine",
            warmup=0.01,
            warmup_start=1e-5,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.05,
            clip_norm=1.0,
        ),
        data=DataConfig(
            sources=(*generation, *editing),
            micro_batch=128,
            mixture=MixtureConfig(cycle=("edit", "t2i", "t2i")),
            image_size=512,
            transform="crop2square",
            text_drop=0.1,
            token_multiple=256,
        ),
        accumulation=4,
        merge=4,
        checkpoints=CheckpointConfig(every=1000, keep_last=3, keep_every=20_000),
        samples=SampleConfig(every=5000, prompts=("a red fox in fresh snow", "a sign that says \"OPEN\" above a door")),
    )
