"""Parser for the text of an optimised XLA module: computations, instructions in order, trip counts, device groups.

Two forms of text are read: until 2026 an element of a tuple was an instruction, ``%x = ... get-tuple-element(%t),
index=1``, and a loop printed its ``known_trip_count``; newer compilers write ``%t#1`` as an operand and print no count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from deepgen_jax.aot.estimate.loops import trip_count

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "s1": 1, "u1": 1,
    "f4e2m1fn": 4, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8,
    "f8e5m2fnuz": 8, "f8e8m0fnu": 8, "token": 0, "opaque": 0,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+(?:#\d+)*)")


@dataclass(frozen=True)
class Array:
    """An array of a result: element type, shape, and whether it is in HBM; TPU programs also use on-chip memory."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in the module.
      opcode: such as "fusion" or "all-gather-start".
      results: its arrays, tuples flattened.
      operands: names of instructions of the same computation.
      attributes: the rest of its line.
      root: it is the computation's result.
      number: index of a parameter, value of an integer constant, otherwise -1.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool = False
    number: int = -1

    @property
    def bytes(self) -> int:
        """Bytes of all results, in any memory."""
        return sum(array.bytes for array in self.results)

    def attribute(self, pattern: str) -> str | None:
        """First group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self) -> tuple[str, ...]:
        """Computations that it runs: the body of a loop, of a fusion, the branches of a conditional."""
        names = re.findall(r"\b(?:calls|to_apply|body|called_computations=\{)=?%?([\w.\-]+)", self.attributes)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", self.attributes):
            names += _NAME.findall(branches)
        names += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.attributes)
        return tuple(names)


@dataclass
class Computation:
    """Instructions in the order in which they are scheduled."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    by_name: dict[str, Instruction] = field(default_factory=dict)

    def add(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)
        self.by_name[instruction.name] = instruction

    def extend(self, attributes: str) -> None:
        """Adds to the attributes of the newest instruction."""
        last = self.instructions.pop()
        self.add(replace(last, attributes=f"{last.attributes} {attributes}"))

    def arrays(self, instruction: Instruction) -> list[tuple[Array, ...]]:
        """The arrays of each operand."""
        return [self.by_name[name].results if name in self.by_name else () for name in instruction.operands]

    @property
    def root(self) -> Instruction:
        return next(x for x in reversed(self.instructions) if x.root)


@dataclass
class Module:
    """A module: its computations by name, and the entry computation."""

    entry: str
    computations: dict[str, Computation]

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction with the number of times it runs; a fusion is one instruction.

        A loop without a known trip count counts once, and all branches of a conditional count.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.instructions:
            yield computation, instruction, times
            if instruction.opcode in ("while", "call", "conditional"):
                turns = self.trips(computation, instruction) or 1
                for called in instruction.called():
                    yield from self._executed(called, times * turns)

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Trip count of a loop, 1 for a call; None if neither its attributes nor its counter determine it."""
        known = loop.attribute(r'"?known_trip_count"?:?\s*=?\{"?n"?:\s*"?(\d+)"?')
        if known or loop.opcode != "while":
            return int(known) if known else 1
        return trip_count(self, computation, loop)

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Instructions in the computations of a fusion or asynchronous start, at any depth."""
        for called in instruction.called():
            computation = self.computations[called]
            for inner in computation.instructions:
                yield computation, inner
                if inner.opcode in ("fusion", "call", "custom-call") or inner.opcode.endswith("-start"):
                    yield from self.inside(inner)

    def unknown_loops(self) -> int:
        """Number of loops without a known trip count."""
        loops = ((owner, x) for owner, x, _ in self.executed() if x.opcode == "while")
        return sum(self.trips(owner, loop) is None for owner, loop in loops)


def parse(text: str) -> Module:
    """The module of ``compiled.as_text()``.

    Raises:
      ValueError: the text is not that of a module, or has a dtype that is not known.
    """
    computations: dict[str, Computation] = {}
    types: dict[str, str] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if (head := _HEAD.match(line)) is not None:
                current, types = Computation(head[2]), {}
                computations[head[2]] = current
                entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            current = None
        elif (found := _LINE.match(line)) is not None:
            instruction = _instruction(line, found, types)
            for element in _elements(instruction, types, current):
                current.add(element)
            current.add(instruction)
        elif current.instructions:
            # Attributes of a Pallas kernel run over several lines.
            current.extend(line)
    if not entry:
        raise ValueError("the text holds no ENTRY computation")
    return Module(entry, computations)


def _instruction(line: str, found: re.Match[str], types: dict[str, str]) -> Instruction:
    """An instruction of its line; the text of its type is added to ``types``."""
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    types[found[2]] = line[start:end]
    results = tuple(_arrays(line[start:end]))
    open_at = line.index("(", end)
    close_at = _closing(line, open_at)
    opcode = line[end:open_at].strip()
    operands = tuple(_OPERAND.findall(line[open_at:close_at]))
    text = line[open_at + 1 : close_at]
    number = int(text) if opcode in ("parameter", "constant") and re.fullmatch(r"-?\d+", text) else -1
    return Instruction(found[2], opcode, results, operands, line[close_at + 1 :], bool(found[1]), number)


def _elements(instruction: Instruction, types: dict[str, str], computation: Computation) -> Iterator[Instruction]:
    """``get-tuple-element`` instructions for operands such as ``t#1``, once a computation."""
    for operand in instruction.operands:
        owner, *indices = operand.split("#")
        for index in indices:
            name = f"{owner}#{index}"
            if name not in types:
                types[name] = _element_type(types[owner], int(index))
                yield Instruction(
                    name, "get-tuple-element", tuple(_arrays(types[name])), (owner,), f", index={index}"
                )
            owner = name


def _element_type(text: str, index: int) -> str:
    """The type of one element of a tuple type ``(bf16[8,4]{1,0:T(8,128)}, (f32[], s32[2]))``."""
    depth, start, parts = 0, 1, []
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(text[start:place])
            start = place + 1
    return re.sub(r"/\*.*?\*/", "", parts[index]).strip()


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if not depth:
                return index
    raise ValueError(f"parentheses do not match: {text[start : start + 80]}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, sizes, layout in _SHAPE.findall(text):
        if dtype not in _BITS:
            raise ValueError(f"unknown element type {dtype!r}")
        shape = tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        # Memory spaces other than 0 (HBM): 1 is on-chip vector memory, 2 and 3 semaphores and scalars; 5 the host.
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(dtype, shape, space is None or space[1] == "0")


def device_groups(attributes: str) -> np.ndarray | None:
    """Device groups of a collective, [groups, members], as positions in the mesh; None for all devices.

    Parses ``{{0,1},{2,3}}``, ``[2,4]<=[2,2,2]T(0,2,1)`` and ``mesh['a'=2,'b'=4], device_ids=([8]) {'a'}``, and the
    ``source_target_pairs`` of permutations.
    """
    found = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
    found = found or re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if found:
        rows = [[int(x) for x in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(rows) if len({len(row) for row in rows}) == 1 else None
    found = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if found:
        return _iota(found[2]).reshape(_numbers(found[1]))
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", attributes
    )
    if not found:
        return None
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    ids = _iota(found[2]) if found[2] else np.arange(math.prod(axes.values()))
    grid = ids.reshape(tuple(axes.values()))
    chosen = [list(axes).index(name) for name in re.findall(r"'([^']+)'", found[3])]
    grid = np.moveaxis(grid, chosen, range(-len(chosen), 0))
    return grid.reshape(-1, math.prod(grid.shape[-len(chosen) :]))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(","))


def _iota(text: str) -> np.ndarray:
    """``[4,2]T(1,0)``: an iota of that shape, transposed and flattened."""
    sizes, _, order = text.partition("T")
    shape = _numbers(sizes.strip("[]"))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(_numbers(order.strip("()"))) if order else numbers).ravel()
