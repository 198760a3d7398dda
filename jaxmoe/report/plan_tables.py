"""What a plan says, as tables for the terminal, and plots of sweeps over plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sharding.fitting import gigabytes, sequences
from sharding.phase_split import PhaseSplit, Pool
from sharding.plan import Plan
from sharding.planner import Candidate, Found
from sharding.time_model import TERMS

Row = Mapping[str, Any]

SWEEP: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("at", lambda row: str(row["at"])),
    ("split", lambda row: row.get("split", "")),
    ("sequences", lambda row: str(row.get("rows", ""))),
    ("slots", lambda row: str(row.get("slots") or "") if "split" in row else ""),
    ("GB each", lambda row: f"{row['bytes'] / 1e9:.2f}" if "bytes" in row else ""),
    ("first ms", lambda row: f"{row['ttft'] * 1e3:.2f}" if "ttft" in row else ""),
    ("ms/token", lambda row: f"{row['tpot'] * 1e3:.2f}" if "tpot" in row else ""),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:.1f}" if "tokens_per_s" in row else ""),
    ("longest", lambda row: row.get("longest", row.get("error", ""))),
)
"""A row of a sweep: a plan, or why there is none."""


def sweep_row(at: Any, plan: Plan) -> dict[str, Any]:
    """A plan as a row of `SWEEP`."""
    times = plan.times
    return {
        "at": at, "split": str(plan.split), "rows": plan.workload.rows, "slots": plan.workload.slots, "bytes": plan.nbytes["total"],
        "ttft": times.ttft, "tpot": times.tpot, "tokens_per_s": times.tokens_per_s, "longest": times.decode.longest,
    }  # fmt: skip


def sweep_table(rows: Sequence[Row]) -> Table:
    """A sweep."""
    return _table([name for name, _ in SWEEP], ([show(row) for _, show in SWEEP] for row in rows))


def _table(names: Sequence[str], rows: Any) -> Table:
    out = Table(box=box.SIMPLE)
    for name in names:
        out.add_column(name, overflow="fold", min_width=22 if "split" in name or "not chosen" in name else None)
    for row in rows:
        out.add_row(*map(escape, row))
    return out


def headline(plan: Plan) -> str:
    """A plan in a line."""
    w = plan.workload
    experts = "all experts resident" if w.slots is None else f"{w.slots} expert slots a layer and device"
    kept = "" if w.kv_dtype == w.dtype else f" (keys and values {w.kv_dtype})"
    return f"{plan.model} on {plan.machine}: {plan.split}, {sequences(w.rows)} of {w.prompt} + {w.new_tokens} tokens, {w.dtype}{kept}, {experts}"


def bytes_table(plan: Plan) -> Table:
    """Predicted bytes of a device."""
    total, usable = plan.nbytes["total"], plan.machine.hardware.usable_bytes
    own = sorted(((n, name) for name, n in plan.nbytes.items() if name != "total" and not name.startswith("host") and n), reverse=True)
    rows = [(name, gigabytes(n), f"{100 * n / total:.1f}") for n, name in own]
    rows += [("in all", gigabytes(total), "100"), ("a program can have", gigabytes(usable), f"{100 * usable / total:.0f}")]
    rows += [(f"{name}, outside", gigabytes(n), "") for name, n in plan.nbytes.items() if name.startswith("host") and n]
    return _table(("bytes of a device", "", "% of all"), rows)


def times_table(plan: Plan) -> Table:
    """Predicted milliseconds by term, for all prompts and for a token of every sequence."""
    steps = (plan.times.prefill_step, plan.times.decode)
    names = {name: name for name in TERMS} | {"overlapped": "all overlapped", "expected": "expected", "serial": "nothing overlapped"}
    rows = [(shown, *(f"{getattr(step, name) * 1e3:.3f}" for step in steps)) for name, shown in names.items()]
    return _table(("milliseconds of", "all prompts", "another token"), rows)


def others_table(found: Found, most: int = 12) -> Table:
    """Why other splits weren't chosen."""
    return _table(("not chosen", "why"), [(str(lost.split), lost.reason) for lost in found.lost[:most]])


def phases_table(found: PhaseSplit) -> Table:
    """Prompts and decoding together and apart."""

    def row(name: str, pool: Pool | None) -> tuple[str, ...]:
        if pool is None:
            return (name, "none keeps the limits", "", "", "")
        return (name, str(pool.instances), str(pool.split), str(pool.rows or ""), f"{pool.rate:.3g}")

    return _table(
        ("devices that do", "instances", "split of each", "sequences", "requests/s"),
        [row("both", found.together), row("prompts", found.prefill), row("decoding", found.decode)],
    )


def proved_table(plan: Plan, proved: Any, seconds: float | None = None) -> Table:
    """What the compiler says beside what was predicted.

    Args:
        plan: what was predicted.
        proved: of `jaxmoe.engine.prove`.
        seconds: predicted of a decode step in the way that XLA counts `optimal_seconds` (`sharding.phases.Count`).
    """
    total, two = plan.nbytes["total"], (proved.prefill, proved.decode)
    rows = [(name, *(gigabytes(getattr(program, name)) for program in two), "") for name in ("argument", "temp", "output", "alias", "host", "peak")]
    over = f"{100 * (total / proved.peak - 1):+.1f}" if proved.peak else ""
    rows.append(("peak of both", gigabytes(proved.peak), "", over))
    rows.append(("a program can have", gigabytes(plan.machine.hardware.usable_bytes), "", ""))
    if proved.decode.optimal_seconds is not None and seconds is not None:
        known = proved.decode.optimal_seconds
        rows.append(("a step, each loop once", "", f"{known * 1e3:.3f} ms", f"{100 * (seconds / known - 1):+.1f}"))
    for kind in sorted({*proved.prefill.collectives, *proved.decode.collectives}):
        rows.append((kind, *(str(program.collectives.get(kind, 0)) for program in two), ""))
    rows.append(("compiled in", *(f"{program.compile_seconds:.1f} s" for program in two), ""))
    return _table(("the compiler says", "prefill", "decode", "predicted is over by %"), rows)


def best_table(plan: Plan, found: Found) -> Table:
    """The best few, with the budget of each: what a device holds in GB, and the times."""
    names = [name for name, n in plan.nbytes.items() if name not in ("total", "batch") and not name.startswith("host")]
    names = [name for name in names if any(c.nbytes.to_json().get(name) for c in (found.best, *found.runners_up))]

    def row(c: Candidate) -> tuple[str, ...]:
        held, slots = c.nbytes.to_json(), "all" if c.workload.slots is None else f"{c.workload.slots} slots"
        gb = f"{held['total'] / 1e9:.2f}: " + ", ".join(f"{name} {held[name] / 1e9:.2f}" for name in names if held[name] >= 5e6)
        times = (f"{c.times.ttft * 1e3:.1f}", f"{c.times.tpot * 1e3:.2f}", f"{c.times.tokens_per_s:.0f}")
        return str(c.split), str(c.workload.rows), slots, gb, *times

    heads = ("the best: split", "sequences", "experts", "GB of a device", "first ms", "ms/token", "tokens/s")
    return _table(heads, map(row, (found.best, *found.runners_up)))


def show(console: Console, plan: Plan, found: Found | None = None) -> None:
    """Prints a plan."""
    times = plan.times
    console.print(headline(plan), soft_wrap=True, markup=False, highlight=False)
    line = f"predicted: {times.ttft * 1e3:.2f} ms to the first token, {times.tpot * 1e3:.2f} ms for another, {times.tokens_per_s:.1f} tokens/s in all"
    console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print("", bytes_table(plan), times_table(plan), sep="\n")
    if found is not None and found.runners_up:
        console.print(best_table(plan, found))
    if found is not None and found.lost:
        console.print(others_table(found))
    if found is not None:
        what = f"{found.worse} more ways couldn't come among these, {found.refused} splits don't divide the model or its sequences"
        console.print(what, soft_wrap=True, markup=False, highlight=False)


# --- Plots


def check_plot(path: str | Path) -> None:
    """Finds out before a sweep whether it can be drawn.

    Raises:
        ValueError: matplotlib is missing, or the file's ending is not .png or .svg.
    """
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot {path}: write a name that ends in .png or .svg")
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib, the extra `plot`: pip install 'jaxmoe[plot]'") from error
    return Figure


def plot_sweep(rows: Sequence[Row], over: str, path: str | Path) -> Path:
    """Draws a sweep: tokens per second and milliseconds a token, by what was swept over.

    Raises:
        ValueError: matplotlib is missing, or nothing in the sweep could be planned.
    """
    check_plot(path)
    drawn = [row for row in rows if "tpot" in row]
    if not drawn:
        raise ValueError(f"--sweep {over}: nothing could be planned, there is nothing to draw")
    figure = _figure_class()(figsize=(7, 4), dpi=120, layout="constrained")
    speed = figure.subplots()
    at = range(len(drawn))
    speed.plot(at, [row["tokens_per_s"] for row in drawn], "o-", color="tab:blue", label="tokens/s")
    speed.set_ylabel("tokens/s", color="tab:blue")
    speed.set_xticks(list(at), [str(row["at"]) for row in drawn], rotation=30 if over in ("split", "hardware") else 0, ha="right")
    speed.set_xlabel(over)
    delay = speed.twinx()
    delay.plot(at, [row["tpot"] * 1e3 for row in drawn], "s--", color="tab:red", label="ms a token")
    delay.set_ylabel("ms a token", color="tab:red")
    speed.set_ylim(bottom=0)
    delay.set_ylim(bottom=0)
    speed.grid(alpha=0.3)
    figure.savefig(path)
    return Path(path)
