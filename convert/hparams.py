"""``--hparams``: hyper-parameters that no checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.options import Options

#: Fields of `DeepGenConfig` that calls of the model default to, by type.
CALL_DEFAULTS: Mapping[str, type] = {
    "guidance_scale": float,
    "num_inference_steps": int,
    "sampler": str,
    "image_size": int,
    "max_guidance_scale": float,
}


@dataclass(frozen=True)
class HParams:
    """Contents of the file; None for absent entries.

    Attributes:
      connector: sizes of the connector and ``num_queries``.
      lora_rank, lora_alpha: of the adapters.
      max_prompt_tokens: longest prompt.
      call_defaults: the model's own values of `CALL_DEFAULTS`, as far as the file has them.
      where: name of the file for messages.
    """

    connector: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    lora_alpha: float | None = None
    max_prompt_tokens: int = DeepGenConfig.max_prompt_tokens
    call_defaults: Mapping[str, Any] = field(default_factory=dict)
    where: str = "the defaults"


def parse_hparams(values: Mapping[str, Any], where: str) -> HParams:
    """The hyper-parameters of a JSON object that comes from ``where``.

    Raises:
      DeepGenError: an entry is unknown or of the wrong type.
    """
    options = Options(values, where)
    connector = dict(options.take("connector", dict, {}))
    queries = options.take("num_queries", int, None)
    if queries is not None:
        connector["num_queries"] = queries
    hparams = HParams(
        connector=connector,
        lora_rank=options.take("lora_rank", int, None),
        lora_alpha=options.take("lora_alpha", float, None),
        max_prompt_tokens=options.take("max_length", int, DeepGenConfig.max_prompt_tokens),
        call_defaults={
            name: value for name, kind in CALL_DEFAULTS.items() if (value := options.take(name, kind, None)) is not None
        },
        where=where,
    )
    # Settings of the training run.
    options.ignore("unconditional", "weighting_scheme", "note")
    options.finish()
    return hparams
