"""A tiny random model, condition, rollout and auxiliary batch for tests of reinforcement learning."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepgen_jax.config import (
    BridgeConfig,
    DeepGenConfig,
    MMDiTConfig,
    SchedulerConfig,
    TextConfig,
    VAEConfig,
    VisionConfig,
)
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.inference.programs import Condition
from deepgen_jax.models.deepgen import DeepGen, abstract_params
from deepgen_jax.rl.policy import Canvas, policy_variables
from deepgen_jax.rl.rl_config import PolicyConfig
from deepgen_jax.rl.rollout import RolloutSettings, image_keys, initial_noise, rollout
from deepgen_jax.rl.update import UpdateSettings
from deepgen_jax.training.inputs import MicroBatch, Text
from deepgen_jax.training.partition import init_lora, split
from deepgen_jax.training.supervised import StepSettings

CONFIG = DeepGenConfig(
    text=TextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        vocab_size=40,
        mrope_sections=(1, 1, 2),
    ),
    vision=VisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, full_attention_blocks=(0,), out_hidden_size=16
    ),
    bridge=BridgeConfig(num_queries=4, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2),
    mmdit=MMDiTConfig(
        num_layers=2,
        num_heads=2,
        head_dim=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        dual_attention_layers=(0,),
        pos_embed_max_size=8,
        sample_size=16,
    ),
    vae=VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2),
)
TOKENS, WIDTH, SEED = 16, 16, 3
MODEL = DeepGen(CONFIG)
SCHEDULER = SchedulerConfig()


class Case:
    """Weights, prompts and settings; ``lora`` trains only adapters."""

    def __init__(self, prompts=2, group_size=4, steps=6, lora=False, mesh=None, seed=0):
        from deepgen_jax.parallel.mesh import batch_sharding

        self.prompts, self.group_size, self.images, self.steps = prompts, group_size, prompts * group_size, steps
        self.canvas = Canvas(8, 8, group_size, mesh and batch_sharding(mesh, 1))
        params = _params(seed)
        if lora:
            self.frozen = params
            adapters = init_lora(params["mmdit"], 2, jax.random.key(1), part="mmdit")
            self.trainable, self.reference = {"params": {}, "lora": adapters}, None
        else:
            weights, self.frozen = split(params, ("mmdit",))
            self.trainable = self.reference = {"params": weights, "lora": {}}
        self.lora_scale = 2.0 if lora else 0.0
        self.condition = condition(prompts)
        self.advantages = jnp.asarray(np.random.default_rng(2).standard_normal(self.images), jnp.float32)
        self.sigmas = make_sigmas(SCHEDULER, steps)

    def variables(self, trained=None):
        return policy_variables(self.frozen, trained or self.trainable, self.lora_scale)

    def rollout(self, sampler="cps", eta=1.0, first=0, prompts=None, share=True, dtype=jnp.float32, **options):
        """Images of prompts ``first`` to ``first + prompts``."""
        prompts = prompts or self.prompts
        numbers = np.arange(first, first + prompts)
        noise = initial_noise(SEED, numbers, self.group_size, (TOKENS, WIDTH), share)
        keys = image_keys(SEED, (numbers[:, None] * self.group_size + np.arange(self.group_size)).ravel())
        settings = RolloutSettings(self.canvas, sampler, dtype)
        given = options.pop("condition", Condition(*(x[first : first + prompts] for x in self.condition)))
        return rollout(MODEL, settings, self.variables(), noise, given, self.sigmas, eta, keys, **options)

    def settings(self, sampler="cps", eta=1.0, guidance_scale=None, **policy):
        policy = {"clip": 0.2, "beta": 0.0, "sft_weight": 0.0, "micro_batch": self.images, **policy}
        supervised = StepSettings(SCHEDULER, self.lora_scale)
        return UpdateSettings(self.canvas, PolicyConfig(**policy), supervised, sampler, eta, guidance_scale)

    def moved(self, scale=0.02, seed=5):
        """Trainable parameters a random step away."""
        leaves, treedef = jax.tree.flatten(self.trainable)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noise = [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(treedef, noise)


def condition(prompts, seed=1):
    """Random condition; the second half of the last prompt is padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((prompts, 6), bool)
    mask[-1, :3] = False
    mmdit = CONFIG.mmdit
    pooled = rng.standard_normal((prompts, mmdit.pooled_projection_dim), np.float32)
    sequence = rng.standard_normal((prompts, 6, mmdit.joint_attention_dim), np.float32)
    return Condition(*map(jnp.asarray, (pooled, sequence, mask)))


def auxiliary(micro_batches=2, batch=2, length=5):
    """Text-to-image micro-batches and their keys."""
    rng = np.random.default_rng(4)
    total, shape = length + CONFIG.bridge.num_queries, (micro_batches, batch)
    positions = np.broadcast_to(np.arange(total, dtype=np.int32), (micro_batches, 3, batch, total))
    text = Text(
        rng.integers(0, 40, (*shape, length)).astype(np.int32),
        positions,
        np.ones((*shape, total), bool),
        np.ones((*shape, total), bool),
        np.full((*shape, length), -1, np.int32),
    )
    micro = MicroBatch(
        rng.standard_normal((*shape, TOKENS, WIDTH), np.float32),
        np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (*shape, TOKENS)),
        np.ones((*shape, TOKENS), bool),
        np.zeros((*shape, 0, WIDTH), np.float32),
        np.zeros((*shape, 0), np.int32),
        np.zeros((*shape, 0), bool),
        np.zeros((*shape, 0, 16), np.float32),
        np.ones(shape, np.float32),
        text,
    )
    keys = jax.random.split(jax.random.key(8), shape)
    return {"t2i": jax.tree.map(jnp.asarray, micro)}, {"t2i": keys}


def norm(tree):
    return float(optax.tree.norm(tree))


def with_policy(settings, **policy):
    return replace(settings, policy=replace(settings.policy, **policy))


@cache
def _params(seed):
    """Random weights of the parts that take part, in which no layer starts at zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = leaf.shape[-2] if path[-1].key == "kernel" else 25
        start = 1 if path[-1].key == "scale" else 0
        return jnp.asarray(start + rng.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32)

    shapes = {part: tree for part, tree in abstract_params(CONFIG).items() if part not in ("vae", "vision")}
    return jax.tree.map_with_path(draw, shapes)
