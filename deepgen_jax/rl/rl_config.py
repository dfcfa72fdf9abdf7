"""Frozen dataclasses that describe a run of reinforcement learning; defaults are Tables 10 and 11 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.local_paths import LocalPath
from deepgen_jax.rewards.registry import RewardConfig
from deepgen_jax.rl.algorithms import ALGORITHMS, NFT
from deepgen_jax.settings import at_least
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import RunConfig, Trainable

Sampler = Literal["cps", "flow", "dance", "ode"]


@dataclass(frozen=True)
class PromptsConfig:
    """Prompts and how they are drawn; see ``prompts.load_prompts``.

    Attributes:
      path: a .txt, .jsonl or .parquet file, or a YAML that lists several with their weights and rewards.
      mode: "sample_proportional" (a data set's weight multiplies its size) or "weight_only"; None as the YAML says.
      rewards: weights of the rewards by name, for a single file; a YAML has its own.
      absent: what to do about files that a YAML names and that are not there.
    """

    path: LocalPath
    mode: Literal["sample_proportional", "weight_only"] | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    absent: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of the rollout.

    Attributes:
      sampler: "cps" (noise-preserving, paper eq. 6), "flow" (Flow-SDE), "dance" (Dance-SDE), or "ode", which only an
        algorithm without trajectories can learn from.
      steps: of denoising.
      eta: strength of the noise.
      group_size: images of one prompt, G.
      size: side of the images in pixels.
      guidance_scale: of classifier-free guidance; 0 samples from the conditional velocity alone.
      share_noise: the images of a group start from the same noise and differ by that of the steps.
      micro_batch: images rolled out at once, whole groups.
      dtype: of the stored trajectory.
    """

    sampler: Sampler = "cps"
    steps: int = 50
    eta: float = 1.0
    group_size: int = 8
    size: int = 512
    guidance_scale: float = 0.0
    share_noise: bool = True
    micro_batch: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        at_least("rollout.steps", self.steps, 2)
        at_least("rollout.group_size", self.group_size, 2)
        at_least("rollout.guidance_scale", self.guidance_scale, 0)
        if self.sampler == "cps" and not 0 < self.eta <= 1:
            raise DeepGenError(f"rollout.eta is {self.eta}; cps needs it above 0 and at most 1")
        if self.sampler != "ode" and self.eta <= 0:
            raise DeepGenError(f"rollout.eta is {self.eta}; it must be above 0, or images of a group do not differ")
        if self.size <= 0 or self.size % 32:
            raise DeepGenError(f"rollout.size is {self.size}; it must be a multiple of 32")
        if self.micro_batch <= 0 or self.micro_batch % self.group_size:
            raise DeepGenError(
                f"rollout.micro_batch is {self.micro_batch}; it must hold whole groups of {self.group_size} images"
            )
        if self.sampler == "ode" and self.share_noise:
            raise DeepGenError("rollout: with the ode, images that share their noise are equal; set share_noise=false")


@dataclass(frozen=True)
class NFTConfig:
    """Settings specific to DiffusionNFT.

    Attributes:
      strength: beta of the implicit policies, v_old +- beta (v - v_old).
      draws: noise levels drawn for each image in an update.
      decay_slope, decay_max: after update i the old policy is decay * old + (1 - decay) * new with decay =
        min(decay_slope * i, decay_max).
    """

    strength: float = 1.0
    draws: int = 10
    decay_slope: float = 0.001
    decay_max: float = 0.5

    def __post_init__(self) -> None:
        at_least("policy.nft.draws", self.draws, 1)
        if self.strength <= 0:
            raise DeepGenError(f"policy.nft.strength is {self.strength}; it must be above 0")
        if self.decay_slope < 0 or not 0 <= self.decay_max < 1:
            raise DeepGenError("policy.nft: decay_slope must be at least 0 and decay_max at least 0 and below 1")


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the policy update.

    Attributes:
      algorithm: "grpo" (paper eq. 3), "guard" (GRPO-Guard), "nft" (DiffusionNFT), another name of
        ``algorithms.ALGORITHMS``, or ``file.py:function`` of a surrogate loss.
      advantage: a kind of ``advantages.compute``.
      clip: range of the importance ratio.
      beta: weight of the KL penalty; 0 leaves the reference policy out.
      kl: "velocity" (eq. 4), "velocity_scaled" or "latent"; see ``objective.penalty``.
      timestep_fraction: share of the steps that an update learns from, drawn without replacement from all but the last.
      updates_per_rollout: optimiser updates, each from its own random part of the images.
      micro_batch: images that the network sees at once.
      sft_weight: lambda of (1 - lambda) GRPO + lambda SFT (eq. 5).
      check_ratio: stop where a ratio of a rollout's first update is not 1.
      ratio_tolerance: largest deviation allowed; None for 1e-6 in float32, and in bfloat16 for half the clip range.
      log_part_norms: log the gradient norms of policy, penalty and auxiliary loss separately; costs two more
        gradients in memory and a second backward pass through the network.
      nft: settings of "nft".
    """

    algorithm: str = "grpo"
    advantage: Literal["gdpo", "grpo", "grpo_global_std", "reinforcepp"] = "gdpo"
    clip: float = 1e-4
    beta: float = 5e-7
    kl: Literal["velocity", "velocity_scaled", "latent"] = "velocity"
    timestep_fraction: float = 0.6
    updates_per_rollout: int = 1
    micro_batch: int = 32
    sft_weight: float = 1e-4
    check_ratio: bool = True
    ratio_tolerance: float | None = None
    log_part_norms: bool = False
    nft: NFTConfig = field(default_factory=NFTConfig)

    def __post_init__(self) -> None:
        ALGORITHMS.target(self.algorithm, "policy.algorithm")
        at_least("policy.beta", self.beta, 0)
        at_least("policy.updates_per_rollout", self.updates_per_rollout, 1)
        at_least("policy.micro_batch", self.micro_batch, 1)
        if self.clip <= 0:
            raise DeepGenError(f"policy.clip is {self.clip}; it must be above 0")
        if not 0 < self.timestep_fraction <= 1:
            raise DeepGenError(f"policy.timestep_fraction is {self.timestep_fraction}; it must be above 0, at most 1")
        if not 0 <= self.sft_weight < 1:
            raise DeepGenError(f"policy.sft_weight is {self.sft_weight}; it must be at least 0 and below 1")

    def tolerance(self, dtype: str) -> float:
        """Largest deviation of a first ratio from 1 when the computation is in ``dtype``."""
        if self.ratio_tolerance is not None:
            return self.ratio_tolerance
        return 1e-6 if dtype == "float32" else self.clip / 2


def _published_optimizer() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=2e-6, schedule="constant", warmup=20, beta2=0.999, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RunConfig):
    """Stage 3: reinforcement learning with mixed rewards.

    Attributes:
      trains: ("mmdit",), or ("mmdit_lora",) for adapters on it, which need no second copy as reference.
      rollout, policy, prompts: see their classes.
      rewards: the mixture.
      prompts_per_step: prompts of a rollout; times the group size it is the batch.
      data: what the auxiliary supervised loss learns from; None leaves it out.
      required_reward_share: share of the samples that want a reward which must have it, or it is asked for again.
      pictures_every: steps between pictures of the first groups with their scores; 0 for none.
    """

    steps: int = 1500
    trains: tuple[Trainable, ...] = ("mmdit",)
    optimizer: OptimizerConfig = field(default_factory=_published_optimizer)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompts: PromptsConfig
    rewards: tuple[RewardConfig, ...]
    prompts_per_step: int = 32
    data: DataConfig | None = None
    required_reward_share: float = 0.8
    pictures_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("prompts_per_step", self.prompts_per_step, 1)
        if self.trains not in (("mmdit",), ("mmdit_lora",)):
            raise DeepGenError(f"trains is {self.trains}; reinforcement learning trains only mmdit or mmdit_lora")
        if not self.rewards:
            raise DeepGenError("rewards is empty; name at least one")
        if not 0 < self.required_reward_share <= 1:
            raise DeepGenError(f"required_reward_share is {self.required_reward_share}; it must be above 0, at most 1")
        images, updates = self.prompts_per_step * self.rollout.group_size, self.policy.updates_per_rollout
        at_once = self.rollout.micro_batch
        if images % at_once:
            raise DeepGenError(f"rollout.micro_batch={at_once} does not divide a step's {images} images; change it")
        if images % (updates * self.policy.micro_batch):
            raise DeepGenError(
                f"a step's {images} images do not divide into policy.updates_per_rollout={updates} parts"
                f" of whole micro-batches of {self.policy.micro_batch}; change policy.micro_batch"
            )
        if self.policy.algorithm == "guard" and self.rollout.dtype != "float32":
            # Its ratio takes the noise out of the stored step again, and rounding with it.
            raise DeepGenError(f"policy.algorithm=guard needs rollout.dtype=float32, not {self.rollout.dtype}")
        nft = self.policy.algorithm == NFT
        if not nft and self.rollout.sampler == "ode":
            raise DeepGenError(f"policy.algorithm={self.policy.algorithm} needs a stochastic rollout.sampler, not ode")
        if nft and self.ema_decay is not None:
            raise DeepGenError("policy.algorithm=nft keeps its old policy as the moving average; leave ema_decay out")
