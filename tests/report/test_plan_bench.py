"""Plans' predictions beside compilers: that predictions compile nothing, and that a record is read as it was written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.engine.prove import optimal_seconds
from jaxmoe.report import plan_bench
from jaxmoe.report.plan_bench import Case, Compiled, Row
from sharding.memory import Bytes
from sharding.split import layout_of, parse_split
from sharding.workload import Workload


def row(predicted: int = 110, optimal: float | None = 2.0, seconds: float = 1.0) -> Row:
    compiled = Compiled(argument=80, output=30, alias=20, temp=10, host=7, optimal=optimal, seconds=3.0)
    return Row(Case("olmoe_1b_7b", "v5e:2x2", "expert=4", "decode", Workload(rows=8)), Bytes(predicted, 0, 0), seconds, compiled)


def test_while_nothing_may_compile_whatever_does_fails():
    with plan_bench.no_compiler():
        with pytest.raises(AssertionError, match="asked XLA to compile"):
            jax.jit(lambda x: x + 1.5).lower(jnp.float32(1)).compile()
        with pytest.raises(AssertionError, match="asked XLA to compile"):
            jax.jit(lambda x: x * 3.25)(1.0)
    assert jax.jit(lambda x: x * 3.25)(1.0) == 3.25


def test_cases_are_many_apart_and_possible():
    cases = plan_bench.cases()
    assert len(cases) >= 34 and len({case.name for case in cases}) == len(cases)
    assert {case.target.split(":")[0] for case in cases} == {"v5e", "v5p", "v6e", "tpu7x", "h100"}
    assert max(parse_split(case.split).devices for case in cases) == 256
    assert {case.phase for case in cases} == {"prefill", "decode"} and any(case.workload.slots for case in cases)


@pytest.mark.parametrize("name", ["deepseek_v3-v5p_8x8x4-expert256-decode", "qwen3_30b_a3b-h100-alone-decode-slots32"])
def test_a_prediction_compiles_nothing_and_fits(name):
    case = next(case for case in plan_bench.cases() if case.name == name)
    found, seconds = plan_bench.predict(case)
    machine = plan_bench.machine(case)
    assert 0.1 * machine.hardware.usable_bytes < found.total < machine.hardware.usable_bytes
    assert 0 < seconds < 1
    spec = plan_bench.read_model(case.model)
    assert layout_of(spec, parse_split(case.split)).split.devices <= machine.devices


def test_error_is_of_arguments_temporaries_and_results_that_reuse_nothing():
    assert row().compiled.total == 100
    assert row(110).error == pytest.approx(0.1) and row(95).error == pytest.approx(-0.05)


def test_operations_without_an_estimate_are_taken_out():
    assert optimal_seconds({"optimal_seconds": -2.75}) == pytest.approx(0.25)
    assert optimal_seconds([{"optimal_seconds": 0.125}]) == 0.125
    assert optimal_seconds({}) is None and optimal_seconds(None) is None


def test_rank_correlation_is_of_those_that_have_a_time():
    rows = [row(seconds=s, optimal=o) for s, o in [(1.0, 10.0), (2.0, 20.0), (3.0, 15.0), (9.0, None)]]
    assert plan_bench.rank_correlation(rows) == pytest.approx(0.5)
    assert plan_bench.rank_correlation(rows[:2]) is None


def test_a_record_is_read_as_it_was_written(tmp_path):
    case = row().case
    assert plan_bench.read(case, tmp_path) is None
    path = plan_bench.write(row(), tmp_path)
    found = plan_bench.read(case, tmp_path)
    assert found is not None and found.compiled == row().compiled and found.case == case
    assert (found.predicted, found.seconds) == plan_bench.predict(case), "predictions are made anew"
    data = json.loads(path.read_text())
    assert data["bytes"]["total"] == 100 and data["settings"]["predicted"]["weights"] == 110
    assert dataclasses.asdict(case.workload) == data["settings"]["workload"]


def test_a_new_prediction_leaves_what_was_compiled(tmp_path):
    path = plan_bench.write(row(), tmp_path)
    before = json.loads(path.read_text())
    plan_bench.predict_again(dataclasses.replace(row(90), seconds=7.0), tmp_path)
    data = json.loads(path.read_text())
    assert (data["settings"]["predicted"]["weights"], data["settings"]["predicted_seconds"]) == (90, 7.0)
    assert data["counters"]["error_percent"] == pytest.approx(-10) and data["settings"]["optimal_seconds"] == 2.0
    for changed in (data, before):
        del changed["counters"], changed["settings"]
    assert data == before


def test_cases_that_nothing_was_fitted_to_are_known():
    held = [case for case in plan_bench.cases() if case.held_out]
    assert len(held) == sum(len(case[3]) for case in plan_bench.HELD_OUT) and len(held) + 45 == len(plan_bench.cases())
    assert not {case.name for case in held} & {case.name for case in plan_bench.cases() if not case.held_out}
