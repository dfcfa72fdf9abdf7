"""Scenes that are wrong in one thing, which scorers must reject."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from deepgen_jax.nano.world.pictures import Sample, any_sign, free_place
from deepgen_jax.nano.world.scene import Scene, Thing
from deepgen_jax.nano.world.vocabulary import BACKGROUNDS, COLOURS, PLACES, SHAPES, WORDS


def undone(rng: random.Random, sample: Sample) -> Scene:
    """A scene that fails the sample's prompt; of an edit, one in which the change is missing or wrong."""
    truth, scene = sample.truth, sample.scene
    if truth.is_edit and rng.random() < 0.5:
        return sample.references[0]
    if truth.word is not None:
        others = [word for word in WORDS if word != truth.word]
        assert scene.sign is not None
        return replace(scene, sign=replace(scene.sign, word=rng.choice(others)))
    if truth.relation and rng.random() < 0.5:
        first, second = scene.things
        return replace(scene, things=(replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)))
    changes: list[Callable[[random.Random, Scene, Thing], Scene]] = [_recoloured, _reshaped, _removed]
    touched = [
        thing for thing, wanted in zip(_in_order(sample), truth.things, strict=True) if not wanted.kept
    ]
    if not touched:
        # Only the thing to remove: it stays.
        return sample.references[0]
    return rng.choice(changes)(rng, scene, rng.choice(touched))


def unkept(rng: random.Random, sample: Sample) -> Scene:
    """The scene that an edit asks for, with one further change."""
    scene = sample.scene
    kept = [thing for thing, wanted in zip(_in_order(sample), sample.truth.things, strict=True) if wanted.kept]
    if kept and rng.random() < 0.7:
        change = rng.choice((_recoloured, _reshaped, _removed))
        return change(rng, scene, rng.choice(kept))
    return replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))


def crowded(rng: random.Random, sample: Sample) -> Scene:
    """The wanted scene with one more thing, where there is room; else with a sign added or removed."""
    scene = sample.scene
    place = free_place(rng, "small", scene.things, scene.sign)
    if place is None:
        return replace(scene, sign=None if scene.sign else any_sign(rng, rng.choice(WORDS)))
    more = Thing(rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), "small", *PLACES[place])
    return replace(scene, things=(*scene.things, more))


def _in_order(sample: Sample) -> list[Thing]:
    """Things of the scene in the order of the truth."""
    left = list(sample.scene.things)
    found = []
    for wanted in sample.truth.things:
        thing = next(thing for thing in left if thing.look == (wanted.colour, wanted.shape))
        left.remove(thing)
        found.append(thing)
    return found


def _recoloured(rng: random.Random, scene: Scene, thing: Thing) -> Scene:
    colour = rng.choice([colour for colour in COLOURS if colour != thing.colour])
    return _replaced(scene, thing, replace(thing, colour=colour))


def _reshaped(rng: random.Random, scene: Scene, thing: Thing) -> Scene:
    shape = rng.choice([shape for shape in SHAPES if shape != thing.shape])
    return _replaced(scene, thing, replace(thing, shape=shape))


def _removed(rng: random.Random, scene: Scene, thing: Thing) -> Scene:
    return replace(scene, things=tuple(other for other in scene.things if other != thing))


def _replaced(scene: Scene, old: Thing, new: Thing) -> Scene:
    return replace(scene, things=tuple(new if thing == old else thing for thing in scene.things))
