"""Plans as tables and plots: what stands in them, and that a plot needs matplotlib and a name that says what it is."""

import builtins
import dataclasses

import pytest
from rich.console import Console

from jaxmoe.engine.prove import Program, Proved
from jaxmoe.report import plan_tables as tables
from jaxmoe.spec import ModelSpec
from sharding.choices import Search
from sharding.hardware import parse_hardware
from sharding.phase_split import PhaseSplit, Pool
from sharding.plan import Plan
from sharding.planner import search_plan
from sharding.split import Split
from sharding.workload import Workload
from tests.models import CONFIGS
from tests.sharding.fake_bytes import device_bytes

SPEC = ModelSpec.from_hf(CONFIGS["olmoe"]).with_precision("bfloat16")
FOUND = search_plan(SPEC, parse_hardware("h100:2"), Workload(rows=2), Search(), device_bytes)


def plan() -> Plan:
    best = FOUND.best
    return Plan(
        "small", SPEC.hash(), parse_hardware("h100:2"), best.split, best.workload, "latency",
        {"weights": 3 * 10**9, "experts": 10**9, "kv": 0, "host_store": 5 * 10**9, "total": 4 * 10**9}, best.times,
    )  # fmt: skip


def text(*what) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))
    for part in what:
        console.print(part) if not callable(part) else part(console)
    return console.export_text()


def test_a_plan_is_shown_whole():
    shown = text(lambda console: tables.show(console, plan(), FOUND))
    assert "small on h100:2" in shown and "2 sequences of 512 + 128 tokens" in shown and "all experts resident" in shown
    assert [" ".join(line.split()) for line in shown.splitlines() if "GB" in line and "the best" not in line] == [
        "weights 3.00 GB 75.0", "experts 1.00 GB 25.0", "in all 4.00 GB 100", "a program can have 63.71 GB 1593", "host_store, outside 5.00 GB",
    ]  # fmt: skip
    assert f"{plan().times.decode.memory * 1e3:.3f}" in shown and str(FOUND.lost[0].split) in shown and FOUND.lost[0].reason in shown


def test_a_sweep_shows_plans_and_why_there_are_none():
    rows = [tables.sweep_row(1, plan()), {"at": 2, "error": "does not fit"}]
    shown = text(tables.sweep_table(rows))
    assert "4.00" in shown and "does not fit" in shown and str(plan().split) in shown
    assert rows[0]["tokens_per_s"] == plan().times.tokens_per_s


def test_phases_and_proofs():
    pool = Pool(2, Split(tensor=2), 16, 3.5)
    shown = text(tables.phases_table(PhaseSplit(None, pool, pool, 0.1, 3.5)))
    assert "none keeps the limits" in shown and "tensor=2" in shown and "3.5" in shown
    prefill = Program(10**9, 10**9, 0, 0, 0, 2.0, None, {"all-reduce": 3})
    proved = Proved(prefill, dataclasses.replace(prefill, temp=0))
    shown = text(tables.proved_table(plan(), proved))
    assert "+100.0" in shown and "all-reduce" in shown
    decode = dataclasses.replace(prefill, optimal_seconds=0.25)
    shown = text(tables.proved_table(plan(), Proved(prefill, decode), 0.5))
    assert shown.count("+100.0") == 2 and "250.000 ms" in shown


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_a_sweep_is_drawn(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tables.plot_sweep([tables.sweep_row(1, plan()), {"at": 2, "error": "no"}, tables.sweep_row(4, plan())], "rows", tmp_path / f"p{ending}")
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        tables.plot_sweep([{"at": 2, "error": "no"}], "rows", path)


def test_a_plot_that_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ends in .png or .svg"):
        tables.check_plot(tmp_path / "p.txt")
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"jaxmoe\[plot\]"):
        tables.check_plot(tmp_path / "p.png")
