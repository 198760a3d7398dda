"""Serving in virtual time: what each comparison must show, on drawn routing small enough to check every read. About 7 seconds."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmoe.offload.trace import DECODE, Trace
from jaxmoe.report import record
from jaxmoe.report.serve_compare import Setup, goodput, grouping, offline, preemption, prefill
from jaxmoe.report.serve_load import Sizes
from jaxmoe.report.serve_routing import drawn, recorded
from jaxmoe.report.serve_virtual import COMPARISONS, ratios, virtual_records

ROUTED = drawn(layers=4, experts=32, active=4, tokens=64, reuse=0.6, expert_bytes=12_000_000)
HALF, QUARTER = Setup(ROUTED, 0.5, verify=True), Setup(ROUTED, 0.25, verify=True)


def by_arm(found):
    assert len({f.arm for f in found}) == len(found)
    return {f.arm: f for f in found}


def test_layers_by_groups_bring_experts_once_and_chunks_every_time():
    found = by_arm(prefill(HALF, prompt=1024, streams=4, groups=(4, 8), chunks=(128,)))
    assert list(found) == ["whole", "chunked, 128", "layered, 4"], "8 groups are more than there are layers"
    whole, small, layered = found["whole"], found["chunked, 128"], found["layered, 4"]
    assert layered.counts["prompt_loads"] <= 1.05 * whole.counts["prompt_loads"] <= 1.05 * whole.counts["prompt_asked"]
    assert small.counts["prompt_loads"] >= 6 * layered.counts["prompt_loads"]
    assert all(f.counts["stalls"] == 0 for f in found.values())
    assert len({f.counts["answers"] for f in found.values()}) == 1
    assert layered.seconds["ttft"] < 0.5 * small.seconds["ttft"]
    assert layered.seconds["gap"] < 0.5 * min(small.seconds["gap"], whole.seconds["gap"])
    assert all(f.seconds["gap"] <= 1.15 * f.seconds["gap_bound"] for f in found.values())


def test_grouping_asks_for_fewer_experts_and_gives_the_same_answers():
    found = by_arm(grouping(QUARTER, requests=16, new=16))
    assert len({f.counts["answers"] for f in found.values()}) == 1
    assert len({f.counts["decoded"] for f in found.values()}) == 1
    assert found["greedy"].counts["distinct"] < 0.85 * found["arrival"].counts["distinct"]
    assert found["arrival"].counts["distinct"] < found["one at a time"].counts["distinct"]
    assert found["greedy"].counts["waited"] <= 16 and found["arrival"].counts["waited"] == 0
    assert all(f.seconds["per_token"] < found["one at a time"].seconds["per_token"] for f in found.values() if f.arm != "one at a time")


def test_swapping_resumes_sooner_than_computing_again():
    found = by_arm(preemption(QUARTER, requests=5, prompt=64, new=128))
    again, swap = found["recompute"], found["swap"]
    assert len({f.counts["answers"] for f in found.values()}) == 1
    assert again.counts["recomputed"] > 0 == again.counts["page_bytes"]
    assert swap.counts["swaps"] == swap.counts["preemptions"] > 0 == swap.counts["recomputed"]
    assert swap.counts["came_back"] == swap.counts["preemptions"] and swap.counts["page_bytes"] > 0
    assert swap.seconds["resume"] < 0.5 * again.seconds["resume"] and swap.seconds["total"] < again.seconds["total"]


def test_groups_of_prefixes_compute_each_prefix_once():
    found = by_arm(offline(QUARTER, requests=32, prompt=128, shared=96, group=4, new=8, slots=4, pages=24))
    assert len({f.counts["answers"] for f in found.values()}) == 1
    arrival, grouped = found["arrival"], found["prefix groups"]
    assert grouped.counts["computed"] == grouped.counts["unique"] == 8 * 96 + 32 * 32
    assert arrival.counts["computed"] > arrival.counts["unique"], "the cache of pages is too small for the order of arrival"
    assert grouped.counts["computed"] + grouped.counts["cached"] == 32 * 128
    assert grouped.counts["peak_pages"] <= arrival.counts["peak_pages"] <= 24
    assert grouped.seconds["total"] < arrival.seconds["total"]


def test_more_load_is_borne():
    sizes = {"inputs": Sizes(256, 0.5, 32, 512), "outputs": Sizes(16, 0.5, 4, 32)}
    setup = dataclasses.replace(QUARTER, verify=False)
    control, best = goodput(setup, requests=20, limits=(5.0, 4.0), rates=(0.25, 16.0, 0.5), **sizes)
    assert 0 < control.seconds["goodput_rate"] < best.seconds["goodput_rate"]
    assert max(control.seconds["violation"], best.seconds["violation"]) <= 0.1
    assert control.seconds["ttft_limit"] == best.seconds["ttft_limit"]


def test_numbers_repeat_and_do_not_depend_on_checking():
    once = preemption(QUARTER, requests=3, new=64)
    assert once == preemption(QUARTER, requests=3, new=64) == preemption(dataclasses.replace(QUARTER, verify=False), requests=3, new=64)


def test_records_are_complete_and_hold_ratios(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmoe.report.serve_virtual.LAYERS", 4)
    monkeypatch.setitem(COMPARISONS, "preemption", lambda setup: preemption(setup, requests=3, new=64))
    told: list[str] = []
    made = virtual_records({"tiny": trace()}, reuses=(0.5,), only=("preemption",), tell=told.append)
    assert told == ["tiny: preemption", "synthetic, reuse 0.5: preemption"] and len(made) == 6
    for i, one in enumerate(made):
        record.write_record(tmp_path / f"{i}.json", one)
    assert record.load_records(tmp_path) == json.loads(json.dumps(made))
    swap = made[2]
    assert swap["settings"]["arm"] == "swap" and swap["settings"]["clock"] == "virtual" and swap["settings"]["source"].startswith("recording of toy")
    assert swap["counters"]["resume / recompute"] == pytest.approx(swap["counters"]["resume"] / made[0]["counters"]["resume"])
    assert swap["bytes"]["page_bytes"] > 0 and 0 < swap["bound"]["percent"] <= 100
    with pytest.raises(ValueError, match="no comparison 'speed': choose from prefill, grouping"):
        virtual_records({}, only=("speed",))


def test_ratios_to_every_control():
    found = prefill(dataclasses.replace(HALF, verify=False), prompt=512, streams=2, groups=(4,), chunks=(256,))
    made = ratios("prefill", found)
    assert set(made["layered, 4"]) == {f"{name} / {c}" for c in ("whole", "chunked, 256") for name in ("ttft", "gap", "prompt_bytes")}
    assert made["whole"]["ttft / chunked, 256"] * made["chunked, 256"]["ttft / whole"] == pytest.approx(1)


# --- Routing


def trace(tokens: int = 40) -> Trace:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, 3, 8)), axis=2)[..., :2].astype(np.int16)
    ids[5, 2] = -1
    meta = {"model": "toy", "spec_hash": None, "layers": 3, "experts": 8, "active": 2, "expert_bytes": [100, 100, 130]}
    numbers = np.arange(tokens, dtype=np.int32)
    one = np.zeros(tokens, np.int32)
    return Trace(ids, np.full(ids.shape, 0.5, np.float16), one - 1, one, np.full(tokens, DECODE, np.uint8), numbers, meta)


def test_recordings_keep_their_tokens_in_order():
    found = recorded(trace(), "toy", topics=3)
    assert len(found.table) == 39 and found.expert_bytes == 110 and found.topics == ((0, 13), (13, 26), (26, 39))
    assert (found(np.asarray([4, 5])) == trace().ids[[4, 6]]).all()
    assert found.text(1, 15, 12) == (25, *range(13, 26), 13) and found.text(4, 2, 0) == (13, 14)
    with pytest.raises(ValueError, match="39 tokens can't be cut into 40"):
        recorded(trace(), "toy", topics=40)


@pytest.mark.parametrize("reuse", [0.3, 0.6, 0.9, 1.0])
def test_drawn_routing_has_the_reuse_that_was_asked_for(reuse):
    found = drawn(layers=4, experts=128, active=8, topics=2, tokens=64, reuse=reuse, seed=1)
    assert found.reuse == pytest.approx(reuse, abs=0.05)
    assert all(len(set(row)) == 8 for row in found.table.reshape(-1, 8).tolist())
    assert (drawn(layers=4, experts=128, active=8, tokens=64, reuse=reuse, seed=1).table == found.table).all()


def test_drawn_routing_without_reuse_is_chance():
    assert drawn(layers=4, experts=128, active=8, tokens=128, reuse=0.0).reuse == pytest.approx(8 / 128, abs=0.005)
    for bad in ({"reuse": 1.5}, {"topics": 17}):
        with pytest.raises(ValueError, match="give 0 to 1, and enough experts"):
            drawn(**bad)
