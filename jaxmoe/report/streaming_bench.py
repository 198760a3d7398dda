"""Streamed experts beside the usual ways of running in little device memory, over an emulated link and at equal bytes.

Every arm is the same engine on the same exact arithmetic: what differs is which experts stay on the device and when the others are sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.load import Checkpoint
from jaxmoe.engine.generate import Engine, Request, Sampling, Timings
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Model, Offload, load_model, read_store
from jaxmoe.engine.text import Tokenizer
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload.link import Link
from pallas_kernels.dispatch import Kernels

PROMPT = 32
SAMPLING = Sampling(temperature=1.0)
"""Greedy text of a small model soon goes round in circles, and its routing with it."""



@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of running. `slots` of each layer; `cold` layers forget their experts after every step; `prefill_tokens` as for `Engine`."""

    name: str
    slots: tuple[int, ...]
    policy: str = "lfu"
    overlap: bool = True
    cold: tuple[int, ...] = ()
    prefill_tokens: int | None = None


def arms(layers: int, experts: int, active: int, slots: int) -> tuple[Arm, ...]:
    """The arms, each with at most the bytes of `slots` slots a layer.

    Of *whole layers*, as many are resident as fit into those bytes; the slots in which the other layers' experts are computed come on top, which
    is to that arm's advantage.
    """
    whole = layers * slots // experts
    rest = tuple(range(whole, layers))
    every = tuple(range(layers))
    uniform = (slots,) * layers
    return (
        Arm("streamed, lfu", uniform),
        Arm("streamed, lru", uniform, "lru"),
        Arm("on demand", uniform, overlap=False, cold=every),
        Arm("on demand, prompt by 32 tokens", uniform, overlap=False, cold=every, prefill_tokens=PROMPT),
        Arm("whole layers resident", (experts,) * whole + (active,) * len(rest), cold=rest, overlap=False),
    )


@dataclasses.dataclass
class Sample:
    """One run: seconds and bytes of prefill and of decode, and the share of requests that were on the device."""

    prefill_seconds: float
    decode_seconds: float
    prefill_bytes: int
    decode_bytes: int
    hit_rate: float
    stall: float
    ids: list[int]
    tokens: int


class Bench:
    """A model, its resident run, and its arms."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, slots: int, new: int, prefill: int, text: str | None):
        """
        Args:
            checkpoint, dtype: the model.
            slots: of each layer.
            new: tokens to decode.
            prefill: tokens of the long prompt.
            text: what prompts are taken from; random tokens if None, or if the model has no tokenizer.
        """
        self.kernels, self.new = Kernels.default(), new
        self.resident = load_model(checkpoint, dtype, self.kernels)
        spec = self.resident.spec
        router, _ = spec.moe
        self.arms = arms(len(spec.moe_layers), router.experts, router.active, slots)
        self._checkpoint, self._dtype = checkpoint, dtype
        self._records = read_store(checkpoint, spec, layout=self.kernels.expert_layout)
        self._positions = max(prefill + 2, PROMPT + new)
        self._engines: dict[tuple[str, float], tuple[Engine, Link]] = {}
        ids = np.random.default_rng(0).integers(3, spec.vocab, prefill).tolist()
        if text is not None and checkpoint.file("tokenizer.json") is not None:
            ids = Tokenizer(checkpoint.folder).encode(text)[:prefill]
        self.short, self.long = tuple(ids[:PROMPT]), tuple(ids)

    def model(self, arm: Arm) -> Model:
        """The model with the arm's slots."""
        return load_model(self._checkpoint, self._dtype, self.kernels, offload=Offload(arm.slots, policy=arm.policy, store=False))

    def engine(self, arm: Arm, gbps: float) -> tuple[Engine, Link]:
        """The arm's engine over a link of this speed, warmed up."""
        if (arm.name, gbps) not in self._engines:
            model, link = self.model(arm), Link(gbps)
            source = ExpertSource(model.spec, self._records)
            programs = HostDriven(model.spec, model.bank, self.kernels, False, source, link, overlap=arm.overlap, cold=arm.cold)
            engine = Engine(model, 1, self._positions, False, programs=programs, prefill_tokens=arm.prefill_tokens)
            fast, link.gbps = link.gbps, None
            for prompt, count in ((self.short, 3), (self.long, 2)):
                engine.generate([Request(prompt, count, SAMPLING)])
            link.gbps = fast
            self._engines[arm.name, gbps] = engine, link
        return self._engines[arm.name, gbps]

    def run_resident(self) -> Sample:
        """The resident model, fused: what computing alone takes."""
        if not hasattr(self, "_plain"):
            self._plain = Engine(self.resident, 1, self._positions, False)
            self._plain.warm_up()
        decoded, t = self._plain.generate([Request(self.short, self.new, SAMPLING)])
        _, p = self._plain.generate([Request(self.long, 2, SAMPLING)])
        return Sample(p.prefill_seconds, t.decode_seconds, 0, 0, 1.0, 0.0, decoded[0].ids, t.decode_tokens)

    def run(self, arm: Arm, gbps: float) -> Sample:
        """A short prompt and the decoding after it, then a long prompt with nothing on the device."""
        engine, _ = self.engine(arm, gbps)
        size = engine.model.bank.record_bytes
        engine.forget()
        decoded, t = engine.generate([Request(self.short, self.new, SAMPLING)])
        engine.forget()
        _, p = engine.generate([Request(self.long, 2, SAMPLING)])
        sent = int(t.decode_experts["loads"].sum())
        hits, asked = (int(t.decode_experts[name].sum()) for name in ("hits", "requests"))
        return Sample(
            p.prefill_seconds, t.decode_seconds, int(p.prefill_experts["loads"].sum()) * size, sent * size, hits / asked,
            t.decode_stall_seconds / t.decode_seconds, decoded[0].ids, t.decode_tokens,
        )  # fmt: skip


def rounds(bench: Bench, speeds: tuple[float, ...], count: int) -> Iterator[tuple[str, float | None, Sample]]:
    """Every arm at every speed in turn, `count` times over, the resident run among them: `(arm, GB/s, sample)`."""
    for _ in range(count):
        yield "resident", None, bench.run_resident()
        for gbps in speeds:
            for arm in bench.arms:
                yield arm.name, gbps, bench.run(arm, gbps)


def link_only(gbps: float, record: int, count: int) -> float:
    """The speed at which an emulated link moves `count` records of `record` bytes when nothing is computed, over the speed it was given."""
    import time

    link = Link(gbps)
    began = time.perf_counter()
    for _ in range(count):
        link.wait(link.send(record))
    return count * record / (time.perf_counter() - began) / 1e9 / gbps


def recorder_cost(make: Callable[[bool], Engine], request: Request, pairs: int) -> list[float]:
    """Relative extra time of a decode step with the recorder on, of each of `pairs` alternating pairs."""
    engines = {on: make(on) for on in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}

    def step(on: bool) -> float:
        _, t = engines[on].generate([request])
        return _per_step(t)

    for on in engines:
        step(on)
    for i in range(pairs):
        for on in (False, True) if i % 2 else (True, False):
            seconds[on].append(step(on))
    return [b / a - 1 for a, b in zip(seconds[False], seconds[True], strict=True)]


def _per_step(timings: Timings) -> float:
    return timings.decode_seconds / timings.decode_steps


def default_folder(name: str, temporary: Path) -> Path:
    """The folder of a model by name: `random-olmoe` is made where it is not there."""
    from jaxmoe.report.random_model import random_olmoe

    return random_olmoe(temporary / "jaxmoe-random-olmoe") if name == "random-olmoe" else Path(name)


def summary(samples: list[Sample], resident: list[Sample], gbps: float) -> dict[str, Any]:
    """Medians of an arm at a speed, beside its bounds: the link's time for its bytes, and what computing takes when all experts are resident."""

    def mid(values) -> float:
        return float(np.median(list(values)))

    out: dict[str, Any] = {"hit_rate": mid(s.hit_rate for s in samples), "stall": mid(s.stall for s in samples)}
    for phase in ("decode", "prefill"):
        seconds, sent = mid(getattr(s, f"{phase}_seconds") for s in samples), mid(getattr(s, f"{phase}_bytes") for s in samples)
        compute = mid(getattr(s, f"{phase}_seconds") for s in resident)
        link = sent / gbps / 1e9
        out |= {
            f"{phase}_seconds": seconds, f"{phase}_bytes": sent, f"{phase}_link_seconds": link, f"{phase}_compute_seconds": compute,
            f"{phase}_overlapped_fraction": max(link, compute) / seconds, f"{phase}_serial_fraction": (link + compute) / seconds,
        }  # fmt: skip
    out["decode_tokens_per_second"] = samples[0].tokens / out["decode_seconds"]
    return out
