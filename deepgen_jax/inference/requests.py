"""The arguments of a pipeline call, brought to one shape: lists with an entry for each image to make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from PIL import Image

from deepgen_jax.errors import DeepGenError

ImageArgument = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None

#: Seeds are 32-bit, so that they mean the same with and without JAX's 64-bit mode.
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Requests:
    """Images to make, one entry per image.

    Attributes:
      prompts, negative_prompts: texts.
      images: reference pictures, None for text-to-image.
      seeds, indices: noise of image i is drawn from (seeds[i], indices[i]).
      rows: the place of each entry in the caller's batch (repeated where the batch was padded).
      count: entries the caller asked for; those after them are padding.
    """

    prompts: list[str]
    negative_prompts: list[str]
    images: list[Sequence[Image.Image] | None]
    seeds: list[int]
    indices: list[int]
    rows: list[int]
    count: int

    def row(self, i: int) -> Requests:
        """Only entry ``i``."""
        at = slice(i, i + 1)
        return Requests(
            self.prompts[at], self.negative_prompts[at], self.images[at], self.seeds[at], self.indices[at], [0], 1
        )

    def padded(self, multiple: int) -> Requests:
        """The same, with the last entry repeated until the number of entries is a multiple of ``multiple``."""
        rows = list(range(self.count)) + [self.count - 1] * (-self.count % multiple)
        fields = ("prompts", "negative_prompts", "images", "seeds", "indices")
        repeated: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in fields}
        return replace(self, rows=rows, **repeated)


def collect(
    prompt: str | Sequence[str],
    image: ImageArgument,
    negative_prompt: str | Sequence[str | None] | None,
    seed: int | Sequence[int],
) -> Requests:
    """Checks the arguments against each other; a negative prompt of None is an empty one.

    Raises:
      DeepGenError: numbers of prompts, negative prompts, images or seeds that do not go together.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise DeepGenError("no prompt is given; pass a text or a list of texts")
    count = len(prompts)
    if negative_prompt is None or isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt] * count
    negatives = [text or "" for text in negative_prompt]
    one_seed = isinstance(seed, Integral)
    seeds = [int(seed)] * count if one_seed else [int(value) for value in seed]  # type: ignore[arg-type, union-attr]
    for text in (*prompts, *negatives):
        if not isinstance(text, str):
            raise DeepGenError(f"a prompt is {text!r:.60}; prompts are texts")
    for name, values in (("negative prompts", negatives), ("seeds", seeds)):
        if len(values) != count:
            raise DeepGenError(f"{count} prompts, but {len(values)} {name}; give one for all or one each")
    for value in seeds:
        if not 0 <= value <= MAX_SEED:
            raise DeepGenError(f"seed {value} is out of range; use 0 to {MAX_SEED}")
    indices = list(range(count)) if one_seed else [0] * count
    return Requests(prompts, negatives, _per_prompt(image, count), seeds, indices, list(range(count)), count)


def _per_prompt(image: ImageArgument, count: int) -> list[Sequence[Image.Image] | None]:
    if image is None:
        return [None] * count
    if isinstance(image, Image.Image):
        return [[image]] * count
    entries = list(image)
    if all(isinstance(entry, Image.Image) for entry in entries):
        if count > 1:
            raise DeepGenError(f"a flat list of images with {count} prompts; give a list of images for each prompt")
        return [entries] if entries else [None]  # type: ignore[list-item]
    if len(entries) != count:
        raise DeepGenError(f"{count} prompts, but {len(entries)} lists of images; give one list a prompt")
    rows: list[Sequence[Image.Image] | None] = []
    for entry in entries:
        row: list[Image.Image] = [entry] if isinstance(entry, Image.Image) else list(entry or ())  # type: ignore[call-overload]
        if not all(isinstance(item, Image.Image) for item in row):
            raise DeepGenError("images must be PIL images; open files with PIL.Image.open first")
        rows.append(row or None)
    return rows
