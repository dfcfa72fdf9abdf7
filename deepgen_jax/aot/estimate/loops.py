"""Trip counts of counted loops, from the condition, the step and the start of their counters.

A counted loop keeps an integer in its state that the body adds a constant to and the condition compares with a
constant. Each of the three may be hidden in fusions, copies and conversions: they are evaluated as ``a * counter + b``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deepgen_jax.aot.estimate.hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "convert", "reshape", "opt-barrier", "bitcast-convert")
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne, "EQ": operator.eq,
}  # fmt: skip


class Linear(NamedTuple):
    """``scale * counter + offset``, of the counter in element ``element`` of the state; constants have scale 0."""

    scale: int
    offset: int
    element: int = -1


#: An element of a loop's state, or a parameter of a fusion: its value.
_Inputs = Mapping[int, Linear | None]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trip count of a ``while`` of ``computation``; None if it is not a counted loop."""
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
    body = module.computations[loop.attribute(r"body=%?([\w.\-]+)") or ""]
    test = _comparison(module, condition, None)
    if test is None:
        return None
    left, direction, right = test
    if right.scale:
        left, right = right, left
        direction = direction.translate(str.maketrans("LG", "GL"))
    if not left.scale or right.scale:
        return None
    step = _step(module, body, left.element)
    start = _start(module, computation, loop, left.element)
    if step is None or start is None or not step:
        return None
    first, change = left.scale * start + left.offset, left.scale * step
    return _turns(first, change, direction, right.offset)


def _turns(first: int, change: int, direction: str, limit: int) -> int | None:
    """How often ``first, first + change, ...`` compares true with the limit before it does not; None if always."""
    if not _COMPARE[direction](first, limit):
        return 0
    distance = limit - first
    if direction == "EQ":
        return 1
    if direction == "NE":
        return distance // change if distance % change == 0 and distance * change > 0 else None
    if (direction in ("LT", "LE")) != (change > 0):
        return None
    turns = math.ceil(distance / change)
    return turns + (direction in ("LE", "GE") and distance % change == 0)


def _comparison(
    module: Module, computation: Computation, inputs: _Inputs | None
) -> tuple[Linear, str, Linear] | None:
    """(left, direction, right) of the comparison that a computation returns."""
    one = computation.root
    while one.opcode in _SAME and one.operands[0] in computation.by_name:
        one = computation.by_name[one.operands[0]]
    if one.opcode == "fusion":
        given = {place: _evaluate(module, computation, name, inputs) for place, name in enumerate(one.operands)}
        return _comparison(module, module.computations[one.called()[0]], given)
    direction = one.attribute(r"direction=(\w\w)")
    if one.opcode != "compare" or direction is None:
        return None
    left, right = (_evaluate(module, computation, name, inputs) for name in one.operands)
    return None if left is None or right is None else (left, direction, right)


def _step(module: Module, body: Computation, index: int) -> int | None:
    """Increment of an element of the loop state per iteration."""
    root = body.root
    if root.opcode != "tuple":
        return None
    value = _evaluate(module, body, root.operands[index], None)
    return value.offset if value is not None and (value.scale, value.element) == (1, index) else None


def _start(module: Module, computation: Computation, loop: Instruction, index: int) -> int | None:
    """An element of the state that a loop starts with."""
    state = computation.by_name.get(loop.operands[0])
    while state is not None and state.opcode in ("copy", "opt-barrier") and state.operands:
        state = computation.by_name.get(state.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    value = _evaluate(module, computation, state.operands[index], None)
    return value.offset if value is not None and not value.scale else None


def _evaluate(module: Module, computation: Computation, name: str, inputs: _Inputs | None) -> Linear | None:
    """An integer of a computation; ``inputs`` are parameters of a fusion, None for a loop's computation."""
    one = computation.by_name.get(name)
    if one is None:
        return None
    if one.opcode == "constant":
        scalar = not one.results[0].shape and re.match(r"[su]\d+$", one.results[0].dtype)
        return Linear(0, one.number) if scalar else None
    if one.opcode == "parameter":
        return None if inputs is None else inputs.get(one.number)
    if one.opcode == "get-tuple-element":
        owner, index = computation.by_name.get(one.operands[0]), int(one.attribute(r"index=(\d+)") or -1)
        if owner is None:
            return None
        if owner.opcode == "parameter" and inputs is None:
            return Linear(1, 0, index)
        if owner.opcode == "tuple":
            return _evaluate(module, computation, owner.operands[index], inputs)
        return _fused(module, computation, owner, index, inputs) if owner.opcode == "fusion" else None
    if one.opcode == "fusion":
        return _fused(module, computation, one, None, inputs)
    if one.opcode in _SAME:
        return _evaluate(module, computation, one.operands[0], inputs)
    if one.opcode == "copy-done":
        return _evaluate(module, computation, computation.by_name[one.operands[0]].operands[0], inputs)
    if one.opcode in ("add", "subtract", "multiply"):
        left, right = (_evaluate(module, computation, operand, inputs) for operand in one.operands)
        return None if left is None or right is None else _combined(one.opcode, left, right)
    return None


def _combined(opcode: str, left: Linear, right: Linear) -> Linear | None:
    if opcode == "multiply":
        if left.scale:
            left, right = right, left
        return None if left.scale else Linear(left.offset * right.scale, left.offset * right.offset, right.element)
    if left.scale and right.scale and left.element != right.element:
        return None
    sign = -1 if opcode == "subtract" else 1
    scale = left.scale + sign * right.scale
    return Linear(scale, left.offset + sign * right.offset, max(left.element, right.element) if scale else -1)


def _fused(
    module: Module, computation: Computation, fusion: Instruction, index: int | None, inputs: _Inputs | None
) -> Linear | None:
    """Result of a fusion, or an element of it."""
    given = {place: _evaluate(module, computation, name, inputs) for place, name in enumerate(fusion.operands)}
    body = module.computations[fusion.called()[0]]
    name = body.root.name if index is None else body.root.operands[index]
    return _evaluate(module, body, name, given)
