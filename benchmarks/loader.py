"""Throughput of the data loader against bare Pillow on the same files, printed as JSON.

    python benchmarks/loader.py --samples 512 --sides 1024 --repetitions 3

Bare Pillow opens, converts and resizes every file to the size that the loader gives it, in one process a core, and
discards the pixels. The loader also validates, tokenises and batches. Both run in turn; the loader is timed in steady
state, after consuming more batches than it prefetches.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from measure import Parser, alternate, environment, progress, summary
from PIL import Image

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.loader import Loader
from deepgen_jax.data.transforms import target_size
from deepgen_jax.errors import DeepGenError

_TOKENIZER = Path(__file__).parents[1] / "tests" / "fixtures" / "qwen2_5_vl"
_ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 16 / 9)


def write_images(folder: Path, samples: int, side: int, quality: int) -> list[Path]:
    """JPEG files of about ``side``^2 pixels with the spectrum of photographs, and a list of captions."""
    rng = np.random.default_rng(0)
    items, paths = [], []
    for number in range(samples):
        aspect = _ASPECTS[number % len(_ASPECTS)]
        size = round(side * aspect**0.5), round(side / aspect**0.5)
        picture = np.zeros((size[1], size[0], 3), np.float32)
        for scale, strength in ((64, 60.0), (16, 30.0), (4, 12.0), (1, 5.0)):
            small = rng.normal(0, strength, (size[1] // scale + 1, size[0] // scale + 1, 3)).astype(np.float32)
            channels = [Image.fromarray(small[..., c]).resize(size, Image.Resampling.BILINEAR) for c in range(3)]
            picture += np.stack([np.asarray(channel) for channel in channels], -1)
        paths.append(folder / f"{number:05d}.jpg")
        Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(paths[-1], quality=quality)
        words = " ".join(f"word{n}" for n in rng.integers(0, 1000, rng.integers(10, 60)))
        items.append({"txt": words, "image_path": paths[-1].name})
    (folder / "list.json").write_text(json.dumps(items), encoding="utf-8")
    return paths


def bare(paths: Sequence[Path], image_size: int) -> int:
    """Decodes and resizes files with only Pillow; returns the number of pixels."""
    pixels = 0
    for path in paths:
        with Image.open(path) as image:
            small = image.convert("RGB").resize(target_size(*image.size, image_size, "fix_pixels"))
        pixels += small.width * small.height
    return pixels


def compare(options: Any, folder: Path) -> dict[str, Any]:
    """Samples per second of both, interleaved."""
    start = time.perf_counter()
    paths = write_images(folder, options.samples, options.sides, options.quality)
    progress(f"{options.samples} images written in {time.perf_counter() - start:.1f} s")
    cores = len(os.sched_getaffinity(0))
    config = DataConfig(
        sources=(SourceConfig("benchmark", "json", str(folder / "list.json")),),
        mixture=MixtureConfig(cycle=("t2i",)),
        micro_batch=options.micro_batch,
        image_size=options.image_size,
        exact_sizes=True,
        workers=options.workers,
        threads=options.threads,
        cache_dir=str(folder / "cache"),
    )
    batches = options.samples // options.micro_batch
    start = time.perf_counter()
    loader = Loader(config, _model(options.tokenizer), options.tokenizer)
    indexing = time.perf_counter() - start
    state = loader.get_state()
    # Enough to fill every buffer, so that input and output rates are equal while the clock runs.
    ahead = (config.prefetch + 2) * max(1, config.workers)

    def run_loader() -> None:
        for _ in range(batches):
            next(loader)

    with loader, ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        chunks = [paths[i::cores] for i in range(cores)]
        sizes = [options.image_size] * cores

        def run_bare() -> None:
            list(pool.map(bare, chunks, sizes))

        times: dict[str, list[float]] = {"bare": [], "loader": []}
        run_bare()
        for _ in range(options.repetitions):
            times["bare"] += alternate({"bare": run_bare}, 1)["bare"]
            loader.set_state(state)
            for _ in range(ahead):
                next(loader)
            times["loader"] += alternate({"loader": run_loader}, 1)["loader"]
            loader.close()
    done = {"bare": options.samples, "loader": batches * options.micro_batch}
    rate = {name: [done[name] / seconds for seconds in times[name]] for name in times}
    return {
        "samples": options.samples,
        "mean_file_bytes": sum(path.stat().st_size for path in paths) // len(paths),
        "index_samples_a_second": round(options.samples / indexing, 1),
        "samples_a_second": {name: [round(x, 2) for x in r] for name, r in rate.items()},
        "loader_over_bare": {
            "median": round(statistics.median(rate["loader"]) / statistics.median(rate["bare"]), 4),
            "best": round(max(rate["loader"]) / max(rate["bare"]), 4),
        },
        "seconds": {name: summary(t) for name, t in times.items()},
    }


def _model(tokenizer: Path) -> DeepGenConfig:
    """The released model with the special tokens of the folder's tokenizer."""
    config = DeepGenConfig()
    ids = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return replace(config, text=replace(config.text, **{name: ids[name] for name in names}))


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--sides", type=int, default=1024, help="the images hold about this many pixels squared")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="reading processes; 0 for threads")
    parser.add_argument("--threads", type=int, default=0, help="in each process; 0 for one a core")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=_TOKENIZER, help="folder with tokenizer.json and config.json")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(options, Path(folder))
    except DeepGenError as error:
        progress(f"loader: error: {error}")
        return 2
    result["settings"] = {name: value for name, value in vars(options).items() if name != "tokenizer"}
    print(json.dumps(result | environment(["numpy", "pillow", "grain"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
