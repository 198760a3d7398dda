"""Many requests through few rows: each gives the ids it gives alone, whoever it runs beside, and nobody waits longer than the bound."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.engine.generate import Request, RequestError, Sampling
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Offload, slot_bank
from jaxmoe.engine.queue import Grouping, Pool, QueueEngine
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload import request_paths
from jaxmoe.offload.trace import DECODE, used_steps
from tests.models import random_model, records_of
from tests.quick import QuickKernels

ROWS, BATCH, EOS, EXPERTS = 5, 2, (20, 25), 4
COUNT = 9


@pytest.fixture(scope="module")
def model():
    return random_model("mixtral", kernels=QuickKernels("cpu"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Greedy and sampled; one ends with its first token, others within a chunk and after more than one."""
    rng = np.random.default_rng(3)
    lengths = (3, 33, 7, 1, 12, 40, 5, 9, 20)
    return [
        Request(tuple(rng.integers(0, 96, n).tolist()), 1 if i == 4 else 3 + 4 * i, Sampling(0.9, 40, 0.95, 0.0, i) if i % 2 else Sampling())
        for i, n in enumerate(lengths)
    ]


def make(model, **more) -> QueueEngine:
    """With prompts in small pieces, so that few programs are compiled."""
    return QueueEngine(model, ROWS, 128, False, EOS, record=True, prefill_tokens=32, **more)


@pytest.fixture(scope="module")
def engine(model) -> QueueEngine:
    return make(model)


@pytest.fixture(scope="module")
def alone(engine, requests) -> list[list[int]]:
    return [engine.generate([r])[0][0].ids for r in requests]


def prior() -> np.ndarray:
    return np.full((2, EXPERTS), 0.5, np.float32)


GROUPINGS = {
    "one step, own routing": (Grouping(BATCH, "greedy", 2, 1), request_paths.recent(prior(), 0.9)),
    "five steps, sets": (Grouping(3, "pairs", 4, 5), request_paths.as_sets(request_paths.recent(prior()), 2)),
    "chunks, by expert": (Grouping(BATCH, "by_expert", 3, 16), request_paths.by_profile(np.random.default_rng(0).random((COUNT, 2, EXPERTS)))),
    "random, no paths": (Grouping(BATCH, "random", None, 2), None),
}


@pytest.mark.parametrize("case", GROUPINGS)
def test_every_request_gives_what_it_gives_alone(engine, requests, alone, case):
    grouping, source = GROUPINGS[case]
    results, stats = engine.serve(requests, grouping, source)
    assert [r.ids for r in results] == alone
    assert len({r.finish_reason for r in results}) == 2  # some were ended by a token, some by length
    assert stats.decode_tokens == sum(map(len, alone)) - COUNT
    assert stats.waited.max() > 0 and (grouping.bound is None or stats.waited.max() <= grouping.bound)
    assert stats.loads is None and stats.scheduler_seconds > 0


def test_distinct_experts_are_those_of_the_trace(model, requests):
    engine = make(model)
    engine.serve(requests[:2], Grouping(BATCH, "arrival"))  # its requests are numbered on
    results, stats = engine.serve(requests, Grouping(BATCH, "greedy", 2, 3), request_paths.recent(prior()))
    trace = engine.trace()
    mine = (trace.phase == DECODE) & (trace.sequence >= 2)
    columns = {name: getattr(trace, name)[mine] for name in ("ids", "weights", "tokens", "sequence", "phase", "step")}
    used, _ = used_steps(dataclasses.replace(trace, **columns))
    assert stats.distinct.tolist() == used.sum((0, 2)).tolist() and stats.decode_steps == len(used)
    assert (stats.distinct_per_step > 2).all() and (stats.distinct_per_step <= EXPERTS).all()
    for i, result in enumerate(results):
        assert trace.tokens[mine & (trace.sequence == 2 + i)].tolist() == result.ids[:-1]


def test_regrouping_works_with_experts_from_the_host(model, requests, alone):
    source, bank = ExpertSource(model.spec, records_of(model)), slot_bank(model.spec, None, Offload(3))
    programs = HostDriven(model.spec, bank, model.kernels, False, source, record=True)
    engine = make(dataclasses.replace(model, bank=bank), programs=programs)
    results, stats = engine.serve(requests[:6], Grouping(1, "greedy", 5, 2, held_cost=0.5), request_paths.recent(prior()))  # one program to compile
    assert [r.ids for r in results] == alone[:6]
    assert 0 < stats.loads.sum() <= stats.distinct.sum() and 0 < stats.waited.max() <= 5


def test_what_can_not_be_run_is_refused(model, requests):
    plain = QueueEngine(model, ROWS, 128, True)
    with pytest.raises(RequestError, match="request 1 has temperature 0.9"):
        plain.serve(requests, Grouping(BATCH))
    with pytest.raises(RequestError, match="request 0 needs 300 positions"):
        plain.serve([Request((1,) * 200, 100)], Grouping(BATCH))
    greedy = [dataclasses.replace(r, sampling=Sampling()) for r in requests]
    with pytest.raises(ValueError, match="bound of 1 rounds can't be kept by 5 requests"):
        plain.serve(greedy, Grouping(BATCH, bound=1), request_paths.by_profile(np.zeros((COUNT, 2, EXPERTS))))
    with pytest.raises(ValueError, match="rounds of 17 steps: give 1 to 16"):
        plain.serve(greedy, Grouping(BATCH, every=17))
    with pytest.raises(ValueError, match="cost of 0.5 .* is for the grouping 'greedy', not 'pairs'"):
        plain.serve(greedy, Grouping(BATCH, "pairs", held_cost=0.5))
    with pytest.raises(ValueError, match="'greedy' reads paths"):
        plain.serve(greedy, Grouping(BATCH))
    with pytest.raises(ValueError, match="'recent' are learned from the routing"):
        plain.serve(greedy, Grouping(BATCH), request_paths.recent(prior()))


def test_a_pool_counts_rounds_that_pass_a_request_over():
    pool = Pool().admit((4, 5, 6)).commit((5,), ()).admit((7,)).commit((4, 7), (7,))
    assert pool == Pool((4, 5, 6), (0, 1, 2))
    assert pool.choose(np.zeros((3, 2)), Grouping(2, "greedy", 2)) == (6, 4)
    assert pool.choose(np.zeros((3, 2)), Grouping(8)) == (4, 5, 6)
