"""Questions about a scene with their answers: "what colour is the circle? red"."""

from __future__ import annotations

import random

from deepgen_jax.data.tokens import QUESTION_END
from deepgen_jax.nano.world import captions
from deepgen_jax.nano.world.pictures import Sample
from deepgen_jax.nano.world.scene import Thing
from deepgen_jax.nano.world.vocabulary import NUMBERS, PLACES


def ask(rng: random.Random, sample: Sample) -> str:
    """A question about the sample's picture, and its answer."""
    scene = sample.scene
    choices = [("what is the background", scene.background), ("what is shown", sample.text)]
    if scene.sign is not None:
        choices.append(("what does the sign say", scene.sign.word))
    if scene.things:
        thing = rng.choice(scene.things)
        choices.append(("how many shapes are there", NUMBERS[len(scene.things) - 1]))
        choices.append((f"where is {captions.a(captions.thing(thing.look))}", _place(thing)))
        alike = {other.look for other in scene.things if other.shape == thing.shape}
        if len(alike) == 1:
            choices.append((f"what colour is the {thing.shape}", thing.colour))
        same = {other.look for other in scene.things if other.colour == thing.colour}
        if len(same) == 1:
            choices.append((f"which shape is {thing.colour}", thing.shape))
    question, answer = rng.choice(choices)
    return f"{question}{QUESTION_END} {answer}"


def _place(thing: Thing) -> str:
    """The nearest named place."""
    return min(PLACES, key=lambda name: (PLACES[name][0] - thing.x) ** 2 + (PLACES[name][1] - thing.y) ** 2)
