"""An endless procedural world: coloured shapes and short words, captions and edits, each with its ground truth.

Sample ``index`` of a seed is the same on any machine and takes about a millisecond. Every sample has the ground truth
by which a program scores pictures exactly (`deepgen_jax.nano.world.truth`). Combinations of words that
are held out (`deepgen_jax.nano.world.scene.held_out`) never occur in training; every held-out sample has at least one.

    sample = make_sample("train", "t2i", seed=0, index=17)
    render(sample.scene, 96).save("17.png")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from deepgen_jax.errors import DeepGenError
from deepgen_jax.nano.world import captions, edits, pictures
from deepgen_jax.nano.world.pictures import Sample
from deepgen_jax.nano.world.render import render
from deepgen_jax.nano.world.scene import held_out
from deepgen_jax.nano.world.truth import EDIT_SKILLS, PICTURE_SKILLS
from deepgen_jax.nano.world.vocabulary import BACKGROUNDS

__all__ = ["NAMES", "SPLITS", "TASK_SKILLS", "VERSION", "Only", "Sample", "make_sample", "render"]

#: Version of the samples.
VERSION = 6
#: For training and for evaluation.
SPLITS = ("train", "held_out")
#: Skills of a task, drawn uniformly.
TASK_SKILLS: Mapping[str, tuple[str, ...]] = {"t2i": PICTURE_SKILLS, "edit": EDIT_SKILLS}

_MAKERS: dict[str, Callable[[random.Random], Sample]] = {
    "single": pictures.single,
    "two": pictures.two,
    "relation": pictures.relation,
    "count": pictures.count,
    "reasoning": pictures.reasoning,
    "text": pictures.text,
    "recolour": edits.recolour,
    "move": edits.move,
    "remove": edits.remove,
    "add": edits.add,
    "replace_word": edits.replace_word,
    "multi_step": edits.multi_step,
    "reference": edits.reference,
}

#: The only attribute by which an instruction names the changed thing, and the edits with such instructions.
NAMES = ("shape", "colour")
_NAMING_SKILLS = ("recolour", "move", "remove")
#: Numbers of things in the source picture, for skills other than 1 to 3.
_THINGS: Mapping[str, range] = {
    **dict.fromkeys(PICTURE_SKILLS, range(0)),
    "multi_step": range(2, edits.MOST_THINGS + 1),
    "replace_word": range(1, 2),
}


@dataclass(frozen=True)
class Only:
    """Selects samples, to practise hard ones; others are skipped.

    Attributes:
      background: of the target, one of `BACKGROUNDS`; "" for any.
      named: "shape" for instructions such as "remove the square", "colour" for "remove the red shape"; "" for any.
      things: number of things in the source picture; 0 for any.

    Raises:
      DeepGenError: there is no such background, name or number of things.
    """

    background: str = ""
    named: str = ""
    things: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("background", self.background, BACKGROUNDS), ("named", self.named, NAMES)):
            if value and value not in known:
                raise DeepGenError(f"{name} is {value!r}; use one of {', '.join(known)}")
        if not 0 <= self.things <= edits.MOST_THINGS:
            raise DeepGenError(f"things is {self.things}; use 1 to {edits.MOST_THINGS}, or 0 for any number")

    def __contains__(self, sample: Sample) -> bool:
        if self.background and sample.scene.background != self.background:
            return False
        if self.things and len(sample.references[0].things) != self.things:
            return False
        if not self.named:
            return True
        (gone,) = sample.truth.gone
        if self.named == "shape":
            return gone.colour not in sample.text
        return f"{gone.colour} shape" in sample.text

    def check(self, skills: tuple[str, ...]) -> None:
        """Raises `DeepGenError` unless all these skills have such samples."""
        if self.named and (others := [skill for skill in skills if skill not in _NAMING_SKILLS]):
            raise DeepGenError(
                f"named is {self.named!r}, but {others[0]} names nothing; use it with {', '.join(_NAMING_SKILLS)}"
            )
        numbers = {skill: _THINGS.get(skill, range(1, edits.MOST_THINGS + 1)) for skill in skills}
        if self.things and (others := [skill for skill in skills if self.things not in numbers[skill]]):
            known = f"use {numbers[others[0]][0]} to {numbers[others[0]][-1]}" if numbers[others[0]] else "leave it out"
            raise DeepGenError(f"things is {self.things}, but no {others[0]} starts with that many; {known}")


def check_varied(skills: tuple[str, ...], varied: str) -> None:
    """Raises `DeepGenError` unless all these skills can vary what their captions leave open, in this way."""
    if varied not in pictures.VARIED_PLACES:
        raise DeepGenError(f"varied is {varied!r}; use one of {', '.join(pictures.VARIED_PLACES)}")
    if others := [skill for skill in skills if skill not in pictures.VARIED_SKILLS]:
        raise DeepGenError(f"{others[0]} cannot be varied; use skills {', '.join(pictures.VARIED_SKILLS)}")


def make_sample(
    split: str, kind: str, *, seed: int, index: int, only: Only = Only(), varied: str = ""
) -> Sample:
    """One sample of the world.

    Args:
      split: one of `SPLITS`.
      kind: a task, "t2i" or "edit", or a single skill.
      seed: of the world.
      index: number of the sample, from 0, unlimited.
      only: selects samples.
      varied: draw places, sizes and backgrounds that the caption leaves open, instead of the defaults: things are
        "anywhere" or at named "places" (`deepgen_jax.nano.world.pictures.varied`); "" for the defaults.

    Raises:
      DeepGenError: split or kind is unknown, ``only`` asks for names in skills that have none, or ``varied`` is
        unknown or set for edits or signs.
    """
    skills = TASK_SKILLS.get(kind, (kind,))
    if split not in SPLITS or skills[0] not in _MAKERS:
        known = (*TASK_SKILLS, *_MAKERS)
        raise DeepGenError(f"{kind!r} of split {split!r} is not known; use {' or '.join(SPLITS)}, {', '.join(known)}")
    only.check(skills)
    if varied:
        check_varied(skills, varied)
    # A string seed gives the same stream in every version of Python.
    rng = random.Random(f"{VERSION}/{seed}/{split}/{kind}/{index}")
    make = _MAKERS[rng.choice(skills)]
    while True:
        sample = make(rng)
        is_held_out = any(held_out(*combination) for combination in sample.combinations)
        if is_held_out == (split == "held_out"):
            sample = pictures.varied(rng, sample, varied) if varied else sample
            if sample not in only:
                continue
            return replace(sample, text=captions.typed(rng, sample.text))
