"""A mixed queue on the serving engine with part of the experts on the device: what it costs to decode by predicted paths, in turns, all together, in
the order of arrival, or one request at a time.

Every arm serves the same requests and gives the same tokens, on the same compiled programs; what differs is how many sequences the scheduler may hold
and decode in a step, and how it chooses them. Bytes are those of experts that crossed the link, counted where they are read; seconds are
the wall's, and those of all processors together, which others on the machine disturb less.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.load import load_hf_or_checkpoint
from jaxmoe.engine.model import Model, Offload, load_model
from jaxmoe.engine.serving import scheduler
from jaxmoe.engine.serving.compiles import CompileCount
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.paths import RequestPaths
from jaxmoe.engine.serving.routing import DecodeCounts
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.engine.text import Tokenizer
from jaxmoe.experts import SlotBank
from jaxmoe.offload.request_paths import PathSource
from jaxmoe.offload.trace import Trace, model_hash
from jaxmoe.report import record
from jaxmoe.report.serve_queue_sources import PROMPT, Queue, Recording, installed_text, mixed_queue, sources, trace_of
from jaxmoe.train.corpus import Corpus
from jaxmoe.train.path_predictor import FitSettings, train
from pallas_kernels.dispatch import Kernels

NAME = "serve_queue"
PAGE, BLOCK = 32, 128
"""Tokens of a page, and of a block of keys: sequences have room for whole blocks."""
HELD = 0.3
"""What an expert that is on the device counts for, where arms look at that."""
CONTROLS = ("arrival", "no regrouping, in turns", "no regrouping, together", "one at a time")
RATIOS = ("tokens_per_second", "tokens_per_processor_second", "bytes_per_token", "decode_bytes_per_token", "distinct_per_token")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to serve a queue. Attributes: `slots` sequences that hold pages, of which `batch` decode in a step; `policy`; `source`, a key of the
    sources of paths."""

    name: str
    slots: int
    batch: int
    policy: Policy = Policy()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Ran:
    """What an arm did. Attributes: `ids` new tokens of each request; `seconds` by what took them; `counts`."""

    ids: tuple[tuple[int, ...], ...]
    seconds: Mapping[str, float]
    counts: Mapping[str, float]


def arms(batch: int, wait: int, sources: Sequence[str]) -> list[Arm]:
    """The controls, then grouping by each source, then with an eye to what is on the device.

    Args:
        batch: sequences of a step; of all that run in "no regrouping, together".
        wait: batches' worth of sequences that run, to be chosen from.
        sources: their names.
    """
    many, greedy = wait * batch, Policy(group="greedy")
    out = [Arm("arrival", batch, batch), Arm(CONTROLS[1], many, batch), Arm(CONTROLS[2], many, many), Arm("one at a time", 1, 1)]
    out += [Arm(f"grouped by {source}", many, batch, greedy, source) for source in sources]
    held = [source for source in ("token, learned", "oracle") if source in sources]
    return out + [Arm(f"grouped by {source}, held", many, batch, dataclasses.replace(greedy, held_cost=HELD), source) for source in held]


# --- Running


class _Timed:
    """Paths, and the seconds that they take."""

    def __init__(self, paths: Any):
        self._paths, self.seconds = paths, 0.0

    def of(self, *args: Any) -> Any:
        began = time.perf_counter()
        found = self._paths.of(*args)
        self.seconds += time.perf_counter() - began
        return found

    def learn(self, *args: Any) -> None:
        began = time.perf_counter()
        self._paths.learn(*args)
        self.seconds += time.perf_counter() - began


def make_runner(model: Model, batch: int, wait: int, positions: int) -> Runner:
    """One for all arms: the largest of them says what shapes programs have.

    Raises:
        ValueError: all experts are on the device.
    """
    if not isinstance(model.bank, SlotBank):
        raise ValueError("a queue's bytes are those of experts that come from host memory: load the model with fewer slots than experts")
    slots = wait * batch
    groups = min(4, model.spec.n_layers)
    spec = ServeSpec(slots, PAGE, slots * positions // PAGE, positions, slots, slots + PAGE, slots * PROMPT, groups, burst=1, run=PAGE)
    runner = Runner(model, spec, record=True)
    runner.row_buckets = tuple(sorted({1, batch, slots}))
    return runner


def run_arm(runner: Runner, queue: Queue, arm: Arm, paths: Any = None) -> Ran:
    """Serves a queue, from an empty device.

    Args:
        runner: of `make_runner`; large enough for the arm.
        queue: all there at the beginning.
        arm: its source is not looked at.
        paths: a `RequestPaths` or what stands in its place.
    """
    runner.rebuild()
    runner.decoded = DecodeCounts()
    timed, compiled = None if paths is None else _Timed(paths), CompileCount()
    engine = ServingEngine(runner, None, (), arm.policy, paths=timed)
    engine.state = scheduler.fresh(dataclasses.replace(runner.spec, slots=arm.slots, batch=arm.batch), runner.spec.move)
    for request in queue.requests:
        engine.submit(request)
    ids: list[list[int]] = [[] for _ in queue.requests]
    done, waited, began = np.zeros(len(ids)), 0, time.perf_counter()
    busy = time.process_time()
    while not engine.idle:
        for event in engine.step():
            if event.error is not None:
                raise RuntimeError(event.error)
            ids[event.id] += event.ids
            done[event.id] = time.perf_counter() - began
        waited = max([waited, *(engine.state.seqs[i].waited for i in engine.state.running)])
    seconds = {"wall": time.perf_counter() - began, "processor": time.process_time() - busy, "paths": 0.0 if timed is None else timed.seconds}
    seconds["mean_until_done"] = float(done.mean())
    return Ran(tuple(map(tuple, ids)), seconds, _counts(runner, engine, ids, waited) | {"compiles": compiled.since})


def _counts(runner: Runner, engine: ServingEngine, ids: Sequence[Sequence[int]], waited: int) -> dict[str, float]:
    size, whole, decode = runner.model.bank.record_bytes, runner.counters(), runner.decoded.read()
    tokens, decoded = sum(map(len, ids)), sum(len(some) - 1 for some in ids)
    loads, asked = int(decode["loads"].sum()), int(decode["requests"].sum())
    prompt_loads = int(whole["loads"].sum()) - loads
    layers = len(whole["loads"])
    return {
        "tokens": tokens, "decoded": decoded, "steps": engine.state.counters.steps, "decode_steps": runner.decoded.steps, "waited": waited,
        "decode_bytes": loads * size, "prompt_bytes": prompt_loads * size, "bytes_per_token": (loads + prompt_loads) * size / tokens,
        "decode_bytes_per_token": loads * size / decoded, "distinct_per_step": asked / layers / runner.decoded.steps,
        "distinct_per_token": asked / layers / decoded, "decode_hit_rate": int(decode["hits"].sum()) / asked,
    }  # fmt: skip


# --- The measurement


def queue_records(
    folder: Path, text: Corpus | None = None, count: int = 256, share: float = 0.25, batch: int = 8, wait: int = 4, seed: int = 0,
    rounds: int = 1, train_steps: int = 300, tell: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures a model on the default device: a mixed queue of held-out text, and as much of the text to train on, for sources that are fitted.

    Args:
        folder: Hugging Face folder with a tokenizer, or a converted checkpoint of one.
        text: what `jaxmoe.train.corpus` made, with the model's tokenizer; if not given, text of those domains whose files are on this machine.
        count: requests.
        share: of every layer's experts that the device holds.
        batch, wait, rounds: of `measure`.
        seed: of the queue.
        train_steps: of the path predictor; 0 leaves it out.
        tell: is told what comes next.

    Returns:
        Records; see `measure`.
    """
    tell("loading")
    with tempfile.TemporaryDirectory() as converted:
        checkpoint = load_hf_or_checkpoint(folder, Path(converted))
        experts = checkpoint.spec.moe[0].experts
        model = load_model(checkpoint, "float32", Kernels.default(), False, Offload(max(1, round(share * experts))))
    text = installed_text(Tokenizer(folder)) if text is None else text
    queue, other = (mixed_queue(text, count, seed + k, split) for k, split in enumerate(("held_out", "train")))

    def fit(trace: Trace) -> Any:
        return train([trace], "path", FitSettings(steps=train_steps), seed) if train_steps else None

    return measure(model, queue, other, batch, wait, fit, rounds, tell)


def measure(
    model: Model, queue: Queue, other: Queue | None = None, batch: int = 8, wait: int = 4, fit: Callable[[Trace], Any] | None = None,
    rounds: int = 1, tell: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Serves a queue in every way, and checks that all give the same tokens.

    Args:
        model: with as many slots for experts as is to be measured.
        queue: what is served.
        other: a queue of other text, from which sources that are fitted learn.
        batch: sequences of a step.
        wait: batches' worth of sequences to choose from.
        fit: gives a path predictor of a trace of the other text.
        rounds: how often every arm runs, in turn; every other round in reverse.
        tell: is told what comes next.

    Returns:
        A record (`jaxmoe.report.record`) an arm. `counters` has numbers, and ratios by "number / control"; its bound is what the oracle's grouping
        reaches in tokens per 10^9 bytes of experts.

    Raises:
        ValueError: all experts are on the device.
        RuntimeError: an arm gave other tokens or counted other bytes than before, or a step failed.
    """
    queues = [queue] if other is None else [queue, other]
    longest = max(len(r.prompt_ids) + r.max_new_tokens for q in queues for r in q.requests)
    tell("compiling")
    runner = make_runner(model, batch, wait, -(-longest // BLOCK) * BLOCK)
    compile_seconds = _warm_up(runner, queue, batch, wait)
    everyone = Arm("recording", batch * wait, batch * wait)
    truth, elsewhere = Recording(), Recording()
    tell("recording")
    expected = run_arm(runner, queue, everyone, truth).ids
    trace = None
    if other is not None:
        run_arm(runner, other, everyone, elsewhere)
        trace = trace_of(model, elsewhere)
    if fit is not None and trace is not None:
        tell("training the path predictor")
    found = sources(model, queue, truth, trace, fit(trace) if fit is not None and trace is not None else None)
    chosen = arms(batch, wait, list(found))
    ran: dict[Arm, list[Ran]] = {arm: [] for arm in chosen}
    for turn in range(rounds):
        for arm in chosen if turn % 2 == 0 else chosen[::-1]:
            tell(arm.name)
            ran[arm].append(run_arm(runner, queue, arm, _paths(runner, arm, found)))
            if ran[arm][-1].ids != expected:
                raise RuntimeError(f"the tokens of {arm.name!r} differ from those of all decoding together: grouping must not change them")
            if ran[arm][-1].counts != ran[arm][0].counts:
                raise RuntimeError(f"{arm.name!r} counted {ran[arm][-1].counts}, and before on the same requests {ran[arm][0].counts}")
    return _records(model, queue, ran, compile_seconds)


def _warm_up(runner: Runner, queue: Queue, batch: int, wait: int) -> float:
    """Compiles what arms need, by small queues of each size, whose answers end one after another; seconds."""
    began = time.perf_counter()
    for slots in (wait * batch, batch, 1):
        few = [dataclasses.replace(r, max_new_tokens=2 + i) for i, r in enumerate(queue.requests[:slots])]
        run_arm(runner, Queue(tuple(few), queue.domains[:slots]), Arm("warm-up", slots, slots))
    return time.perf_counter() - began


def _paths(runner: Runner, arm: Arm, found: Mapping[str, tuple[PathSource, int | None]]) -> RequestPaths | None:
    if not arm.source:
        return None
    paths = RequestPaths(found[arm.source][0], runner, arm.policy, found[arm.source][1])
    paths.warm_up()
    return paths


def _speeds(tokens: float, timings: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {f"tokens_per_{name}": tokens / timings[key]["median"] for name, key in (("second", "wall"), ("processor_second", "processor"))}


def _records(model: Model, queue: Queue, ran: Mapping[Arm, Sequence[Ran]], compile_seconds: float) -> list[dict[str, Any]]:
    timings = {arm.name: {name: record.timing([r.seconds[name] for r in all]) for name in all[0].seconds} for arm, all in ran.items()}
    numbers = {arm.name: {**all[0].counts, **_speeds(all[0].counts["tokens"], timings[arm.name])} for arm, all in ran.items()}
    best, out = 1e9 / numbers["grouped by oracle"]["bytes_per_token"], []
    for arm in ran:
        own = numbers[arm.name]
        beside = {f"{name} / {c}": own[name] / numbers[c][name] for c in CONTROLS if c != arm.name for name in RATIOS}
        settings = {
            "arm": arm.name, "mode": "fused", "link": "none: bytes are counted", "batch": arm.batch, "slots": arm.slots,
            "requests": len(queue.requests), "domains": sorted(set(queue.domains)), "expert_slots": list(model.bank.slots),
            "experts": model.bank.experts, "policy": model.bank.policy,
            "prefill": arm.policy.prefill, "group": arm.policy.group or "", "bound": arm.policy.bound, "held_cost": arm.policy.held_cost,
            "source": arm.source,
        }  # fmt: skip
        out.append(
            record.make_record(
                name=NAME, spec_hash=model_hash(model.spec), settings=settings, seeds={"sampling": queue.requests[0].sampling.seed},
                timings=timings[arm.name], compile_seconds=compile_seconds,
                bytes={name: int(value) for name, value in own.items() if name in ("decode_bytes", "prompt_bytes")},
                counters={name: value for name, value in own.items() if name not in ("decode_bytes", "prompt_bytes")} | beside,
                bound=record.make_bound("link", best, 1e9 / own["bytes_per_token"], "tok/GB"),
            )
        )  # fmt: skip
    return out
