"""Predicted bytes of a device: against the shapes of the step's own arguments, and against a compiler."""

import dataclasses
import math

import jax
import pytest

from jaxmoe.engine.abstract import abstract_step
from jaxmoe.engine.mesh import devices_for
from jaxmoe.spec.published import published
from jaxmoe.spec.types import Segment
from pallas_kernels.dispatch import Kernels
from sharding.memory import Bytes, device_bytes
from sharding.split import SplitError, layout_of, parse_split
from sharding.workload import Workload


def small(name: str, repeats: int = 2):
    """A published model with few layers."""
    spec, segments, first = published(name).with_precision("bfloat16"), [], 0
    for segment in spec.segments:
        segments.append(Segment(segment.pattern, min(repeats, segment.repeats), first))
        first += segments[-1].repeats * len(segment.pattern)
    return dataclasses.replace(spec, segments=tuple(segments), extra_heads=())


def nbytes(tree) -> int:
    """Of one device's part."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


CASES = [
    ("qwen3_30b_a3b", "expert=8", Workload(rows=16)),
    ("qwen3_30b_a3b", "data=2,expert=4,attention=tensor", Workload(rows=6, prompt=1000, dtype="float32", kv_dtype="bfloat16")),
    ("deepseek_v2_lite", "expert=2,tensor=4", Workload(rows=4)),
    ("gpt_oss_20b", "data=2,tensor=4", Workload(rows=4, kv_dtype="float32")),
    ("qwen3_next_80b_a3b", "expert=4,tensor=2", Workload(rows=8)),
    ("mixtral_8x7b", "tensor=8,stage=1", Workload(rows=1)),
    ("olmoe_1b_7b", "expert=4", Workload(rows=8, slots=8, staging=3)),
    ("gpt_oss_20b", "expert=8", Workload(rows=8, copies=16)),
]


@pytest.mark.parametrize("model, split, workload", CASES)
def test_arguments_are_those_of_the_step(model, split, workload):
    spec, kernels = small(model), Kernels("cpu")
    on = devices_for(spec, parse_split(split))
    params, bank, state, *rest = abstract_step(spec, on, workload, kernels, "decode").args
    found = device_bytes(spec, on.layout, workload, "cpu")
    assert found.weights == nbytes(params)
    assert found.kv == nbytes(state.layers)
    if workload.slots is None:
        assert (found.experts + found.tables, found.staging, found.host_store) == (nbytes(bank), 0, 0)
        assert bool(found.tables) == bool(workload.copies)
    else:
        assert found.experts + found.staging == nbytes(state.bank.pools)
        assert found.host_store == nbytes(bank)
        assert found.tables == nbytes(dataclasses.replace(state.bank, pools=()))


def test_copies_divide_among_the_devices():
    layout = layout_of(small("olmoe_1b_7b"), parse_split("expert=4"))
    assert [Workload(rows=4, copies=n).held_experts(64, layout) for n in (0, 4, 8)] == [16, 17, 18]
    with pytest.raises(SplitError, match="copies = 6: 64 experts and copies don't divide among 4 devices"):
        Workload(rows=4, copies=6).held_experts(64, layout)
    with pytest.raises(SplitError, match="copies = 4: .* among 1 devices"):
        Workload(rows=4, copies=4).held_experts(64, layout_of(small("olmoe_1b_7b"), parse_split("tensor=4")))
    with pytest.raises(ValueError, match="copies = 4 with slots = 8"):
        Workload(rows=4, copies=4, slots=8)


def test_items_add_up_and_come_by_size():
    found = device_bytes(small("olmoe_1b_7b"), layout_of(small("olmoe_1b_7b"), parse_split("expert=4")), Workload(rows=8, slots=8), "tpu")
    sizes = [n for _, n in found.items]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == found.total
    assert "host_store" not in dict(found.items) and found.host_store > found.experts
    assert found.arguments + found.activations + found.temporaries == found.total
    assert found.to_json() == dataclasses.asdict(found) | {"total": found.total}
    assert Bytes(3, 2, 1, host_store=9).total == 6


@pytest.mark.parametrize("backend", ["tpu", "gpu", "cpu"])
def test_both_is_the_larger_of_the_steps(backend):
    spec = small("deepseek_v2_lite")
    layout = layout_of(spec, parse_split("expert=4"))
    one = [device_bytes(spec, layout, Workload(rows=64, prefill_tokens=4096), backend, phase=phase) for phase in ("prefill", "decode")]
    both = device_bytes(spec, layout, Workload(rows=64, prefill_tokens=4096), backend)
    assert both.total == max(x.arguments - x.batch + x.activations + x.temporaries for x in one) + max(x.batch for x in one)


def test_more_never_takes_less():
    spec = small("qwen3_30b_a3b")
    layout = layout_of(spec, parse_split("expert=4"))

    def total(**fields) -> int:
        return device_bytes(spec, layout, Workload(**{"rows": 16, **fields}), "tpu").total

    for field, values in {"rows": (4, 16, 64, 256), "prompt": (1, 512, 4096), "prefill_tokens": (32, 512, 8192), "slots": (8, 16, 32)}.items():
        sizes = [total(**{field: value}) for value in values]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1], field
    assert device_bytes(spec, layout, Workload(rows=16), "tpu").total >= device_bytes(spec, layout, Workload(rows=16), "cpu").arguments


def test_a_tpu_fills_up_tiles():
    spec = small("gpt_oss_20b")
    layout = layout_of(spec, parse_split("expert=4"))
    tpu, gpu = (device_bytes(spec, layout, Workload(rows=4), backend) for backend in ("tpu", "gpu"))
    assert tpu.experts == gpu.experts * 2944 // 2880, "2,880 columns go into 23 tiles of 128"
    assert tpu.kv == gpu.kv, "64 channels aren't filled up where the positions come last"


@pytest.mark.compile_only
@pytest.mark.parametrize("model, split", [("olmoe_1b_7b", "expert=4,attention=tensor"), ("gpt_oss_20b", "tensor=4")])
def test_a_tpu_s_compiler_says_the_same(model, split):
    from sharding.compile_only import devices

    spec, workload = small(model, 1), Workload(rows=4)
    on = devices_for(spec, parse_split(split), devices("v5e:2x2"))
    stats = abstract_step(spec, on, workload, Kernels("tpu"), "decode").lower().compile().memory_analysis()
    found = device_bytes(spec, on.layout, workload, "tpu", phase="decode")
    assert found.arguments == stats.argument_size_in_bytes
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    assert found.total == pytest.approx(total, rel=0.05)
