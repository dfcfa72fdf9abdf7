"""Rewards by name. A new reward is one small file and one line here."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Reward

#: Kind -> module and class, imported on first use. The class's keyword arguments are the reward's options.
KINDS = {
    "ocr": "deepgen_jax.rewards.ocr:OCRReward",
    "clip": "deepgen_jax.rewards.clip_score:CLIPReward",
    "preference": "deepgen_jax.rewards.preference:PreferenceReward",
    "judge_score": "deepgen_jax.rewards.judge_score:JudgeScoreReward",
    "ocr_judge": "deepgen_jax.rewards.ocr_judge:OCRJudgeReward",
    "jpeg": "deepgen_jax.rewards.jpeg:JPEGReward",
    "color_target": "deepgen_jax.rewards.color:ColorTargetReward",
    "world": "deepgen_jax.nano.reward:WorldReward",
    "http": "deepgen_jax.rewards.http:HTTPReward",
}

#: Names that released prompt lists use for the same rewards.
ALIASES = {"unifiedreward_think": "preference", "clip_sim": "clip"}


@dataclass(frozen=True)
class RewardConfig:
    """One reward of a run.

    Attributes:
      name: what data sets call it; also its kind unless ``kind`` says otherwise.
      kind: one of `KINDS`, for a second reward of a kind or a name of one's own.
      options: keyword arguments of the kind's class.
    """

    name: str
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def canonical(name: str) -> str:
    """A reward's name, with the names of released prompt lists turned into those used here."""
    return ALIASES.get(name, name)


def make(config: RewardConfig) -> Reward:
    """The reward that ``config`` describes.

    Raises:
      DeepGenError: kind or option unknown, an option missing or with a value that cannot be used.
    """
    kind = canonical(config.kind or config.name)
    if kind not in KINDS:
        raise DeepGenError(f"unknown reward {kind!r}; {suggestion(kind, KINDS)}")
    module, name = KINDS[kind].split(":")
    reward_type = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(reward_type).parameters
    for option in config.options:
        if option not in parameters:
            raise DeepGenError(f"reward {config.name}: unknown option {option!r}; {suggestion(option, parameters)}")
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.name not in config.options]
    if needed:
        raise DeepGenError(f"reward {config.name} needs the option {needed[0]!r}; set it in the reward's options")
    try:
        return reward_type(**config.options)
    except DeepGenError as error:
        raise DeepGenError(f"reward {config.name}: {error}") from error


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "did you mean ...?", or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
