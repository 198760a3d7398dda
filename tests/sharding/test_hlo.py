"""Reading collectives from HLO: programs compiled here, and lines as TPU and GPU compilers write them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from sharding.hlo import collectives

ADD = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def module(*lines: str, others: str = "") -> str:
    body = "\n".join("  " + line for line in lines)
    return f"HloModule jit_f, is_scheduled=true\n\n{ADD}\n{others}\nENTRY %main.1 (p: f32[8,16]) -> f32[8,16] {{\n{body}\n}}\n"


def test_a_compiled_program_has_what_it_was_made_of():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("outer", "inner"))
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def f(x):
        def body(_, x):
            return jnp.tanh(jax.lax.ppermute(x, "inner", ring))

        x = jax.lax.fori_loop(0, 5, body, x)
        y = jax.lax.all_gather(x, "outer")
        z = jax.lax.psum_scatter(y.reshape(16, 16), "inner", tiled=True)
        return jax.lax.psum(jax.lax.all_to_all(z, "inner", 0, 1, tiled=True), ("outer", "inner"))

    both = PartitionSpec(("outer", "inner"))
    text = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=both, out_specs=both, check_vma=False)).lower(jnp.ones((64, 16))).compile().as_text()
    found = {c.kind: c for c in collectives(text)}
    assert [c.kind for c in collectives(text)] == ["collective-permute", "all-gather", "reduce-scatter", "all-to-all", "all-reduce"]
    assert {kind: (c.bytes, c.times) for kind, c in found.items()} == {
        "collective-permute": (512, 5), "all-gather": (1024, 1), "reduce-scatter": (1024, 1), "all-to-all": (256, 1), "all-reduce": (256, 1),
    }  # fmt: skip
    assert found["collective-permute"].groups[:4] == ((0, 1), (1, 2), (2, 3), (3, 0)) and len(found["collective-permute"].groups) == 8
    assert found["all-gather"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found["reduce-scatter"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found["all-reduce"].groups == (tuple(range(8)),)
    assert [found[kind].sent for kind in found] == [512, 512, 768, 192, 2 * 256 * 7 / 8]
    assert not any(c.asynchronous for c in found.values()) and found["collective-permute"].dtype == "f32"


HALVES = [
    ("(f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), "
     "source_target_pairs={{0,1},{1,0}}", "collective-permute", 512, ((0, 1), (1, 0))),
    ("((f32[8,16]{1,0}, bf16[4]{0}), (f32[8,16]{1,0}, bf16[4]{0})) collective-permute-start(%p, %q), source_target_pairs={{0,1}}",
     "collective-permute", 520, ((0, 1),)),
    ("(f32[1,8,16]{2,1,0}, f32[4,8,16]{2,1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 2048,
     ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("((f32[8,16]{1,0}), f32[2,16]{1,0}) reduce-scatter-start(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add", "reduce-scatter", 512,
     ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("((s32[2]{0}), s32[2]{0}) all-reduce-start(%p), replica_groups=mesh['x'=4] {'x'}, to_apply=%add", "all-reduce", 8, ((0, 1, 2, 3),)),
    ("(bf16[8,16]{1,0}, s8[3]{0}) all-reduce-start(%p, %q), replica_groups={}, to_apply=%add", "all-reduce", 259, ()),
]  # fmt: skip


@pytest.mark.parametrize(("line", "kind", "size", "groups"), HALVES, ids=[h[1] + str(h[2]) for h in HALVES])
def test_two_halves_count_once(line, kind, size, groups):
    done = f"ROOT %d = f32[8,16]{{1,0}} {kind}-done(%s)"
    (found,) = collectives(module("%p = f32[8,16]{1,0} parameter(0)", f"%s = {line}", done))
    assert (found.kind, found.bytes, found.groups, found.asynchronous, found.times) == (kind, size, groups, True, 1)
    (at_once,) = collectives(module(f'%s = {line}, backend_config={{"is_sync":true}}', done))
    assert not at_once.asynchronous and at_once.bytes == size


def test_groups_as_axes_of_a_mesh():
    text = "%s = f32[8,16]{1,0} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}, to_apply=%add"
    assert collectives(module(text))[0].groups == ((0, 4, 1, 5), (2, 6, 3, 7))
    assert collectives(module(text.replace("'c','a'", "'b'")))[0].groups == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_an_all_gather_spread_over_a_tpus_fusions_counts_once():
    gather = "%g{} = bf16[4,8]{{1,0}} all-gather(%q), replica_groups={{{{0,1}}}}, dimensions={{0}}, frontend_attributes={{chain_id=\"0\"}}"
    fusions = "".join(
        f"%{name} (q: bf16[2,8]) -> bf16[4,8] {{\n  %q = bf16[2,8]{{1,0}} parameter(0)\n  {gather.format(i)}\n  ROOT %r{i} = {root}\n}}\n\n"
        for i, (name, root) in enumerate({
            "fused_computation.6": '(bf16[2,8]{1,0}, bf16[4,8]{1,0}) custom-call(%g0), custom_call_target="AsyncCollectiveStart"',
            "async_collective_fusion.19": "(bf16[4,8]{1,0}) tuple(%g1)",
            "fused_computation.7": 'bf16[4,8]{1,0} custom-call(%q, %g2), custom_call_target="AsyncCollectiveDone"',
        }.items())
    )  # fmt: skip
    calls = [f"%c{i} = bf16[4,8]{{1,0}} fusion(%p), kind=kCustom, calls=%{name}"
             for i, name in enumerate(("fused_computation.6", "async_collective_fusion.19", "fused_computation.7"))]  # fmt: skip
    (found,) = collectives(module(*calls, others=fusions))
    assert (found.name, found.bytes, found.asynchronous, found.groups) == ("g0", 64, True, ((0, 1),))
    assert collectives(module(others=fusions)) == []


@pytest.mark.parametrize(("begin", "step", "compare", "times"), [(0, 1, "LT", 7), (2, 1, "LT", 5), (0, 2, "LT", None), (0, 1, "NE", None)])
def test_turns_of_a_loop_that_has_no_note(begin, step, compare, times):
    loop = f"""%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %b = (s32[]{{:T(128)}}, f32[4]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  %v = f32[4]{{0}} get-tuple-element(%b), index=1
  %one = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%i, %one)
  %moved = f32[4]{{0}} collective-permute(%v), source_target_pairs={{{{0,1}}}}
  ROOT %t = (s32[]{{:T(128)}}, f32[4]{{0}}) tuple(%next, %moved)
}}

%condition (b: (s32[], f32[4])) -> pred[] {{
  %b = (s32[]{{:T(128)}}, f32[4]{{0}}) parameter(0)
  %end = s32[]{{:T(128)}} constant(7)
  %i = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %end), direction={compare}
}}
"""
    lines = (
        "%p = f32[4]{0} parameter(0)",
        f"%zero = s32[]{{:T(128)}} constant({begin})",
        "%copied = s32[]{:T(128)} copy(%zero)",
        "%start = (s32[]{:T(128)}, f32[4]{0}) tuple(%copied, %p)",
        "%w = (s32[]{:T(128)}, f32[4]{0}) while(%start), condition=%condition, body=%body",
    )
    (found,) = collectives(module(*lines, others=loop))
    assert (found.times, found.bytes, found.computation) == (times, 16, "body")


def test_an_asynchronous_call_and_its_computation_are_one():
    inner = (
        "%wrapped (q: f32[8,16]) -> f32[2,16] {\n  %q = f32[8,16]{1,0} parameter(0)\n"
        "  ROOT %r = f32[2,16]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3}}, to_apply=%add\n}\n"
    )
    for op in ("async-start", "reduce-scatter-start"):
        (found,) = collectives(module(f"%s = ((f32[8,16]{{1,0}}), f32[2,16]{{1,0}}) {op}(%p), calls=%wrapped", others=inner))
        assert (found.kind, found.bytes) == ("reduce-scatter", 512)
