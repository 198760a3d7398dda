"""Times and what they are made of, against counts by hand, by loops, and against sums that must agree."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoe.engine.generate import Engine
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.types import AttentionSpec
from sharding.hardware import Level, parse_hardware
from sharding.link_time import collective_seconds
from sharding.phases import Phase, causal_pairs, causal_reads, decode_phase, prefill_phases, prefill_steps, visible
from sharding.routing_load import Load, Routing, even_distinct, load, missed
from sharding.split import Split, layout_of
from sharding.time_model import DECODE_CHUNK, predict, step_time
from sharding.work import kinds, step_work
from sharding.workload import Workload
from tests.models import CONFIGS

SPEC = ModelSpec.from_hf(CONFIGS["olmoe"]).with_precision("bfloat16")  # 2 layers, D 64, H 4, K 2, C 16, F 48, E 8, A 2, V 96
MACHINE = parse_hardware("h100:8")


# --- Links


SWITCH, RING, LINE = Level(4, 10.0, 0.0, 1, "switch"), Level(4, 20.0, 0.0, 2, "ring"), Level(4, 10.0, 0.0, 3, "line")


@pytest.mark.parametrize(
    ("kind", "levels", "seconds"),
    [
        ("all_gather", [SWITCH], 3 / 4 * 80 / 10), ("reduce_scatter", [RING], 3 / 4 * 80 / 20), ("psum", [LINE], 2 * 3 / 4 * 80 / 10),
        ("all_to_all", [SWITCH], 3 / 4 * 80 / 10), ("all_to_all", [RING], 80 * 4 / (8 * 10)), ("all_to_all", [LINE], 80 * 4 / (4 * 10)),
        ("ppermute", [RING], 8.0), ("ppermute", [SWITCH], 8.0), ("psum", [], 0.0),
        ("all_gather", [SWITCH, Level(2, 1.0, 0.0, 1, "switch")], 6 + 1 / 2 * 20 / 1),  # the second level moves a quarter
    ],
)  # fmt: skip
def test_collectives_by_hand(kind, levels, seconds):
    assert collective_seconds(kind, 80, levels) == pytest.approx(seconds)


def test_hops_cost_latency():
    slow = [Level(4, 1e30, 1e-6, 3, "line")]
    assert collective_seconds("psum", 1, slow) == pytest.approx(6e-6) and collective_seconds("all_gather", 1, slow) == pytest.approx(3e-6)
    with pytest.raises(ValueError, match="collective = 'scan'"):
        collective_seconds("scan", 1, slow)


def test_what_crosses_the_middle_of_a_line():
    """The closed form of an all-to-all is the busiest link's load, counted link by link."""
    n, each = 8, 1.0
    for closed in (False, True):
        links = np.zeros((n, 2))  # to the right of each device, in both directions
        for a in range(n):
            for b in range(n):
                right = (b - a) % n if closed else b - a
                ways = [(1, right)] if not closed else [(1, right), (-1, n - right)]
                shortest = [abs(d) for s, d in ways if d]
                for sign, d in ways:
                    if a == b or (closed and d > min(shortest)):
                        continue
                    share = each / n / (shortest.count(min(shortest)) if closed else 1)
                    step = sign if closed else (1 if d > 0 else -1)
                    for i in range(abs(d)):
                        at = (a + step * i) % n
                        links[at if step > 0 else (at - 1) % n, 0 if step > 0 else 1] += share
        level = Level(n, 2.0 if closed else 1.0, 0.0, 1, "ring" if closed else "line")
        assert links.max() == pytest.approx(collective_seconds("all_to_all", each, [level]))


# --- Routing


def test_distinct_experts_against_draws():
    rng = np.random.default_rng(0)
    drawn = np.mean([len({e for _ in range(5) for e in rng.choice(8, 2, replace=False)}) for _ in range(4000)])
    assert even_distinct(8, 2, 5) == pytest.approx(drawn, rel=0.01) and even_distinct(8, 2, 1) == pytest.approx(2)


def test_a_recorded_routing():
    ids = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[3, 1]]])
    routing = Routing.of_ids(ids, 4)
    assert routing.asked.tolist() == [[0.75, 0.75, 0.25, 0.25]]
    assert load(4, 2, 2, 1, routing) == Load(1.5, 1.5) and load(4, 2, 2, 1, None) == Load(1.0, 1.0)
    assert missed(4, 2, 1, 1, 2, routing) == pytest.approx(0.5) and missed(4, 2, 1, 1, 2, None) == pytest.approx(1.0)
    assert missed(4, 2, 1, 1, 4, routing) == missed(4, 2, 1, 1, None, None) == 0
    for call, says in ((lambda: load(8, 2, 1, 1, routing), "is of 4 experts"),
                       (lambda: Routing.of_ids(ids, 3), "ids below 3")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            call()


# --- Attention


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (5, None), (None, 4), (3, 6), (100, None)])
@pytest.mark.parametrize("prompt", [1, 7, 12])
def test_causal_counts_by_loops(prompt, window, chunk):
    a = AttentionSpec(4, 2, 16, window=window, chunk=chunk)
    seen = [visible(a, i + 1) for i in range(prompt)]
    by_hand = [sum(j > i - (window or prompt) and (chunk is None or j // chunk == i // chunk) for j in range(i + 1)) for i in range(prompt)]
    assert seen == by_hand and causal_pairs(prompt, window, chunk) == sum(by_hand)
    for step in (1, 5, prompt):
        read = 0
        for at in range(0, prompt, step):
            rows = range(at, min(at + step, prompt))
            firsts = [next(j for j in range(i + 1) if j > i - (window or prompt) and (chunk is None or j // chunk == i // chunk)) for i in rows]
            read += max(rows) + 1 - min(firsts)
        assert causal_reads(prompt, step, window, chunk) == read


# --- Steps


def by_name(work):
    return {op.name: op for op in work.ops}


def test_a_decode_step_by_hand():
    w = Workload(rows=3, prompt=10, new_tokens=1)
    layout = layout_of(SPEC, Split())
    work = step_work(SPEC, layout, w, decode_phase(w, layout, context=11))
    ops = by_name(work)
    assert work.collectives == () and kinds(SPEC) == ((SPEC.layers[0], 2),)
    assert (ops["qkv"].times, ops["qkv"].flops, ops["qkv"].nbytes) == (2, 2 * 3 * 64 * 128, 2 * (64 * 128 + 3 * (64 + 128)))
    assert ops["attend"].flops == 2 * 3 * 11 * 4 * 32 and ops["attend"].nbytes == (3 * 11 + 3) * 2 * 2 * 16 * 2 + 3 * 4 * 32 * 2
    distinct = 8 * (1 - 0.75**3)
    assert ops["experts"].flops == 6 * 3 * 2 * 64 * 48
    assert ops["experts"].nbytes == pytest.approx(distinct * 3 * 64 * 48 * 2 + 3 * 2 * ((3 * 64 + 2 * 48) * 2 + 4 * 64 * 4))
    assert (ops["logits"].times, ops["logits"].flops, ops["logits"].nbytes) == (1, 2 * 3 * 64 * 96, 64 * 96 * 2 + 3 * (64 * 2 + 96 * 4))


def test_splitting_shares_the_work():
    """What all devices do together is what one does, but for what they all repeat."""
    w = Workload(rows=4, prompt=8, new_tokens=4)
    whole = layout_of(SPEC, Split())
    alone = by_name(step_work(SPEC, whole, w, decode_phase(w, whole)))
    for split in (Split(tensor=2), Split(expert=2, attention="tensor")):
        layout = layout_of(SPEC, split)
        shared = by_name(step_work(SPEC, layout, w, decode_phase(w, layout)))
        for name in ("qkv", "attend", "attention out", "experts", "logits"):
            assert 2 * shared[name].flops == pytest.approx(alone[name].flops), name
    for exchange in ("tokens", "gather", "weights"):
        layout = layout_of(SPEC, Split(expert=2, exchange=exchange))
        shared = by_name(step_work(SPEC, layout, w, decode_phase(w, layout)))
        assert 2 * shared["qkv"].flops == alone["qkv"].flops and 2 * shared["experts"].flops == pytest.approx(alone["experts"].flops)


@pytest.mark.parametrize(
    ("split", "kinds_of"),
    [
        (Split(), {}),
        (Split(data=2), {}),
        (Split(tensor=2), {"attention": ("psum", 2, 512), "feed forward": ("psum", 2, 512), "embed": ("psum", 1, 512),
                           "tokens": ("all_gather", 1, 4 * 2 * 8)}),
        # Two tokens of a device, room for both, with two ids each, on either device; and room for two results of each.
        (Split(expert=2, exchange="tokens"), {"exchange tokens": ("all_to_all", 4, (2 * 2 * (64 + 2) + 2 * 4 * 64) * 2 / 2)}),
        (Split(expert=2, exchange="gather"), {"gather tokens": ("all_gather", 2, 4 * 66 * 2),
                                              "scatter results": ("reduce_scatter", 2, 4 * 2 * 64 * 2)}),
        (Split(expert=2, exchange="weights"), {"experts to tokens": ("all_gather", 2, 2 * 2 * 2 * 3 * 64 * 48 * 2)}),  # two waves of two experts
        # Two parts of two tokens take three ticks; one segment.
        (Split(stage=2), {"stage": ("ppermute", 3, 2 * 64 * 2), "stages": ("psum", 1, 512)}),
        (Split(sequence=2), {"attention parts": ("psum", 2, 4 * 4 * 18 * 4)}),
    ],
)  # fmt: skip
def test_the_collectives_of_a_decode_step(split, kinds_of):
    w = Workload(rows=4, prompt=8, new_tokens=4)
    layout = layout_of(SPEC, split)
    found = {c.name: (c.kind, c.times, c.nbytes) for c in step_work(SPEC, layout, w, decode_phase(w, layout)).collectives}
    assert set(found) == set(kinds_of)
    for name, (kind, times, nbytes) in kinds_of.items():
        assert found[name][:2] == (kind, times) and found[name][2] == pytest.approx(nbytes), name


def test_stages_pass_parts_in_ticks():
    alone, split = layout_of(SPEC, Split()), layout_of(SPEC, Split(stage=2))
    w, half = Workload(rows=4, prompt=8, new_tokens=4), Workload(rows=2, prompt=8, new_tokens=4)
    staged = by_name(step_work(SPEC, split, w, decode_phase(w, split)))
    part = by_name(step_work(SPEC, alone, half, decode_phase(half, alone)))
    for name in ("qkv", "attend", "attention out", "router", "experts", "norms"):  # one of two layers, 2 + 2 - 1 ticks of half of the tokens
        assert staged[name] == part[name]._replace(times=3), name
    assert staged["logits"] == by_name(step_work(SPEC, alone, w, decode_phase(w, alone)))["logits"]
    one = Workload(rows=1, prompt=8, new_tokens=4)  # a single token has nothing to be divided: two ticks
    assert by_name(step_work(SPEC, split, one, decode_phase(one, split)))["qkv"].times == 2
    read = Workload(rows=1, prompt=96, new_tokens=4, prefill_tokens=128)  # 128 have four runs of 32: two parts of 64, three of the runs not empty
    (phase,) = prefill_phases(read, split)
    step = by_name(step_work(SPEC, split, read, phase))
    assert (step["qkv"].times, step["qkv"].flops, step["experts"].flops) == (3, 2 * 64 * 64 * 128, 6 * 48 * 2 * 64 * 48)
    assert step["attend"].flops == 2 * (96 * 97 / 2 / 2) * 4 * 32
    together = by_name(step_work(SPEC, layout_of(SPEC, Split(stage=2, sequence=2)), read, phase))  # prompts that are divided pass whole
    assert (together["qkv"].times, together["qkv"].flops) == (2, 2 * 64 * 64 * 128)


def test_missed_experts_come_over_the_hosts_link():
    layout = layout_of(SPEC, Split(expert=2))
    some, none = Workload(rows=2, slots=1), Workload(rows=2)
    step = by_name(step_work(SPEC, layout, some, decode_phase(some, layout)))
    distinct = 8 * (1 - 0.75**2) / 2
    assert step["experts"].host_bytes == pytest.approx(distinct * 3 / 4 * 3 * 64 * 48 * 2)
    times = step_time(SPEC, MACHINE, layout, some, decode_phase(some, layout))
    assert times.host == pytest.approx(2 * step["experts"].host_bytes / MACHINE.hardware.host_link_bytes_per_s)
    assert step_time(SPEC, MACHINE, layout, none, decode_phase(none, layout)).host == 0


def test_prefill_goes_in_steps():
    w = Workload(rows=2, prompt=40, new_tokens=1, prefill_tokens=32)
    layout = layout_of(SPEC, Split())
    phases = prefill_phases(w, layout)  # 32 of a prompt, then 8 and its padding, as a run of its own leaves no room for the next
    assert [(p.tokens, p.steps, p.room) for p in phases] == [(20, 4, 32)] and sum(p.rows * p.steps for p in phases) == pytest.approx(2)
    a = SPEC.layers[0].attention
    assert sum(p.steps * p.attended(a, "needed")[0] for p in phases) == pytest.approx(2 * 40 * 41 / 2)
    assert sum(p.steps * p.attended(a, "needed")[1] for p in phases) == pytest.approx(2 * (32 + 40))
    assert phases[0].attended(a, "whole") == (32 * 128, 128)  # 41 positions and a run of 64 take a row of 128
    step = by_name(step_work(SPEC, layout, w, phases[0]))
    assert step["qkv"].flops == 2 * 32 * 64 * 128 and step["experts"].flops == 6 * 20 * 2 * 64 * 48  # padding has no experts


@pytest.mark.parametrize(
    ("rows", "prompt", "most", "steps"),
    [(128, 16, 512, {128: (32, 2048)}),  # eight prompts have 128 tokens, which is four runs of 32, each of which a prompt fills by half
     (128, 16, 32, {32: (128, 2048)}), (1, 16, 512, {32: (1, 16)}), (16, 64, 512, {512: (2, 1024)}),
     (2, 300, 512, {512: (1, 492), 128: (1, 108)}),  # 300 take 5 runs of 64 of the first step, and 192 of the second prompt 3
     (1, 600, 512, {512: (1, 512), 128: (1, 88)}), (9, 32, 512, {512: (1, 256), 32: (1, 32)})],
)  # fmt: skip
def test_steps_of_prompts_by_hand(rows, prompt, most, steps):
    assert prefill_steps(rows, prompt, most) == steps


@pytest.mark.parametrize(("rows", "prompt", "most"), [(13, 37, 512), (20, 16, 128), (5, 300, 512), (3, 1500, 1024), (7, 130, 128), (9, 1, 32)])
def test_steps_of_prompts_as_the_engine_packs_them(rows, prompt, most):
    engine = object.__new__(Engine)  # what packing looks at
    engine._parts, engine._own_rows, engine._shards, engine._prefill_tokens, engine.positions = 1, rows, 1, most, prompt + 16
    engine.model = SimpleNamespace(on=SimpleNamespace(mesh=None))
    found: dict[int, tuple[int, int]] = {}
    for tokens, batch, _ in engine._prefill_batches([SimpleNamespace(prompt_ids=[1] * prompt)] * rows):
        steps, taken = found.get(tokens, (0, 0))
        found[tokens] = steps + 1, taken + int((batch.segments >= 0).sum())
    assert prefill_steps(rows, prompt, most) == found


def test_totals_bound_each_other():
    w = Workload(rows=8, prompt=100, new_tokens=20, slots=2)
    for split in (Split(), Split(tensor=2), Split(data=2, expert=2)):
        layout = layout_of(SPEC, split)
        times = predict(SPEC, MACHINE, layout, w)
        for step in (times.decode, times.prefill_step):
            assert max(step.compute, step.memory) <= step.device <= step.compute + step.memory
            assert step.overlapped <= step.expected <= step.serial
            assert getattr(step, step.longest) == max(step.compute, step.memory, step.link, step.host, step.launch)
        assert times.tokens_per_s == pytest.approx(8 * 20 / (times.prefill + 20 * times.tpot))
        assert times.decode.launch == pytest.approx(1e-4 / DECODE_CHUNK)
        faster = dataclasses.replace(MACHINE, hardware=dataclasses.replace(MACHINE.hardware, hbm_bytes_per_s=1e13, bf16=1e16))
        assert predict(SPEC, faster, layout, w).tpot < times.tpot


def test_each_family_has_its_work():
    for config in CONFIGS.values():
        spec = ModelSpec.from_hf(config).with_precision("bfloat16")
        times = predict(spec, MACHINE, layout_of(spec, Split()), Workload(rows=2, prompt=16, new_tokens=2))
        assert 0 < times.tpot < times.prefill and times.decode.link == 0
        assert sum(n for _, n in kinds(spec)) == spec.n_layers


def test_a_compiled_body_counts_once():
    w, layout = Workload(rows=4, prompt=8, new_tokens=4), layout_of(SPEC, Split())
    phase = Phase("decode", 4, 1, 4, 9, 12)
    once, all_ = (by_name(step_work(SPEC, layout, w, phase, count)) for count in ("compiled", "whole"))
    assert once["qkv"].times == 1 and all_["qkv"].times == 2 and 4 * once["attend"].flops == all_["attend"].flops
    copies = step_work(SPEC, layout, w, phase, "compiled", temporaries=5).ops[-1]
    assert (copies.name, copies.nbytes) == ("temporaries", 10)


@pytest.mark.parametrize(
    ("split", "rows"),
    [(Split(), 4 * 2), (Split(expert=2, attention="tensor"), 4 * 2), (Split(expert=2, exchange="gather"), 2 * 2 * 2), (Split(expert=2), 2 * 2 * 2)],
)  # fmt: skip
def test_a_kernel_tells_the_compiler_of_every_row(split, rows):
    w, layout = Workload(rows=4, prompt=8, new_tokens=4), layout_of(SPEC, split)
    told = by_name(step_work(SPEC, layout, w, decode_phase(w, layout), "compiled"))["experts"]
    assert told.flops == 6 * rows * 64 * 48
