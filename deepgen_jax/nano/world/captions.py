"""Captions of scenes and instructions of edits, in English and Chinese."""

from __future__ import annotations

import random

from deepgen_jax.nano.world.vocabulary import NUMBERS, ZH

_SIDES = ("to the {} of", "on the {} of", "{} of")
_RELATIONS = {
    "left": tuple(side.format("left") for side in _SIDES),
    "right": tuple(side.format("right") for side in _SIDES),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
# The same where the caption names the first thing after the second.
_TOWARDS = {
    "left": ("to its left", "on its left", "on the left"),
    "right": ("to its right", "on its right", "on the right"),
    "above": ("above it", "over it", "on top of it"),
    "below": ("below it", "under it", "beneath it"),
}
#: Whole captions: nearly half of them plain.
_OPENINGS = ("{}",) * 14 + (
    "a picture of {}", "an image of {}", "a photo of {}", "a drawing of {}", "a picture with {}", "picture of {}",
    "draw {}", "please draw {}", "paint {}", "show {}", "show me {}", "create {}", "make {}", "could you draw {}",
    "i want {}", "there is {}", "just {}", "only {}",
)  # fmt: skip
_BACKGROUNDS = (
    "{0} on a {1} background", "{0} on a {1} background", "{0} on {1}", "on a {1} background, {0}",
    "{0} with a {1} background", "{0} against a {1} background", "{0} in front of a {1} background",
    "a {1} background with {0}", "{0}, the background is {1}", "{0}, {1} background",
)  # fmt: skip
_AMERICAN = {"colour": "color", "grey": "gray", "centre": "center"}
_SIZES = {"large": "big", "small": "little"}
# Instructions with these beginnings are not turned into requests.
_STATEMENTS = ("the ", "there ", "i ", "in ", "no ")


def a(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def thing(look: tuple[str, str], size: str | None = None) -> str:
    """ "small red circle"."""
    return " ".join(filter(None, (size, *look)))


def thing_zh(look: tuple[str, str], size: str | None = None) -> str:
    """ "小红色圆形"."""
    return f"{ZH[size] if size else ''}{ZH[look[0]]}{ZH[look[1]]}"


def plural(look: tuple[str, str]) -> str:
    """ "red crosses"."""
    return f"{look[0]} {look[1]}{'es' if look[1].endswith('s') else 's'}"


def before(rng: random.Random, text: str, background: str | None) -> str:
    """The text with its background, if the caption names one, in some cases as a request."""
    if background is None:
        scene = rng.choice(("{}", "{}", "{}", "{} on a plain background")).format(text)
    else:
        scene = rng.choice(_BACKGROUNDS).format(text, background)
    return scene if scene.startswith("on ") else rng.choice(_OPENINGS).format(scene)


def before_zh(text: str, background: str | None) -> str:
    """The same in Chinese."""
    return text if background is None else f"{ZH[background]}背景上{text}"


def single(rng: random.Random, look: tuple[str, str], size: str | None, place: str) -> str:
    """One thing, perhaps at a place."""
    (colour, shape), said = look, thing(look, size)
    other = a(" ".join(filter(None, (size, shape))))
    ways = (f"one {said}", f"a single {said}", f"{other} in {colour}", f"{other} that is {colour}")
    said = rng.choice((*[a(said)] * 4, *ways))
    return said if not place else f"{said} {at(rng, place)}"


def at(rng: random.Random, place: str) -> str:
    """ "in the top left corner"."""
    return f"{rng.choice(('in', 'in', 'in', 'at'))} {where(rng, place)}"


def where(rng: random.Random, place: str) -> str:
    """ "the top left corner"."""
    if place == "middle":
        return rng.choice(("the middle", "the middle", "the centre"))
    upper = place.replace("top", "upper").replace("bottom", "lower")
    corners = (f"the {place} corner", f"the {upper} corner", f"the {place} corner of the picture")
    return rng.choice((corners[0], corners[0], *corners, f"the {place}"))


def single_zh(look: tuple[str, str], size: str | None, place: str) -> str:
    """The same in Chinese."""
    return f"{ZH[place] if place else ''}一个{thing_zh(look, size)}"


def two(rng: random.Random, first: str, second: str) -> str:
    """Two things."""
    pattern = rng.choice(("{0} and {1}", "{0} and {1}", "{0} and {1}", "{0} with {1}", "{0}, {1}", "{0} next to {1}",
                          "{0} beside {1}", "{0} plus {1}", "both {0} and {1}"))  # fmt: skip
    return pattern.format(a(first), a(second))


def relation(rng: random.Random, first: str, said: str, second: str) -> str:
    """Two things and their relation."""
    pattern = rng.choice(("{0} {1} {2}", "{0} {1} {2}", "{0} that is {1} {2}", "{0} is {1} {2}", "{0} placed {1} {2}",
                          "{2} with {0} {3}"))  # fmt: skip
    first, second = rng.choice(((a(first), a(second)),) * 3 + ((f"the {first}", f"the {second}"),))
    return pattern.format(first, rng.choice(_RELATIONS[said]), second, rng.choice(_TOWARDS[said]))


def several(rng: random.Random, number: int, look: tuple[str, str]) -> str:
    """ "three red crosses"."""
    said = f"{rng.choice((NUMBERS[number - 1], str(number)))} {' '.join(look) if number == 1 else plural(look)}"
    group = f"exactly {said}" if number == 1 else f"a group of {said}"
    return rng.choice((said, said, said, f"exactly {said}", group))


def sign(rng: random.Random, word: str) -> str:
    """A sign with its word."""
    patterns = ("a sign that says {}", "a sign that reads {}", "a sign saying {}", "a sign reading {}",
                "a sign with the word {}", "the word {} on a sign", "the word {}", "a {} sign",
                "a sign with {} on it", "a sign that spells {}", "the text {}")  # fmt: skip
    return rng.choice(patterns).format(quoted(rng, word))


def quoted(rng: random.Random, word: str) -> str:
    """The word, usually in double quotes."""
    return rng.choice(('"{}"',) * 5 + ("'{}'", "\u201c{}\u201d", "{}")).format(word)


def recolour(rng: random.Random, target: str, look: tuple[str, str], colour: str) -> str:
    """The instruction to change the colour of a thing of this look."""
    pattern = rng.choice((
        "make the {0} {1}", "make the {0} {1}", "change the colour of the {0} to {1}", "paint the {0} {1}",
        "colour the {0} {1}", "turn the {0} {1}", "change the {0} to {1}", "recolour the {0} to {1}",
        "the {0} should be {1}", "turn the {0} into {2}", "replace the {0} with {2}", "swap the {0} for {2}",
        "change the {4} from {3} to {1}", "i want the {0} to be {1}", "dye the {0} {1}", "give the {0} {5} colour",
    ))  # fmt: skip
    return pattern.format(target, colour, a(thing((colour, look[1]))), *look, a(colour))


def move(rng: random.Random, target: str, place: str) -> str:
    """The instruction to move a thing."""
    pattern = rng.choice(("move the {0} to {1}", "move the {0} to {1}", "move the {0} into {1}", "put the {0} into {1}",
                          "put the {0} in {1}", "place the {0} in {1}", "shift the {0} to {1}", "drag the {0} to {1}",
                          "bring the {0} to {1}", "the {0} should be in {1}"))  # fmt: skip
    return pattern.format(target, where(rng, place))


def remove(rng: random.Random, target: str) -> str:
    """The instruction to take a thing away."""
    pattern = rng.choice(("remove the {}", "remove the {}", "take the {} away", "delete the {}", "erase the {}",
                          "get rid of the {}", "take out the {}", "remove the {} from the picture", "drop the {}",
                          "wipe out the {}", "there should be no {}", "no {} please"))  # fmt: skip
    return pattern.format(target)


def add(rng: random.Random, said: str, place: str) -> str:
    """The instruction to add a thing."""
    pattern = rng.choice(("add {0} {1}", "add {0} {1}", "draw {0} {1}", "place {0} {1}", "put {0} {1}",
                          "insert {0} {1}", "{1} add {0}", "there should be {0} {1}", "i want {0} {1}"))  # fmt: skip
    return pattern.format(a(said), at(rng, place))


def replace_word(rng: random.Random, old: str, new: str) -> str:
    """The instruction to change the word."""
    pattern = rng.choice(("replace the word {0} by {1}", "replace {0} with {1}", "change {0} to {1}",
                          "change the word to {1}", "make the sign say {1}", "the sign should say {1}",
                          "write {1} in place of {0}", "change the text to {1}"))  # fmt: skip
    return pattern.format(quoted(rng, old), quoted(rng, new))


def request(rng: random.Random, instruction: str) -> str:
    """The instruction, sometimes as a polite request."""
    ways = ("please {}", "{} please", "could you {}", "can you {}") if not instruction.startswith(_STATEMENTS) else ()
    return rng.choice(("{}",) * 12 + ways).format(instruction)


def typed(rng: random.Random, text: str) -> str:
    """A text as users type it: some with other words for sizes, American spelling, a capital letter or a full stop.

    Texts that are not ASCII (Chinese or curly quotes) are kept.
    """
    if not text.isascii():
        return text
    if rng.random() < 0.25:
        for ours, theirs in _AMERICAN.items():
            text = text.replace(ours, theirs)
    if rng.random() < 0.25:
        for ours, others in _SIZES.items():
            text = text.replace(f"{ours} ", f"{others} ")
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    text = text.replace("i want", "I want") if rng.random() < 0.7 else text
    return text + rng.choice(("", "", "", "."))
