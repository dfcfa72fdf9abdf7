"""Scenes of the world, and the combinations that are held out of training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepgen_jax.nano.world.vocabulary import COLOURS, REACH, RELATIONS, SHAPES, SIZES

#: One combination in this many is held out.
HELD_OUT_SHARE = 16
#: Least distance between outlines, as a share of the picture's side.
_GAP = 0.04
#: Default positions by the number of things: in the middle, side by side, or as on a die.
ARRANGEMENTS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.5, 0.5),),
    2: ((0.243, 0.5), (0.757, 0.5)),
    3: ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
    5: ((0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.75, 0.75)),
}
#: Default size and background.
USUAL_SIZE, USUAL_BACKGROUND = "large", "white"
# Jitter of default positions along either side.
_SPREAD = 0.006
#: Height of a sign's plate, and of the band around it that is kept free of shapes.
SIGN_HEIGHT, SIGN_BAND = 0.26, 0.34


@dataclass(frozen=True)
class Thing:
    """A coloured shape; ``x`` and ``y`` are its middle as shares of the picture's sides, from the top left corner."""

    colour: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def look(self) -> tuple[str, str]:
        """Colour and shape, which name a thing."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Sign:
    """A white plate with a black word, across the picture; ``font`` is one of `deepgen_jax.nano.world.render.FONTS`."""

    word: str
    font: int
    y: float


@dataclass(frozen=True)
class Scene:
    """A picture: things that do not touch each other, perhaps a sign, before a plain background."""

    background: str
    things: tuple[Thing, ...]
    sign: Sign | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values, the inverse of `from_json`."""
        sign = vars(self.sign) if self.sign else None
        return {"background": self.background, "things": [dict(vars(t)) for t in self.things], "sign": sign}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Scene:
        """The inverse of `to_json`."""
        sign = Sign(**values["sign"]) if values["sign"] else None
        return cls(values["background"], tuple(Thing(**thing) for thing in values["things"]), sign)


def held_out(*combination: object) -> bool:
    """Whether a combination of words, such as ("red", "circle"), is held out of training; never changes."""
    digest = hashlib.sha256("/".join(map(str, combination)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def relation_key(first: Thing, relation: str, second: Thing) -> tuple[str, ...]:
    """The combination of a relation, the same for both of its directions."""
    if relation in ("right", "below"):
        first, relation, second = second, RELATIONS[relation], first
    return (*first.look, relation, *second.look)


def different_looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different (colour, shape) pairs."""
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return rng.sample(looks, count)


def fits(thing: Thing, others: Sequence[Thing], sign: Sign | None = None) -> bool:
    """Whether a thing is inside the picture, and clear of others and of a sign."""
    radius = SIZES[thing.size]
    edge = REACH * radius + 0.01
    if not (edge <= thing.x <= 1 - edge and edge <= thing.y <= 1 - edge):
        return False
    if sign is not None and abs(thing.y - sign.y) < SIGN_BAND / 2 + REACH * radius:
        return False
    return all(
        (thing.x - o.x) ** 2 + (thing.y - o.y) ** 2 >= (REACH * (radius + SIZES[o.size]) + _GAP) ** 2 for o in others
    )


def scattered(
    rng: random.Random, looks: Sequence[tuple[str, str]], sizes: Sequence[str], sign: Sign | None = None
) -> tuple[Thing, ...]:
    """Things at random positions, clear of each other and of the sign."""
    while True:
        things: list[Thing] = []
        for (colour, shape), size in zip(looks, sizes, strict=True):
            for _ in range(60):
                thing = Thing(colour, shape, size, round(rng.random(), 3), round(rng.random(), 3))
                if fits(thing, things, sign):
                    things.append(thing)
                    break
        if len(things) == len(looks):
            return tuple(things)


def arranged(
    rng: random.Random,
    looks: Sequence[tuple[str, str]],
    sizes: Sequence[str | None],
    points: Sequence[tuple[float, float]] = (),
) -> tuple[Thing, ...]:
    """One to five things near points, in their order; by default near those of `ARRANGEMENTS`.

    Places and sizes that a text leaves open have defaults, so that a small model has few pictures to learn.
    """
    points = points or ARRANGEMENTS[len(looks)]
    return tuple(
        Thing(*look, size or USUAL_SIZE, *_near(rng, point))
        for look, size, point in zip(looks, sizes, points, strict=True)
    )


def _near(rng: random.Random, point: tuple[float, float]) -> tuple[float, float]:
    return round(point[0] + rng.uniform(-_SPREAD, _SPREAD), 3), round(point[1] + rng.uniform(-_SPREAD, _SPREAD), 3)
