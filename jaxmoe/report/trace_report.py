"""What a routing trace says, as JSON, as tables for a terminal and as plots: hit rates beside their optimum, reuse, batches, slots by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from jaxmoe.offload import bounds
from jaxmoe.offload.replay import NAMES, OPT, Replay, optimum, regret, replay
from jaxmoe.offload.trace import DECODE, PHASES, PROMPT, TEACHER_FORCED, Trace
from jaxmoe.residency import find_policy

FORMAT = "jaxmoe-trace-report"
VERSION = 1
CURVE_POINTS = 10
"""Numbers of slots at which the hit-rate curves are taken."""
RATIOS = (1, 2, 4)
"""Slots in units of the experts that a token uses, for the rates with foresight."""


def summary(found: Replay, best: Replay) -> dict[str, Any]:
    """A replay as JSON values, beside the optimum at the same slots."""
    sizes = found.bytes_L
    uniform = len(set(found.slots_L.tolist())) == 1
    return {
        "policy": found.policy,
        "slots": int(found.slots_L[0]) if uniform else found.slots_L.tolist(),
        "steps": found.steps,
        "hit_rate": found.hit_rate,
        "opt_hit_rate": best.hit_rate,
        "regret": regret(found, best),
        "hits": int(found.hits_L.sum()),
        "requests": int(found.requests_L.sum()),
        "compulsory": int(found.compulsory_L.sum()),
        "loads": int(found.loads_L.sum()),
        "prompt_loads": int(found.prompt_loads_L.sum()),
        "bytes": None if sizes is None else int(sizes.sum()),
        "bytes_per_step": None if sizes is None else float(sizes.sum() / found.steps),
        "by_layer": _by_layer(found, best),
    }


def _by_layer(found: Replay, best: Replay) -> list[dict[str, Any]]:
    sizes = found.bytes_L
    columns = zip(found.slots_L, found.hits_L, best.hits_L, found.requests_L, found.compulsory_L, found.loads_L, strict=True)
    out = []
    for layer, (slots, hits, opt_hits, requests, compulsory, loads) in enumerate(columns):
        row = {"layer": layer, "slots": slots, "hits": hits, "opt_hits": opt_hits, "requests": requests, "compulsory": compulsory, "loads": loads}
        plain: dict[str, Any] = {name: int(value) for name, value in row.items()}
        plain["hit_rate"] = float(hits / requests) if requests else None
        out.append(plain | {"bytes": None if sizes is None else int(sizes[layer])})
    return out


def describe(trace: Trace) -> dict[str, Any]:
    """What a trace is of, without its arrays."""
    counts = {PHASES[phase].replace("-", "_") + "_tokens": int((trace.phase == phase).sum()) for phase in (PROMPT, DECODE, TEACHER_FORCED)}
    layer_bytes = trace.expert_bytes * trace.experts
    size = {"tokens": len(trace.ids), "steps": trace.n_steps, "sequences": len(np.unique(trace.sequence)), "all_expert_bytes": int(layer_bytes.sum())}
    return dict(trace.meta) | size | counts


def default_slots(trace: Trace) -> tuple[int, ...]:
    """Two and four times the experts that a token uses, as far as there are so many."""
    return tuple(slots for ratio in (2, 4) if (slots := ratio * trace.meta["active"]) <= trace.experts) or (trace.experts,)


def report(trace: Trace, slots: Sequence[int] = (), seed: int = 0, progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """All that a trace allows to be said before a cache size is bought.

    Args:
        trace: at least one step of it is not prompt.
        slots: experts that a layer holds, to be compared; `default_slots` if there are none.
        seed: of the random batches.
        progress: is told what is done next.

    Returns:
        JSON values: `trace`, `replays` (every policy at every number of slots), `curve` (hit rates over slots), `stack_distance`, `reuse`,
        `overlap` by lag, `distinct` by batch, `srp` and `sch` by window, `allocation`. Rates are of steps that are not prompt.

    Raises:
        ValueError: a number of slots is impossible, or the trace holds nothing but its prompt.
    """
    chosen = sorted(set(slots)) or list(default_slots(trace))
    prompt = (trace.phase == PROMPT).any()
    names = [name for name in NAMES if not (find_policy(name).foresees or name == "eam") and (prompt or name != "static")]
    replays = []
    for count in chosen:
        best = replay(trace, count, OPT)
        pool = replay(trace, count, OPT, pool=True)
        for name in names:
            progress(f"{name}, {count} slots")
            found = best if name == OPT else replay(trace, count, name)
            own = find_policy(name)
            replays.append(summary(found, pool if own.shared else best if own.allocate is None else optimum(trace, found)))
    progress("hit rates over slots")
    histogram_LD = bounds.distance_histogram(trace)
    made = {"format": FORMAT, "version": VERSION, "trace": describe(trace), "slots": chosen, "seed": seed, "replays": replays}
    made |= {"curve": _curve(trace, histogram_LD, chosen), "stack_distance": _distances(histogram_LD)}
    progress("reuse and batches")
    overlap = [{"lag": lag, "share": share} for lag, share in zip(bounds.LAGS, bounds.overlap(trace), strict=True)]
    made |= {"reuse": bounds.reuse(trace), "overlap": overlap, "distinct": bounds.distinct_experts(trace, seed=seed)}
    progress("foresight")
    made |= {"srp": _srp(trace), "sch": _sch(trace), "allocation": _allocation(trace, histogram_LD, chosen)}
    return made


def _curve(trace: Trace, histogram_LD: np.ndarray, chosen: Sequence[int]) -> dict[str, list]:
    """LRU's and LFU's hit rates and the optimum's over numbers of slots, the chosen ones among them. LRU's come from the stack distances."""
    spread = np.unique(np.geomspace(1, trace.experts, CURVE_POINTS).round().astype(int)).tolist()
    points = sorted({*spread, *chosen})
    lru = (histogram_LD.sum(0).cumsum()[points] / histogram_LD.sum()).tolist()
    return {"slots": points, "lru": lru} | {name: [replay(trace, count, name).hit_rate for count in points] for name in ("lfu", OPT)}


def _distances(histogram_LD: np.ndarray) -> dict[str, Any]:
    """Requests by LRU stack distance, all layers together, 1 to E, and their share up to each; first uses apart."""
    histogram_D = histogram_LD.sum(0)
    shares = histogram_D[1:-1].cumsum() / histogram_D.sum()
    return {"requests": histogram_D[1:-1].tolist(), "share_within": shares.tolist(), "first_uses": int(histogram_D[-1])}


def _srp(trace: Trace) -> list[dict[str, Any]]:
    return [{"window": window} | found for window in bounds.WINDOWS if (found := bounds.srp(trace, window)) is not None]


def _sch(trace: Trace) -> list[dict[str, Any]]:
    """By slots and window: the segment cache hit rate, and the rate of the best use of the same foresight."""
    counts = [(ratio, ratio * trace.meta["active"]) for ratio in RATIOS if ratio * trace.meta["active"] <= trace.experts]
    windows = [window for window in bounds.WINDOWS if window < trace.n_steps]
    out = []
    for ratio, slots in counts:
        for window in windows:
            rates = {"sch": bounds.sch(trace, window, slots), "lookahead": bounds.lookahead(trace, window, slots)}
            out.append({"window": window, "rho": ratio, "slots": slots} | rates)
    return out


def _allocation(trace: Trace, histogram_LD: np.ndarray, chosen: Iterable[int]) -> list[dict[str, Any]]:
    """What slots that differ by layer would gain under LRU, chosen with hindsight on this very trace: a bound on the gain."""
    curves_LC = histogram_LD[:, :-1].cumsum(1)
    requests = int(histogram_LD.sum())
    out = []
    for count in chosen:
        slots_L = bounds.allocate(curves_LC, count * trace.layers, min(count, trace.meta["active"]))
        hits = int(curves_LC[np.arange(trace.layers), slots_L].sum())
        uniform = {"slots": count, "uniform_hit_rate": int(curves_LC[:, count].sum()) / requests}
        out.append(uniform | {"hindsight_hit_rate": hits / requests, "slots_by_layer": slots_L.tolist()})
    return out


# --- Terminal


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{100 * share:.1f}"


def replay_tables(found: dict[str, Any]) -> Group:
    """A `summary` for a terminal: the whole, then its layers."""
    whole = _replay_table([found], "replay")
    layers = Table("layer", "slots", "requests", "hits", "hit %", "best hits", "first uses", "loads", title="by layer")
    for row in found["by_layer"]:
        cells = (row["layer"], row["slots"], row["requests"], row["hits"], percent(row["hit_rate"]), row["opt_hits"], row["compulsory"], row["loads"])
        layers.add_row(*map(str, cells))
    return Group(whole, _right(layers))


def report_tables(made: dict[str, Any]) -> Group:
    """A `report` for a terminal."""
    about = made["trace"]
    tokens = ", ".join(f"{about[f'{kind}_tokens']} {kind.replace('_', '-')}" for kind in ("prompt", "decode", "teacher_forced"))
    head = f"{about['model']}: {about['layers']} layers of {about['experts']} experts, {about['active']} a token; {about['tokens']} tokens ({tokens})"
    reuse = made["reuse"]
    again = (
        f"reuse: median {reuse['median']:.0f} steps; within 1 step {percent(reuse['within_1'])} %, within 8 {percent(reuse['within_8'])} %, "
        f"first uses {percent(reuse['first'])} %"
    )
    tables = [_replay_table(made["replays"], "hit rates"), _distinct_table(made), _foresight_table(made), _allocation_table(made)]
    return Group(head, again, *tables)


def _replay_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table("policy", "slots", "hit %", "best %", "regret %", "first %", "loads/step", "MB/step", title=title)
    for row in rows:
        slots = str(row["slots"]) if isinstance(row["slots"], int) else f"{min(row['slots'])}-{max(row['slots'])}"
        rates = (row["hit_rate"], row["opt_hit_rate"], row["regret"], row["compulsory"] / row["requests"])
        size = "-" if row["bytes_per_step"] is None else f"{row['bytes_per_step'] / 1e6:,.1f}"
        table.add_row(row["policy"], slots, *map(percent, rates), f"{row['loads'] / row['steps']:.1f}", size)
    return _right(table)


def _distinct_table(made: dict[str, Any]) -> Table:
    table = Table("tokens", "consecutive", "random", "even and independent", title="distinct experts a layer")
    for row in made["distinct"]:
        consecutive = "-" if row["consecutive"] is None else f"{row['consecutive']:.1f}"
        table.add_row(str(row["batch"]), consecutive, f"{row['random']:.1f}", f"{row['iid']:.1f}")
    return _right(table)


def _foresight_table(made: dict[str, Any]) -> Table:
    table = Table("steps seen", "slots", "SCH %", "best use %", "SRP %", "SRP rho", title="foresight")
    fixed = {row["window"]: row for row in made["srp"]}
    for row in made["sch"]:
        group = fixed.get(row["window"])
        best = ("-", "-") if group is None else (percent(group["srp"]), f"{group['rho']:.2f}")
        table.add_row(str(row["window"]), str(row["slots"]), percent(row["sch"]), percent(row["lookahead"]), *best)
    return _right(table)


def _allocation_table(made: dict[str, Any]) -> Table:
    table = Table("slots", "same for all, hit %", "in hindsight, hit %", "fewest", "most", title="slots by layer (LRU)")
    for row in made["allocation"]:
        by_layer = row["slots_by_layer"]
        rates = (percent(row["uniform_hit_rate"]), percent(row["hindsight_hit_rate"]))
        table.add_row(str(row["slots"]), *rates, str(min(by_layer)), str(max(by_layer)))
    return _right(table)


def _right(table: Table) -> Table:
    """Numbers to the right, titles to the left."""
    table.title_justify, table.box, table.padding = "left", box.SIMPLE_HEAD, (0, 1, 0, 0)
    for column in table.columns:
        column.justify = "left" if column.header == "policy" else "right"
    return table


# --- Plots


def check_plots(folder: str | Path) -> None:
    """Finds out before a long run whether `plots` can draw.

    Raises:
        ValueError: matplotlib is missing, or the folder is a file.
    """
    _figure_class()
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{folder}: is a file, not a folder")


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib, the extra `plot`: pip install 'jaxmoe[plot]'") from error
    return Figure


def plots(made: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draws a `report` into PNG files: hit_rate, layers, stack_distance, distinct.

    Raises:
        ValueError: matplotlib is missing.
        OSError: the folder can't be written.
    """
    check_plots(folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(made, draw, folder / f"{name}.png") for name, draw in DRAWINGS.items()]


def _draw(made: dict[str, Any], draw: Callable, path: Path) -> Path:
    figure = _figure_class()(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    draw(axes, made)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False)
    figure.suptitle(made["trace"]["model"], fontsize=10)
    figure.savefig(path)
    return path


def _draw_hit_rate(axes, made: dict[str, Any]) -> None:
    curve = made["curve"]
    for name, label in (("lru", "LRU"), ("lfu", "LFU"), (OPT, "optimum")):
        axes.plot(curve["slots"], [100 * rate for rate in curve[name]], marker=".", label=label)
    axes.set(xlabel="slots a layer", ylabel="hit rate, %", ylim=(0, 100))


def _draw_layers(axes, made: dict[str, Any]) -> None:
    slots = made["slots"][-1]
    for row in made["replays"]:
        if row["slots"] == slots and row["policy"] != "static":
            rates = [np.nan if layer["hit_rate"] is None else 100 * layer["hit_rate"] for layer in row["by_layer"]]
            axes.plot(range(len(rates)), rates, marker=".", label={OPT: "optimum"}.get(row["policy"], row["policy"]))
    axes.set(xlabel="layer", ylabel=f"hit rate at {slots} slots, %", ylim=(0, 100))


def _draw_distances(axes, made: dict[str, Any]) -> None:
    shares = made["stack_distance"]["share_within"]
    axes.step(range(1, len(shares) + 1), [100 * share for share in shares], where="post")
    axes.set(xlabel="LRU stack distance", ylabel="requests within, %", ylim=(0, 100))


def _draw_distinct(axes, made: dict[str, Any]) -> None:
    rows = made["distinct"]
    for name, label in (("consecutive", "consecutive tokens"), ("random", "random tokens"), ("iid", "even and independent")):
        axes.plot([row["batch"] for row in rows], [np.nan if row[name] is None else row[name] for row in rows], marker=".", label=label)
    axes.set(xlabel="tokens", ylabel="distinct experts a layer")
    axes.set_xscale("log", base=2)


DRAWINGS = {"hit_rate": _draw_hit_rate, "layers": _draw_layers, "stack_distance": _draw_distances, "distinct": _draw_distinct}
