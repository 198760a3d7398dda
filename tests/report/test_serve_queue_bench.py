"""The queue's measurement on a model of toy size: same tokens in all arms, bytes that add up, and ratios to the controls. About 10 seconds."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.offload.trace import model_hash
from jaxmoe.report import serve_queue_bench as bench
from jaxmoe.report import serve_queue_sources
from jaxmoe.report.serve_load import Sizes
from jaxmoe.report.serve_queue_sources import PROMPT, Recording, mixed_queue, sources
from jaxmoe.train.corpus import Corpus
from jaxmoe.train.sources import MissingText
from tests.models import random_model, slot_model
from tests.quick import QuickKernels

BATCH, WAIT, COUNT = 2, 2, 8


def text(seed: int, tokens: int = 400) -> Corpus:
    """Two domains, each of half of the words."""
    rng = np.random.default_rng(seed)
    halves = {"low": (3, 48), "high": (48, 96)}
    streams = {split: {name: rng.integers(*half, tokens).astype(np.uint16) for name, half in halves.items()} for split in ("train", "held_out")}
    return Corpus(Path("nowhere"), {"domains": dict.fromkeys(halves)}, streams)


@pytest.fixture(scope="module")
def model():
    """A quarter of the experts has slots."""
    return slot_model(random_model("qwen3_moe", kernels=QuickKernels("cpu"), unroll=False), 2)


@pytest.fixture(scope="module")
def queues():
    return [mixed_queue(text(0), COUNT, seed, split, new=Sizes(6, 0.4, 3, 12)) for seed, split in ((0, "held_out"), (1, "train"))]


def test_text_is_of_the_domains_that_are_here(monkeypatch):
    """The tokenizer gives a token a letter."""

    def read(domain):
        if domain.name != "python_code":
            raise MissingText(domain.name)
        return [(f"file {i}", chr(65 + i) * 300) for i in range(40)]

    monkeypatch.setattr(serve_queue_sources, "load", read)
    found = serve_queue_sources.installed_text(SimpleNamespace(encode=lambda passage: [ord(letter) for letter in passage]), 1000)
    assert found.domains == ("python_code",) and {name: len(part["python_code"]) for name, part in found.streams.items()}["train"] == 1000
    letters = [set(part["python_code"].tolist()) for part in found.streams.values()]
    assert all(letters) and letters[0].isdisjoint(letters[1])


@pytest.fixture(scope="module")
def records(model, queues):
    told, traces = [], []
    found = bench.measure(model, *queues, BATCH, WAIT, traces.append, 2, told.append)  # trained to nothing, so that there is no path predictor
    (trace,), other = traces, queues[1].requests
    assert len(trace.tokens) == sum(r.max_new_tokens - 1 for r in other) and (trace.ids >= 0).all() and len(set(trace.sequence.tolist())) == COUNT
    names = [r["settings"]["arm"] for r in found]
    assert told == ["compiling", "recording", "training the path predictor", *names, *names[::-1]]
    return {r["settings"]["arm"]: r for r in found}


def test_a_queue_has_all_domains_in_equal_parts(queues):
    queue, other = queues
    assert sorted(queue.domains) == ["high"] * 4 + ["low"] * 4 and queue.domains != tuple(sorted(queue.domains))
    for domain, request in zip(queue.domains, queue.requests, strict=True):
        assert len(request.prompt_ids) == PROMPT and {id < 48 for id in request.prompt_ids} == {domain == "low"}
    assert len({r.sampling.seed for r in queue.requests}) == COUNT and len({r.max_new_tokens for r in queue.requests}) > 2
    assert {r.prompt_ids for r in queue.requests}.isdisjoint(r.prompt_ids for r in other.requests)
    assert mixed_queue(text(0), COUNT, new=Sizes(6, 0.4, 3, 12)) == queue
    with pytest.raises(ValueError, match="the held_out text of 2 domains has 24 windows of 32 tokens: give 40, or more text"):
        mixed_queue(text(0), 40)


def test_every_arm_is_recorded_beside_its_controls(model, records):
    sources = ["previous token", "own routing", "token, learned", "token", "oracle"]
    assert list(records)[:4] == list(bench.CONTROLS)
    assert list(records)[4:] == [f"grouped by {s}" for s in sources] + [f"grouped by {s}, held" for s in ("token, learned", "oracle")]
    for name, r in records.items():
        own, size = r["counters"], model.bank.record_bytes
        assert r["spec_hash"] == model_hash(model.spec) and r["settings"]["expert_slots"] == [2, 2] and r["settings"]["experts"] == 8
        assert own["compiles"] == 0 and {timing["n"] for timing in r["timings"].values()} == {2}, name
        assert own["tokens"] == own["decoded"] + COUNT == records["arrival"]["counters"]["tokens"]
        assert r["bytes"]["decode_bytes"] % size == 0 and r["bytes"]["prompt_bytes"] >= 2 * 2 * size
        assert own["bytes_per_token"] == pytest.approx(sum(r["bytes"].values()) / own["tokens"])
        missed = own["distinct_per_token"] * own["decoded"] * 2 * (1 - own["decode_hit_rate"])
        assert r["bytes"]["decode_bytes"] == pytest.approx(missed * size)
        assert 2 <= own["distinct_per_step"] <= 8 and own["distinct_per_step"] * own["decode_steps"] == pytest.approx(
            own["distinct_per_token"] * own["decoded"]
        )
        for control in set(bench.CONTROLS) - {name}:
            other = records[control]["counters"]
            assert own[f"bytes_per_token / {control}"] == pytest.approx(own["bytes_per_token"] / other["bytes_per_token"])
            assert own[f"tokens_per_second / {control}"] == pytest.approx(own["tokens_per_second"] / other["tokens_per_second"])
        assert 0 <= r["timings"]["paths"]["median"] < r["timings"]["wall"]["median"] and r["timings"]["processor"]["median"] > 0
        assert json.loads(json.dumps(r)) == r
    assert records["grouped by oracle"]["bound"]["percent"] == pytest.approx(100)


def test_a_path_predictor_is_told_the_tokens_of_its_window(model, queues):
    truth = Recording()
    for i in range(COUNT):
        truth.parts[i] = [(np.asarray([1, 2]), np.ones((2, 2, 2), np.int16))]
    found = sources(model, queues[0], truth, None, SimpleNamespace(settings=SimpleNamespace(window=4)))
    assert {name: unrouted for name, (_, unrouted) in found.items()} == {
        "previous token": 0, "own routing": 0, "token, learned": 0, "path predictor": 4, "oracle": None,
    }  # fmt: skip
    assert found["path predictor"][0].name == "path" and all(source.routed for source, _ in found.values())


def test_grouping_asks_for_less_and_one_at_a_time_for_most(records):
    distinct = {name: r["counters"]["distinct_per_token"] for name, r in records.items()}
    assert distinct["one at a time"] == 2.0 == max(distinct.values())
    assert distinct["grouped by oracle"] < distinct["no regrouping, in turns"]
    assert distinct["no regrouping, together"] == min(distinct.values())
    waited = {name: r["counters"]["waited"] for name, r in records.items()}
    assert waited["arrival"] == waited["one at a time"] == waited["no regrouping, together"] == 0
    assert 0 < waited["grouped by oracle"] <= Policy().bound


def test_what_can_not_be_measured_is_refused(model, queues, monkeypatch):
    with pytest.raises(ValueError, match="load the model with fewer slots than experts"):
        bench.measure(random_model("qwen3_moe", kernels=QuickKernels("cpu"), unroll=False), queues[0])
    ran = bench.run_arm

    def other_tokens(runner, queue, arm, paths=None):
        found = ran(runner, queue, arm, paths)
        return dataclasses.replace(found, ids=found.ids[::-1]) if arm.name == "arrival" else found

    monkeypatch.setattr(bench, "run_arm", other_tokens)
    with pytest.raises(RuntimeError, match="the tokens of 'arrival' differ"):
        bench.measure(model, queues[0], batch=BATCH, wait=WAIT)
