"""Plans how a model is split over a machine: which mesh, how many sequences, and what that takes in memory and time.

    python scripts/plan.py MODEL --hardware v5e:4x4 [--objective latency] [--rows 16] [--slo ttft=500ms,tpot=50ms] [--out plan.json]
    python scripts/plan.py MODEL --hardware h100:8 --split tensor=2,expert=4,attention=tensor        # that split alone
    python scripts/plan.py MODEL --hardware v5e:4x4 --prove                                          # have the real compiler confirm it
    python scripts/plan.py MODEL --hardware v5e:4x4 --sweep rows --over 1 4 16 64 --plot rows.png
    python scripts/plan.py MODEL --hardware here                                                     # measure this machine first

MODEL is a Hugging Face folder, a converted one, a config.json, or the name of a published model (--models lists them). No weights are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console

import jaxmoe
from checkpoints.load import read_spec
from jaxmoe.offload import budget
from jaxmoe.report import plan_tables as tables
from jaxmoe.report import record
from jaxmoe.report.command import run_command
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.published import names, published
from sharding.choices import Search, Slo
from sharding.hardware import CHIPS, Machine, hardware_from_json, parse_hardware
from sharding.measure import measure
from sharding.memory import device_bytes
from sharding.phase_split import split_phases
from sharding.phases import decode_phase
from sharding.plan import Objective, Plan, planned_spec, save_plan
from sharding.planner import Candidate, Found, search_plan
from sharding.routing_load import Routing
from sharding.split import parse_split
from sharding.time_model import step_time
from sharding.workload import Workload

DEFAULT_MODEL = str(ROOT / "checkpoints" / "default")
QUICK = 3.0
"""Seconds that a search may take for its next change to be searched too."""

WIDE = 150
"""Columns where there is no terminal."""

DOUBLINGS = 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plan a mesh."""

    model: tyro.conf.Positional[str] = DEFAULT_MODEL
    """Hugging Face folder, converted folder, config.json, or a published model's name."""
    hardware: str = "here"
    """v5e:4x4, v5p:2x2x1, h100, h100:8 or h100:2x8 (hosts x devices); here: this machine, measured; or a file that --save-hardware wrote, FILE.json:8
    for several."""
    save_hardware: Path | None = None
    """Write the device's numbers to this file, to be edited and given as --hardware."""
    memory: str | None = None
    """What a program can have of each device, like 76GB, in the place of what the hardware is known for."""
    price: float | None = None
    """Of a device and hour: --objective cost then ranks by it."""
    objective: Objective = "latency"
    """latency: time per token at --rows. throughput: tokens a second of the machine. cost: tokens per device-second, or per --price."""
    slo: str | None = None
    """Limits, like ttft=500ms,tpot=50ms: to the first token of a prompt, and for each further one."""
    rows: int | None = None
    """Sequences in the whole mesh; 1 for latency if not given, and whatever is best for the others."""
    prompt: int | None = None
    """Tokens of each prompt; 512 if not given, or as many as the model has positions for."""
    new: int = 128
    """Tokens to generate of each."""
    prefill_tokens: int = 512
    """The most tokens of a prefill step in each group of devices."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """How weights are held and computed with."""
    kv_dtype: Literal["bfloat16", "float32", "auto"] | None = None
    """Of cached keys and values; as --dtype if not given. auto: float32 or bfloat16, whichever gives the better plan."""
    slots: int | None = None
    """Experts of each MoE layer that a device has room for, the others in host memory; found where not all fit, if not given."""
    staging: int = 2
    """With slots in host memory: slots for experts that pass through."""
    resident: bool = False
    """Never put experts into host memory."""
    expert_copies: int = 0
    """Copies of experts in each MoE layer, over all devices, that there is to be room for (scripts/place.py --method eplb --extra)."""
    trace: Path | None = None
    """A recorded routing trace of the model (scripts/trace.py record): experts are asked for as it has it, in the place of evenly."""
    devices: int | None = None
    """Plan for so many devices of this hardware."""
    split: str | None = None
    """Only this split, like data=2,expert=4,attention=tensor."""
    axes: tuple[Literal["data", "expert", "tensor", "sequence", "stage"], ...] = ("data", "expert", "tensor", "sequence", "stage")
    """Axes of the mesh that may have more than one device."""
    phases: bool = False
    """Also compare prompts and decoding on the same devices with separate ones."""
    prove: bool = False
    """Compile the plan's programs for the hardware, which need not be there (extra `compile`), and compare."""
    out: Path | None = None
    """Write the plan to this file, for scripts/generate.py --plan."""
    sweep: Literal["rows", "prompt", "slots", "hardware", "split"] | None = None
    """Plan for each of several values instead."""
    over: Annotated[tuple[str, ...], tyro.conf.arg(help="The sweep's values; doublings, or for split the best ones, if not given.")] = ()
    plot: Path | None = None
    """With --sweep: draw it into this .png or .svg."""
    json: Path | None = None
    """Write the plan and what was not chosen, or the sweep, to this file."""
    models: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the published models and the hardware that is known, and end."""


def read_model(name: str) -> tuple[str, ModelSpec]:
    """What a model is called, and its spec."""
    path = Path(name)
    if name in names() and not path.exists():
        return name, published(name)
    if path.is_file():
        try:
            return path.parent.name or path.name, ModelSpec.from_hf(json.loads(path.read_bytes()))
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a model's config.json: {error}") from error
    if not path.exists() and re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name}: neither a folder nor a published model; these are {', '.join(names())}")
    return path.resolve().name, read_spec(path)


def read_machine(args: Arguments, progress: Callable[[str], None]) -> Machine:
    """The machine of the arguments."""
    text, _, shape = args.hardware.partition(":")
    if text == "here":
        found = measure(lambda what: progress(f"measuring {what}"))
        import jax

        machine = parse_hardware(f"here:{shape or jax.device_count()}", found) if not found.dims else _here(found, shape)
    elif ".json" in args.hardware:
        file, _, shape = args.hardware.partition(".json")
        try:
            found = hardware_from_json(json.loads(Path(f"{file}.json").read_bytes()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}.json: not JSON: {error}") from error
        machine = parse_hardware(f"file{shape}", found)
    else:
        machine = parse_hardware(args.hardware)
    if args.memory is not None:
        machine = dataclasses.replace(machine, hardware=machine.hardware.with_memory(read_memory(args.memory, machine)))
    if args.price is not None:
        machine = dataclasses.replace(machine, hardware=dataclasses.replace(machine.hardware, price=args.price))
    if args.devices is None:
        return machine
    if args.devices < 1:
        raise ValueError(f"--devices {args.devices}: at least 1 is needed")
    return machine.of(args.devices)


def read_memory(text: str, machine: Machine) -> int:
    """Bytes that a program may have of a device."""
    try:
        amount = budget.parse_memory(text)
    except ValueError:
        amount = None
    if amount is None or amount.kind != "bytes" or amount.bytes < 1:
        raise ValueError(f"--memory {text!r}: give the bytes of a device that a program may have, like 76GB")
    have = machine.hardware.memory_bytes
    if amount.bytes > have:
        raise ValueError(f"--memory {text}: a device of {machine} has {have / 1e9:.1f} GB")
    return amount.bytes


def _here(found: Any, shape: str) -> Machine:
    import jax

    return parse_hardware(f"here:{shape}", found) if shape else Machine(found, (1,) * found.dims).of(jax.device_count())


def read_slo(text: str | None) -> Slo:
    """Limits from 'ttft=500ms,tpot=0.05s'."""
    found: dict[str, float] = {}
    for part in (text or "").split(",") if text is not None else ():
        match = re.fullmatch(r"\s*(ttft|tpot)\s*=\s*(\d+\.?\d*|\.\d+)\s*(ms|s)\s*", part)
        if match is None or match[1] in found:
            raise ValueError(f"--slo {text!r}: {part.strip()!r} is not a limit, write ttft=500ms,tpot=50ms")
        found[match[1]] = float(match[2]) / (1000 if match[3] == "ms" else 1)
    return Slo(**found)


def read_routing(args: Arguments, spec: ModelSpec) -> Routing | None:
    """The recorded routing, if there is one."""
    if args.trace is None:
        return None
    from jaxmoe.offload import trace

    routed = trace.load_or_import(args.trace)
    trace.check_model(routed, spec)
    return Routing.of_ids(routed.ids, routed.experts)


def workload_of(args: Arguments, spec: ModelSpec) -> Workload:
    """What is to be done."""
    prompt = max(1, min(512, spec.max_positions - args.new)) if args.prompt is None else args.prompt
    rows, kv_dtype = 1 if args.rows is None else args.rows, args.kv_dtype or args.dtype
    return Workload(rows, prompt, args.new, args.prefill_tokens, args.dtype, kv_dtype, args.slots, args.staging, args.expert_copies)


def search_of(args: Arguments) -> Search:
    """What may be chosen."""
    split = None if args.split is None else parse_split(args.split)
    any_rows = args.rows is None and args.objective != "latency"
    return Search(args.objective, read_slo(args.slo), split, any_rows, args.axes, resident=args.resident)


def plan_of(name: str, spec: ModelSpec, machine: Machine, search: Search, c: Candidate) -> Plan:
    """A candidate as a plan."""
    return Plan(name, spec.hash(), machine, c.split, c.workload, search.objective, c.nbytes.to_json(), c.times, f"jaxmoe {jaxmoe.__version__}")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan, what it was chosen from, and the model in its precision."""

    plan: Plan
    found: Found
    spec: ModelSpec


def make_plan(args: Arguments, progress: Callable[[str], None], machine: Machine | None = None) -> Planned:
    """Plans what the arguments ask for."""
    if args.kv_dtype == "auto":
        return either(args, progress, machine)
    name, spec = read_model(args.model)
    workload, search, routing = workload_of(args, spec), search_of(args), read_routing(args, spec)
    spec = planned_spec(spec, workload)
    if workload.positions > spec.max_positions:
        raise ValueError(f"--prompt {workload.prompt} and --new {args.new}: {name} goes up to {spec.max_positions} positions")
    machine = read_machine(args, progress) if machine is None else machine
    found = search_plan(spec, machine, workload, search, device_bytes, routing, progress)
    return Planned(plan_of(name, spec, machine, search, found.best), found, spec)


def either(args: Arguments, progress: Callable[[str], None], machine: Machine | None) -> Planned:
    """The better plan of those with keys and values in float32 and in bfloat16; of equals, and of a model in bfloat16, the one in its dtype."""
    machine = read_machine(args, progress) if machine is None else machine
    own = dataclasses.replace(args, kv_dtype=args.dtype)
    narrow = dataclasses.replace(args, kv_dtype="bfloat16")
    if args.dtype == "bfloat16":
        return make_plan(own, progress, machine)
    try:
        first = make_plan(own, progress, machine)
    except (DoesNotFit, MissesSlo):
        return make_plan(narrow, progress, machine)
    second = make_plan(narrow, progress, machine)
    return second if second.found.best.score < first.found.best.score else first


def sweep(args: Arguments, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each value."""
    machine = read_machine(args, progress)
    if args.sweep == "split" and not args.over:
        made = make_plan(args, progress, machine)
        plans = [plan_of(made.plan.model, made.spec, machine, search_of(args), c) for c in (made.found.best, *made.found.runners_up)]
        return [tables.sweep_row(str(plan.split), plan) for plan in plans]
    rows: list[dict[str, Any]] = []
    for value in args.over or _doublings(args, machine):
        progress(f"{args.sweep} {value}")
        field: Any = args.sweep
        if field not in ("hardware", "split") and not value.isdigit():
            raise ValueError(f"--over {value}: --sweep {field} needs whole numbers")
        at = dataclasses.replace(args, **{field: value if field in ("hardware", "split") else int(value)})
        try:
            rows.append(tables.sweep_row(value, make_plan(at, progress, None if field == "hardware" else machine).plan))
        except ValueError as error:
            rows.append({"at": value, "error": str(error).split(";")[0].split(": the least")[0]})
    return rows


def _doublings(args: Arguments, machine: Machine) -> list[str]:
    if args.sweep == "hardware":
        found = [args.hardware]
        with contextlib.suppress(ValueError):  # there are none so large
            found += [str(machine.of(machine.devices * 2**i)) for i in range(1, 4)]
        return found
    first = {"rows": args.rows or 1, "prompt": args.prompt or 512, "slots": args.slots or 1}[args.sweep or "rows"]
    return [str(first * 2**i) for i in range(DOUBLINGS)]


def next_change(args: Arguments, made: Planned, progress: Callable[[str], None]) -> str | None:
    """Which single change would help most, tried: twice the devices, or narrower keys and values; None where none helps, or trying takes long."""
    plan, tried = made.plan, []
    with contextlib.suppress(ValueError):
        tried.append(("", plan.machine.of(2 * plan.machine.devices), args))
    if plan.workload.kv_dtype == "float32":
        tried.append((" --kv-dtype bfloat16", plan.machine, dataclasses.replace(args, kv_dtype="bfloat16")))
    best: tuple[float, str] | None = None
    for text, machine, changed in tried:
        what = text.strip() or f"--hardware {machine}"
        progress(f"trying {what}")
        try:
            other = make_plan(changed, progress, machine)
        except ValueError:
            continue
        was, now = made.found.best.score, other.found.best.score
        if now < 0.99 * was and (best is None or now < best[0]):
            times, old = other.plan.times, plan.times
            best = now, (
                f"next: {what} gives {times.tpot * 1e3:.2f} ms a token instead of {old.tpot * 1e3:.2f}, {times.tokens_per_s:.0f} tokens/s instead of "
                f"{old.tokens_per_s:.0f}"
            )
    return best[1] if best else None


def prove(args: Arguments, made: Planned, progress: Callable[[str], None]) -> Any:
    """Has the compiler confirm a plan; see `jaxmoe.engine.prove`."""
    from jaxmoe.engine.prove import prove as compile_plan

    return compile_plan(made.plan, made.spec, progress)


def compiled_seconds(made: Planned, proved: Any) -> float:
    """A decode step as XLA's `optimal_seconds` counts it, with the copies that the compiler made."""
    plan = made.plan
    layout = made.found.best.layout
    phase = decode_phase(plan.workload, layout, plan.workload.positions)
    time = step_time(made.spec, plan.machine, layout, plan.workload, phase, "compiled", temporaries=proved.decode.temp)
    return time.expected - time.launch


def check(args: Arguments) -> None:
    """Refuses what contradicts itself before anything is measured."""
    if args.plot is not None and args.sweep is None:
        raise ValueError("--plot is for --sweep")
    if args.over and args.sweep is None:
        raise ValueError("--over is for --sweep")
    if args.sweep is not None and (args.out is not None or args.prove or args.phases):
        raise ValueError("--sweep makes several plans: leave out --out, --prove and --phases")
    if args.plot is not None:
        tables.check_plot(args.plot)
        record.check_path(args.plot, "a plot", args.plot.suffix)
    if args.sweep == "hardware" and args.devices is not None:
        raise ValueError("--sweep hardware changes the number of devices: leave out --devices")
    for path in (args.out, args.json, args.save_hardware):
        if path is not None:
            record.check_path(path)


def run(args: Arguments) -> None:
    """Plans, prints, and writes what was asked for."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(width=WIDE)
    if args.models:
        print("models: " + ", ".join(names()))
        print("hardware: " + ", ".join(CHIPS))
        return
    check(args)
    with Console(stderr=True).status("planning") as status:
        progress: Callable[[str], None] = lambda what: status.update(what)  # noqa: E731
        if args.sweep is not None:
            rows = sweep(args, progress)
        else:
            began = time.perf_counter()
            made = make_plan(args, progress)
            quick = args.split is None and time.perf_counter() - began < QUICK
            change = next_change(args, made, progress) if quick else None
            search = dataclasses.replace(search_of(args), any_rows=False)
            split = split_phases(made.spec, made.plan.machine, made.plan.workload, search, device_bytes, progress) if args.phases else None
            if args.out is not None:
                save_plan(args.out, made.plan)  # before what takes long
            proved = prove(args, made, progress) if args.prove else None
    if args.sweep is not None:
        console.print(tables.sweep_table(rows))
        if args.json is not None:
            record.write_record(args.json, {"sweep": args.sweep, "model": args.model, "hardware": args.hardware, "rows": rows})
        if args.plot is not None:
            tables.plot_sweep(rows, args.sweep, args.plot)
        return
    _write(args, made, proved)
    tables.show(console, made.plan, made.found)
    if change is not None:
        console.print(change, soft_wrap=True, markup=False, highlight=False)
    if split is not None:
        console.print("", tables.phases_table(split), sep="\n")
    if proved is not None:
        console.print("", tables.proved_table(made.plan, proved, compiled_seconds(made, proved)), sep="\n")
        usable = made.plan.machine.hardware.usable_bytes
        if proved.peak > usable:
            raise ValueError(f"the compiler needs {tables.gigabytes(proved.peak)} of each device, a program can have {tables.gigabytes(usable)}")


def _write(args: Arguments, made: Planned, proved: Any) -> None:
    if args.save_hardware is not None:
        record.write_record(args.save_hardware, made.plan.machine.hardware.to_json())
    if args.json is not None:
        lost = [{"split": str(x.split), "reason": x.reason} for x in made.found.lost]
        record.write_record(args.json, {
            "plan": made.plan.to_json(), "lost": lost, "refused": made.found.refused, "worse": made.found.worse,
            "proved": None if proved is None else dataclasses.asdict(proved),
        })  # fmt: skip


def main() -> int:
    """The command line."""
    args = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
