"""Text-to-image samples of the world, one function a skill."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from deepgen_jax.nano.world import captions
from deepgen_jax.nano.world.render import FONTS
from deepgen_jax.nano.world.scene import (
    ARRANGEMENTS,
    USUAL_BACKGROUND,
    Scene,
    Sign,
    Thing,
    arranged,
    different_looks,
    fits,
    relation_key,
    scattered,
)
from deepgen_jax.nano.world.truth import Truth, Wanted
from deepgen_jax.nano.world.vocabulary import (
    BACKGROUNDS,
    COLOUR_RIDDLES,
    NUMBER_RIDDLES,
    NUMBERS,
    PLACES,
    RELATIONS,
    SHAPE_RIDDLES,
    SIZES,
    WORDS,
    ZH,
)

# Least distance along the axis of a relation, above the scorer's tolerance (`deepgen_jax.nano.world.score`).
_LEAST_APART = 0.12

Look = tuple[str, str]
#: Skills whose scenes `varied` draws, and where it puts things.
VARIED_SKILLS = ("single", "two", "relation")
VARIED_PLACES = ("anywhere", "places")
#: Share of captions in Chinese, for skills that have them.
_CHINESE = 0.15
#: Where a sign can be.
SIGN_HEIGHTS = (0.2, 0.5, 0.8)
# Heights of a single sign and of one above a thing, and the place of that thing.
_SIGN_ALONE, _SIGN_ABOVE, _BELOW_SIGN = 0.5, 0.2, (0.5, 0.7)


@dataclass(frozen=True)
class Sample:
    """A prompt, the scene that it asks for, and its ground truth.

    Attributes:
      text: caption or instruction.
      scene: of the picture that is wanted.
      references: scenes of the reference pictures.
      truth: what the picture must show.
      combinations: word combinations of the prompt, each checked by `held_out`.
    """

    text: str
    scene: Scene
    references: tuple[Scene, ...]
    truth: Truth
    combinations: tuple[tuple[object, ...], ...]


def background(rng: random.Random) -> str:
    """Any background."""
    return rng.choice(list(BACKGROUNDS))


def some_size(rng: random.Random) -> str:
    """Any size."""
    return rng.choice(list(SIZES))


def _perhaps(rng: random.Random, make: Callable[[random.Random], str]) -> str | None:
    """A property for the caption, or None (half of the time) where the caption leaves it open."""
    return rng.choice((make(rng), None))


def single(rng: random.Random) -> Sample:
    """One thing: "a large red circle in the middle on a white background"."""
    (look,) = different_looks(rng, 1)
    said_size, said_scenery, place = _perhaps(rng, some_size), _perhaps(rng, background), rng.choice(("", "", *PLACES))
    things = arranged(rng, [look], [said_size], [PLACES[place]] if place else ())
    if _chinese(rng):
        text = captions.before_zh(captions.single_zh(look, said_size, place), said_scenery)
    else:
        text = captions.before(rng, captions.single(rng, look, said_size, place), said_scenery)
    truth = Truth("single", (Wanted(*look, said_size, place),), background=said_scenery)
    return Sample(text, _plain(said_scenery, things), (), truth, (look,))


def two(rng: random.Random) -> Sample:
    """Two things: "a red circle and a small blue square"."""
    looks, said_scenery = different_looks(rng, 2), _perhaps(rng, background)
    said = [_perhaps(rng, some_size), _perhaps(rng, some_size)]
    if _chinese(rng):
        first, second = (f"一个{captions.thing_zh(look, size)}" for look, size in zip(looks, said, strict=True))
        text = captions.before_zh(f"{first}和{second}", said_scenery)
    else:
        first, second = (captions.thing(look, size) for look, size in zip(looks, said, strict=True))
        text = captions.before(rng, captions.two(rng, first, second), said_scenery)
    wanted = tuple(Wanted(*look, size) for look, size in zip(looks, said, strict=True))
    truth = Truth("two", wanted, background=said_scenery)
    pair = (*sorted(looks)[0], "and", *sorted(looks)[1])
    return Sample(text, _plain(said_scenery, arranged(rng, looks, said)), (), truth, (*looks, pair))


def relation(rng: random.Random) -> Sample:
    """Two things and their relation: "a large red circle to the left of a small blue square"."""
    looks, said_relation = different_looks(rng, 2), rng.choice(list(RELATIONS))
    said, said_scenery = [_perhaps(rng, some_size), _perhaps(rng, some_size)], _perhaps(rng, background)
    # On one line, so that a thing to the left is not also above.
    points = ARRANGEMENTS[2]
    if said_relation in ("right", "below"):
        points = points[::-1]
    if said_relation in ("above", "below"):
        points = tuple((y, x) for x, y in points)
    things = arranged(rng, looks, said, points)
    if _chinese(rng):
        first, second = (f"一个{captions.thing_zh(look, size)}" for look, size in zip(looks, said, strict=True))
        text = captions.before_zh(f"{first}在{second}的{ZH[said_relation]}", said_scenery)
    else:
        names = [captions.thing(look, size) for look, size in zip(looks, said, strict=True)]
        text = captions.before(rng, captions.relation(rng, names[0], said_relation, names[1]), said_scenery)
    wanted = tuple(Wanted(*look, size) for look, size in zip(looks, said, strict=True))
    truth = Truth("relation", wanted, said_relation, said_scenery)
    key = relation_key(things[0], said_relation, things[1])
    return Sample(text, _plain(said_scenery, things), (), truth, (*looks, key))


def count(rng: random.Random) -> Sample:
    """Several equal things: "three red circles"."""
    (look,), number, said_scenery = different_looks(rng, 1), rng.randint(1, 5), _perhaps(rng, background)
    if _chinese(rng):
        text = captions.before_zh(f"{ZH[NUMBERS[number - 1]]}个{captions.thing_zh(look)}", said_scenery)
    else:
        text = captions.before(rng, captions.several(rng, number, look), said_scenery)
    return _several("count", rng, text, look, number, said_scenery, (look, (number, *look)))


def reasoning(rng: random.Random) -> Sample:
    """A riddle: "the shape with three sides, in the colour of grass"."""
    (look,) = different_looks(rng, 1)
    kind = rng.choice(("both", "both", "colour", "shape", "number"))
    if kind == "number":
        number = rng.randint(1, 5)
        asked = f"as many {captions.plural(look)} {rng.choice(NUMBER_RIDDLES[number])}"
        text = captions.before(rng, asked, None)
        return _several("reasoning", rng, text, look, number, None, (look, ("as many", number, *look)))
    colour, shape = rng.choice(COLOUR_RIDDLES[look[0]]), rng.choice(SHAPE_RIDDLES[look[1]])
    if kind == "both":
        asked = rng.choice((f"{shape}, in {colour}", f"{shape} with {colour}"))
    else:
        asked = f"{captions.a(look[1])} in {colour}" if kind == "colour" else f"{shape}, {look[0]}"
    text = captions.before(rng, asked, None)
    truth = Truth("reasoning", (Wanted(*look),))
    return Sample(text, _plain(None, arranged(rng, [look], [None])), (), truth, (look, ("riddle", kind, *look)))


def text(rng: random.Random) -> Sample:
    """A word on a sign, perhaps with a thing: 'a sign that says "OPEN" and a red circle'."""
    word, said_scenery = rng.choice(WORDS), _perhaps(rng, background)
    phrase = captions.sign(rng, word)
    combinations: tuple[tuple[object, ...], ...] = (("word", word, said_scenery or USUAL_BACKGROUND),)
    things: tuple[Thing, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    height = _SIGN_ALONE
    if rng.random() >= 0.5:
        (look,) = different_looks(rng, 1)
        things = arranged(rng, [look], ["small"], [_BELOW_SIGN])
        phrase = f"{phrase} {rng.choice(('and', 'and', 'with', 'above'))} {captions.a(captions.thing(look))}"
        wanted, combinations, height = (Wanted(*look),), (look, *combinations), _SIGN_ABOVE
    described = captions.before(rng, phrase, said_scenery)
    truth = Truth("text", wanted, background=said_scenery, word=word)
    return Sample(described, _plain(said_scenery, things, Sign(word, 0, height)), (), truth, combinations)


def varied(rng: random.Random, sample: Sample, where: str) -> Sample:
    """The sample with another scene that meets its truth: what the caption leaves open is drawn at random.

    Sizes and backgrounds are uniform over their names. With the default scenes a caption determines its picture; here
    it has a distribution of pictures.

    Args:
      rng: source of the scene.
      sample: of one of `VARIED_SKILLS`.
      where: one of `VARIED_PLACES`: "anywhere" in the picture, or at one of `PLACES`.
    """
    truth = sample.truth
    looks = [(wanted.colour, wanted.shape) for wanted in truth.things]
    scenery = truth.background or background(rng)
    while True:
        sizes = [wanted.size or some_size(rng) for wanted in truth.things]
        if truth.things[0].place:
            things = arranged(rng, looks, sizes, [PLACES[wanted.place] for wanted in truth.things])
        elif where == "places":
            things = arranged(rng, looks, sizes, rng.sample(list(PLACES.values()), len(looks)))
            if not all(fits(thing, things[:i]) for i, thing in enumerate(things)):
                continue
        else:
            things = scattered(rng, looks, sizes)
        if not truth.relation or _clearly(truth.relation, *things):
            return replace(sample, scene=Scene(scenery, things))


def any_sign(rng: random.Random, word: str) -> Sign:
    """A sign of any font at any height."""
    return Sign(word, rng.randrange(len(FONTS)), rng.choice(SIGN_HEIGHTS))


def free_place(rng: random.Random, size: str, others: tuple[Thing, ...], sign: Sign | None) -> str | None:
    """A place where a thing of this size would be clear of others, or None."""
    places = [
        place for place, (x, y) in PLACES.items() if fits(Thing("red", "circle", size, x, y), others, sign)
    ]
    return rng.choice(places) if places else None


def _clearly(relation: str, first: Thing, second: Thing) -> bool:
    """Whether the first thing is farther on the side of the relation than it is beside the second."""
    across, down = second.x - first.x, second.y - first.y
    along, beside = (across, down) if relation in ("left", "right") else (down, across)
    return (along if relation in ("left", "above") else -along) > max(abs(beside), _LEAST_APART)


def _several(
    skill: str,
    rng: random.Random,
    text: str,
    look: Look,
    number: int,
    said_scenery: str | None,
    combinations: tuple[tuple[object, ...], ...],
) -> Sample:
    size = None if number < 3 else "small"
    things = arranged(rng, [look] * number, [size] * number)
    truth = Truth(skill, (Wanted(*look),) * number, background=said_scenery)
    return Sample(text, _plain(said_scenery, things), (), truth, combinations)


def _plain(said_scenery: str | None, things: tuple[Thing, ...], sign: Sign | None = None) -> Scene:
    return Scene(said_scenery or USUAL_BACKGROUND, things, sign)


def _chinese(rng: random.Random) -> bool:
    return rng.random() < _CHINESE
