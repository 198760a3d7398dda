"""What to switch on for a model, a machine and a kind of text: policies and predictors on a recorded trace, through the event model.

Policies and predictors are chosen on one part of the trace and foretold on the rest, so that the advice says how far it can be trusted. Nothing is
run here but replays and clocks; the engine measures its own steps anyway, and switches prefetching off where it does not pay.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxmoe import formats
from jaxmoe.experts.planes import PlaneFormat
from jaxmoe.offload import budget, event_model
from jaxmoe.offload.event_model import Candidates, Costs, Setting
from jaxmoe.offload.knowledge import high_steps, knowledge, new_texts
from jaxmoe.offload.predictors import JOINS, find_predictor, foresee_layers, sizes_of
from jaxmoe.offload.predictors.corrected import params_of
from jaxmoe.offload.replay import Steps, residents, slots_by_layer
from jaxmoe.offload.trace import PROMPT, Trace, used_steps
from jaxmoe.residency import find_policy

POLICIES = ("lru", "lfu", "arc", "fate", "hobbit", "plec")
"""Those that go by nothing but the run itself."""

PREDICTORS = ("frequency", "previous", "transitions")
"""Those that learn as they run; the model's own routers are added where the trace has recorded them, and trained ones where they are given."""

SETTINGS = tuple(Setting(width, 4 * width) for width in (1, 2, 4))
DEPTHS = (1, 2)
CLOSE = 0.01
"""Of two ways that differ by less, the one that needs less is advised."""

BITS = (8, 4, 2)
"""Widths of missing experts that are compared with how they are stored."""

STAGING = 2
"""Slots for experts that pass through, which `generate.py` takes of the same memory."""

BLOCKS = 8
"""Of decode steps: neighbours are alike, and a text changes on its way, so that either half of a trace would say more about itself than the other."""

ENOUGH = 0.9
"""The share of the speed with all experts on the device that is enough, where no amount of memory is given."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the advice is for.

    Attributes:
        link_gbps: 10^9 bytes per second between host and device.
        step_seconds: of a decode step with all experts on the device.
        front_share: of a layer's time that passes before its routing is known.
    """

    link_gbps: float
    step_seconds: float
    front_share: float = 0.5

    def __post_init__(self):
        for name in ("link_gbps", "step_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)}: give a positive number")
        if not 0 <= self.front_share <= 1:
            raise ValueError(f"front_share = {self.front_share}: give 0 to 1")

    def costs(self, trace: Trace, asked: float) -> Costs:
        """Seconds of a layer's parts and of a record, where a layer's step asks for so many experts on the average."""
        layer = self.step_seconds / trace.layers
        front, experts = layer * self.front_share, layer * (1 - self.front_share)
        each = experts / max(asked, 1e-9)
        return Costs(front, float(trace.expert_bytes.mean()) / self.link_gbps / 1e9, hit=each, land=each)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of running, and what it is foretold to bring.

    Attributes:
        policy: which experts stay.
        predictor, depth, width, staging: of prefetching; None and zeros without.
        hit_rate: of the policy, on the part that the choice was made on.
        tokens_per_second: of one sequence, on the part that the choice was made on.
        held_out: the same on the part that it was not made on.
        gain: over the same policy without prefetching.
    """

    policy: str
    predictor: str | None
    depth: int
    width: int
    staging: int
    hit_rate: float
    tokens_per_second: float
    held_out: float
    gain: float

    @property
    def error(self) -> float:
        """How far the held-out part was off what was foretold, as a share of it."""
        return self.held_out / self.tokens_per_second - 1


@dataclasses.dataclass(frozen=True)
class Advice:
    """What there is to say of one number of slots; with as many as there are experts, nothing is streamed.

    Attributes:
        best: the way advised.
        ways: all, the fastest first.
        slots: of each layer.
        x: copy time over layer time.
        machine: what it is for.
        bytes: of the device for these slots and for `STAGING`, none where all experts have slots.
        all_bytes: of all experts.
        by_bits: tokens per second of the policy advised, without prefetching, if missing experts came at so many bits instead of as they are stored.
    """

    best: Way
    ways: tuple[Way, ...]
    slots: int
    x: float
    machine: Machine
    bytes: int
    all_bytes: int
    by_bits: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """The advice in a few lines."""
        way = self.best
        ahead = f"prefetch by {way.predictor}, {way.depth} ahead, {way.width} a layer ({way.gain:.2f}x)"
        rates = f"{way.tokens_per_second:.1f} tok/s foretold, {way.held_out:.1f} on steps it was not chosen on ({100 * way.error:+.0f} %)"
        hits = f"{100 * way.hit_rate:.1f} % hits in {self.slots} slots"
        lines = [
            f"{way.policy}, {'no prefetching' if way.predictor is None else ahead}: {rates}",
            f"an expert takes {self.x:.2f} of a layer's time to cross; {hits}",
        ]
        if self.by_bits:
            shown = ", ".join(f"{speed / way.tokens_per_second:.2f}x at {bits} bits" for bits, speed in self.by_bits.items())
            how = "missing ones in fewer bits, without prefetching (--expert-mode host-driven --lossy bits=N), would bring"
            lines.append(f"experts as they are stored, for the same text; {how} {shown}")
        if way.predictor is not None:
            lines.append("the host's own work in the host-driven mode is not counted: steps of few milliseconds take several times as long")
        return "\n".join(lines)

    @property
    def percent(self) -> int:
        """Of all experts' bytes, what buys the slots."""
        return min(100, math.ceil(100 * self.bytes / self.all_bytes))

    def options(self, files: Mapping[str, Any] | None = None) -> str:
        """The advice as options of `generate.py`, beside the link's; `files` of trained predictors, by name."""
        way, memory = self.best, f"--expert-memory {self.percent}%"
        if self.bytes == self.all_bytes:
            return memory
        sent = f" --expert-mode host-driven --expert-predictor {way.predictor} --prefetch {way.staging}" if way.predictor else ""
        trained = next((part for part in (way.predictor or "").split(JOINS) if part in (files or {})), None)
        file = f" --predictor-file {files[trained]}" if files and trained else ""
        return f"{memory} --expert-policy {way.policy}{sent}{file}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some decode steps: what they ask for, which of the trace's steps they are, and which of its decode steps."""

    used: Bool[np.ndarray, "S L E"]
    at: np.ndarray
    of: np.ndarray

    def sent(self, candidates: Candidates) -> Candidates:
        """Their candidates, of those of all decode steps."""
        return [candidates[i] for i in self.of]


def slots_for(trace: Trace, amount: budget.Amount, free: int | None = None) -> int:
    """Slots of each layer that an amount of memory buys beside `STAGING`, all layers alike.

    Args:
        trace: of the model.
        amount: of device memory for experts.
        free: what the device has for them, for 'auto'.

    Raises:
        budget.BudgetError: fewer than a token needs.
    """
    sizes = tuple(trace.expert_bytes.tolist())
    shapes = budget.ExpertShapes(trace.meta["model"], trace.layers, trace.experts, trace.meta["active"], sizes, 0, 0, 0)
    return min(budget.solve(shapes, amount, STAGING, free).slots)


def sizes_to_compare(trace: Trace) -> tuple[int, ...]:
    """Slots of a layer for where no amount of memory is given: from what a token needs to all experts, by doubling."""
    active, experts = int(trace.meta["active"]), trace.experts
    return (*itertools.takewhile(lambda n: n < experts, (active * 2**i for i in itertools.count())), experts)


def enough(found: Sequence[Advice], share: float = ENOUGH) -> Advice:
    """The fewest slots that are foretold so much of the most slots' tokens per second."""
    most = max(found, key=lambda one: one.slots)
    good = [one for one in found if one.best.tokens_per_second >= share * most.best.tokens_per_second]
    return min(good, key=lambda one: one.slots)


def bits_shares(fmt: PlaneFormat) -> dict[int, float]:
    """Bytes of an expert at each of `BITS`, as a share of those that it is stored in."""
    return {bits: fmt.bytes(bits) / (fmt.weights * formats.leaf_dtype(fmt.dtype).itemsize) for bits in BITS}


def compare(
    trace: Trace,
    slots: Sequence[int],
    machine: Machine,
    trained: dict[str, Any] | None = None,
    policies: Sequence[str] = POLICIES,
    most_steps: int = 256,
    shares: Mapping[int, float] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Advice]:
    """Compares all ways on a trace.

    Args:
        trace: recorded, its decode steps of one sequence at a time or of a batch as it will run.
        slots: of each layer, one or several numbers to compare.
        machine: see above.
        trained: parameters of predictors that were trained on other text, by name.
        policies: to compare.
        most_steps: decode steps that are looked at, the first ones.
        shares: of an expert's bytes, by bits that missing ones may come at (`bits_shares`).
        progress: is told what is done next.

    Returns:
        Advice for each number of slots.

    Raises:
        ValueError: nothing but prompt, or impossible slots.
    """
    used_SLE, phase_S = used_steps(trace)
    decode = np.flatnonzero(phase_S != PROMPT)[: max(most_steps, 0)]
    if len(decode) < 4:
        raise ValueError(f"{len(decode)} steps that are not prompt to look at: at least 4 are needed")
    parts = [_Part(used_SLE[decode[of]], decode[of], of) for of in _halves(len(decode))]
    costs = machine.costs(trace, float(used_SLE[decode].sum(2).mean()))
    each_L = [slots_by_layer(n, *used_SLE.shape[1:]) for n in slots]  # refuses what can't be before anything takes long
    candidates = dict(_candidates(trace, trained or {}, decode, progress))
    out = []
    every = int(trace.expert_bytes.sum())
    for n, slots_L in zip(slots, each_L, strict=True):
        there, sent = {}, candidates
        for name in policies:
            progress(f"{n} slots, policy {name}")
            there[name] = _residents(trace, used_SLE, slots_L, name, None) if n < trace.experts else np.ones_like(used_SLE)
        if n == trace.experts:  # nothing is streamed, and no policy is asked
            there, sent = {policies[0]: there[policies[0]]}, {}
        ways = [way for name in there for way in _ways(name, there[name], parts, costs, sent)]
        ways.sort(key=lambda way: -way.tokens_per_second)
        fast = [way for way in ways if way.tokens_per_second >= (1 - CLOSE) * ways[0].tokens_per_second]
        best = min(fast, key=lambda way: (way.predictor is not None, policies.index(way.policy)))
        less = {} if n == trace.experts else shares or {}
        by_bits = {bits: _with_copy(share, there[best.policy], parts[0], costs) for bits, share in less.items()}
        x = costs.copy / (machine.step_seconds / trace.layers)
        held = every * n + (STAGING * int(trace.expert_bytes.max()) if n < trace.experts else 0)
        out.append(Advice(best, tuple(ways), n, x, machine, held, every * trace.experts, by_bits))
    return out


def _with_copy(share: float, there_SLE: np.ndarray, part: _Part, costs: Costs) -> float:
    """Tokens per second if an expert had this share of its bytes, without prefetching: that knows experts only as they are stored."""
    return 1 / event_model.run(part.used, there_SLE[part.at], dataclasses.replace(costs, copy=share * costs.copy)).seconds


def _halves(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps to choose by and steps to check with: every other one of `BLOCKS` blocks, after those in which caches fill."""
    settled = np.arange(steps)[steps // BLOCKS :]
    blocks = np.array_split(settled, min(BLOCKS, len(settled)))
    return np.concatenate(blocks[::2]), np.concatenate(blocks[1::2])


def best_policy(trace: Trace, slots: int, policies: Sequence[str] = POLICIES) -> str:
    """The policy with the most hits on a trace's steps that are not prompt; of those within a hundredth of the best the first of `policies`.

    For where nothing is known of the machine: prefetching then has to find out for itself whether it pays.
    """
    used_SLE, phase_S = used_steps(trace)
    counted, slots_L = phase_S != PROMPT, slots_by_layer(slots, *used_SLE.shape[1:])
    asked = used_SLE[counted]
    rates = {name: (asked & _residents(trace, used_SLE, slots_L, name, None)[counted]).sum() / asked.sum() for name in policies}
    return next(name for name in policies if rates[name] >= max(rates.values()) - CLOSE)


def _residents(trace: Trace, used_SLE: np.ndarray, slots_L: np.ndarray, name: str, foreseen) -> np.ndarray:
    policy = find_policy(name)
    active = min(trace.meta["active"], int(slots_L.min()))
    _, layers, experts = used_SLE.shape
    own = slots_L if policy.allocate is None else np.array(policy.allocate(int(slots_L.sum()), layers, experts, active), np.int64)
    return residents(Steps(used_SLE, high_steps(trace), new_texts(trace), foreseen), own, name, knowledge(trace, policy))


def _candidates(trace: Trace, trained: dict[str, Any], decode: np.ndarray, progress):
    """`(predictor, depth) -> what it would send`, by step of `decode`."""
    gates = [] if trace.gates is None else ["gate"]
    names = [*PREDICTORS, *gates, *trained, *(JOINS.join(pair) for pair in itertools.product(trained, gates))]
    last, layers = int(decode[-1]), trace.layers
    for name in names:
        progress(f"predictor {name}")
        predictor = find_predictor(name)
        params = params_of(name, lambda one: trained[one] if one in trained else find_predictor(one).fit([], 0, sizes=sizes_of(trace)))
        said = {}
        for step, layer, scores in foresee_layers(predictor, params, trace):
            if step > last:
                break
            said[step, layer] = scores
        at = dict(enumerate(decode.tolist()))
        for depth in DEPTHS:
            yield (name, depth), event_model.ranked(lambda s, layer, said=said, at=at: said.get((at[s], layer)), len(decode), layers, depth)  # type: ignore[misc]


def _ways(name: str, there_SLE: np.ndarray, parts: list[_Part], costs: Costs, candidates: dict) -> list[Way]:
    """A policy without prefetching, and with each predictor at its best setting."""
    first, second = parts
    plain = [event_model.run(part.used, there_SLE[part.at], costs).seconds for part in parts]
    hits = float((first.used & there_SLE[first.at]).sum() / first.used.sum())
    out = [Way(name, None, 0, 0, 0, hits, 1 / plain[0], 1 / plain[1], 1.0)]
    best: dict[str, Way] = {}
    foresees = find_policy(name).foresees
    for (predictor, depth), ahead in candidates.items():
        if foresees and find_predictor(predictor).ahead:  # the engine would tell the policy too, which is not what was replayed
            continue
        gain, setting, outcome = event_model.gain(first.used, there_SLE[first.at], costs, first.sent(ahead), SETTINGS)
        later = event_model.run(second.used, there_SLE[second.at], costs, second.sent(ahead), setting)
        way = Way(name, predictor, depth, setting.width, setting.staging, hits, 1 / outcome.seconds, 1 / later.seconds, gain)
        if predictor not in best or best[predictor].tokens_per_second < way.tokens_per_second:
            best[predictor] = way
    return out + list(best.values())


