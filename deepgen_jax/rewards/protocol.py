"""The JSON protocol between the `http` reward and a scoring server, checked on both sides.

Request, ``POST /score``::

    {"reward": NAME, "samples": [{"image": PNG file in base64, "prompt": TEXT, "group": INTEGER, "metadata": {...}}]}

Answer::

    {"scores": [NUMBER or null, one a sample],
     "failures": {"PLACE": {"reason": TEXT, "permanent": true or false}, one for every null}}

``group`` (default 0) is equal for images to be compared with each other; ``metadata`` (default {}) holds the other
fields of the prompt. "failures" is optional; ``permanent`` means that another try cannot help. Errors have a status of
400 or above and ``{"error": TEXT}``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Missing, RewardSample, Scores
from deepgen_jax.rewards.image_codec import decode_png_base64, png_base64, png_base64_pixels

_SAMPLE_FIELDS = {"image", "prompt", "group", "metadata"}


def write_request(reward: str, samples: Sequence[RewardSample]) -> dict[str, Any]:
    """The request that asks for the scores of samples."""
    return {"reward": reward, "samples": [_write_sample(sample) for sample in samples]}


class RequestTooLarge(DeepGenError):
    """A request beyond the limits of the server."""


@dataclass(frozen=True)
class ScoreRequest:
    """A checked request whose images are not decoded yet.

    Attributes:
      reward: name of the reward.
      samples: fields of each sample.
      pixels: of all images together.
    """

    reward: str
    samples: tuple[Mapping[str, Any], ...]
    pixels: int

    def decode(self) -> list[RewardSample]:
        """The samples, with their images.

        Raises:
          DeepGenError: an image is damaged.
        """
        return [_decoded(sample, f"samples[{place}]") for place, sample in enumerate(self.samples)]


def parse_request(request: Any, max_pixels: int | None = None, max_samples: int | None = None) -> ScoreRequest:
    """Checks a request.

    Args:
      request: its JSON.
      max_pixels: of all images together; None for no limit.
      max_samples: None for no limit.

    Raises:
      RequestTooLarge: there are too many samples or pixels.
      DeepGenError: something is missing, unknown or of the wrong type.
    """
    if not isinstance(request, dict):
        raise DeepGenError("the request is no JSON object")
    _only(request, {"reward", "samples"}, "the request")
    name, samples = request.get("reward"), request.get("samples")
    if not isinstance(name, str):
        raise DeepGenError("'reward' must be the name of a reward")
    if not isinstance(samples, list) or not samples:
        raise DeepGenError("'samples' must be a list of at least one sample")
    if max_samples is not None and len(samples) > max_samples:
        raise RequestTooLarge(f"the request has {len(samples)} samples; send at most {max_samples}")
    pixels, parsed = 0, []
    for place, sample in enumerate(samples):
        fields, size = _parsed(sample, f"samples[{place}]")
        parsed.append(fields)
        pixels += size
    if max_pixels is not None and pixels > max_pixels:
        raise RequestTooLarge(
            f"the images have {pixels} pixels together; send at most {max_pixels}, in several requests"
        )
    return ScoreRequest(name, tuple(parsed), pixels)


def read_request(request: Any) -> tuple[str, list[RewardSample]]:
    """The reward's name and the samples of a request; raises as `parse_request` and `ScoreRequest.decode`."""
    parsed = parse_request(request)
    return parsed.reward, parsed.decode()


def write_answer(scores: Scores) -> dict[str, Any]:
    """The answer with the scores of a request."""
    return {
        "scores": [float(value) if math.isfinite(value) else None for value in scores.values],
        "failures": {
            str(place): {"reason": entry.reason, "permanent": entry.permanent}
            for place, entry in scores.missing.items()
        },
    }


def read_answer(answer: Any, count: int) -> list[float | Missing]:
    """One result for each of ``count`` samples.

    Raises:
      ValueError: the answer does not have the form of the protocol.
    """
    if not isinstance(answer, dict):
        raise ValueError("wrong form")
    scores, failures = answer.get("scores"), answer.get("failures", {})
    if not isinstance(scores, list) or len(scores) != count or not isinstance(failures, dict):
        raise ValueError("wrong form")
    results: list[float | Missing] = []
    for place, score in enumerate(scores):
        if score is None:
            entry = failures.get(str(place), {"reason": "the server gave no reason"})
            if not isinstance(entry, dict) or "reason" not in entry:
                raise ValueError("a failure has no reason")
            results.append(Missing(str(entry["reason"])[:200], entry.get("permanent") is True))
        elif isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= sys.float_info.max:
            results.append(float(score))
        else:
            raise ValueError("a score is no number")
    return results


def _write_sample(sample: RewardSample) -> dict[str, Any]:
    return {
        "image": png_base64(sample.image),
        "prompt": sample.prompt,
        "group": sample.group,
        "metadata": dict(sample.metadata),
    }


def _parsed(sample: Any, where: str) -> tuple[Mapping[str, Any], int]:
    """Checked fields of a sample, and its image's number of pixels."""
    if not isinstance(sample, dict):
        raise DeepGenError(f"{where} is no JSON object")
    _only(sample, _SAMPLE_FIELDS, where)
    wanted: Mapping[str, tuple[type, Any]] = {
        "image": (str, None),
        "prompt": (str, None),
        "group": (int, 0),
        "metadata": (dict, {}),
    }
    fields = {name: sample.get(name, default) for name, (_, default) in wanted.items()}
    for name, (kind, _) in wanted.items():
        if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            raise DeepGenError(f"{where}.{name} must be {kind.__name__}")
    try:
        return fields, png_base64_pixels(fields["image"])
    except DeepGenError as error:
        raise DeepGenError(f"{where}.image: {error}") from None


def _decoded(fields: Mapping[str, Any], where: str) -> RewardSample:
    try:
        image = decode_png_base64(fields["image"])
    except DeepGenError as error:
        raise DeepGenError(f"{where}.image: {error}") from None
    return RewardSample(image, fields["prompt"], fields["group"], fields["metadata"])


def _only(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise DeepGenError(f"{where} has the unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
