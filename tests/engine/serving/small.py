"""A small model of like layers, which compile as one, behind a serving engine, and what the plain engine gives for the same requests."""

import dataclasses
import functools

import numpy as np

from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.model import Model
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.host_programs import HostPrograms
from jaxmoe.engine.serving.requests import Event, ServeRequest
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.experts import SlotBank
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload.link import Link
from tests.models import random_model, slot_model
from tests.quick import QuickKernels

SPEC = ServeSpec(slots=4, page=16, pages=16, positions=240, batch=4, chunk=64, wave=128, groups=2, burst=4, run=16, host_pages=40, move=4)
EOS = (5,)


@functools.cache
def model(family: str = "olmoe", slots: int = 0) -> Model:
    """Resident, or with so many slots a layer."""
    resident = random_model(family, kernels=QuickKernels("cpu"), unroll=False)
    return slot_model(resident, slots) if slots else resident


def runner(of: Model, spec: ServeSpec = SPEC, host: bool = False, link: Link | None = None, kv: str | None = None) -> Runner:
    """A runner; with `host` one whose host sends the experts."""
    run = None
    if host:
        assert isinstance(of.bank, SlotBank)
        source, of = ExpertSource(of.spec, np.asarray(of.bank.store)), dataclasses.replace(of, bank=dataclasses.replace(of.bank, store=None))
        run = HostPrograms(of, spec, source, link)
    return Runner(of, spec, EOS, kv, run)


def engine(by: Runner, policy: Policy | None = None, **more) -> ServingEngine:
    """Without a tokenizer: ids alone."""
    return ServingEngine(by, None, EOS, policy or Policy(), **more)


def requests(count: int, seed: int = 0, longest: int = 100, new: int = 24, vocab: int = 96) -> list[ServeRequest]:
    """Random prompts, greedy and sampled in turn."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        ids = tuple(rng.integers(6, vocab, int(rng.integers(1, longest))).tolist())
        out.append(ServeRequest(ids, int(rng.integers(1, new)), Sampling(0.9 if i % 2 else 0.0, 0, 0.95, 0.0, i)))
    return out


@functools.cache
def _plain(family: str) -> Engine:
    found = Engine(model(family), 1, SPEC.positions, False, EOS)
    return found


@functools.cache
def _expected(family: str, prompt_ids: tuple[int, ...], max_new_tokens: int, sampling: Sampling) -> tuple[int, ...]:
    (result,), _ = _plain(family).generate([Request(prompt_ids, max_new_tokens, sampling)])
    return tuple(result.ids)


def expected(request: ServeRequest, family: str = "olmoe") -> tuple[int, ...]:
    """What the plain engine, all experts on the device, gives for it alone."""
    return _expected(family, request.prompt_ids, request.max_new_tokens, request.sampling)


def run(by: ServingEngine, check: bool = True) -> dict[int, tuple[tuple[int, ...], str | None]]:
    """Steps until nothing is left; each request's ids and why it ended."""
    out: dict[int, tuple[tuple[int, ...], str | None]] = {}
    while not by.idle:
        take(out, by.step())
        if check:
            by.state.check()
    return out


def take(out: dict, events: list[Event]) -> None:
    """Adds a step's events to what each request has."""
    for event in events:
        ids, reason = out.get(event.id, ((), None))
        assert reason is None, f"request {event.id} gives something after its end"
        out[event.id] = ids + event.ids, event.finish_reason
