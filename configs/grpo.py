"""Stage 3, MR-GRPO: the DiT learns from mixed rewards; Tables 10 and 11 of the paper.

Prompts and reward weights by category are in the YAML; `docs/reinforcement_learning.md` explains how to run the judge.
`prompts.absent=skip` leaves out the lists of the YAML that are not public.
"""

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.rewards.registry import RewardConfig
from deepgen_jax.rl.rl_config import GRPOConfig, PolicyConfig, PromptsConfig, RolloutConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig

#: Auxiliary supervised data: general pictures with weight 1, text rendering with weight 3.
GENERAL = ("blip-3o", "sharegpt-4o-image", "echo-4o-image", "opengpt4o-image", "geneval", "self-banana-50k")
TEXT_RENDERING = ("text-rendering",)


def get_config() -> GRPOConfig:
    """Published hyper-parameters: 1,500 steps of 32 prompts x 8 images at 512x512, 50 steps of CPS with eta 1."""
    general = [SourceConfig(name, "json", f"data/sft/{name}", weight=1.0) for name in GENERAL]
    text = [SourceConfig(name, "json", f"data/sft/{name}", weight=3.0) for name in TEXT_RENDERING]
    judge = {"url": "http://localhost:8000/v1", "model": "UnifiedReward-Think"}
    return GRPOConfig(
        model="deepgen-base",
        start="runs/sft",
        out="runs/grpo",
        steps=1500,
        trains=("mmdit",),
        optimizer=OptimizerConfig(
            learning_rate=2e-6,
            schedule="constant",
            warmup=20,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        rollout=RolloutConfig(sampler="cps", steps=50, eta=1.0, group_size=8, size=512, micro_batch=64),
        policy=PolicyConfig(
            algorithm="grpo",
            advantage="gdpo",
            clip=1e-4,
            beta=5e-7,
            kl="velocity",
            timestep_fraction=0.6,
            micro_batch=64,
            sft_weight=1e-4,
        ),
        prompts=PromptsConfig(path="data/rl_prompts/deepgen_train.yaml"),
        prompts_per_step=32,
        rewards=(
            RewardConfig("preference", options=judge),
            RewardConfig("clip", options={"folder": "clip-vit-large-patch14"}),
            RewardConfig("ocr"),
        ),
        data=DataConfig(
            sources=(*general, *text),
            micro_batch=64,
            mixture=MixtureConfig(cycle=("t2i",)),
            image_size=512,
            transform="fix_pixels",
            token_multiple=256,
        ),
        checkpoints=CheckpointConfig(every=50, keep_last=3, keep_every=500),
    )
