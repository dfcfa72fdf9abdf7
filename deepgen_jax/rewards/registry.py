"""Rewards by name. Adding one: a `Reward` in a file, and its name in the registry.

    register("my_reward", "my_package.my_module:MyReward")

or an entry point of the group ``deepgen_jax.rewards`` in an installed package; or, without a name,
``rewards.NAME.kind=my_module:MyReward`` or ``kind=path/to/my_reward.py:MyReward`` on the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.registry import Registry
from deepgen_jax.rewards.base import Reward, failure_place, failure_reason

_HERE = "deepgen_jax.rewards"
#: Kind -> class, whose keyword arguments are the options of the reward.
REWARD_KINDS: Registry[Reward] = Registry(
    "reward",
    "deepgen_jax.rewards",
    {
        "ocr": f"{_HERE}.ocr:OCRReward",
        "clip": f"{_HERE}.clip_score:CLIPReward",
        "preference": f"{_HERE}.preference:PreferenceReward",
        "judge_score": f"{_HERE}.judge_score:JudgeScoreReward",
        "ocr_judge": f"{_HERE}.ocr_judge:OCRJudgeReward",
        "jpeg": f"{_HERE}.jpeg:JPEGReward",
        "color_target": f"{_HERE}.color:ColorTargetReward",
        "http": f"{_HERE}.http:HTTPReward",
    },
    base=f"{_HERE}.base:Reward",
)
register = REWARD_KINDS.register

#: Names that released prompt lists use for the same rewards.
ALIASES = {"unifiedreward_think": "preference", "clip_sim": "clip"}


@dataclass(frozen=True)
class RewardConfig:
    """One reward of a run.

    Attributes:
      name: as data sets of prompts name it; also its kind, if that is not given.
      kind: a name of `REWARD_KINDS`, ``module:Class`` or ``file.py:Class``.
      options: keyword arguments of the kind's class.
    """

    name: str
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def canonical(name: str) -> str:
    """A reward's name here, also for a name of released prompt lists."""
    return ALIASES.get(name, name)


def make(config: RewardConfig) -> Reward:
    """The reward that ``config`` describes.

    Raises:
      DeepGenError: kind or option unknown, an option missing or with a value that cannot be used.
    """
    where = f"reward {config.name}"
    reward_type = REWARD_KINDS.load(canonical(config.kind or config.name), where)
    named = {
        name: parameter
        for name, parameter in inspect.signature(reward_type).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(reward_type).parameters.values())
    for option in config.options:
        if option not in named and not takes_any:
            raise DeepGenError(f"{where}: unknown option {option!r}{did_you_mean(option, named)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in config.options:
            raise DeepGenError(f"{where} needs the option {name!r}; set rewards.{config.name}.options.{name}=...")
    try:
        return reward_type(**config.options)
    except DeepGenError as error:
        raise DeepGenError(f"{where}: {error}") from error
    except Exception as error:  # A reward's own code may raise anything, also for an option of the wrong type.
        raise DeepGenError(
            f"{where} cannot be made: {failure_reason(error)} ({failure_place(error)}); check its options"
        ) from error
