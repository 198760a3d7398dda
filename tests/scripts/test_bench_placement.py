"""The benchmark of placements: on the traces that come with the tests, what a placement is made from half of the tokens holds on the other half."""

import json

import numpy as np
import pytest

from jaxmoe.offload.trace import save
from jaxmoe.report import placement_bench, record
from sharding.placement import baselines, judge, solve
from tests.offload import traces
from tests.scripts import commands

bench = commands.load("bench_placement")


def test_records_and_tables(tmp_path):
    trace, path = traces.random_trace(1, prompt=20, layers=3, experts=6, active=2), tmp_path / "t.npz"
    save(path, trace)
    done = commands.call(bench, path, "--devices", 2, 3, "--seconds", 0.2, "--out", tmp_path)
    assert done.code == 0 and "peak load: of the" in done.out and "eplb, 3 copies" in done.out, done.err
    (made,) = record.load_records(tmp_path)
    assert made == json.loads((tmp_path / "placement-random.json").read_text()) and made["name"] == "placement"
    rows = made["counters"]["rows"]
    assert {(row["devices"], row["judged"]) for row in rows} == {(n, half) for n in (2, 3) for half in ("first", "second")}
    assert len(rows) == 4 * (2 + len(placement_bench.ARMS) + 1)
    row = next(row for row in rows if (row["devices"], row["judged"], row["method"]) == (3, "second", "contiguous"))
    found = baselines(trace.ids[len(trace.ids) // 2 :], 6, 3)["contiguous"]
    assert row["max_over_mean"] == pytest.approx(found["max_over_mean"], abs=1e-5) and row["hops"] == pytest.approx(found["hops"], abs=1e-5)
    assert all(stage["bound"] <= stage["value"] + 1e-3 for row in rows for stage in row["stages"])
    assert 0 < made["bound"]["achieved"] <= made["bound"]["ceiling"] <= 1
    best = [row for row in rows if row["method"] == "exflow"]
    assert made["bound"]["achieved"] == pytest.approx(1 - best[0]["stages"][0]["value"] / placement_bench._pairs(trace.ids[: len(trace.ids) // 2]))


def test_wrong_arguments_are_one_line(tmp_path):
    done = commands.call(bench, "--out", tmp_path / "none")
    assert done.code == 2 and "there is no such folder" in done.err and done.err.count("\n") == 1
    done = commands.call(bench, "--devices", 7)
    assert done.code == 2 and "devices = 7 doesn't divide the model's 128 experts" in done.err
    with pytest.raises(ValueError, match="one token has no halves"):
        placement_bench.halves(np.zeros((1, 2, 1), int))


@pytest.mark.parametrize("name", [traces.QWEN, traces.GEMMA])
def test_even_loads_and_fewer_hops_hold_on_the_other_half(name):
    trace = traces.real(name)
    earlier, later = placement_bench.halves(trace.ids)
    for fit, on in ((earlier, later), (later, earlier)):
        placement, report = solve(fit, trace.experts, 8, "combined", seconds=0.5)
        found, base = judge(placement, on), baselines(on, trace.experts, 8, seeds=range(3))
        assert all(found[key] < one[key] for one in base.values() for key in ("max_over_mean", "hops", "devices"))
        assert report.stages[0].gap == 0 and 0 < report.stages[1].gap < 0.5
