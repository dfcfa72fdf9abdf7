"""Stage 3 of DeepGen-nano: MR-GRPO with the exact reward of the world and text accuracy.

Prompts: `deepgen data world --skills text,text,text,relation --out out/nano/prompts.jsonl`.
"""

from deepgen_jax.configs.nano import MODEL, world_data
from deepgen_jax.rewards.registry import RewardConfig
from deepgen_jax.rl.rl_config import GRPOConfig, PolicyConfig, PromptsConfig, RolloutConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import CheckpointConfig


def get_config() -> GRPOConfig:
    """8 prompts x 8 images a step, 10 denoising steps, 3 of which are trained on.

    The learning rate is 10 times the published one, so that a small model changes within few updates; 20 and 100 times
    did harm (docs/experiments/nano.md). Penalty and auxiliary loss are raised as well.
    """
    return GRPOConfig(
        model=MODEL,
        start="out/nano/sft_swaps",
        out="out/nano/grpo",
        steps=100,
        trains=("mmdit",),
        dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule="constant", warmup=5, beta2=0.999, weight_decay=0.0),
        rollout=RolloutConfig(steps=10, group_size=8, size=96, micro_batch=64),
        policy=PolicyConfig(micro_batch=64, timestep_fraction=0.35, beta=0.002, sft_weight=0.002),
        prompts=PromptsConfig(path="out/nano/prompts.jsonl", rewards={"world": 0.5, "ocr": 0.5}),
        prompts_per_step=8,
        rewards=(RewardConfig("world"), RewardConfig("ocr", options={"detection_side": 192})),
        data=world_data(32, ("t2i",)),
        checkpoints=CheckpointConfig(every=25),
        pictures_every=25,
    )
