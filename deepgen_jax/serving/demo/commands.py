"""The command that makes an image of the page again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from deepgen_jax.serving.demo.history import Settings


def command_of(settings: Settings, file: Callable[[str], Path], model: str | None, url: str) -> str:
    """A shell command: ``deepgen generate`` or ``deepgen edit`` where they can do it, else curl to the service.

    Args:
      file: path of a file that the settings name.
      model: folder of the model; None where only the service has it.
      url: of the service.
    """
    if model is not None and not settings.mask and settings.strength == 1:
        words = ["deepgen", "edit" if settings.sources else "generate", model, settings.prompt]
        for source in settings.sources:
            words += ["--image", str(file(source))]
        if settings.negative_prompt and settings.guidance != 1:
            words += ["--negative-prompt", settings.negative_prompt]
        words += ["--seed", str(settings.seed), "--steps", str(settings.steps), "--guidance", f"{settings.guidance:g}"]
        words += ["--sampler", settings.sampler, "--size", f"{settings.width}x{settings.height}", "--out", "image.png"]
        return shlex.join(words)
    fields = {
        "prompt": settings.prompt, "negative_prompt": settings.negative_prompt, "seed": settings.seed,
        "num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "sampler": settings.sampler,
        "size": f"{settings.width}x{settings.height}",
    }  # fmt: skip
    if not settings.sources:
        words = ["curl", f"{url}/v1/images/generations", "--json", json.dumps(fields)]
    else:
        words = ["curl", f"{url}/v1/images/edits"]
        for name, value in {**fields, "strength": settings.strength}.items():
            words += ["--form-string", f"{name}={value}"]
        for source in settings.sources:
            words += ["-F", f"image[]=@{file(source)}"]
        if settings.mask:
            words += ["-F", f"mask=@{file(settings.mask)}"]
    return f"{shlex.join(words)} | jq -r '.data[0].b64_json' | base64 -d > image.png"
