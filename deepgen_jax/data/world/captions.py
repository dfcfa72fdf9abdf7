"""What is said of scenes and edits, in English and Chinese."""

from __future__ import annotations

import random

from deepgen_jax.data.world.vocabulary import ZH

_ABOVE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


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
    """The text with its background, if that is told."""
    if background is None:
        return rng.choice(("{}", "a picture of {}", "{} on a plain background")).format(text)
    return rng.choice(("{0} on a {1} background", "{0} on {1}", "on a {1} background, {0}")).format(text, background)


def before_zh(text: str, background: str | None) -> str:
    """The same in Chinese."""
    return text if background is None else f"{ZH[background]}背景上{text}"


def single(look: tuple[str, str], size: str | None, place: str) -> str:
    """One thing, perhaps at a place."""
    said = a(thing(look, size))
    return said if not place else f"{said} {at(place)}"


def at(place: str) -> str:
    """ "in the top left corner"."""
    return "in the middle" if place == "middle" else f"in the {place} corner"


def single_zh(look: tuple[str, str], size: str | None, place: str) -> str:
    """The same in Chinese."""
    return f"{ZH[place] if place else ''}一个{thing_zh(look, size)}"


def relation(rng: random.Random, first: str, said: str, second: str) -> str:
    """Two things and how they stand to each other."""
    pattern = rng.choice(("{0} {1} {2}", "{0} that is {1} {2}"))
    return pattern.format(a(first), _ABOVE[said], a(second))


def sign(rng: random.Random, word: str) -> str:
    """A sign with its word."""
    return rng.choice(('a sign that says "{}"', 'a sign with the word "{}"', 'the word "{}" on a sign')).format(word)


def recolour(rng: random.Random, target: str, colour: str) -> str:
    """The instruction to change a colour."""
    pattern = rng.choice(("make the {0} {1}", "change the colour of the {0} to {1}", "paint the {0} {1}"))
    return pattern.format(target, colour)


def move(rng: random.Random, target: str, place: str) -> str:
    """The instruction to move a thing."""
    where = "the middle" if place == "middle" else f"the {place} corner"
    return rng.choice(("move the {0} to {1}", "put the {0} into {1}")).format(target, where)


def remove(rng: random.Random, target: str) -> str:
    """The instruction to take a thing away."""
    return rng.choice(("remove the {}", "take the {} away", "delete the {}")).format(target)


def add(rng: random.Random, said: str, place: str) -> str:
    """The instruction to add a thing."""
    return rng.choice(("add {0} {1}", "draw {0} {1}")).format(a(said), at(place))


def replace_word(rng: random.Random, old: str, new: str) -> str:
    """The instruction to change the word."""
    pattern = rng.choice(('replace the word "{0}" by "{1}"', 'change "{0}" to "{1}"', 'make the sign say "{1}"'))
    return pattern.format(old, new)
