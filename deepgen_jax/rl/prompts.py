"""Prompts of an update: a pure function of (seed, step), the same on any host and in a resumed run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepgen_jax.data.mixture import integer_rates, interleave
from deepgen_jax.data.shuffle import permuted
from deepgen_jax.errors import DeepGenError
from deepgen_jax.random_keys import Data
from deepgen_jax.rl.prompt_files import PromptDataset, SamplingMode, read_prompt_config, read_prompt_list


@dataclass(frozen=True)
class PromptSample:
    """One drawn prompt.

    Attributes:
      text: the prompt.
      dataset: name of its data set.
      rewards: weight of each of its rewards.
      metadata: the other fields of its record.
      index: number of the draw, counted over all steps; images are seeded by it.
    """

    text: str
    dataset: str
    rewards: Mapping[str, float]
    metadata: Mapping[str, Any]
    index: int


class PromptSampler:
    """``sampler[step]`` are the prompts of an update, the whole global list on every host.

    Data sets take turns in fixed proportions, spread evenly: in any range of draws each gets its share within a draw or
    two. Each is visited in random order without repeats, then in another order.

    Attributes:
      datasets: what is drawn from.
      shares: float64, each data set's share of the draws.
      prompts_per_step: number of prompts of an update.
    """

    def __init__(
        self,
        datasets: Sequence[PromptDataset],
        prompts_per_step: int,
        *,
        seed: int = 0,
        mode: SamplingMode = "sample_proportional",
    ) -> None:
        """Sets up.

        Args:
          datasets: what to draw from.
          prompts_per_step: number of prompts of an update.
          seed: of the random orders.
          mode: chances in proportion to weight times size ("sample_proportional"), or to weight alone.

        Raises:
          DeepGenError: there are no data sets, or no prompts a step.
        """
        if not datasets or prompts_per_step < 1:
            raise DeepGenError(f"{len(datasets)} data sets and {prompts_per_step} prompts a step; give at least one")
        self.datasets, self.prompts_per_step = tuple(datasets), prompts_per_step
        sizes = [len(dataset.prompts) if mode == "sample_proportional" else 1 for dataset in datasets]
        weights = np.array([dataset.weight for dataset in datasets]) * sizes
        self.shares = weights / weights.sum()
        self._rates = integer_rates(weights)
        self._seed = seed

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of all rewards that a data set wants, in order of their first mention."""
        return tuple(dict.fromkeys(name for dataset in self.datasets for name in dataset.rewards))

    def __getitem__(self, step: int) -> tuple[PromptSample, ...]:
        """The prompts of an update, from step 0 on."""
        if step < 0:
            raise IndexError("steps count from 0")
        first = step * self.prompts_per_step
        return tuple(self.draw(index) for index in range(first, first + self.prompts_per_step))

    @property
    def order(self) -> dict[str, Any]:
        """All that the order of the draws depends on besides the seed, JSON."""
        sizes = [[dataset.name, len(dataset.prompts)] for dataset in self.datasets]
        return {"prompts_per_step": self.prompts_per_step, "datasets": sizes, "rates": [int(x) for x in self._rates]}

    def draw(self, index: int) -> PromptSample:
        """The prompt of one draw, counted from 0 over all steps."""
        counts, stream = interleave(self._rates, index)
        dataset = self.datasets[stream]
        epoch, place = divmod(int(counts[stream]), len(dataset.prompts))
        # By the name, so that a data set's orders do not depend on the others.
        row = permuted(np.array([place]), len(dataset.prompts), self._seed, Data.PROMPTS.format(dataset.name), epoch)[0]
        prompt = dataset.prompts[row]
        return PromptSample(prompt.text, dataset.name, dataset.rewards, prompt.metadata, index)


def check_prompts(datasets: Sequence[PromptDataset], tokenize: Callable[[str], object]) -> None:
    """Tries every prompt once, so that an unusable one is found before the run starts.

    Args:
      datasets: of prompts.
      tokenize: raises a DeepGenError where a prompt cannot be used.

    Raises:
      DeepGenError: a prompt cannot be used; names its data set and place.
    """
    for dataset in datasets:
        for place, prompt in enumerate(dataset.prompts, 1):
            try:
                tokenize(prompt.text)
            except DeepGenError as error:
                raise DeepGenError(f"prompt {place} of {dataset.name}, {prompt.text[:60]!r}: {error}") from error


def load_prompts(
    path: str | Path,
    prompts_per_step: int,
    *,
    seed: int = 0,
    mode: SamplingMode | None = None,
    rewards: Mapping[str, float] | None = None,
    absent: Literal["error", "skip"] = "error",
) -> PromptSampler:
    """A sampler of the prompts of a YAML of data sets, or of one prompt list.

    Args:
      path: ``.yaml`` as for `read_prompt_config`, or a list as for `read_prompt_list`.
      prompts_per_step: number of prompts of an update.
      seed: of the random orders.
      mode: overrides the YAML's sampling mode.
      rewards: weights of the rewards of a single list; a YAML has its own.
      absent: what to do about lists that a YAML names and that are not there.

    Raises:
      DeepGenError: something cannot be read, or a single list is given without rewards.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        if rewards:
            raise DeepGenError(f"{path} has the rewards of its data sets; give no others")
        datasets, own_mode = read_prompt_config(path, absent)
        return PromptSampler(datasets, prompts_per_step, seed=seed, mode=mode or own_mode)
    if not rewards or not all(math.isfinite(weight) for weight in rewards.values()):
        raise DeepGenError(f"{path} is a plain list of prompts; give the weights of its rewards, too")
    dataset = PromptDataset(path.stem, read_prompt_list(path), dict(rewards))
    return PromptSampler([dataset], prompts_per_step, seed=seed)
