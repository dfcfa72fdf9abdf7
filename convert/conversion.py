"""``deepgen convert``: releases -> a model folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import deepgen_jax
from deepgen_jax.config import QuantizationConfig
from deepgen_jax.errors import DeepGenError

from . import configs
from .folder_writer import Contents, write_arrays, write_manifest
from .hparams import parse_hparams
from .output import staged
from .plan import Plan, make_plan
from .quantized_leaves import quantized_contents
from .release_inputs import Release, lora_config, open_bases, open_release
from .sources import BFLOAT16

DTYPES = {"bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Report:
    """Summary of a conversion.

    Attributes:
      folder: the new model folder.
      parameters: part -> count, bytes and dtypes.
      provenance: as stored in ``config.json``.
      merged: number of weights that adapters were folded into.
      unused: source entries that were left out -> reason.
    """

    folder: Path
    parameters: dict[str, dict[str, Any]]
    provenance: dict[str, Any]
    merged: int
    unused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{'part':<8} {'parameters':>15} {'size':>10}  dtypes"]
        for part, summary in self.parameters.items():
            dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in sorted(summary["dtypes"].items()))
            lines.append(f"{part:<8} {summary['count']:>15,} {summary['bytes'] / 1e6:>7,.1f} MB  {dtypes}")
        options = self.provenance["options"]
        if self.merged:
            lines.append(f"merged {self.merged} adapters in float32 (alpha {options['lora_alpha']:g})")
        elif "lora" in self.parameters:
            lines.append(f"kept the adapters apart (alpha {options['lora_alpha']:g})")
        for source in self.provenance["sources"]:
            if "seed" in source:
                lines.append(f"the bridge is freshly initialised (seed {source['seed']}); train it before use")
        for label, count in self.provenance["superseded"].items():
            lines.append(f"superseded by the checkpoint: {count} tensors of {label}")
        for reason in sorted(set(self.unused.values())):
            names = sorted(name for name, why in self.unused.items() if why == reason)
            lines.append(f"left out {len(names)} ({reason}): {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}")
        return "\n".join([*lines, f"wrote {self.folder}"])


def convert(
    *,
    out: str | Path,
    qwen: str | Path | None = None,
    sd3: str | Path | None = None,
    checkpoint: str | Path | None = None,
    diffusers: str | Path | None = None,
    hparams: str | Path | None = None,
    keep_lora: bool = False,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    member: str | None = None,
    ema: bool = False,
    quantize: str | None = None,
    products: bool = False,
    overwrite: bool = False,
    seed: int = 0,
) -> Report:
    """Converts released weights to the model folder ``out``.

    Args:
      out: the folder to write; it appears when everything is written, or not at all.
      qwen: Qwen2.5-VL folder. Needs ``sd3``.
      sd3: diffusers folder with transformer/, vae/ and scheduler/.
      checkpoint: stage checkpoint (a file, a folder or the first zip part). Without one, the bridge is freshly
        initialised, as for the start of training.
      diffusers: DeepGen diffusers release, instead of the three above.
      hparams: JSON file of hyper-parameters that no checkpoint stores.
      keep_lora: store adapters apart instead of merging them.
      lora_alpha: numerator of the adapters' scale; 2 x rank where neither this nor ``hparams`` says.
      dtype: "bfloat16" or "float32" for everything stored; None keeps each tensor's own.
      member: part of the name of the checkpoint inside an archive that holds several.
      ema: take the checkpoint's moving average of the weights; what it does not cover is taken as trained. Without it
        the trained weights are taken, unless the checkpoint has nothing but an average.
      quantize: "int8" or "fp8" to store the weights of large layers in 8 bits.
      products: with ``quantize``, matrix products are 8-bit, too.
      overwrite: replace ``out``.
      seed: of a newly initialised bridge.

    Raises:
      DeepGenError: anything is wrong with the sources; ``out`` is then as it was.
    """
    out = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise DeepGenError(f"--dtype {dtype} is unknown; use {' or '.join(DTYPES)}")
    if (diffusers is None) == (qwen is None and sd3 is None):
        raise DeepGenError("give either --diffusers, or --qwen and --sd3 (with --checkpoint for trained weights)")
    if diffusers is not None and checkpoint is not None:
        raise DeepGenError("--checkpoint goes with --qwen and --sd3; a diffusers release is complete by itself")
    if ema and checkpoint is None:
        raise DeepGenError("--ema is for --checkpoint; leave it out")
    if products and quantize is None:
        raise DeepGenError("--products is for --quantize; leave it out")
    if quantize is not None and keep_lora:
        raise DeepGenError("8-bit weights have adapters merged; leave out --keep-lora or --quantize")
    how = None if quantize is None else QuantizationConfig(quantize, products)
    with staged(out, overwrite=overwrite) as partial, contextlib.ExitStack() as stack:
        given = None if hparams is None else parse_hparams(configs.read_json(Path(hparams)), str(hparams))
        if diffusers is not None:
            release = open_release(Path(diffusers), given, stack)
        elif qwen is None or sd3 is None:
            raise DeepGenError("--qwen and --sd3 go together; give both")
        else:
            stage = None if checkpoint is None else Path(checkpoint)
            release = open_bases(Path(qwen), Path(sd3), stage, given, member=member, ema=ema, seed=seed, stack=stack)
        lora = lora_config(release, lora_alpha)
        stored = None if dtype is None else DTYPES[dtype]
        plan = make_plan(release.config, release.inventory, lora, keep_lora=keep_lora, dtype=stored)
        options = {"keep_lora": keep_lora, "dtype": dtype, "lora_alpha": lora.alpha if lora else None, "ema": ema}
        if how is not None:
            options |= {"quantize": how.weights, "products": how.products}
        return _write(partial, out, plan, release, options, how)


def _write(
    partial: Path,
    out: Path,
    plan: Plan,
    release: Release,
    options: dict[str, Any],
    how: QuantizationConfig | None,
) -> Report:
    contents = Contents(plan.config, release.scheduler, release.tokenizer, plan.params, plan.lora)
    if how is not None:
        contents = quantized_contents(contents, how)
    write_arrays(partial, out, contents, "converting")
    if plan.not_finite:
        names = sorted(plan.not_finite)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise DeepGenError(f"NaN or infinite weights in {', '.join(names[:3])}{more}; download or train them again")
    provenance = {
        "deepgen_jax": deepgen_jax.__version__,
        "sources": [source.provenance() for source in release.sources],
        "options": options,
        "merged_adapters": len(plan.merged),
        "superseded": release.inventory.superseded,
        "left_out": _count_reasons(release.inventory.unused),
    }
    write_manifest(partial, contents, provenance)
    return Report(out, contents.summaries(), provenance, len(plan.merged), release.inventory.unused)


def _count_reasons(unused: Mapping[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in unused.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts
