"""What the scheduler promises, counted exactly: no stalls, full steps, experts streamed and prefixes computed once, what swaps move. 9 seconds."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest

from jaxmoe.engine.serving.admission import Admission
from jaxmoe.engine.serving.drafting import Step
from jaxmoe.engine.serving.preemption import preempt
from jaxmoe.engine.serving.scheduler import Objective, Policy, cancel, check_policy, commit, fresh, plan, submit
from jaxmoe.engine.serving.simulated import Cost, SimRequest, SimResult, simulate
from jaxmoe.engine.serving.types import Phase, Results, Seq, ServeSpec
from tests.engine.serving.reference_loop import check_tokens

SPEC = ServeSpec(slots=16, page=16, pages=400, positions=4096, batch=16, chunk=256, wave=4096, groups=8, burst=1, run=16, host_pages=64)
TINY = ServeSpec(slots=3, page=4, pages=8, positions=24, batch=3, chunk=16, wave=16, groups=2, burst=4, run=4, host_pages=12)


def tokens(seed: int, count: int, low: int = 0, high: int = 1000) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(low, high, count).tolist())


# --- Decoding does not stall (Sarathi-Serve, Dynamic SplitFuse)


@functools.cache
def attacked(mode: str, spec: ServeSpec = SPEC, cost: Cost | None = None, routing=None, prompt: int = 4000) -> SimResult:
    """Eight streams decode, then one long prompt arrives."""
    streams = [SimRequest(tokens(i, 8), 100, 0.0, i) for i in range(8)]
    requests = [*streams, SimRequest(tokens(9, prompt), 4, 0.03, 9)]
    result = simulate(requests, spec, Policy(mode), cost, routing)
    check_tokens(requests, result)
    return result


@pytest.mark.parametrize("mode", ["chunked", "splitfuse", "layered"])
def test_a_long_prompt_stalls_nobody(mode):
    """Every stream advances in every step, and no gap is longer than 1.2 times a full step."""
    result = attacked(mode)
    full = 1e-3 + 1e-5 * (256 if mode != "layered" else 8 + 4000 / 8)
    assert result.stalls == 0
    assert max(gap for i in range(8) for gap in result.gaps(i)) <= 1.2 * full
    assert max(gap for i in range(8) for gap in attacked("whole").gaps(i)) >= 6 * full


def test_tokens_do_not_depend_on_the_size_of_chunks():
    """64, 256 and the prompt's own length, beside what is whole: all equal the loop over one sequence."""
    for chunk in (64, 4096):
        assert attacked("chunked", dataclasses.replace(SPEC, chunk=chunk)).stalls == 0


@pytest.mark.parametrize("run, least", [(1, 0.95), (16, 0.6)])
def test_steps_are_filled_exactly_under_backlog(run, least):
    """Runs of one token fill at least 95% of steps to the token while there is more to do; whole runs need prompts that end in the right place."""
    spec = dataclasses.replace(SPEC, run=run, slots=128, batch=128, pages=2000)
    rng = np.random.default_rng(0)
    requests = [SimRequest(tokens(i, int(n)), int(m), 0.0, i) for i, (n, m) in enumerate(rng.integers((20, 1), (200, 60), (400, 2)))]
    sizes: list[int] = []

    def watch(state, made):
        if state.waiting and state.slots:
            sizes.append(len(made.decode) + sum(piece.count for piece in made.chunk))

    result = simulate(requests, spec, Policy("splitfuse"), watch=watch, verify=False)
    assert result.stalls == 0 and max(sizes) <= spec.chunk and len(sizes) > 100
    assert sum(size == spec.chunk for size in sizes) >= least * len(sizes) and np.mean(sizes) >= 0.97 * spec.chunk


# --- Experts are streamed once (layered prefill)

STREAMED = Cost(fixed=1e-3, per_token=1e-6, link=1e9, expert_bytes=1_000_000, layers=8, experts=32, slots=8)
ROUTES = np.argsort(np.random.default_rng(1).random((1000, 8, 32)), axis=2)[:, :, :4]


def routing(ids: np.ndarray) -> np.ndarray:
    return ROUTES[ids]


def test_a_prompt_brings_each_expert_once():
    """2,048 tokens by eight groups of layers move each expert once; by 256-token chunks at least six times as much."""
    request = [SimRequest(tokens(0, 2048), 1)]
    layered = simulate(request, SPEC, Policy("layered"), STREAMED, routing)
    chunked = simulate(request, SPEC, Policy("chunked"), STREAMED, routing)
    once = 8 * 32 * STREAMED.expert_bytes
    assert layered.expert_bytes == once
    assert chunked.expert_bytes == once + 7 * 8 * 24 * STREAMED.expert_bytes  # a quarter is still there when the next chunk comes
    assert chunked.expert_bytes >= 6 * layered.expert_bytes
    assert layered.first_token(0) < 0.3 * chunked.first_token(0)


def test_the_gap_of_a_wave_is_its_share_of_the_stream():
    """No gap is longer than a step that only decodes and 1.1 times an eighth of all experts' transfer."""
    result = attacked("layered", cost=STREAMED, routing=routing, prompt=2048)
    alone = max(step.seconds for step in result.log if step.decode and not step.prompt_missed)
    stream = 8 * 32 * STREAMED.expert_bytes / STREAMED.link
    assert max(gap for i in range(8) for gap in result.gaps(i)) <= alone + 1.1 * stream / 8
    assert max(gap for i in range(8) for gap in attacked("whole", cost=STREAMED, routing=routing, prompt=2048).gaps(i)) >= alone + 0.7 * stream


# --- Who decodes together (ExpertFlow)

TOPICS = np.concatenate([np.argsort(np.random.default_rng(t).random((500, 4, 16)), axis=2)[:, :, :4] + 16 * t for t in (0, 1)])


def two_topics(group: str, bound: int | None = 12) -> tuple[SimResult, int]:
    """32 requests, half of them on each of two topics with their own experts, in batches of 8; and most rounds that one was passed over."""
    spec = dataclasses.replace(SPEC, slots=32, batch=8)
    requests = [SimRequest(tokens(i, 16, 500 * (i % 2), 500 * (i % 2) + 500), 24, 0.0, i, (500 * (i % 2), 500 * (i % 2) + 500)) for i in range(32)]
    most = 0

    def watch(state, made):
        nonlocal most
        most = max(most, max((state.seqs[i].waited for i in state.running), default=0))

    cost = Cost(expert_bytes=1_000_000, layers=4, experts=32, slots=16)
    result = simulate(requests, spec, Policy("layered", group=group, bound=bound), cost, lambda ids: TOPICS[ids], watch=watch)
    check_tokens(requests, result)
    return result, most


def test_who_asks_for_the_same_experts_decodes_together():
    """Distinct experts in a step: at most 0.7 of those of batches taken at random; the waiting bound is kept."""
    (grouped, waited), (random, _) = two_topics("greedy"), two_topics("random")

    def distinct(result):
        return np.mean([step.distinct for step in result.log if step.decode == 8])

    assert distinct(grouped) <= 0.7 * distinct(random)
    assert waited <= 12 and two_topics("greedy", 4)[1] <= 4


# --- Prefixes are computed once (BatchLLM)


def tree(groups: int, each: int) -> tuple[list[SimRequest], int]:
    """Prompts of a common start, a prefix for each group and an end of their own, groups mixed; and tokens on the edges of that tree."""
    root = tokens(0, 32)
    requests = []
    for k in range(each):
        for g in range(groups):
            own = (g, k, *tokens(1000 + 100 * g + k, 38))
            requests.append(SimRequest((*root, g, *tokens(g + 1, 95), *own), 6, 0.0, k, expected=6))
    return requests, 32 + groups * 96 + groups * each * 40


@pytest.mark.parametrize("mode", ["chunked", "layered"])
def test_prompt_tokens_are_the_edges_of_the_prefix_tree(mode):
    """Even though all arrive at once: who shares a prefix waits until it is there."""
    requests, edges = tree(4, 5)
    result = simulate(requests, SPEC, Policy(mode, objective="throughput", defer=0.0))
    check_tokens(requests, result)
    assert result.state.counters.prompt == edges
    assert result.state.counters.cached == sum(len(r.prompt) for r in requests) - edges


def test_groups_that_run_together_need_the_pages_of_one():
    """With pages for little more than one group nothing is computed twice, where in order of arrival prefixes are lost and computed again."""
    requests, edges = tree(6, 5)
    spec = dataclasses.replace(SPEC, pages=40, slots=4, batch=4, host_pages=0)
    by_group = simulate(requests, spec, Policy("chunked", objective="throughput", defer=0.0, longest=math.inf))
    by_arrival = simulate(requests, spec, Policy("chunked", objective="fcfs", defer=0.0, longest=math.inf))
    check_tokens(requests, by_group)
    assert by_group.state.counters.prompt == edges
    assert by_arrival.state.counters.prompt > edges


def test_prefixes_are_kept_in_host_memory():
    """What the device gives up comes back from the host instead of being computed; without room there it is computed."""
    first = tokens(0, 64)
    others = [SimRequest(tokens(i, 100), 4, 0.1 * i, i) for i in range(1, 4)]
    requests = [SimRequest(first, 4), *others, SimRequest((*first, 1), 4, 1.0, 9)]
    spec = dataclasses.replace(SPEC, pages=10, positions=160)
    with_host, without = (simulate(requests, dataclasses.replace(spec, host_pages=n), Policy("layered")) for n in (32, 0))
    check_tokens(requests, with_host)
    assert with_host.state.counters.host_cached == 64 and without.state.counters.cached == 0
    assert with_host.state.counters.kept_pages >= 4 and with_host.state.counters.in_pages == 4
    assert without.state.counters.prompt == with_host.state.counters.prompt + 64 + 1  # one token alone decodes at once


# --- Several answers


def test_answers_share_their_prompt():
    """Four answers to 40 tokens: two full pages are shared, the page in part is copied for each child, and the prompt is computed once."""
    spec = dataclasses.replace(SPEC, pages=64)
    requests = [SimRequest(tokens(0, 40), 20, n=4)]
    result = simulate(requests, spec, Policy("layered"))
    check_tokens(requests, result)
    counters = result.state.counters
    assert (counters.prompt, counters.copies, counters.cached) == (40, 3, 3 * 39)
    assert len(set(result.tokens.values())) == 4


def test_answers_without_a_parent_are_ordinary():
    """The parent is cancelled before its prompt is there: the others compute it."""
    state = submit(fresh(TINY), Seq(0, 6, 6, 10, 0.0))
    state = submit(state, Seq(1, 6, 6, 10, 0.0, parent=0))
    made, state = plan(state, Policy("layered"), 0.0)
    assert [piece.id for piece in made.group.pieces] == [0]
    state = cancel(commit(state, made, Results({}), 0.0), [0])
    made, state = plan(state, Policy("layered"), 0.0)
    assert [piece.id for piece in made.group.pieces] == [1] and made.group.group == 0


# --- Putting aside (FastSwitch)


def decoding(spec: ServeSpec, known: list[int], limit: int = 20) -> tuple:
    """Sequences that have just had their prompts computed and the first token drawn."""
    state, policy = fresh(spec), Policy("whole", "swap")
    for i, n in enumerate(known):
        state = submit(state, Seq(i, n - 1, n - 1, limit, float(i)))
    for _ in known:
        state = step(state, policy)[1]
    return state, policy


def step(state, policy, now: float = 100.0, ended=()):
    """One plan, and its commit with a token for everyone."""
    made, state = plan(state, policy, now)
    counts = {row.id: row.count for row in made.decode} | {piece.id: 1 for piece in made.chunk if piece.ends}
    return made, commit(state, made, Results(counts, frozenset(ended)), now)


def aside(state, id: int = 0):
    """Puts a sequence aside between steps: its move, and the state."""
    draft = Step(state, Policy("layered", "swap"), 1.0, None, None)
    preempt(draft, draft.seqs[id])
    return draft.out[0], draft.state()


def back(state, id: int = 0):
    """Takes a sequence up again between steps."""
    draft = Step(state, Policy("layered", "swap"), 1.0, None, None)
    came = Admission(draft).admit(draft.seqs[id])
    assert came is not None and draft.into[0].slot == came.slot
    return draft.into[0], draft.state()


def test_a_second_swap_moves_what_changed():
    """Nothing, of a sequence that got no token since; else its last page in part and those after it."""
    spec = dataclasses.replace(TINY, burst=1)
    policy = Policy("layered", "swap")
    state = submit(fresh(spec), Seq(0, 7, 7, 20, 0.0))
    for _ in range(2):
        made, state = plan(state, policy, 0.0)
        state = commit(state, made, Results({0: 1} if made.group.last else {}), 0.0)

    out, state = aside(state)
    assert len(out.device) == 2 and state.seqs[0].phase is Phase.SWAPPED and state.pool.held == 0
    into, state = back(state)
    assert into.host == out.host and state.seqs[0].computed == 7
    again, unchanged = aside(state)
    assert again.device == () and again.slot == out.slot and unchanged.seqs[0].host == out.host
    made, state = plan(state, policy, 1.0)
    state = commit(state, made, Results({0: 1}), 1.0)
    changed, state = aside(state)
    assert changed.host == out.host[1:] and state.seqs[0].host_tokens == 8
    state.check()
    state = cancel(state, [0])
    assert state.host.held == 0 and state.idle


def test_the_lowest_gives_its_pages_and_keeps_its_place():
    """The last to arrive is put aside, and comes back before whoever came after it."""
    spec = dataclasses.replace(TINY, pages=5, burst=1)
    state, policy = decoding(spec, [5, 4], limit=20)
    state = submit(state, Seq(7, 2, 2, 9, 50.0))
    while not (made := step(state, policy))[0].out:
        state = made[1]
    plan_, state = made
    assert [move.id for move in plan_.out] == [1] and [row.id for row in plan_.decode] == [0]
    assert state.seqs[1].phase is Phase.SWAPPED and state.seqs[7].phase is Phase.WAITING
    plan_, state = step(state, policy, ended=[0])
    plan_, state = step(state, policy)
    assert [move.id for move in plan_.into] == [1] and 1 in {row.id for row in plan_.decode}


def test_a_wave_is_not_put_aside():
    """Pages run out while a prompt is on its way through the layers: the sequence that decodes gives way, though it came first."""
    spec = dataclasses.replace(TINY, pages=5, burst=1, groups=9)
    state, policy = decoding(spec, [7])
    state = submit(state, Seq(7, 7, 7, 9, 50.0))
    policy = dataclasses.replace(policy, prefill="layered")
    groups = []
    while state.seqs[0].phase is Phase.RUNNING:
        made, state = plan(state, policy, 100.0)
        groups.append(made.group.group)
        state = commit(state, made, Results({row.id: 1 for row in made.decode}), 100.0)
        state.check()
    assert groups == list(range(7)) and state.wave is not None and state.seqs[7].phase is Phase.RUNNING
    assert [move.id for move in made.out] == [0] and not made.decode


def test_copies_in_host_memory_make_room():
    """A running sequence's copy there is a second one: it goes when another has to be put aside, and the sequence knows."""
    spec = dataclasses.replace(TINY, pages=6, burst=1, host_pages=3)
    state, policy = decoding(spec, [11, 9])
    _, state = aside(state)
    _, state = back(state)
    made, state = step(state, policy)
    assert not made.out and len(state.seqs[0].host) == 3
    made, state = step(state, policy)
    assert [(move.id, len(move.device)) for move in made.out] == [(1, 3)] and [row.id for row in made.decode] == [0]
    assert state.seqs[0].host == () and state.seqs[1].phase is Phase.SWAPPED
    state.check()


def test_an_answer_does_not_copy_pages_that_are_still_to_come():
    """Its parent comes back in this step: its pages are there for copies on the device only in the next one."""
    state, policy = decoding(dataclasses.replace(TINY, burst=1), [7])
    _, state = aside(state)
    state = submit(state, Seq(1, 6, 6, 12, 1.0, parent=0))
    made, state = step(state, policy)
    assert [move.id for move in made.into] == [0] and not made.copies and state.seqs[1].phase is Phase.WAITING
    made, state = step(state, policy)
    assert made.copies and made.copies[0][0] == state.seqs[0].pages[1] and {row.id for row in made.decode} == {0, 1}


def test_who_is_ahead_takes_the_place_of_who_runs():
    """With a margin, a request of higher priority does not wait for a slot."""
    spec = dataclasses.replace(SPEC, slots=2, batch=2)
    requests = [SimRequest(tokens(i, 20), 400, 0.0, i) for i in range(2)] + [SimRequest(tokens(5, 20), 10, 0.1, 5, priority=1)]
    urgent = simulate(requests, spec, Policy("layered", objective="priority", margin=100))
    patient = simulate(requests, spec, Policy("layered", objective="priority"))
    check_tokens(requests, urgent)
    assert urgent.state.counters.swaps == 1 and patient.state.counters.swaps == 0
    assert urgent.first_token(2) < 0.02 < 0.2 < patient.first_token(2)


# --- Joining and leaving (Flover), waiting, fairness


def test_join_and_leave_storm():
    """Each request has tokens of its own: none of them ever appears in another's answer; a slot is taken again at the next step."""
    spec = dataclasses.replace(SPEC, slots=4, batch=4, pages=24, positions=64)
    rng = np.random.default_rng(0)
    requests = [
        SimRequest(tokens(i, int(rng.integers(1, 40)), 20 * i, 20 * i + 20), int(rng.integers(1, 24)), 0.002 * i, i, (20 * i, 20 * i + 20))
        for i in range(100)
    ]
    free: list[int] = []
    result = simulate(
        requests, spec, Policy("chunked"), cancels=[(0.01 * i, 3 * i) for i in range(30)],
        watch=lambda state, made: free.append(len(state.slots) if state.waiting else 0),
    )  # fmt: skip
    check_tokens(requests, result)
    for i, ids in enumerate(result.of):
        assert all(20 * i <= token < 20 * i + 20 for id in ids for token in result.tokens.get(id, ()))
    assert result.stalls == 0 and sum(n > 0 for n in free) < 0.3 * len(free)


def test_nobody_waits_longer_than_the_bound():
    """One request of low priority against a stream of higher ones that it shares no experts with."""
    spec = dataclasses.replace(SPEC, slots=2, batch=2)
    low = SimRequest(tokens(0, 16, 0, 500), 5, 0.001, 0, (0, 500), priority=-5)
    stream = [SimRequest(tokens(i, 16, 500, 1000), 20, 0.01 * i, i, (500, 1000), priority=2) for i in range(100)]
    cost = Cost(expert_bytes=1_000_000, layers=4, experts=32, slots=16)
    waits = {}
    for longest in (0.2, 1e9):
        policy = Policy("layered", objective="expert-aware", longest=longest)
        result = simulate([*stream, low], spec, policy, cost, lambda ids: TOPICS[ids], verify=False)
        (id,) = result.of[-1]
        waits[longest] = result.first_token(id)
    assert waits[0.2] <= 0.2 + 0.1 < 0.8 < waits[1e9]


def test_users_get_the_same_share():
    """One user's 30 requests come before another's 3: by arrival these wait for all, by service they don't."""
    spec = dataclasses.replace(SPEC, slots=2, batch=2)
    requests = [SimRequest(tokens(i, 16), 20, 0.0, i, user="many") for i in range(30)]
    requests += [SimRequest(tokens(90 + i, 16), 20, 0.02, 90 + i, user="few") for i in range(3)]
    done = {}
    for objective in ("fair", "fcfs"):
        result = simulate(requests, spec, Policy("chunked", objective=objective))
        check_tokens(requests, result)
        done[objective] = max(result.times[result.of[i][0]][-1] for i in range(30, 33)) / result.clock
    assert done["fair"] < 0.3 and done["fcfs"] > 0.9


def test_a_user_who_comes_back_has_nothing_saved_up():
    """Service starts at the least of the others', and is forgotten once nobody is ahead."""
    state = fresh(TINY)
    state = dataclasses.replace(submit(state, Seq(0, 2, 2, 9, 0.0, user="a")), service={"a": 40.0})
    state = submit(state, Seq(1, 2, 2, 9, 0.0, user="b"))
    assert state.service == {"a": 40.0, "b": 40.0}
    assert cancel(state, [0, 1]).service == {}


# --- Bursts


def test_bursts_only_while_nobody_waits():
    """Four tokens a call for one sequence alone; one for those that need the host between tokens, and for all while a prompt is under way."""
    seen: list[tuple[int, bool]] = []

    def watch(state, made):
        seen.extend((row.count, len(state.running) == len(state.seqs) and made.group is None) for row in made.decode)

    requests = [SimRequest(tokens(0, 4), 16), SimRequest(tokens(1, 12), 8, 0.003, 1)]
    check_tokens(requests, simulate(requests, TINY, Policy("layered"), watch=watch))
    assert max(count for count, alone in seen if alone) == 4 and {count for count, alone in seen if not alone} == {1}
    seen.clear()
    simulate([dataclasses.replace(requests[0], stepwise=True)], TINY, Policy("layered"), watch=watch)
    assert {count for count, _ in seen} == {1}


# --- Pure, and particular about what it is given


def test_plan_and_commit_leave_the_given_state_alone():
    state, policy = decoding(dataclasses.replace(TINY, pages=5, burst=1), [5, 4])
    state = submit(state, Seq(7, 2, 2, 9, 50.0))
    for _ in range(12):
        before = copy.deepcopy(state)
        made, after = plan(state, policy, 100.0)
        counts = {row.id: row.count for row in made.decode} | {piece.id: 1 for piece in made.chunk if piece.ends}
        late = {i for i in counts if after.seqs[i].known + 1 == after.seqs[i].limit}
        planned = copy.deepcopy(after)
        final = commit(after, made, Results(counts, frozenset(late)), 100.0)
        for one, other in ((state, before), (after, planned)):
            assert (one.seqs, one.slots, one.running, one.swapped, one.wave) == (other.seqs, other.slots, other.running, other.swapped, other.wave)
            assert (one.service, one.users, one.counters) == (other.service, other.users, other.counters)
            for pool, same in ((one.pool, other.pool), (one.host, other.host)):
                assert (pool.free, pool.cached, pool.held) == (same.free, same.cached, same.held)
                assert [pool.refs(p) for p in range(pool.pages)] == [same.refs(p) for p in range(pool.pages)]
        state = final


def test_an_idle_plan_says_why():
    made, state = plan(fresh(TINY), Policy(), 0.0)
    assert made.empty and made.reason == "there are no sequences" and state.counters.steps == 0


@pytest.mark.parametrize(
    "seq, says",
    [
        (Seq(0, 5, 5, 9, 0.0), "a sequence 0 already"),
        (Seq(1, 5, 5, 25, 0.0), "25 positions, the engine has 24"),
        (Seq(1, 5, 5, 5, 0.0), "limit of 5"),
        (Seq(1, 0, 0, 5, 0.0), "prompt of 0"),
        (Seq(1, 5, 5, 24, 0.0), "6 pages, the pool has 5"),
    ],
)
def test_sequences_that_can_never_run_are_refused(seq, says):
    with pytest.raises(ValueError, match=says):
        submit(submit(fresh(dataclasses.replace(TINY, pages=5)), Seq(0, 5, 5, 9, 0.0)), seq)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"prefill": "eager"}, "no prefill 'eager'"),
        ({"preemption": "kill"}, "no preemption 'kill'"),
        ({"objective": "luck"}, "no objective 'luck'"),
        ({"group": "luck"}, "no grouping 'luck'"),
        ({"held_cost": 2.0}, "cost of 2.0"),
        ({"longest": -1.0}, "longest wait of -1.0"),
    ],
)
def test_policies_that_there_are_not_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Policy(**fields)


def test_policies_that_the_sizes_can_not_follow_are_refused():
    with pytest.raises(ValueError, match="at least 7"):
        check_policy(dataclasses.replace(TINY, chunk=6), Policy("chunked"))
    with pytest.raises(ValueError, match="waves of 2"):
        check_policy(dataclasses.replace(TINY, wave=2), Policy("layered"))
    with pytest.raises(ValueError, match="at least 2"):
        check_policy(dataclasses.replace(TINY, batch=1), Policy("layered", group="greedy", bound=1))


@pytest.mark.parametrize(
    "results, says",
    [
        (Results({}), "given 0 tokens by a step that gives it 1 to 1"),
        (Results({0: 2}), "given 2 tokens"),
    ],
)
def test_results_that_a_plan_can_not_give_are_refused(results, says):
    made, state = plan(submit(fresh(TINY), Seq(0, 5, 5, 6, 0.0)), Policy("whole"), 0.0)
    with pytest.raises(ValueError, match=says):
        commit(state, made, results, 0.0)
    with pytest.raises(ValueError, match="a limit of 6: it has ended"):
        commit(state, made, Results({0: 1}), 0.0)


def test_objectives_are_weights():
    """A name stands for its weights, and any others can be given."""
    assert Policy(objective="fcfs").weights == Objective() == Policy(objective=Objective()).weights
