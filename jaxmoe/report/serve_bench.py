"""Long prompts that arrive while others decode, measured: layers by groups, chunks, and whole prompts, in turn and on the same requests.

Times are wall times. Experts cross a link, real or emulated (`jaxmoe.offload.link`); what has crossed it is counted exactly. Every arm is the same
engine and gives the same tokens on the CPU, which is checked.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxmoe.engine.generate import Sampling
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.engine.serving.types import PrefillMode, ServeSpec
from jaxmoe.engine.steps import committed
from jaxmoe.report.serve_drive import Sent, check_drive, drive, loads
from jaxmoe.report.serve_stats import Served

PAGE, RUN = 32, 32


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to compute prompts. Attributes: `groups` of layers and `chunk` tokens of a prompt in a step, where the mode has them."""

    name: str
    prefill: PrefillMode
    groups: int = 1
    chunk: int = 256


def arms(groups: Sequence[int], chunks: Sequence[int]) -> tuple[Arm, ...]:
    """Layers by so many groups, chunks of so many tokens, and whole prompts one after another."""
    found = [Arm(f"layered, {n}", "layered", groups=n) for n in groups] + [Arm(f"chunked, {n}", "chunked", chunk=n) for n in chunks]
    return (*found, Arm("whole", "whole"))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Who decodes and what arrives.

    Attributes:
        name: for tables.
        prompts: that arrive together.
        tokens: of each.
        new: tokens that each asks for.
        streams: sequences that decode.
        stream_prompt: tokens of theirs.
        calm: tokens that each stream has when the prompts arrive.
    """

    name: str
    prompts: int
    tokens: int
    new: int = 4
    streams: int = 2
    stream_prompt: int = 32
    calm: int = 16

    def stream_new(self, chunk: int) -> int:
        """Tokens that a stream must give to be there until the last prompt is done, the smallest chunk being `chunk`."""
        return self.calm + self.prompts * (-(-self.tokens // chunk) + self.new) + 16

    def positions(self, chunk: int) -> int:
        """Of the longest sequence, in whole pages."""
        return -(-max(self.tokens + self.new, self.stream_prompt + self.stream_new(chunk)) // PAGE) * PAGE


def spec_for(arm: Arm, scene: Scene, chunk: int) -> ServeSpec:
    """Sizes that are the same for all arms of a scene but for what their names say.

    Args:
        arm: chunks get so many prompt tokens, and room for the sequences that decode beside them; a wave takes all prompts of the scene.
        scene: every sequence has its pages from the beginning.
        chunk: of the arm with the smallest.
    """
    rows, positions = scene.streams + scene.prompts, scene.positions(chunk)
    wave, room = scene.prompts * -(-scene.tokens // RUN) * RUN, -(-rows // RUN) * RUN
    pages = rows * positions // PAGE
    return ServeSpec(rows, PAGE, pages, positions, rows, arm.chunk + room, wave, arm.groups, burst=1, run=RUN, sharing=False)


class Paced(Protocol):
    """A link whose speed is known; of an emulated one it can be changed."""

    gbps: float | None


@dataclasses.dataclass
class Ready:
    """An arm that can run a scene. Attributes: `link` an emulated one, or None; `compute`, seconds of the scene's prompts alone with nothing to wait
    for, where that could be measured; `warm_seconds` of the rehearsal."""

    arm: Arm
    scene: Scene
    engine: ServingEngine
    link: Paced | None = None
    compute: float | None = None
    warm_seconds: float = 0.0

    def forget(self) -> None:
        """Empties the device of experts."""
        runner = self.engine.runner
        runner.state = committed(dataclasses.replace(runner.state, bank=runner.model.bank.forget(runner.state.bank)))


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run of a scene.

    Attributes:
        ttft: of each prompt, seconds.
        gap: the longest between two tokens of a stream, once the prompts had arrived.
        calm: every gap of the streams before that, but for the first few.
        prompt_loads, all_loads: experts brought in from then on until the last prompt's last token, by calls that hold prompts, and by all.
        seconds: from then until the last prompt's first token.
        tokens: of every request, prompts first; those of streams are cut where the run ended.
    """

    ttft: tuple[float, ...]
    gap: float
    calm: tuple[float, ...]
    prompt_loads: int
    all_loads: int
    seconds: float
    tokens: tuple[tuple[int, ...], ...]

    @property
    def t_dec(self) -> float:
        """Seconds of a step that only decodes, the median."""
        return float(np.median(self.calm))


SKIP = 4
"""Gaps of a stream that don't count, while the device fills with the experts it asks for."""


def requests_of(scene: Scene, texts: Callable[[int, int], tuple[int, ...]], chunk: int, seed: int) -> list[Sent]:
    """Streams, then prompts.

    Args:
        scene: see there.
        texts: `(which, tokens) -> ids`, of so many tokens.
        chunk: of the arm with the smallest, which decides how long streams go on.
        seed: of the draws; another one for each round.
    """

    def one(i: int, tokens: int, new: int) -> ServeRequest:
        # Greedy text of a small model soon goes round in circles, and its routing with it.
        return ServeRequest(texts(i + seed * (scene.streams + scene.prompts), tokens), new, Sampling(1.0, seed=1000 * seed + i), ignore_eos=True)

    streams = [Sent(one(i, scene.stream_prompt, scene.stream_new(chunk))) for i in range(scene.streams)]
    return streams + [Sent(one(scene.streams + i, scene.tokens, scene.new), calm=scene.calm) for i in range(scene.prompts)]


def run_scene(ready: Ready, sent: Sequence[Sent]) -> Sample:
    """Runs a scene from a device without experts.

    Raises:
        RuntimeError: a step failed, a program was compiled, or the streams were over before the prompts were.
    """
    ready.forget()
    before: dict[str, int] = {}
    n, what = ready.scene.streams, f"{ready.scene.name}, {ready.arm.name}"

    def submitted(i: int) -> None:
        if i == n:
            before.update(loads(ready.engine))

    found = check_drive(drive(ready.engine, sent, enough=range(n, len(sent)), submitted=submitted), what)
    after = loads(ready.engine)
    streams, prompts = found.served[:n], found.served[n:]
    if any(s.done for s in streams):
        raise RuntimeError(f"{what}: streams ended before the prompts that they were to be disturbed by")
    attack = prompts[0].arrived
    calm = [b - a for s in streams for a, b in _pairs(s)[SKIP:] if b <= attack]
    gaps = [b - a for s in streams for a, b in _pairs(s) if b > attack]
    moved = {name: after[name] - before[name] for name in after}
    ttft = tuple(s.ttft or 0.0 for s in prompts)
    first = max(s.arrived + t for s, t in zip(prompts, ttft, strict=True)) - attack
    tokens = (*found.tokens[n:], *found.tokens[:n])
    return Sample(ttft, max(gaps), tuple(calm), moved["all"] - moved["decode"], moved["all"], first, tokens)


def _pairs(served: Served) -> list[tuple[float, float]]:
    times = [time for time, _ in served.events]
    return list(itertools.pairwise(times))


def rehearse(ready: Ready, sent: Sequence[Sent]) -> None:
    """Runs a scene with nothing to wait for, which compiles all it needs; then times the prompts alone, where the link is an emulated one."""
    began, link, n = time.perf_counter(), ready.link, ready.scene.streams
    speed = None if link is None else link.gbps
    if link is not None:
        link.gbps = None
    drive(ready.engine, sent, enough=range(n, len(sent)))
    ready.warm_seconds = time.perf_counter() - began
    alone = []
    for _ in range(2 if link is not None else 0):
        ready.forget()
        alone.append(max(s.ttft or 0.0 for s in drive(ready.engine, [Sent(s.request) for s in sent[n:]]).served))
    if link is not None:
        link.gbps, ready.compute = speed, min(alone)


def rounds(
    ready: Sequence[Ready], texts: Callable[[int, int], tuple[int, ...]], count: int, chunk: int, tell: Callable[[str], None] = lambda what: None
) -> dict[str, dict[str, list[Sample]]]:
    """Every arm in turn, the order turned round from one round to the next, on the same requests; other ones in each round.

    Args:
        ready: arms of one scene or of several.
        texts: `(which, tokens) -> ids`.
        count: of rounds.
        chunk: of the arm with the smallest.
        tell: is told what comes next.

    Returns:
        By scene and arm the samples, one a round.

    Raises:
        RuntimeError: two arms gave different tokens on a CPU, or what `run_scene` raises.
    """
    scenes = {r.scene.name: [other for other in ready if other.scene == r.scene] for r in ready}
    out: dict[str, dict[str, list[Sample]]] = {name: {r.arm.name: [] for r in own} for name, own in scenes.items()}
    for one in ready:
        tell(f"rehearsal: {one.scene.name}, {one.arm.name}")
        rehearse(one, requests_of(one.scene, texts, chunk, 0))
    for i in range(count):
        for name, own in scenes.items():
            sent = requests_of(own[0].scene, texts, chunk, i)
            for one in own if i % 2 == 0 else own[::-1]:
                tell(f"round {i + 1} of {count}: {name}, {one.arm.name}")
                out[name][one.arm.name].append(run_scene(one, sent))
            if own[0].engine.runner.model.kernels.backend == "cpu":
                check_tokens(own[0].scene, {arm: samples[-1] for arm, samples in out[name].items()})
    return out


def check_tokens(scene: Scene, samples: Mapping[str, Sample]) -> None:
    """Compares what arms gave, streams as far as both go.

    Raises:
        RuntimeError: two differ.
    """
    (first, one), *others = samples.items()
    for name, other in others:
        for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)):
            n = min(len(a), len(b)) if i >= scene.prompts else max(len(a), len(b))
            if a[:n] != b[:n]:
                raise RuntimeError(f"{scene.name}: {first!r} and {name!r} gave request {i} different tokens")
