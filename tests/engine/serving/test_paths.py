"""Expert-aware orders on the engine: the same tokens as a plain engine gives, fewer experts where there is something to gain, and nobody forgotten.

About 20 seconds, most of them compiling.
"""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.paths import RequestPaths, by_token_seen
from jaxmoe.engine.serving.regret import Regret
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.engine.serving.routing import DecodeCounts, Routed, decoded
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.scheduler import Policy, fresh, submit
from jaxmoe.engine.serving.types import Phase, Row, Seq, ServeSpec, StepPlan
from jaxmoe.offload import request_paths
from jaxmoe.offload.predictors import PREDICTORS, Sizes
from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.residency import POLICIES
from tests.models import random_model, slot_model
from tests.quick import QuickKernels

SPEC = ServeSpec(slots=6, page=32, pages=12, positions=128, batch=2, chunk=64, wave=64, groups=2, burst=4, host_pages=24, move=4)
EOS = (31,)
LAYERS, EXPERTS, ACTIVE = 2, 8, 2
SIZES = Sizes(LAYERS, EXPERTS, ACTIVE)
POOLED = next(name for name, policy in POLICIES.items() if policy.shared)
PRIOR = np.full((LAYERS, EXPERTS), ACTIVE / EXPERTS, np.float32)


@pytest.fixture(scope="module")
def whole():
    """Tokens below 48 are of one topic, the others of another: each has a direction of its own, which embedding and output matrix share."""
    model = random_model("qwen3_moe", kernels=QuickKernels("cpu"), unroll=False)
    table = np.array(model.params["embed"]["table"])
    for half in (slice(0, 48), slice(48, 96)):
        table[half] += 0.6 * np.random.default_rng(half.start).standard_normal(table.shape[1])
    return dataclasses.replace(model, params={**model.params, "embed": {"table": table}})


@pytest.fixture(scope="module")
def model(whole):
    return slot_model(whole, 4)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Greedy and sampled, topic by turns, of prompts of several lengths."""
    rng = np.random.default_rng(3)
    lengths, out = (3, 33, 7, 30, 12, 1, 39, 5, 9, 20), []
    for i, n in enumerate(lengths):
        prompt = 48 * (i % 2) + rng.integers(0, 48, n)
        out.append(Request(tuple(prompt.tolist()), 50 + 5 * i, Sampling(4.0, 0, 0.95, 0.0, i) if i % 5 else Sampling()))
    return out


@pytest.fixture(scope="module")
def expected(whole, requests) -> list[list[int]]:
    engine = Engine(whole, len(requests), SPEC.positions, False, EOS, prefill_tokens=32)
    return [result.ids for result in engine.generate(requests)[0]]


@pytest.fixture(scope="module")
def runner(model) -> Runner:
    return Runner(model, SPEC, EOS, record=True)


class Watched(RequestPaths):
    """Keeps what was recorded of every sequence, by position, and asserts that recordings of one token agree."""

    def learn(self, plan, given, live, runner):
        self.truth = getattr(self, "truth", {})
        for call in runner.routed:
            for id, at, tokens, experts in call.by_sequence():
                assert live[id].ids[at] == tokens[0] and experts.shape == (len(tokens), LAYERS, ACTIVE)
                for k, (token, chosen) in enumerate(zip(tokens.tolist(), experts, strict=True)):
                    seen = self.truth.setdefault(id, {}).setdefault(at + k, (token, chosen))
                    assert seen[0] == token and (seen[1] == chosen).all()
        super().learn(plan, given, live, runner)


def serve(runner, requests, policy, source=None, spec=SPEC, cancel=(), **how):
    """Serves all, the clock standing at the step's number; gives the engine, ids by request, and the most steps that each was passed over."""
    runner.rebuild()
    runner.decoded = DecodeCounts()
    paths = None if source is None else Watched(source, runner, policy, **how)
    steps, out, waited = 0, [[] for _ in requests], 0
    engine = ServingEngine(runner, None, EOS, policy, clock=lambda: float(steps), paths=paths)
    engine.state = fresh(spec, spec.move)  # fewer sequences than the runner has room for
    for r in requests:
        engine.submit(ServeRequest(r.prompt_ids, r.max_new_tokens, r.sampling))
    while not engine.idle:
        steps += 1
        if steps == 12:
            engine.cancel(cancel)
        for event in engine.step():
            out[event.id] += event.ids
            assert event.finish_reason in (None, "stop", "length") or event.id in cancel, event
        engine.state.check()
        waited = max([waited, *(s.waited for s in engine.state.seqs.values())])
    assert paths is None or paths.known <= SPEC.slots + len(requests)
    return engine, out, waited


TIGHT = dataclasses.replace(SPEC, pages=6)
GREEDY = Policy(prefill="chunked", group="greedy", bound=5)
CASES = {
    "own routing": (GREEDY, request_paths.recent(PRIOR, 0.9), {}),
    "previous token, pairs, chunks": (
        dataclasses.replace(GREEDY, group="pairs"),
        request_paths.by_predictor(PREDICTORS["previous"], PREDICTORS["previous"].fit([], sizes=SIZES)), {},
    ),
    "tokens, what is held, admission, layered": (
        dataclasses.replace(GREEDY, prefill="layered", held_cost=0.3, objective="expert-aware"), by_token_seen(LAYERS, EXPERTS, ACTIVE), {"look": 2},
    ),
    "profiles by topic, computed again": (
        dataclasses.replace(GREEDY, preemption="recompute", keep=False),
        request_paths.by_profile(np.random.default_rng(0).random((2, LAYERS, EXPERTS))), {"number": lambda id, live: live.ids[0] // 48},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_a_plain_engine_through_swaps_and_cancels(runner, requests, expected, case):
    policy, source, how = CASES[case]
    engine, out, waited = serve(runner, requests, policy, source, TIGHT, cancel=(2, 7), **how)
    for i, (ids, ought) in enumerate(zip(out, expected, strict=True)):
        assert ids == (ought[: len(ids)] if i in (2, 7) else ought), i
    counters = engine.state.counters
    assert (counters.swaps if policy.preemption == "swap" else counters.recomputed) > 0
    assert 0 < waited <= policy.bound


def oracle(truth) -> request_paths.PathSource:
    """The experts of each sequence's next token, of recordings by position."""

    def begin(state, row, number):
        state[row] = number, 0
        return state

    def after(state, row, tokens, ids):
        own = truth[state[row, 0]]
        for k, token in enumerate(tokens.tolist()):
            assert own[state[row, 1] + k][0] == token, "each token is told once, in order"
        state[row, 1] += len(tokens)
        return state

    def paths(state, rows, tokens):
        assert [truth[i][at][0] for i, at in state[rows]] == tokens.tolist()
        return one_hot(np.stack([truth[i][at][1] for i, at in state[rows]]), EXPERTS)

    return request_paths.PathSource("oracle", lambda rows: np.zeros((rows, 2), int), begin, after, paths)


@pytest.fixture(scope="module")
def arrival(runner, requests, expected):
    """In order of arrival: as many sequences as a step takes."""
    spec = dataclasses.replace(SPEC, slots=SPEC.batch)
    engine, out, waited = serve(runner, requests, Policy(prefill="layered"), request_paths.recent(PRIOR), spec)
    assert out == expected and waited == 0
    truth = engine._paths.truth
    for i, r in enumerate(requests):  # prompts went by groups of layers, which record nothing
        for at, token in enumerate(r.prompt_ids):
            truth.setdefault(i, {}).setdefault(at, (token, np.full((LAYERS, ACTIVE), -1, np.int16)))
    return truth, runner.decoded


def test_with_an_oracle_steps_ask_for_fewer_experts_of_two_topics(runner, requests, expected, arrival):
    truth, base = arrival
    for i, ids in enumerate(expected):
        assert sorted(truth[i]) == list(range(len(requests[i].prompt_ids) + len(ids) - 1))
    policy = Policy(prefill="layered", group="greedy", bound=16)
    engine, out, waited = serve(runner, requests, policy, oracle(truth), unrouted=None)
    assert out == expected and engine.state.counters.preemptions == 0 and 0 < waited <= 16
    mine = runner.decoded
    per_token = [counts.read()["requests"].sum() / sum(map(len, expected)) for counts in (mine, base)]
    assert per_token[0] < 0.92 * per_token[1]
    assert (mine.distinct_per_step >= ACTIVE).all() and (mine.distinct_per_step <= SPEC.batch * ACTIVE).all()
    assert (mine.read()["loads"] == mine.read()["requests"] - mine.read()["hits"]).all()


def test_an_oracle_is_told_each_token_once_whatever_becomes_of_its_sequence(runner, requests, expected, arrival):
    truth, _ = arrival
    for preemption in ("swap", "recompute"):
        policy = Policy(prefill="chunked", preemption=preemption, group="greedy", bound=5)
        engine, out, _ = serve(runner, requests, policy, oracle(truth), TIGHT, unrouted=None)
        assert out == expected and engine.state.counters.preemptions > 0


def test_decode_counts_are_those_of_the_recorded_routing(runner, requests):
    """Rows and prompts in calls of their own, bursts among them."""
    asked, steps = np.zeros(LAYERS, int), 0
    policy = Policy(prefill="layered")
    runner.rebuild()
    runner.decoded = DecodeCounts()
    engine = ServingEngine(runner, None, EOS, policy)
    for r in requests[:2]:
        engine.submit(ServeRequest(r.prompt_ids, 30))
    while not engine.idle:
        engine.step()
        for call in runner.routed:
            experts = np.asarray(call.experts).reshape(-1, LAYERS, ACTIVE)
            of_step = np.arange(len(call.ids)) // (len(call.ids) // len(np.asarray(call.experts)))
            for step in np.unique(of_step[call.ids >= 0]):
                asked += one_hot(experts[(of_step == step) & (call.ids >= 0)], EXPERTS).any(0).sum(1)
                steps += 1
    found = runner.decoded
    assert found.steps == steps > 20 and found.read()["requests"].tolist() == asked.tolist()
    assert found.distinct_per_step.tolist() == (asked / steps).tolist()
    assert DecodeCounts().read() == {} and DecodeCounts().distinct_per_step is None


# --- Without a device


def stub(slots: int = 2, batch: int = 1, record: bool = True, held=None):
    """What `RequestPaths` needs of a runner."""
    spec = dataclasses.replace(SPEC, slots=slots, batch=batch, pages=4 * slots)
    moe = SimpleNamespace(moe=(SimpleNamespace(active=ACTIVE), None), moe_layers=(0, 1))
    bank = SimpleNamespace() if held is None else SimpleNamespace(slot_of_expert=held)
    return SimpleNamespace(spec=spec, record=record, model=SimpleNamespace(spec=moe), routed=[], state=SimpleNamespace(bank=bank))


def told() -> request_paths.PathSource:
    """Its state is what every row was told: (number, tokens, how many of them with their routing)."""

    def begin(state, row, number):
        return {**state, row: (number, [], 0)}

    def after(state, row, tokens, ids):
        number, before, routed = state[row]
        return {**state, row: (number, before + tokens.tolist(), routed + int((ids >= 0).all((1, 2)).sum()))}

    def paths(state, rows, tokens):
        return np.stack([np.full((LAYERS, EXPERTS), min(1.0, state[row][0] / 10), np.float32) for row in rows.tolist()])

    return request_paths.PathSource("told", lambda rows: {}, begin, after, paths)


def running(runner, *tokens: int):
    """A state whose sequences decode, with so many tokens, and what is live."""
    state = fresh(runner.spec)
    live = {i: SimpleNamespace(ids=[10 * i + k for k in range(n)]) for i, n in enumerate(tokens)}
    seqs = {i: Seq(i, n - 1, n, n + 5, float(i), n - 1, Phase.RUNNING, i) for i, n in enumerate(tokens)}
    return dataclasses.replace(state, seqs=seqs, running=tuple(seqs)), live


def step(runner, id: int, at: int, token: int):
    """The runner decoded a token of a sequence."""
    rows, out = [Row(id, 0, at, 1)], np.asarray([[1]])
    runner.routed = [decoded(rows, np.asarray([token]), np.asarray([at]), out, np.ones((1, 1, LAYERS, ACTIVE), np.int16))]


def test_tokens_without_routing_are_told_as_far_as_the_source_wants_them():
    for unrouted, expected in ((0, []), (2, [2, 3]), (None, [0, 1, 2, 3])):
        runner = stub()
        paths = RequestPaths(told(), runner, GREEDY, unrouted)
        state, live = running(runner, 5, 3)
        found, held = paths.of(state, live, runner)
        assert sorted(found) == [0, 1] and held is None
        step(runner, 0, 4, 4)
        paths.learn(StepPlan(), {}, live, runner)
        paths.learn(StepPlan(), {}, live, runner)  # computed again
        assert paths._state[paths._rows[0]] == (0, [*expected, 4], 1)


def test_rows_go_to_who_comes_and_are_taken_from_who_was_not_looked_at_for_longest():
    runner = stub(slots=2)
    paths = RequestPaths(told(), runner, GREEDY)
    live = {i: SimpleNamespace(ids=[1, 2, 3]) for i in range(6)}
    for id in (0, 1, 2, 3, 0):
        step(runner, id, 1, 2)
        paths.learn(StepPlan(), {}, live, runner)
    assert paths.known == 4 and list(paths._rows) == [1, 2, 3, 0]
    step(runner, 5, 1, 2)
    paths.learn(StepPlan(), {}, live, runner)
    assert list(paths._rows) == [2, 3, 0, 5] and len(set(paths._rows.values())) == 4 and set(paths._seen) == set(paths._rows)
    assert paths.of(fresh(runner.spec), {}, runner) == (None, None) and paths.known == 0


def test_paths_are_asked_for_where_the_policy_goes_by_them():
    runner = stub(slots=4, batch=2, held=np.asarray([[0] + 7 * [-1], 8 * [-1]]))
    three, live = running(runner, 4, 4, 4)
    two, _ = running(runner, 4, 4)
    for policy in (Policy(), Policy(group="arrival"), Policy(group="random")):
        assert RequestPaths(told(), runner, policy).of(three, live, runner) == (None, None)
    paths = RequestPaths(told(), runner, dataclasses.replace(GREEDY, held_cost=0.5))
    assert paths.of(two, live, runner) == (None, None), "all decode together"
    found, held = paths.of(three, live, runner)
    assert sorted(found) == [0, 1, 2] and held.sum() == 1 and held[0, 0]
    # One waits: who is admitted is chosen by what it asks for, so that the running ones' paths matter too.
    waiting = submit(submit(two, Seq(8, 3, 3, 9, 8.0)), Seq(9, 3, 3, 9, 9.0))
    live |= {i: SimpleNamespace(ids=[1, 2, 3]) for i in (8, 9)}
    admitting = RequestPaths(told(), runner, Policy(objective="expert-aware"), look=1)
    found, held = admitting.of(waiting, live, runner)
    assert sorted(found) == [0, 1, 8, 9] and held is None and admitting.known == 2
    assert (found[8] == np.float32(0.8)).all() and (found[9] == found[8]).all(), "past the look the mean stands for a sequence"
    assert admitting.of(two, live, runner) == (None, None)


def test_a_source_that_learns_needs_a_runner_that_records():
    with pytest.raises(ValueError, match="paths by 'recent' are learned from the routing: make the runner with record = True"):
        RequestPaths(request_paths.recent(PRIOR), stub(record=False), GREEDY)
    RequestPaths(request_paths.by_profile(np.zeros((1, LAYERS, EXPERTS))), stub(record=False), GREEDY).warm_up()
    with pytest.raises(ValueError, match="leave out record or run"):
        Runner(SimpleNamespace(on=SimpleNamespace(mesh=None)), SPEC, run=object(), record=True)


def test_tokens_seen_give_their_experts_and_others_the_average():
    source = by_token_seen(1, 4, 1, most=1, weight=1.0)
    state = source.init(3)
    assert source.paths(state, np.zeros(1, int), np.asarray([7])).tolist() == [[[0.25] * 4]]
    ids = np.asarray([[[2]], [[-1]], [[2]], [[3]]])
    state = source.after(state, 0, np.asarray([7, 7, 7, 8]), ids)
    seven, eight = source.paths(state, np.zeros(2, int), np.asarray([7, 8]))
    assert np.allclose(eight, [[0, 0, 2 / 3, 1 / 3]]), "one token has an entry, and this one came later"
    assert np.allclose(seven, [[0, 0, (2 + 2 / 3) / 3, (1 / 3) / 3]])


# --- Regret


def best(contents: frozenset, asked: list[frozenset], slots: int) -> int:
    """Most hits of any cache, by trying all: after each step any of what was there and what was asked for may stay."""
    if not asked:
        return 0
    there = contents | asked[0]
    keep = itertools.combinations(sorted(there), min(slots, len(there)))
    return len(contents & asked[0]) + max(best(frozenset(kept), asked[1:], slots) for kept in keep)


def bank_state(held: list[set], counts=(0, 0, 0)) -> SimpleNamespace:
    table = np.full((len(held), EXPERTS), -1, np.int32)
    for layer, own in enumerate(held):
        table[layer, sorted(own)] = np.arange(len(own))
    requests, hits, loads = (np.array([n], np.int32) for n in counts)
    return SimpleNamespace(slot_of_expert=table, requests=requests, hits=hits, loads=loads)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_policy_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    held = [set(rng.permutation(EXPERTS)[:3].tolist()) for _ in range(LAYERS)]
    regret = Regret(SimpleNamespace(policy="lru", slots=(3, 3), experts=EXPERTS), window=100)
    regret.before(bank_state(held, (50, 20, 10)))
    asked = []
    for steps, rows, padding in ((2, 1, 1), (1, 2, 0), (2, 2, 2)):
        experts = np.stack([rng.permutation(EXPERTS)[:ACTIVE] for _ in range(steps * (rows + padding) * LAYERS)]).astype(np.int16)
        experts = experts.reshape(steps, rows + padding, LAYERS, ACTIVE)
        ids = np.where(np.arange(rows + padding) < rows, np.arange(rows + padding), -1)
        asked += [[frozenset(one[:rows, layer].ravel().tolist()) for layer in range(LAYERS)] for one in experts]
        call = Routed(np.tile(ids, steps), np.zeros(0), np.zeros(0), experts)
        regret.before(None)  # a window is open: nothing is read
        regret.after(call, None)
    requests = sum(len(layer) for step in asked for layer in step)
    regret.close(bank_state(held, (50 + requests, 21, 10 + requests)))
    expected = sum(best(frozenset(held[layer]), [step[layer] for step in asked], 3) for layer in range(LAYERS))
    assert (regret.best_hits, regret.requests, regret.hits, regret.steps) == (expected, requests, 1, 5)
    assert regret.best_loads == requests - expected and regret.loads == requests


def test_regret_of_an_engine_covers_all_that_decoding_asks_for(model, requests):
    runner = Runner(model, SPEC, EOS, record=True, regret=True)
    engine, _, _ = serve(runner, requests, Policy())
    decode, regret = runner.decoded.read(), runner.regret
    regret.close(runner.state.bank)
    assert regret.requests == decode["requests"].sum() and regret.hits == decode["hits"].sum() and regret.loads == decode["loads"].sum()
    assert regret.hits < regret.best_hits < regret.requests and regret.steps == runner.decoded.steps
    assert engine.counters()["expert_regret"] == regret.loads - regret.best_loads > 0
    with pytest.raises(ValueError, match="recorded routing"):
        Runner(model, SPEC, EOS, regret=True)
    with pytest.raises(ValueError, match="share.*takes too long"):
        Regret(SimpleNamespace(policy=POOLED, slots=(3, 3), experts=EXPERTS))
