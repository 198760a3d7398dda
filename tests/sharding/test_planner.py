"""The search: as brute force finds it, within memory and limits; and what it says where there is nothing."""

import dataclasses

import pytest

from jaxmoe.spec import ModelSpec
from jaxmoe.spec.published import published
from sharding import memory
from sharding.choices import MOST_ROWS, Search, Slo, arms, layouts, score, splits
from sharding.fitting import DoesNotFit, Fits
from sharding.hardware import Machine, parse_hardware
from sharding.phase_split import handoff_seconds, prefill_rate, queueing, split_phases
from sharding.planner import Candidate, MissesSlo, search_plan, slower
from sharding.split import Split, SplitError
from sharding.time_model import StepTime, Times, predict
from sharding.workload import Workload
from tests.models import CONFIGS
from tests.sharding.fake_bytes import device_bytes

SPEC = ModelSpec.from_hf({**CONFIGS["olmoe"], "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}).with_precision("bfloat16")
DENSE = device_bytes(SPEC, layouts(SPEC, parse_hardware("h100"), Search())[0][0], Workload(), "gpu")


def machine(devices: int, usable: int) -> Machine:
    found = parse_hardware(f"h100:{devices}")
    return dataclasses.replace(found, hardware=found.hardware.with_memory(usable))


def brute(spec, machine, workload, search):
    """Every layout, way of keeping experts and batch size that fits and keeps the limits, by its score; resident ones first."""
    for streamed in (False, True):
        found = []
        for layout in layouts(spec, machine, search)[0]:
            own = 8 // layout.size(layout.experts)
            for rows in arms(spec, [layout], workload, search)[0].rows if arms(spec, [layout], workload, search) else ():
                for slots in range(min(2, own), own) if streamed else (None,):
                    asked = dataclasses.replace(workload, rows=rows, slots=slots)
                    need = device_bytes(spec, layout, asked, machine.hardware.backend)
                    times = predict(spec, machine, layout, asked)
                    if need.total <= machine.hardware.usable_bytes and search.slo.missed(times) is None:
                        found.append(score(search.objective, machine, layout.split, asked, times))
        if found:
            return min(found)
    return None


@pytest.mark.parametrize("objective", ["latency", "throughput", "cost"])
@pytest.mark.parametrize(("devices", "room"), [(4, 10.0), (4, 0.5), (2, 0.4), (1, 0.5)])
@pytest.mark.parametrize("slo", [Slo(), Slo(tpot=8e-5)])
def test_the_best_is_that_of_brute_force(objective, devices, room, slo):
    at = machine(devices, int(DENSE.total * room))
    search = Search(objective, slo, any_rows=objective != "latency")
    want = brute(SPEC, at, Workload(rows=4), search)
    try:
        found = search_plan(SPEC, at, Workload(rows=4), search, device_bytes)
    except (DoesNotFit, MissesSlo):
        assert want is None
        return
    assert found.best.score == pytest.approx(want)
    assert found.best.nbytes.total <= at.hardware.usable_bytes and slo.missed(found.best.times) is None
    scores = [c.score for c in (found.best, *found.runners_up)]
    assert scores == sorted(scores) and all(c.nbytes.total <= at.hardware.usable_bytes for c in found.runners_up)
    assert len({lost.split for lost in found.lost}) == len(found.lost) and found.best.split not in {lost.split for lost in found.lost}


def test_a_price_scales_the_cost():
    at = machine(2, 10**9)
    times = predict(SPEC, at, layouts(SPEC, at, Search())[0][0], Workload())
    assert score("cost", at, Split(data=2), Workload(), times) == pytest.approx(2 / times.tokens_per_s)
    priced = dataclasses.replace(at, hardware=dataclasses.replace(at.hardware, price=7.2))
    assert score("cost", priced, Split(data=2), Workload(), times) == pytest.approx(2 * 0.002 / times.tokens_per_s)
    assert score("latency", at, Split(), Workload(new_tokens=4), times) == pytest.approx(times.prefill / 4 + times.tpot)


def test_why_another_is_behind():
    at = machine(4, 10**9)
    step = StepTime(compute=1.0, memory=2.0, device=2.0, link=0.0, host=0.0, launch=0.0)
    nothing = StepTime(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    def candidate(split, decode, score):
        layout = layouts(SPEC, at, Search(split=split))[0][0]
        return Candidate(layout, Workload(rows=2), Times(1.0, 1.0, 1.0, 1.0, decode, nothing), score)

    best = candidate(Split(), step, 1.0)
    wider = candidate(Split(data=2), dataclasses.replace(step, compute=0.9, memory=1.2, link=0.3), 1.04)
    assert slower(wider, best) == "4 % more: decoding takes more link"
    # Two devices: 1.8, 2.4 and 0.6 device-seconds in the place of 1, 2 and 0
    assert slower(wider, best, "cost") == "4 % more: decoding takes more compute"
    assert slower(dataclasses.replace(wider, score=1.5), best).startswith("1.5 times as much: ")
    assert slower(dataclasses.replace(wider, score=1.0), best) == "as good, with more devices or axes"


def test_every_split_is_tried_once():
    found = list(splits(4, Search(), SPEC))
    assert len(set(found)) == len(found) and {s.devices for s in found} == {1, 2, 4}
    # 5 axes, 1 + 5 + 15 shapes; where experts are divided (1 + 1 + 4 of 2, ... by hand: 6 shapes), four exchanges and one sum stand for one
    shapes = {s.shape for s in found}
    divided = [s for s in shapes if s[2] > 1]
    assert len(shapes) == 1 + 5 + 15 and len(found) == len(shapes) + 4 * len(divided)
    assert list(splits(4, Search(split=Split(data=2)), SPEC)) == [Split(data=2)]
    assert {s.attention for s in splits(2, Search(attention=("tensor",)), SPEC) if s.expert > 1} == {"tensor"}
    assert {s.shape for s in splits(2, Search(axes=("data",)), SPEC)} == {(1, 1, 1, 1, 1), (1, 2, 1, 1, 1)}
    with pytest.raises(ValueError, match="axes = 'width'"):
        Search(axes=("width",))


def test_what_does_not_fit_says_what_would():
    at = machine(1, int(DENSE.total * 0.4))
    says = r"does not fit: the least, data=1 with 1 sequence, needs .* a device \(experts .*too much; what would fit: "
    with pytest.raises(DoesNotFit, match=says) as error:
        search_plan(SPEC, at, Workload(), Search(resident=True), device_bytes)
    assert [change.text.split()[0] for change in error.value.changes] == ["--slots", "--hardware"]
    for change in error.value.changes:  # each of them does, alone
        assert search_plan(SPEC, change.machine, change.workload, Search(resident=True), device_bytes).best
    assert error.value.changes[0].workload.slots == 2  # a half of the experts would be too many


def test_long_prompts_and_many_sequences_are_named():
    at = machine(1, int(DENSE.total * 1.2))
    many = Workload(rows=128, prompt=2048, kv_dtype="float32")
    with pytest.raises(DoesNotFit) as error:
        search_plan(SPEC, at, many, Search(), device_bytes)
    texts = {change.text.split()[0]: change for change in error.value.changes}
    rows = texts["--rows"].workload.rows
    assert search_plan(SPEC, at, dataclasses.replace(many, rows=rows), Search(), device_bytes).best.workload.rows == rows
    with pytest.raises(DoesNotFit):
        search_plan(SPEC, at, dataclasses.replace(many, rows=2 * rows), Search(), device_bytes)


def test_host_memory_is_counted_too():
    at = machine(2, int(DENSE.total * 0.4))
    at = dataclasses.replace(at, hardware=dataclasses.replace(at.hardware, host_memory_bytes=1000))
    with pytest.raises(DoesNotFit, match="host memory"):
        search_plan(SPEC, at, Workload(rows=2, slots=2), Search(split=Split(expert=2)), device_bytes)


def test_a_much_larger_machine_is_found():
    """A trillion parameters on sixteen small devices: the first machine that holds them, where few of thousands of splits do."""
    spec = dataclasses.replace(published("kimi_k2_instruct").with_precision("bfloat16"), extra_heads=())
    search = Search(resident=True)
    with pytest.raises(DoesNotFit, match="what would fit: --hardware v5e:16x16$"):
        search_plan(spec, parse_hardware("v5e:4x4"), Workload(rows=16), search, memory.device_bytes)


def test_a_host_holds_only_its_own_devices_experts():
    split, work = Split(expert=2), Workload(rows=2, slots=2)
    layout = layouts(SPEC, machine(2, 10**9), Search(split=split))[0][0]
    need = device_bytes(SPEC, layout, work, "gpu")
    for text, hosts in (("h100:2x1", 1), ("h100:2", 2)):
        found = parse_hardware(text)
        found = dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, host_memory_bytes=1000))
        assert Fits(SPEC, found, device_bytes).over(layout, work) == (need.host_store * hosts - 1000, "host memory")


def test_limits_that_cannot_be_kept():
    with pytest.raises(MissesSlo, match="closest is .* whose tpot of .* ms is above 1e-06 ms, most of it"):
        search_plan(SPEC, machine(2, 10**9), Workload(), Search(slo=Slo(tpot=1e-9)), device_bytes)
    many = Workload(rows=64)
    best = search_plan(SPEC, machine(1, 10**9), Workload(rows=8), Search(), device_bytes).best
    with pytest.raises(MissesSlo, match="what would keep them: --rows (16|8), or --hardware h100:"):
        search_plan(SPEC, machine(1, 10**9), many, Search(slo=Slo(tpot=best.times.tpot)), device_bytes)
    with pytest.raises(ValueError, match="slo.ttft = 0"):
        Slo(ttft=0)
    assert Slo(ttft=1.0).excess(predict(SPEC, machine(1, 10**9), layouts(SPEC, machine(1, 10**9), Search())[0][0], Workload())) < 1


def test_a_split_alone():
    found = search_plan(SPEC, machine(4, 10**10), Workload(rows=2), Search(split=Split(tensor=2)), device_bytes)
    assert found.best.split == Split(tensor=2) and found.runners_up == () and found.worse == 0
    for split, says in ((Split(tensor=8), "takes 8 devices, h100:4 has 4"), (Split(tensor=3), "tensor = 3 doesn't divide")):
        with pytest.raises(SplitError, match=says):
            search_plan(SPEC, machine(4, 10**10), Workload(rows=2), Search(split=split), device_bytes)
    with pytest.raises(SplitError, match="rows = 1 don't divide among 2 groups"):
        search_plan(SPEC, machine(4, 10**10), Workload(rows=1), Search(split=Split(data=2)), device_bytes)
    with pytest.raises(ValueError, match="any_rows with objective = 'latency'"):
        Search(any_rows=True)
    with pytest.raises(ValueError, match="objective = 'speed'"):
        Search(objective="speed")


WEIGHTS = Search(split=Split(expert=2, exchange="weights"))


@pytest.mark.parametrize(
    ("workload", "search", "says"),
    [(Workload(rows=2, slots=2), WEIGHTS, "exchange = 'weights' .* choose another"), (Workload(slots=1), Search(), "slots = 1: olmoe needs 2 to 8"),
     (Workload(slots=9), Search(), "slots = 9: olmoe needs 2 to 8"), (Workload(rows=1024), Search(), "at most 128 in each group"),
     (Workload(rows=256), Search(split=Split(tensor=2)), "rows = 256: at most 128 in each group"),
     (Workload(rows=10**6 + 1), Search(axes=("data",), split=Split(data=2)), "2 groups")],
)  # fmt: skip
def test_what_the_engine_refuses_is_not_planned(workload, search, says):
    with pytest.raises(ValueError, match=says):
        search_plan(SPEC, machine(4, 10**10), workload, search, device_bytes)


def test_arms_are_what_the_engine_runs():
    at = machine(4, 10**10)
    good = layouts(SPEC, at, Search())[0]
    for streamed, workload in ((True, Workload(rows=128)), (False, Workload(rows=256, slots=4))):
        found = arms(SPEC, good, workload, Search(), streamed)
        assert found and all(workload.rows // arm.layout.shards <= 128 for arm in found)
        for arm in found:
            split = arm.layout.split
            assert not (split.expert > 1 and split.attention == "data" and split.exchange == "weights")
            assert all(2 <= slots <= 8 // split.expert for slots in arm.slots)
    assert any(arm.layout.split.exchange == "weights" for arm in arms(SPEC, good, Workload(rows=4), Search()))


def test_a_search_asks_for_few_bytes():
    asked = []
    search_plan(SPEC, machine(8, 10**10), Workload(rows=8), Search(), lambda *args: asked.append(1) or device_bytes(*args))
    assert len(asked) < 20 < len(layouts(SPEC, machine(8, 10**10), Search())[0])


def test_most_rows_are_found_by_halving():
    at = machine(1, int(DENSE.total * 1.2))
    fits, layout = Fits(SPEC, at, device_bytes), layouts(SPEC, at, Search())[0][0]
    rows = tuple(range(1, 400))
    want = max(n for n in rows if device_bytes(SPEC, layout, Workload(rows=n, prompt=64), "gpu").total <= at.hardware.usable_bytes)
    assert fits.most(layout, [Workload(rows=n, prompt=64) for n in rows]).rows == want and 1 < want < 399
    assert fits.most(layout, [Workload(prompt=10**7)]) is None
    assert [name for name, _ in fits.need(layout, Workload()).items] == ["experts", "weights", "kv"]


# --- Phases


def test_a_queue_leaves_at_its_limit():
    rate = prefill_rate(0.1, 0.25)
    assert queueing(0.1, rate) == pytest.approx(0.25) and prefill_rate(0.1, 0.1) == 0.0 and prefill_rate(0.1, float("inf")) == pytest.approx(10)
    assert queueing(0.1, 10.0) == float("inf")


def test_phases_share_the_devices():
    at = machine(4, 10**10)
    search = Search(slo=Slo(ttft=1.0, tpot=0.1))
    found = split_phases(SPEC, at, Workload(prompt=2000, new_tokens=50), search, device_bytes)
    assert found.together.devices <= 4 and found.prefill.devices + found.decode.devices <= 4
    assert found.rate == pytest.approx(min(found.prefill.rate, found.decode.rate)) and found.separate == (found.rate > found.together.rate)
    assert found.decode.rows <= MOST_ROWS * 4 and found.handoff == pytest.approx(handoff_seconds(SPEC, at, Workload(prompt=2000), 1), rel=0.8)
    none = split_phases(SPEC, at, Workload(prompt=2000), Search(slo=Slo(ttft=1e-9)), device_bytes)
    assert none.together is None and none.prefill is None and not none.separate
