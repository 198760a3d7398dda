"""Says what a memory budget for experts buys: slots, bytes, and the decoding speed that the link then allows. Reads config.json, no weights.

    python scripts/plan_budget.py [MODEL] --expert-memory 4GB|25%|auto [--trace TRACE] [--link-gbps 25]
    python scripts/plan_budget.py --table --trace TRACE [--out benchmarks]

--trace shares the slots out over the layers by the hits that they bring on this routing trace, and predicts with the policy's hit rate on it. --table
fits published models into common sizes of device memory; the hit rates there are LFU's on the trace, at equal numbers of slots per active expert.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.table import Table

from checkpoints.load import read_spec
from jaxmoe import formats
from jaxmoe.offload import bounds, budget, published, replay, trace
from jaxmoe.report import record
from jaxmoe.report.command import run_command
from jaxmoe.residency import find_policy

DEFAULT_MODEL = ROOT / "checkpoints" / "default"
BUDGETS = ("minimum", "25%", "50%")
LINKS_GBPS = {"PCIe 4": 25.0, "PCIe 5": 50.0}
"""What copies of an expert's size reach on 16 lanes, in 10^9 bytes per second."""
SLOTS_PER_ACTIVE = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plan device memory for experts."""

    model: tyro.conf.Positional[Path] = DEFAULT_MODEL
    """Hugging Face folder or converted folder."""
    expert_memory: str = "25%"
    """Device memory for routed experts, slots and staging: 4GB, 512MiB, 25% (of all experts) or auto."""
    free_memory: str | None = None
    """What the device has free for experts, for auto; enough if not given."""
    trace: Path | None = None
    """A recorded routing trace of the model, or a .csv to import."""
    uniform: bool = False
    """Give every layer the same number of slots in spite of --trace."""
    policy: Literal["lfu", "lru", "static"] = "lfu"
    """Which experts stay."""
    staging: int = 2
    """Slots for experts that pass through."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """How weights are held."""
    link_gbps: float = 25.0
    """Speed of the link from host to device, 10^9 bytes per second."""
    memory_gbps: float | None = None
    """Speed of the device's memory; left out of the prediction if not given."""
    batch: Annotated[int, tyro.conf.arg(help="Rows in a decode step.")] = 1
    context: int = 4096
    """Tokens of keys and values of each row."""
    table: bool = False
    """Fit published models into common sizes of device memory instead."""
    out: Path | None = None
    """With --table: folder for records."""


def plan_model(args: Arguments) -> str:
    """What the budget buys for one model, in two lines, and a third where the trace is not quite of it."""
    amount = budget.parse_memory(args.expert_memory)
    free = None if args.free_memory is None else budget.parse_memory(args.free_memory)
    if free is not None and free.kind != "bytes":
        raise ValueError(f"--free-memory {args.free_memory!r}: give bytes, like 4GB")
    spec = read_spec(args.model).with_precision(args.dtype)
    shapes = budget.ExpertShapes.from_spec(spec, name=f"{spec.family} in {args.dtype}")
    curves: dict[str, Any] = {}
    routed = None
    if args.trace is not None:
        routed = trace.load_or_import(args.trace)
        trace.check_model(routed, spec)
        if not args.uniform:
            curves = {"curves_LC": bounds.marginal_hits(routed), "allocate": bounds.allocate}
    bypass = find_policy(args.policy).bypass
    plan = budget.solve(shapes, amount, args.staging, free_bytes=free.bytes if free else None, bypass=bypass, **curves)
    hits = None if routed is None else replay.replay(routed, plan.slots, args.policy).hit_rate
    prediction = budget.predict(plan, shapes, hits, args.link_gbps, args.memory_gbps, args.batch, args.context)
    text = budget.describe(plan, shapes, args.context, prediction, args.batch)
    if routed is not None and routed.meta["active"] != shapes.active:
        text += f"\nthe trace ran {routed.meta['active']} experts a token and the model runs {shapes.active}, which will hit less"
    return text


def hit_curve(path: Path) -> tuple[list[tuple[float, float]], str]:
    """LFU's hit rate by slots per active expert on a trace, and the name of the trace's model."""
    routed = trace.load_or_import(path)
    active, used = routed.meta["active"], trace.used_steps(routed)
    slots = sorted({round(active * x) for x in SLOTS_PER_ACTIVE if active * x < routed.experts} | {routed.experts})
    return [(n / active, replay.replay(used, n, "lfu").hit_rate) for n in slots], routed.meta["model"]


def table_rows(curve: list[tuple[float, float]], traced: str, context: int) -> Iterator[dict[str, Any]]:
    """What `make_record` takes of every model, dtype and budget that can be had."""
    for name, model in published.PUBLISHED.items():
        for dtype in model.expert_dtypes:
            shapes = model.shapes(name, dtype)
            for given in BUDGETS:
                amount = budget.Amount("bytes", budget.minimum_bytes(shapes)) if given == "minimum" else budget.parse_memory(given)
                try:
                    plan = budget.solve(shapes, amount)
                except budget.BudgetError:
                    continue  # a share below the minimum: the row of the minimum stands for it
                supported = dtype in formats.DTYPES
                settings = {"model": name, "experts_dtype": dtype, "budget": given, "context": context, "supported": supported}
                # Routing differs from model to model: a curve of another one's is a guess, and those who print it have to be able to say so.
                settings |= {"trace": traced, "own_trace": traced.startswith(name)}
                yield table_row(shapes, plan, curve, settings)


def table_row(shapes: budget.ExpertShapes, plan: budget.BudgetPlan, curve: list[tuple[float, float]], settings: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    total, resident = (budget.total_bytes(p, shapes, settings["context"]) for p in (plan, None))
    slots = sum(plan.slots) / len(plan.slots)
    traced = published.interpolate_hits(curve, slots, shapes.active)
    counters: dict[str, float] = {
        "slots": slots, "experts": shapes.experts, "staging": plan.staging, "saving_percent": 100 * (1 - total / resident),
        "budget_percent": 100 * plan.device_bytes / plan.resident_bytes, "hit_even_percent": 100 * slots / shapes.experts,
        "hit_trace_percent": 100 * traced,
    }  # fmt: skip
    for link, gbps in LINKS_GBPS.items():
        key = link.lower().replace(" ", "")
        counters[f"{key}_even_tokens_per_second"] = budget.predict(plan, shapes, None, gbps).overlapped
        counters[f"{key}_trace_tokens_per_second"] = budget.predict(plan, shapes, traced, gbps).overlapped
    fits = {"fits_in": published.fits_in(total), "resident_fits_in": published.fits_in(resident), "links_gbps": LINKS_GBPS}
    kv = settings["context"] * shapes.kv_bytes_per_token
    return {
        "settings": settings | fits, "counters": counters,
        "bytes": {"dense": shapes.dense_bytes, "experts": plan.device_bytes, "kv": kv, "total": total, "resident_total": resident},
        "bound": record.make_bound("capacity", resident / 1e9, total / 1e9, "GB"),
    }  # fmt: skip


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """One record a row; nothing in it was timed."""
    for row in rows:
        s = row["settings"]
        made = record.make_record(name="expert_budget", spec_hash="", seeds={}, timings={}, compile_seconds=0.0, **row)
        record.write_record(folder / f"expert_budget-{s['model'].lower()}-{s['experts_dtype']}-{s['budget'].rstrip('%')}.json", made)


def print_rows(rows: list[dict[str, Any]], traced: str) -> None:
    """The table on the terminal."""
    table = Table("model", "experts", "budget", "slots", "GB", "saved", "fits in", "resident", "hits even / LFU", "PCIe 4 tok/s", "PCIe 5 tok/s")
    for row in rows:
        s, c = row["settings"], row["counters"]
        mark = "" if s["own_trace"] else "~"
        speeds = [f"{c[f'pcie{n}_even_tokens_per_second']:.1f} / {mark}{c[f'pcie{n}_trace_tokens_per_second']:.1f}" for n in (4, 5)]
        size = (f"{c['slots']:.1f}/{c['experts']}", f"{row['bytes']['total'] / 1e9:.1f}", f"{c['saving_percent']:.0f} %")
        hits = f"{c['hit_even_percent']:.0f} / {mark}{c['hit_trace_percent']:.0f} %"
        table.add_row(s["model"], s["experts_dtype"], s["budget"], *size, s["fits_in"], s["resident_fits_in"], hits, *speeds)
    Console().print(table)
    print(f"Speeds are ceilings of the link at the hit rate of even routing / of LFU on a trace of {traced}, of which ~ marks use for another model.")


def run(args: Arguments) -> None:
    """Prints the plan, or the table."""
    if not args.table:
        if args.out is not None:
            raise ValueError("--out is for --table")
        print(plan_model(args))
        return
    if args.trace is None:
        raise ValueError("--table needs --trace, for a hit rate that was replayed")
    curve, traced = hit_curve(args.trace)
    rows = list(table_rows(curve, traced, args.context))
    print_rows(rows, traced)
    if args.out is not None:
        write_rows(rows, args.out)


def main() -> int:
    """The command line."""
    args = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
