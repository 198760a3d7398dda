"""Tables of docs/serving.md, from the records of scripts/bench_serve.py: comparisons in virtual time, and runs over links, on queues and under load.

One function a table; each takes all records and gives "" where its own are not there. Knows records alone, none of what made them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmoe.report.record import table

Records = Sequence[Mapping[str, Any]]
Row = dict[str, Any]

ROUTING = (("routing", "settings.routing"), ("reuse %", "shown.reuse", ".0f"))
"""Columns that every comparison in virtual time begins with."""
ARMS = (
    "whole", "chunked", "layered", "one at a time", "arrival", "turns", "no regrouping", "greedy", "grouped", "recompute", "swap", "throughput",
    "prefix groups", "server",
)  # fmt: skip
"""The order of rows, by how an arm's name begins: controls first."""


def prefill(records: Records) -> str:
    """A long prompt beside streams that decode, in virtual time: by groups of layers, in chunks, whole."""
    rows = []
    for r in _virtual(records, "prefill"):
        c = r["counters"]
        shown = {"bytes": r["bytes"]["prompt_bytes"] / 1e9, "times": c["prompt_loads"] / c["prompt_asked"]}
        beside = {"ttft": _times(r, "ttft / whole"), "ttft_chunked": _times(r, "ttft / chunked, 256"), "gap_whole": _times(r, "gap / whole")}
        rows.append(_shown(r, **shown, **beside, gap_chunked=_times(r, "gap / chunked, 256"), unloaded=c["gap"] / c["gap_unloaded"]))
    columns = [
        *ROUTING, ("prompts", "settings.arm"), ("experts GB", "shown.bytes", ".1f"), ("times those asked for", "shown.times", ".2f"),
        ("first token s", "counters.ttft", ".2f"), ("x whole", "shown.ttft", ">"), ("x chunks of 256", "shown.ttft_chunked", ">"),
        ("longest gap s", "counters.gap", ".3f"), ("bound", "counters.gap_bound", ".3f"), ("x whole", "shown.gap_whole", ">"),
        ("x chunks of 256", "shown.gap_chunked", ">"), ("x a gap without the prompt", "shown.unloaded", ".1f"),
    ]  # fmt: skip
    return _table(rows, columns)


def grouping(records: Records) -> str:
    """Which sequences decode together, in virtual time."""
    rows = []
    for r in _virtual(records, "grouping"):
        c, s = r["counters"], r["settings"]
        each = {"distinct": c["distinct"] / c["decoded"] / s["layers"], "mb": c["bytes_per_token"] / 1e6, "ms": 1000 * c["per_token"]}
        beside = {name: _times(r, f"{key} / arrival") for name, key in (("few", "distinct"), ("less", "bytes_per_token"), ("time", "per_token"))}
        rows.append(_shown(r, **each, **beside, alone=_times(r, "per_token / one at a time")))
    columns = [
        *ROUTING, ("decode together", "settings.arm"), ("distinct experts a layer and token", "shown.distinct", ".2f"),
        ("x arrival", "shown.few", ">"), ("MB a token", "shown.mb", ",.0f"), ("x arrival", "shown.less", ">"), ("ms a token", "shown.ms", ".1f"),
        ("x arrival", "shown.time", ">"),
        ("x one at a time", "shown.alone", ">"), ("passed over, steps", "counters.waited", "d"),
    ]  # fmt: skip
    return _table(rows, columns)


def preemption(records: Records) -> str:
    """Putting sequences aside, in virtual time: what coming back takes."""
    rows = []
    for r in _virtual(records, "preemption"):
        c = r["counters"]
        shown = {"resume": 1000 * c["resume"], "extra": 1000 * c["resume_extra"], "gb": r["bytes"]["expert_bytes"] / 1e9}
        rows.append(_shown(r, **shown, times=_times(r, "resume_extra / recompute"), whole=_times(r, "total / recompute")))
    columns = [
        *ROUTING, ("put aside", "settings.arm"), ("times", "counters.preemptions", "d"), ("tokens computed again", "counters.recomputed", ",d"),
        ("to the next token ms", "shown.resume", ".1f"), ("above a decoding step ms", "shown.extra", ".1f"), ("x recompute", "shown.times", ">"),
        ("experts GB", "shown.gb", ",.0f"), ("all requests s", "counters.total", ".1f"), ("x recompute", "shown.whole", ">"),
    ]  # fmt: skip
    return _table(rows, columns)


def offline(records: Records) -> str:
    """A batch whose prompts begin alike in groups, in virtual time."""
    rows = []
    for r in _virtual(records, "offline"):
        c = r["counters"]
        beside = {name: _times(r, f"{key} / arrival") for name, key in (("few", "computed"), ("time", "total"))}
        rows.append(_shown(r, over=c["computed"] / c["unique"], gb=r["bytes"]["expert_bytes"] / 1e9, **beside))
    columns = [
        *ROUTING, ("order", "settings.arm"), ("prompt tokens computed", "counters.computed", ",d"), ("times the fewest", "shown.over", ".2f"),
        ("x arrival", "shown.few", ">"), ("experts GB", "shown.gb", ",.0f"), ("all requests s", "counters.total", ".1f"),
        ("x arrival", "shown.time", ">"),
    ]  # fmt: skip
    return _table(rows, columns)


def goodput(records: Records) -> str:
    """The load that is borne within limits, in virtual time: a row for each routing and pair of limits."""
    pairs: dict[tuple[str, float], dict[bool, Mapping[str, Any]]] = {}
    for r in _virtual(records, "goodput", "goodput, tpot x 4"):
        pairs.setdefault((r["settings"]["routing"], r["settings"]["tpot_times"]), {})[r["settings"]["arm"] == GOODPUT_CONTROL] = r
    rows = []
    for (_, times), both in pairs.items():
        if len(both) == 2:
            shown = {"limits": f"{both[False]['settings']['ttft_times']:g}, {times:g}", "control": both[True]["counters"]["goodput_rate"]}
            rows.append(_shown(both[False], **shown, times=_times(both[False], f"goodput_rate / {GOODPUT_CONTROL}")))
    columns = [
        *ROUTING, ("limits, times alone: first token, further ones", "shown.limits", ">"), (GOODPUT_CONTROL, "shown.control", ".2f"),
        ("layered, swap, expert-aware", "counters.goodput_rate", ".2f"), ("times", "shown.times", ">"),
    ]  # fmt: skip
    return _table(rows, columns)


GOODPUT_CONTROL = "chunked, recompute, fcfs"
"""What the other arm's load is set beside."""


def link(records: Records) -> str:
    """Long prompts over an emulated link, on a CPU."""
    return _scenes([r for r in records if r["name"] == "serve_link"])


def device(records: Records) -> str:
    """Long prompts on a GPU; a CPU's records are checks of the code."""
    return _scenes([r for r in records if r["name"] == "serve_device" and r["device"]["platform"] != "cpu"])


def _scenes(records: Records) -> str:
    """Times of the scenes of `serve_bench`, and layered prefill's ratios to each other way with their intervals."""
    rows = []
    for r in _ordered(records, "model", "scene"):
        s, c = r["settings"], r["counters"]
        controls = sorted({key.partition(" / ")[2] for key in c if " / " in key}, key=_rank)
        ratios = {what: [(c.get(f"{what} / {control}"), control) for control in controls] for what in ("ttft_mean", "gap_worst")}
        beside = {what: ", ".join(f"{_interval(ratio)} {control}" for ratio, control in each if ratio) for what, each in ratios.items()}
        rows.append(_shown(r, model=s.get("model", ""), prompts=f"{s['prompts']} of {s['tokens']:,}", once=c["once"], **beside))
    columns = [
        ("model", "shown.model"), ("prompts", "shown.prompts"), ("computed", "settings.arm"), ("experts, times all once", "shown.once", ".2f"),
        ("first token s, mean", "timings.ttft_mean.median", ".2f"), ("times that of", "shown.ttft_mean"),
        ("worst gap s", "timings.gap_worst.median", ".3f"), ("bound", "counters.gap_bound", ".3f"), ("times that of", "shown.gap_worst"),
        ("rounds", "settings.rounds", "d"),
    ]  # fmt: skip
    return _table(rows, columns)


def queue(records: Records) -> str:
    """A mixed queue on the engine with a part of the experts on the device."""
    rows = []
    for r in _ordered((r for r in records if r["name"] == "serve_queue"), "spec"):
        s, c = r["settings"], r["counters"]
        shown: Row = {"at": f"{s['batch']} of {s['slots']}", "mb": c["bytes_per_token"] / 1e6, "hits": 100 * c["decode_hit_rate"]}
        shown["work"] = 1000 * r["timings"]["processor"]["median"] / c["tokens"]
        less = {f"less{i}": _times(r, f"bytes_per_token / {control}") for i, control in enumerate(QUEUE_CONTROLS)}
        fast = {f"fast{i}": _times(r, f"tokens_per_second / {control}") for i, control in enumerate(QUEUE_CONTROLS)}
        rows.append(_shown(r, **shown, **less, **fast))
    columns = [
        ("way", "settings.arm"), ("decode of those that run", "shown.at"),
        ("distinct experts a layer and token", "counters.distinct_per_token", ".2f"), ("hits %", "shown.hits", ".0f"),
        ("MB a token", "shown.mb", ".2f"), *((f"x {c}", f"shown.less{i}", ">") for i, c in enumerate(QUEUE_CONTROLS)),
        ("tokens/s", "counters.tokens_per_second", ".0f"), *((f"x {c}", f"shown.fast{i}", ">") for i, c in enumerate(QUEUE_CONTROLS)),
        ("processor ms a token", "shown.work", ".2f"), ("passed over, steps", "counters.waited", "d"),
    ]  # fmt: skip
    return _table(rows, columns)


QUEUE_CONTROLS = ("arrival", "no regrouping, in turns", "one at a time")
"""What ways to serve a queue are set beside, in columns; all ways have rows."""


def opened(records: Records) -> str:
    """Requests that come when they come, at several rates."""
    rows = []
    found = [r for r in records if r["name"] == "serve_open"]
    for r in sorted(found, key=lambda r: (r["settings"]["model"], r["counters"]["rate"], _rank(r["settings"]["arm"]))):
        c = r["counters"]
        numbers = {f"{what}_{which}": _or_blank(c[what].get(which), ".3f") for what, which in OPEN}
        within = {f"x{times}": 100 * c[f"tpot_x{times}"]["attainment"] for times in (2, 4)}
        part = _or_blank(r["settings"].get("part_of_capacity"), ".2f")
        rows.append(_shown(r, **numbers, **within, part=part, done=f"{c['done']} of {c['requests']}"))
    columns = [
        ("model", "settings.model"), ("way", "settings.arm"), ("requests/s", "counters.rate", ".3g"),
        ("of what the control bears at once", "shown.part", ">"), ("done", "shown.done", ">"),
        *((f"{what.upper()} {which} s", f"shown.{what}_{which}", ">") for what, which in OPEN),
        ("within limits %, TPOT x 2", "shown.x2", ".0f"), ("TPOT x 4", "shown.x4", ".0f"),
    ]  # fmt: skip
    return _table(rows, columns)


OPEN = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("itl", "p99"))
"""Numbers of a run under load that are shown."""


def tables(records: Records) -> dict[str, str]:
    """The page's tables by marker; those without records are left out."""
    makers = {
        "serve_prefill": prefill, "serve_grouping": grouping, "serve_preemption": preemption, "serve_offline": offline, "serve_goodput": goodput,
        "serve_link": link, "serve_device": device, "serve_queue": queue, "serve_open": opened,
    }  # fmt: skip
    found = {name: make(records) for name, make in makers.items()}
    return {name: text for name, text in found.items() if text}


# --- Rows


def _virtual(records: Records, *what: str) -> list[Mapping[str, Any]]:
    """Of comparisons in virtual time; recorded routing before drawn, then by reuse and arm."""
    found = [r for r in records if r["name"] == "serve_virtual" and r["settings"]["what"] in what]

    def place(r: Mapping[str, Any]) -> tuple:
        s = r["settings"]
        return s["source"].startswith("drawn"), s["reuse"], s["routing"], _rank(s["arm"])

    return sorted(found, key=place)


def _ordered(found: Iterable[Mapping[str, Any]], *names: str) -> list[Mapping[str, Any]]:
    return sorted(found, key=lambda r: ([str(r["settings"].get(name, "")) for name in names], _rank(r["settings"]["arm"])))


def _rank(arm: str) -> tuple[int, list[int], str]:
    """Where an arm stands among others: by how it begins, then by its numbers."""
    place = next((i for i, beginning in enumerate(ARMS) if arm.startswith(beginning)), len(ARMS))
    return place, [int(n) for n in re.findall(r"\d+", arm)], arm


def _shown(r: Mapping[str, Any], **more: Any) -> Row:
    """A record with what is worked out for its row."""
    reuse = {"reuse": 100 * r["settings"]["reuse"]} if "reuse" in r["settings"] else {}
    return {**r, "shown": reuse | more}


def _times(r: Mapping[str, Any], name: str) -> str:
    """A ratio, blank where the record has none: that of a control to itself, or to a number that is 0."""
    return _or_blank(r["counters"].get(name), ".2f")


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, ...]]) -> str:
    return table(rows, columns) if rows else ""
