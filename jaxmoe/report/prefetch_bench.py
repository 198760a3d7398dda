"""Prefetching and predictive caching in the running engine, over an emulated link: every way in turn, on the same tokens, beside what was foretold.

All ways give the same tokens, so that what differs is time and bytes. The event model (`jaxmoe.offload.event_model`) is fitted to one way without
prefetching over the slowest and the fastest link, and to one with it over the fastest, where the host's work for it shows. It then foretells the
others from the routing and from what their predictors said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.load import Checkpoint
from jaxmoe.engine.foresight import Known
from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Offload, load_model, read_store
from jaxmoe.engine.predicting import GATE_DEPTH, fitted, make_foresight
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload import event_model
from jaxmoe.offload.event_model import Costs, Measured
from jaxmoe.offload.link import Link
from jaxmoe.offload.predictors import find_predictor, foresee_layers
from jaxmoe.offload.prefetch import Prefetch, Switch
from jaxmoe.offload.replay import residents, slots_by_layer, steps_of
from jaxmoe.offload.trace import PROMPT, Trace, used_steps
from pallas_kernels.dispatch import Kernels

SAMPLING = Sampling(temperature=1.0)
STAGING = 8


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of running.

    Attributes:
        name: in tables.
        policy: which experts stay.
        predictor: what foretells them; None for nothing.
        prefetch: whether they are sent ahead.
        switching: whether prefetching turns itself off.
        cold: layers forget their experts after every step, and nothing is sent while anything is computed: load on demand.
    """

    name: str
    policy: str = "lfu"
    predictor: str | None = None
    prefetch: bool = False
    switching: bool = True
    cold: bool = False

    @property
    def trained(self) -> bool:
        """Whether it needs the path predictor."""
        return "path" in (self.predictor or "")


ARMS = (
    Arm("on demand", cold=True),
    Arm("lru", "lru"),
    Arm("lfu"),
    Arm("plec, path", "plec", "path"),
    Arm("lfu + transitions", predictor="transitions", prefetch=True),
    Arm("lfu + path", predictor="path", prefetch=True),
    Arm("lfu + gate", predictor="gate", prefetch=True),
    Arm("lfu + gate, always", predictor="gate", prefetch=True, switching=False),
    Arm("lfu + path+gate", predictor="path+gate", prefetch=True),
    Arm("expertflow: plec + path", "plec", "path", prefetch=True),
    Arm("plec + path+gate", "plec", "path+gate", prefetch=True),
    Arm("lfu + oracle", predictor="oracle", prefetch=True, switching=False),
)
"""The last is a bound: it knows the run."""

ALWAYS = "lfu + gate, always"
"""The way that says what the host's work for prefetching costs."""


@dataclasses.dataclass
class Sample:
    """One run: seconds and steps of decoding, the bank's and the staging's counters in bytes, and the ids."""

    seconds: float
    steps: int
    hits: int
    requests: int
    loads: int
    stall: float
    ahead: dict[str, int]
    gain: float | None
    ids: list[list[int]]


class Bench:
    """A model, its records, and an engine for every way and link."""

    def __init__(self, checkpoint: Checkpoint, slots: int, prompts: list[tuple[int, ...]], new: int, predictor_file: Path | None):
        """
        Args:
            checkpoint: the model, run in float32.
            slots: of each layer.
            prompts: each decoded by itself, batch 1.
            new: tokens to decode of each.
            predictor_file: of the path predictor; without it the ways that need it are left out.
        """
        self.kernels, self.slots, self.new, self.prompts = Kernels.default(), slots, new, prompts
        self._checkpoint, self._file = checkpoint, predictor_file
        self.arms = tuple(a for a in ARMS if not a.trained or predictor_file is not None)
        fused = load_model(checkpoint, "float32", self.kernels)
        self.spec = fused.spec
        self._records = read_store(checkpoint, fused.spec, layout=self.kernels.expert_layout)
        self._positions = max(map(len, prompts)) + new
        engine = Engine(fused, 1, self._positions, False, record=True, gates=True)
        self.ids = [engine.generate([request])[0][0].ids for request in self.requests()]
        self.trace: Trace = engine.trace()
        self._engines: dict[str, tuple[Engine, HostDriven, Link]] = {}
        self._switches: dict[tuple[str, float], Switch] = {}

    def requests(self) -> list[Request]:
        """One a prompt."""
        return [Request(prompt, self.new, SAMPLING) for prompt in self.prompts]

    def foresight(self, arm: Arm) -> Any:
        """What an arm's predictor is, fresh."""
        if arm.predictor is None:
            return None
        if arm.predictor == "oracle":
            return Known(list(self.trace.ids[:, None]), self.spec.moe[0].experts)
        return make_foresight(arm.predictor, self.spec, 1, self._file if arm.trained else None)

    def engine(self, arm: Arm) -> tuple[Engine, HostDriven, Link]:
        """The arm's engine, warmed up."""
        if arm.name not in self._engines:
            model = load_model(self._checkpoint, "float32", self.kernels, offload=Offload(self.slots, policy=arm.policy, store=False))
            link = Link(None)
            every = tuple(range(len(self.spec.moe_layers))) if arm.cold else ()
            ahead = Prefetch(STAGING, switching=arm.switching) if arm.prefetch else None
            programs = HostDriven(
                model.spec, model.bank, self.kernels, False, ExpertSource(model.spec, self._records), link, overlap=not arm.cold, cold=every,
                prefetch=ahead, foresight=self.foresight(arm),
            )  # fmt: skip
            engine = Engine(model, 1, self._positions, False, programs=programs)
            engine.warm_up(requests=self.requests())
            self._engines[arm.name] = engine, programs, link
        return self._engines[arm.name]

    def run(self, arm: Arm, gbps: float) -> Sample:
        """All prompts one after another, each beginning with nothing on the device; what prefetching measured of this link before holds."""
        engine, programs, link = self.engine(arm)
        programs.restart()
        link.gbps = gbps
        if programs.ahead is not None:
            programs.ahead.switch = self._switches.get((arm.name, gbps), Switch())
        size, out = engine.model.bank.record_bytes, Sample(0.0, 0, 0, 0, 0, 0.0, {}, None, [])
        for request in self.requests():
            engine.forget()
            results, t = engine.generate([request])
            out.ids.append(results[0].ids)
            out.seconds, out.steps = out.seconds + t.decode_seconds, out.steps + t.decode_steps
            found = {name: int(counts.sum()) for name, counts in t.decode_experts.items()}
            out.hits, out.requests = out.hits + found["hits"], out.requests + found["requests"]
            out.loads, out.stall = out.loads + found["loads"] * size, out.stall + t.decode_stall_seconds
        if programs.ahead is not None:
            out.ahead = dataclasses.asdict(programs.ahead.counters) | {"held": programs.ahead.held_bytes()}
            out.gain = programs.ahead.switch.gain
            self._switches[arm.name, gbps] = programs.ahead.switch
        return out

    # --- What was foretold

    def foretell(self, arm: Arm, costs: Costs) -> dict[str, Any]:
        """The event model's seconds a step without and with the arm's prefetching, from what its predictor says on the run's own trace."""
        used_SLE, phase_S = used_steps(self.trace)
        decode = np.flatnonzero(phase_S != PROMPT)
        there = self.residents("lfu")
        plain = event_model.run(used_SLE[decode], there[decode], costs)
        if not arm.prefetch:
            return {"without": plain.seconds}
        name = arm.predictor or ""
        params = fitted(name, self.spec, self._file if arm.trained else None, [self.trace] if name == "oracle" else [])
        said = {(s, layer): scores for s, layer, scores in foresee_layers(find_predictor(name), params, self.trace)}
        at = dict(enumerate(decode.tolist()))
        layers = used_SLE.shape[1]
        settings = [event_model.Setting(width, STAGING) for width in (1, 2, 4)]
        outcomes = []
        for depth in range(1, GATE_DEPTH + 1):
            ahead = event_model.ranked(lambda s, layer: said.get((at[s], layer)), len(decode), layers, depth)
            outcomes.append(event_model.gain(used_SLE[decode], there[decode], costs, ahead, settings))
        gain, _, best = max(outcomes, key=lambda found: found[0])
        return {"without": plain.seconds, "with": best.seconds, "gain": gain}

    def residents(self, policy: str) -> np.ndarray:
        """[S, L, E] what each step finds, every prompt beginning with nothing."""
        used_SLE, _ = used_steps(self.trace)
        _, index = np.unique(self.trace.step, return_inverse=True)
        sequence_S = np.zeros(len(used_SLE), np.int64)
        sequence_S[index] = self.trace.sequence
        slots_L = slots_by_layer(self.slots, *used_SLE.shape[1:])
        out = np.zeros_like(used_SLE)
        for sequence in np.unique(sequence_S):
            own = sequence_S == sequence
            out[own] = residents(steps_of(used_SLE[own]), slots_L, policy)
        return out

    def copy_seconds(self, gbps: float) -> float:
        """Of one expert over a link."""
        return float(self.trace.expert_bytes[0]) / gbps / 1e9

    def costs(self, fast: float, fast_gbps: float, slow: float, slow_gbps: float) -> Costs:
        """The event model's costs, from seconds a step of lfu without prefetching over two links."""
        used_SLE, phase_S = used_steps(self.trace)
        decode = phase_S != PROMPT
        pair = (Measured(fast, self.copy_seconds(fast_gbps)), Measured(slow, self.copy_seconds(slow_gbps)))
        return event_model.fit_costs(*pair, used_SLE[decode], self.residents("lfu")[decode])


def rounds(bench: Bench, speeds: tuple[float, ...], count: int) -> Iterator[tuple[Arm, float, Sample]]:
    """Every way at every speed in turn, `count` times over."""
    for i in range(count):
        for gbps in speeds:
            for arm in bench.arms if i % 2 == 0 else reversed(bench.arms):
                yield arm, gbps, bench.run(arm, gbps)




def with_host_cost(bench: Bench, costs: Costs, measured: float, gbps: float) -> Costs:
    """The costs with what the host spends a layer on prefetching, such that `ALWAYS` takes as long as measured over the fastest link."""
    arm = next(a for a in bench.arms if a.name == ALWAYS)
    low, high = 0.0, measured / len(bench.spec.moe_layers)
    for _ in range(8):
        middle = (low + high) / 2
        told = bench.foretell(arm, dataclasses.replace(costs, copy=bench.copy_seconds(gbps), prefetch=middle))["with"]
        low, high = (middle, high) if told < measured else (low, middle)
    return dataclasses.replace(costs, prefetch=(low + high) / 2)


def summarize(bench: Bench, runs: dict[tuple[str, float], list[Sample]], speeds: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row a way and speed: medians over rounds, bytes of the round in the middle, beside lfu without prefetching, loading on demand, and what was
    foretold at the best of some widths and depths for the same steps.
    """
    seconds = {key: float(np.median([s.seconds / s.steps for s in found])) for key, found in runs.items()}
    fast, slow = max(speeds), min(speeds)
    fitted_costs = with_host_cost(bench, bench.costs(seconds["lfu", fast], fast, seconds["lfu", slow], slow), seconds[ALWAYS, fast], fast)
    rows = []
    for (name, gbps), found in runs.items():
        arm = next(a for a in bench.arms if a.name == name)
        gains = [b.seconds / a.seconds for a, b in zip(found, runs["lfu", gbps], strict=True)]
        middle = sorted(found, key=lambda sample: sample.seconds / sample.steps)[len(found) // 2]
        row: dict[str, Any] = {
            "way": name, "gbps": gbps, "ms": 1e3 * seconds[name, gbps], "tokens_per_second": 1 / seconds[name, gbps],
            "over_lfu": float(np.median(gains)), "over_lfu_low": min(gains), "over_lfu_high": max(gains),
            "over_on_demand": seconds["on demand", gbps] / seconds[name, gbps],
            "hit_rate": middle.hits / middle.requests, "stall": float(np.median([s.stall / s.seconds for s in found])),
            "demand_bytes": middle.loads, "same_ids": all(s.ids == bench.ids for s in found),
        }  # fmt: skip
        if arm.prefetch:
            row |= {f"{kind}_bytes": middle.ahead[kind] for kind in ("useful", "late", "wasted")}
            row["switch_gain"] = found[-1].gain
            if arm.policy == "lfu" and (name, gbps) != (ALWAYS, fast):  # what the costs were fitted to is not foretold
                told = bench.foretell(arm, dataclasses.replace(fitted_costs, copy=bench.copy_seconds(gbps)))
                row |= {"foretold_ms": 1e3 * told["with"], "foretold_gain": told["gain"]}
                row["share_of_foretold"] = (row["over_lfu"] - 1) / (told["gain"] - 1) if told["gain"] > 1.005 else None
        elif name == "lfu":
            row["foretold_ms"] = 1e3 * bench.foretell(arm, dataclasses.replace(fitted_costs, copy=bench.copy_seconds(gbps)))["without"]
        rows.append(row)
    return rows
