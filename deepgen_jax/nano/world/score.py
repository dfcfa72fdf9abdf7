"""Exact scores: whether a picture shows what its prompt asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from deepgen_jax.nano.world.find import Found, View, look, sign_of
from deepgen_jax.nano.world.truth import Truth, Wanted
from deepgen_jax.nano.world.vocabulary import PLACES

#: Lines of text in a picture, uint8 [H, W, 3].
Reader: TypeAlias = Callable[[np.ndarray], Sequence[str]]

#: Digits as the letters that they look like: words have no digits.
_LETTERS = str.maketrans("058", "osb")
#: Tolerance of a thing's unchanged position, as a share of the side.
_UNMOVED = 0.09
#: Tolerance around one of `PLACES`, along each side.
_AT_PLACE = 0.16
#: Least distance along an axis for one thing to be left of (or above) another.
_LEAST_APART = 0.08


@dataclass(frozen=True)
class Score:
    """Score of a picture.

    Attributes:
      done: the picture shows what the prompt asks for; of an edit, the change.
      kept: an edit left everything else as it was; True for text-to-image.
      share: share of conditions that hold, 0 to 1; 1 only if ``done`` and ``kept``.
    """

    done: bool
    kept: bool
    share: float


def score(image: np.ndarray, truth: Truth, read: Reader) -> Score:
    """Scores a picture.

    An unexpected thing counts against the change at the place of the edit, elsewhere against what must be kept.

    Args:
      image: uint8 [H, W, 3], RGB.
      truth: of the prompt.
      read: called with the sign, enlarged, where a word is wanted and there is a sign.
    """
    view = look(image)
    pairs = _pairs(truth.things, view.things)
    asked = [pair is not None for wanted, pair in zip(truth.things, pairs, strict=True) if not wanted.kept]
    rest = [pair is not None for wanted, pair in zip(truth.things, pairs, strict=True) if wanted.kept]
    common = rest if truth.is_edit else asked
    over = [thing for j, thing in enumerate(view.things) if j not in pairs]
    touched = [*truth.gone, *(wanted for wanted in truth.things if not wanted.kept)] if truth.is_edit else []
    here = [any(_near(wanted, thing) for wanted in touched) for thing in over]
    if truth.is_edit:
        asked.append(not any(here))
    common.append(all(here))
    if truth.relation:
        asked.append(_related(truth.relation, view, pairs))
    if truth.word is None:
        common.append(view.sign is None)
    else:
        sign = sign_of(image, view)
        asked.append(sign is not None and reads(truth.word, read(sign)))
    asked.append(view.background is not None)
    if truth.background is not None:
        common.append(view.background == truth.background)
    checks = [*asked, *rest]
    return Score(all(asked), all(rest), sum(checks) / len(checks))


def reads(word: str, lines: Sequence[str]) -> bool:
    """Whether the word, and no other, was read; case and white space do not matter, and there are no digits."""
    return "".join("".join(lines).split()).lower().translate(_LETTERS) == word.lower()


def _matches(wanted: Wanted, thing: Found) -> bool:
    look_alike = (wanted.colour, wanted.shape) == (thing.colour, thing.shape)
    size = wanted.size is None or wanted.size == thing.size
    anywhere = not wanted.place and wanted.at is None
    return look_alike and size and (anywhere or _near(wanted, thing))


def _near(wanted: Wanted, thing: Found) -> bool:
    """Whether a thing is at its wanted place; False where no place is wanted."""
    if wanted.place:
        x, y = PLACES[wanted.place]
        return abs(thing.x - x) <= _AT_PLACE and abs(thing.y - y) <= _AT_PLACE
    return wanted.at is not None and np.hypot(thing.x - wanted.at[0], thing.y - wanted.at[1]) <= _UNMOVED


def _pairs(wanted: Sequence[Wanted], found: Sequence[Found]) -> list[int | None]:
    """Maximum matching of wanted things to found ones."""
    options = [[j for j, thing in enumerate(found) if _matches(want, thing)] for want in wanted]
    owner: dict[int, int] = {}

    def settle(i: int, seen: set[int]) -> bool:
        for j in options[i]:
            if j not in seen:
                seen.add(j)
                if j not in owner or settle(owner[j], seen):
                    owner[j] = i
                    return True
        return False

    for i in range(len(wanted)):
        settle(i, set())
    place = {i: j for j, i in owner.items()}
    return [place.get(i) for i in range(len(wanted))]


def _related(relation: str, view: View, pairs: Sequence[int | None]) -> bool:
    first, second = pairs[:2]
    if first is None or second is None:
        return False
    a, b = view.things[first], view.things[second]
    # Positive where the first is left or above.
    across, down = b.x - a.x, b.y - a.y
    along, beside = (across, down) if relation in ("left", "right") else (down, across)
    if relation in ("right", "below"):
        along = -along
    return along > _LEAST_APART and along > abs(beside)
