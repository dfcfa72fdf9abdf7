"""Collects what a step learns from: groups of images sampled by the policy, and their rewards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.data.vision_inputs import to_uint8
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference.conditioning import PromptEncoder
from deepgen_jax.inference.programs import Condition, vae_decode
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.mesh import batch_sharding, batch_size_multiple, replicated
from deepgen_jax.rewards.base import RewardSample
from deepgen_jax.rewards.mixture import RewardMixture
from deepgen_jax.rewards.result import RewardResult, empty_result
from deepgen_jax.rl import step_metrics
from deepgen_jax.rl.algorithms import get_algorithm
from deepgen_jax.rl.programs import GRPOPrograms, guidance_scale, rollout_settings
from deepgen_jax.rl.prompts import PromptSample
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.rl.rollout import Trajectory, image_keys, initial_noise, rollout
from deepgen_jax.training.partition import Tree
from deepgen_jax.training.weights import Weights


class Experience(NamedTuple):
    """Images of a step, over all hosts.

    Attributes:
      condition: of the step's prompts, or with guidance of pairs, on every device.
      latents: clean, in micro-batches [m, C, h, w].
      trajectories: of the micro-batches; empty where the algorithm needs none.
      pixels: the groups that this host scored, uint8 [group, H, W, 3] each.
      rewards: of their images.
      waited: seconds for rewards after the last rollout.
    """

    condition: Condition
    latents: list[jax.Array]
    trajectories: list[Trajectory]
    pixels: list[np.ndarray]
    rewards: RewardResult
    waited: float


class ExperienceCollector:
    """Samples a step's images in micro-batches; one is scored on the host while the next is sampled.

    Attributes:
      model: the network that samples and learns.
      encoders: the network of the frozen parts.
      tokens: of an image's latents.
      tokenize: raises a DeepGenError where a prompt cannot be used.
    """

    def __init__(
        self,
        config: GRPOConfig,
        mesh: Mesh,
        weights: Weights,
        programs: GRPOPrograms,
        encoders: DeepGen,
        rewards: RewardMixture,
    ) -> None:
        """Sets up; nothing is sampled.

        Args:
          config: of the run.
          mesh: of all hosts' devices.
          weights: as loaded; frozen parts are used.
          programs: of the run.
          encoders: the network of the frozen parts.
          rewards: scores the images.
        """
        self._config, self._mesh, self._rewards = config, mesh, rewards
        self.model, self.encoders = programs.model, encoders
        parts = {part: weights.frozen[part] for part in ("text", "bridge", "vision")}
        self._encoder = PromptEncoder(encoders, parts, PromptTokenizer(weights.tokenizer, weights.config), mesh)
        self.tokenize = self._encoder.tokenize
        self._vae = {"vae": weights.frozen["vae"]}
        canvas, mmdit = programs.canvas, weights.config.mmdit
        self._settings, self._guidance = rollout_settings(config, canvas), guidance_scale(config)
        self.tokens = tokens = canvas.height * canvas.width // mmdit.patch_size**2
        width = mmdit.in_channels * mmdit.patch_size**2
        self._sigmas = np.asarray(make_sigmas(weights.scheduler, config.rollout.steps, tokens))

        def start(seed: jax.Array, prompts: jax.Array) -> tuple[jax.Array, jax.Array]:
            group, share = config.rollout.group_size, config.rollout.share_noise
            images = (prompts[:, None] * group + jnp.arange(group, dtype=jnp.uint32)).ravel()
            return initial_noise(seed, prompts, group, (tokens, width), share), image_keys(seed, images)

        everywhere = replicated(mesh)
        self._start = jax.jit(start, out_shardings=(batch_sharding(mesh, 3), everywhere))
        self._replicate = jax.jit(lambda tree: tree, out_shardings=everywhere)
        self._split = jax.jit(lambda images: images, out_shardings=batch_sharding(mesh, 4))
        self._pixels = jax.jit(to_uint8, out_shardings=everywhere)

    def collect(self, prompts: Sequence[PromptSample], variables: Tree) -> Experience:
        """Samples and scores a group of images for each prompt.

        Args:
          prompts: of the step, over all hosts.
          variables: of the policy that samples, see ``policy.policy_variables``.

        Raises:
          DeepGenError: rewards are missing, on this host or another.
        """
        config, sides = self._config.rollout, 1 if self._guidance is None else 2
        condition = self._condition(prompts)
        scoring = _Scoring(self._rewards, prompts)
        latents: list[jax.Array] = []
        trajectories: list[Trajectory] = []
        sampled: tuple[range, jax.Array] | None = None
        for chunk in self._chunks(len(prompts)):
            noise, keys = self.start([prompts[place] for place in chunk])
            rows = slice(chunk.start * sides, chunk.stop * sides)
            own = Condition(*(x[rows] for x in condition))
            final, trajectory = rollout(
                self.model, self._settings, variables, noise, own, self._sigmas, config.eta, keys, self._guidance
            )
            latents.append(self._split(final))
            decoded = vae_decode(self.encoders, self._vae, latents[-1], one_by_one=self._mesh.size == 1)
            if trajectory is not None and get_algorithm(self._config.policy.algorithm).trajectory:
                trajectories.append(trajectory)
            if sampled is not None:
                scoring.submit(*sampled)
            # On every device, because a group that one host scores may have been sampled by several.
            sampled = chunk, self._pixels(decoded)
        if sampled is not None:
            scoring.submit(*sampled)
        start = time.perf_counter()
        rewards = scoring.collect()
        return Experience(condition, latents, trajectories, scoring.pixels, rewards, time.perf_counter() - start)

    def start(self, prompts: Sequence[PromptSample]) -> tuple[jax.Array, jax.Array]:
        """Initial noise [m, T, D] and keys [m] of the images of prompts."""
        return self._start(np.uint32(self._config.seed), np.array([prompt.index for prompt in prompts], np.uint32))

    def _chunks(self, prompts: int) -> list[range]:
        """Places of the prompts of each rollout micro-batch."""
        at_once = self._config.rollout.micro_batch // self._config.rollout.group_size
        return [range(first, first + at_once) for first in range(0, prompts, at_once)]

    def _condition(self, prompts: Sequence[PromptSample]) -> Condition:
        """Of all prompts of the step, or of pairs with the empty prompt; computed once."""
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
        return self._replicate(Condition(*(x[:used] for x in condition)))


class _Scoring:
    """Rewards in progress of this host's groups of a step.

    Attributes:
      pixels: uint8 [group, H, W, 3] of each group.
    """

    def __init__(self, rewards: RewardMixture, prompts: Sequence[PromptSample]) -> None:
        self._rewards, self._prompts = rewards, prompts
        self._futures: list[Future[RewardResult]] = []
        self.pixels: list[np.ndarray] = []

    def submit(self, chunk: range, images: jax.Array) -> None:
        """Starts scoring this host's groups of a micro-batch; ``images`` are those of all, uint8 [m, H, W, 3]."""
        groups = rearrange(np.asarray(images.addressable_data(0)), "(p g) h w c -> p g h w c", p=len(chunk))
        samples: list[RewardSample] = []
        weights: list[Mapping[str, float]] = []
        for place in step_metrics.own_groups(chunk):
            prompt, group = self._prompts[place], groups[place - chunk.start]
            self.pixels.append(group)
            samples += [RewardSample(image, prompt.text, prompt.index, prompt.metadata) for image in group]
            weights += [prompt.rewards] * len(group)
        if samples:
            self._futures.append(self._rewards.submit(samples, weights))

    def collect(self) -> RewardResult:
        """Waits for all rewards of this host."""
        with step_metrics.failing_together():
            return self._rewards.collect(self._futures) if self._futures else empty_result(self._rewards.names)
