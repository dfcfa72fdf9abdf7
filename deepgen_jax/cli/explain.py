"""``deepgen explain``: heat maps, a logit lens and knock-outs of one image, as a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from deepgen_jax.errors import DeepGenError

if TYPE_CHECKING:
    from PIL import Image

    from deepgen_jax.inference.pipeline import DeepGenPipeline


@dataclass(frozen=True)
class ExplainArguments:
    """Positional arguments; a separate class so that the help lists them before the options."""

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]", help_behavior_hint="")] = None
    """Model folder. Left out, or nano: the small model of the package."""
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT", help_behavior_hint="")] = None
    """What to draw, or how to change the images, in quotes."""


@dataclass(frozen=True)
class ExplainCommand(ExplainArguments):
    """Writes a page with heat maps of words and think tokens, a logit lens, and knock-outs."""

    image: Annotated[tuple[Path, ...], arg(metavar="FILE", help_behavior_hint="")] = ()
    """Reference images of an edit."""
    out: Path = Path("explain.html")
    """The page; the same data as JSON is written next to it, with the suffix .json."""
    overwrite: bool = False
    """Replace files that exist."""
    seed: int = 0
    """Seed of the noise."""
    steps: Annotated[int | None, arg(help_behavior_hint="(default: the model's)")] = None
    """Denoising steps, without guidance."""
    size: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="(default: the model's)")] = None
    """Side of the image, a multiple of 32."""
    top: int = 3
    """Words of the logit lens at each think token."""
    no_lens: bool = False
    """Skip the logit lens."""
    no_knockouts: bool = False
    """Skip the knock-outs, which sample one image per component of the model."""
    world: int = 0
    """Also score heat maps on this many scenes of the procedural world, whose masks are known (for nano)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation."""
    compilation_cache: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where compiled programs are kept, or off."""

    def run(self) -> int:
        """Writes the page; returns the exit status."""
        from deepgen_jax.evaluation.explain.heat_maps import encode, observe
        from deepgen_jax.evaluation.explain.knockouts import knock_out
        from deepgen_jax.evaluation.explain.lens import logit_lens
        from deepgen_jax.evaluation.explain.page import Explanation
        from deepgen_jax.files import write_text
        from deepgen_jax.inference.cache import enable_compilation_cache
        from deepgen_jax.inference.pipeline import DeepGenPipeline
        from deepgen_jax.stores.model_folder import locate, read_manifest
        from deepgen_jax.terminal import progress_bar

        model, prompt = self._words()
        self._check()
        folder = locate(model)
        if read_manifest(folder).config.few_step:
            raise DeepGenError(f"{folder} was distilled to few steps; explain the model that it was distilled from")
        enable_compilation_cache(self.compilation_cache)
        pipe = DeepGenPipeline.from_pretrained(folder, self.dtype)
        images = self._images(pipe)
        settings = self._settings(pipe, model, prompt)
        sizes: dict[str, Any] = {name: settings[name] for name in ("width", "height", "steps", "seed")}
        words = [word.text for word in encode(pipe, prompt, images).words]
        readings = [] if self.no_lens else logit_lens(pipe, folder, prompt, images, top=self.top)
        trace = observe(pipe, prompt, images, **sizes)
        effects = []
        if not self.no_knockouts:
            with progress_bar(1, 0, "knock-outs") as bar:

                def progress(done: int, total: int) -> None:
                    bar.total, bar.n = total, done
                    bar.set_description_str("")
                    bar.refresh()

                effects = knock_out(pipe, prompt, images, **sizes, on_progress=progress)
        scores = self._scores(pipe, sizes["width"])
        found = Explanation(settings, words, trace, readings, effects, scores)
        write_text(self.out, found.to_html())
        write_text(self.out.with_suffix(".json"), found.to_json())
        print(f"{self.out} and {self.out.with_suffix('.json')} written")
        if scores:
            print(scores["verdict"])
        return 0

    def _words(self) -> tuple[str | None, str]:
        """(model or None, prompt); a single argument is the prompt unless it is a folder."""
        if self.prompt is not None:
            return self.model, self.prompt
        if self.model is None or os.path.isdir(self.model):
            raise DeepGenError('no prompt is given; write deepgen explain MODEL "a red circle"')
        return None, self.model

    def _check(self) -> None:
        for name, least in (("top", 1), ("seed", 0), ("world", 0), ("steps", 1), ("size", 32)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DeepGenError(f"--{name} is {value}; use {least} or more")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise DeepGenError(f"--out {self.out} is no page; name a file that ends in .html")
        for path in (self.out, self.out.with_suffix(".json")):
            if path.exists() and not self.overwrite:
                raise DeepGenError(f"{path} exists; choose another --out or pass --overwrite")

    def _images(self, pipe: DeepGenPipeline) -> list[Image.Image]:
        from deepgen_jax.data.images import load_image
        from deepgen_jax.inference.image_inputs import fit_reference

        return [fit_reference(load_image(path), pipe.config.image_multiple, name=str(path)) for path in self.image]

    def _settings(self, pipe: DeepGenPipeline, model: str | None, prompt: str) -> dict[str, Any]:
        import shlex

        side, steps = self.size or pipe.config.default_side, self.steps or pipe.config.num_inference_steps
        if side % pipe.config.image_multiple:
            raise DeepGenError(f"--size is {side}; use a multiple of {pipe.config.image_multiple}")
        words = ["deepgen", "explain", *([model] if model else []), prompt]
        words += [word for path in self.image for word in ("--image", str(path))]
        words += ["--seed", str(self.seed), "--steps", str(steps), "--size", str(side)]
        return {
            "prompt": prompt, "model": model or "nano", "width": side, "height": side, "steps": steps,
            "seed": self.seed, "images": ", ".join(map(str, self.image)) or "none", "command": shlex.join(words),
        }  # fmt: skip

    def _scores(self, pipe: DeepGenPipeline, size: int) -> dict[str, Any]:
        if not self.world:
            return {}
        from deepgen_jax.nano.explain_scores import score_heat_maps

        return score_heat_maps(pipe, self.world, size=size, seed=self.seed)
