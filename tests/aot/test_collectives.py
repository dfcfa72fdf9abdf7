"""Collectives of optimised programs: groups of devices, time on links, and what overlaps them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.topologies import chips

from deepgen_jax.aot.estimate import costs, hlo, roofline
from deepgen_jax.aot.topology import parse_topology


def test_collectives_on_sparse_cores_begin_with_their_update():
    """The program is started before its operands are there; attributes of a Pallas kernel run over three lines."""
    text = """\
%gathers (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128] parameter(0)
  ROOT %gathered = bf16[256,128] all-gather(%p), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
}, execution_thread="sparsecore"

%wrapped (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128] parameter(0)
  ROOT %call = bf16[256,128] custom-call(%p), custom_call_target="on_sparse_core", called_computations={%gathers}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[64,128], q: bf16[2,4,8,16], k: bf16[2,2,24,16]) -> bf16[256,128] {
  %x = bf16[64,128] parameter(0)
  %q = bf16[2,4,8,16] parameter(1)
  %k = bf16[2,2,24,16] parameter(2)
  %start = ((), (), s32[128]{0:S(4)}) async-start(), async_execution_thread="sparsecore", calls=%wrapped
  %splash_mha_fwd_no_residuals.1 = bf16[2,4,8,16] custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="attention"}
  %update = (bf16[64,128], bf16[256,128], s32[128]{0:S(4)}) async-update(%start, %x), calls=%wrapped
  ROOT %done = bf16[256,128] async-done(%update)
}
"""
    module, topology = hlo.parse(text), parse_topology("v5e:4x4")
    main = module.computations[module.entry]
    assert [one.name for one in main.instructions][-3:] == ["splash_mha_fwd_no_residuals.1", "update", "done"]
    attention = main.by_name["splash_mha_fwd_no_residuals.1"]
    assert attention.attribute('op_name="([^"]*)"') == "attention"
    assert costs.operations(module, main, attention) == (4 * 2 * 4 * 8 * 24 * 16, 0)
    found = roofline.estimate(module, topology, chips(topology))
    assert found.collectives["all-gather"].bytes == 3 * 64 * 128 * 2
    # It cannot begin before the kernel ends, which hands nothing over.
    assert found.seconds == pytest.approx(found.device_seconds + found.network_seconds)


def test_collectives_in_pieces_count_once_and_run_beside_the_fusions_between():
    """A v5e program gathers in three fusions: one begins, one holds a product and a piece, one ends."""

    def gather(start: str) -> str:
        flags = f'{{"async_collective_fusion_config":{{"flag_end":"8","flag_start":"{start}"}}}}'
        return (
            "%gather = bf16[4,256]{1,0} all-gather(%own), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, "
            f"backend_config={flags}"
        )

    text = f"""HloModule pieces

%begin (own: bf16[1,256]) -> (bf16[1,256], bf16[4,256]) {{
  %own = bf16[1,256]{{1,0}} parameter(0)
  {gather("-1")}
  ROOT %begun = (bf16[1,256]{{1,0}}, bf16[4,256]{{1,0}}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}}

%layer (stack: bf16[6,64,64], i: s32[]) -> bf16[64,64] {{
  %stack = bf16[6,64,64]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,64]{{2,1,0}} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={{1,64,64}}
  ROOT %flat = bf16[64,64]{{1,0}} bitcast(%one)
}}

%async_collective_fusion (own: bf16[1,256], all: bf16[4,256], layers: bf16[6,64,64], i: s32[]) -> (bf16[64,64], bf16[1,256], bf16[4,256]) {{
  %own = bf16[1,256]{{1,0}} parameter(0)
  %all = bf16[4,256]{{1,0}} parameter(1)
  %layers = bf16[6,64,64]{{2,1,0}} parameter(2)
  %i = s32[] parameter(3)
  %a = bf16[64,64]{{1,0}} fusion(%layers, %i), kind=kLoop, calls=%layer
  %product = bf16[64,64]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  {gather("2")}
  ROOT %both = (bf16[64,64]{{1,0}}, bf16[1,256]{{1,0}}, bf16[4,256]{{1,0}}) tuple(%product, %own, %gather)
}}

%end (own: bf16[1,256], all: bf16[4,256]) -> bf16[4,256] {{
  %own = bf16[1,256]{{1,0}} parameter(0)
  %all = bf16[4,256]{{1,0}} parameter(1)
  {gather("2")}
  ROOT %ended = bf16[4,256]{{1,0}} custom-call(%own, %all, %gather), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: bf16[1,256], layers: bf16[6,64,64], i: s32[]) -> bf16[4,256] {{
  %x = bf16[1,256]{{1,0}} parameter(0)
  %layers = bf16[6,64,64]{{2,1,0}} parameter(1)
  %i = s32[] parameter(2)
  %start = (bf16[1,256]{{1,0}}, bf16[4,256]{{1,0}}) fusion(%x), kind=kCustom, calls=%begin
  %own = bf16[1,256]{{1,0}} get-tuple-element(%start), index=0
  %all = bf16[4,256]{{1,0}} get-tuple-element(%start), index=1
  %work = (bf16[64,64]{{1,0}}, bf16[1,256]{{1,0}}, bf16[4,256]{{1,0}}) fusion(%own, %all, %layers, %i), kind=kCustom, calls=%async_collective_fusion
  %still = bf16[1,256]{{1,0}} get-tuple-element(%work), index=1
  %more = bf16[4,256]{{1,0}} get-tuple-element(%work), index=2
  ROOT %done = bf16[4,256]{{1,0}} fusion(%still, %more), kind=kCustom, calls=%end
}}
"""  # noqa: E501 - one instruction a line
    topology = parse_topology("v5e:2x2")
    found = roofline.estimate(hlo.parse(text), topology, chips(topology))
    chip, row = topology.chip, 2 * 256
    assert (found.collectives["all-gather"].count, found.collectives["all-gather"].bytes) == (1, 3 * row)
    assert found.operations == 2 * 64**3
    # The gathered array is written once; the product reads one layer of six and its index, and writes its own.
    assert found.memory == 4 * row + 2 * 2 * 64**2 + 4
    assert found.network_seconds == pytest.approx(3 * row / (2 * chip.link_bandwidth))
    # All of it is beside the product.
    assert found.seconds == pytest.approx(found.memory_seconds)


def test_collectives_between_slices_overlap_what_follows():
    """Each of two slices sends half of what it reduces, twice, and the result is there when both have."""
    names = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    both = f'is_host_transfer=true, frontend_attributes={{_xla_host_transfer_rendezvous="all-reduce.1_0",{names}}}'
    text = f"""HloModule slices

ENTRY %main (x: f32[1024], a: bf16[64,64]) -> f32[1024] {{
  %x = f32[1024]{{0}} parameter(0)
  %a = bf16[64,64]{{1,0}} parameter(1)
  %start = token[] after-all()
  %send = (f32[1024]{{0}}, u32[]{{:S(2)}}, token[]) send(%x, %start), channel_id=2, {both}
  %recv = (f32[1024]{{0}}, u32[]{{:S(2)}}, token[]) recv(%start), channel_id=1, {both}
  %product = bf16[64,64]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %received = (f32[1024]{{0}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[1024]{{0}} get-tuple-element(%received), index=0
}}
"""
    topology = parse_topology("v6e:2x2", slices=2)
    devices = [
        SimpleNamespace(id=number, slice_index=number // 4, coords=(number % 2, number // 2 % 2, 0))
        for number in range(8)
    ]
    found = roofline.estimate(hlo.parse(text), topology, devices)
    sent = 2 * 4096 / 2
    assert (found.links["dcn"].count, found.links["dcn"].bytes) == (1, sent)
    assert found.collectives["all-reduce"].bytes == sent
    crossing = sent / topology.chip.network_bandwidth
    assert found.network_seconds == pytest.approx(crossing)
    # The product is over before what was sent is back.
    assert found.device_seconds < crossing
    assert found.seconds == pytest.approx(crossing)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("channel_id=1", None),
    ],
)
def test_device_groups(text, expected):
    found = hlo.device_groups(text)
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(("groups", "spanned"), [([[0, 1, 2, 3]], 1), ([list(range(16))], 2)])
def test_links_of_a_slice_add_up_over_its_dimensions(groups, spanned):
    topology = parse_topology("v6e:4x4")
    network = roofline.Network(topology, chips(topology))
    operand, members = 1000, len(groups[0])
    seconds, link, found = network.seconds("all-gather", operand, np.array(groups))
    assert (link, found) == ("ici", members)
    assert seconds == pytest.approx(operand * (members - 1) / (spanned * topology.chip.link_bandwidth))


def test_whole_dimensions_of_sixteen_are_rings():
    topology = parse_topology("v6e:16x16")
    network = roofline.Network(topology, chips(topology))
    seconds, _, _ = network.seconds("reduce-scatter", 1600, np.arange(16)[None])
    assert seconds == pytest.approx(1500 / (2 * topology.chip.link_bandwidth))


def test_gpus_of_a_host_share_what_crosses_hosts():
    topology = parse_topology("h100:64")
    network = roofline.Network(topology, [SimpleNamespace(id=number) for number in range(64)])
    chip = topology.chip
    inside = network.seconds("all-reduce", 800, np.arange(8)[None])
    assert inside == (pytest.approx(2 * 700 / chip.link_bandwidth), "nvlink", 8)
    across = network.seconds("all-reduce", 800, np.arange(0, 64, 8)[None])
    assert across == (pytest.approx(2 * 700 / chip.network_bandwidth), "infiniband", 8)
    everywhere = network.seconds("all-reduce", 800, None)
    assert everywhere == (pytest.approx(2 * 700 / 8 / chip.network_bandwidth), "infiniband", 64)


def test_all_to_all_has_a_piece_for_every_other_device():
    topology = parse_topology("h100:64")
    network = roofline.Network(topology, [SimpleNamespace(id=number) for number in range(64)])
    chip = topology.chip
    assert network.seconds("all-to-all", 800, np.arange(8)[None]) == (700 / chip.link_bandwidth, "nvlink", 8)
    # 56 of the 64 pieces are for other hosts, and each device sends its own.
    assert network.seconds("all-to-all", 6400, None) == (5600 / chip.network_bandwidth, "infiniband", 64)
