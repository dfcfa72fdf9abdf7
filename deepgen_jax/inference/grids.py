"""All images of a prompt in one picture, beside their files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.batch import Request
from deepgen_jax.inference.outputs import in_the_way, read_metadata, save_image


def tiled(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, in rows of at most ``columns``."""
    width, height = pictures[0].size
    across = min(columns, len(pictures))
    sheet = Image.new("RGB", (across * width, -(-len(pictures) // across) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % across * width, i // across * height))
    return sheet


def plan_grids(requests: Sequence[Request]) -> dict[str, list[str]]:
    """Grid -> files of its images, for prompts with several: "cat_grid.png" -> "cat_0.png", "cat_1.png".

    Raises:
      DeepGenError: no prompt has several images, or a grid would have the name of an image.
    """
    images: dict[str, list[str]] = {}
    for request in requests:
        images.setdefault(request.source, []).append(request.file)
    several = [files for files in images.values() if len(files) > 1]
    if not several:
        raise DeepGenError("--grid shows several images of a prompt; ask for them with --num-images")
    # Images of one prompt differ in the number at the end.
    grids = {f"{Path(files[0]).stem.rpartition('_')[0]}_grid{Path(files[0]).suffix}": files for files in several}
    taken = {request.file.casefold() for request in requests}
    for name in grids:
        if name.casefold() in taken:
            raise DeepGenError(f"the grid {name} has the name of an image; give that prompt another id")
    return grids


def check_free(folder: Path, grids: Mapping[str, Sequence[str]]) -> None:
    """Raises a DeepGenError where a file is in the way that no run has made."""
    for name in grids:
        path = folder / name
        if path.exists() and read_metadata(path) is None:
            raise in_the_way(path)


def write_grids(
    folder: Path, grids: Mapping[str, Sequence[str]], metadata: Mapping[str, Mapping[str, Any]]
) -> list[Path]:
    """Writes the grids whose images are all finished, from their files.

    Args:
      folder: of the images and the grids.
      grids: from `plan_grids`.
      metadata: of each finished image, which the grid's holds in their order.

    Returns:
      the grids' paths.

    Raises:
      DeepGenError: a file cannot be read or written.
    """
    written: list[Path] = []
    for name, files in grids.items():
        if not all(file in metadata for file in files):
            continue
        pictures = [load_image(folder / file) for file in files]
        shown = [metadata[file] for file in files]
        digest = hashlib.sha256("".join(image["fingerprint"] for image in shown).encode()).hexdigest()[:32]
        sheet = tiled(pictures, math.ceil(math.sqrt(len(pictures))))
        save_image(sheet, folder / name, {"file": name, "images": shown, "fingerprint": digest})
        written.append(folder / name)
    return written
