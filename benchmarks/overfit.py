"""Trains a tiny model of random weights on 8 pictures with captions and 4 edits until its samples are those pictures.

    python benchmarks/overfit.py --work out/overfit --picture docs/images/overfit.png

Runs the packaged configurations of autoencoder, stage 1 and stage 2, then exports the model, samples it and compares.
Prints JSON: peak signal-to-noise ratios in dB, and seconds of each part. The rows of the figure are targets,
autoencoder reconstructions and samples.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
from measure import Parser
from PIL import Image

from deepgen_jax import settings
from deepgen_jax.convert import convert, export
from deepgen_jax.convert.random_release import tiny_config, write_release
from deepgen_jax.data.example_data import write_example_data
from deepgen_jax.data.images import load_image
from deepgen_jax.data.transforms import resize
from deepgen_jax.data.vision_inputs import to_pixels, to_uint8
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models.vae import normalise
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.training import config_files
from deepgen_jax.training.loop import train
from deepgen_jax.training.run_config import SupervisedConfig

#: Packaged configurations in the order of training, and the steps that it takes.
STAGES = {"tiny_vae": 300, "tiny_pretrain": 60, "tiny_sft": 500}
#: The run whose model is compared.
LAST = "tiny_sft"
STEPS, GUIDANCE = 25, 1.0


@dataclass(frozen=True)
class Sample:
    """A caption with its picture, or an instruction with references and the result."""

    prompt: str
    references: list[Image.Image]
    target: Image.Image


class _Unstopped:
    signum: int | None = None


def read_samples(folder: Path) -> list[Sample]:
    """The example data in the size that the configurations train on: first those with captions, then the edits."""
    config = config_files.load_config(LAST)
    assert isinstance(config, SupervisedConfig)
    data = config.data

    def picture(name: str) -> Image.Image:
        return resize(load_image(folder / name), data.image_size, data.transform)

    pictures, edits = (json.loads((folder / f"{name}.json").read_text()) for name in ("t2i", "edit"))
    samples = [Sample(row["txt"], [], picture(row["image_path"])) for row in pictures]
    for row in edits:
        references = [picture(name) for name in row["input_image"]]
        samples.append(Sample(row["instruction"], references, picture(row["output_image"])))
    return samples


def prepare(work: Path, seed: int) -> None:
    """Writes the data and a model of random weights."""
    write_example_data(work / "example")
    write_release(work / "release", tiny_config(), seed=seed)
    convert(diffusers=work / "release", out=work / "tiny")


def train_stage(work: Path, name: str, seed: int, say: Callable[[str], None]) -> None:
    """Trains a packaged configuration in ``work`` in the place of ``out``, for the steps of `STAGES`."""
    config = config_files.load_config(name)
    places = [f"steps={STAGES[name]}", f"seed={seed}", f"data.seed={seed}"]
    places += [f"model={work / 'tiny'}", f"out={work / name}"]
    places += [f"data.cache_dir={work / 'index'}", "log.tensorboard=false", "samples.every=0"]
    if config.start:
        places.append(f"start={work / Path(config.start).name}")
    for source in ("pictures", "edits"):
        file = {"pictures": "t2i.json", "edits": "edit.json"}[source]
        places.append(f"data.sources.{source}.path={work / 'example' / file}")
    config = settings.apply(config, places)
    train(config, make_mesh("fsdp=1"), _Unstopped(), say)


def make_samples(pipeline: DeepGenPipeline, samples: Sequence[Sample], seed: int) -> np.ndarray:
    """Samples of each prompt, uint8 [B, H, W, 3]; either all prompts have references or none."""
    width, height = samples[0].target.size
    references = [sample.references for sample in samples]
    made = pipeline(
        [sample.prompt for sample in samples], references if references[0] else None, height=height, width=width,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=seed, output_type="np",
    )  # fmt: skip
    return np.asarray(made.images)


def reconstruct(pipeline: DeepGenPipeline, pictures: Sequence[Image.Image]) -> np.ndarray:
    """Reconstruction of each image by the autoencoder, uint8 [B, H, W, 3]."""
    pixels = np.stack([np.moveaxis(to_pixels(picture), -1, 0) for picture in pictures])
    mean, _ = pipeline.vae_encode(pixels)
    latents = np.asarray(normalise(jnp.asarray(mean), pipeline.config.vae))
    return to_uint8(np.moveaxis(pipeline.vae_decode(latents), 1, -1))


def psnr(pictures: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB, from uint8 [B, H, W, 3]."""
    errors = np.square(np.float64(pictures) - np.float64(targets)).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(errors, 1e-10))


@dataclass(frozen=True)
class Comparison:
    """Pictures, uint8 [B, H, W, 3], those with captions first, and how close they are.

    Attributes:
      captions: how many of the pictures have captions; the others are results of edits.
      targets, reconstructions, samples: the pictures.
      references: the first reference of each edit.
    """

    captions: int
    targets: np.ndarray
    reconstructions: np.ndarray
    samples: np.ndarray
    references: np.ndarray

    def psnr(self) -> dict[str, np.ndarray]:
        """PSNR to the targets, of the pictures in the order above, and of what must not come close to them.

        "swapped" compares each sample with the target of the next prompt of its task; "references" are the pictures
        before the edits.
        """
        parts = (slice(0, self.captions), slice(self.captions, None))
        rolled = np.concatenate([np.roll(self.targets[part], -1, axis=0) for part in parts])
        return {
            "reconstructions": psnr(self.reconstructions, self.targets),
            "samples": psnr(self.samples, self.targets),
            "swapped": psnr(self.samples, rolled),
            "references": psnr(self.references, self.targets[self.captions :]),
        }

    def grid(self) -> Image.Image:
        """Targets, reconstructions and samples in three rows."""
        rows = [np.concatenate(list(row), axis=1) for row in (self.targets, self.reconstructions, self.samples)]
        return Image.fromarray(np.concatenate(rows))


def compare(pipeline: DeepGenPipeline, samples: Sequence[Sample], seed: int = 0) -> Comparison:
    """Samples a model on all prompts of its data."""
    captions = [sample for sample in samples if not sample.references]
    edits = [sample for sample in samples if sample.references]
    targets = [sample.target for sample in (*captions, *edits)]
    return Comparison(
        len(captions),
        np.stack([np.asarray(target) for target in targets]),
        reconstruct(pipeline, targets),
        np.concatenate([make_samples(pipeline, part, seed) for part in (captions, edits)]),
        np.stack([np.asarray(edit.references[0]) for edit in edits]),
    )


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, model and runs; must not exist")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise")
    options = parser.parse_args()
    seconds: dict[str, dict[str, float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        result = run()
        now = resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        seconds[name] = {"wall": round(time.perf_counter() - start, 1), "cpu": round(cpu, 1)}
        return result

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    work: Path = options.work.absolute()
    try:
        timed("prepare", lambda: prepare(work, options.seed))
        for name in STAGES:
            timed(name, partial(train_stage, work, name, options.seed, say))
        timed("export", lambda: export(work / LAST, "model", work / "trained"))
        samples = read_samples(work / "example")
        found = timed("samples", lambda: compare(DeepGenPipeline.from_pretrained(work / "trained"), samples))
    except DeepGenError as error:
        print(f"overfit: error: {error}", file=sys.stderr)
        return 2
    if options.picture:
        grid = found.grid()
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        grid.resize((3 * grid.width, 3 * grid.height), Image.Resampling.NEAREST).save(options.picture, optimize=True)
    values = {name: [round(value, 1) for value in ratios.tolist()] for name, ratios in found.psnr().items()}
    means = {name: round(math.fsum(ratios) / len(ratios), 1) for name, ratios in values.items()}
    print(json.dumps({"seed": options.seed, "psnr_mean": means, "psnr": values, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
