"""Tables and plots of the records of `jaxmoe.report.policy_records`: no number in docs/offloading.md's tables is typed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.report import policy_claims, record
from jaxmoe.report.policy_claims import only, part
from jaxmoe.report.trace_report import _figure_class

Records = Sequence[Mapping[str, Any]]
Rows = Sequence[Mapping[str, Any]]

NAMES = {"": "", "none": "its own recent rates", "one pool": "one pool for all layers", "calibrated": "calibrated weights"}
BATCHED = (("lru", ""), ("lfu", ""), ("plec", "none"), ("plec", "frequency"), ("plec", "path"), ("plec", "readme"), ("plec", "oracle, 4 steps"),
           ("lookahead", "path"), ("opt", ""), ("opt", "one pool"))  # fmt: skip
LINES = (("lru", ""), ("lfu", ""), ("fate", ""), ("hobbit", ""), ("plec", "path"), ("lookahead", "path"), ("plec", "oracle, 4 steps"), ("opt", ""))


def tables(records: Records) -> dict[str, str]:
    """Every table that the records allow, by the name of its marker."""
    found = {
        "policies": policies_table(only(records, "policies")),
        "policies_single": single_table([r for r in records if r["name"] == "policies" and not part(r)]),
        "predictors": predictors_table([r for r in records if r["name"] == "predictors"]),
        "batches": batches_table(only(records, "batches")),
        "events_recall": recall_table([r for r in records if r["name"] == "events" and not part(r)]),
        "events_predictors": prefetch_table(only(records, "events")),
        "claims": claims_table(records),
    }
    return {name: table for name, table in found.items() if table}


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose cells are text."""
    made = [{f"c{i}": cell for i, cell in enumerate(line)} for line in lines]
    return record.table(made, [(c, f"c{i}") if i < 2 else (c, f"c{i}", ">") for i, c in enumerate(columns)]) if made else ""


def percent(value: float, low: float | None = None, high: float | None = None) -> str:
    """A share in percent, with its limits."""
    return f"{100 * value:.1f}" + ("" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})")


def points(value: float, low: float, high: float) -> str:
    """A difference of shares in percentage points, with its limits."""
    return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _by_arm(rows: Rows) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
    out: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault((row["policy"], row["variant"]), {})[row["slots"]] = row
    return out


def policies_table(found: Mapping[str, Any] | None) -> str:
    """All policies on the recorded domains: hit rates by slots, and what the middle number of slots says besides."""
    if found is None:
        return ""
    rows = found["counters"]["rows"]
    slots = sorted({row["slots"] for row in rows})
    middle = slots[len(slots) // 2]
    columns = ["policy", "fed by, or set how", *(f"hits % at {n} slots" for n in slots)]
    columns += [f"regret % at {middle}", f"loads a step at {middle}", f"over lfu at {middle}, points"]
    lines = []
    for (policy, variant), at in _by_arm(rows).items():
        rates = [percent(at[n]["hit"], at[n]["low"], at[n]["high"]) for n in slots]
        row = at[middle]
        over = points(row["gain"], row["gain_low"], row["gain_high"]) if policy != "lfu" else ""
        lines.append([policy, NAMES.get(variant, variant), *rates, f"{100 * row['regret']:.0f}", f"{row['loads']:.1f}", over])
    return markdown(columns, lines)


def single_table(found: Records) -> str:
    """Hit rates on the traces of one prompt."""
    lines, slots = [], sorted({row["slots"] for r in found for row in r["counters"]["rows"]})
    for r in found:
        for (policy, variant), at in _by_arm(r["counters"]["rows"]).items():
            rates = [percent(at[n]["hit"], at[n]["low"], at[n]["high"]) if n in at else "" for n in slots]
            lines.append([r["settings"]["model"], policy, NAMES.get(variant, variant), *rates])
    return markdown(["model", "policy", "fed by, or set how", *(f"hits % at {n} slots" for n in slots)], lines)


def predictors_table(found: Records) -> str:
    """Recall by width and distance."""
    lines = []
    for r in sorted(found, key=lambda r: not part(r)):
        model = "shipped, domains" if part(r) else r["settings"]["model"]
        for row in r["counters"]["rows"]:
            over = [points(*row[f"over_{other}"][0]) if f"over_{other}" in row else "" for other in ("frequency", "previous")]
            lines.append([model, row["predictor"], str(row["distance"]), *(percent(*row[w]) for w in ("k", "2k", "3k")), *over])
    return markdown(["text", "predictor", "layers ahead", "recall % at k", "at 2k", "at 3k", "over frequency at k, points", "over previous"], lines)


def batches_table(found: Mapping[str, Any] | None) -> str:
    """Batches of mixed domains, with the same bytes."""
    if found is None:
        return ""
    rows = found["counters"]["rows"]
    slots = sorted({row["slots"] for row in rows})
    at = {(row["batch"], row["policy"], row["variant"], row["slots"]): row for row in rows}
    lines = []
    for batch in sorted({row["batch"] for row in rows}):
        for policy, variant in BATCHED:
            mine = [at.get((batch, policy, variant, n)) for n in slots]
            if all(row is None for row in mine):
                continue
            cells = [text for row in mine if row for text in _rate_and_gain(row)]
            lines.append([str(batch), policy, NAMES.get(variant, variant), f"{mine[0]['distinct']:.1f}" if mine[0] else "", *cells])
    columns = ["batch", "policy", "fed by", "experts a layer's step asks for"]
    return markdown([*columns, *(text for n in slots for text in (f"hits % at {n} slots", f"over lru at {n}, points"))], lines)


def _rate_and_gain(row: Mapping[str, Any]) -> tuple[str, str]:
    return percent(row["hit"], row["low"], row["high"]), points(row["gain"], row["gain_low"], row["gain_high"])


def recall_table(found: Records) -> str:
    """Speed with prefetching over without, by x and recall."""
    lines = []
    for r in found:
        rows = r["counters"]["rows"]
        at = {(row["slots"], row["recall"], row["x"]): row for row in rows}
        xs = sorted({row["x"] for row in rows})
        for slots in sorted({row["slots"] for row in rows}):
            for recall in sorted({row["recall"] for row in rows}):
                mine = [at[slots, recall, x] for x in xs]
                lines.append([str(slots), f"{100 * recall:.0f}", f"{mine[0]['loads']:.1f}", *(f"{row['gain']:.2f}" for row in mine)])
    xs = sorted({row["x"] for r in found for row in r["counters"]["rows"]})
    return markdown(["slots a layer", "recall %", "misses a layer", *(f"x = {x:g}" for x in xs)], lines)


def prefetch_table(found: Mapping[str, Any] | None) -> str:
    """Speeds over LFU without prefetching."""
    if found is None:
        return ""
    rows = found["counters"]["rows"]
    xs = sorted({row["x"] for row in rows})
    at = {(row["policy"], row["predictor"], row["x"]): row for row in rows}
    arms = list(dict.fromkeys((row["policy"], row["predictor"]) for row in rows))
    lines = [[policy, name, *(f"{(r := at[policy, name, x])['speed']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for x in xs)] for policy, name in arms]
    return markdown(["policy", "prefetching by", *(f"x = {x:g}" for x in xs)], lines)


def claims_table(records: Records) -> str:
    """What was published, what comes out here, and whether it holds."""
    lines = [[c.claim, c.published, c.here, c.holds, c.why] for c in policy_claims.claims(records)]
    return markdown(["claim", "published", "here", "holds", "why"], lines).replace(" ---: ", " --- ")


# --- Plots


def plots(records: Records, folder: Path) -> list[Path]:
    """Draws hit rates over slots, recall over width and speed-up over x, as small SVG files.

    Raises:
        ValueError: matplotlib is missing.
    """
    drawn = (("hit_rates", _draw_hits, only(records, "policies")), ("recall", _draw_recall, only(records, "predictors")),
             ("speed_up", _draw_speed, next((r for r in records if r["name"] == "events" and not part(r)), None)))  # fmt: skip
    return [_draw(draw, found, folder / f"{name}.svg") for name, draw, found in drawn if found is not None]


def _draw(draw, found: Mapping[str, Any], path: Path) -> Path:
    figure_class = _figure_class()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxmoe", "font.size": 9}):
        figure = figure_class(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        draw(axes, found)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
    return path


def _draw_hits(axes, found: Mapping[str, Any]) -> None:
    for arm, at in _by_arm(found["counters"]["rows"]).items():
        if arm in LINES:
            slots = sorted(at)
            rates = [100 * at[n]["hit"] for n in slots]
            errors = [[100 * (at[n]["hit"] - at[n]["low"]) for n in slots], [100 * (at[n]["high"] - at[n]["hit"]) for n in slots]]
            axes.errorbar(slots, rates, errors, marker=".", capsize=2, label=", ".join(filter(None, arm)))
    axes.set(xlabel=f"slots a layer, of {found['settings']['experts']} experts", ylabel="hits, %")


def _draw_recall(axes, found: Mapping[str, Any]) -> None:
    for row in found["counters"]["rows"]:
        if row["distance"] == 1:
            axes.plot([1, 2, 3], [100 * row[w][0] for w in ("k", "2k", "3k")], marker=".", label=row["predictor"])
    axes.set(xlabel="experts named, in units of those that a token uses", ylabel="recall one layer ahead, %", xticks=[1, 2, 3])


def _draw_speed(axes, found: Mapping[str, Any]) -> None:
    rows = found["counters"]["rows"]
    slots = min(row["slots"] for row in rows)
    for recall in sorted({row["recall"] for row in rows}):
        mine = sorted((row["x"], row["gain"]) for row in rows if row["slots"] == slots and row["recall"] == recall)
        axes.plot(*zip(*mine, strict=True), marker=".", label=f"recall {100 * recall:.0f} %")
    axes.set(xlabel="time of one expert's copy over a layer's own time (x)", ylabel=f"speed with prefetching, {slots} slots", xscale="log")
