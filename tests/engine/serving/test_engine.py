"""The serving engine gives what the plain engine gives for each request alone, whatever the mode, the pool, and what happens on the way."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.engine.generate import RequestError
from jaxmoe.engine.serving.requests import QueueFull, ServeRequest
from jaxmoe.engine.serving.scheduler import Objective, Policy
from tests.engine.serving import small
from tests.engine.serving.small import SPEC, expected

RUNNERS: dict = {}


def runner(kind: str):
    """One for the whole file; its programs are the most of what tests take."""
    if kind not in RUNNERS:
        slots = 0 if kind == "resident" else 4
        RUNNERS[kind] = small.runner(small.model(slots=slots), host=kind == "host-driven")
    return RUNNERS[kind]


def all_right(engine, got, asked) -> None:
    assert [got[i][0] for i in range(len(asked))] == [expected(r) for r in asked]
    pool = engine.state.pool
    assert pool.free + pool.cached == pool.pages and pool.held == 0 and engine.state.host.held == 0


@pytest.mark.parametrize("kind,mode", [
    ("resident", "chunked"), ("resident", "splitfuse"), ("resident", "whole"), ("resident", "layered"), ("slots", "layered"),
    ("host-driven", "layered"),
])  # fmt: skip
def test_every_mode_gives_the_plain_engines_tokens(kind, mode):
    engine = small.engine(runner(kind), Policy(prefill=mode))
    asked = small.requests(10, seed=3)
    for request in asked:
        engine.submit(request)
    got = small.run(engine)
    all_right(engine, got, asked)
    assert {reason for _, reason in got.values()} <= {"stop", "length"}


@pytest.mark.parametrize("kind,preemption", [("resident", "swap"), ("resident", "recompute"), ("slots", "swap")])
def test_hundreds_of_preemptions_and_cancels_lose_and_change_no_token(kind, preemption):
    """A pool that four sequences outgrow, an objective that keeps changing its mind about who goes first, and sequences cancelled at random."""
    minds = [Policy(prefill="layered", preemption=preemption, objective=Objective(priority=sign), margin=0.5) for sign in (1.0, -1.0)]
    engine = small.engine(runner(kind), minds[0])
    rng, asked, got, gone = np.random.default_rng(0), small.requests(60, seed=5, longest=20, new=60), {}, set()
    waiting = list(asked)
    while waiting or not engine.idle:
        for _ in range(int(rng.integers(0, 2))):
            if waiting:
                engine.submit(dataclasses.replace(waiting.pop(0), priority=int(rng.integers(0, 4))))
        engine.policy = minds[int(rng.integers(0, 2))]
        if engine.state.seqs and rng.random() < 0.04:
            gone |= {victim := int(rng.choice(list(engine.state.seqs)))}
            engine.cancel([victim])
        small.take(got, engine.step())
        engine.state.check()
    for i, request in enumerate(asked):
        ids, reason = got[i]
        if i in gone:
            assert reason == "abort" and ids == expected(request)[: len(ids)]
        else:
            assert ids == expected(request) and reason in ("stop", "length")
    counts = engine.state.counters
    assert len(gone) >= 10 and counts.preemptions >= 60 and (counts.swaps > 50) == (preemption == "swap"), (len(gone), counts)
    assert engine.state.pool.held == 0 and engine.state.host.held == 0


def test_a_prompt_that_came_before_is_not_computed_again():
    engine = small.engine(runner("resident"), Policy(prefill="chunked"))
    first = small.requests(1, seed=8, longest=101)[0]
    prompt = tuple(np.random.default_rng(8).integers(6, 96, 90).tolist())
    again = dataclasses.replace(first, prompt_ids=prompt, max_new_tokens=6)
    engine.submit(again)
    got = small.run(engine)
    computed = engine.state.counters.prompt
    engine.submit(dataclasses.replace(again, prompt_ids=prompt[:85] + (7, 8, 9)))
    got |= small.run(engine)
    assert got[0][0] == expected(again)
    assert got[1][0] == expected(dataclasses.replace(again, prompt_ids=prompt[:85] + (7, 8, 9)))
    assert engine.state.counters.prompt - computed == 88 - 80, "five pages of 16 tokens were there"
    assert engine.state.counters.cached == 80


def test_answers_to_one_prompt_share_its_pages_and_differ_by_their_seeds():
    engine = small.engine(runner("resident"), Policy(prefill="chunked"))
    (request,) = [r for r in small.requests(2, seed=9, longest=80) if r.sampling.temperature]
    request = dataclasses.replace(request, max_new_tokens=8)
    ids = engine.submit(request, n=4)
    got = small.run(engine)
    for k, id in enumerate(ids):
        own = dataclasses.replace(request.sampling, seed=request.sampling.seed + k)
        assert got[id][0] == expected(dataclasses.replace(request, sampling=own))
    assert len({got[id][0] for id in ids}) > 1
    assert engine.state.counters.prompt == len(request.prompt_ids), "the prompt was computed once"
    assert engine.state.counters.copies >= 1, "and its last page copied before it was written"


def test_log_probabilities_penalties_and_biases():
    engine = small.engine(runner("resident"), Policy(prefill="layered"))
    plain = dataclasses.replace(small.requests(1, seed=11)[0], max_new_tokens=6, ignore_eos=True)
    wanted = 50
    asked = [plain, dataclasses.replace(plain, logprobs=3), dataclasses.replace(plain, logit_bias={wanted: 100.0}),
             dataclasses.replace(plain, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=1.5)]  # fmt: skip
    ids = [engine.submit(request)[0] for request in asked]
    events: dict = {id: [] for id in ids}
    while not engine.idle:
        for event in engine.step():
            events[event.id].append(event)
    tokens = {id: tuple(t for e in events[id] for t in e.ids) for id in ids}
    assert tokens[ids[0]] == tokens[ids[1]] == expected(dataclasses.replace(plain))[:6]
    logprobs = [l for e in events[ids[1]] for l in e.logprobs]
    assert [l.id for l in logprobs] == list(tokens[ids[1]]) and all(len(l.top) == 3 and l.top[0][1] >= l.logprob for l in logprobs)
    assert all(l.top[0] == (l.id, l.logprob) for l in logprobs), "a greedy token is the likeliest"
    assert tokens[ids[2]] == (wanted,) * 6
    assert len(set(tokens[ids[3]])) == 6, "penalties this large let no token come twice"


def test_a_prompt_that_is_cancelled_within_a_wave_writes_over_nobody():
    """Slot 0 decodes while the first prompt of a wave goes: what is left of its place in the batch must not be taken for slot 0's first page."""
    engine = small.engine(runner("resident"), Policy(prefill="layered"))
    first, gone, last = (dataclasses.replace(r, prompt_ids=r.prompt_ids * 3) for r in small.requests(3, seed=29, longest=12))
    first = dataclasses.replace(first, max_new_tokens=24, ignore_eos=True)
    got: dict = {}
    engine.submit(first)
    for _ in range(3):
        small.take(got, engine.step())
    engine.submit(gone)
    engine.submit(last)
    small.take(got, engine.step())
    assert engine.state.wave is not None and len(engine.state.wave.pieces) == 2
    engine.cancel([1])
    while not engine.idle:
        small.take(got, engine.step())
    assert got[0][0][:6] == expected(first)[:6] and got[2][0] == expected(last)
    alone = small.engine(runner("resident"), Policy(prefill="chunked"))
    alone.submit(first)
    assert small.run(alone)[0] == got[0]


def test_a_step_that_fails_ends_its_requests_and_no_others():
    engine = small.engine(small.runner(small.model()), Policy(prefill="chunked"))
    asked = small.requests(9, seed=13, longest=40)
    ids = [engine.submit(request)[0] for request in asked]
    got: dict = {}
    small.take(got, engine.step())
    real = engine.runner._run

    class Broken:
        def __getattr__(self, name):
            if name in ("decode", "prompts", "group"):
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while allocating 12345 bytes")
            return getattr(real, name)

    engine.runner._run = Broken()
    events = engine.step()
    small.take(got, events)
    failed = {event.id for event in events if event.finish_reason == "error"}
    assert failed and failed < set(ids) and all("12345" in event.error for event in events if event.id in failed)
    engine.runner._run = real
    for id, (more, reason) in small.run(engine).items():
        got[id] = got.get(id, ((), None))[0] + more, reason
    for id, request in zip(ids, asked, strict=True):
        if id not in failed:
            assert got[id][0] == expected(request)
    assert engine.state.pool.held == 0 and engine.counters()["pages"]["held"] == 0


@pytest.mark.parametrize("kind,mode", [("resident", "chunked"), ("slots", "layered")])
def test_nothing_is_compiled_after_warming_up(kind, mode):
    engine = small.engine(runner(kind), Policy(prefill=mode))
    engine.warm_up()
    for request in small.requests(12, seed=17):
        engine.submit(request)
    engine.submit(dataclasses.replace(small.requests(1, seed=19)[0], logprobs=2), n=3)
    small.run(engine)
    assert engine.counters()["xla_compiles_after_warmup"] == 0
    assert engine.programs < 32


@pytest.mark.parametrize("change,says", [
    ({"prompt_ids": ()}, "empty"), ({"prompt_ids": (1, 96)}, "96"), ({"prompt_ids": (1,) * 234, "max_new_tokens": 7}, "234 tokens.*7.*241.*240"),
    ({"max_new_tokens": 0}, "0"), ({"logprobs": 21}, "21"), ({"presence_penalty": 3.0}, "3.0"), ({"stop": ("x",)}, "tokenizer"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "9"), ({"logit_bias": {200: 1.0}}, "200"), ({"repetition_penalty": 0.0}, "0"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_with_its_value(change, says):
    engine = small.engine(runner("resident"))
    with pytest.raises(RequestError, match=says):
        engine.submit(dataclasses.replace(ServeRequest((7, 8), 8), **change))
    assert engine.idle and not engine.state.seqs


def test_the_longest_request_that_fits_is_taken_and_one_more_token_is_not():
    engine = small.engine(runner("resident"))
    engine.check(ServeRequest((7,) * 200, 40))
    with pytest.raises(RequestError, match="241"):
        engine.check(ServeRequest((7,) * 201, 40))
    few = small.engine(small.runner(small.model(), dataclasses.replace(SPEC, pages=3)))
    few.check(ServeRequest((7,) * 40, 8))
    with pytest.raises(RequestError, match="4 pages of 16 tokens.* 3"):
        few.check(ServeRequest((7,) * 41, 8))


def test_a_full_queue_turns_requests_away():
    engine = small.engine(runner("resident"), max_waiting=3)
    for request in small.requests(3):
        engine.submit(request)
    with pytest.raises(QueueFull, match="3"):
        engine.submit(small.requests(1)[0])
    small.run(engine)
    assert engine.submit(small.requests(1)[0]) == [3]
    small.run(engine)


def test_int8_pages_give_tokens_that_depend_on_nothing_around_them():
    """Not the float32 pages' tokens, but the same ones whatever the order and the mode."""
    asked, found = small.requests(8, seed=23), []
    by = small.runner(small.model(), kv="int8")
    for mode, order in (("chunked", asked), ("layered", asked[::-1])):
        engine = small.engine(by, Policy(prefill=mode))
        for request in order:
            engine.submit(request)
        found.append([ids for _, (ids, _) in sorted(small.run(engine).items())])
    assert found[0] == found[1][::-1]
    assert by.page_bytes() < runner("resident").page_bytes() / 3
