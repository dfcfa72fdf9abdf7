"""Fields of a request -> checked parameters. JSON values and the strings of HTML forms are read alike."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepgen_jax.errors import did_you_mean
from deepgen_jax.inference.prompts import parse_size
from deepgen_jax.inference.requests import MAX_SEED
from deepgen_jax.serving.errors import APIError, invalid
from deepgen_jax.serving.jobs import EngineInfo, Kind
from deepgen_jax.serving.settings import ServeConfig

FORMATS = ("png", "jpeg", "webp")
#: Longest prompt in characters, as in OpenAI's format; the model's own limit, in tokens, is checked as well.
MAX_PROMPT = 32_000

_COMMON = (
    "prompt", "model", "n", "size", "response_format", "output_format", "output_compression", "stream",
    "partial_images", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "sampler",
)  # fmt: skip
#: Fields of OpenAI's format without an effect here; their values are not looked at.
_WITHOUT_EFFECT = ("quality", "moderation", "style", "user", "safety_identifier", "input_fidelity")
FIELDS: dict[Kind, tuple[str, ...]] = {
    "generation": (*_COMMON, "background", *_WITHOUT_EFFECT),
    "edit": (*_COMMON, "background", "strength", *_WITHOUT_EFFECT),
}


@dataclass(frozen=True)
class Parameters:
    """Parameters of a request, without its images.

    ``size`` is (width, height) in pixels, None for "auto"; ``compression`` is the quality of JPEG and WebP, 0 to 100.
    """

    kind: Kind
    prompt: str
    negative_prompt: str
    n: int
    size: tuple[int, int] | None
    steps: int
    guidance: float
    seed: int
    sampler: str
    strength: float
    format: str
    compression: int | None
    as_url: bool
    stream: bool
    partial_images: int


def parse(
    kind: Kind, fields: Mapping[str, Any], info: EngineInfo, config: ServeConfig, names: tuple[str, ...]
) -> Parameters:
    """Checks the fields of a request, those of pictures taken out.

    Args:
      names: accepted values of ``model``.

    Raises:
      APIError: an unknown field, or a value that cannot be used; names the field.
    """
    known = FIELDS[kind]
    for name in fields:
        if name not in known:
            message = f"Unknown parameter: '{name}'{did_you_mean(name, known)}"
            raise invalid(message, name, "unknown_parameter")
    given = {name: value for name, value in fields.items() if value is not None}
    model = _text(given, "model", names[0])
    if model not in names:
        message = f"The model '{model}' does not exist; this server has {', '.join(names)}"
        raise APIError(404, message, "model_not_found", "model")
    prompt = _text(given, "prompt", "")
    if not prompt.strip():
        raise invalid("'prompt' is missing or empty; write what to show", "prompt", "missing_required_parameter")
    least, most = (info.steps, info.steps) if info.few_step else (1, config.max_steps)
    steps = _integer(given, "num_inference_steps", info.steps, least, most)
    n = _integer(given, "n", 1, 1, config.max_n)
    seed = _integer(given, "seed", -1, 0, MAX_SEED - n + 1)
    if seed < 0:
        seed = secrets.randbelow(2**31)
    format = _choice(given, "output_format", "png", FORMATS)
    compression = _integer(given, "output_compression", -1, 0, 100)
    if compression not in (-1, 100) and format == "png":
        message = "'output_compression' applies to jpeg and webp; leave it out, or set 'output_format'"
        raise invalid(message, "output_compression")
    if _choice(given, "background", "auto", ("auto", "opaque", "transparent")) == "transparent":
        raise invalid("'background' transparent is not supported; use opaque", "background")
    stream = _boolean(given, "stream")
    partial_images = _integer(given, "partial_images", 0, 0, 3)
    if partial_images and not stream:
        raise invalid("'partial_images' needs 'stream': true", "partial_images")
    strength = _number(given, "strength", 1.0, lambda x: 0 < x <= 1, "above 0 and at most 1")
    return Parameters(
        kind=kind, prompt=prompt, negative_prompt=_text(given, "negative_prompt", ""), n=n,
        size=_size(given, info, config), steps=steps,
        guidance=_guidance(given, info),
        seed=seed, sampler=_choice(given, "sampler", info.samplers[0], info.samplers), strength=strength,
        format=format, compression=None if compression < 0 else compression,
        as_url=_choice(given, "response_format", "b64_json", ("b64_json", "url")) == "url",
        stream=stream, partial_images=partial_images,
    )  # fmt: skip


def _guidance(given: Mapping[str, Any], info: EngineInfo) -> float:
    if info.few_step:
        return _number(given, "guidance_scale", info.guidance, lambda x: x == info.guidance, f"{info.guidance:g}")
    return _number(given, "guidance_scale", info.guidance, lambda x: 0 <= x <= 100, "from 0 to 100")


def max_pixels(info: EngineInfo, config: ServeConfig) -> int:
    """Largest result in pixels."""
    return 4 * info.side * info.side if config.max_pixels is None else config.max_pixels


def parse_wxh(text: str) -> tuple[int, int]:
    """ "WIDTHxHEIGHT" of this server's own answers -> (width, height)."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def _size(given: Mapping[str, Any], info: EngineInfo, config: ServeConfig) -> tuple[int, int] | None:
    text = _text(given, "size", "auto").strip()
    if text == "auto":
        return None
    if not re.fullmatch(r"\d{1,6}[xX]\d{1,6}", text):
        raise invalid(f"'size' is {_shown(text)}; write WIDTHxHEIGHT, such as {info.side}x{info.side}, or auto", "size")
    width, height = parse_size(text)
    unit = info.multiple
    if width % unit or height % unit:
        near = "x".join(str(max(unit, (side + unit // 2) // unit * unit)) for side in (width, height))
        raise invalid(f"'size' is {width}x{height}; sides are multiples of {unit}, the nearest is {near}", "size")
    if width * height > max_pixels(info, config) or max(width, height) > info.largest:
        raise invalid(
            f"'size' is {width}x{height}; this server makes at most {max_pixels(info, config)} pixels and "
            f"{info.largest} a side", "size",
        )  # fmt: skip
    return width, height


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(given: Mapping[str, Any], name: str, default: str) -> str:
    value = given.get(name, default)
    if not isinstance(value, str):
        raise invalid(f"'{name}' is {_shown(value)}, expected a text", name, "invalid_type")
    if len(value) > MAX_PROMPT:
        raise invalid(
            f"'{name}' has {len(value)} characters; send at most {MAX_PROMPT}", name, "string_above_max_length"
        )
    if re.search("[\ud800-\udfff\x00]", value):
        raise invalid(f"'{name}' holds characters that no text has (NUL or half a surrogate pair)", name)
    return value


def _integer(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    if name not in given:
        return default
    value = given[name]
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(f"'{name}' is {_shown(value)}, expected a whole number", name, "invalid_type")
    if not least <= value <= most:
        raise invalid(f"'{name}' is {_shown(value)}, expected {least} to {most}", name, "integer_out_of_range")
    return value


def _number(
    given: Mapping[str, Any], name: str, default: float, accepts: Callable[[float], bool], expected: str
) -> float:
    if name not in given:
        return default
    value = given[name]
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise invalid(f"'{name}' is {_shown(value)}, expected a number", name, "invalid_type") from None
    if not math.isfinite(number) or not accepts(number):
        raise invalid(f"'{name}' is {_shown(value)}, expected a number {expected}", name)
    return number


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise invalid(f"'{name}' is {_shown(value)}, expected true or false", name, "invalid_type")
    return value


def _choice(given: Mapping[str, Any], name: str, default: str, choices: tuple[str, ...]) -> str:
    value = given.get(name, default)
    if value not in choices:
        raise invalid(f"'{name}' is {_shown(value)}; choose one of {', '.join(choices)}", name)
    return str(value)
