"""Stochastic rollouts and the policy objective through the whole model, against the PyTorch system's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.convert import names, transforms
from deepgen_jax.flow.samplers import sde_step, transition
from deepgen_jax.flow.schedule import make_sigmas
from deepgen_jax.models import patches as grids
from deepgen_jax.rl.losses import clipped_policy_loss, policy_ratio, velocity_kl

KINDS = {"cps": "cps_sde", "flow": "flowgrpo_sde", "dance": "dance_sde"}


@pytest.fixture(scope="module")
def rollout(cases, pipelines):
    """The case's settings, schedule, and the guided velocity of any MMDiT under the SFT model's condition."""
    case, pipe = cases["rollout"], pipelines("sft")
    pair = [case["prompt"], case["negative"]]
    pooled, sequence, mask = pipe.encode_prompt(pair, pair_with=pair[::-1])
    height, width = (side // 8 for side in case["size"])
    sizes = pipe.config.mmdit
    ids = grids.position_ids(height, width, sizes.patch_size, sizes.pos_embed_max_size)
    repeats = [np.repeat(x, 2, axis=0) for x in (pooled, sequence, mask)]

    @jax.jit
    def guided(mmdit, sample, sigma):
        x = jnp.tile(grids.patchify(sample, sizes.patch_size), (2, 1, 1))
        inputs = (x, jnp.broadcast_to(ids, x.shape[:2]), jnp.full(4, sigma * 1000), *repeats[:2], None, repeats[2])
        v = pipe.model.apply({"params": {"mmdit": mmdit}}, *inputs, method="velocity")
        v = grids.unpatchify(v, height, width, sizes.patch_size, sizes.out_channels)
        return v[2:] + case["guidance"] * (v[:2] - v[2:])

    return case, jnp.asarray(make_sigmas(pipe.scheduler, case["steps"])), guided


@pytest.mark.parametrize("kind", KINDS)
def test_rollout(kind, rollout, pipelines, goldens, check_golden):
    (case, sigmas, guided), arrays, name = rollout, goldens("rl"), KINDS[kind]
    mmdit = pipelines("sft").params["mmdit"]
    x, states, log_probs = jnp.asarray(arrays[f"rollout/{name}/noise"]), [], []
    for i, noise in enumerate(arrays[f"rollout/{name}/step_noise"]):
        levels = (sigmas[i], sigmas[i + 1], sigmas[1], case["eta"])
        x, _, _, log_prob = sde_step(kind, guided(mmdit, x, sigmas[i]), x, *levels, noise=noise)
        states.append(x)
        log_probs.append(log_prob)
    check_golden("rl", f"rollout/{name}/next", jnp.stack(states, axis=1))
    check_golden("rl", f"rollout/{name}/log_prob", jnp.stack(log_probs, axis=1))


def test_policy_objective(rollout, pipelines, goldens, check_golden):
    (case, sigmas, guided), arrays, step = rollout, goldens("rl"), 1
    states = arrays["rollout/cps_sde/next"]
    sample, following = jnp.asarray(states[:, step - 1]), jnp.asarray(states[:, step])
    old, advantage = arrays["rollout/cps_sde/log_prob"][:, step], arrays["grpo/model/advantage"]
    levels = (sigmas[step], sigmas[step + 1], sigmas[1], case["eta"])
    reference = guided(pipelines("sft").params["mmdit"], sample, sigmas[step])
    check_golden("rl", "grpo/model/ref_velocity", reference)

    def objective(mmdit, scaled):
        v = guided(mmdit, sample, sigmas[step])
        log_prob = sde_step("cps", v, sample, *levels, next_sample=following)[3]
        std = transition("cps", v, sample, *levels).schedule_std if scaled else None
        policy, kl = clipped_policy_loss(log_prob, old, advantage, 0.5), velocity_kl(v, reference, std)
        return policy + 0.01 * kl, (v, log_prob, policy, kl)

    rows = names.weights(pipelines("rl").config)
    row = rows["transformer.transformer_blocks.0.attn.to_q.weight"]
    for scaled, tag in ((False, "plain"), (True, "divided")):
        grad = jax.value_and_grad(lambda mmdit, scaled=scaled: objective(mmdit, scaled), has_aux=True)
        (loss, (v, log_prob, policy, kl)), gradients = grad(pipelines("rl").params["mmdit"])
        check_golden("rl", "grpo/model/velocity", v)
        check_golden("rl", "grpo/model/log_prob", log_prob)
        check_golden("rl", "grpo/model/ratio", policy_ratio(log_prob, old))
        check_golden("rl", "grpo/model/policy_loss", policy)
        check_golden("rl", f"grpo/model/{tag}/kl", kl)
        check_golden("rl", f"grpo/model/{tag}/loss", loss)
        norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in jax.tree.leaves(gradients)))
        check_golden("rl", f"grpo/model/{tag}/grad_norm", norm)
        leaf = gradients
        for part in row.path[1:]:
            leaf = leaf[part]
        got = transforms.to_source(row.transform, np.asarray(leaf)[row.index], row.shape)
        check_golden("rl", f"grpo/model/{tag}/grad/transformer_blocks.0.attn.to_q.weight", got)
