"""Block cache against fewer steps: how far pictures are from those of all steps, at the same saving; prints JSON.

    python benchmarks/cache.py --model nano --steps 50 --size 96 --prompt "a small red circle" --seeds 8
    python benchmarks/cache.py --preset mid --steps 50 --size 128 --guidance 4 --table

Makes pictures with all layers in all steps, then searches the smallest threshold at which the cache saves the wanted
share of layer evaluations, with and without extrapolation, and compares with as many steps as take the same number of
evaluations. PSNR is over the decoded pictures, in dB; CPU seconds are those of one picture, compilation left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from inference import PACKAGES, PROMPT, _positive, _size
from measure import Parser, environment, progress
from presets import PRESETS, random_pipeline

from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.parallel.mesh import make_mesh

#: Runs of the search for a threshold; each halves the interval of its logarithm.
SEARCH, LOWEST, HIGHEST = 9, 1e-3, 3.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", help="a model folder, or nano")
    model.add_argument("--preset", choices=sorted(PRESETS), help="a model with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--steps", type=_positive, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--size", type=_size, default=(512, 512), help="512 or 640x384, width x height (default: 512)")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--prompt", nargs="+", default=[PROMPT], help="default: one of a photograph")
    parser.add_argument("--seeds", type=_positive, default=2, help="pictures of each prompt (default: 2)")
    parser.add_argument(
        "--saving", type=float, nargs="+", default=[1.8], help="all over done evaluations (default: 1.8)"
    )
    parser.add_argument("--table", action="store_true", help="print a Markdown table instead of JSON")
    return parser.parse_args()


@dataclass(frozen=True)
class Run:
    """Pictures of one setting.

    Attributes:
      pixels: float64 [B, H, W, 3] in 0..1.
      saving: layer evaluations of all steps over those that were done.
      seconds: CPU seconds of a picture.
    """

    pixels: np.ndarray
    saving: float
    seconds: float


class Sampler:
    """Runs a pipeline on the same prompts and noise with other settings."""

    def __init__(self, pipe: DeepGenPipeline, args: argparse.Namespace) -> None:
        self._prompts = [prompt for prompt in args.prompt for _ in range(args.seeds)]
        self._pipe, self._steps = pipe, args.steps
        self._settings: dict[str, Any] = {
            "seed": list(range(len(self._prompts))), "width": args.size[0], "height": args.size[1],
            "guidance_scale": args.guidance, "output_type": "np",
        }  # fmt: skip
        # Compiles both programs.
        for cache in (None, 0.0):
            pipe(self._prompts[0], num_inference_steps=1, cache=cache, **self._settings | {"seed": 0})

    def run(self, steps: int, cache: float | None = None, taylor: bool = False) -> Run:
        """Pictures of all prompts."""
        start = time.process_time()
        out = self._pipe(self._prompts, num_inference_steps=steps, cache=cache, taylor=taylor, **self._settings)
        seconds = (time.process_time() - start) / len(self._prompts)
        done, total = out.evaluations or (1.0, 1.0)
        result = Run(np.asarray(out.images, np.float64) / 255, total / done * self._steps / steps, seconds)
        progress(f"{steps} steps, cache {cache}, taylor {taylor}: {result.saving:.2f}x, {seconds:.2f} CPU s a picture")
        return result

    def cached(self, saving: float, taylor: bool) -> tuple[float, Run]:
        """The smallest threshold found that saves as much, and its pictures."""
        low, high = np.log(LOWEST), np.log(HIGHEST)
        best = None
        for _ in range(SEARCH):
            middle = (low + high) / 2
            found = self.run(self._steps, float(np.exp(middle)), taylor)
            if found.saving >= saving:
                high, best = middle, (float(np.exp(middle)), found)
            else:
                low = middle
        if best is None:
            raise DeepGenError(f"no threshold up to {HIGHEST} saves {saving}x; ask for less")
        return best


def psnr(found: Run, wanted: Run) -> dict[str, float]:
    """PSNR of all pictures together and of the worst one, in dB; pictures that are equal count as 100."""
    errors = np.mean((found.pixels - wanted.pixels) ** 2, axis=(1, 2, 3))
    whole, worst = (float(-10 * np.log10(max(error, 1e-10))) for error in (errors.mean(), errors.max()))
    return {"psnr": round(whole, 2), "worst": round(worst, 2)}


def measure(pipe: DeepGenPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Everything but environment and settings."""
    progress("compiling")
    sampler = Sampler(pipe, args)
    whole = sampler.run(args.steps)
    rows: list[dict[str, Any]] = [
        {"setting": f"{args.steps} steps", "saving": 1.0, "cpu_seconds": whole.seconds, "psnr": None, "worst": None}
    ]

    def add(setting: str, run: Run, **more: Any) -> None:
        rows.append({"setting": setting, "saving": run.saving, "cpu_seconds": run.seconds, **psnr(run, whole), **more})

    for saving in args.saving:
        for taylor in (False, True):
            threshold, run = sampler.cached(saving, taylor)
            add(f"cache {threshold:.3g}" + (", taylor" if taylor else ""), run, threshold=threshold)
        steps = round(args.steps / saving)
        add(f"{steps} steps", sampler.run(steps))
    return {"layers": pipe.config.mmdit.num_layers, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown of a run."""
    lines = [
        "| | fewer layer evaluations | CPU seconds | PSNR, dB | worst picture |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        quality = ["", ""] if row["psnr"] is None else [f"{row['psnr']:.1f}", f"{row['worst']:.1f}"]
        lines.append(
            "| " + " | ".join([row["setting"], f"{row['saving']:.2f}x", f"{row['cpu_seconds']:.1f}", *quality]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    try:
        if args.preset:
            pipe = random_pipeline(PRESETS[args.preset], args.dtype, make_mesh(None))
        else:
            pipe = DeepGenPipeline.from_pretrained(args.model, args.dtype)
        result = measure(pipe, args)
    except DeepGenError as error:
        progress(f"cache.py: error: {error}")
        sys.exit(2)
    settings = vars(args) | {"size": "{}x{}".format(*args.size)}
    result = {"benchmark": "cache", **environment(PACKAGES), "settings": settings, **result}
    print(table(result) if args.table else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
