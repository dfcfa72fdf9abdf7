"""Cost of each instruction of a compiled program: operations, bytes of HBM traffic, bytes over links.

Operations are those of matrix products, convolutions and fused attention; all else costs memory traffic alone. A fusion
reads its operands and writes its results once; of an operand that it slices, only the slices count.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from deepgen_jax.aot.estimate.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# No computation, no traffic.
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "call", "conditional", "add-dependency", "opt-barrier", "domain", "get-dimension-size",
))  # fmt: skip
# Index of the piece of a collective in a fusion; -1 for the piece that starts it.
_PIECE = r'"async_collective_fusion_config":\{[^}]*"flag_start":"(-?\d+)"'
_ENDS = {"AsyncCollectiveStart": "start", "AsyncCollectiveDone": "done"}
_GPU_LIBRARY = r'custom_call_target="(__cublas|__cudnn)'
# TPU programs reserve the memory of what loops stack; nothing is written.
_ALLOCATION = r'custom_call_target="(AllocateBuffer)"'
_SLICES = ("dynamic-slice", "slice", "gather")
#: Element types of 8-bit products.
EIGHT_BIT = ("s8", "f8e4m3fn")
# Instructions that change nothing but the place or order of values.
_MOVES = frozenset((
    "copy", "copy-start", "slice", "slice-start", "dynamic-slice", "dynamic-slice-start", "transpose", "reshape",
    "bitcast",
))  # fmt: skip


def collective_kind(instruction: Instruction) -> str | None:
    """The collective that an instruction is or starts; None for others, including those that end one."""
    base = instruction.opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def piece_of(module: Module, instruction: Instruction) -> tuple[str, str] | None:
    """("start", "done" or "middle", channel) of a fusion that contains a piece of a collective; None for others.

    On TPU v5e, which has no other unit for communication, the compiler splits a collective into pieces and fuses each
    with computation. The pieces share a channel.
    """
    if instruction.opcode != "fusion":
        return None
    for computation, inner in module.inside(instruction):
        if collective_kind(inner) and inner.attribute(_PIECE) is not None:
            targets = [one.attribute(r'custom_call_target="(\w+)"') for one in computation.instructions]
            part = next((name for target, name in _ENDS.items() if target in targets), "middle")
            return part, inner.attribute(r"channel_id=(\d+)") or ""
    return None


def sent_to_slices(instruction: Instruction) -> tuple[str, int, int] | None:
    """(kind, operand bytes of a device, slices of a group) of a ``send`` that starts a collective between TPU slices.

    The compiler does the part within slices with other collectives; the rest goes through hosts and the data-centre
    network, as a ``send`` and a ``recv`` that name the collective, such as ``ALL_REDUCE`` over ``{1,2}x{0:255}``.
    """
    if instruction.opcode != "send":
        return None
    kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    group = instruction.attribute(r'_xla_megascale_target="\{([^}]*)\}')
    if kind is None:
        return None
    return kind.lower().replace("_", "-"), instruction.results[0].bytes, _count_slices(group or "")


def _count_slices(text: str) -> int:
    """Number of slices in ``1,2`` or ``1:4``; two for any other form."""
    count = 0
    for part in text.split(","):
        first, _, last = part.partition(":")
        count += int(last) - int(first) + 1 if last.isdecimal() and first.isdecimal() else 1
    return max(count, 2)


def is_copy(instruction: Instruction) -> bool:
    """Whether an instruction starts an asynchronous copy within a device."""
    return instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start", "async-start")


def only_moves(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction only copies, slices or transposes, such as a layer's weights out of their stack."""
    if instruction.opcode != "fusion":
        return instruction.opcode in _MOVES
    inner = module.computations[instruction.called()[0]].instructions
    # Scalars are the place of a slice.
    return all(
        one.opcode in _MOVES or one.opcode in ("parameter", "constant", "tuple") or not one.results[0].shape
        for one in inner
    )


def eight_bit_operations(module: Module, computation: Computation, instruction: Instruction) -> dict[str, int]:
    """Operations of an instruction, and of the computations in it, whose operands both have 8 bits: type -> number."""
    found: dict[str, int] = {}
    for owner, one, count in _products(module, computation, instruction):
        if one.opcode not in ("dot", "convolution") and not one.attribute(r'custom_call_target="(__cublas)'):
            continue  # Other kernels read small integers that they do not multiply.
        types = {arrays[0].dtype for arrays in owner.arrays(one)[:2] if arrays}
        if len(types) == 1 and (kind := types.pop()) in EIGHT_BIT:
            found[kind] = found.get(kind, 0) + count
    return found


def high_operations(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Operations of float32 at high precision: TF32 on GPUs, three bfloat16 products on TPUs."""
    products = _products(module, computation, instruction)
    return sum(count for owner, one, count in products if _has_precision(owner, one, "high"))


def collectives_of(module: Module, instruction: Instruction, computation: Computation) -> Iterator[
    tuple[str, Instruction, int]
]:  # fmt: skip
    """(kind, collective, operand bytes on a device) of an instruction and of the computations in it.

    A reduce-scatter of a TPU program is an all-reduce in a fusion named ``all-reduce-scatter``. Of a collective in
    pieces (:func:`piece_of`) only the fusion that starts it counts.
    """
    kind = collective_kind(instruction)
    if kind:
        yield kind, instruction, _operand_bytes(computation, instruction)
    elif instruction.opcode in ("fusion", "async-start"):
        scatters = "all-reduce-scatter" in instruction.attributes
        for inner_computation, inner in module.inside(instruction):
            if (kind := collective_kind(inner)) and inner.attribute(_PIECE) in (None, "-1"):
                if scatters and kind == "all-reduce":
                    kind = "reduce-scatter"
                yield kind, inner, _operand_bytes(inner_computation, inner)


def wire_bytes(kind: str, operand: int, members: int) -> float:
    """Bytes that a device sends in a collective of ``members`` devices, with the optimal algorithm.

    Args:
      kind: of the collective.
      operand: operand bytes of a device.
      members: devices of a group.
    """
    share = (members - 1) / members if members > 1 else 0.0
    if kind == "all-gather":
        return operand * (members - 1)
    if kind == "all-reduce":
        return 2 * operand * share
    if kind in ("collective-permute", "collective-broadcast"):
        return float(operand) if members > 1 else 0.0
    return operand * share


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction reads from and writes to HBM."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.attribute(_ALLOCATION):
        return 0
    operands = computation.arrays(instruction)
    if is_copy(instruction):
        # Results are source and target; a copy between HBM and on-chip memory passes HBM once.
        arrays = [array for array in instruction.results if array.shape]
        moved = min((array.bytes for array in arrays), default=0)
        return moved if any(not array.in_hbm for array in arrays) else 2 * moved
    if opcode.endswith("-start"):
        return max(_hbm(instruction.results), sum(_hbm(arrays) for arrays in operands))
    if opcode in ("send", "recv"):
        return _hbm(instruction.results[:1])
    written = _hbm(_without_scratch(instruction))
    if opcode in _SLICES:
        return 2 * written
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _hbm(operands[1 if opcode == "dynamic-update-slice" else 2])
    if opcode == "fusion":
        body = module.computations[instruction.called()[0]]
        if piece := piece_of(module, instruction):
            return _fused_traffic(module, body, operands, instruction, piece[0])
        reads = _fusion_reads(module, body, [_hbm(arrays) for arrays in operands])
        return sum(reads) + _fusion_writes(module, body, instruction.results)
    return written + sum(_hbm(arrays) for arrays in operands)


def _without_scratch(instruction: Instruction) -> tuple[Array, ...]:
    """Results without the scratch memory of GPU libraries, the last one, which is reserved but hardly used."""
    results = instruction.results
    if len(results) > 1 and instruction.attribute(_GPU_LIBRARY) and results[-1].dtype in ("s8", "u8"):
        return results[:-1]
    return results


def _fused_traffic(
    module: Module, body: Computation, operands: list[tuple[Array, ...]], fusion: Instruction, part: str
) -> int:
    """Traffic of a fusion with a piece of a collective, whose result is written once, by the piece that starts it."""
    if part == "start":
        return _hbm(fusion.results[1:2])
    if part == "done":
        return 0
    # Source, target and flags of the collective pass through; the rest is the fused computation.
    piece = next(one for one in body.instructions if one.attribute(_PIECE) is not None)
    used = {name for one in body.instructions if one not in (piece, body.root) for name in one.operands}
    own = {one.number for one in body.instructions if one.opcode == "parameter" and one.name in used}
    read = _fusion_reads(module, body, [_hbm(arrays) if i in own else 0 for i, arrays in enumerate(operands)])
    parts = ((body.by_name[name], array) for name, array in zip(body.root.operands, fusion.results, strict=False))
    return sum(read) + sum(
        array.bytes for one, array in parts if one is not piece and one.opcode != "parameter" and array.in_hbm
    )


def _fusion_reads(module: Module, body: Computation, whole: list[int]) -> Iterator[int]:
    """Bytes read of each operand, of which ``whole`` are in HBM; less if the fusion only reads slices."""
    users: dict[str, list[Instruction]] = {}
    for inner in body.instructions:
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    for inner in body.instructions:
        if inner.opcode != "parameter":
            continue
        most = whole[inner.number] if inner.number < len(whole) else 0
        uses = _through_views(module, inner, users)
        yield min(most, sum(_read_by(module, use, name, most) for use, name in uses)) if most and uses else most


def _read_by(module: Module, use: Instruction, name: str, whole: int) -> int:
    """Bytes that an instruction of a fusion reads of operand ``name``, of ``whole`` bytes."""
    if use.opcode in ("dynamic-slice", "gather", "slice") and use.operands[0] == name:
        return use.bytes
    if use.opcode == "dynamic-update-slice" and use.operands[0] == name:
        return 0  # updated in place
    if use.opcode == "fusion":
        # TPU programs nest the fusion of a product's operand in the fusion of the product.
        given = [whole if operand == name else 0 for operand in use.operands]
        return sum(_fusion_reads(module, module.computations[use.called()[0]], given))
    return whole


def _through_views(
    module: Module, start: Instruction, users: dict[str, list[Instruction]]
) -> list[tuple[Instruction, str]]:
    """(user, operand name) of the users of a value, through bitcasts and, within a fusion, changes of layout."""
    found = []
    for use in users.get(start.name, []):
        if _is_view(module, use):
            found += _through_views(module, use, users)
        else:
            found.append((use, start.name))
    return found


def _is_view(module: Module, use: Instruction) -> bool:
    if use.opcode == "fusion":
        # TPU programs change the tiling of 8-bit weights in a fusion within that of the product.
        body = module.computations[use.called()[0]].instructions
        return all(one.opcode in ("parameter", "bitcast", "copy") for one in body)
    return use.opcode in ("bitcast", "copy")


def _fusion_writes(module: Module, body: Computation, results: tuple[Array, ...]) -> int:
    root = body.root
    parts = [body.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(results):
        return _hbm(results)
    total = 0
    for part, result in zip(parts, results, strict=True):
        source = part
        while source.opcode in ("bitcast", "copy") and source.operands and source.operands[0] in body.by_name:
            source = body.by_name[source.operands[0]]
        if not result.in_hbm:
            continue
        if source.opcode == "dynamic-update-slice":
            total += body.by_name[source.operands[1]].bytes
        elif source.opcode == "fusion" and len(source.results) == 1:
            total += _fusion_writes(module, module.computations[source.called()[0]], (result,))
        else:
            total += result.bytes
    return total


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    return sum(array.bytes for arrays in computation.arrays(instruction) for array in arrays)


def operations(module: Module, computation: Computation, instruction: Instruction) -> tuple[int, int]:
    """(operations, of these in float32 at full precision) of an instruction and of the computations in it."""
    total = exact = 0
    for owner, one, count in _products(module, computation, instruction):
        total += count
        exact += count if _has_precision(owner, one, "highest") else 0
    return total, exact


def _products(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction, int]]:
    """(computation, product, its operations) of an instruction and of the computations in it."""
    where = [(computation, instruction)]
    if instruction.opcode in ("fusion", "async-start") or instruction.opcode.endswith("-start"):
        where += module.inside(instruction)
    for owner, one in where:
        if count := _operations(owner, one):
            yield owner, one, count


def _operations(computation: Computation, one: Instruction) -> int:
    if one.opcode == "dot":
        left = computation.by_name[one.operands[0]].results[0].shape
        contracted = _numbers(one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2 * math.prod(one.results[0].shape) * math.prod(left[axis] for axis in contracted)
    if one.opcode == "convolution":
        return _convolution(computation, one)
    if one.opcode == "custom-call":
        target = one.attribute(r'custom_call_target="([^"]*)"') or ""
        if target.startswith("__cublas"):
            left = computation.by_name[one.operands[0]].results[0].shape
            text = one.attribute(r'"lhs_contracting_dimensions":\s*(\[[^\]]*\])')
            contracted = tuple(int(axis) for axis in json.loads(text or "[]"))
            return 2 * math.prod(one.results[0].shape) * math.prod(left[axis] for axis in contracted)
        if target.startswith("__cudnn$fmha"):
            return _fused_attention(one, backward=target.endswith("Backward"))
        if target.startswith("__cudnn$conv"):
            return _convolution(computation, one)
        if target == "tpu_custom_call" and (kernel := re.match(r"splash_mha_(fwd|dkv|dq)", one.name)):
            return _splash(computation, one, kernel[1])
    return 0


def _fused_attention(one: Instruction, backward: bool) -> int:
    """Two products forward; five backward, with the scores recomputed."""
    text = one.attribute(r'"intermediate_tensor_shape":\s*\{"element_type":\s*"\w+",\s*"dimensions":\s*(\[[^\]]*\])')
    scores = math.prod(int(size) for size in json.loads(text or "[]"))
    width = int((one.attribute(r"operand_layout_constraints=\{\w+\[([\d,]+)\]") or "0").split(",")[-1])
    return (10 if backward else 4) * scores * width if text else 0


def _splash(computation: Computation, one: Instruction, kernel: str) -> int:
    """Two products forward; backward four for keys and values and three for queries, or five in the fused kernel.

    Queries and keys are the first floating-point operands, [batch, heads, length, width]; a batch of one is dropped.
    """
    arrays = [array for given in computation.arrays(one) for array in given]
    shapes = [array.shape for array in arrays if len(array.shape) >= 3 and array.dtype in ("bf16", "f32")]
    if len(shapes) < 2:
        return 0
    query, key = shapes[:2]
    gradients = sum(len(array.shape) >= len(query) and array.dtype == "bf16" for array in one.results)
    products = {"fwd": 2, "dkv": 5 if gradients == 3 else 4, "dq": 3}[kernel]
    return 2 * products * math.prod(query) * key[-2]


def _convolution(computation: Computation, one: Instruction) -> int:
    """Multiply-adds outside of padding; matrix products of TPU programs are convolutions, too."""
    labels = one.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    if labels is None:
        return 0
    sides, out = labels.split("->")
    image, kernel = sides.split("_")
    shapes = [computation.by_name[name].results[0].shape for name in one.operands[:2]]
    result = one.results[0].shape
    pairs = 1
    window = _window(one.attribute(r"window=\{([^}]*)\}") or "")
    for place, label in enumerate(sorted(x for x in out if x.isdigit())):
        size, stride, low, dilated, spread = (values[place] if place < len(values) else default for values, default in (
            (window["size"], 1), (window["stride"], 1), (window["pad"], 0), (window["lhs_dilate"], 1),
            (window["rhs_dilate"], 1),
        ))  # fmt: skip
        length, outs = shapes[0][image.index(label)], result[out.index(label)]
        pairs *= _valid_pairs(outs, size, stride, low, spread, length, dilated)
    features = shapes[1][kernel.index("i")]
    count = 2 * result[out.index("b")] * result[out.index("f")] * features * pairs
    groups = int(one.attribute(r"batch_group_count=(\d+)") or 1)
    return count // groups if groups == 1 else count


def _valid_pairs(outs: int, size: int, stride: int, low: int, spread: int, length: int, dilated: int) -> int:
    """Number of (output position, window position) pairs that read an element of the image, not padding."""
    if size == 1 and low == 0 and dilated == 1:
        return outs
    reach = (length - 1) * dilated + 1
    total = 0
    for place in range(size):
        offset = place * spread - low
        # Positions p in 0..outs-1 with 0 <= p * stride + offset < reach, on an element and not between two.
        if dilated == 1:
            first = max(0, math.ceil(-offset / stride))
            last = min(outs - 1, (reach - 1 - offset) // stride)
            total += max(0, last - first + 1)
        else:
            total += sum(0 <= p * stride + offset < reach and (p * stride + offset) % dilated == 0 for p in range(outs))
    return total


def _window(text: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")}
    for name, values in re.findall(r"(\w+)=([\w\-]+)", text):
        if name == "pad":
            found[name] = [int(low) for low in re.findall(r"(-?\d+)_-?\d+", values)]
        elif name in found:
            found[name] = [int(value) for value in values.split("x")]
    return found


def _has_precision(computation: Computation, one: Instruction, precision: str) -> bool:
    """Whether a product is computed in float32 at a precision of `jax.lax.Precision`."""
    sizes = [computation.by_name[name].results for name in one.operands[:2] if name in computation.by_name]
    wide = any(arrays and arrays[0].dtype == "f32" for arrays in sizes)
    pattern = rf"operand_precision[\"=:\s]*[\[{{]\"?(?:{precision}|{precision.upper()})\b"
    return wide and re.search(pattern, one.attributes) is not None


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",")) if text else ()
