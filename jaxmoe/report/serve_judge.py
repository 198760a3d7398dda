"""What measured scenes of `serve_bench` come to: ratios with intervals, the cost model's bounds, records, and whether they show what they should."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.engine.serving import cost
from jaxmoe.report import record
from jaxmoe.report.intervals import Interval, limits, resample
from jaxmoe.report.serve_bench import Ready, Sample

MARGIN = 1.1
"""How much longer than the link's time for it a group of layers may take within the worst gap."""
RATIOS = ("ttft_mean", "ttft_worst", "gap_worst", "prompt_bytes", "all_bytes", "seconds")


def numbers(sample: Sample, record_bytes: int) -> dict[str, float]:
    """Of a sample, what is compared."""
    return {
        "ttft_mean": float(np.mean(sample.ttft)), "ttft_worst": max(sample.ttft), "gap_worst": sample.gap, "t_dec": sample.t_dec,
        "t_dec_worst": max(sample.calm), "prompt_bytes": sample.prompt_loads * record_bytes, "all_bytes": sample.all_loads * record_bytes,
        "seconds": sample.seconds,
    }  # fmt: skip


def paired(own: Sequence[float], control: Sequence[float], seed: int = 0) -> Interval:
    """The median over rounds of own / control, each of one round, with its bootstrap interval."""
    ratios = np.asarray(own, np.float64) / np.asarray(control, np.float64)
    drawn = [np.median(np.repeat(ratios, counts)) for counts in resample(len(ratios), seed)]
    return limits(float(np.median(ratios)), np.asarray(drawn))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a comparison ran on. Attributes: `experts` of all layers together; `record_bytes` of one; `gbps` of the link; `emulated`, it is; `about`,
    settings for records."""

    experts: int
    record_bytes: int
    gbps: float
    emulated: bool
    about: Mapping[str, Any]

    @property
    def once(self) -> int:
        """Bytes of every expert."""
        return self.experts * self.record_bytes


def judge(ready: Ready, samples: Sequence[Sample], setting: Setting) -> dict[str, float | bool]:
    """An arm beside the cost model.

    Returns:
        `once`, bytes that prompts brought, over those of every expert once. `gap_bound`, the longest gap of the streams before the prompts came plus
        `MARGIN` times the link's time for a step's part of the prompts (layered prefill, arXiv 2510.08055), and `gap_holds`, whether the worst gap
        after they came keeps it, each the median over rounds; `gap_bound_typical` has the streams' median gap in place of their longest.
        Where computing was timed: `compute`, seconds; `rho`, the link's time for every expert once over that; `gap_model_overlapped` and
        `gap_model_serial`, the cost model's gap with copies beside computing and after it; `gap_model_holds`, at most `MARGIN` times the latter.
    """
    a, scene, bandwidth = ready.arm, ready.scene, setting.gbps * 1e9
    typical, gap = (float(np.median([getattr(s, name) for s in samples])) for name in ("t_dec", "gap"))
    t_dec = float(np.median([max(s.calm) for s in samples]))
    stream = float(np.median([s.prompt_loads for s in samples])) * setting.record_bytes
    size, compute = setting.once, ready.compute
    # Steps that the prompts take: so many calls share what they brought.
    calls = a.groups if a.prefill == "layered" else scene.prompts if a.prefill == "whole" else -(-scene.prompts * scene.tokens // a.chunk)
    part = MARGIN * stream / calls / bandwidth
    out: dict[str, float | bool] = {"once": stream / size, "t_dec_worst": t_dec, "gap_bound": t_dec + part, "gap_bound_typical": typical + part}
    out["gap_holds"] = gap <= out["gap_bound"]
    if compute is not None:
        for name, overlapped in (("overlapped", True), ("serial", False)):
            out[f"gap_model_{name}"] = cost.layered(stream, bandwidth, calls, t_dec, compute, overlapped).gap
        out |= {"compute": compute, "rho": size / bandwidth / compute, "gap_model_holds": gap <= MARGIN * out["gap_model_serial"]}
    return out


def records(ready: Sequence[Ready], samples: Mapping[str, Mapping[str, Sequence[Sample]]], setting: Setting, name: str) -> dict[str, dict[str, Any]]:
    """A record an arm and scene, by its file's stem.

    The bound is the least that a scene can take: the fewest bytes of any arm over the link, computing beside it.

    Args:
        ready: arms as they ran.
        samples: of `serve_bench.rounds`.
        setting: see there.
        name: of the records.
    """
    out: dict[str, dict[str, Any]] = {}
    for one in ready:
        own = [r for r in ready if r.scene == one.scene]
        found = {r.arm.name: [numbers(s, setting.record_bytes) for s in samples[one.scene.name][r.arm.name]] for r in own}
        least = min(_median(rows, "prompt_bytes") for rows in found.values()) / setting.gbps / 1e9
        computed = min((r.compute for r in own if r.compute is not None), default=0.0)
        counters: dict[str, Any] = dict(judge(one, samples[one.scene.name][one.arm.name], setting)) | {"compiles": 0}
        if one.arm.prefill == "layered":
            counters |= beside(found, one.arm.name, [r.arm.name for r in own if r.arm.prefill != "layered"])
        out[f"{name}-{one.scene.name}-{one.arm.name}".replace(", ", "-").replace(" ", "-")] = _record(
            one, found[one.arm.name], counters, setting, name, max(least, computed), [r.arm.name for r in own if r is not one]
        )
    return out


def beside(found: Mapping[str, Sequence[Mapping[str, float]]], arm: str, controls: Sequence[str]) -> dict[str, Any]:
    """Ratios of an arm's numbers to the controls', "number / control" -> value and interval; those whose control is 0 are left out."""
    out = {}
    for control in controls:
        for what in RATIOS:
            own, other = ([row[what] for row in found[name]] for name in (arm, control))
            if all(other):
                out[f"{what} / {control}"] = dataclasses.asdict(paired(own, other))
    return out


def _record(
    one: Ready, rows: Sequence[Mapping[str, float]], counters: Mapping[str, Any], setting: Setting, name: str, least: float, others: list[str]
) -> dict[str, Any]:
    settings = {
        **setting.about, **dataclasses.asdict(one.scene), "scene": one.scene.name, "arm": one.arm.name, "prefill": one.arm.prefill,
        "groups": one.arm.groups, "chunk": one.arm.chunk, "link_gbps": setting.gbps, "link_emulated": setting.emulated, "rounds": len(rows),
        "in_turn_with": others,
    }  # fmt: skip
    timings = {what: record.timing([row[what] for row in rows]) for what in ("ttft_mean", "ttft_worst", "gap_worst", "t_dec", "seconds")}
    bytes = {what: int(_median(rows, what)) for what in ("prompt_bytes", "all_bytes")} | {"once": setting.once}
    return record.make_record(
        name=name, spec_hash=one.engine.model_spec.hash(), settings=settings, seeds={"prompts": 0}, timings=timings, compile_seconds=one.warm_seconds,
        bytes=bytes, counters=counters, bound=record.make_bound("overlapped", 1 / least, 1 / timings["seconds"]["median"], "scenes/s"),
    )  # fmt: skip


def _median(rows: Sequence[Mapping[str, float]], what: str) -> float:
    return float(np.median([row[what] for row in rows]))


def claims(made: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """What layers by groups are to show, and whether these records show it, one line each."""
    rows = list(made.values())
    out: list[tuple[str, bool]] = []
    for scene in dict.fromkeys(r["settings"]["scene"] for r in rows):
        own = [r for r in rows if r["settings"]["scene"] == scene]
        chunks = [r for r in own if r["settings"]["prefill"] == "chunked" and r["settings"]["chunk"] == 256]
        for r in (r for r in own if r["settings"]["prefill"] == "layered"):
            c, who = r["counters"], f"{scene}: {r['settings']['arm']}"
            together = r["settings"]["prompts"]
            what = "a prompt" if together == 1 else f"{together} prompts"
            out.append((f"{who} brings {c['once']:.2f} x every expert once for {what}; at most 1.05", c["once"] <= 1.05))
            for other in chunks:
                times = other["bytes"]["prompt_bytes"] / max(1, r["bytes"]["prompt_bytes"])
                out.append((f"{who}: chunks of 256 bring {times:.2f} x that; at least 6", times >= 6))
            gap = r["timings"]["gap_worst"]["median"]
            out.append((f"{who}: worst gap {gap:.3f} s, by the link alone at most {c['gap_bound']:.3f} s", bool(c["gap_holds"])))
            if "gap_model_holds" in c:
                limit = MARGIN * c["gap_model_serial"]
                out.append((f"{who}: worst gap {gap:.3f} s, with computing at most {limit:.3f} s", bool(c["gap_model_holds"])))
            for name, found in c.items():
                if isinstance(found, Mapping) and name.split(" / ")[0] in ("ttft_mean", "ttft_worst", "gap_worst"):
                    text = f"{who}: {name} {found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f}); below 1 throughout"
                    out.append((text, found["high"] < 1))
    return out
