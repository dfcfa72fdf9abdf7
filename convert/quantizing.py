"""``deepgen quantize``: a model folder -> one with 8-bit weights, array by array."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import deepgen_jax
from deepgen_jax.config import QuantizationConfig
from deepgen_jax.stores.model_folder import locate, read_manifest

from .exporting import StoredTensors
from .folder_writer import write_arrays, write_manifest
from .output import staged
from .quantized_leaves import quantized_contents
from .stored_params import open_folder

#: Files of a model folder that its writer makes anew.
_WRITTEN = ("config.json", "scheduler_config.json")


class QuantizationReport(NamedTuple):
    """The new folder, and the bytes of the arrays before and after."""

    folder: Path
    before: int
    after: int

    def __str__(self) -> str:
        return f"wrote {self.folder}: weights of {self.after / 1e6:,.1f} MB instead of {self.before / 1e6:,.1f} MB"


def quantize(
    folder: str | Path, to: str, out: str | Path, *, products: bool = False, overwrite: bool = False
) -> QuantizationReport:
    """Writes a model folder whose kernels and tables are 8-bit where `quantized.treatment` says so.

    Arrays are read, rounded and written one by one. Adapters kept apart are merged first, in float32.

    Args:
      folder: model folder, or "nano" for the package's model.
      to: "int8" or "fp8".
      out: the folder to write; it appears when everything is written, or not at all.
      products: layers compute their matrix products in 8 bits, too.
      overwrite: replace ``out``.

    Raises:
      DeepGenError: the folder is none, is quantised already or damaged, or ``out`` exists.
    """
    how, folder, out = QuantizationConfig(to, products), locate(folder), Path(out)
    tensors = StoredTensors(open_folder(folder), merge=True, dtype=None)
    whole = tensors.contents()
    contents = quantized_contents(whole, how)
    provenance = {
        "deepgen_jax": deepgen_jax.__version__,
        "sources": [
            {"path": str(folder), "layout": "model folder", "provenance": read_manifest(folder).provenance},
        ],
        "options": {"quantize": how.weights, "products": how.products},
        "merged_adapters": tensors.merged,
    }
    with staged(out, overwrite=overwrite) as partial:
        write_arrays(partial, out, contents, "quantizing")
        for file in folder.iterdir():  # such as known_words.txt
            if file.is_file() and file.name not in _WRITTEN:
                shutil.copyfile(file, partial / file.name)
        write_manifest(partial, contents, provenance)
    return QuantizationReport(out, *(sum(leaf.nbytes for leaf in each.params) for each in (whole, contents)))
