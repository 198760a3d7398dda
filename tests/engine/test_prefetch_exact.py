"""Prefetching changes when experts are sent, and no bit of the logits: whatever is predicted, however far ahead, however much is staged.

Links are emulated at speeds at which records arrive in time, late and never; the reader may fail.
"""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.foresight import LATER, Foresight, Known, Lookout
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Model, Offload, slot_bank
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload.link import Link
from jaxmoe.offload.predictors.gate import GATE
from jaxmoe.offload.predictors.interface import Sizes
from jaxmoe.offload.prefetch import Prefetch
from jaxmoe.residency.policy import FORESEEN
from tests.models import CPU, random_model, records_of
from tests.quick import QuickKernels

STEPS, PROMPT, ROWS = 6, 5, 4
GATES = {"qwen3_moe": 0, "olmoe": 2}
"""How many layers ahead each family's fronts evaluate routers."""

KERNELS = {"qwen3_moe": CPU, "olmoe": QuickKernels("cpu")}
"""The first is compiled as the product is. That compiling less changes no bit between the runs of the other one is more than was asked for."""

FAST, SLOW = 10.0, 0.002
"""GB/s: a record of 24 kB takes 2 us, or 12 ms."""


class Stub:
    """Predicts by a function of the step's true routing, which it was told beforehand."""

    def __init__(self, known: Known, kind: str, wants_gates: int = 0):
        self.known, self.kind, self.wants_gates = known, kind, wants_gates
        self.rng, self.resets, self.gates = np.random.default_rng(0), [], []

    def _bent(self, scores):
        if scores is None or self.kind == "right":
            return scores
        return 1 - scores if self.kind == "wrong" else self.rng.random(scores.shape).astype(np.float32)

    def before(self, rows, tokens):
        return None if self.kind == "nothing" else self._bent(self.known.before(rows, tokens))

    def at(self, layer, rows, ids, gates):
        assert ids.shape[0] == len(rows)
        self.gates.append(gates)
        scores = None if self.kind == "nothing" else self.known.before(rows, None)
        return None if scores is None else self._bent(scores)[0] * (np.arange(len(scores[0])) > layer)[:, None]

    def after(self, rows, tokens, ids):
        assert (ids.shape[0], ids.shape[1]) == (len(rows), self.known._used.shape[1])
        self.known.after(rows, tokens, ids)

    def reset(self, rows):
        self.resets.append(rows.tolist())


class Listener:
    """A foresight that says nothing and writes down what it is told."""

    wants_gates = 0

    def __init__(self):
        self.told = []

    def before(self, rows, tokens):
        self.told.append("asked")

    def after(self, rows, tokens, ids):
        self.told.append((rows.tolist(), tokens.tolist(), ids.tolist()))

    def reset(self, rows):
        self.told.append(rows.tolist())


def test_steps_that_nobody_asks_about_are_learned_from_before_one_that_is():
    """In their order, prompts token by token, and never more than `LATER` of them kept."""
    switch, listener = types.SimpleNamespace(on=False, begin=lambda: None), Listener()
    lookout = Lookout(switch, listener)  # type: ignore[arg-type]

    def ids(tokens: int, at: int) -> list[jax.Array]:
        return [jax.numpy.full((tokens, 2), 10 * at + layer) for layer in range(2)]

    def step(at: int) -> None:
        lookout.begin(steps.decode_batch(np.arange(2), np.array([at, 0]), np.array([at, 0]), np.array([True, False])))
        lookout.before()
        lookout.end(ids(2, at))

    prompt = make_batch([(0, 0, [7, 8])], 4, 4, n_logits=2)
    lookout.begin(prompt)
    lookout.end(ids(4, 9))
    expected = [[0], ([0], [7], [[[90, 90], [91, 91]]]), ([0], [8], [[[90, 90], [91, 91]]])]
    for at in range(2, LATER + 1):
        assert listener.told == []
        step(at)
        expected.append(([0], [at], [[[10 * at] * 2, [10 * at + 1] * 2]]))
    assert listener.told == expected
    step(70)
    assert len(listener.told) == len(expected)
    switch.on = True
    lookout.begin(steps.decode_batch(np.arange(2), np.array([71, 0]), np.array([71, 0]), np.array([True, False])))
    lookout.before()
    assert listener.told == [*expected, ([0], [70], [[[700] * 2, [701] * 2]]), "asked"]


@functools.cache
def resident(family: str) -> Model:
    return random_model(family, kernels=KERNELS[family])


@functools.cache
def compiled(family: str):
    """The model with two slots a layer, and the programs that all of its runs share."""
    model = resident(family)
    bank = slot_bank(model.spec, None, Offload(2))
    runner = HostDriven(model.spec, bank, model.kernels, True, source_of(family), foresight=Stub(None, "nothing", GATES[family]))
    committed = steps.committed(model.params)  # or the first layer's front would be compiled once more
    return dataclasses.replace(model, bank=bank, params=committed), runner.programs


@functools.cache
def source_of(family: str) -> ExpertSource:
    model = resident(family)
    return ExpertSource(model.spec, records_of(model))


def runner_of(family: str, prefetch=None, foresight=None, gbps=None, source=None) -> tuple[HostDriven, Model]:
    model, programs = compiled(family)
    source = source or source_of(family)
    runner = HostDriven(model.spec, model.bank, model.kernels, True, source, Link(gbps), True, prefetch=prefetch, foresight=foresight)
    runner.programs = programs
    return runner, model


def start(model: Model) -> steps.EngineState:
    return steps.committed(steps.EngineState(init_layers(model.spec, ROWS, 64, 64), model.bank.init_state()))


def run(runner: HostDriven, model: Model, live: int, state=None) -> tuple[list[np.ndarray], list[np.ndarray], steps.EngineState]:
    """Tokens that don't depend on what comes out: logits, every call's ids, the state. Rows that are not live are padding.

    The second family gets its prompts in one step, the first token by token: a prompt's step is the same program as without prefetching.
    """
    tokens = np.random.default_rng(3).integers(0, model.spec.vocab, (ROWS, PROMPT + STEPS)).astype(np.int32)
    state = start(model) if state is None else state
    sampling, rows = sampling_params(ROWS), np.arange(ROWS, dtype=np.int32)
    outs: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    if whole := model.spec.family == "olmoe":
        batch = make_batch([(i, 0, list(tokens[i, :PROMPT])) for i in range(live)], 8, 8 * ROWS, n_logits=ROWS)
        _, logits, state, routed = runner.step(model.params, state, batch, sampling, 0 * rows)
        outs.append(np.asarray(logits)[:live])
        seen += [routed[0][i : i + 1] for i in np.flatnonzero(np.asarray(batch.segments) >= 0)]
    for at in range(PROMPT if whole else 0, PROMPT + STEPS):
        batch = runner.programs.decode_batch(rows, tokens[:, at], np.full(ROWS, at, np.int32), rows < live)
        _, logits, state, routed = runner.step(model.params, state, batch, sampling, 0 * rows)
        outs.append(np.asarray(logits)[:live])
        seen.append(routed[0][:live])
    return outs, seen, state


@functools.cache
def plain(family: str, live: int) -> tuple:
    """The same without prefetching: logits, ids, and the bank's counters."""
    runner, model = runner_of(family)
    outs, seen, state = run(runner, model, live)
    return outs, seen, model.bank.counters(state.bank)


def known(family: str, live: int) -> Known:
    return Known(plain(family, live)[1], resident(family).spec.moe[0].experts)


def check(family: str, live: int, kind: str, gbps: float | None, settings: Prefetch) -> tuple[HostDriven, Stub]:
    """A run with prefetching gives the bits of one without, hits what it hits, and every byte is counted once."""
    stub = Stub(known(family, live), kind, GATES[family])
    runner, model = runner_of(family, settings, stub, gbps)
    outs, _, state = run(runner, model, live)
    same_bits(outs, plain(family, live)[0])
    found, counts = model.bank.counters(state.bank), runner.ahead.counters
    for name in ("requests", "hits"):
        np.testing.assert_array_equal(found[name], plain(family, live)[2][name])
    size, held = model.bank.record_bytes, runner.ahead.held_bytes()
    demand = int(found["loads"].sum()) * size
    assert demand == counts.demand and held <= settings.staging * size
    assert int((found["requests"] - found["hits"]).sum()) * size == demand + counts.useful + counts.late
    assert runner.link.bytes == demand + counts.useful + counts.late + counts.wasted + held
    return runner, stub


def same_bits(outs: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for got, wanted in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def always(staging: int = 4, depth: int = 1, width: int = 2) -> Prefetch:
    return Prefetch(staging, depth, width, switching=False)


CASES = [
    ("qwen3_moe", 1, "wrong", FAST, always(4, 2, 4)),
    ("qwen3_moe", 4, "right", SLOW, always(8, 4)),
    ("qwen3_moe", 1, "random", None, always(1, 1)),
    ("qwen3_moe", 4, "random", SLOW, always(3, 3, 3)),
    ("olmoe", 1, "right", FAST, always(8, 2)),
    ("olmoe", 4, "wrong", SLOW, always(2, 4)),
    ("olmoe", 4, "random", FAST, Prefetch(5, switching=False)),
    ("olmoe", 1, "nothing", FAST, always()),
]


@pytest.mark.parametrize(("family", "live", "kind", "gbps", "settings"), CASES)
def test_logits_have_the_same_bits(family, live, kind, gbps, settings):
    runner, stub = check(family, live, kind, gbps, settings)
    counts = runner.ahead.counters
    if kind == "nothing":
        assert counts.useful + counts.late + counts.wasted + counts.cancelled == 0
    if kind == "right" and gbps == FAST:
        assert counts.useful > 0 and counts.wasted == 0
    if kind == "wrong":
        assert counts.wasted + counts.cancelled + runner.ahead.held_bytes() > 0
    assert stub.resets == [list(range(live))]  # the prompt's, whose first tokens are at position 0
    layers, experts = runner.ahead._taken.shape
    shapes = {None if gates is None else gates.shape for gates in stub.gates}
    assert shapes == {(GATES[family], experts) if GATES[family] else None}


def test_the_routers_of_the_next_layers_predict_them():
    """The gate predictor on a model whose residual stream hardly changes from layer to layer would be right; here it is at least heard."""
    family, live = "olmoe", 4
    layers, router = 2, resident(family).spec.moe[0]
    foresight = Foresight(GATE, GATE.fit([], sizes=Sizes(layers, router.experts, router.active)), ROWS, GATES[family])
    runner, model = runner_of(family, always(8, 1, 4), foresight, FAST)
    outs, _, _ = run(runner, model, live)
    same_bits(outs, plain(family, live)[0])
    assert runner.ahead.counters.useful > 0


@pytest.mark.parametrize("after", [0, 9, 23, 50])
def test_a_record_that_can_not_be_read_loses_nothing(after):
    """The reader fails from some call on, for demand and prefetch alike: the caller hears of it, and the next run is as if nothing had been."""
    family, live = "qwen3_moe", 4
    source = Failing(source_of(family), after)
    runner, model = runner_of(family, always(4, 2), Stub(known(family, live), "random"), FAST, source)
    with pytest.raises(OSError, match="a damaged record"):
        run(runner, model, live)
    source.left = 1 << 30
    runner._lookout._foresight.known.restart()
    outs, _, _ = run(runner, model, live)
    same_bits(outs, plain(family, live)[0])
    assert all(not held.asked or held.layer == 1 for held in runner.ahead._held.values()) and len(runner.ahead._held) <= 4


def test_prefetches_that_can_not_be_read_are_left_to_demand():
    """A reader that fails whenever it is asked ahead of demand: nothing is staged, and nobody hears of it."""
    family, live = "olmoe", 4
    source = Failing(source_of(family), 1 << 30)
    runner, model = runner_of(family, always(4, 1), Stub(known(family, live), "right", GATES[family]), FAST, source)
    runner.ahead._source = Failing(source_of(family), 0)
    outs, _, _ = run(runner, model, live)
    same_bits(outs, plain(family, live)[0])
    assert runner.ahead.counters.useful == 0 and runner.ahead.counters.demand > 0


class Failing:
    """A source that raises when a record is taken, after so many that it gave."""

    def __init__(self, source: ExpertSource, left: int):
        self.source, self.left, self.record_bytes = source, left, source.record_bytes

    def ask(self, layer: int, expert: int):
        def give():
            self.left -= 1
            if self.left < 0:
                raise OSError("a damaged record")
            return self.source.ask(layer, expert)()

        return give


def test_a_policy_that_goes_by_predictions_is_told_them():
    """The table of predicted uses is written before the first layer, and what nothing is known of is marked."""
    family, live = "olmoe", 2
    told = known(family, live)
    runner, model = runner_of(family, None, told)
    tables = model.bank.init_state()
    layers, experts = tables.slot_of_expert.shape
    table = jax.device_put(np.zeros((layers, 3, experts), np.float32))
    tables = dataclasses.replace(tables, tables=tables.tables | {FORESEEN: table})
    rows = np.arange(ROWS, dtype=np.int32)
    batch = runner.programs.decode_batch(rows, rows, rows + PROMPT, rows < live)
    found = np.asarray(runner._begin(batch, tables).tables[FORESEEN])
    np.testing.assert_array_equal(found[:, :2], told.before(None, None).swapaxes(0, 1))
    assert (found[:, 2] == -1).all() and found[:, :2].any()


def test_prefetching_needs_somebody_to_say_what_and_time_to_do_it_in():
    model, _ = compiled("olmoe")
    arguments = (model.spec, model.bank, model.kernels, True, source_of("olmoe"))
    with pytest.raises(ValueError, match="prefetch needs a foresight"):
        HostDriven(*arguments, prefetch=Prefetch())
    with pytest.raises(ValueError, match="overlap = False sends nothing before it is asked for"):
        HostDriven(*arguments, overlap=False, prefetch=Prefetch(), foresight=Known([], 8))
