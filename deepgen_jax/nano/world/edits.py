"""Editing samples of the world: a scene, an instruction, and the resulting scene."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from deepgen_jax.nano.world import captions
from deepgen_jax.nano.world.pictures import Sample, any_sign, background, free_place, some_size
from deepgen_jax.nano.world.scene import Scene, Thing, different_looks, fits, scattered
from deepgen_jax.nano.world.truth import Truth, Wanted
from deepgen_jax.nano.world.vocabulary import COLOURS, PLACES, WORDS

#: Things in a picture that is edited.
MOST_THINGS = 3


@dataclass(frozen=True)
class _Change:
    """One change of a scene.

    Attributes:
      text: the instruction.
      things: things after the change in the place of ``before``.
      before: the thing that is changed or removed; None where one is added.
      wanted: requirements on the changed or added thing.
      combination: word combination of the change, checked by `held_out`.
    """

    text: str
    things: tuple[Thing, ...]
    before: Thing | None
    wanted: tuple[Wanted, ...]
    combination: tuple[object, ...]


def recolour(rng: random.Random) -> Sample:
    """ "make the red circle blue"."""
    return _edited("recolour", rng, _recolour)


def move(rng: random.Random) -> Sample:
    """ "move the red circle to the top left corner"."""
    return _edited("move", rng, _move)


def remove(rng: random.Random) -> Sample:
    """ "remove the red circle"."""
    return _edited("remove", rng, _remove)


def add(rng: random.Random) -> Sample:
    """ "add a small red circle in the top left corner"."""
    return _edited("add", rng, _add)


def replace_word(rng: random.Random) -> Sample:
    """ 'replace the word "OPEN" by "EXIT"'."""
    old, new = rng.sample(WORDS, 2)
    scene = _start(rng, word=old)
    assert scene.sign is not None
    target = replace(scene, sign=replace(scene.sign, word=new))
    truth = Truth("replace_word", _kept(scene.things), background=scene.background, word=new)
    return Sample(
        captions.request(rng, captions.replace_word(rng, old, new)), target, (scene,), truth,
        (*(thing.look for thing in scene.things), ("word", new, scene.background), ("word", old, scene.background)),
    )  # fmt: skip


def multi_step(rng: random.Random) -> Sample:
    """Two changes of different things: "remove the red circle, then make the blue square green"."""
    while True:
        scene = _start(rng, least=2)
        changes: list[_Change] = []
        now = scene
        for make in rng.sample((_recolour, _move, _remove, _add), 2):
            taken = [change.before for change in changes]
            choices = [thing for thing in scene.things if thing not in taken]
            change = make(rng, now, choices)
            if change is None:
                break
            changes.append(change)
            now = _after(now, change)
        if len(changes) == 2:
            joined = rng.choice(("{}, then {}", "{} and then {}", "{} and {}"))
            text = joined.format(*(change.text for change in changes))
            return _sample(rng, "multi_step", text, scene, (scene,), changes)


def reference(rng: random.Random) -> Sample:
    """A second picture shows what is meant: "give the red circle the colour of the shape in the second picture"."""
    scene = _start(rng)
    taken = {thing.look for thing in scene.things}
    shown = next(look for look in different_looks(rng, len(taken) + 1) if look not in taken)
    other = Scene(background(rng), scattered(rng, [shown], [some_size(rng)]))
    thing = rng.choice(scene.things)
    name = captions.thing(thing.look)
    kind = rng.choice(("colour", "shape", "add"))
    if kind == "add":
        place = free_place(rng, "small", scene.things, scene.sign)
        if place is None or other.things[0].look in taken:
            return reference(rng)
        added = Thing(*shown, "small", *PLACES[place])
        text = f"add the shape of the second picture, small, {captions.at(rng, place)}"
        change = _Change(text, (added,), None, (Wanted(*shown, "small", place),), ("add", *shown, place))
        return _sample(rng, "reference", text, scene, (scene, other), [change])
    if kind == "colour":
        changed = replace(thing, colour=shown[0])
        text = rng.choice(
            ("give the {} the colour of the shape in the second picture", "paint the {} in the second picture's colour")
        ).format(name)
    else:
        changed = replace(thing, shape=shown[1])
        text = f"replace the {name} by the shape in the second picture, in its own colour"
    if changed.look in taken:
        return reference(rng)
    change = _Change(
        text, (changed,), thing, (Wanted.where_it_is(changed),), (kind, *thing.look, changed.colour, changed.shape)
    )
    return _sample(rng, "reference", text, scene, (scene, other), [change])


def _recolour(rng: random.Random, scene: Scene, choices: list[Thing]) -> _Change | None:
    looks = {thing.look for thing in scene.things}
    options = [(t, c) for t in choices for c in COLOURS if (c, t.shape) not in looks]
    if not options:
        return None
    thing, colour = rng.choice(options)
    changed = replace(thing, colour=colour)
    text = captions.recolour(rng, _called(rng, thing, scene), thing.look, colour)
    return _Change(text, (changed,), thing, (Wanted.where_it_is(changed),), ("recolour", *thing.look, colour))


def _move(rng: random.Random, scene: Scene, choices: list[Thing]) -> _Change | None:
    options = []
    for thing in choices:
        others = [other for other in scene.things if other != thing]
        for place, (x, y) in PLACES.items():
            moved = replace(thing, x=x, y=y)
            # Far enough to be visible, and not next to another thing that the instruction could refer to.
            if (thing.x - x) ** 2 + (thing.y - y) ** 2 > 0.3**2 and fits(moved, others, scene.sign):
                options.append((thing, place, moved))
    if not options:
        return None
    thing, place, moved = rng.choice(options)
    text = captions.move(rng, _called(rng, thing, scene), place)
    wanted = Wanted(*thing.look, thing.size, place)
    return _Change(text, (moved,), thing, (wanted,), ("move", *thing.look, place))


def _remove(rng: random.Random, scene: Scene, choices: list[Thing]) -> _Change | None:
    if not choices:
        return None
    thing = rng.choice(choices)
    text = captions.remove(rng, _called(rng, thing, scene))
    return _Change(text, (), thing, (), ("remove", *thing.look, len(scene.things)))


def _add(rng: random.Random, scene: Scene, choices: list[Thing]) -> _Change | None:
    looks = {thing.look for thing in scene.things}
    look = next(look for look in different_looks(rng, len(looks) + 1) if look not in looks)
    size = some_size(rng)
    place = free_place(rng, size, scene.things, scene.sign)
    if place is None:
        return None
    added = Thing(*look, size, *PLACES[place])
    text = captions.add(rng, captions.thing(look, size), place)
    return _Change(text, (added,), None, (Wanted(*look, size, place),), ("add", *look, place))


def _called(rng: random.Random, thing: Thing, scene: Scene) -> str:
    """Name of a thing in an instruction: colour and shape, or less or more where that is unambiguous."""
    names = [captions.thing(thing.look)] * 4 + [captions.thing(thing.look, thing.size)]
    if [other.shape for other in scene.things].count(thing.shape) == 1:
        names.append(thing.shape)
    if [other.colour for other in scene.things].count(thing.colour) == 1:
        names.append(f"{thing.colour} shape")
    return rng.choice(names)


def _edited(
    skill: str, rng: random.Random, make: Callable[[random.Random, Scene, list[Thing]], _Change | None]
) -> Sample:
    """One change of a scene; scenes without room for it are skipped."""
    while True:
        scene = _start(rng)
        change = make(rng, scene, list(scene.things))
        if change is not None:
            return _sample(rng, skill, change.text, scene, (scene,), [change])


def _start(rng: random.Random, word: str | None = None, least: int = 1) -> Scene:
    """A scene with ``least`` to 3 things, or a sign with none or one and the ``word``."""
    if word is not None:
        sign = any_sign(rng, word)
        looks = different_looks(rng, rng.randint(0, 1))
        return Scene(background(rng), scattered(rng, looks, ["small"] * len(looks), sign), sign)
    looks = different_looks(rng, rng.randint(least, MOST_THINGS))
    sizes = [some_size(rng) if len(looks) < MOST_THINGS else "small" for _ in looks]
    return Scene(background(rng), scattered(rng, looks, sizes))


def _after(scene: Scene, change: _Change) -> Scene:
    rest = tuple(thing for thing in scene.things if thing != change.before)
    return replace(scene, things=(*rest, *change.things))


def _kept(things: tuple[Thing, ...]) -> tuple[Wanted, ...]:
    return tuple(Wanted.where_it_is(thing, kept=True) for thing in things)


def _sample(
    rng: random.Random,
    skill: str,
    text: str,
    scene: Scene,
    references: tuple[Scene, ...],
    changes: list[_Change],
) -> Sample:
    target = scene
    for change in changes:
        target = _after(target, change)
    touched = [change.before for change in changes if change.before is not None]
    rest = tuple(thing for thing in scene.things if thing not in touched)
    truth = Truth(
        skill,
        (*(wanted for change in changes for wanted in change.wanted), *_kept(rest)),
        background=scene.background,
        gone=tuple(Wanted.where_it_is(thing) for thing in touched),
    )
    looks = {thing.look for shown in (*references, target) for thing in shown.things}
    text = captions.request(rng, text)
    return Sample(text, target, references, truth, (*sorted(looks), *(change.combination for change in changes)))


