"""Exact scores of nano with 8-bit weights against its stored weights, picture by picture; prints a Markdown table.

    python benchmarks/quantized_scores.py --prompts 54

Makes the same held-out prompts and edits from the same noise with each model, and counts those that come out right
(of edits: with the rest preserved). Models see the same samples, so the interval is of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from inference import _positive
from measure import Parser, progress

from deepgen_jax.convert import quantize
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.cache import enable_compilation_cache
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.nano.benchmark import generated, held_out_samples
from deepgen_jax.nano.reward import WorldReward
from deepgen_jax.nano.samples import Sample
from deepgen_jax.nano.world.score import score

STORED = "bfloat16"
#: Name -> (storage type, whether products are 8-bit).
VARIANTS = {
    "int8": ("int8", False),
    "int8, products": ("int8", True),
    "fp8": ("fp8", False),
    "fp8, products": ("fp8", True),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=_positive, default=54, help="of each of 13 skills (default: 54)")
    parser.add_argument("--steps", type=_positive, default=4, help="of the sampler (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise (default: 0)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="images at once (default: 8)")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--json", type=Path, help="also write the counts there")
    return parser.parse_args()


def results_of(model: str | Path, samples: list[Sample], args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Which samples come out right, bool [N], and their pictures, uint8 [N, H, W, 3]."""
    pipe = DeepGenPipeline.from_pretrained(model)
    make = generated(pipe, 96, steps=args.steps, guidance=1.0, seed=args.seed, batch_size=args.batch_size)
    read = WorldReward(workers=1).read
    right, pictures = [], []
    for sample, images in zip(samples, make(samples), strict=True):
        result = score(images.done, sample.truth, read)
        right.append(result.done and (result.kept or not sample.truth.is_edit))
        pictures.append(images.done)
    return np.array(right), np.stack(pictures)


def compare(right: np.ndarray, stored: np.ndarray) -> dict[str, Any]:
    """Difference of two shares over the same samples, in points, with its 95% interval."""
    change = right.astype(float) - stored
    spread = 1.96 * float(np.std(change)) / math.sqrt(len(change))
    return {
        "right": int(right.sum()), "lost": int((change < 0).sum()), "gained": int((change > 0).sum()),
        "points": 100 * float(change.mean()), "interval": 100 * spread,
    }  # fmt: skip


def main() -> None:
    args = arguments()
    enable_compilation_cache(None)
    samples = held_out_samples(args.prompts, args.seed)
    rows: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            models: dict[str, str | Path] = {STORED: "nano"}
            for name in args.variants:
                to, products = VARIANTS[name]
                models[name] = quantize("nano", to, Path(folder) / name.replace(", ", "-"), products=products).folder
            stored = pixels = None
            for name, model in models.items():
                start = time.process_time()
                right, pictures = results_of(model, samples, args)
                if stored is None or pixels is None:
                    stored, pixels = right, pictures.astype(np.float64)
                rows[name] = compare(right, stored)
                error = float(np.mean((pictures - pixels) ** 2)) / 255**2
                rows[name]["psnr"] = -10 * math.log10(error) if error else None
                progress(f"{name}: {rows[name]}, {time.process_time() - start:.0f} CPU seconds")
    except DeepGenError as error_:
        progress(f"quantized_scores.py: error: {error_}")
        sys.exit(2)
    if args.json:
        args.json.write_text(json.dumps({"samples": len(samples), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"| of {len(samples)} | right | lost | gained | difference, points (95%) | PSNR, dB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        rest = ["", "", "", ""]
        if name != STORED:
            difference = f"{row['points']:+.1f} (±{row['interval']:.1f})"
            rest = [str(row["lost"]), str(row["gained"]), difference, f"{row['psnr']:.1f}"]
        print("| " + " | ".join([name, f"{row['right']} ({row['right'] / len(samples):.1%})", *rest]) + " |")


if __name__ == "__main__":
    main()
