"""A tiny example data set: coloured shapes with captions, and edits that change their colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from deepgen_jax.data.transforms import UNIT
from deepgen_jax.errors import DeepGenError

_COLOURS = {
    "red": (220, 40, 40),
    "blue": (40, 70, 220),
    "green": (40, 160, 60),
    "yellow": (240, 200, 40),
    "purple": (150, 50, 190),
    "orange": (240, 130, 30),
}
_BACKGROUNDS = {"white": (245, 245, 245), "black": (25, 25, 25), "grey": (130, 130, 130), "pink": (250, 180, 200)}
_SHAPES = ("circle", "square", "triangle")


class _Scene(NamedTuple):
    """One shape of one colour before a background."""

    shape: str
    colour: str
    background: str

    def __str__(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background"


def write_example_data(out: Path, *, pictures: int = 8, edits: int = 4, size: int = 64) -> tuple[Path, ...]:
    """Writes ``t2i.json`` and ``edit.json`` in the released formats with their pictures, always the same.

    The captions are also in ``prompts.txt``, for reinforcement learning.

    Every second edit has two references: "paint the square in the colour of the second picture".

    Args:
      out: folder to write, made if it is not there; it must be empty otherwise.
      pictures: number of pictures with captions.
      edits: number of edits.
      size: side of all pictures in pixels, a multiple of 32.

    Returns:
      the two lists and the prompts.

    Raises:
      DeepGenError: a number is not usable, or ``out`` holds something or cannot be written.
    """
    different = len(_SHAPES) * len(_COLOURS) * len(_BACKGROUNDS)
    for name, value in (("--pictures", pictures), ("--edits", edits)):
        if not 1 <= value <= different:
            raise DeepGenError(f"{name} is {value}; use 1 to {different}")
    if size < UNIT or size % UNIT:
        raise DeepGenError(f"--size is {size}; use a multiple of {UNIT}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DeepGenError(f"{out} exists and is not an empty folder; give another --out")
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        captioned = [_captioned(out, scene, number, size) for number, scene in enumerate(_scenes(pictures))]
        edited = [_edited(out, scene, number, size) for number, scene in enumerate(_scenes(edits))]
        for name, items in (("t2i", captioned), ("edit", edited)):
            (out / f"{name}.json").write_text(json.dumps(items, indent=1), encoding="utf-8")
        prompts = "".join(f"{item['txt']}\n" for item in captioned)
        (out / "prompts.txt").write_text(prompts, encoding="utf-8")
    except OSError as error:
        raise DeepGenError(f"{out} cannot be written: {error.strerror or error}") from error
    return out / "t2i.json", out / "edit.json", out / "prompts.txt"


def _scenes(count: int) -> list[_Scene]:
    """Different scenes, ordered so that neighbours differ in everything."""
    colours, backgrounds = list(_COLOURS), list(_BACKGROUNDS)
    found: dict[_Scene, None] = {}
    number = 0
    while len(found) < count:
        # The second turn keeps the periods of the three lists from locking.
        turn = number // len(colours)
        scene = _Scene(
            _SHAPES[(number + turn // len(backgrounds)) % len(_SHAPES)],
            colours[number % len(colours)],
            backgrounds[(number + turn) % len(backgrounds)],
        )
        found.setdefault(scene)
        number += 1
    return list(found)


def _captioned(out: Path, scene: _Scene, number: int, size: int) -> dict[str, Any]:
    path = _draw(out, f"picture-{number}", scene, size)
    return {"type": "T2I_SFT", "txt": str(scene), "image": "", "image_path": path}


def _edited(out: Path, scene: _Scene, number: int, size: int) -> dict[str, Any]:
    colours = list(_COLOURS)
    wanted = scene._replace(colour=colours[(colours.index(scene.colour) + 2) % len(colours)])
    references = [_draw(out, f"edit-{number}-before", scene, size)]
    instruction = f"make the {scene.shape} {wanted.colour}"
    if number % 2:
        # A picture of another shape shows the colour.
        other = _SHAPES[(_SHAPES.index(scene.shape) + 1) % len(_SHAPES)]
        references.append(_draw(out, f"edit-{number}-colour", wanted._replace(shape=other), size))
        instruction = f"paint the {scene.shape} in the colour of the second picture"
    target = _draw(out, f"edit-{number}-after", wanted, size)
    return {"input_image": references, "output_image": target, "instruction": instruction}


def _draw(out: Path, name: str, scene: _Scene, size: int) -> str:
    """Draws a picture; returns its path relative to ``out``."""
    image = Image.new("RGB", (size, size), _BACKGROUNDS[scene.background])
    draw, colour = ImageDraw.Draw(image), _COLOURS[scene.colour]
    low, high = size // 4, size - size // 4 - 1
    if scene.shape == "circle":
        draw.ellipse((low, low, high, high), colour)
    elif scene.shape == "square":
        draw.rectangle((low, low, high, high), colour)
    else:
        draw.polygon(((size // 2, low), (high, high), (low, high)), colour)
    path = f"images/{name}.png"
    image.save(out / path)
    return path
