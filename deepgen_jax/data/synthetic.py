"""A procedural world without end: coloured shapes and short words, captions and edits, each with its ground truth.

Sample ``index`` of a seed is always the same, on any machine, and costs about a millisecond. What a program needs in
order to score a picture exactly comes with every sample (`deepgen_jax.data.world.truth`). Combinations of words that
are held out (`deepgen_jax.data.world.scene.held_out`) never occur in training; every held-out sample has at least one.

    sample = make_sample("train", "t2i", seed=0, index=17)
    render(sample.scene, 96).save("17.png")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from deepgen_jax.data.world import captions, edits, pictures
from deepgen_jax.data.world.pictures import Sample
from deepgen_jax.data.world.render import render
from deepgen_jax.data.world.scene import held_out
from deepgen_jax.data.world.truth import EDIT_SKILLS, PICTURE_SKILLS
from deepgen_jax.errors import DeepGenError

__all__ = ["SPLITS", "TASK_SKILLS", "VERSION", "Sample", "make_sample", "render"]

#: Changes when samples do.
VERSION = 5
#: What trains, and what tests.
SPLITS = ("train", "held_out")
#: Skills of a task; sample i is of the skill that its random stream draws, all alike.
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


def make_sample(split: str, kind: str, *, seed: int, index: int) -> Sample:
    """One sample of the world.

    Args:
      split: one of `SPLITS`.
      kind: a task, "t2i" or "edit", or a single skill.
      seed: of the world.
      index: which sample, from 0 on without end.

    Raises:
      DeepGenError: split or kind is unknown.
    """
    skills = TASK_SKILLS.get(kind, (kind,))
    if split not in SPLITS or skills[0] not in _MAKERS:
        known = (*TASK_SKILLS, *_MAKERS)
        raise DeepGenError(f"{kind!r} of split {split!r} is not known; use {' or '.join(SPLITS)}, {', '.join(known)}")
    # A text as seed gives the same stream in every version of Python.
    rng = random.Random(f"{VERSION}/{seed}/{split}/{kind}/{index}")
    make = _MAKERS[rng.choice(skills)]
    while True:
        sample = make(rng)
        if any(held_out(*combination) for combination in sample.combinations) == (split == "held_out"):
            return replace(sample, text=captions.typed(rng, sample.text))
