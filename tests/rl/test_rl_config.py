"""The description of a run of reinforcement learning: published defaults, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards import RewardConfig
from deepgen_jax.rl.rl_config import GRPOConfig, NFTConfig, PolicyConfig, PromptsConfig, RolloutConfig

RUN = GRPOConfig(model="m", out="o", prompts=PromptsConfig("p.txt"), rewards=(RewardConfig("jpeg"),))


def test_defaults_are_the_published_ones():
    rollout, policy, optimizer = RUN.rollout, RUN.policy, RUN.optimizer
    assert (rollout.sampler, rollout.group_size, rollout.size, rollout.steps, rollout.eta) == ("cps", 8, 512, 50, 1.0)
    assert (rollout.guidance_scale, rollout.share_noise) == (0, True)
    assert (policy.timestep_fraction, policy.beta, policy.clip, policy.sft_weight) == (0.6, 5e-7, 1e-4, 1e-4)
    assert (policy.algorithm, policy.advantage, policy.kl) == ("grpo", "gdpo", "velocity")
    assert (RUN.steps, RUN.prompts_per_step * rollout.group_size, RUN.trains) == (1500, 256, ("mmdit",))
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup) == (2e-6, "constant", 20)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.999, 0, 1)


def test_first_ratios_are_held_to_the_precision_of_the_computation():
    assert PolicyConfig().tolerance("float32") == 1e-6
    assert PolicyConfig().tolerance("bfloat16") == 5e-5
    assert PolicyConfig(ratio_tolerance=0.1).tolerance("float32") == 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutConfig(eta=1.5), "cps needs it above 0 and at most 1"),
        (lambda: RolloutConfig(sampler="flow", eta=0), "do not differ"),
        (lambda: RolloutConfig(size=500), "multiple of 32"),
        (lambda: RolloutConfig(micro_batch=12), "whole groups of 8"),
        (lambda: RolloutConfig(sampler="ode"), "share_noise=false"),
        (lambda: PolicyConfig(clip=0), "policy.clip"),
        (lambda: PolicyConfig(timestep_fraction=1.2), "timestep_fraction"),
        (lambda: PolicyConfig(sft_weight=1), "sft_weight"),
        (lambda: NFTConfig(decay_max=1), "decay_max"),
        (lambda: NFTConfig(strength=0), "strength"),
        (lambda: replace(RUN, trains=("bridge",)), "mmdit or mmdit_lora"),
        (lambda: replace(RUN, rewards=()), "rewards is empty"),
        (lambda: replace(RUN, prompts_per_step=5), "does not divide a step's 40 images"),
        (lambda: replace(RUN, policy=PolicyConfig(updates_per_rollout=3)), "updates_per_rollout=3 parts"),
        (lambda: replace(RUN, rollout=RolloutConfig(sampler="ode", share_noise=False)), "needs a stochastic"),
        (lambda: replace(RUN, policy=PolicyConfig(algorithm="nft"), ema_decay=0.9), "leave ema_decay out"),
        (
            lambda: replace(
                RUN, policy=PolicyConfig(algorithm="guard"), rollout=RolloutConfig(micro_batch=8, dtype="bfloat16")
            ),
            "guard needs rollout.dtype=float32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(DeepGenError, match=message):
        make()
