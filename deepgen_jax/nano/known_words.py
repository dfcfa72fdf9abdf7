"""The words that nano has seen in training, for its folder's ``known_words.txt``."""

from __future__ import annotations

import re

from deepgen_jax.inference.known_words import words_of
from deepgen_jax.nano.samples import TASK_SKILLS, make_sample
from deepgen_jax.nano.world.vocabulary import COLOUR_RIDDLES, NUMBER_RIDDLES, SHAPE_RIDDLES

_RIDDLES = [
    spelled
    for group in (SHAPE_RIDDLES, COLOUR_RIDDLES, NUMBER_RIDDLES)
    for riddles in group.values()
    for riddle in riddles
    for spelled in (riddle, riddle.replace("colour", "color"))
]


def training_words(samples_per_skill: int = 2000) -> list[str]:
    """Words and riddles of training texts, sorted; a riddle is a phrase, as its words alone are not drawn.

    Args:
      samples_per_skill: texts read; more than 1000 add no word.
    """
    riddle = re.compile("|".join(map(re.escape, sorted(_RIDDLES, key=len, reverse=True))), re.IGNORECASE)
    found: set[str] = set()
    for skill in (skill for skills in TASK_SKILLS.values() for skill in skills):
        for index in range(samples_per_skill):
            text = make_sample("train", skill, seed=0, index=index).text
            found.update(match.lower() for match in riddle.findall(text))
            found.update(words_of(riddle.sub(" ", text)))
    return sorted(found)
