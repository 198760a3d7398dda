"""Places a model's experts on devices by a recorded routing of it, and says what that changes.

    python scripts/place.py TRACE.npz --devices 8 --method combined --seconds 10 --out placement.json
    python scripts/place.py TRACE.npz --devices 8 --method eplb --extra 16 --out replicas.json

moetuner: loads as even as can be, then the cheapest traffic of such groups. exflow: the fewest hops between layers, whatever the loads. combined: the
fewest hops with even loads. eplb: copies of the experts that most tokens ask for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from jaxmoe.report.command import run_command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Place experts."""

    trace: tyro.conf.Positional[Path]
    """A trace, or a route trace's .csv."""
    devices: int
    """Devices that the experts are divided among."""
    method: Literal["moetuner", "exflow", "combined", "eplb"] = "combined"
    """What is aimed at."""
    seconds: float = 10.0
    """Time limit of solving; it is needed twice, for the whole trace and for the half that is held out."""
    slack: float = 0.05
    """Of combined: no device's load in a layer is above the mean by more than this share of it."""
    extra: int | None = None
    """Of eplb: slots a layer for copies, on all devices together; one a device if not given."""
    per_node: int | None = None
    """Devices of a node; links between nodes cost more. All links cost the same if not given."""
    inter_cost: float = 4.0
    """Cost of a link between nodes, in units of one within."""
    seed: int = 0
    """Of searches."""
    out: Path | None = None
    """Write the placement to this file."""


def check(args: Arguments) -> None:
    """Refuses what contradicts itself, before anything is read."""
    from jaxmoe.report import record

    if args.out is not None:
        record.check_path(args.out, "a placement")
    if args.method == "eplb" and args.per_node is not None:
        raise ValueError("--per-node is for moetuner, exflow and combined: eplb knows loads only")
    if args.method != "combined" and args.slack != Arguments.slack:
        raise ValueError(f"--slack is for combined, not for {args.method}")


def run(args: Arguments) -> None:
    """Solves, prints, writes."""
    from rich.console import Console

    from checkpoints.manifest import write_text
    from jaxmoe.offload.trace import load_or_import
    from jaxmoe.report import placement_bench
    from sharding import placement

    check(args)
    trace, console = load_or_import(args.trace), Console()
    links = None if args.per_node is None else placement.node_links(args.devices, args.per_node, inter=args.inter_cost)
    options = {"extra": args.extra} if args.method == "eplb" else {"extra": args.extra, "seed": args.seed, "slack": args.slack, "links": links}
    earlier, later = placement_bench.halves(trace.ids)
    with Console(stderr=True).status("solving"):
        whole = placement.plan(trace.ids, trace.experts, args.devices, args.method, args.seconds, **options)
        half = placement.plan(earlier, trace.experts, args.devices, args.method, args.seconds, judged=later, **options)
    title = f"{trace.meta['model']}, {len(trace.ids)} tokens, {args.devices} devices"
    console.print(placement_bench.plan_table({"judged on what it is made from": whole, "made from first half, on second": half}, title))
    for stage in whole.report.stages:
        value = f"{stage.name}: {stage.value:,.0f}, proven to be at least {stage.bound:,.0f} (gap {stage.gap:.1%}), {stage.seconds:.1f} s"
        console.print(value, highlight=False, soft_wrap=True)
    if args.out is not None:
        meta = {"model": trace.meta["model"], "method": args.method, "tokens": len(trace.ids)}
        made = dataclasses.replace(whole.made, spec_hash=trace.meta["spec_hash"], meta=meta)
        write_text(args.out, made.to_json())
        console.print(f"{args.out}: {args.out.stat().st_size / 1e3:,.0f} kB", highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    """Runs; gives the exit code."""
    parsed = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
