"""Stage 3 as the training loop drives it: sample groups of images, have them scored, learn from them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.data.vision_inputs import to_uint8
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference import programs
from deepgen_jax.inference.conditioning import PromptEncoder
from deepgen_jax.models import flops
from deepgen_jax.models import patches as grids
from deepgen_jax.models.attention import choose_kernel
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.parallel.mesh import batch_sharding, batch_size_multiple, replicated
from deepgen_jax.random_keys import Rollout
from deepgen_jax.rewards.base import RewardSample
from deepgen_jax.rewards.mixture import RewardMixture
from deepgen_jax.rewards.result import RewardResult, nothing
from deepgen_jax.rl import advantages as advantage
from deepgen_jax.rl import report
from deepgen_jax.rl.algorithms import ALGORITHMS
from deepgen_jax.rl.policy import policy_variables
from deepgen_jax.rl.prompts import PromptSample, check_prompts, load_prompts
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.rl.rollout import Trajectory, concatenated, image_keys, initial_noise, rollout
from deepgen_jax.rl.step import (
    canvas_of,
    guidance_scale,
    learning_passes,
    make_update,
    policy_model,
    rollout_settings,
    run_optimizer,
)
from deepgen_jax.rl.update import UpdateKeys
from deepgen_jax.training.stage import StepReport, check_micro_batch, make_pipeline
from deepgen_jax.training.state import TrainState, parts, shardings_of, start_state
from deepgen_jax.training.step_batches import StepBatch, StepBatches, open_loader
from deepgen_jax.training.weights import load_start

if TYPE_CHECKING:
    from deepgen_jax.inference.pipeline import DeepGenPipeline

Params = dict[str, Any]


class Rolled(NamedTuple):
    """Images of a step, over all hosts.

    Attributes:
      latents: clean, in micro-batches [m, C, h, w].
      trajectories: of the micro-batches; empty where the algorithm needs none.
      pixels: the groups that this host has scored, uint8 [group, H, W, 3] each.
      rewards: of their images.
    """

    latents: list[jax.Array]
    trajectories: list[Trajectory]
    pixels: list[np.ndarray]
    rewards: RewardResult


class GRPOStage:
    """MR-GRPO and its relatives; see `deepgen_jax.training.stage.Stage`."""

    state: TrainState

    def __init__(self, config: GRPOConfig, mesh: Mesh) -> None:
        """Loads the weights onto the mesh, reads the prompts and makes the rewards.

        Raises:
          DeepGenError: weights, prompts, rewards or data cannot be used, or micro-batches do not fit the mesh.
        """
        check_micro_batch("policy.micro_batch", config.policy.micro_batch, mesh)
        check_micro_batch("rollout.micro_batch", config.rollout.micro_batch, mesh)
        self._config, self._mesh = config, mesh
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
        self._load(config, mesh)
        self._step_number = 0

    def _load(self, config: GRPOConfig, mesh: Mesh) -> None:
        """Weights, models and the jitted update."""
        weights = load_start(config, mesh)
        dtype, algorithm = jnp.dtype(config.dtype), ALGORITHMS[config.policy.algorithm]
        self._algorithm = algorithm
        self._reference: Params | None = None
        if config.policy.beta and (weights.trainable["params"] or weights.adapters_begun):
            # The starting values, rounded as the computation rounds its weights anyway; adapters are added unrounded.
            @jax.jit
            def beginning(params: Params, lora: Params) -> Params:
                return {"params": jax.tree.map(lambda x: x.astype(dtype), params), "lora": lora}

            self._reference = beginning(weights.trainable["params"], weights.trainable["lora"])
        optimizer = run_optimizer(config)
        average = config.ema_decay is not None or algorithm.old_policy
        self.state = start_state(optimizer, weights.trainable, mesh, ema=average)
        self._weights = weights._replace(trainable={})
        self._model = policy_model(config, weights.config, mesh)
        attention = choose_kernel(mesh, config.dtype)
        self._encoders = DeepGen(weights.config, dtype=dtype, attention=attention)
        conditioned = {part: weights.frozen[part] for part in ("text", "bridge", "vision")}
        tokenizer = PromptTokenizer(weights.tokenizer, weights.config)
        self._encoder = PromptEncoder(self._encoders, conditioned, tokenizer, mesh)
        check_prompts(self._prompts.datasets, self._encoder.tokenize)
        self._feed: StepBatches | None = None
        self._loader = None
        if config.data is not None and config.policy.sft_weight:
            check_micro_batch("data.micro_batch", config.data.micro_batch, mesh)
            self._loader = open_loader(config, config.data, weights, mesh)
            self._feed = StepBatches(
                self._loader,
                self._encoders,
                weights.frozen,
                mesh,
                accumulation=1,
                seed=config.seed,
                trains=("mmdit",),
            )
        self._frozen = {part: tree for part, tree in weights.frozen.items() if part not in ("vae", "vision")}

        self._canvas = canvas_of(config, weights.config, mesh)
        tokens = self._canvas.height * self._canvas.width // weights.config.mmdit.patch_size**2
        self._sigmas = np.asarray(make_sigmas(weights.scheduler, config.rollout.steps, tokens))
        self._guidance = guidance_scale(config)
        self._tokens = tokens
        step = make_update(config, self._model, optimizer, weights.scheduler, weights.lora_scale, self._canvas)
        everywhere = replicated(mesh)
        self._update = device_jit(step, donate_argnums=0, out_shardings=(shardings_of(self.state), everywhere))
        width = weights.config.mmdit.in_channels * weights.config.mmdit.patch_size**2

        def begin(seed: jax.Array, prompts: jax.Array) -> tuple[jax.Array, jax.Array]:
            group, share = config.rollout.group_size, config.rollout.share_noise
            images = (prompts[:, None] * group + jnp.arange(group, dtype=jnp.uint32)).ravel()
            return initial_noise(seed, prompts, group, (tokens, width), share), image_keys(seed, images)

        def update_key(seed: jax.Array, step: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), Rollout.UPDATE), step)

        self._begin = jax.jit(begin, out_shardings=(batch_sharding(mesh, 3), everywhere))
        self._update_key = jax.jit(update_key, out_shardings=everywhere)
        self._everywhere = jax.jit(lambda tree: tree, out_shardings=everywhere)
        self._split = jax.jit(lambda images: images, out_shardings=batch_sharding(mesh, 4))
        self._pixels = jax.jit(to_uint8, out_shardings=everywhere)

    def step(self) -> StepReport:
        """One rollout and the optimiser updates that learn from it."""
        config, step = self._config, self._step_number
        prompts = self._prompts[step]
        start = time.perf_counter()
        condition = self._condition(prompts)
        rolled, waited = self._roll_out(prompts, condition)
        rewards, weights = report.over_hosts(rolled.rewards, len(prompts), config.rollout.group_size)
        rolled_at = time.perf_counter()
        scores = np.asarray(
            advantage.compute(config.policy.advantage, rewards, weights, config.rollout.group_size)
        )
        metrics, batches = self._learn(step, rolled, condition, scores)
        seconds = {
            "rollout": rolled_at - start - waited,
            "reward": waited,
            "update": time.perf_counter() - rolled_at,
            "data": sum(batch.seconds for batch in batches),
        }
        self._step_number += 1
        group = config.rollout.group_size
        metrics |= report.reward_metrics(self._rewards.names, rewards, weights, scores, prompts, group)
        metrics |= report.failure_metrics(rolled.rewards)
        metrics |= {f"reward_client/{name}": float(count) for name, count in self._rewards.counts().items()}
        pictures = {}
        if config.pictures_every and (step + 1) % config.pictures_every == 0 and rolled.pixels:
            pictures["rollout"] = report.picture(np.concatenate(rolled.pixels), rolled.rewards, group)
        images = len(prompts) * group
        ids = [f"{prompt.dataset}/{prompt.index}" for prompt in prompts]
        ids += [name for batch in batches for name in batch.sample_ids]
        operations = self._flops(condition) + sum(batch.flops for batch in batches)
        return StepReport(metrics, images, images * self._tokens, operations, ids, seconds, pictures)

    def _chunks(self, prompts: Sequence[PromptSample]) -> list[range]:
        """Places of the prompts of each rollout micro-batch."""
        at_once = self._config.rollout.micro_batch // self._config.rollout.group_size
        return [range(first, first + at_once) for first in range(0, len(prompts), at_once)]

    def _condition(self, prompts: Sequence[PromptSample]) -> programs.Condition:
        """Of all prompts of the step, or of pairs with the empty prompt; computed once, kept on every device."""
        texts = [prompt.text for prompt in prompts]
        pairs = None
        if self._guidance is not None:
            pairs = [text for own in texts for text in ("", own)]
            texts = [text for own in texts for text in (own, "")]
        used = len(texts)
        missing = -used % batch_size_multiple(self._mesh)
        texts += texts[-1:] * missing
        pairs = pairs and pairs + pairs[-1:] * missing
        condition = self._encoder.condition(texts, [None] * len(texts), "reference", pairs)
        return self._everywhere(programs.Condition(*(x[:used] for x in condition)))

    def _roll_out(
        self, prompts: Sequence[PromptSample], condition: programs.Condition
    ) -> tuple[Rolled, float]:
        """Samples every micro-batch; one is scored on the host while the next is sampled."""
        config = self._config.rollout
        policy = self.state.ema if self._algorithm.old_policy else self.state.trainable
        variables = policy_variables(self._frozen, policy, self._weights.lora_scale)
        settings = rollout_settings(self._config, self._canvas)
        sides = 1 if self._guidance is None else 2
        vae = {"vae": self._weights.frozen["vae"]}
        latents: list[jax.Array] = []
        trajectories: list[Trajectory] = []
        pixels: list[np.ndarray] = []
        futures: list[Future[RewardResult]] = []
        waiting: tuple[range, jax.Array] | None = None
        for chunk in self._chunks(prompts):
            numbers = np.array([prompts[place].index for place in chunk], np.uint32)
            noise, keys = self._begin(np.uint32(self._config.seed), numbers)
            rows = slice(chunk.start * sides, chunk.stop * sides)
            own = programs.Condition(*(x[rows] for x in condition))
            final, trajectory = rollout(
                self._model, settings, variables, noise, own, self._sigmas, config.eta, keys, self._guidance
            )
            final = self._split(final)
            decoded = programs.vae_decode(self._encoders, vae, final, one_by_one=self._mesh.size == 1)
            latents.append(final)
            if trajectory is not None and self._algorithm.trajectory:
                trajectories.append(trajectory)
            if waiting is not None:
                self._submit(prompts, *waiting, pixels, futures)
            # On every device, because a group that one host scores may have been sampled by several.
            waiting = chunk, self._pixels(decoded)
        if waiting is not None:
            self._submit(prompts, *waiting, pixels, futures)
        start = time.perf_counter()
        with report.failing_together():
            result = self._rewards.collect(futures) if futures else nothing(self._rewards.names)
        return Rolled(latents, trajectories, pixels, result), time.perf_counter() - start

    def _submit(
        self,
        prompts: Sequence[PromptSample],
        chunk: range,
        sampled: jax.Array,
        pixels: list[np.ndarray],
        futures: list[Future[RewardResult]],
    ) -> None:
        """Has this host's groups of a micro-batch scored; ``sampled`` are the images of all, uint8 [m, H, W, 3]."""
        groups = rearrange(np.asarray(sampled.addressable_data(0)), "(p g) h w c -> p g h w c", p=len(chunk))
        samples: list[RewardSample] = []
        weights: list[Mapping[str, float]] = []
        for place in report.own_groups(chunk):
            prompt, images = prompts[place], groups[place - chunk.start]
            pixels.append(images)
            samples += [RewardSample(image, prompt.text, prompt.index, prompt.metadata) for image in images]
            weights += [prompt.rewards] * len(images)
        if samples:
            futures.append(self._rewards.submit(samples, weights))

    def _learn(
        self, step: int, rolled: Rolled, condition: programs.Condition, scores: np.ndarray
    ) -> tuple[dict[str, Any], list[StepBatch]]:
        """The updates of a rollout."""
        config = self._config
        key = self._update_key(np.uint32(config.seed), np.uint32(step))
        if self._algorithm.trajectory:
            learned: tuple[Any, ...] = (concatenated(rolled.trajectories), condition, scores)
            rolled.trajectories.clear()  # not held twice while the policy learns
        else:
            patches = [grids.patchify(x, self._weights.config.mmdit.patch_size) for x in rolled.latents]
            numbers = np.array([prompt.index for prompt in self._prompts[step]], np.uint32)
            keys = self._begin(np.uint32(config.seed), numbers)[1]
            learned = (jnp.concatenate(patches), condition, scores, keys)
        updates: list[dict[str, np.ndarray]] = []
        batches = []
        for part in range(config.policy.updates_per_rollout):
            micro_batches, sft_keys = {}, {}
            if self._feed is not None:
                batches.append(next(self._feed))
                micro_batches, sft_keys = batches[-1].micro_batches, batches[-1].keys
            keys_of_update = UpdateKeys(key, sft_keys)
            self.state, metrics = self._update(
                self.state, self._frozen, self._reference, *learned, micro_batches, keys_of_update, np.int32(part)
            )
            updates.append(jax.device_get(metrics))
            if part == 0 and self._algorithm.trajectory:
                self._check_ratio(step, float(metrics["first_ratio_deviation"]))
        return report.of_updates(updates), batches

    def _check_ratio(self, step: int, deviation: float) -> None:
        policy = self._config.policy
        allowed = policy.tolerance(self._config.dtype)
        # A deviation that is not finite comes from a loss that is not, which the step skips and the loop counts.
        if policy.check_ratio and deviation > allowed:
            raise DeepGenError(
                f"step {step + 1}: before any update the importance ratio is off by {deviation:.1e}, more than "
                f"{allowed:.1e}, so rollout and update disagree; use dtype=float32, or go on with "
                "policy.check_ratio=false"
            )

    def _flops(self, condition: programs.Condition) -> float:
        """Rollout, reference and updates."""
        config, model = self._config, self._weights.config
        sides = 1 if self._guidance is None else 2
        one = sides * flops.mmdit(model.mmdit, self._tokens, condition.sequence.shape[1])
        images = config.prompts_per_step * config.rollout.group_size
        return float(images * one * (config.rollout.steps + learning_passes(config)))

    def position(self) -> dict[str, Any]:
        """The seed, the number of rollouts, what their prompts depend on, and where the auxiliary data stand."""
        data = None if self._loader is None else self._loader.get_state()
        return {
            "seed": self._config.seed,
            "rollouts": self._step_number,
            "prompts": self._prompts.order,
            "data": data,
        }

    def resume(self, state: TrainState, position: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
          DeepGenError: prompts or auxiliary data would come in another order than the run began with.
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

    def pipeline(self) -> DeepGenPipeline:
        """The model as it is now."""
        return make_pipeline(self._weights, self.state, self._config.dtype, self._mesh)

    def summary(self) -> list[str]:
        """What trains, on how many images, by which rewards."""
        config = self._config
        trees = parts(self.state.trainable)
        trained = ", ".join(f"{name} {sum(x.size for x in jax.tree.leaves(tree)):,}" for name, tree in trees.items())
        shares = zip(self._prompts.datasets, self._prompts.shares, strict=True)
        prompts = ", ".join(f"{dataset.name} {share:.0%}" for dataset, share in shares)
        return [
            f"trains {trained} parameters by {config.policy.algorithm}; {config.prompts_per_step} prompts x "
            f"{config.rollout.group_size} images a step",
            f"rewards {', '.join(self._rewards.names)}; prompts {prompts}",
        ]

    def close(self) -> None:
        """Ends reading ahead and drops rewards under way."""
        if self._loader is not None:
            self._loader.close()
        self._rewards.close()
