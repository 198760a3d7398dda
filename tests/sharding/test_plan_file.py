"""Plans in files: there and back, and every field that can be wrong by its name."""

import copy
import json

import pytest

from jaxmoe.spec import ModelSpec
from sharding.hardware import parse_hardware
from sharding.plan import Plan, PlanError, load_plan, plan_from_json, planned_spec, save_plan
from sharding.split import Split, layout_of
from sharding.time_model import predict
from sharding.workload import Workload
from tests.models import CONFIGS

SPEC = ModelSpec.from_hf(CONFIGS["olmoe"])
WORK = Workload(rows=4, slots=2)


def plan(text: str = "v5e:2x4") -> Plan:
    split = Split(data=2, tensor=2)
    machine, spec = parse_hardware(text), planned_spec(SPEC, WORK)
    times = predict(spec, machine, layout_of(spec, split), WORK)
    return Plan("olmoe", spec.hash(), machine, split, WORK, "cost", {"weights": 7, "total": 7}, times, "jaxmoe 0")


@pytest.mark.parametrize("text", ["v5e:2x4", "h100:2x2", "tpu7x:2x2x1"])
def test_there_and_back(tmp_path, text):
    made = plan(text)
    save_plan(tmp_path / "plan.json", made)
    assert load_plan(tmp_path / "plan.json") == made
    made.check_model(planned_spec(SPEC, WORK).hash())
    with pytest.raises(PlanError, match=r"the plan is for olmoe \(spec .*plan it anew"):
        made.check_model("another")


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        ("format", "x", "not a plan: format = 'x'"), ("version", 2, "plan.version = 2"), ("model", 3, "plan.model = 3"),
        ("colour", 1, "plan.colour is not known"),
        ("made_by", None, "plan.made_by is missing"), ("objective", "speed", "plan.objective = 'speed'"), ("topology", [2.5, 4], "plan.topology"),
        ("topology", [2, 4, 1], "v5e needs 2 numbers"), ("split.data", 0, "data = 0"), ("split.colour", 1, "split.colour is not known"),
        ("split.data", 64, "takes 128 devices, plan.machine has 8"), ("workload.rows", "4", "rows = '4'"), ("workload.colour", 1, "workload.colour"),
        ("nbytes.weights", -1, "plan.nbytes.weights = -1"), ("nbytes.total", None, "has no 'total'"),
        ("device.bf16", "fast", "hardware.bf16 = 'fast'"),
        ("times.tpot", "1", "plan.times.tpot = '1'"), ("times.decode.link", None, "plan.times.decode.link is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, at, value, says):
    data = copy.deepcopy(plan().to_json())
    *outer, last = at.split(".")
    inner = data
    for name in outer:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(PlanError, match=says):
        plan_from_json(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=f"p.json: .*{says}"):
        load_plan(tmp_path / "p.json")


def test_no_plan_at_all(tmp_path):
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(PlanError, match="p.json: not JSON"):
        load_plan(tmp_path / "p.json")
    with pytest.raises(OSError):
        load_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match="not a plan: format = 3"):
        plan_from_json(3)


def test_the_planned_model_has_the_workloads_dtypes():
    spec = planned_spec(SPEC, Workload(dtype="float32", kv_dtype="bfloat16"))
    assert (spec.precision.params, spec.precision.kv, spec.extra_heads) == ("float32", "bfloat16", ())
