"""Plans proved by the real compilers of TPUs and H100s: that they fit, what bytes they take, and which collectives they have."""

import dataclasses

import jax
import pytest

from jaxmoe.engine import prove as module
from jaxmoe.engine.prove import NotProved, Program, Proved, prove, target_of
from jaxmoe.spec.published import published
from jaxmoe.spec.types import Segment
from sharding.hardware import parse_hardware
from sharding.memory import device_bytes
from sharding.plan import Plan, planned_spec
from sharding.split import layout_of, parse_split
from sharding.time_model import predict
from sharding.workload import Workload

WORK = Workload(rows=8, prompt=200, new_tokens=56, prefill_tokens=128)


@pytest.fixture(scope="module")
def spec():
    """Published, with four layers."""
    found = published("olmoe_1b_7b").with_precision("bfloat16")
    (segment,) = found.segments
    return dataclasses.replace(found, segments=(Segment(segment.pattern, 4, 0),), extra_heads=())


def plan(spec, hardware: str, split: str, work: Workload = WORK) -> Plan:
    machine, own, chosen = parse_hardware(hardware), planned_spec(spec, work), parse_split(split)
    layout = layout_of(own, chosen)
    nbytes = device_bytes(own, layout, work, "tpu" if machine.torus else "gpu").to_json()
    return Plan("small", own.hash(), machine, chosen, work, "latency", nbytes, predict(own, machine, layout, work))


def test_targets(spec):
    assert target_of(plan(spec, "v5e:2x2", "expert=2")) == "v5e:2x2"
    assert target_of(plan(spec, "h100:8", "expert=2")) == "h100:2", "as many as the split takes"
    for other in ("a100", "l4", "h200"):
        with pytest.raises(NotProved, match=f"hardware = {other}.*plan for one of those"):
            prove(plan(spec, other, "data=1"), spec)


def test_peaks():
    small, large = (Program(argument, 20, 30, 25, 7, 1.0, None, {}) for argument in (100, 200))
    assert (small.peak, Proved(large, small).peak) == (125, 225)


def test_a_machine_without_the_compiler_is_one_line(spec, monkeypatch):
    def missing(target):
        raise module.compile_only.MissingCompiler(f"no compiler for {target!r} here")

    monkeypatch.setattr(module.compile_only, "devices", missing)
    with pytest.raises(NotProved, match=r"^no compiler for 'v5e:2x2' here$"):
        prove(plan(spec, "v5e:2x2", "expert=2"), spec)


def test_what_the_compiler_says_is_one_line():
    def refuses():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large\n  by far")

    with pytest.raises(NotProved) as refused:
        module._refused(refuses, "v5e:2x2")
    assert str(refused.value) == "the compiler for v5e:2x2 refuses the program: RESOURCE_EXHAUSTED: too large by far"


def check_program(program, spec, made, backend: str, phase: str, kinds: set[str]) -> None:
    """It fits, in the bytes that were predicted, with no kind of collective but the split's own."""
    predicted = device_bytes(planned_spec(spec, WORK), layout_of(spec, made.split), WORK, backend, phase=phase)
    assert program.peak == pytest.approx(predicted.total, rel=0.05), phase
    assert program.alias >= predicted.kv and program.host == 0
    assert {kind.removeprefix("ragged-") for kind in program.collectives} == kinds, phase
    assert program.peak < made.machine.hardware.usable_bytes


@pytest.mark.compile_only
def test_a_plan_is_proved(spec):
    """Both of its steps."""
    made, said = plan(spec, "v5e:2x2", "expert=2,tensor=2,attention=tensor"), []
    found = prove(made, spec, said.append)
    assert said == [f"compiling the {phase} step for v5e:2x2" for phase in ("prefill", "decode")]
    for phase in ("prefill", "decode"):
        program = getattr(found, phase)
        check_program(program, spec, made, "tpu", phase, {"all-reduce", "all-gather"})
        assert program.optimal_seconds is None or 0 < program.optimal_seconds < 0.1
    assert found.peak == max(found.prefill.peak, found.decode.peak)


@pytest.mark.compile_only
def test_a_step_of_two_gpus_is_proved(spec):
    made = plan(spec, "h100:2", "expert=2")
    program = module.compile_step(module.target_of(made), planned_spec(spec, WORK), made.split, WORK, "decode")
    check_program(program, spec, made, "gpu", "decode", {"all-to-all"})
    assert program.optimal_seconds is None, "XLA has no estimate for GPUs"
