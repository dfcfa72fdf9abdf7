"""Metrics of a step of reinforcement learning: rewards by name and data set, failures, and pictures with scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.result import RewardResult
from deepgen_jax.rl.advantages import CLIP
from deepgen_jax.rl.prompts import PromptSample

#: Bins of the histogram of advantages, from -5 to 5.
ADVANTAGE_BINS = 20
_GROUPS_SHOWN = 6
# How metrics of a rollout's updates are reduced; others take the value of the last update.
_COMBINED: dict[str, Callable[[Sequence[Any]], Any]] = {
    **dict.fromkeys(("ratio_mean", "clip_share", "approx_kl"), np.mean),
    **dict.fromkeys(("ratio_max", "first_ratio_deviation", "skipped"), np.max),
    "ratio_min": np.min,
}
#: Metrics of an update that are about the policy, logged as "rl/NAME".
_POLICY = {*_COMBINED, "kl", "old_policy_drift"} - {"skipped"}


def of_updates(updates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of a step from those of its updates: ratios over all updates, everything else from the last."""
    last = updates[-1]
    together = {name: f([update[name] for update in updates]) for name, f in _COMBINED.items() if name in last}
    return {f"rl/{name}" if name in _POLICY else name: x for name, x in {**last, **together}.items()}


@contextmanager
def failing_together() -> Iterator[None]:
    """Raises on every host if one raises within the block; the others would wait for it forever.

    Raises:
      DeepGenError: this host's own error, or one that names the host that failed.
    """
    failure: DeepGenError | None = None
    try:
        yield
    except DeepGenError as error:
        if jax.process_count() == 1:
            raise
        failure = error
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        raise DeepGenError(f"the rewards of process {failed[0]} failed; its message says why")


def own_groups(groups: range) -> list[int]:
    """The groups that this host scores: hosts take turns, so that every group is whole on exactly one of them."""
    return [group for group in groups if group % jax.process_count() == jax.process_index()]


def over_hosts(result: RewardResult, prompts: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and weights of all hosts' images in the order of the global batch: two float32 [N, K].

    Args:
      result: of this host's groups (see :func:`own_groups`), in their order.
      prompts: of the step, over all hosts.
      group_size: images of each.
    """
    if jax.process_count() == 1:
        return result.rewards, result.weights
    from jax.experimental import multihost_utils

    whole = np.zeros((2, prompts, group_size, len(result.names)), np.float32)
    own = own_groups(range(prompts))
    whole[:, own] = np.stack([result.rewards, result.weights]).reshape(2, len(own), group_size, len(result.names))
    # Of each group all hosts but one hold zeros; a reward that is missing stays NaN.
    gathered = np.asarray(multihost_utils.process_allgather(whole)).sum(axis=0)
    rewards, weights = gathered.reshape(2, prompts * group_size, len(result.names))
    return rewards, weights


def reward_metrics(
    names: Sequence[str],
    rewards: np.ndarray,
    weights: np.ndarray,
    advantages: np.ndarray,
    prompts: Sequence[PromptSample],
    group_size: int,
) -> dict[str, Any]:
    """Means and standard deviations by reward and data set, share of groups without variance, advantages.

    Args:
      names: of the K rewards.
      rewards, weights: [N, K] over all hosts; NaN where a reward is missing.
      advantages: [N].
      prompts: of the groups.
      group_size: images of a prompt.
    """
    metrics: dict[str, Any] = {}
    sets = np.repeat([prompt.dataset for prompt in prompts], group_size)
    for column, name in enumerate(names):
        wanted = weights[:, column] != 0
        present = wanted & np.isfinite(rewards[:, column])
        if wanted.any():
            metrics[f"reward/{name}/missing_share"] = 1 - present.sum() / wanted.sum()
        if not present.any():
            continue
        metrics[f"reward/{name}/mean"] = rewards[present, column].mean()
        metrics[f"reward/{name}/std"] = rewards[present, column].std()
        for dataset in dict.fromkeys(sets[present]) if len(set(sets)) > 1 else ():
            values = rewards[present & (sets == dataset), column]
            metrics[f"reward/{name}@{dataset}/mean"] = values.mean()
            metrics[f"reward/{name}@{dataset}/std"] = values.std()
    total = np.nansum(np.where(weights != 0, weights * rewards, 0), axis=1).reshape(-1, group_size)
    metrics["rl/zero_variance_groups"] = np.mean(np.ptp(total, axis=1) < 1e-7)
    edges = np.linspace(-CLIP, CLIP, ADVANTAGE_BINS + 1)
    metrics["rl/advantage_histogram"] = np.histogram(advantages, edges)[0]
    return metrics


def failure_metrics(result: RewardResult) -> dict[str, float]:
    """Counts by reward and reason, of the images that this host scored.

    "reward_failures/" are images without the reward; "reward_notes/" what happened besides, such as comparisons whose
    verdict could not be read.
    """
    counts = {"reward_failures": result.failures, "reward_notes": result.notes}
    return {
        f"{kind}/{name}: {reason}": float(count)
        for kind, found in counts.items()
        for (name, reason), count in found.items()
    }


def picture(pixels: np.ndarray, result: RewardResult, group_size: int) -> Image.Image:
    """The first groups of a step that this host scored, one a row, with the scores below each image.

    Args:
      pixels: uint8 [N, H, W, 3], whole groups.
      result: their rewards.
      group_size: images of a row.
    """
    rows = min(len(pixels) // group_size, _GROUPS_SHOWN)
    height, width = pixels.shape[1:3]
    line, cell = 12, max(width, 96)
    strip = line * (len(result.names) + 1)
    sheet = Image.new("RGB", (group_size * cell, rows * (height + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(rows * group_size):
        left, top = i % group_size * cell, i // group_size * (height + strip)
        sheet.paste(Image.fromarray(pixels[i]), (left, top))
        for k, name in enumerate(result.names):
            value = result.rewards[i, k]
            text = f"{name} {value:.3f}" if np.isfinite(value) else f"{name} -"
            draw.text((left + 2, top + height + k * line), text, fill="black")
        if i % group_size == 0:
            prompt = result.samples[i].prompt.encode("latin-1", "replace").decode("latin-1")
            below = top + height + len(result.names) * line
            draw.text((left + 2, below), prompt[: group_size * cell // 7], fill="navy")
    return sheet
