"""A plan: which model, on which machine, split how, to do what, with the bytes and times that were predicted; and the JSON file that keeps it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jaxmoe.spec import ModelSpec
from sharding.hardware import Hardware, Machine, hardware_from_json
from sharding.split import Split, SplitError
from sharding.time_model import StepTime, Times
from sharding.workload import Workload

FORMAT = "jaxmoe-plan"
VERSION = 1

Objective = Literal["latency", "throughput", "cost"]


class PlanError(ValueError):
    """A plan file that can't be read, or a plan that is for something else; one line."""


def planned_spec(spec: ModelSpec, workload: Workload) -> ModelSpec:
    """The model as a plan for this workload has it: in its dtypes, without heads for drafting. Its hash is `Plan.spec_hash`."""
    spec = spec.with_precision(workload.dtype)
    return dataclasses.replace(spec, precision=dataclasses.replace(spec.precision, kv=workload.kv_dtype), extra_heads=())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `scripts/plan.py` decides and `scripts/generate.py` runs.

    Attributes:
        model: what the model was called.
        spec_hash: `ModelSpec.hash` of `planned_spec`.
        machine: devices and topology.
        split: the mesh.
        workload: what it was made for.
        objective: what it was chosen by.
        nbytes: predicted bytes of one device by item; their sum is 'total', and 'host_store' lies in host memory (`sharding.memory.Bytes.to_json`).
        times: predicted.
        made_by: the version that made it.
    """

    model: str
    spec_hash: str
    machine: Machine
    split: Split
    workload: Workload
    objective: Objective
    nbytes: Mapping[str, int]
    times: Times
    made_by: str = ""

    def __post_init__(self):
        if self.objective not in get_args(Objective):
            raise PlanError(f"plan.objective = {self.objective!r}: choose from {', '.join(get_args(Objective))}")
        if self.split.devices > self.machine.devices:
            raise PlanError(f"plan.split = {self.split} takes {self.split.devices} devices, plan.machine has {self.machine.devices}")
        if "total" not in self.nbytes:
            raise PlanError("plan.nbytes has no 'total'")

    def check_model(self, spec_hash: str) -> None:
        """Refuses another model than the plan was made for.

        Raises:
            PlanError: it is another one.
        """
        if spec_hash != self.spec_hash:
            raise PlanError(f"the plan is for {self.model} (spec {self.spec_hash}), this model is spec {spec_hash}: plan it anew")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `plan_from_json` is the inverse."""
        return {
            "format": FORMAT, "version": VERSION, "model": self.model, "spec_hash": self.spec_hash, "hardware": str(self.machine),
            "device": self.machine.hardware.to_json(), "topology": list(self.machine.topology), "split": dataclasses.asdict(self.split),
            "workload": self.workload.to_json(), "objective": self.objective, "nbytes": dict(self.nbytes), "times": self.times.to_json(),
            "made_by": self.made_by,
        }  # fmt: skip


def plan_from_json(data: Any) -> Plan:
    """The inverse of `Plan.to_json`.

    Raises:
        PlanError: another format or version, a field that is missing, isn't known, or has a value that it can't have; the message names it.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f"not a plan: format = {data.get('format') if isinstance(data, dict) else data!r} instead of {FORMAT!r}")
    if data.get("version") != VERSION:
        raise PlanError(f"plan.version = {data.get('version')!r}: this jaxmoe reads {VERSION}, plan anew")
    kinds = {
        "format": str, "version": int, "model": str, "spec_hash": str, "hardware": str, "device": dict, "topology": list, "split": dict,
        "workload": dict, "objective": str, "nbytes": dict, "times": dict, "made_by": str,
    }  # fmt: skip
    _check_fields("plan", data, kinds)
    if not data["topology"] or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in data["topology"]):
        raise PlanError(f"plan.topology = {data['topology']!r}: whole numbers are needed")
    for name, n in data["nbytes"].items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise PlanError(f"plan.nbytes.{name} = {n!r}: a whole number is needed")
    try:
        machine = _machine(hardware_from_json(data["device"]), tuple(data["topology"]))
        split, workload = _split(data["split"]), Workload.from_json(data["workload"])
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(f"plan: {error}") from None
    return Plan(
        data["model"], data["spec_hash"], machine, split, workload, data["objective"], data["nbytes"], _times(data["times"]), data["made_by"]
    )  # fmt: skip


def _check_fields(where: str, data: dict, kinds: Mapping[str, Any]) -> None:
    for name in data:
        if name not in kinds:
            raise PlanError(f"{where}.{name} is not known: choose from {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name not in data:
            raise PlanError(f"{where}.{name} is missing")
        if not isinstance(data[name], kind) or (isinstance(data[name], bool)):
            raise PlanError(f"{where}.{name} = {data[name]!r}: not what it has to be")


def _machine(hardware: Hardware, topology: tuple[int, ...]) -> Machine:
    if len(topology) != (hardware.dims or 2):
        raise PlanError(f"plan.topology = {list(topology)}: {hardware.name} needs {hardware.dims or 2} numbers")
    return Machine(hardware, topology)


def _split(data: dict) -> Split:
    known = [f.name for f in dataclasses.fields(Split)]
    for name in data:
        if name not in known:
            raise SplitError(f"split.{name} is not known: choose from {', '.join(known)}")
    return Split(**data)


def _times(data: dict) -> Times:
    fields = {f.name: (dict if f.name in ("decode", "prefill_step") else (int, float)) for f in dataclasses.fields(Times)}
    _check_fields("plan.times", data, fields)
    steps = {}
    for name in ("decode", "prefill_step"):
        _check_fields(f"plan.times.{name}", data[name], {f.name: (int, float) for f in dataclasses.fields(StepTime)})
        steps[name] = StepTime(**data[name])
    return Times(**{**data, **steps})


def save_plan(path: str | Path, plan: Plan) -> None:
    """Writes a plan's file.

    Raises:
        OSError: it can't be written.
    """
    Path(path).write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")


def load_plan(path: str | Path) -> Plan:
    """Reads a plan's file.

    Raises:
        PlanError: what it holds is no plan; the message names the file.
        OSError: it can't be read.
    """
    try:
        return plan_from_json(json.loads(Path(path).read_bytes()))
    except OSError:
        raise
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
