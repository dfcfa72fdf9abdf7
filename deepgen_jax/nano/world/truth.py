"""Ground truth of a prompt, by which a program checks pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deepgen_jax.nano.world.scene import Thing

#: Skills of text-to-image prompts and of edits.
PICTURE_SKILLS = ("single", "two", "relation", "count", "reasoning", "text")
EDIT_SKILLS = ("recolour", "move", "remove", "add", "replace_word", "multi_step", "reference")
SKILLS = (*PICTURE_SKILLS, *EDIT_SKILLS)


@dataclass(frozen=True)
class Wanted:
    """A thing that the picture must show.

    Attributes:
      colour, shape: of it.
      size: None where any will do.
      place: one of `PLACES`; "" where any will do.
      at: its middle, where an edit must not move it, or shows where it was; None where any will do.
      kept: it is one that the edit must leave alone.
    """

    colour: str
    shape: str
    size: str | None = None
    place: str = ""
    at: tuple[float, float] | None = None
    kept: bool = False

    @classmethod
    def where_it_is(cls, thing: Thing, *, kept: bool = False) -> Wanted:
        """A thing exactly as in a scene."""
        return cls(thing.colour, thing.shape, thing.size, at=(thing.x, thing.y), kept=kept)


@dataclass(frozen=True)
class Truth:
    """Requirements on a picture.

    Attributes:
      skill: one of `SKILLS`.
      things: all that it must show, and nothing else.
      relation: "left", "right", "above" or "below": position of the first thing relative to the second; "" for none.
      background: None where any will do.
      word: on its sign, which is what an edit changes, if there is one; None for no sign.
      gone: what an edit must have taken away.
    """

    skill: str
    things: tuple[Wanted, ...]
    relation: str = ""
    background: str | None = None
    word: str | None = None
    gone: tuple[Wanted, ...] = ()

    @property
    def is_edit(self) -> bool:
        """Whether there is a rest that must stay as it was."""
        return self.skill in EDIT_SKILLS

    def to_json(self) -> dict[str, Any]:
        """JSON values, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Truth:
        """The inverse of `to_json`."""
        things, gone = (tuple(map(_wanted, values[name])) for name in ("things", "gone"))
        return cls(**{**values, "things": things, "gone": gone})


def _wanted(values: dict[str, Any]) -> Wanted:
    at = values["at"]
    return Wanted(**{**values, "at": None if at is None else (at[0], at[1])})
