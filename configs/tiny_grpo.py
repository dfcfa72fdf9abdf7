"""Stage 3 on a tiny model, continuing from `tiny_sft.py`: rewards red images and small JPEG files.

115 s of CPU time, most of it for compiling; much less when the programs are cached.
"""

from deepgen_jax.configs.tiny_vae import SOURCES
from deepgen_jax.data.data_config import DataConfig, MixtureConfig
from deepgen_jax.rewards.registry import RewardConfig
from deepgen_jax.rl.rl_config import GRPOConfig, PolicyConfig, PromptsConfig, RolloutConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig


def get_config() -> GRPOConfig:
    """10 steps of 4 prompts x 4 images."""
    return GRPOConfig(
        model="out/tiny",
        start="out/runs/tiny_sft",
        out="out/runs/tiny_grpo",
        steps=10,
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=1, beta2=0.999, weight_decay=0.0),
        rollout=RolloutConfig(steps=10, group_size=4, size=32, micro_batch=8),
        policy=PolicyConfig(micro_batch=16),
        prompts=PromptsConfig(path="out/example/prompts.txt", rewards={"red": 0.7, "jpeg": 0.3}),
        prompts_per_step=4,
        rewards=(RewardConfig("red", "color_target", {"target": [255, 0, 0]}), RewardConfig("jpeg")),
        data=DataConfig(
            sources=SOURCES[:1],
            micro_batch=4,
            mixture=MixtureConfig(cycle=("t2i",)),
            image_size=32,
            min_side=16,
            text_drop=0.0,
            token_multiple=96,
        ),
        checkpoints=CheckpointConfig(every=5),
        pictures_every=5,
    )
