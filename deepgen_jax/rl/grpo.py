"""Stage 3, reinforcement learning (MR-GRPO and relatives): sample groups of images, score them, learn from them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import flops
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen, make_network
from deepgen_jax.parallel.mesh import check_batch
from deepgen_jax.rewards.mixture import RewardMixture
from deepgen_jax.rl import step_metrics
from deepgen_jax.rl.abstract_programs import ABSTRACT_PROGRAMS, workload
from deepgen_jax.rl.advantages import compute
from deepgen_jax.rl.algorithms import get_algorithm
from deepgen_jax.rl.experience import Experience, ExperienceCollector
from deepgen_jax.rl.programs import jit_update_key, learning_passes, make_programs, policy_weights
from deepgen_jax.rl.prompts import PromptSample, check_prompts, load_prompts
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.rl.rollout import concatenated
from deepgen_jax.rl.update import UpdateKeys
from deepgen_jax.training.abstract_run import Compilable
from deepgen_jax.training.stage import StepReport, make_pipeline
from deepgen_jax.training.state import TrainState, parameter_counts
from deepgen_jax.training.step_batches import StepBatch, StepBatches, open_loader
from deepgen_jax.training.weights import Weights, load_start
from deepgen_jax.user_warnings import warn_user

if TYPE_CHECKING:
    from deepgen_jax.inference.pipeline import DeepGenPipeline


class GRPOStage:
    """Reinforcement learning of the MMDiT; see `deepgen_jax.training.stage.Stage`."""

    abstract_programs: ClassVar[Mapping[str, Compilable]] = ABSTRACT_PROGRAMS
    workload = staticmethod(workload)

    state: TrainState

    def __init__(self, config: GRPOConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh, reads the prompts and makes the rewards.

        Raises:
          DeepGenError: weights, prompts, rewards or data cannot be used, or micro-batches do not fit the mesh.
        """
        check_batch("policy.micro_batch", config.policy.micro_batch, mesh)
        check_batch("rollout.micro_batch", config.rollout.micro_batch, mesh)
        self._config, self._mesh, self._step_number = config, mesh, 0
        self._algorithm = get_algorithm(config.policy.algorithm)
        self._prompts = load_prompts(
            config.prompts.path,
            config.prompts_per_step,
            seed=config.seed,
            mode=config.prompts.mode,
            rewards=config.prompts.rewards or None,
            absent=config.prompts.absent,
        )
        self._rewards = RewardMixture(
            config.rewards, group_size=config.rollout.group_size, required_share=config.required_reward_share
        )
        self._rewards.check(self._prompts.rewards)
        if unused := self._rewards.unused(self._prompts.rewards):
            warn_user(f"no data set of prompts has a weight for the reward {', '.join(unused)}; it is not computed")

        weights = load_start(config, mesh)
        self.state, self._programs = make_programs(config, weights, mesh)
        # What the state was made from was donated to it.
        self._weights = weights = weights._replace(trainable={})
        encoders = make_network(weights.config, mesh, config.dtype)
        self._collector = ExperienceCollector(config, mesh, weights, self._programs, encoders, self._rewards)
        check_prompts(self._prompts.datasets, self._collector.tokenize)
        self._open_auxiliary_data(encoders, weights)
        self._update_key = jit_update_key(mesh)

    def _open_auxiliary_data(self, encoders: DeepGen, weights: Weights) -> None:
        config, mesh = self._config, self._mesh
        self._loader = None
        self._batches: StepBatches | None = None
        if config.data is not None and config.policy.sft_weight:
            check_batch("data.micro_batch", config.data.micro_batch, mesh)
            self._loader = open_loader(config, config.data, weights, mesh)
            self._batches = StepBatches(
                self._loader,
                encoders,
                weights.frozen,
                mesh,
                accumulation=1,
                seed=config.seed,
                operations=partial(flops.training, weights.config, ("mmdit",)),
            )

    def step(self) -> StepReport:
        """Takes one rollout and the optimiser updates that learn from it."""
        config, group = self._config, self._config.rollout.group_size
        prompts = self._prompts[self._step_number]
        start = time.perf_counter()
        variables = policy_weights(config, self._programs.frozen, self.state, self._weights.lora_scale)
        experience = self._collector.collect(prompts, variables)
        rewards, reward_weights = step_metrics.over_hosts(experience.rewards, len(prompts), group)
        collected = time.perf_counter()
        advantages = np.asarray(compute(config.policy.advantage, rewards, reward_weights, group))
        metrics, batches = self._learn(prompts, experience, advantages)
        seconds = {
            "rollout": collected - start - experience.waited,
            "reward": experience.waited,
            "update": time.perf_counter() - collected,
            "data": sum(batch.seconds for batch in batches),
        }
        self._step_number += 1
        metrics |= step_metrics.reward_metrics(self._rewards.names, rewards, reward_weights, advantages, prompts, group)
        metrics |= step_metrics.failure_metrics(experience.rewards)
        metrics |= {f"reward_client/{name}": float(count) for name, count in self._rewards.counts().items()}
        pictures = {}
        if config.pictures_every and self._step_number % config.pictures_every == 0 and experience.pixels:
            pictures["rollout"] = step_metrics.picture(np.concatenate(experience.pixels), experience.rewards, group)
        images, tokens = len(prompts) * group, self._collector.tokens
        ids = [f"{prompt.dataset}/{prompt.index}" for prompt in prompts]
        ids += [name for batch in batches for name in batch.sample_ids]
        operations = self._flops(experience) + sum(batch.flops for batch in batches)
        return StepReport(metrics, images, images * tokens, operations, ids, seconds, pictures)

    def _learn(
        self, prompts: Sequence[PromptSample], experience: Experience, advantages: np.ndarray
    ) -> tuple[dict[str, Any], list[StepBatch]]:
        """The updates of a rollout: their metrics, and the auxiliary batches that they used."""
        config = self._config
        key = self._update_key(np.uint32(config.seed), np.uint32(self._step_number))
        learned: tuple[Any, ...]
        if self._algorithm.trajectory:
            learned = (concatenated(experience.trajectories), experience.condition, advantages)
            experience.trajectories.clear()  # not held twice while the policy learns
        else:
            patches = [grids.patchify(x, self._weights.config.mmdit.patch_size) for x in experience.latents]
            keys = self._collector.start(prompts)[1]
            learned = (jnp.concatenate(patches), experience.condition, advantages, keys)
        updates: list[dict[str, np.ndarray]] = []
        batches: list[StepBatch] = []
        for part in range(config.policy.updates_per_rollout):
            micro_batches, sft_keys = {}, {}
            if self._batches is not None:
                batches.append(next(self._batches))
                micro_batches, sft_keys = batches[-1].micro_batches, batches[-1].keys
            update_keys = UpdateKeys(key, sft_keys)
            frozen, reference = self._programs.frozen, self._programs.reference
            self.state, metrics = self._programs.update(
                self.state, frozen, reference, *learned, micro_batches, update_keys, np.int32(part)
            )
            updates.append(jax.device_get(metrics))
            if part == 0 and self._algorithm.trajectory:
                self._check_ratio(float(metrics["first_ratio_deviation"]))
        return step_metrics.of_updates(updates), batches

    def _check_ratio(self, deviation: float) -> None:
        policy = self._config.policy
        allowed = policy.tolerance(self._config.dtype)
        # A deviation that is not finite comes from a loss that is not, which the step skips and the loop counts.
        if policy.check_ratio and deviation > allowed:
            raise DeepGenError(
                f"step {self._step_number + 1}: before any update the importance ratio is off by {deviation:.1e}, more "
                f"than {allowed:.1e}, so rollout and update disagree; use dtype=float32, or continue with "
                "policy.check_ratio=false"
            )

    def _flops(self, experience: Experience) -> float:
        """FLOPs of rollout, reference and updates."""
        config = self._config
        sides = 2 if config.rollout.guidance_scale else 1
        tokens, length = self._collector.tokens, experience.condition.sequence.shape[1]
        one = sides * flops.mmdit(self._weights.config.mmdit, tokens, length)
        images = config.prompts_per_step * config.rollout.group_size
        return float(images * one * (config.rollout.steps + learning_passes(config)))

    def position(self) -> dict[str, Any]:
        """The seed, the number of rollouts, what the order of the prompts depends on, and the position in the data."""
        data = None if self._loader is None else self._loader.get_state()
        return {
            "seed": self._config.seed,
            "rollouts": self._step_number,
            "prompts": self._prompts.order,
            "data": data,
        }

    def resume(self, state: TrainState, position: dict[str, Any]) -> None:
        """Continues from a checkpoint.

        Raises:
          DeepGenError: the order of prompts or auxiliary data would differ from the start of the run.
        """
        if position.get("prompts", self._prompts.order) != self._prompts.order:
            raise DeepGenError(
                "the run began with other prompts, or with another number of them a step; restore prompts and "
                "prompts_per_step, or begin another run with start="
            )
        if (position["data"] is None) != (self._loader is None):
            raise DeepGenError("the run began with other auxiliary data; restore data and policy.sft_weight")
        if self._loader is not None:
            self._loader.set_state(position["data"])
        self._step_number = position["rollouts"]
        self.state = state

    def pipeline(self, average: bool = True) -> DeepGenPipeline:
        """A pipeline of the current weights: of their moving average, if there is one and it is asked for."""
        state = self.state if average else self.state._replace(ema=None)
        return make_pipeline(self._weights, state, self._config.dtype, self._mesh)

    def summary(self) -> list[str]:
        """Summary of trained parameters, images and rewards."""
        config = self._config
        shares = zip(self._prompts.datasets, self._prompts.shares, strict=True)
        prompts = ", ".join(f"{dataset.name} {share:.0%}" for dataset, share in shares)
        return [
            f"trains {parameter_counts(self.state.trainable)} parameters by {config.policy.algorithm}; "
            f"{config.prompts_per_step} prompts x {config.rollout.group_size} images a step",
            f"rewards {', '.join(self._rewards.names)}; prompts {prompts}",
        ]

    def close(self) -> None:
        """Stops reading ahead and cancels rewards in progress."""
        if self._loader is not None:
            self._loader.close()
        self._rewards.close()
