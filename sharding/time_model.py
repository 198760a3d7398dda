"""How long steps take: the work of each device (`sharding.work`) over the rates of its machine (`sharding.hardware`).

Every rate is an upper bound, so every time is a lower bound of its term; what is added up and what hides behind what is said by the three totals.
Estimates rank plans; they prove nothing. What a plan's programs need is proved by compiling them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxmoe.spec import ModelSpec
from sharding.hardware import Level, Machine
from sharding.link_time import collective_seconds
from sharding.phases import Count, Phase, decode_phase, prefill_phases
from sharding.routing_load import Routing
from sharding.split import Layout, Split
from sharding.work import Work, step_work
from sharding.workload import Workload

DECODE_CHUNK = 16
"""Tokens that one call of the decode program makes (`jaxmoe.engine.steps.CHUNK`): its launch is paid once for so many."""

TERMS = ("compute", "memory", "link", "host", "launch")


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the device that has most to do.

    Attributes:
        compute, memory: of all operations, each at the rate of arithmetic and of memory.
        device: operation by operation, the longer of both (a roofline per operation).
        link: of the collectives, one after another.
        host: experts that come over the host's link.
        launch: of the program.
    """

    compute: float
    memory: float
    device: float
    link: float
    host: float
    launch: float

    @property
    def overlapped(self) -> float:
        """A lower bound: everything hides behind the longest term."""
        return max(self.compute, self.memory, self.link, self.host) + self.launch

    @property
    def serial(self) -> float:
        """An upper bound at these rates: nothing hides."""
        return self.compute + self.memory + self.link + self.host + self.launch

    @property
    def expected(self) -> float:
        """What plans are ranked by: an operation's arithmetic hides its memory or the other way round, and what comes over links is waited for."""
        return self.device + self.link + self.host + self.launch

    @property
    def longest(self) -> str:
        """The name of the largest term."""
        return max(TERMS, key=lambda name: getattr(self, name))

    def to_json(self) -> dict[str, float]:
        """Its terms."""
        return dataclasses.asdict(self)


def total(parts: list[tuple[int, StepTime]]) -> StepTime:
    """Of several steps: `(how many, of each)`."""
    return StepTime(**{f.name: sum(n * getattr(t, f.name) for n, t in parts) for f in dataclasses.fields(StepTime)})


def split_of(sizes: tuple[int, ...]) -> Split:
    """A split of these sizes, in the order of `AXES`, whatever its modes."""
    stage, data, expert, sequence, tensor = sizes
    return Split(data, expert, tensor, sequence, stage)


@functools.lru_cache(maxsize=65536)
def _levels(machine: Machine, sizes: tuple[int, ...], axes: tuple[str, ...]) -> tuple[Level, ...]:
    return machine.levels(split_of(sizes), axes)


def work_time(work: Work, machine: Machine, split: Split, dtype: str, launch: float = 0.0) -> StepTime:
    """The time of a step's work.

    Args:
        work: of `step_work`.
        machine: whose rates.
        split: the mesh.
        dtype: of products.
        launch: seconds, added as they are.
    """
    h = machine.hardware
    flops = h.flops(dtype)
    compute = memory = device = host = link = 0.0
    for op in work.ops:
        c, m = op.flops / flops, op.nbytes / h.hbm_bytes_per_s
        compute, memory, device = compute + op.times * c, memory + op.times * m, device + op.times * max(c, m)
        host += op.times * op.host_bytes / h.host_link_bytes_per_s
    for x in work.collectives:
        link += x.times * collective_seconds(x.kind, x.nbytes, _levels(machine, split.shape, x.axes))
    return StepTime(compute, memory, device, link, host, launch)


def step_time(
    spec: ModelSpec, machine: Machine, layout: Layout, workload: Workload, phase: Phase, count: Count = "needed", routing: Routing | None = None,
    temporaries: float = 0.0,
) -> StepTime:  # fmt: skip
    """The time of one step of `phase`; arguments as of `step_work`."""
    launch = machine.hardware.launch_s / (DECODE_CHUNK if phase.kind == "decode" else 1)
    work = step_work(spec, layout, workload, phase, count, routing, machine.hardware.backend, temporaries)
    return work_time(work, machine, layout.split, workload.dtype, launch)


@dataclasses.dataclass(frozen=True)
class Times:
    """What a plan is predicted to take.

    Attributes:
        ttft: seconds from a prompt, that comes alone, to its first token.
        prefill: of all prompts, in each group of devices one after another.
        tpot: seconds for another token of every sequence.
        tokens_per_s: new tokens of the whole mesh, prefill included.
        decode: of a decode step.
        prefill_step: of all prefill steps together.
    """

    ttft: float
    prefill: float
    tpot: float
    tokens_per_s: float
    decode: StepTime
    prefill_step: StepTime

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


Known = dict[tuple[Layout, int | None, Phase], StepTime]
"""Steps of prompts whose time is known; they don't depend on how many sequences there are."""


def predict(
    spec: ModelSpec, machine: Machine, layout: Layout, workload: Workload, count: Count = "needed", routing: Routing | None = None,
    known: Known | None = None,
) -> Times:  # fmt: skip
    """Times of a workload; arguments as of `step_work`.

    `known` is kept between calls that differ in layout, sequences and slots alone, to spare time.

    Raises:
        SplitError: its sequences don't divide among the groups of devices.
    """
    seen: Known = {} if known is None else known

    def time(phase: Phase) -> StepTime:
        if phase.kind == "decode":
            return step_time(spec, machine, layout, workload, phase, count, routing)
        key = (layout, workload.slots, dataclasses.replace(phase, steps=1))
        if key not in seen:
            seen[key] = step_time(spec, machine, layout, workload, phase, count, routing)
        return seen[key]

    first = sum(phase.steps * time(phase).expected for phase in prefill_phases(workload, layout, rows=1))
    prompts = total([(phase.steps, time(phase)) for phase in prefill_phases(workload, layout)])
    decode = time(decode_phase(workload, layout))
    seconds = prompts.expected + workload.new_tokens * decode.expected
    return Times(first, prompts.expected, decode.expected, workload.rows * workload.new_tokens / seconds, decode, prompts)
