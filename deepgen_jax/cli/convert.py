"""``deepgen convert``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ConvertCommand:
    """Convert released weights to a model folder.

    Give either --diffusers, or --qwen and --sd3 with a --checkpoint. The folder appears when everything is written, or
    not at all.
    """

    out: Path
    """Model folder to write."""
    qwen: Path | None = None
    """Folder of Qwen2.5-VL (config.json, safetensors, tokenizer)."""
    sd3: Path | None = None
    """Diffusers folder with transformer/, vae/ and scheduler/ (UniPic2-SD3.5M-Kontext)."""
    checkpoint: Path | None = None
    """Stage checkpoint: .pth, DeepSpeed folder, .safetensors, or the first part of the split zip (it is read in place).
    Without one, the bridge is freshly initialised, as for the start of training."""
    diffusers: Path | None = None
    """DeepGen diffusers release, instead of --qwen, --sd3 and --checkpoint."""
    hparams: Path | None = None
    """JSON file of hyper-parameters that no checkpoint stores; without it they are those of the released model."""
    member: str | None = None
    """Part of the name of the checkpoint to read from an archive that holds several, such as SFT."""
    ema: bool = False
    """Take the checkpoint's moving average of the weights, which is left out otherwise."""
    keep_lora: bool = False
    """Store LoRA adapters apart instead of merging them."""
    lora_alpha: float | None = None
    """Numerator of the adapters' scale alpha / rank; 2 x rank where neither this nor --hparams says."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype to store all weights in; by default each keeps its own, and merged ones are float32."""
    quantize: Literal["int8", "fp8"] | None = None
    """Store the weights of large layers in 8 bits, for inference alone; see docs/quantize.md."""
    products: bool = False
    """With --quantize: compute matrix products in 8 bits, too."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    seed: int = 0
    """Seed of a freshly initialised bridge."""

    def run(self) -> int:
        """Converts and prints a summary; returns the exit status."""
        # Nothing here computes on an accelerator, so none is taken.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from deepgen_jax.convert import convert

        report = convert(
            out=self.out, qwen=self.qwen, sd3=self.sd3, checkpoint=self.checkpoint, diffusers=self.diffusers,
            hparams=self.hparams, member=self.member, ema=self.ema, keep_lora=self.keep_lora,
            lora_alpha=self.lora_alpha,
            dtype=self.dtype, quantize=self.quantize, products=self.products, overwrite=self.overwrite, seed=self.seed,
        )  # fmt: skip
        print(report)
        return 0
