"""Reading optimised programs: loops, device groups, operations and bytes, counted by hand."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.topologies import chips

from deepgen_jax.aot.estimate import costs, estimate, hlo, roofline
from deepgen_jax.aot.topology import parse_topology
from deepgen_jax.errors import DeepGenError

TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%reads_a_slice (p: bf16[10,64,128], i: s32[]) -> bf16[64,128] {
  %p = bf16[10,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %view = bf16[64,128]{1,0} bitcast(%slice)
}

%all-reduce-scatter (q: bf16[64,128]) -> bf16[16,128] {
  %q = bf16[64,128]{1,0} parameter(0)
  %reduced = bf16[64,128]{1,0} all-reduce(%q), channel_id=3, replica_groups=[4,4]<=[4,4]T(1,0), to_apply=%add
  %zero = s32[] constant(0)
  ROOT %piece = bf16[16,128]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={16,128}
}

%body (state: (s32[], bf16[10,64,128])) -> (s32[], bf16[10,64,128]) {
  %state = (s32[], bf16[10,64,128]) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %stack = bf16[10,64,128]{2,1,0} get-tuple-element(%state), index=1
  %layer = bf16[64,128]{1,0} fusion(%stack, %turn), kind=kLoop, calls=%reads_a_slice
  %gather-start = (bf16[64,128], bf16[256,128]) all-gather-start(%layer), channel_id=1, replica_groups=[4,4]<=[16], \
dimensions={0}
  %product = f32[64,64]{1,0} convolution(%layer, %layer), dim_labels=bf_oi->bf
  %gather-done = bf16[256,128]{1,0} all-gather-done(%gather-start)
  %scattered = bf16[16,128]{1,0} fusion(%layer), kind=kCustom, calls=%all-reduce-scatter
  ROOT %next = (s32[], bf16[10,64,128]) tuple(%turn, %stack)
}

%condition (state: (s32[], bf16[10,64,128])) -> pred[] {
  %state = (s32[], bf16[10,64,128]) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (x: bf16[10,64,128], w: bf16[128,32]) -> f32[64,32] {
  %x = bf16[10,64,128]{2,1,0} parameter(0)
  %w = bf16[128,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[10,64,128]) tuple(%zero, %x)
  %loop = (s32[], bf16[10,64,128]) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
  %last = bf16[64,128]{1,0} slice(%x), slice={[0:1], [0:64], [0:128]}
  ROOT %out = f32[64,32]{1,0} dot(%last, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
LAYER = 64 * 128 * 2


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TPU)


@pytest.fixture(scope="module")
def estimated(module):
    topology = parse_topology("v5e:4x4")
    return roofline.estimate(module, topology, chips(topology))


def test_loops_are_followed_as_often_as_they_run(module):
    times = {one.name: count for _, one, count in module.executed()}
    assert times["product"] == times["gather-start"] == 10
    assert times["out"] == 1
    assert module.unknown_loops() == 0


def test_unknown_trip_counts_and_unknown_text_are_refused():
    topology = parse_topology("v5e:4x4")
    assert estimate(TPU, topology, chips(topology)).operations > 0
    with pytest.raises(DeepGenError, match="trip counts of 1 loops cannot be determined"):
        estimate(TPU.replace("known_trip_count", "unheard_of"), topology, chips(topology))
    with pytest.raises(DeepGenError, match=r"cannot be parsed \(ValueError: unknown element type 'e5m9'\).* jax \d"):
        estimate(TPU.replace("bf16[128,32]", "e5m9[128,32]"), topology, chips(topology))


def inlined(text: str) -> str:
    """The text as newer compilers write it: elements of tuples as ``%t#1``, loops without a trip count."""
    for element in re.findall(r"^ +%\S+ = .* get-tuple-element\(%\S+\), index=\d+\n", text, re.MULTILINE):
        name, owner, index = re.findall(r"^ +%(\S+) = .*\(%(\S+)\), index=(\d+)", element)[0]
        text = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{owner}#{index}", text.replace(element, ""))
    return text.replace(', backend_config={"known_trip_count":{"n":"10"}}', "")


def test_both_forms_of_text_give_the_same_estimate(estimated):
    """Nested tuples, too: the counter is element 0 of element 1 of the state."""
    count = """\
%condition (state: (s32[], bf16[10,64,128])) -> pred[] {
  %state = (s32[], bf16[10,64,128]) parameter(0)
  %limit = s32[] constant(10)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[] compare(%counter, %limit), direction=LT
}"""
    text = re.sub(r"%condition \(.*?\n}", count, TPU, flags=re.DOTALL)
    text = text.replace("tuple(%turn, %stack)", "tuple(%following, %stack)").replace(
        "  ROOT %next", "  %one = s32[] constant(1)\n  %following = s32[] add(%turn, %one)\n  ROOT %next"
    )
    topology = parse_topology("v5e:4x4")
    old, new = (estimate(form, topology, chips(topology)) for form in (text, inlined(text)))
    assert "get-tuple-element" not in inlined(text)
    assert "known_trip_count" not in inlined(text)
    assert old == new
    assert new.operations == estimated.operations
    assert new.collectives == estimated.collectives
    nested = hlo.parse(
        "ENTRY %main (t: (f32[2], (s32[], bf16[3,4]))) -> bf16[3,4] {\n"
        "  %t = (f32[2]{0:T(128)}, (s32[]{:T(128)}, /*index=1*/bf16[3,4]{1,0:T(8,128)(2,1)S(1)})) parameter(0)\n"
        "  ROOT %y = bf16[3,4]{1,0} copy(%t#1#1)\n}\n"
    )
    assert nested.computations["main"].by_name["t#1#1"].results == (hlo.Array("bf16", (3, 4), in_hbm=False),)


DIRECTIONS = {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "NE": "!="}


@given(
    start=st.integers(-9, 9), step=st.integers(-4, 4).filter(bool), limit=st.integers(-9, 9),
    direction=st.sampled_from(sorted(DIRECTIONS)), shift=st.integers(-3, 3), flipped=st.booleans(), fused=st.booleans(),
)  # fmt: skip
def test_trip_counts_are_those_of_the_loop(start, step, limit, direction, shift, flipped, fused):
    """A loop that would not end within the range of its counter has no trip count."""
    counter, turns = start, 0
    while eval(f"counter + shift {DIRECTIONS[direction]} limit") and turns < 100:
        counter, turns = counter + step, turns + 1
    order = "%limit, %shifted" if flipped else "%shifted, %limit"
    said = direction.translate(str.maketrans("LG", "GL")) if flipped else direction
    test = f"""\
  %by = s32[] constant({shift})
  %limit = s32[] constant({limit})
  %shifted = s32[] add(%i, %by)
  ROOT %more = pred[] compare({order}), direction={said}
"""
    fusion = f"%test (i: s32[]) -> pred[] {{\n  %i = s32[] parameter(0)\n{test}}}\n\n" if fused else ""
    call = "  ROOT %call = pred[] fusion(%i), kind=kLoop, calls=%test\n" if fused else test
    text = f"""{fusion}%condition (state: (f32[2], s32[])) -> pred[] {{
  %state = (f32[2], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=1
{call}}}

%body (state: (f32[2], s32[])) -> (f32[2], s32[]) {{
  %state = (f32[2], s32[]) parameter(0)
  %x = f32[2] get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %step = s32[] constant({step})
  %more = s32[] add(%step, %i)
  %kept = s32[] copy(%more)
  ROOT %next = (f32[2], s32[]) tuple(%x, %kept)
}}

ENTRY %main (x: f32[2]) -> (f32[2], s32[]) {{
  %x = f32[2] parameter(0)
  %start = s32[] constant({start})
  %state = (f32[2], s32[]) tuple(%x, %start)
  ROOT %loop = (f32[2], s32[]) while(%state), condition=%condition, body=%body
}}
"""
    module = hlo.parse(text)
    main = module.computations["main"]
    assert module.trips(main, main.by_name["loop"]) == (None if turns == 100 else turns)


def test_collectives_are_counted_by_kind_in_every_turn(estimated):
    """An all-gather sends its piece to the 3 others; the fused reduce-scatter 3/4 of its operand."""
    found = {kind: (traffic.count, traffic.bytes) for kind, traffic in estimated.collectives.items()}
    assert found == {"all-gather": (10, 10 * 3 * LAYER), "reduce-scatter": (10, 10 * LAYER * 3 / 4)}


def test_operations_are_those_of_products(estimated):
    assert estimated.operations == 10 * 2 * 64 * 64 * 128 + 2 * 64 * 32 * 128


def test_memory_counts_slices_as_slices_and_leaves_on_chip_memory_out(module):
    moved = {one.name: costs.memory_bytes(module, computation, one) for computation, one, _ in module.executed()}
    # One layer of the stack and the number of the turn are read, one layer is written.
    assert moved["layer"] == 2 * LAYER + 4
    assert moved["last"] == 2 * LAYER
    # The kernel is in on-chip memory.
    assert moved["out"] == LAYER + 64 * 32 * 4
    assert moved["loop"] == moved["start"] == 0


def test_instructions_that_only_copy_are_told_apart(module, estimated):
    moves = {one.name for _, one, _ in module.executed() if costs.only_moves(module, one)}
    assert {"layer", "last"} <= moves
    assert not {"product", "out", "scattered"} & moves
    # Ten layers out of their stack, each with the number of the turn, and the last one once more.
    assert estimated.moved == 10 * (2 * LAYER + 4) + 2 * LAYER


PRECISIONS = """\
ENTRY %main (x: f32[64,32], k: f32[32,16], a: s8[64,32], b: s8[32,16], c: f8e4m3fn[64,32]) -> f32[64,16] {
  %x = f32[64,32] parameter(0)
  %k = f32[32,16] parameter(1)
  %a = s8[64,32] parameter(2)
  %b = s8[32,16] parameter(3)
  %c = f8e4m3fn[64,32] parameter(4)
  %e = s32[64,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %f = f32[64,64] dot(%c, %c), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %m = f32[64,16] dot(%x, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %h = f32[64,16] dot(%x, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={high,high}
  ROOT %y = f32[64,16] dot(%x, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
operand_precision={highest,highest}
}
"""


@pytest.mark.parametrize(
    ("topology", "costs_of"), [("h100:1", {"s8": 0.5, "f8": 0.5, "high": 2, "highest": 15}),
                               ("v6e:1x1", {"s8": 0.5, "f8": 1, "high": 3, "highest": 6})],
)  # fmt: skip
def test_the_time_of_a_product_depends_on_its_precision(topology, costs_of):
    module, topology = hlo.parse(PRECISIONS), parse_topology(topology)
    devices = [SimpleNamespace(id=0, coords=(0, 0, 0))]
    found = roofline.estimate(module, topology, devices)
    small, square = 2 * 64 * 16 * 32, 2 * 64 * 64 * 32
    assert found.operations == 4 * small + square
    assert (found.eight_bit, found.exact) == (small + square, small)
    mixed = small
    work = costs_of["s8"] * small + costs_of["f8"] * square + mixed + (costs_of["high"] + costs_of["highest"]) * small
    assert found.arithmetic_seconds == pytest.approx(work / topology.chip.peak_flops)


def test_a_collective_overlaps_what_precedes_its_end(estimated):
    assert estimated.seconds < estimated.device_seconds + estimated.network_seconds
    assert estimated.seconds >= max(estimated.device_seconds, estimated.network_seconds)


def test_times_are_those_of_the_rates(estimated):
    chip = parse_topology("v5e:4x4").chip
    assert estimated.arithmetic_seconds == pytest.approx(estimated.operations / chip.peak_flops)
    assert estimated.memory_seconds == pytest.approx(estimated.memory / chip.memory_bandwidth)
    # Groups of 4 neighbours in a row of 4, which is no ring.
    gather = estimated.collectives["all-gather"]
    assert gather.seconds == pytest.approx(gather.bytes / chip.link_bandwidth)


def test_window_of_a_convolution_meets_only_what_is_there():
    """3x3, same padding, on 5x4: the corners see 4 of 9 places."""
    text = """\
ENTRY %main (x: f32[2,5,4,6], k: f32[3,3,6,7]) -> f32[2,5,4,7] {
  %x = f32[2,5,4,6] parameter(0)
  %k = f32[3,3,6,7] parameter(1)
  ROOT %y = f32[2,5,4,7] convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
operand_precision={highest,highest}
}
"""
    module = hlo.parse(text)
    main = module.computations[module.entry]
    expected = 2 * 2 * 7 * 6 * (3 * 5 - 2) * (3 * 4 - 2)
    assert costs.operations(module, main, main.root) == (expected, expected)


def test_operations_of_gpu_libraries():
    text = """\
ENTRY %main (x: bf16[64,32], k: bf16[32,16]) -> bf16[64,16] {
  %x = bf16[64,32] parameter(0)
  %k = bf16[32,16] parameter(1)
  %y = (bf16[64,16], s8[4096]) custom-call(%x, %k), custom_call_target="__cublas$lt$matmul", backend_config=\
{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %a = (bf16[2,4,8,16], u8[0]) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", \
operand_layout_constraints={bf16[2,8,4,16]{3,2,1,0}}, backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "8", "8"]}}}
}
"""
    module = hlo.parse(text)
    main = module.computations[module.entry]
    assert costs.operations(module, main, main.by_name["y"]) == (2 * 64 * 16 * 32, 0)
    assert costs.operations(module, main, main.by_name["a"]) == (4 * 2 * 4 * 8 * 8 * 16, 0)
    # Their scratch memory is not traffic.
    assert costs.memory_bytes(module, main, main.by_name["y"]) == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert costs.memory_bytes(module, main, main.by_name["a"]) == 2 * (3 * 64 * 32 + 2 * 4 * 8 * 16)


def test_memory_that_is_only_reserved_is_not_traffic():
    text = """HloModule reserved, is_scheduled=true

ENTRY %main (p: bf16[64,32]) -> bf16[8,64,32] {
  %p = bf16[64,32] parameter(0)
  %zero = s32[] constant(0)
  %stack = bf16[8,64,32] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %first = bf16[8,64,32] dynamic-update-slice(%stack, %p, %zero, %zero, %zero)
}
"""
    module = hlo.parse(text)
    main = module.computations[module.entry]
    assert costs.memory_bytes(module, main, main.by_name["stack"]) == 0
    assert costs.memory_bytes(module, main, main.root) == 2 * 2 * 64 * 32


@pytest.mark.parametrize("batch", ["", "1,", "2,"])
@pytest.mark.parametrize(
    ("kernel", "results", "products"),
    [
        ("fwd", "f32[{batch}8,128], bf16[{batch}4,8,16]", 2),
        ("dkv", "f32[{batch}24,16], bf16[{batch}2,24,16], bf16[{batch}2,24,16]", 4),
        ("dkv", "f32[{batch}24,16], bf16[{batch}1,4,8,16], bf16[{batch}2,24,16], bf16[{batch}2,24,16]", 5),
        ("dq", "f32[{batch}8,16], bf16[{batch}4,8,16]", 3),
    ],
)
def test_attention_of_one_sample_counts_like_that_of_many(kernel, results, products, batch):
    """The compiler drops a batch of one; masks and segment ids are no queries, sums of a kernel no gradients."""
    text = f"""HloModule attention

ENTRY %main (m: s8[1,1,1], q: bf16[{batch}4,8,16], k: bf16[{batch}2,24,16]) -> ({results.format(batch=batch)}) {{
  %m = s8[1,1,1] parameter(0)
  %q = bf16[{batch}4,8,16] parameter(1)
  %k = bf16[{batch}2,24,16] parameter(2)
  ROOT %splash_mha_{kernel}.1 = ({results.format(batch=batch)}) custom-call(%m, %m, %q, %k, %k), \
custom_call_target="tpu_custom_call"
}}
"""
    module = hlo.parse(text)
    main = module.computations["main"]
    samples = int(batch.strip(",") or 1)
    assert costs.operations(module, main, main.root) == (2 * products * samples * 4 * 8 * 24 * 16, 0)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")


def test_a_fusion_within_a_fusion_reads_and_writes_parts_alone():
    """TPU programs slice a layer's activations out of those of all layers where a product reads them."""
    text = """HloModule nested

%slice (all: f32[13,8,16], layer: s32[]) -> f32[8,16] {
  %all = f32[13,8,16] parameter(0)
  %layer = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,16] dynamic-slice(%all, %layer, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16] bitcast(%one)
}

%keep (all: f32[13,8,16], layer: s32[], new: f32[8,16]) -> f32[13,8,16] {
  %all = f32[13,8,16] parameter(0)
  %layer = s32[] parameter(1)
  %new = f32[8,16] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8,16] bitcast(%new)
  ROOT %put = f32[13,8,16] dynamic-update-slice(%all, %row, %layer, %zero, %zero)
}

%product (all: f32[13,8,16], layer: s32[], weights: f32[16,32]) -> f32[8,32] {
  %all = f32[13,8,16] parameter(0)
  %layer = s32[] parameter(1)
  %weights = f32[16,32] parameter(2)
  %x = f32[8,16] fusion(%all, %layer), kind=kLoop, calls=%slice
  ROOT %y = f32[8,32] dot(%x, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%store (all: f32[13,8,16], layer: s32[], new: f32[8,16]) -> f32[13,8,16] {
  %all = f32[13,8,16] parameter(0)
  %layer = s32[] parameter(1)
  %new = f32[8,16] parameter(2)
  ROOT %kept = f32[13,8,16] fusion(%all, %layer, %new), kind=kLoop, calls=%keep
}

ENTRY %main (all: f32[13,8,16], layer: s32[], weights: f32[16,32], new: f32[8,16]) -> f32[8,32] {
  %all = f32[13,8,16] parameter(0)
  %layer = s32[] parameter(1)
  %weights = f32[16,32] parameter(2)
  %new = f32[8,16] parameter(3)
  %stored = f32[13,8,16] fusion(%all, %layer, %new), kind=kLoop, calls=%store
  ROOT %read = f32[8,32] fusion(%stored, %layer, %weights), kind=kOutput, calls=%product
}
"""
    module = hlo.parse(text)
    main = module.computations["main"]
    row, index = 4 * 8 * 16, 4
    assert costs.memory_bytes(module, main, main.by_name["read"]) == row + index + 4 * 16 * 32 + 4 * 8 * 32
    # The new row is read and written; the others stay where they are.
    assert costs.memory_bytes(module, main, main.by_name["stored"]) == 2 * row + index


def test_a_slice_of_a_stack_in_another_layout_is_a_slice():
    """TPU programs change the tiling of a stack of 8-bit weights within the fusion of the product of a layer."""
    text = """\
%relaid (s: s8[10,64,32]) -> s8[10,64,32] {
  %s = s8[10,64,32]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[10,64,32]{2,1,0:T(8,128)(4,1)} copy(%s)
}

%layer (s: s8[10,64,32], i: s32[]) -> s8[64,32] {
  %s = s8[10,64,32] parameter(0)
  %f = s8[10,64,32] fusion(%s), kind=kLoop, calls=%relaid
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = s8[1,64,32] dynamic-slice(%f, %i, %z, %z), dynamic_slice_sizes={1,64,32}
  ROOT %b = s8[64,32] bitcast(%d)
}

%product (x: s8[16,64], s: s8[10,64,32], i: s32[]) -> s32[16,32] {
  %x = s8[16,64] parameter(0)
  %s = s8[10,64,32] parameter(1)
  %i = s32[] parameter(2)
  %w = s8[64,32] fusion(%s, %i), kind=kLoop, calls=%layer
  ROOT %y = s32[16,32] convolution(%x, %w), dim_labels=bf_io->bf
}

ENTRY %main (x: s8[16,64], s: s8[10,64,32], i: s32[]) -> s32[16,32] {
  %x = s8[16,64] parameter(0)
  %s = s8[10,64,32] parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = s32[16,32] fusion(%x, %s, %i), kind=kOutput, calls=%product
}
"""
    module = hlo.parse(text)
    main = module.computations[module.entry]
    assert costs.memory_bytes(module, main, main.root) == 16 * 64 + 64 * 32 + 4 + 4 * 16 * 32
    assert costs.eight_bit_operations(module, main, main.root) == {"s8": 2 * 16 * 64 * 32}
