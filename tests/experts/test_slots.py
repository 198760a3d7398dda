"""The slot bank against the resident bank, layer by layer, in raw bits, and its tables against caches in plain Python.

Routing is made to hurt: nothing that is there, all experts at once, one set for all tokens, padding that asks for anything. Between calls every slot
that no expert claims is overwritten with NaN, as the staging slots are inside of a call, and padding tokens hold NaN, so that a read of a wrong slot
or row shows.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.engine.steps import committed
from jaxmoe.experts import ResidentBank, SlotBank, host_store
from jaxmoe.formats import store_numpy
from jaxmoe.residency import Knowledge
from jaxmoe.residency.policy import DECAY
from pallas_kernels.dispatch import Kernels

LAYERS, EXPERTS, ACTIVE, WIDTH, HIDDEN = 3, 12, 2, 64, 32
CALLS, MANY = 20, 40
"""Calls of a bank, and with `--exhaustive`."""
CPU = Kernels("cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """How a bank is called. `layer` None: whichever, traced; else always this one, known when the program is traced."""

    tokens: int
    slots: tuple[int, ...]
    policy: str
    staging: int = 2
    ordered: bool = False
    dtype: str = "float32"
    layer: int | None = None
    activation: str = "silu"
    fill: str | None = None

    def __str__(self):
        parts = [f"T{self.tokens}", *map(str, self.slots), self.policy, f"staging{self.staging}", self.dtype]
        parts += ["ordered"] * self.ordered + [f"layer{self.layer}"] * (self.layer is not None) + [self.activation, self.fill or ""]
        return "-".join(parts).removesuffix("-")


AT_ONCE = Case(4, (8, 8, 8), "lru", staging=1)
IN_WAVES = Case(8, (2, 5, 3), "lfu", staging=1)
CASES = [
    Case(1, (2, 2, 2), "lfu"),
    Case(1, (5, 3, 12), "lru", dtype="bfloat16"),
    Case(1, (2, 4, 3), "static", staging=1),
    Case(1, (4, 2, 3), "lfu", layer=2, fill="fixed"),
    AT_ONCE,
    Case(4, (3, 2, 8), "lru", layer=1, dtype="bfloat16"),
    IN_WAVES,
    Case(8, (6, 6, 6), "static", dtype="bfloat16", fill="fixed"),
    Case(32, (4, 7, 2), "lru", staging=4),
    Case(32, (3, 3, 3), "lfu", ordered=True, dtype="bfloat16"),
    Case(32, (12, 2, 9), "lru", staging=1, ordered=True, activation="gelu"),
]


@functools.cache
def weights(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (LAYERS, EXPERTS, WIDTH, 2, HIDDEN), (LAYERS, EXPERTS, HIDDEN, WIDTH)
    return tuple(store_numpy(rng.standard_normal(s, dtype=np.float32) / np.sqrt(s[2]), dtype) for s in shapes)


def records(w_in: np.ndarray, w_out: np.ndarray) -> np.ndarray:
    """A record is an expert's input matrices and its output matrix, one after the other."""
    n = w_in.shape[0] * w_in.shape[1]
    return np.concatenate([w_in.reshape(n, -1), w_out.reshape(n, -1)], axis=1).reshape(n, -1, 256)


def profile() -> np.ndarray:
    """With ties."""
    return np.random.default_rng(1).integers(0, 6, (LAYERS, EXPERTS)).astype(np.float32)


def banks(case: Case) -> tuple[SlotBank, ResidentBank]:
    w_in, w_out = weights(case.dtype)
    slots = SlotBank(
        host_store.pinned(records(w_in, w_out)), knowledge=Knowledge(jnp.asarray(profile())), slots=case.slots, staging=case.staging, experts=EXPERTS,
        entries=(w_in.shape[2:], w_out.shape[2:]), dtype=case.dtype, activation=case.activation, policy=case.policy, fill=case.fill,
        ordered=case.ordered, poison=True,
    )  # fmt: skip
    return slots, ResidentBank(jnp.asarray(w_in), jnp.asarray(w_out), case.activation)


@functools.cache
def program(kernels: Kernels, layer: int | None):
    """The jitted `(fixed, moving, layer, x, ids, weights, valid) -> (y, moving)`."""

    def call(fixed, moving, traced, *tokens):
        y, bank, _ = fixed.join(moving).expert_ffn(traced if layer is None else layer, *tokens, kernels)
        return y, bank.split()[1]

    return jax.jit(call, donate_argnums=1, compiler_options=kernels.compiler_options())


def draw(rng: np.random.Generator, kind: str, tokens: int, there: set[int]) -> np.ndarray:
    """Expert ids [T, A], different ones for each token."""
    popular = 1.0 / np.arange(1, EXPERTS + 1)
    if kind == "absent":  # nothing that is there, as far as there is anything else
        popular = np.where([e in there for e in range(EXPERTS)], 1e-9, 1.0)
    if kind == "even":
        popular = np.ones(EXPERTS)
    if kind == "all":  # one after the other
        start = rng.integers(EXPERTS)
        return (start + np.arange(tokens * ACTIVE).reshape(tokens, ACTIVE)) % EXPERTS
    ids = np.stack([rng.choice(EXPERTS, ACTIVE, replace=False, p=popular / popular.sum()) for _ in range(tokens)])
    return np.broadcast_to(ids[:1], ids.shape) if kind == "one set" else ids


KINDS = ("skewed", "absent", "all", "one set", "absent", "even", "skewed")


def draw_tokens(rng: np.random.Generator, turn: int, case: Case, there: set[int]) -> tuple[np.ndarray, ...]:
    """`(x, ids, weights, valid)`; every third call has padding, every tenth nothing else."""
    ids = draw(rng, KINDS[turn % len(KINDS)], case.tokens, there).astype(np.int32)
    valid = rng.random(case.tokens) < (0.6 if turn % 3 == 1 else 1.1) * (turn % 10 != 9)
    x = np.where(valid[:, None], rng.standard_normal((case.tokens, WIDTH)), np.nan).astype(np.float32)
    return jnp.asarray(x, case.dtype), ids, rng.random((case.tokens, ACTIVE), np.float32), valid


class PlainCache:
    """What one layer's slots hold, in plain Python."""

    def __init__(self, slots: int, policy: str, profile_E: np.ndarray):
        self.slots, self.policy, self.profile_E = slots, policy, profile_E
        self.there: set[int] = set()
        self.recent: collections.OrderedDict = collections.OrderedDict()
        self.last, self.count, self.clock = {}, collections.defaultdict(float), 0
        self.requests = self.hits = 0

    def call(self, steps: list[set[int]]) -> None:
        """Experts that each step asks for, in order."""
        asked = set().union(*steps)
        self.requests, self.hits = self.requests + len(asked), self.hits + len(asked & self.there)
        for step in filter(None, steps):
            self._use(step)
        if self.policy == "lru":
            self.there = set(self.recent)
            return
        worth = {
            "lfu": lambda e: (e not in asked, -self.count[e], -self.last[e], e),
            "static": lambda e: (-self.profile_E[e], e),
        }[self.policy]
        self.there = set(sorted(self.there | asked, key=worth)[: self.slots])

    def _use(self, step: set[int]) -> None:
        self.clock += 1
        for e in self.count:
            self.count[e] *= DECAY
        for e in sorted(step, reverse=True):  # the smallest number is the most recent
            self.count[e] += 1
            self.last[e] = self.clock
            self.recent[e] = True
            self.recent.move_to_end(e)
            if len(self.recent) > self.slots:
                self.recent.popitem(last=False)


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def check_tables(bank: SlotBank, state, before: np.ndarray, plain: list[PlainCache], store: np.ndarray) -> None:
    """Each layer's slots lie in its range, fill from the first on, hold the records they are said to hold, and those that a plain cache holds."""
    where_LE, record = np.asarray(state.slot_of_expert), [np.asarray(p).reshape(p.shape[0], -1) for p in state.pools]
    for layer, (where, cache) in enumerate(zip(where_LE, plain, strict=True)):
        there = np.flatnonzero(where >= 0)
        first = bank.base[layer]
        assert sorted(where[there].tolist()) == list(range(first, first + len(there)))
        assert len(there) <= bank.slots[layer]
        assert set(there.tolist()) == cache.there
        stayed = (where >= 0) & (before[layer] >= 0)
        np.testing.assert_array_equal(where[stayed], before[layer][stayed])
        held = np.concatenate([r[where[there]] for r in record], axis=1)
        np.testing.assert_array_equal(bits(held), bits(store.reshape(LAYERS, EXPERTS, -1)[layer, there]))


def check_counters(bank: SlotBank, state, plain: list[PlainCache]) -> None:
    requests, hits, loads = (np.asarray(x) for x in (state.requests, state.hits, state.loads))
    assert requests.tolist() == [cache.requests for cache in plain]
    assert hits.tolist() == [cache.hits for cache in plain]
    if bank.fill is None:
        np.testing.assert_array_equal(loads, requests - hits)
    else:
        assert (loads >= requests - hits).all()


def with_nan_where_nothing_is(bank: SlotBank, state):
    """The state with NaN in every slot that no expert claims."""
    claimed = np.zeros(bank.base[-1] + bank.staging, bool)
    where = np.asarray(state.slot_of_expert)
    claimed[where[where >= 0]] = True
    pools = [np.array(p) for p in state.pools]
    for pool in pools:
        pool[~claimed] = 0x7FC0 if pool.dtype == np.uint16 else np.nan
    return committed(dataclasses.replace(state, pools=tuple(map(jnp.asarray, pools))))


def assert_equal_bits(got, expected, valid) -> None:
    assert np.isfinite(np.asarray(expected, np.float32)).all() and not np.asarray(got, np.float32)[~valid].any()
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_tables_and_counters(case, exhaustive):
    slots, resident = banks(case)
    (fixed, _), state, run = slots.split(), committed(slots.init_state()), program(CPU, case.layer)
    store = np.asarray(slots.store)
    plain = [PlainCache(n, case.policy, row) for n, row in zip(case.slots, profile(), strict=True)]
    rng = np.random.default_rng(case.tokens)
    for turn in range(MANY if exhaustive else CALLS):
        layer = int(rng.integers(LAYERS)) if case.layer is None else case.layer
        tokens = draw_tokens(rng, turn, case, plain[layer].there)
        _, ids, _, valid = tokens
        before = np.asarray(state.slot_of_expert)
        expected, _ = program(CPU, None)(resident, (), layer, *tokens)
        got, state = run(fixed, state, layer, *tokens)
        assert_equal_bits(got, expected, valid)
        steps = [set(row) for row in ids[valid].tolist()]
        plain[layer].call(steps if case.ordered else [set().union(*steps)])
        check_tables(slots, state, before, plain, store)
        check_counters(slots, state, plain)
        state = with_nan_where_nothing_is(slots, state)
    assert sum(cache.requests for cache in plain) > sum(cache.hits for cache in plain) > 0


def test_every_expert_is_brought_once_however_many_waves():
    """Eight tokens ask for all experts of a layer that has two slots and one to pass through."""
    slots, resident = banks(IN_WAVES)
    (fixed, _), state = slots.split(), committed(slots.init_state())
    tokens = draw_tokens(np.random.default_rng(0), 2, IN_WAVES, set())
    assert len(np.unique(tokens[1])) == EXPERTS
    expected, _ = program(CPU, None)(resident, (), 0, *tokens)
    for turn in range(3):
        got, state = program(CPU, None)(fixed, state, 0, *tokens)
        assert_equal_bits(got, expected, tokens[3])
        assert np.asarray(state.requests).tolist() == [EXPERTS * (turn + 1), 0, 0]
        assert np.asarray(state.loads).tolist() == [EXPERTS + turn * (EXPERTS - 2), 0, 0]


def test_a_token_that_asks_twice_for_one_expert():
    slots, resident = banks(IN_WAVES)
    x, ids, w, valid = draw_tokens(np.random.default_rng(0), 5, IN_WAVES, set())
    tokens = x, np.broadcast_to(ids[:, :1], ids.shape), w, valid
    got, _ = program(CPU, None)(slots.split()[0], committed(slots.init_state()), 0, *tokens)
    assert_equal_bits(got, program(CPU, None)(resident, (), 0, *tokens)[0], valid)


def test_a_forgotten_state_starts_anew():
    """The pools stay where they are, and nothing that lies in them counts."""
    slots, resident = banks(IN_WAVES)
    (fixed, _), state, rng = slots.split(), committed(slots.init_state()), np.random.default_rng(0)
    for turn in range(2 * LAYERS):
        _, state = program(CPU, None)(fixed, state, turn % LAYERS, *draw_tokens(rng, turn, IN_WAVES, set()))
    at = [pool.unsafe_buffer_pointer() for pool in state.pools]
    state, new = committed(slots.forget(state)), slots.init_state()
    assert [pool.unsafe_buffer_pointer() for pool in state.pools] == at
    for got, expected in zip(jax.tree.leaves(dataclasses.replace(state, pools=())), jax.tree.leaves(dataclasses.replace(new, pools=())), strict=True):
        np.testing.assert_array_equal(got, expected)
    state = with_nan_where_nothing_is(slots, state)
    tokens = draw_tokens(rng, 0, IN_WAVES, set())
    got, state = program(CPU, None)(fixed, state, 0, *tokens)
    assert_equal_bits(got, program(CPU, None)(resident, (), 0, *tokens)[0], tokens[3])
    assert int(state.hits[0]) == 0 < int(state.loads[0])


def test_a_wrong_slot_shows():
    """What the other tests rely on: an expert that is said to lie where nothing or another one lies gives other numbers."""
    slots, _ = banks(AT_ONCE)
    (fixed, _), state = slots.split(), committed(slots.init_state())
    tokens = draw_tokens(np.random.default_rng(0), 0, AT_ONCE, set())
    expected, state = program(CPU, None)(fixed, state, 0, *tokens)
    state = jax.tree.map(np.array, state)
    a, b = np.unique(tokens[1])[:2]
    where = state.slot_of_expert[0]
    for wrong in ({a: where[b], b: where[a]}, {a: 7}, {a: slots.base[-1]}):
        table = state.slot_of_expert.copy()
        for expert, slot in wrong.items():
            table[0, expert] = slot
        got, _ = program(CPU, None)(fixed, committed(jax.tree.map(jnp.asarray, dataclasses.replace(state, slot_of_expert=table))), 0, *tokens)
        assert (bits(got) != bits(expected)).any()
        assert np.isnan(np.asarray(got)).any() == (len(wrong) == 1)


def test_a_loop_of_fixed_length_has_enough_waves():
    """GPUs run the most waves that there can be. Here their rows are in other tiles, so that bits may differ; a wave too few would be no rounding."""
    case = Case(4, (2, 4, 3), "static", staging=1, fill="while")
    slots, resident = banks(case)
    (fixed, _), state, rng, run = slots.split(), committed(slots.init_state()), np.random.default_rng(0), program(Kernels("gpu"), None)
    for turn in range(14):
        tokens = draw_tokens(rng, turn, case, set(np.flatnonzero(np.asarray(state.slot_of_expert[turn % LAYERS]) >= 0)))
        expected, _ = run(resident, (), turn % LAYERS, *tokens)
        got, state = run(fixed, state, turn % LAYERS, *tokens)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(state.loads, state.requests - state.hits)


@pytest.mark.parametrize("policy", ["lru", "lfu", "static"])
def test_what_a_wave_computes_lies_in_slots_of_its_own(policy):
    """Any residents and any requests: no wave needs a slot twice, brings more than it may, or comes after the most waves that there can be."""
    case = Case(32, (4, 4, 4), policy, staging=3)
    slots, _ = banks(case)
    rng, n = np.random.default_rng(0), 300
    where = np.full((n, LAYERS, EXPERTS), -1, np.int32)
    for row in where[:, 1]:
        held = rng.integers(case.slots[1] + 1)
        row[rng.permutation(EXPERTS)[:held]] = slots.base[1] + rng.permutation(held)
    ids = rng.integers(0, EXPERTS, (n, case.tokens, ACTIVE)) // rng.integers(1, EXPERTS + 1, (n, 1, 1))
    valid = rng.random((n, case.tokens)) < rng.random((n, 1))
    tables = {name: jnp.asarray(rng.integers(0, 4, (n, *t.shape)).astype(t.dtype)) for name, t in slots.init_state().tables.items()}

    def resolve(where, tables, ids, valid):
        state = dataclasses.replace(slots.init_state(), pools=(), slot_of_expert=where, tables=tables)
        used = (ids[:, :, None] == jnp.arange(EXPERTS)) & valid[:, None, None]
        return slots.join(state).resolve(1, used.any((0, 1))[None], ids, valid)[1:]

    choices, places = jax.tree.map(np.asarray, jax.jit(jax.vmap(resolve))(where, tables, jnp.asarray(ids), valid))
    for i in range(n):
        need = np.zeros(EXPERTS, bool)
        need[ids[i][valid[i]]] = True
        hit, enter, stream, leave = (field[i] for field in choices)
        slot, wave, resident = (field[i] for field in places)
        assert ((hit | enter | stream) == need).all() and not (hit & (enter | stream)).any() and not (enter & stream).any()
        assert ((slot >= 0) == need).all() and (wave[need] < slots.most_waves(ids[i].size)).all()
        assert (slot[hit] == where[i, 1][hit]).all() and (slot[stream] >= slots.base[-1]).all() and (slot[enter] < slots.base[2]).all()
        assert len({*zip(slot[need], wave[need], strict=True)}) == need.sum()
        used = {s: w for s, w in zip(slot[hit], wave[hit], strict=True)}
        assert all(wave[e] > used[slot[e]] for e in np.flatnonzero(enter) if slot[e] in used)
        assert (resident[leave] == -1).all() and (resident[enter] == slot[enter]).all() and len({*resident[resident >= 0]}) == (resident >= 0).sum()


def test_large_matrices_and_long_prompts():
    """Here the two banks cut their rows into tiles of different sizes."""
    experts, width, hidden, tokens = 8, 512, 256, 128
    rng = np.random.default_rng(0)
    shapes = (1, experts, width, 2, hidden), (1, experts, hidden, width)
    w_in, w_out = (store_numpy(rng.standard_normal(s, dtype=np.float32) / 16, "bfloat16") for s in shapes)
    resident = ResidentBank(jnp.asarray(w_in), jnp.asarray(w_out))
    slots = SlotBank(
        host_store.pinned(records(w_in, w_out)), slots=(3,), experts=experts, entries=(w_in.shape[2:], w_out.shape[2:]), dtype="bfloat16",
        ordered=True, poison=True,
    )  # fmt: skip
    x, w, valid = jnp.asarray(rng.standard_normal((tokens, width)), "bfloat16"), rng.random((tokens, ACTIVE), np.float32), np.arange(tokens) < 120
    (fixed, _), state = slots.split(), committed(slots.init_state())
    for most in (8, 3, 8):
        ids = np.argsort(rng.random((tokens, most)), axis=1)[:, :ACTIVE].astype(np.int32)
        expected, _ = program(CPU, None)(resident, (), 0, x, ids, w, valid)
        got, state = program(CPU, None)(fixed, state, 0, x, ids, w, valid)
        assert_equal_bits(got, expected, valid)
    assert (int(state.requests[0]), int(state.loads[0])) == (8 + 3 + 8, 8 + 3 + 8 - int(state.hits[0]))


def test_the_fixed_part_alone_says_what_it_lacks():
    slots, _ = banks(CASES[0])
    with pytest.raises(AssertionError, match="join it with a state"):
        slots.split()[0].expert_ffn(0, *draw_tokens(np.random.default_rng(0), 0, CASES[0], set()), CPU)


def test_bytes_are_those_of_the_arrays():
    for case in CASES[:4]:
        slots, _ = banks(case)
        assert slots.device_bytes == sum(pool.nbytes for pool in slots.init_state().pools)
        assert slots.record_bytes == slots.store.nbytes // (LAYERS * EXPERTS)
        assert all(np.isnan(np.asarray(p.view(jnp.bfloat16) if p.dtype == jnp.uint16 else p, np.float32)).all() for p in slots.init_state().pools)
