"""Matching: which source tensors fill which parameters. Everything is decided here, before a tensor is read.

Each tensor of each source is used, superseded by a later source, or known to carry nothing; each parameter is filled
exactly once with the right shape. Anything else is one error that lists what does not fit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deepgen_jax.config import DeepGenConfig, LoRAConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.lora import folded
from deepgen_jax.user_warnings import warn_user

from .keys import Role, average_of, parse_key, unused_reason
from .lazy_params import Leaf, Piece, chunk_shape, row_blocks, slice_index
from .names import EMBEDDING_KEY, LM_HEAD_KEY, Weight, weights
from .sources import BFLOAT16, WEIGHT_DTYPES, Source, SourceTensor
from .transforms import Transform, to_target


@dataclass
class Adapter:
    """The two factors of one adapted weight."""

    a: SourceTensor | None = None
    b: SourceTensor | None = None
    names: set[str] = field(default_factory=set)

    @property
    def factors(self) -> list[SourceTensor]:
        return [factor for factor in (self.a, self.b) if factor is not None]


@dataclass
class Inventory:
    """Contents of the sources by canonical key."""

    weights: dict[str, SourceTensor] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    #: Superseded tensors by the label of their source.
    superseded: dict[str, int] = field(default_factory=dict)
    #: Known-unused entries -> reason.
    unused: dict[str, str] = field(default_factory=dict)
    duplicated: list[str] = field(default_factory=list)
    #: Number of moving averages that replace trained tensors.
    averages: int = 0

    @property
    def lora_rank(self) -> int | None:
        """The adapters' rank, taken from the first one."""
        return next((adapter.a.shape[0] for adapter in self.adapters.values() if adapter.a and adapter.a.shape), None)


def take_inventory(sources: Iterable[tuple[Source, str]], *, ema: bool = False) -> Inventory:
    """Canonical keys of ``(source, prefix)`` pairs; a later source supersedes the tensors of an earlier one.

    With ``ema``, a tensor's moving average, stored under the same name with the prefix ``ema.``, replaces it.
    """
    inventory = Inventory()
    for source, prefix in sources:
        found: dict[tuple[str, Role], str] = {}
        inventory.unused.update({f"{name} of {source.label}": reason for name, reason in source.ignored.items()})
        averages = {raw: of for raw in source.tensors if ema and (of := average_of(raw)) is not None}
        covered = {parse_key(of, prefix) for of in averages.values()}
        inventory.averages += len(covered)
        for raw, tensor in source.tensors.items():
            key = parse_key(averages.get(raw, raw), prefix)
            if raw not in averages and key in covered:
                inventory.unused[str(tensor)] = "the moving average is taken in its place"
                continue
            reason = unused_reason(key.name)
            if reason is not None:
                inventory.unused[str(tensor)] = reason
                continue
            if found.setdefault((key.name, key.role), raw) != raw:
                inventory.duplicated.append(f"{raw} and {found[key.name, key.role]} of {source.label}")
                continue
            if key.role is Role.WEIGHT:
                old = inventory.weights.get(key.name)
                if old is not None:
                    inventory.superseded[old.source.label] = inventory.superseded.get(old.source.label, 0) + 1
                inventory.weights[key.name] = tensor
            else:
                adapter = inventory.adapters.setdefault(key.name, Adapter())
                adapter.names.add(key.adapter)
                setattr(adapter, key.role.value, tensor)
        _warn_of_partial_parts(source, {name for name, role in found if role is Role.WEIGHT}, inventory)
    return inventory


def _warn_of_partial_parts(source: Source, names: set[str], inventory: Inventory) -> None:
    """Warns where a source holds some tensors of a part, and the rest comes from an earlier source."""
    for part in sorted({name.partition(".")[0] for name in names}):
        held = {name: tensor for name, tensor in inventory.weights.items() if name.startswith(f"{part}.")}
        rest = [tensor for name, tensor in held.items() if name not in names]
        if rest:
            count = sum(name.startswith(f"{part}.") for name in names)
            warn_user(
                f"{source.label} holds {count} of the tensors of {part} and lacks {len(rest)}, such as {rest[0].name}, "
                f"which are taken from {rest[0].source.label}"
            )


@dataclass(frozen=True)
class Plan:
    """Plan of a conversion.

    Attributes:
      config: the model's configuration, with tying and adapters as they come out.
      params, lora: leaves to write; ``lora`` is empty unless adapters are kept.
      merged: keys of the weights that adapters are folded into.
      scale: alpha / rank of the adapters, where there are any.
      not_finite: filled while pieces are read: names of tensors that hold NaN or infinity.
    """

    config: DeepGenConfig
    params: list[Leaf]
    lora: list[Leaf]
    merged: list[str]
    scale: float | None
    not_finite: set[str]


def make_plan(
    config: DeepGenConfig, inventory: Inventory, lora: LoRAConfig | None, *, keep_lora: bool, dtype: np.dtype | None
) -> Plan:
    """Matches an inventory with the name tables.

    Args:
      config: sizes; ``tie_word_embeddings`` as the source's configuration states it.
      lora: rank and alpha where the inventory has adapters.
      keep_lora: store adapters apart instead of merging them.
      dtype: dtype to store everything in; None keeps the source's, float32 for weights that are merged.

    Raises:
      DeepGenError: something is missing, unknown, duplicated, misshaped or of an unsupported dtype.
    """
    filled = dict(inventory.weights)
    own_head = LM_HEAD_KEY in filled or LM_HEAD_KEY in inventory.adapters
    if own_head and config.text.tie_word_embeddings and EMBEDDING_KEY in filled:
        filled.setdefault(LM_HEAD_KEY, filled[EMBEDDING_KEY])
    tied = config.text.tie_word_embeddings and not own_head
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, tie_word_embeddings=tied),
        lora=lora if keep_lora else None,
    )
    table = weights(config)
    adapters = {key: adapter for key, adapter in inventory.adapters.items() if key in table}
    _check(table, filled, inventory, lora)

    scale = lora.scale if lora and adapters else None
    builder = _Builder(filled, adapters, scale or 0.0, dtype, set())
    merge = {} if keep_lora else adapters
    by_leaf: dict[tuple[str, ...], list[Weight]] = {}
    for weight in table.values():
        by_leaf.setdefault(weight.path, []).append(weight)
    params = [builder.leaf(group, merge) for group in by_leaf.values()]
    kept = []
    if keep_lora and lora is not None:
        for group in by_leaf.values():
            if any(weight.key in adapters for weight in group):
                kept += [builder.factor(group, Role.LORA_A, lora.rank), builder.factor(group, Role.LORA_B, lora.rank)]
    return Plan(config, params, kept, sorted(merge), scale, builder.not_finite)


def _check(
    table: Mapping[str, Weight], filled: Mapping[str, SourceTensor], inventory: Inventory, lora: LoRAConfig | None
) -> None:
    """Raises one error that lists everything that does not fit."""
    missing = [key for key in table if key not in filled]
    unknown = [str(tensor) for key, tensor in inventory.weights.items() if key not in table]
    misshaped, dtypes = [], []
    for key, tensor in filled.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            dtypes.append(f"{tensor} is {tensor.dtype}")
        if key in table and tensor.shape != table[key].shape:
            misshaped.append(f"{tensor} is {list(tensor.shape)}, expected {list(table[key].shape)}")
    for key, adapter in inventory.adapters.items():
        factors = adapter.factors
        if key not in table or not table[key].adaptable:
            unknown += [str(factor) for factor in factors]
            continue
        if len(factors) < 2:
            missing.append(f"the other factor of {factors[0]}")
            continue
        dtypes += [f"{factor} is {factor.dtype}" for factor in factors if factor.dtype not in WEIGHT_DTYPES]
        rank = lora.rank if lora else 0
        rows, columns = table[key].target_shape
        for factor, shape in zip(factors, ((rank, rows), (columns, rank)), strict=True):
            if factor.shape != shape:
                misshaped.append(f"{factor} is {list(factor.shape)}, expected {list(shape)}")
    names = set(itertools.chain.from_iterable(adapter.names for adapter in inventory.adapters.values()))
    several = [f"adapters {', '.join(sorted(names))} where one is expected"] if len(names) > 1 else []
    problems = [
        f"{len(items)} {label}: {_shorten(items)}"
        for label, items in (
            ("missing", missing),
            ("unknown", unknown),
            ("misshaped", misshaped),
            ("duplicated", inventory.duplicated + several),
            ("of unsupported dtype", dtypes),
        )
        if items
    ]
    if problems:
        listed = "; ".join(problems)
        raise DeepGenError(f"the weights do not fit the model ({listed}); check that all parts belong together")


def _shorten(items: Sequence[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")


Factors = tuple[np.ndarray, np.ndarray]


@dataclass
class _Builder:
    """Makes leaves of weights."""

    filled: Mapping[str, SourceTensor]
    adapters: Mapping[str, Adapter]
    scale: float
    dtype: np.dtype | None
    not_finite: set[str]

    def leaf(self, group: list[Weight], merge: Mapping[str, Adapter]) -> Leaf:
        """One parameter leaf, from the weights stacked in it."""
        dtype = self.dtype or _common_dtype(
            np.dtype(np.float32) if weight.key in merge else self.filled[weight.key].numpy_dtype for weight in group
        )
        first = group[0]
        pieces, chunks = [], first.target_shape
        for weight in group:
            tensor, adapter = self.filled[weight.key], merge.get(weight.key)
            blocks: list[slice | None] = [None] if tensor.source.sequential else row_blocks(weight, dtype)
            factors = None if adapter is None else self._factors(adapter)
            if factors is not None and len(blocks) > 1:
                factors = functools.cache(factors)
            order = self._order([tensor, *([] if adapter is None else adapter.factors)])
            for number, rows in enumerate(blocks):
                value = self._value(weight, tensor, factors, rows, dtype)
                pieces.append(Piece(slice_index(weight, rows), (*order, number), value))
            chunks = chunk_shape(weight, blocks)
        ones = (1,) * len(first.stack)
        return Leaf(first.path, (*first.stack, *first.target_shape), dtype, (*ones, *chunks), pieces)

    @staticmethod
    def _order(tensors: Sequence[SourceTensor]) -> tuple[bool, int, int]:
        """Sorts pieces so that a source that cannot go back cheaply is read from its start to its end."""
        sequential = [tensor for tensor in tensors if tensor.source.sequential]
        first = min(sequential or tensors[:1], key=lambda tensor: tensor.position)
        return first.source.sequential, id(first.source), first.position

    def _factors(self, adapter: Adapter) -> Callable[[], Factors]:
        """A function that reads a [in, rank] and b [rank, out] in float32."""

        def read() -> Factors:
            a, b = (self._read(factor, None).T.astype(np.float32) for factor in adapter.factors)
            return a, b

        return read

    def _value(
        self,
        weight: Weight,
        tensor: SourceTensor,
        factors: Callable[[], Factors] | None,
        rows: slice | None,
        dtype: np.dtype,
    ) -> Callable[[], np.ndarray]:
        """A function that makes a weight, or a block of it, with its adapter folded in."""

        def make() -> np.ndarray:
            value = to_target(weight.transform, self._read(tensor, rows))
            if factors is not None:
                a, b = factors()
                if rows is not None:
                    a, b = (a[rows], b) if weight.transform is Transform.SAME else (a, b[:, rows])
                value = folded(value, a, b, self.scale)
            return value.astype(dtype, copy=False)

        return make

    def factor(self, group: list[Weight], role: Role, rank: int) -> Leaf:
        """One leaf of the LoRA tree; layers of the stack that have no adapter get zeros."""
        first = group[0]
        rows, columns = first.target_shape
        shape = (rows, rank) if role is Role.LORA_A else (rank, columns)
        factors = {w.key: getattr(self.adapters[w.key], role.value) for w in group if w.key in self.adapters}
        dtype = self.dtype or _common_dtype(factor.numpy_dtype for factor in factors.values())

        def value(factor: SourceTensor | None) -> Callable[[], np.ndarray]:
            if factor is None:
                return lambda: np.zeros(shape, dtype)
            return lambda: self._read(factor, None).T.astype(dtype, copy=False)

        pieces = []
        for weight in group:
            factor = factors.get(weight.key)
            order = (*self._order([factor]), 0) if factor else (False, 0, 0, 0)
            pieces.append(Piece(weight.index, order, value(factor)))
        path = (*first.path[:-1], role.value)
        return Leaf(path, (*first.stack, *shape), dtype, (*(1,) * len(first.stack), *shape), pieces)

    def _read(self, tensor: SourceTensor, rows: slice | None) -> np.ndarray:
        value = tensor.read(rows)
        if not all_finite(value):
            self.not_finite.add(str(tensor))
        return value


def _common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The smallest dtype that holds all of them exactly."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else np.dtype(np.float32)


def all_finite(tensor: np.ndarray) -> bool:
    """Whether no element is NaN or infinite. For 16-bit floats the exponent is tested, without a cast."""
    exponents = {BFLOAT16: 0x7F80, np.dtype(np.float16): 0x7C00}.get(tensor.dtype)
    if exponents is None:
        # The sum of finite float32 numbers may overflow, so a finite sum proves it and anything else is looked at.
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(tensor.sum())) or bool(np.isfinite(tensor).all())
    bits = tensor.view(np.uint16) & np.uint16(exponents)
    return not math.prod(bits.shape) or int(bits.max()) != exponents
