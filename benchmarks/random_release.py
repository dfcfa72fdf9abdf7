"""Writes random weights in the diffusers-release layout: of the released model's size (13 GB), or tiny (2 MB).

    python benchmarks/random_release.py --size full --out full
    deepgen convert --diffusers full --out full-model

Tensors go to disk one by one, so little memory is needed. Prints JSON: bytes, seconds, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.convert.random_release import tiny_config, write_release
from deepgen_jax.errors import DeepGenError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="default: full")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--max-shard-size", default="5GB", help="of a safetensors file (default: 5GB)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        write_release(
            options.out,
            DeepGenConfig() if options.size == "full" else tiny_config(),
            seed=options.seed,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
        )
    except DeepGenError as error:
        print(f"random_release: error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    result = {
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
