"""Slot banks whose layers share one pool, and banks of the policies that are told things beforehand: raw bits beside the resident bank's, the
table of slots beside what the slots hold, and both beside the replay of the same steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.engine.steps import committed
from jaxmoe.experts import SlotBank
from jaxmoe.experts.slots import HIGH, high_uses, place_shared
from jaxmoe.offload import knowledge
from jaxmoe.offload.replay import Steps, residents
from jaxmoe.residency import Knowledge, choose_shared, find_policy
from jaxmoe.residency.policy import FORESEEN
from tests.experts import test_slots as slots_of
from tests.experts.test_slots import ACTIVE, CPU, EXPERTS, LAYERS, assert_equal_bits, bits, program, with_nan_where_nothing_is
from tests.quick import QuickKernels

STEPS = 10
PRODUCT = ("edgemoe", "eam")
"""Compiled as the product is. That compiling less changes no bit of the others is more than was asked for."""


@dataclasses.dataclass(frozen=True)
class Case(slots_of.Case):
    """How a bank is called, and what its policy is told."""

    read_ahead: bool | None = None
    pinned: bool = False

    def __str__(self):
        return super().__str__() + "-ahead" * bool(self.read_ahead) + "-pinned" * self.pinned


CASES = [
    Case(1, (2, 3, 2), "edgemoe", staging=1),
    Case(8, (3, 2, 4), "eam", staging=1, pinned=True),
    Case(8, (3, 2, 2), "hobbit", ordered=True, dtype="bfloat16", read_ahead=True),
    Case(4, (2, 2, 2), "plec"),
    Case(4, (4, 3, 8), "arc", staging=1, pinned=True),
    Case(4, (4, 2, 3), "opt", ordered=True, dtype="bfloat16"),
]


def pinned_LE(case: Case) -> np.ndarray:
    """Two experts of every layer, if any, of those that many tokens ask for."""
    return np.isin(np.arange(EXPERTS), (1, 4))[None].repeat(LAYERS, 0) & case.pinned


def draw_all(case: Case) -> list[list[tuple]]:
    """`[step][layer] -> (x, ids, weights, valid)`; every third step has padding, one nothing else."""
    rng = np.random.default_rng(case.tokens + len(case.policy))
    return [[slots_of.draw_tokens(rng, step, case, set()) for _ in range(LAYERS)] for step in range(STEPS)]


def plain_uses(case: Case, tokens: tuple, high: bool = False) -> np.ndarray:
    """[S, E] uses, in plain Python; with `high` those of experts whose stronger ones have at most `HIGH` of the token's weight."""
    _, ids, weights, valid = tokens
    out = np.zeros((case.tokens, EXPERTS), bool)
    for t, (row, w) in enumerate(zip(ids, weights, strict=True)):
        for e, own in zip(row, w, strict=True):
            out[t, e] |= valid[t] and (not high or sum(v for v in w if v > own) / w.sum() <= HIGH)
    return out if case.ordered else out.any(0)[None]


def told(case: Case, used: np.ndarray) -> Knowledge:
    """What the policy of a case is told of a run that uses [S, L, E]."""
    rng = np.random.default_rng(0)
    patterns = rng.random((4, LAYERS, EXPERTS)).astype(np.float32)
    return Knowledge(future=used, patterns=jnp.asarray(patterns), pinned=jnp.asarray(pinned_LE(case)) if case.pinned else None)


def check_slots(bank: SlotBank, state, before: np.ndarray, store: np.ndarray) -> None:
    """Every claimed slot is one expert's and holds its record; slots fill from a range's first on, and nobody moves."""
    where = np.asarray(state.slot_of_expert)
    claimed = where[where >= 0]
    assert len(set(claimed.tolist())) == len(claimed)
    ranges = [(0, bank.base[-1], where)] if find_policy(bank.policy).shared else [*zip(bank.base, bank.base[1:], where, strict=False)]
    for first, stop, part in ranges:
        held = np.sort(part[part >= 0])
        assert held.tolist() == list(range(first, first + len(held))) and len(held) <= stop - first
    stayed = (where >= 0) & (before >= 0)
    np.testing.assert_array_equal(where[stayed], before[stayed])
    record = np.concatenate([np.asarray(p).reshape(p.shape[0], -1)[claimed] for p in state.pools], axis=1)
    np.testing.assert_array_equal(bits(record), bits(store.reshape(LAYERS, EXPERTS, -1)[where >= 0]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_slots_counters_and_replay(case):
    slots, resident = slots_of.banks(case)
    drawn = draw_all(case)
    used, high = (np.stack([np.stack([plain_uses(case, tokens, h) for tokens in step], axis=1) for step in drawn]) for h in (False, True))
    known = told(case, used.reshape(-1, LAYERS, EXPERTS))
    slots = dataclasses.replace(slots, knowledge=known, read_ahead=case.read_ahead)
    foreseen = np.random.default_rng(2).random((STEPS, 2, LAYERS, EXPERTS)).astype(np.float32)
    there = None
    if not case.ordered:
        seen = Steps(used[:, 0], high[:, 0], np.arange(STEPS) == 0, foreseen if find_policy(case.policy).foresees else None)
        there = residents(seen, np.array(case.slots), case.policy, known)
    (fixed, _), state, store = slots.split(), committed(slots.init_state()), np.asarray(slots.store)
    kernels = CPU if case.policy in PRODUCT else QuickKernels("cpu")
    requests, hits, most = np.zeros(LAYERS, int), np.zeros(LAYERS, int), 0
    for step, layers in enumerate(drawn):
        if FORESEEN in state.tables:
            state = dataclasses.replace(state, tables=state.tables | {FORESEEN: jax.device_put(foreseen[step].swapaxes(0, 1))})
        for layer, tokens in enumerate(layers):
            before = np.asarray(state.slot_of_expert)
            need = used[step, :, layer].any(0)
            requests[layer], hits[layer] = requests[layer] + need.sum(), hits[layer] + (need & (before[layer] >= 0)).sum()
            most = max(most, need.sum())
            if there is not None:
                np.testing.assert_array_equal(before[layer] >= 0, there[step, layer])
            expected, _ = program(kernels, None)(resident, (), layer, *tokens)
            got, state = program(kernels, None)(fixed, state, layer, *tokens)
            assert_equal_bits(got, expected, tokens[3])
            check_slots(slots, state, before, store)
            assert not ((before >= 0) & (np.asarray(state.slot_of_expert) < 0) & pinned_LE(case)).any()
            assert np.asarray(state.requests).tolist() == requests.tolist() and np.asarray(state.hits).tolist() == hits.tolist()
            np.testing.assert_array_equal(state.loads, requests - hits)
            state = with_nan_where_nothing_is(slots, state)
    assert requests.sum() > hits.sum() > 0
    own = sum(case.slots) if find_policy(case.policy).shared else min(case.slots)
    assert case.tokens < 4 or most > own  # more than there is room for
    assert not case.pinned or ((np.asarray(state.slot_of_expert) >= 0) & pinned_LE(case)).any()


def test_uses_that_matter_are_those_of_the_trace():
    """`high_uses` against plain Python; its threshold is the one that traces are read with."""
    case, rng = CASES[2], np.random.default_rng(0)
    assert HIGH == knowledge.HIGH
    for turn in range(6):
        tokens = slots_of.draw_tokens(rng, turn, case, set())
        for ordered in (False, True):
            wanted = plain_uses(dataclasses.replace(case, ordered=ordered), tokens, True)
            np.testing.assert_array_equal(high_uses(tokens[1], jnp.asarray(tokens[2]), tokens[3], EXPERTS, ordered), wanted)
        assert turn % 3 == 1 or (wanted != plain_uses(dataclasses.replace(case, ordered=True), tokens)).any()


@pytest.mark.parametrize("pool", [3, 9])
def test_places_in_a_pool(pool):
    """Any residents and any requests: nobody is computed where another one still is, and no slot is lost or given twice."""
    rng, n = np.random.default_rng(pool), 300
    where = np.full((n, LAYERS, EXPERTS), -1, np.int32)
    for table in where:
        held = rng.integers(pool + 1)
        table.flat[rng.permutation(table.size)[:held]] = rng.permutation(held)
    need = rng.random((n, EXPERTS)) < rng.random((n, 1))
    keep = rng.integers(0, 3, where.shape).astype(np.float32), rng.integers(0, 9, where.shape).astype(np.int32)

    def place(keep, where, need):
        choice, leave = choose_shared(keep, where >= 0, need, 1, pool, False)
        return choice, leave, *place_shared(choice, leave, where, need, 1, pool)

    choices, leaves, places, after = jax.tree.map(np.asarray, jax.jit(jax.vmap(place))(keep, where, need))
    for i in range(n):
        hit, enter, stream, _ = (field[i] for field in choices)
        slot, wave, own = (field[i] for field in places)
        np.testing.assert_array_equal(own, after[i, 1])
        assert ((slot >= 0) == (hit | enter)).all() and (slot[hit] == where[i, 1][hit]).all() and not wave[hit].any()
        claimed = after[i][after[i] >= 0]
        assert sorted(claimed.tolist()) == list(range(len(claimed))) and len(claimed) == min(pool, ((where[i] >= 0).sum() + enter.sum()))
        kept = (where[i] >= 0) & ~leaves[i]
        assert (after[i][kept] == where[i][kept]).all() and (own[enter] == slot[enter]).all() and (after[i] >= 0).sum() == kept.sum() + enter.sum()
        used = {s: w for s, w in zip(slot[hit], wave[hit], strict=True)}
        assert all(wave[e] == (slot[e] in used) for e in np.flatnonzero(enter)) and not (stream & (slot >= 0)).any()
        assert len({*zip(slot[hit | enter], wave[hit | enter], strict=True)}) == (hit | enter).sum()
    assert places[1].any() and ACTIVE == 2
